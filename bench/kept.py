"""Results of single runs, kept in .cache/ as they come, so that a benchmark that is killed goes on where it was."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.smollm2 import ROOT, SOURCES, Job, commit, fresh, say, write_json


class Kept:
    """One file per result; it counts for what it was made from and the settings it was made with. It was made `of` the sources
    (committed or not), unless that is named more narrowly."""

    def __init__(self, bench: str, folder: Path = ROOT / ".cache" / "bench", *, of: str | None = None):
        self._folder = folder / bench
        self._sources = sources() if of is None else of

    def _path(self, settings: object) -> Path:
        key = json.dumps([self._sources, settings], sort_keys=True, default=dataclasses.asdict)
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"

    def get(self, settings: object) -> Any | None:
        path = self._path(settings)
        return json.loads(path.read_text())["result"] if path.exists() else None

    def put(self, settings: object, result: object) -> None:
        write_json(self._path(settings), {"settings": settings, "result": result}, indent=None)


def sources() -> str:
    """A name for the state of the sources and of the native module built from them."""
    state = hashlib.sha256()
    for command in (["ls-files", "-s"], ["diff", "HEAD"]):
        state.update(subprocess.run(["git", *command, "--", *SOURCES], cwd=ROOT, capture_output=True, check=True).stdout)
    for module in sorted((ROOT / "python" / "unswag").glob("_core*.so")):
        state.update(module.read_bytes())
    return state.hexdigest()


def add_runs(parser: argparse.ArgumentParser) -> None:
    """The options that `runs_of` reads."""
    parser.add_argument("--runs", type=int, default=3, help="fresh processes per figure; the worst counts (default 3)")
    parser.add_argument("--stock-runs", type=int, help="the same for stock and stock with our loss (default as --runs)")


def runs_of(args: argparse.Namespace) -> Callable[[str], int]:
    """How many runs a side gets."""
    return lambda side: args.runs if side == "ours" or args.stock_runs is None else args.stock_runs


def runs_of_sides(
    bench: str,
    measure: Callable[..., dict],
    job: Job,
    sides: Iterable[str],
    runs: Callable[[str], int],
    steps: int,
    environment: dict[str, str] | None = None,
) -> dict[str, list[dict]]:
    """`measure(job of the side, steps)`, each time in a fresh process: side -> its results, each with the commit it is of."""
    kept, results = Kept(bench), {}
    for side in sides:
        one = dataclasses.replace(job, side=side)
        results[side] = []
        for i in range(runs(side)):
            settings = {"job": one, "steps": steps, "environment": environment, "run": i}
            result = kept.get(settings)
            say(f"{one}, run {i + 1} of {runs(side)}{': kept from before' if result else ''}")
            if result is None:
                of = commit()
                result = {**fresh(measure, one, steps, environment=environment), "commit": of}
                kept.put(settings, result)
            results[side].append(result)
    return results
