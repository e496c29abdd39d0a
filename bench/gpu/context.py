"""Stage 5: the longest context that trains in a memory cap: TinyLlama-1.1B, LoRA, gradient checkpointing, batch 1.

The cap is on PyTorch's allocator (set_per_process_memory_fraction): the CUDA context is not counted. Each trial is one step
(forward and backward, after a short one) in a process of its own, kept as it comes. The first trial of a side measures two
short contexts; the line through their peaks says where to begin, and the answer is then closed in between a context that was
seen to fit and one, STEP tokens longer, that was seen not to. The sides try at the same time: memory is measured here, and
no time.

A T4 has no flash kernel: that case allows SDPA's memory-efficient one alone. Where it knows no grouped keys and values, they
are repeated for all heads, and the result of that side says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from bench.gpu.stage import Checks, Notes, NotMeasured, Settings, at_least, at_most, none

NAME = "gpu-context"
TITLE = "longest context of TinyLlama-1.1B with LoRA and checkpointing in a memory cap"

SIDES = ("ours", "stock", "liger")
STEP = 2048  # tokens; the answer is a multiple
SHORT = (2048, 8192)  # the two contexts that say where to begin
MOST = 1 << 20
GOAL = 65536
GIB = 2**30


@dataclass(frozen=True)
class Case:
    cap: int  # bytes
    dtype: str
    efficient_only: bool  # SDPA's memory-efficient kernel, no other
    shape: str = "TinyLlama-1.1B"


CASES = {
    "16 GiB, bfloat16": Case(16 * GIB, "bfloat16", False),
    "T4: 14.5 GiB, float16, memory-efficient SDPA": Case(int(14.5 * GIB), "float16", True),
}
DRY_CASES = {"dry: 1 MiB": Case(1 << 20, "float32", False, "dry")}
DRY_STEP, DRY_SHORT = 32, (32, 64)

Trial = dict[str, Any]  # fits, and peak bytes if it does; or why it cannot be


# ---- one trial, in a process of its own -----------------------------------------------------------------------------------


def attempt(case: dict[str, Any], side: str, lengths: list[int], device: str) -> Trial:
    """One step for each length; the peak of each that fits, all lengths or none."""
    import contextlib

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from bench.gpu.model import Job, Model

    c = Case(**case)
    cuda = device.startswith("cuda")
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, c.cap / total))

    def kernels() -> contextlib.AbstractContextManager[Any]:
        return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]) if c.efficient_only and cuda else contextlib.nullcontext()

    repeated = False
    try:
        job = Job(c.shape, "lora", c.dtype, max(lengths), checkpointing=True)
        run = Model(job, side, device)
        ids = run.batch["input_ids"]
        peaks, losses = [], []
        for length in [min(lengths) // 8, *lengths]:
            run.batch = {"input_ids": ids[:, :length], "labels": ids[:, :length]}
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            with kernels():
                try:
                    losses.append(run.step().item())
                except RuntimeError as error:
                    if repeated or "No available kernel" not in str(error):
                        raise
                    repeat_keys_and_values()
                    repeated = True
                    run.forget()
                    losses.append(run.step().item())
            run.forget()
            peaks.append(torch.cuda.max_memory_allocated() if cuda else pretended_peak(c, length))
        if not cuda and peaks[-1] > c.cap:
            return {"fits": False}
        reserved = torch.cuda.max_memory_reserved() if cuda else 0
    except torch.cuda.OutOfMemoryError:
        return {"fits": False}
    except NotMeasured as why:
        return {"cannot": str(why)}
    if reserved > c.cap:
        raise RuntimeError(f"the allocator took {reserved} bytes of a cap of {c.cap}: the cap does not hold")
    return {"fits": True, "peaks": peaks[1:], "reserved": reserved, "losses": losses[1:], "repeated": repeated}


def repeat_keys_and_values() -> None:
    """Transformers hands grouped keys and values to SDPA as they are; where no kernel takes them, repeated ones do."""
    from transformers.integrations import sdpa_attention

    sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False


def pretended_peak(case: Case, length: int) -> int:
    """Of a dry run, which has no cap."""
    return 100_000 + 3000 * length


def in_process(case: Case, side: str, lengths: list[int], settings: Settings) -> Trial:
    """`attempt` in a fresh process; RuntimeError with the end of what it said if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.context"], capture_output=True, text=True, env=os.environ.copy(),
        input=json.dumps({"case": asdict(case), "side": side, "lengths": lengths, "device": settings.device}),
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{side} at {lengths} tokens failed:\n" + "\n".join(done.stderr.splitlines()[-12:]))
    return json.loads(done.stdout.splitlines()[-1])


# ---- the search -----------------------------------------------------------------------------------------------------------


