"""The activation store: how fast it is, what a step keeps on the device with it, and what a step costs.

throughput  put and get with checksums against plain pwrite and pread of the same bytes from aligned memory, in turns, best of
            the rounds; both direct (past the page cache), both into space that the file has already. The checksum alone, too
saved       SmolLM2-135M, full training with gradient checkpointing, bf16: bytes alive after the forward, per token
memory      SmolLM2-135M, LoRA r = 16, gradient checkpointing, bf16: peak of the process in the third step above the idle model,
            as in bench/process_memory.py
time        the same step: checkpoints on the device and on disk in turns in one process, best of the rounds; default malloc

python -m bench.store [--parts throughput saved memory time] [--dir FOLDER]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import time
from typing import Any

from bench.smollm2 import RESULTS, Job, Prepared, fresh, say, table, write

MIB = 2**20
KEPT = RESULTS / "store.json"
PARTS = ("throughput", "saved", "memory", "time")
BLOCKS = (MIB // 10, MIB, 9 * MIB + MIB // 2, 40 * MIB)  # bytes
AHEAD = 3  # blocks that are prefetched
EACH = 240 * MIB  # bytes of a round
WAYS: dict[str, dict[str, Any]] = {  # options of the surgery; a dict for `policy` holds those of a Policy
    "device": {},
    "host": {"store": "host"},
    "disk": {"store": "disk"},
    "int8": {"policy": {"checkpoint": "int8", "residual": "int8"}},
    "int4": {"policy": {"checkpoint": "int4", "residual": "int8"}},
    "int4, disk": {"policy": {"checkpoint": "int4", "residual": "int8"}, "store": "disk"},
}
GOALS = {"ratio": 0.9, "saved": {"disk": 2_500, "host": 2_500, "int4": 11_000}, "time": 1.10}


def throughput(folder: str, rounds: int) -> dict:
    """Seconds and bytes per second of both sides for each size of block."""
    from unswag import _core

    found = {}
    source, target = (mmap.mmap(-1, max(BLOCKS)) for _ in range(2))
    source[:] = os.urandom(max(BLOCKS))
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in (source, target)]
    store = _core.store_open(True, folder, -1)
    direct = _core.store_stats(store)["direct"]
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | (os.O_DIRECT if direct else 0), 0o600)
    for size in BLOCKS:
        n = EACH // size
        whole = -(-size // 4096) * 4096  # direct transfers are of whole pages

        def plain(n: int = n, whole: int = whole) -> None:
            for i in range(n):
                assert os.pwrite(fd, memoryview(source)[:whole], i * whole) == whole
            for i in reversed(range(n)):
                assert os.preadv(fd, [memoryview(target)[:whole]], i * whole) == whole

        def ours(n: int = n, size: int = size) -> None:
            blocks = [_core.StoreBlock(store, addresses[0], size, b"") for _ in range(n)]
            for i in reversed(range(n)):
                blocks[i].get(addresses[1])
                for ahead in blocks[max(i - AHEAD, 0) : i]:
                    ahead.prefetch()
            for block in blocks:
                block.drop()

        seconds: dict[str, list[float]] = {"plain": [], "store": []}
        for round_ in range(rounds + 1):
            sides = [("plain", plain), ("store", ours)]
            for side, run in sides if round_ % 2 else reversed(sides):
                start = time.perf_counter()
                run()
                seconds[side].append(time.perf_counter() - start)
        best = {side: min(of[1:]) for side, of in seconds.items()}  # the first round makes the files
        found[str(size)] = {
            "blocks": n,
            "seconds": {side: of[1:] for side, of in seconds.items()},
            "gib_per_second": {side: 2 * n * size / s / 2**30 for side, s in best.items()},
            "ratio": best["plain"] / best["store"],
        }
    os.close(fd)
    return {"direct": direct, "blocks": found}


def checksum() -> float:
    """GiB per second of the checksum together with the copy that it is a part of (the host tier's put), on one thread."""
    from unswag import _core

    store, size, best = _core.store_open(False, "", -1), 32 * MIB, float("inf")
    source = mmap.mmap(-1, size)
    source[:] = os.urandom(size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(source))
    for _ in range(9):
        start = time.perf_counter()
        block = _core.StoreBlock(store, address, size, b"")
        best = min(best, time.perf_counter() - start)
        block.drop()
    return size / best / 2**30


def prepared(way: str, folder: str | None, **job: Any) -> Prepared:
    """A step with checkpointing, after surgery in that way."""
    from unswag import Policy, apply_unswag_surgery

    options = dict(WAYS[way])
    if isinstance(options.get("policy"), dict):
        options["policy"] = Policy(**options["policy"])
    if options.get("store") == "disk":
        options["store_dir"] = folder
    run = Prepared(Job(checkpointing=True, **job))
    if job.get("training") == "lora":
        run.model.enable_input_require_grads()
    run.report = apply_unswag_surgery(run.model, verbose=False, **options)
    return run


def saved(way: str, folder: str | None, tokens: int) -> dict:
    """Bytes per token of the second step's forward. Runs in a process of its own."""
    from bench import bf16_matmul
    from bench.live import LiveStorages
    from unswag.torch.operation import STORES

    bf16_matmul.enable()
    run = prepared(way, folder, tokens=tokens)
    run.step()
    run.zero_grad()
    with LiveStorages(run.model, list(run.batch.values())) as live:
        loss = live.forward(run.forward)
        kept = live.bytes
        stored = vars(run.model)[STORES].stats()
        loss.backward()
    return {"device_bytes_per_token": kept / tokens, "peak_bytes": live.peak, "store": stored}


def memory(way: str, folder: str | None, tokens: int, steps: int) -> dict:
    """Peak of the last of `steps` steps above the loaded model. Runs in a process of its own."""
    import gc

    from examples.resident import forget_peak, resident

    from bench import bf16_matmul

    bf16_matmul.enable()
    run = prepared(way, folder, training="lora", tokens=tokens)
    gc.collect()
    idle = resident("VmRSS")
    for _ in range(steps - 1):
        run.step()
        run.zero_grad()
    forget_peak()
    run.step()
    return {"idle_bytes": idle, "peak_above_idle_bytes": resident("VmHWM") - idle}


def seconds(ways: list[str], folder: str | None, tokens: int, rounds: int) -> dict:
    """Seconds of each way in each round, after one that does not count. Runs in a process of its own."""
    from bench import bf16_matmul

    bf16_matmul.enable()
    runs = {way: prepared(way, folder, training="lora", tokens=tokens) for way in ways}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(rounds + 1):
        for way in ways if round_ % 2 else reversed(ways):
            start = time.perf_counter()
            runs[way].step()
            taken = time.perf_counter() - start
            runs[way].zero_grad()
            say(f"round {round_}: {way} {taken:.1f} s")
            if round_:
                found[way].append(taken)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which parts (default: all)")
    parser.add_argument("--dir", default=os.environ.get("TMPDIR", "/tmp"), help="folder of the files (default $TMPDIR or /tmp)")
    parser.add_argument("--rounds", type=int, default=7, help="of throughput; the best counts (default 7)")
    parser.add_argument("--tokens", type=int, default=8192, help="of memory and time (default 8192; the goals are for it)")
    parser.add_argument("--step-rounds", type=int, default=3, help="of time; the best counts (default 3)")
    args = parser.parse_args()

    before = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    results: dict[str, Any] = {part: before[part] for part in PARTS if part in before}  # parts that are not run again
    results["goals"] = GOALS
    if "throughput" in args.parts:
        found = results["throughput"] = fresh(throughput, args.dir, args.rounds)
        found["host_put_gib_per_second"] = fresh(checksum)
        lines = [
            (
                f"{int(size) / MIB:.1f}",
                *(f"{of['gib_per_second'][side]:.2f}" for side in ("plain", "store")),
                f"{of['ratio']:.2f}",
            )
            for size, of in found["blocks"].items()
        ]
        table("put and get against pwrite and pread", ("MiB", "plain GiB/s", "store GiB/s", "ratio, goal >= 0.9"), lines)
    if "saved" in args.parts:
        found = results["saved"] = {way: fresh(saved, way, args.dir, 1024) for way in WAYS}
        lines = [(way, f"{of['device_bytes_per_token']:,.0f}", GOALS["saved"].get(way, "")) for way, of in found.items()]
        table("SmolLM2-135M, full, checkpointing, 1,024 tokens", ("checkpoints", "device B/token", "goal <="), lines)
    if "memory" in args.parts:
        ways, environment = ("device", "disk"), {"MALLOC_MMAP_THRESHOLD_": "65536"}
        found = results["memory"] = {way: fresh(memory, way, args.dir, args.tokens, 3, environment=environment) for way in ways}
        results["memory"]["tokens"] = args.tokens
        lines = [(way, f"{found[way]['peak_above_idle_bytes'] / MIB:,.0f}") for way in ways]
        table(f"SmolLM2-135M, LoRA, {args.tokens} tokens", ("checkpoints", "peak MiB above idle"), lines)
    if "time" in args.parts:
        found = fresh(seconds, ["device", "disk"], args.dir, args.tokens, args.step_rounds)
        ratio = min(found["disk"]) / min(found["device"])
        results["time"] = {"tokens": args.tokens, "seconds": found, "ratio": ratio}
        lines = [(way, f"{min(of):.1f}", f"{min(of) / min(found['device']):.3f}") for way, of in found.items()]
        table(f"SmolLM2-135M, LoRA, {args.tokens} tokens", ("checkpoints", "seconds", f"ratio, goal <= {GOALS['time']}"), lines)
    write("store", results)


if __name__ == "__main__":
    main()
