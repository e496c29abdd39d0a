"""The report for a browser: one file, no network, nothing of the data is markup."""

from __future__ import annotations

import json
import re

from unswag.ledger import Ledger, Row
from unswag.report import page


def ledger(n=3, module="model.layers.{}.mlp"):
    rows = [Row(module.format(i), "mlp", (4, i), "float32", 32.0, "device", 16 * i) for i in range(n)]
    return Ledger(rows=rows, tokens=4, model="Net <b>", batch={"x": (1, 4)})


def data_of(text):
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S)[1])


def test_everything_is_in_one_file(tmp_path):
    ledger(module="</script><script>alert(1)</script>{}").save_html(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text("utf-8")
    assert "Net &lt;b&gt;" in text and "alert(1)</script>" not in text
    assert not re.search(r"(src|href)\s*=", text) and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert len(data_of(text)["sides"][0]["rows"]) == 3


def test_two_ledgers_stand_beside_each_other(tmp_path):
    ledger().compare(ledger(5), ("stock", "ours")).save_html(tmp_path / "r.html")
    sides = data_of((tmp_path / "r.html").read_text("utf-8"))["sides"]
    assert [(s["name"], len(s["rows"])) for s in sides] == [("stock", 3), ("ours", 5)]


def test_a_hundred_thousand_rows(tmp_path):
    page.save(tmp_path / "r.html", {"": ledger(100_000)})
    assert len(data_of((tmp_path / "r.html").read_text("utf-8"))["sides"][0]["rows"]) == 100_000