def search(trial: Callable[[list[int]], Trial], cap: int, step: int, short: tuple[int, int]) -> dict[str, Any]:
    """The largest multiple of `step` that fits, below MOST. `trial` is asked for a list of lengths.

    Begins a little below where the line through two peaks meets the cap, goes from there in steps that double until the limit
    lies between two trials, and halves what is between."""
    first = trial(list(short))
    trials = 1
    if "cannot" in first:
        return first
    points: dict[int, int] = {}
    low, high, guess = 0, MOST, step
    if first["fits"]:
        points, low = dict(zip(short, first["peaks"], strict=True)), max(short)
        guess = int(0.97 * _meets(points, cap))
    else:
        high = max(short)
    wide = 0
    while high - low > step:
        guess = max(low + step, min(guess // step * step, high - step))
        wide = 2 * wide or max(step, guess // 50)
        result = trial([guess])
        trials += 1
        if result["fits"]:
            low, points[guess] = guess, result["peaks"][0]
        else:
            high = guess
        if high == MOST:
            guess = min(low + wide, int(_meets(points, cap)))
        elif low <= max(short) and low + wide < high:
            guess = high - wide
        else:
            guess = (low + high) // 2
    return {"tokens": low, "peak_bytes": points.get(low), "trials": trials, "repeated": first.get("repeated", False)}


def _meets(points: dict[int, int], cap: int) -> float:
    """Where the line through the last two peaks meets the cap."""
    (a, peak_a), (b, peak_b) = sorted(points.items())[-2:]
    return b + (cap - peak_b) * (b - a) / (peak_b - peak_a) if peak_b > peak_a else MOST


def pieces(settings: Settings) -> list[str]:
    return list(DRY_CASES if settings.dry else CASES)


def at_once(case: Case, settings: Settings) -> int:
    """Sides that may try at the same time."""
    if not settings.cuda:
        return 1
    done = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.mem_get_info()[0])"], capture_output=True, text=True, check=True
    )
    free = int(done.stdout.split()[-1])
    if free < case.cap:
        raise NotMeasured(f"{free / GIB:.1f} GiB of the GPU are free, the case needs {case.cap / GIB:.1f}")
    return max(1, min(len(SIDES), int(free / (case.cap + GIB))))


def run(piece: str, settings: Settings, notes: Notes) -> dict[str, Any]:
    case = (DRY_CASES if settings.dry else CASES)[piece]
    step, short = (DRY_STEP, DRY_SHORT) if settings.dry else (STEP, SHORT)

    def of(side: str) -> dict[str, Any]:
        def trial(lengths: list[int]) -> Trial:
            def made() -> Trial:
                result = in_process(case, side, lengths, settings)
                said = "fits" if result.get("fits") else result.get("cannot", "does not fit")
                print(f"  {piece}: {side}, {', '.join(f'{n:,}' for n in lengths)} tokens: {said}", flush=True)
                return result

            return notes.get(f"{side} {lengths}", made)

        try:
            return search(trial, case.cap, step, short)
        except RuntimeError as error:
            if side == "liger":  # a peer's fault is no fault of ours
                return {"cannot": f"Liger failed: {error}"[:600]}
            raise

    sides = [s for s in SIDES if not settings.dry or s != "liger"]
    with ThreadPoolExecutor(at_once(case, settings)) as pool:
        found = dict(zip(sides, pool.map(of, sides), strict=True))
    missing = [f"{side}: {r['cannot']}" for side, r in found.items() if "cannot" in r]
    missing += ["liger: needs a GPU"] if settings.dry else []
    found = {side: r for side, r in found.items() if "cannot" not in r}
    checks: Checks = {}
    if "ours" in found:
        checks["tokens, ours"] = at_least(found["ours"]["tokens"], DRY_STEP if settings.dry else GOAL, must=False)
        for side in found:
            if side != "ours":
                checks[f"tokens of {side}, of ours"] = at_most(
                    round(found[side]["tokens"] / max(found["ours"]["tokens"], 1), 3), 1.0, must=False
                )
    checks["sides of ours without a figure"] = none("ours" not in found)
    return {"cap_bytes": case.cap, "step": step, "sides": found, "not_measured": missing, "checks": checks}


def checks(pieces: dict[str, dict[str, Any]]) -> Checks:
    return {}


def table(pieces: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = [
        (
            piece, side, f"{s['tokens']:,}", f"{(s.get('peak_bytes') or 0) / GIB:.2f}", str(s["trials"]),
            "repeated" if s.get("repeated") else "as they are",
        )
        for piece, r in pieces.items()
        for side, s in r.get("sides", {}).items()
    ]  # fmt: skip
    return ("case", "side", "tokens", "peak GiB", "trials", "keys and values"), rows


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    print(json.dumps(attempt(**json.load(sys.stdin))), file=answers, flush=True)
