"""The demo: its search for the longest context, its tables and its picture; and what the examples may import."""

import json
import re
from pathlib import Path

import pytest
from examples.demo import __main__ as demo
from examples.demo import memory, report, train
from examples.demo.ways import Way
from tests.python.torch import small_folder

ROOT = Path(__file__).parents[3]
MIB = 2**20


@pytest.mark.parametrize("slope,offset", [(1.0, 20.0), (0.25, 0.0), (0.1, 300.0)])
def test_the_longest_context_is_the_last_that_fits(slope, offset):
    def peak(tokens):
        return int((offset + slope * tokens) * MIB)

    measured: list[int] = []

    def measure(tokens):
        measured.append(tokens)
        return peak(tokens)

    peaks = {n: peak(n) for n in (256, 512, 1024)}
    found = memory.longest(peaks, 512 * MIB, measure)
    truth = int((512 - offset) / slope) // memory.STEP * memory.STEP
    assert found == truth and found in peaks and set(measured) <= set(peaks) and len(measured) <= memory.TRIES


def test_nothing_fits():
    peaks = {n: 10 * n * MIB for n in (256, 512)}
    assert memory.longest(peaks, 100 * MIB, lambda tokens: 10 * tokens * MIB) == 0


def test_the_curve_keeps_its_peak():
    curve = memory.Curve()
    curve.samples = [(0.01 * i, 100 + (900 if i == 617 else i % 7)) for i in range(1000)]
    points = curve.above(100)
    assert len(points) <= memory.Curve.POINTS and max(nbytes for _, nbytes in points) == 900
    shares = [share for share, _ in points]
    assert shares == sorted(shares) and shares[-1] == 1


def of(way: Way, factor: float) -> dict:
    peaks = {str(n): int(factor * n * MIB) for n in (256, 512)}
    return {
        "way": way.__dict__, "idle_bytes": 1000 * MIB, "saved_bytes_per_token": 1000 * factor, "peaks_above_idle_bytes": peaks,
        "longest": int(512 / factor), "tried_bytes": peaks | {str(int(512 / factor)): 512 * MIB},
        "curve": [(0.0, 0), (0.5, int(512 * factor * MIB)), (1.0, 0)],
    }  # fmt: skip


def result() -> dict:
    stock, ours = [3.0, 2.5, 2.0, 1.5, 1.2, 1.0], [3.0, 2.5, 2.0, 1.5, 1.2, 1.25]
    runs = [
        {"seconds_per_step": 2.0, "losses": losses, "before": f"{side} before", "after": f"{side} [after]"}
        for side, losses in (("stock", stock), ("unswag", ours))
    ]
    ways = [Way(side, "lora", checkpointing) for checkpointing in (False, True) for side in ("stock", "unswag")]
    conditions = {"cpu": "a processor", "threads": 2, "torch": "2", "transformers": "5", "peft": "0", "date": "", "commit": ""}
    return {
        "conditions": conditions, "model": "A model", "dtype": "float32", "lengths": [256, 512], "curve_tokens": 512,
        "budget_bytes": 512 * MIB, "row_tokens": 64, "epochs": 3, "question": "why?",
        "parts": [{"training": "lora", "memory": list(map(of, ways, (4, 2, 1, 0.5))), "runs": runs}],
    }  # fmt: skip


def test_tables_and_picture(tmp_path, capsys):
    found = json.loads(json.dumps(result()))
    assert report.largest_difference(found["parts"][0]) == 0.25
    report.write(found, tmp_path)
    text = (tmp_path / "table.txt").read_text()
    assert "a processor" in capsys.readouterr().out
    cells = [[cell.strip() for cell in re.split("[│┃]", line)] for line in text.splitlines()]
    assert ["", "512", "2,048", "1,024", "512", "256", ""] in cells  # MiB above the idle model
    assert ["", "longest context in 512", "128", "256", "512", "1,024", ""] in cells
    assert ["", "mean loss, first epoch", "2.7500", "2.7500", ""] in cells
    assert ["", "mean loss, last epoch", "1.1000", "1.2250", ""] in cells
    assert ["", "largest difference of a loss", "", "2.5e-01", ""] in cells
    assert "after    unswag [after]" in text and "stock before" not in text
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["picture.png", "table.txt"]


def test_both_measurements_run(tmp_path, monkeypatch):
    """What the demo's processes do, on a small model and in this process."""
    from examples import smollm2

    folder = small_folder.save(tmp_path / "model")
    monkeypatch.setattr(smollm2, "directory", lambda: folder)
    for process in (memory, train):
        monkeypatch.setattr(process, "quiet", lambda: None)
    part = {"training": "lora", "memory": [], "runs": []}
    rows, asked = demo.prepare(tmp_path, 512)
    for checkpointing in (False, True):
        for side in ("stock", "unswag"):
            way = Way(side, "lora", checkpointing).__dict__
            monkeypatch.setattr("sys.argv", ["memory", json.dumps([way, [64, 128], 128, MIB]), str(tmp_path / "memory.json")])
            memory.main()
            part["memory"].append(json.loads((tmp_path / "memory.json").read_text()))
    for side in ("stock", "unswag"):
        way = Way(side, "lora", True).__dict__
        monkeypatch.setattr("sys.argv", ["train", json.dumps([way, str(rows), 2, asked]), str(tmp_path / "train.json")])
        train.main()
        part["runs"].append(json.loads((tmp_path / "train.json").read_text()))
    stock, ours = (one["saved_bytes_per_token"] for one in part["memory"][:2])
    assert ours < stock
    losses = part["runs"][0]["losses"]
    assert len(losses) % 2 == 0 and losses[-1] < losses[0] and report.largest_difference(part) < 1e-3
    found = result() | {"lengths": [64, 128], "curve_tokens": 128, "budget_bytes": MIB, "epochs": 2, "parts": [part]}
    assert "| 128 |" in report.markdown(json.loads(json.dumps(found)))


def test_examples_import_nothing_of_the_benchmarks():
    files = sorted((ROOT / "examples").rglob("*.py"))
    assert len(files) > 8
    assert not [path for path in files if re.search(r"^\s*(from|import) bench\b", path.read_text(), re.MULTILINE)]


def test_the_results_page_is_written_from_the_committed_result():
    page, committed = ROOT / "docs" / "results.md", ROOT / "bench" / "results" / "demo.json"
    found = json.loads(committed.read_text())
    shown = page.read_text().partition(report.BEGIN)[2].partition(report.END)[0]
    assert shown == report.markdown(found), "run: python -m examples.demo.report bench/results/demo.json"
    stock, ours = (one["longest"] for one in found["parts"][0]["memory"][2:])
    assert f"512 MiB hold {stock:,} tokens of stock and {ours:,} with UnSwag" in (ROOT / "README.md").read_text()
    assert "| 512 | 2,048 MiB | 1,024 MiB | 512 MiB | 256 MiB |" in report.markdown(json.loads(json.dumps(result())))
