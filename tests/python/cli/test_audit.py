"""unswag audit: a ledger from a config, as JSON and back, two compared, and the report."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from unswag import cli
from unswag.ledger import Ledger

CONFIG = dict(model_type="llama", hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, vocab_size=500)  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(cli.app, ["audit", *arguments])


def test_two_audits_are_compared(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    for name, options in (("stock", ("--stock",)), ("ours", ())):
        result = run(str(config), "--tokens", "64", "--json", *options)
        assert result.exit_code == 0, result.output
        (tmp_path / f"{name}.json").write_text(result.stdout)
        ledger = Ledger.from_json(result.stdout)
        assert json.loads(ledger.to_json()) == json.loads(result.stdout) and ledger.tokens == 64
    both = run("--diff", str(tmp_path / "stock.json"), str(tmp_path / "ours.json"), "--html", str(tmp_path / "r.html"))
    assert both.exit_code == 0 and "ours / stock" in both.stdout and (tmp_path / "r.html").exists()


def test_errors_are_one_line(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    for arguments in ((), ("/no/such/folder",), ("--diff", str(tmp_path / "x.json"), str(tmp_path / "x.json"))):
        result = run(*arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output
