"""What bench.memory concludes from what it counted."""

import math

from bench.memory import apart, checks, worst


def side(saved, curve, peak=100, ledger=None):
    ledger = saved if ledger is None else ledger
    counted = {"saved_bytes_per_token": saved, "ledger_bytes_per_token": ledger, "peak_bytes": peak}
    return {**counted, "backward_curve_bytes": curve, "commit": "abc"}


def test_the_worst_run_counts_with_the_highest_peak():
    runs = [side(10, [3, 1], peak=7), side(12, [3, 2], peak=5)]
    result = worst(runs)
    assert (result["saved_bytes_per_token"], result["peak_bytes"], result["backward_curve_bytes"]) == (12, 7, [3, 2])
    assert [r["saved_bytes_per_token"] for r in result["runs"]] == [10, 12]


def test_curves_are_compared_as_parts_of_their_start():
    assert apart([400, 200, 100], [40, 20, 10]) == 0
    assert apart([400, 300, 100], [40, 20, 10]) == 0.25
    assert apart([400, 200], [40, 20, 10]) == math.inf


def test_every_check_can_fail():
    stock = side(100, [30, 20, 10])
    good = {"stock": stock, "our loss": side(100, [30, 20, 10], peak=100), "ours": side(50, [15, 10, 5], peak=90)}
    assert all(c["reached"] for c in checks(good, 50).values())
    assert len(checks(good, 50)) == 10

    def missed(**changed):
        ours = {**good["ours"], **changed}
        return [name for name, c in checks({**good, "ours": ours}, 50).items() if not c["reached"]]

    assert missed(ledger_bytes_per_token=48) == ["ours: ledger against count"]
    assert missed(ledger_bytes_per_token=52) == ["ours: ledger against count"]
    assert missed(backward_curve_bytes=[15, 10, 10]) == [
        "ours: layers in the backward after which no less is alive",
        "ours: backward curve against stock's",
    ]
    assert missed(backward_curve_bytes=[15, 8, 5]) == ["ours: backward curve against stock's"]
    assert missed(peak_bytes=91) == ["ours: peak against stock with our loss"]
    assert missed(saved_bytes_per_token=51, ledger_bytes_per_token=51) == ["ours: saved bytes per token"]


def test_says_nothing_about_sides_that_were_not_run():
    assert set(checks({"stock": side(100, [2, 1])}, 50)) == {
        "stock: ledger against count",
        "stock: layers in the backward after which no less is alive",
    }
