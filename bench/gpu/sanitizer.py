"""Stage 2: compute-sanitizer finds nothing in any kernel, at any tail."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any

from bench.gpu.build import BUILD
from bench.gpu.stage import Checks, Notes, NotMeasured, Settings, holds, none

NAME = "gpu-sanitizer"
TITLE = "compute-sanitizer over all kernels, dtypes and tails"

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OURS = "unswag"  # the namespace in a kernel's name; other kernels are PyTorch's
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
FINDING = re.compile(
    r"^========= (?:(?:Error|Warning): )?(?:Invalid|Uninitialized|Misaligned|Race reported|Barrier error|Potential)"
)

SHOWN = 10


def command(tool: str) -> list[str]:
    """What is run. Errors of API calls are PyTorch's way of asking what a device can do: not reported. The tool waits for
    as long as importing torch takes."""
    return [
        "compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--show-backtrace", "device", "--print-limit", "1000",
        "--launch-timeout", "0", sys.executable, "-m", "bench.gpu.sweep", "--device", "cuda",
    ]  # fmt: skip


def read(text: str) -> dict[str, Any]:
    """The summary and the findings of what the tool printed; a finding belongs to us if a line of its block names our
    namespace."""
    count = None
    blocks: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        if found := SUMMARY.search(line):
            count = int(found[1] or found[2])
        elif FINDING.match(line):
            blocks.append([line])
            inside = True
        elif inside and line.startswith("=========     "):
            blocks[-1].append(line)
        else:
            inside = False
    ours = [b for b in blocks if any(OURS in line for line in b)]
    return {
        "errors": count,
        "ours": len(ours),
        "of_others": len(blocks) - len(ours),
        "first": ["\n".join(line.removeprefix("=========").strip() for line in b[:6]) for b in (ours or blocks)[:SHOWN]],
    }


def watched(tool: str) -> dict[str, Any]:
    if shutil.which("compute-sanitizer") is None:
        raise NotMeasured("compute-sanitizer is absent")
    log = BUILD / f"{tool}.log"
    # each tensor with an allocation of its own, or a write past its end would fall into PyTorch's pool
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "4"}
    with log.open("w") as f:
        done = subprocess.run(command(tool), stdout=f, stderr=subprocess.STDOUT, env=environment)
    return judged(log.read_text(errors="replace"), done.returncode)


def judged(text: str, code: int) -> dict[str, Any]:
    """What a run that printed `text` and ended with `code` shows."""
    found = read(text)
    last = next((line for line in reversed(text.splitlines()) if line.startswith('{"calls"')), None)
    if found["errors"] is None or last is None:
        raise RuntimeError(f"the run did not come to its end (exit status {code}):\n" + "\n".join(text.splitlines()[-15:]))
    sweep = json.loads(last)
    # a finding whose block was not understood must count as well
    unread = max(0, found["errors"] - found["ours"] - found["of_others"])
    return {
        **found, "sweep": sweep, "not_measured": sweep["unsupported"],
        "checks": {
            "findings in our kernels": none(found["ours"]),
            "findings that could not be read": none(unread),
            "kernels were called": holds(sweep["calls"] > 0),
        },
    }  # fmt: skip


def pieces(settings: Settings) -> list[str]:
    return list(TOOLS)


def run(piece: str, settings: Settings, notes: Notes) -> dict[str, Any]:
    if settings.dry:
        from bench.gpu.sweep import sweep

        print("not run:", *command(piece), flush=True)
        calls = f"; the sweep alone made {sweep(settings.device)['calls']} calls" if piece == TOOLS[0] else ""
        raise NotMeasured(f"compute-sanitizer needs a GPU{calls}")
    return watched(piece)


def checks(pieces: dict[str, dict[str, Any]]) -> Checks:
    return {}


def table(pieces: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = [
        (piece, str(r["sweep"]["calls"]), str(r["ours"]), str(r["of_others"]), f"{r['sweep']['seconds']:.0f}")
        for piece, r in pieces.items()
        if "sweep" in r
    ]
    return ("tool", "calls", "findings", "in PyTorch's kernels", "s"), rows
