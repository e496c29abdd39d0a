"""The longest context that really trains: steps in processes of their own, under a memory limit, looked for around the plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from unswag import sizes
from unswag.plans import Plan
from unswag.torch.plan import STEP, plan

__all__ = ["Found", "Try", "find_max_context"]

HEADROOM = 0.02  # of the memory that a context must leave free: next to the limit a step may give NaN instead of an error


@dataclass(frozen=True)
class Try:
    """One context: `trains` (steps within the limit, with a finite loss), its measured `peak`, the plan's, and why not."""

    context: int
    trains: bool
    peak: int
    predicted: int
    why: str = ""


@dataclass
class Found:
    """The longest context that trained, 0 if none did; the plan that it was looked for around; every try."""

    context: int
    plan: Plan
    tries: list[Try] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(
            {"context": self.context, "tries": [asdict(t) for t in self.tries], "plan": json.loads(self.plan.to_json())}
        )

    def __str__(self) -> str:
        lines = [f"longest context that trained: {self.context:,} tokens (predicted: {self.plan.context:,})"]
        for one in sorted(self.tries, key=lambda one: one.context):
            measured = sizes.show(one.peak) if one.peak else "–"
            lines.append(
                f"{one.context:>10,}  measured {measured:>10}  predicted {sizes.show(one.predicted):>10}  {one.why or 'trains'}"
            )
        return "\n".join(lines)


def find_max_context(
    model: str | Path | dict[str, Any],
    memory: str | int,
    *,
    lora: int | None = None,
    optimizer: str = "adamw",
    device: str = "cpu",
    disk: str | int | None = None,
    lossy: bool = False,
    steps: int = 2,
    most_tries: int = 6,
    verbose: bool = True,
) -> Found:
    """The longest context of which `steps` training steps run in `memory`, found by trying: random weights and tokens, batch 1,
    each try in a process of its own. `unswag.plan` chooses the way and says where to begin.

    model    a folder, a config.json, a name or a config's values, as `unswag.plan` takes them; no module
    memory   of the process on a CPU (its data segment is limited to it, RLIMIT_DATA), of PyTorch's allocator on CUDA. A try
             must leave 2 % of it free and give a finite loss
    steps    of each try; the last is measured

    ValueError as `unswag.plan` raises it, and for what is no config.
    """
    limit = sizes.bytes_of(memory, "memory")
    where = str(model) if isinstance(model, (str, os.PathLike)) else model
    options = dict(lora=lora, optimizer=optimizer, device=device, disk=disk, lossy=lossy)
    first = plan(where, limit, **options)  # type: ignore[arg-type]
    found = Found(0, first)
    if not first.fits:
        return found

    def attempt(tokens: int) -> bool:
        line = next(option.line for option in first.options if option.name == first.way)
        job = dict(model=where, tokens=tokens, limit=limit, surgery=first.surgery, checkpointing=first.checkpointing, lora=lora,
                   optimizer=optimizer, device=device, steps=steps)  # fmt: skip
        result = _in_a_process(job)
        predicted = round(line[0] + line[1] * tokens)
        fits = bool(result.get("finite")) and result["peak"] <= limit * (1 - HEADROOM)
        why = (
            ""
            if fits
            else result.get("error") or ("the loss is not finite" if not result["finite"] else "less than 2 % is left")
        )
        found.tries.append(Try(tokens, fits, result.get("peak", 0), predicted, why))
        if verbose:
            print(f"{tokens:,} tokens: {why or 'trains'}", file=sys.stderr, flush=True)
        return fits

    found.context = _search(attempt, first.context, most_tries)
    return found


def _search(attempt: Callable[[int], bool], start: int, most: int) -> int:
    """The largest multiple of STEP found to hold, in at most so many tries around `start`."""
    good, bad, next_try = 0, 0, start
    stride = max(STEP, start // 25 // STEP * STEP)
    for _ in range(most):
        if attempt(next_try):
            good = next_try
        else:
            bad = next_try
        following = (good + bad) // 2 if good and bad else good + stride if good else bad - stride
        following, stride = max(0, following // STEP * STEP), 2 * stride
        if not following or following <= good or (bad and following >= bad):
            break
        next_try = following
    return good


def _in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, "-m", "unswag.torch.max_context", json.dumps(job), str(result)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.exists():
            return dict(json.loads(result.read_text()))
        last = (run.stderr.strip().splitlines() or ["it was killed"])[-1]
        return {"finite": False, "peak": 0, "error": f"its process ended with code {run.returncode}: {last[:200]}"}


def _steps(job: dict[str, Any]) -> dict[str, Any]:
    """Runs the steps of a job in this process."""
    from transformers import AutoModelForCausalLM

    from unswag.torch.blueprint import config_of_model
    from unswag.torch.surgery import apply_unswag_surgery
    from unswag.torch.ways import checkpoint_layers

    config = config_of_model(job["model"])
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    if job["lora"]:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=job["lora"], target_modules="all-linear", task_type="CAUSAL_LM"))
    model.to(job["device"]).train()
    apply_unswag_surgery(model, verify=False, verbose=False, **job["surgery"])
    checkpoint_layers(model, job["checkpointing"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 1e-5) if job["optimizer"] == "sgd" else torch.optim.AdamW(trained, 1e-5)
    weights = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
    before = _limit(job, weights)
    ids = torch.randint(0, config.vocab_size, (1, job["tokens"]), device=job["device"])
    loss = torch.zeros(())
    for _ in range(job["steps"]):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.detach()
    return {"finite": bool(loss.isfinite()), "peak": _peak(job) - before}


def _limit(job: dict[str, Any], weights: int) -> int:
    """Sets the limit of this process; returns the bytes that the plan does not count: of the interpreter."""
    if job["device"] == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, job["limit"] / torch.cuda.get_device_properties(0).total_memory))
        return 0
    import resource

    idle, data = _status("VmRSS") - weights, _status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (data - weights + job["limit"],) * 2)
    Path("/proc/self/clear_refs").write_text("5")
    return idle


def _peak(job: dict[str, Any]) -> int:
    if job["device"] == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM")


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    try:
        found = _steps(job)
    except (RuntimeError, MemoryError) as error:
        found = {"finite": False, "peak": 0, "error": str(error).strip().partition("\n")[0][:200]}
    Path(sys.argv[2]).write_text(json.dumps(found))
