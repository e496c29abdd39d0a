"""bench.tpu_aot without a compiler: the search, the cells, and docs/tpu.md as the committed results say."""

from __future__ import annotations

import json

import pytest
from bench import tpu_aot

FITS = {"fits": True, "peak": 7_500_000_000, "temporaries": 0}
TOO_LARGE = {"fits": False, "needs": "28.57G", "of": "15.75G"}


@pytest.mark.parametrize("bytes_per_token", [20_000, 60_000, 64_519, 1_900_000])
@pytest.mark.parametrize("bend", [0, 3e-3])
def test_the_largest_that_fits_is_found_whether_or_not_the_peak_is_a_line(bytes_per_token, bend):
    compiled = []

    def compile_at(tokens):
        assert tokens % 8192 == 0 and tokens > 0
        compiled.append(tokens)
        peak = int(1e8 + tokens * bytes_per_token + bend * tokens**2)
        return {"fits": True, "peak": peak} if peak <= tpu_aot.HBM else TOO_LARGE

    found, peak = tpu_aot.largest(compile_at)
    assert found == 0 or compile_at(found) == {"fits": True, "peak": peak}
    assert not compile_at(found + 8192)["fits"]
    assert len(set(compiled)) == len(compiled) - 1 - (found > 0)  # none twice but for these two lines
    assert len(compiled) < 16


def test_an_error_ends_the_search():
    with pytest.raises(RuntimeError, match="Internal"):
        tpu_aot.largest(lambda tokens: {"fits": False, "error": "Internal"})


def test_a_cell_says_what_does_not_fit_and_what_failed():
    assert tpu_aot.told(FITS) == "7.50" and tpu_aot.told(FITS, "temporaries") == "0"
    assert tpu_aot.told(TOO_LARGE) == "no: 28.57GiB"
    assert tpu_aot.told({"fits": False, "needs": None, "of": None}) == "no: out of memory"
    assert tpu_aot.told({"fits": False, "error": "Internal: no"}) == "error"


def test_the_tables_of_the_documentation_are_those_of_the_results():
    results = json.loads((tpu_aot.ROOT / "bench" / "results" / "tpu-aot.json").read_text())
    text = tpu_aot.DOCS.read_text()
    assert tpu_aot.document(text, results) == text, "run: python -m bench.tpu_aot"
    for title in ("One operator", "The honest table"):
        assert f"### {title}" in text


def test_a_lost_mark_is_an_error():
    with pytest.raises(ValueError, match=r"tpu\.md has lost one of its marks"):
        tpu_aot.document("# TPU\n" + tpu_aot.BEGIN, {"versions": {}, "groups": {}})
