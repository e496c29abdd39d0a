"""Proves the CUDA kernels on the GPU of this machine: `make gpu-check`, or python -m bench.gpu.

Five stages of at most five minutes each. A stage that is complete for these sources, this GPU and this torch is not run again;
one that was stopped goes on where it was. Writes bench/results/gpu-<name>.json. Ends with 0 if all that was asked for is
complete and everything that must hold does, 1 if something does not, 2 if a stage needs another run. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import smollm2
from bench.gpu import build
from bench.gpu.record import Record, sources
from bench.gpu.stage import Settings, failed
from bench.smollm2 import say

STAGES = tuple(f"bench.gpu.{name}" for name in ("correctness", "sanitizer", "bandwidth", "model", "context"))
BUDGET = 300.0  # seconds of a stage
BEAT = 15.0  # seconds between two signs of life of one piece


class Gone(Exception):
    """A worker ended, or was ended, without an answer."""


class Worker:
    """The process of worker.py for one stage; started when first asked, and again after a fault."""

    def __init__(self, stage: str, settings: Settings, environment: dict[str, str]):
        self._command = [sys.executable, "-m", "bench.gpu.worker", stage]
        self._settings, self._environment = settings, environment
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def ask(self, piece: str, known: dict[str, Any], until: float, part: Any = lambda key, value: None) -> dict[str, Any]:
        """The worker's answer. TimeoutError at `until` (of time.monotonic), Gone if it dies."""
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        request = {"piece": piece, "settings": asdict(self._settings), "known": known}
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Gone(self._end()) from None
        start = time.monotonic()
        while True:
            left = until - time.monotonic()
            if left <= 0:
                self.stop()
                raise TimeoutError
            try:
                line = self._lines.get(timeout=min(left, BEAT))
            except queue.Empty:
                if time.monotonic() < until:
                    say(f"  {piece}: {time.monotonic() - start:.0f} s")
                continue
            if line is None:
                raise Gone(self._end())
            answer = json.loads(line)
            if "part" in answer:
                part(answer["part"], answer["value"])
                continue
            if "error" in answer:
                self.stop()  # after a fault of the GPU a process can do nothing more
            return answer

    def _start(self) -> None:
        self._lines = lines = queue.Queue()
        self._process = process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=smollm2.ROOT,
            env=self._environment, start_new_session=True,
        )  # fmt: skip

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()

    def _end(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self.stop()
        return f"the process ended with {signal.Signals(-code).name if code < 0 else code}; what it said stands above"

    def stop(self) -> None:
        """Ends the process and those it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def run_stage(
    name: str, settings: Settings, folder: Path, environment: dict[str, str], *, again: bool = False,
    build_within: Any = None, budget: float = BUDGET,
) -> tuple[Any, Record]:  # fmt: skip
    """One stage as far as `budget` seconds take it; the module of the stage and its record."""
    start = time.monotonic()
    until = start + budget
    stage = importlib.import_module(name)
    say(f"== {stage.NAME}: {stage.TITLE}")
    built = build_within(budget) if build_within else {"seconds": 0.0}
    refused = [] if settings.dry else build.install_wheels()
    worker = Worker(name, settings, environment)
    try:
        answer = worker.ask("machine", {}, until)
    except (Gone, TimeoutError) as why:
        raise SystemExit(f"{stage.NAME}: the machine could not be described: {why}") from None
    if "error" in answer:
        raise SystemExit(f"{stage.NAME}: the machine could not be described: {answer['error']}")
    machine = answer["result"] | {"build_seconds": built["seconds"]}
    record = Record(stage.NAME, stage.TITLE, folder, machine, sources(Path(stage.__file__)), again)
    data, pieces = record.data, stage.pieces(settings)
    data["dry"] = settings.dry
    before = data["seconds"]
    done = record.done(pieces)
    if done:
        say(f"{len(done)} of {len(pieces)} pieces are done already")
    try:
        for number, piece in enumerate(pieces, 1):
            if piece in done:
                continue
            if time.monotonic() >= until:
                break
            say(f"{number}/{len(pieces)} {piece}")
            began, kept = time.monotonic(), []

            def keep(key: str, value: Any, piece: str = piece, kept: list[str] = kept) -> None:
                kept.append(key)
                record.part(piece, key, value)

            try:
                answer = worker.ask(piece, dict(data["parts"].get(piece, {})), until, keep)
                result = answer.get("result", {"error": answer.get("error")})
            except Gone as why:
                result = {"error": str(why)}
            except TimeoutError:
                if kept or until - began < 0.6 * budget:
                    break  # it goes on in the next run
                result = {"error": f"did not end in {until - began:.0f} s"}
            result["took"] = round(time.monotonic() - began, 2)
            data["seconds"] = round(before + time.monotonic() - start, 1)
            record.piece(piece, result)
            for line in [f"ERROR {result['error']}"] if "error" in result else failed(result.get("checks", {})):
                say("  !", line)
    finally:
        worker.stop()
        conclude(stage, record, pieces, refused)
        record.write()
    say(f"wrote {record.path.name}" + ("" if data["complete"] else ": NOT complete"))
    return stage, record


def conclude(stage: Any, record: Record, pieces: list[str], refused: list[str]) -> None:
    """What the results say, into the record."""
    data = record.data
    data["pieces"] = {p: data["pieces"][p] for p in pieces if p in data["pieces"]}
    good = {p: r for p, r in data["pieces"].items() if "error" not in r}
    data["complete"] = len(good) == len(pieces)
    checks = {f"{p}: {what}": c for p, r in good.items() for what, c in r.get("checks", {}).items()}
    checks |= stage.checks(good)
    data["checks"] = {what: c for what, c in checks.items() if c["must"] or not data["dry"]}  # a dry run has no goals
    errors = [f"{p}: ERROR {r['error']}" for p, r in data["pieces"].items() if "error" in r]
    data["findings"] = errors + failed(data["checks"])
    data["not_measured"] = refused + [f"{p}: {why}" for p, r in good.items() for why in r.get("not_measured", [])]


def summary(done: list[tuple[Any, Record]]) -> int:
    """Tables and findings to the terminal; the exit status."""
    rows = []
    for stage, record in done:
        data = record.data
        header, lines = stage.table({p: r for p, r in data["pieces"].items() if "error" not in r})
        if lines:
            smollm2.table(f"{stage.NAME}{' (dry run: the figures mean nothing)' if data['dry'] else ''}", header, lines)
        musts = [c for c in data["checks"].values() if c["must"]]
        goals = [c for c in data["checks"].values() if not c["must"]]
        rows.append((
            stage.NAME, "yes" if data["complete"] else "no: run it again", f"{data['seconds']:.0f}",
            f"{sum(c['reached'] for c in musts)} of {len(musts)}", f"{sum(c['reached'] for c in goals)} of {len(goals)}",
            sum("ERROR" in f for f in data["findings"]), len(data["not_measured"]),
        ))  # fmt: skip
    smollm2.table("gpu-check", ("stage", "complete", "seconds", "must hold", "goals", "errors", "not measured"), rows)
    broken = False
    for _, record in done:
        for finding in record.data["findings"]:
            print(f"{record.path.stem}: {finding}")
        for why in record.data["not_measured"]:
            print(f"{record.path.stem}: not measured: {why}")
        errors = any("error" in r for r in record.data["pieces"].values())
        broken |= errors or any(c["must"] and not c["reached"] for c in record.data["checks"].values())
    if broken:
        return 1
    return 0 if all(record.data["complete"] for _, record in done) else 2


def no_gpu() -> str | None:
    """Why there is no NVIDIA GPU to be used, asked from the driver alone."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1 cannot be loaded)"
    count = ctypes.c_int()
    for call in (lambda: cuda.cuInit(0), lambda: cuda.cuDeviceGetCount(ctypes.byref(count))):
        if status := call():
            return f"the NVIDIA driver answers with error {status}"
    return None if count.value else "the NVIDIA driver sees no GPU"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, nargs="+", choices=range(1, len(STAGES) + 1), help="which (default: all)")
    parser.add_argument("--again", action="store_true", help="forget what has been found before")
    parser.add_argument(
        "--dry-run", action="store_true", help="the logic alone, tiny, on the CPU; writes to a temporary folder"
    )
    args = parser.parse_args(arguments)
    folder = smollm2.RESULTS
    if args.dry_run:
        folder = Path(tempfile.mkdtemp(prefix="gpu-check-dry-run-"))
        say(f"dry run: no GPU is used and the figures mean nothing; results go to {folder}")
    elif why := no_gpu():
        print(f"gpu-check: {why}; run it on a machine with a GPU, or try the logic with --dry-run", file=sys.stderr)
        return 1
    settings = Settings("cpu", dry=True) if args.dry_run else Settings()
    build.find_tools()
    environment = build.environment(args.dry_run)
    done = []
    for number in args.stage or range(1, len(STAGES) + 1):
        done.append(
            run_stage(
                STAGES[number - 1], settings, folder, environment,
                again=args.again, build_within=None if args.dry_run else build.build,
            )
        )  # fmt: skip
    return summary(done)


if __name__ == "__main__":
    sys.exit(main())
