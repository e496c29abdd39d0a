"""Two results of a benchmark, compared: what counts as faster, and which files are refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bench import compare

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "one", "cores": 2, "instruction_sets": ["avx2"], "commit": "1234567"}


def row(kernel="relu", ms=1.0, of_copy=0.5, **more):
    return {"kernel": kernel, "dtype": "float32", "threads": 2, "ms": ms, "of_copy": of_copy, "torch_ms": {"relu": 9.0}, **more}


@pytest.fixture
def result(tmp_path):
    def write(name, rows, machine=MACHINE, **more):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"date": name, "machine": machine, "mib": 96, "best_of": 3, "rows": rows, **more}))
        return compare.read(path)

    return write


def verdicts(old, new, noise=0.05):
    return {change.name: change.verdict for change in compare.compare(old, new, noise)}


def test_a_row_is_faster_or_slower_beyond_the_noise(result):
    old = result("old", [row("a"), row("b"), row("c"), row("d")])
    rows = [row("a", 0.8, 0.625), row("b", 1.25, 0.4), row("c", 1.04, 0.49), row("d", 0.96, 0.51)]
    new = result("new", rows)
    expected = {"a": "faster", "b": "slower", "c": "the same", "d": "the same"}
    assert verdicts(old, new) == {f"{name} float32 threads 2": verdict for name, verdict in expected.items()}
    assert set(verdicts(old, new, noise=0.3).values()) == {"the same"}
    changes = compare.compare(old, new, 0.05)
    assert [change.name[0] for change in changes] == ["b", "c", "d", "a"]  # those that lost most first
    assert changes[0].times == pytest.approx(0.8) and changes[-1].times == pytest.approx(1.25)


def test_a_change_that_the_copy_shares_is_unclear(result):
    old = result("old", [row("a"), row("b")])
    assert set(verdicts(old, result("new", [row("a", 2.0, 0.5), row("b", 1.0, 0.8)])).values()) == {"unclear"}


def test_other_machines_are_compared_by_the_share_of_a_copy(result):
    old = result("old", [row("a"), row("b"), {"kernel": "no copy", "ms": 1.0}])
    new = result("new", [row("a", 4.0, 0.6), row("b", 0.1, 0.4), {"kernel": "no copy", "ms": 0.1}], {**MACHINE, "cpu": "two"})
    assert verdicts(old, new) == {"a float32 threads 2": "faster", "b float32 threads 2": "slower"}
    text = compare.text(old, new, compare.compare(old, new, 0.05), 0.05)
    assert "Different machines" in text and "cpu one" in text and "cpu two" in text


def test_another_commit_is_the_same_machine(result):
    old, new = result("old", [row()]), result("new", [row(ms=0.5, of_copy=1.0)], {**MACHINE, "commit": "7654321"})
    assert compare.same_machine(old, new) and set(verdicts(old, new).values()) == {"faster"}


def test_all_shapes_of_results_are_walked(result):
    def jobs(a, b):
        return {
            "full": {
                "job": {"tokens": 7},
                "rounds": [{"seconds": {"ours": a, "stock": 3.0}}, {"seconds": {"ours": b, "stock": 2.0}}],
            }
        }

    old, new = result("old", jobs(2.0, 1.0)), result("new", jobs(0.5, 4.0))
    assert old.rows == {("full", "ours", "seconds"): 1.0, ("full", "stock", "seconds"): 2.0}  # the best of the rounds
    assert result("twice", [row(of_copy=0.5), row(of_copy=0.7)]).rows["relu", "float32", "threads 2", "of_copy"] == 0.7
    assert verdicts(old, new) == {"full ours": "faster", "full stock": "the same"}
    nested = result("nested", {"silu": {"ours_seconds": {"best": 1.0, "median": 2.0}, "of_copy": 0.5}})
    assert verdicts(nested, nested) == {"silu best": "the same", "silu median": "the same"}
    assert compare.compare(nested, nested, 0.05)[0].old_share == 0.5


def test_rows_that_only_one_has_are_named(result):
    old, new = result("old", [row("a"), row("b")]), result("new", [row("a"), row("c")])
    lines = compare.text(old, new, compare.compare(old, new, 0.05), 0.05).splitlines()
    assert lines[-2].endswith("old.json: b float32 threads 2") and lines[-1].endswith("new.json: c float32 threads 2")


def test_files_that_do_not_belong_together_are_refused(result, tmp_path):
    old = result("old", [row()])
    with pytest.raises(compare.Mismatch, match=r"mib is 96 in .*old.json and 48 in .*small.json; compare runs with the same"):
        compare.compare(old, result("small", [row()], mib=48), 0.05)
    with pytest.raises(compare.Mismatch, match=r"mode is not in .* and 'x' in .*more.json"):
        compare.compare(old, result("more", [row()], mode="x"), 0.05)
    with pytest.raises(compare.Mismatch, match=r"no row of .*old.json is in .*other.json"):
        compare.compare(old, result("other", [row("another")]), 0.05)
    with pytest.raises(compare.Mismatch, match="different machines, and their times stand beside no copy"):
        times = [{"kernel": "a", "ms": 1.0}]
        compare.compare(result("here", times), result("there", times, {**MACHINE, "cores": 64}), 0.05)
    assert compare.compare(old, result("longer", [row()], best_of=9), 0.05)


@pytest.mark.parametrize(
    "content, error",
    [
        (None, "cannot be read"),
        ("words", "is not JSON"),
        ("[]", "is no result of a benchmark"),
        ('{"machine": {}, "rows": [{"kernel": "a", "ms": true, "of_copy": "x"}]}', "holds no times"),
        ('{"machine": {}, "rows": [{"kernel": "a", "bytes": 7}]}', "holds no times"),
        ('{"machine": {}, "rows": [{"kernel": "a", "ms": 0}, {"kernel": "b", "ms": NaN}]}', "holds no times"),
    ],
)
def test_files_that_are_no_results_are_refused(content, error, tmp_path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(compare.Mismatch, match=error):
        compare.read(path)


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("kernels-*.json")), ids=lambda path: path.stem)
def test_the_committed_kernels_are_read(path):
    results = compare.read(path)
    rows = json.loads(path.read_text())["rows"]
    assert len(results.rows) == 2 * len(rows)  # every row is told from the others, with its time and its share
    assert set(verdicts(results, results).values()) == {"the same"}


def test_the_command(tmp_path, result):
    old, new = result("old", [row()]).path, result("new", [row(ms=2.0, of_copy=0.25)]).path
    command = [sys.executable, "-m", "bench.compare"]
    done = subprocess.run([*command, old, new], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"slower: 1 .*\n +0.50 x .*relu float32 threads 2", done.stdout)
    refused = subprocess.run([*command, old, tmp_path / "nowhere.json"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "nowhere.json cannot be read" in refused.stderr
