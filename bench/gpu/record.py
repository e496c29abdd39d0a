"""bench/results/gpu-<name>.json: results, and at the same time what a stage that was killed goes on from.

The single results lie in the file itself and not in .cache/ (bench/kept.py), because a rented machine starts bare: what
comes back from it, and goes there again, are these files. They count for the sources they were made from, for one GPU and
one torch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import smollm2

SOURCES = ("src", "include", "bindings", "cmake", "python/unswag", "CMakeLists.txt")
ENDINGS = (".cpp", ".hpp", ".cu", ".cuh", ".cmake", ".txt", ".py", ".json")
SHARED = tuple(f"bench/gpu/{name}.py" for name in ("stage", "samples", "build"))
SAME = ("gpu", "torch")  # of the machine: a result of another one starts the stage afresh


def sources(stage: Path, root: Path = smollm2.ROOT) -> str:
    """A name for the library's sources and the code of a stage, the same with and without git."""
    files: list[Path] = [stage]
    for place in (*SOURCES, *SHARED):
        path = root / place
        files += [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in ENDINGS and p.is_file()]
    state = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        state.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return state.hexdigest()[:16]


class Record:
    """The results of one stage. `done` are its finished pieces, `parts` what a piece has found so far."""

    def __init__(self, name: str, title: str, folder: Path, machine: dict[str, Any], made_from: str, again: bool = False):
        self.path = folder / f"{name}.json"
        self.data: dict[str, Any] = {
            "title": title, "dry": False, "complete": False, "sources": made_from, "date": "", "machine": machine,
            "seconds": 0.0, "checks": {}, "findings": [], "not_measured": [], "pieces": {}, "parts": {},
        }  # fmt: skip
        before = json.loads(self.path.read_text()) if self.path.exists() and not again else {}
        same = all(before.get("machine", {}).get(key) == machine.get(key) for key in SAME)
        if before.get("sources") == made_from and same:
            self.data |= {key: before[key] for key in ("complete", "seconds", "pieces", "parts")}

    def done(self, pieces: Iterable[str]) -> list[str]:
        """Those that need not be done again. What failed is tried again."""
        return [p for p in pieces if "error" not in self.data["pieces"].get(p, {"error": "not run"})]

    def part(self, piece: str, key: str, value: Any) -> None:
        self.data["parts"].setdefault(piece, {})[key] = value
        self.write()

    def piece(self, piece: str, result: dict[str, Any]) -> None:
        self.data["pieces"][piece] = result
        if "error" not in result:
            self.data["parts"].pop(piece, None)
        self.write()

    def write(self) -> None:
        self.data["date"] = time.strftime("%Y-%m-%d")
        smollm2.write_json(self.path, self.data)
