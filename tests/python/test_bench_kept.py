"""Kept results: found again for the same sources and settings only, and by a run that was killed."""

import json

import pytest
from bench import kept, smollm2
from bench.kept import Kept, runs_of_sides
from bench.smollm2 import Job


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "sources", lambda: "as they are")
    monkeypatch.setattr(Kept.__init__, "__defaults__", (tmp_path,))
    return tmp_path


def test_finds_what_was_put_for_the_same_settings_only(folder):
    Kept("one").put({"job": Job(side="ours"), "run": 0}, {"bytes": 7})
    assert Kept("one").get({"job": Job(side="ours"), "run": 0}) == {"bytes": 7}
    assert Kept("one").get({"job": Job(side="ours"), "run": 1}) is None
    assert Kept("one").get({"job": Job(side="ours", tokens=512), "run": 0}) is None
    assert Kept("two").get({"job": Job(side="ours"), "run": 0}) is None


def test_other_sources_have_other_results(folder, monkeypatch):
    Kept("one").put("settings", 1)
    monkeypatch.setattr(kept, "sources", lambda: "changed")
    assert Kept("one").get("settings") is None


def test_sources_change_with_a_file(tmp_path, monkeypatch):
    import subprocess

    (tmp_path / "src").mkdir()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    for name in ("src/a", "bench/b", "bench/results/c"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    monkeypatch.setattr(smollm2, "ROOT", tmp_path)
    who = ["-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    before = kept.sources()
    (tmp_path / "bench/results/c").write_text("2")
    assert kept.sources() == before  # a result is no source
    assert not smollm2.commit().endswith("-dirty")
    (tmp_path / "src/a").write_text("2")
    changed = kept.sources()
    assert changed != before and smollm2.commit().endswith("-dirty")
    subprocess.run(["git", *who, "commit", "-qam", "second"], cwd=tmp_path, check=True)
    assert kept.sources() != before


def test_a_killed_run_goes_on_where_it_was(folder, monkeypatch):
    measured = []

    def fresh(measure, job, steps, environment):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((job.side, steps, environment))
        return {"number": len(measured)}

    monkeypatch.setattr(kept, "fresh", fresh)

    def run():
        how_many = {"stock": 1, "ours": 3}
        return runs_of_sides("one", None, Job(), how_many, how_many.get, 2, {"A": "1"})

    with pytest.raises(KeyboardInterrupt):
        run()
    files = sorted(folder.rglob("*"))
    assert len([f for f in files if f.suffix == ".json"]) == 3 and not [f for f in files if f.suffix == ".tmp"]
    assert all("result" in json.loads(f.read_text()) for f in files if f.is_file())
    measured.pop()  # of the three that were measured the third is forgotten here, not in the folder
    results = run()
    assert [r["number"] for r in results["stock"]] == [1]
    assert [r["number"] for r in results["ours"]] == [2, 3, 3]
    assert all(r["commit"] for r in results["ours"])
    assert measured == [("stock", 2, {"A": "1"}), ("ours", 2, {"A": "1"}), ("ours", 2, {"A": "1"})]
