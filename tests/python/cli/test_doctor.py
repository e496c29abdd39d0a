"""unswag doctor: three lines of verdict, then the facts; the same as JSON."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from unswag import cli, doctor


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["doctor", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_it_begins_with_what_works_what_was_not_run_and_what_comes_next():
    verdict = doctor.examine()["verdict"]
    lines = shown().splitlines()
    assert lines[:4] == [
        f"Works here:  {verdict['works']}",
        f"Not run yet: {verdict['untested']}",
        f"Next:        {verdict['next']}",
        "",
    ]


def test_the_facts_follow_each_once():
    found, text = doctor.examine(), shown()
    here = (found["cpu"]["model"], found["kernels"]["chosen"], found["versions"]["numpy"])
    for words in (*here, "leaky_relu", "alpha: 1 bit", "What will be used"):
        assert words in text, words
    for why in {one["why"] for one in found["protocols"]}:
        assert " ".join(text.split()).count(why) >= 1
    assert text.count("relu, leaky_relu, relu6") == 1
    assert len(text.splitlines()) <= 50


def test_the_json_is_all_that_was_found():
    found = json.loads(shown("--json"))
    assert found.keys() == doctor.examine().keys() and found["verdict"].keys() == {"works", "untested", "next"}
    assert "--json" in CliRunner().invoke(cli.app, ["doctor", "--help"], env={"TERM": "dumb", "NO_COLOR": "1"}).stdout


def test_devices_and_notes_are_shown(monkeypatch):
    device = {"name": "Some T4", "architecture": "sm_75", "memory": 16 << 30}
    found = doctor.examine() | {
        "cuda": [device | {"problem": "made for sm_90 [only]"}, device | {"name": "Another", "problem": ""}],
        "notes": ["no kernels run on CUDA device 0: made for sm_90 [only]"],
        "memory": {}, "kernels": {}, "protocols": [],
    }  # fmt: skip
    monkeypatch.setattr("unswag.cli.doctor.examine", lambda: found)
    text = shown()
    assert "Some T4 (sm_75, 16.0 GiB): not used, see the notes" in text and "Another (sm_75, 16.0 GiB)" in text
    assert "note: no kernels run on CUDA device 0: made for sm_90 [only]" in text and "none in this build" in text
