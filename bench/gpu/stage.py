"""What the stages share: settings, checks, and a device that may be a CPU for a dry run.

A stage is a module with NAME, TITLE, and
    pieces(settings) -> list[str]                       in the order in which they are done
    run(piece, settings, notes) -> dict                 in a worker process; raises NotMeasured for what cannot be said here
    checks(pieces: dict[str, dict]) -> dict[str, dict]  what the figures of several pieces together must show
    table(pieces) -> (header, rows)                     for the terminal
The result of a piece may have "checks" and "not_measured" of its own.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Checks = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """device: "cuda", or "cpu" in a dry run.  dry: tiny sizes, nothing that needs a GPU; its figures mean nothing."""

    device: str = "cuda"
    dry: bool = False

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


@dataclass
class Notes:
    """Results inside a piece, kept as they come: a piece that was killed finds them again."""

    known: dict[str, Any] = field(default_factory=dict)
    keep: Callable[[str, Any], None] = lambda key, value: None

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known[key] = make()
            self.keep(key, self.known[key])
        return self.known[key]


class NotMeasured(Exception):
    """What is missing here, e.g. "liger-kernel is absent"."""


def at_most(value: float, limit: float, *, must: bool = True) -> dict[str, Any]:
    return {"value": value, "at_most": limit, "must": must, "reached": value <= limit}


def at_least(value: float, limit: float, *, must: bool = True) -> dict[str, Any]:
    return {"value": value, "at_least": limit, "must": must, "reached": value >= limit}


def none(count: int) -> dict[str, Any]:
    """There must be none."""
    return at_most(count, 0)


def holds(value: bool) -> dict[str, Any]:
    """It must be so."""
    return {"value": value, "must": True, "reached": value}


def failed(checks: Checks) -> list[str]:
    """Those that were not reached, in words."""
    found = []
    for what, c in checks.items():
        if not c["reached"]:
            limit = (
                f", at most {c['at_most']:g}" if "at_most" in c else f", at least {c['at_least']:g}" if "at_least" in c else ""
            )
            found.append(f"{'' if c['must'] else 'goal missed: '}{what}: {c['value']}{limit}")
    return found


def synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Gives back what the process no longer uses, so that the next piece starts like the first."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and device.startswith("cuda") and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


QUEUE = (
    40_000_000  # cycles of a sleeping kernel, some 20 ms: the launches that follow it are all queued when the first one starts
)


def seconds(call: Callable[[], object], device: str, repeat: int) -> list[float]:
    """Of each of `repeat` calls, after two that do not count; on a GPU between events, without the time of the launches."""
    import torch

    for _ in range(2):
        call()
    if not device.startswith("cuda"):
        found = []
        for _ in range(repeat):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(QUEUE)
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def best_and_median(times: Iterable[float]) -> dict[str, float]:
    times = list(times)
    return {"best": min(times), "median": statistics.median(times)}
