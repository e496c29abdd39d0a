"""SmolLM2-135M-Instruct (examples/smollm2.py) ready for one step of training, and what every model bench needs."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from examples.smollm2 import directory, text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# What a result depends on
SOURCES = ("python", "src", "include", "bindings", "cmake", "bench", "examples/*.py", ":!bench/results")


# ---- the model


@dataclasses.dataclass(frozen=True)
class Job:
    """One way to train one step of SmolLM2, batch 1, SDPA."""

    side: str = "stock"  # stock | ours | our loss (stock with the chunked loss alone) | stock loss (ours with stock's loss)
    training: str = "full"  # full | lora (r = 16 on all linears, PEFT defaults; lora_B drawn anew, a fresh one is zero)
    dtype: str = "bf16"  # bf16 | fp32 | fp64, of the weights
    autocast: bool = False  # bf16 autocast
    checkpointing: bool = False
    tokens: int = 1024
    policy: str = "exact"  # of "ours"

    def __str__(self) -> str:
        parts = (
            self.side,
            self.training,
            self.dtype,
            "autocast" * self.autocast,
            "checkpointing" * self.checkpointing,
            self.policy * (self.policy != "exact"),
        )
        return ", ".join(p for p in (*parts, f"{self.tokens} tokens") if p)


class Prepared:
    """`model`, `batch` and the surgery's `report` (None where nothing is patched) of a Job."""

    def __init__(self, job: Job):
        import torch
        import transformers
        from transformers import AutoModelForCausalLM

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(0)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[job.dtype]
        self.job = job
        self.model = AutoModelForCausalLM.from_pretrained(directory(), dtype=dtype, attn_implementation="sdpa")
        self.model.config.use_cache = False
        self.model.train()
        if job.training == "lora":
            from peft import LoraConfig, get_peft_model

            self.model = get_peft_model(self.model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
            for name, p in self.model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(p, std=0.02)
        self.report = operate(self.model, job.side, job.policy)
        if job.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = text(job.tokens)
        self.batch = {"input_ids": ids, "labels": ids}

    def forward(self):
        """The loss; everything else that the model returns is let go."""
        import torch

        with torch.autocast("cpu", torch.bfloat16, enabled=self.job.autocast):
            return self.model(**self.batch).loss

    def step(self) -> float:
        loss = self.forward()
        loss.backward()
        return loss.item()

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)


def operate(model, side: str, policy: str = "exact"):
    """Surgery for one `side` of a Job; its report, or None for stock."""
    if side == "stock":
        return None
    from unswag import apply_unswag_surgery

    if side == "ours":
        return apply_unswag_surgery(model, policy=policy)
    if side == "stock loss":
        return apply_unswag_surgery(model, loss="stock")
    if side == "our loss":
        from unswag.torch.patterns.loss import Loss
        from unswag.torch.patterns.probing import sealed

        pattern = Loss()
        for candidate in list(pattern.find(model)):
            with sealed():
                reason = pattern.probe(candidate)
            if reason is not None:
                raise RuntimeError(f"the loss of {candidate.name} cannot be patched: {reason}")
            pattern.apply(candidate)
        return None
    raise ValueError(f"side {side!r} is not one of stock, ours, our loss, stock loss")


def patched(report) -> dict[str, int]:
    """How many modules each pattern took."""
    counts: dict[str, int] = {}
    for _, pattern in report.patched if report else ():
        counts[pattern] = counts.get(pattern, 0) + 1
    return counts


# ---- running and recording


def say(*words: object) -> None:
    """Progress: to stderr, with the time of day."""
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


def fresh(function: Callable[..., Any], *args: Any, environment: dict[str, str] | None = None) -> Any:
    """`function(*args)` in a process of its own; arguments and result travel as JSON (dataclasses as dicts)."""
    module = function.__module__
    if module == "__main__":
        module = sys.modules["__main__"].__spec__.name
    path = os.pathsep.join(p for p in (str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    done = subprocess.run(
        [sys.executable, "-m", "bench.smollm2", module, function.__qualname__],
        input=json.dumps([dataclasses.asdict(a) if dataclasses.is_dataclass(a) else a for a in args]),
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **(environment or {})},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{module}.{function.__qualname__} failed in its own process; what it said stands above")
    return json.loads(done.stdout.splitlines()[-1])


def _serve() -> None:
    import importlib

    module, function = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(*json.load(sys.stdin))
    print(json.dumps(result))


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    import peft
    import torch
    import transformers

    cpu = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        cpu.setdefault(key.strip(), value.strip())
    flags = cpu.get("flags", "").split()
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "instruction_sets": [f for f in ("avx2", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16") if f in flags],
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """Of this source tree; "-dirty" where one of `SOURCES` is changed. Where there is no git, what UNSWAG_COMMIT says."""
    unknown = os.environ.get("UNSWAG_COMMIT", "unknown")
    if shutil.which("git") is None:
        return unknown
    git = subprocess.run(["git", "describe", "--always"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        return unknown
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *SOURCES], cwd=ROOT).returncode
    return git.stdout.strip() + ("-dirty" if changed else "")


def write_json(path: Path, data: object, indent: int | None = 1) -> None:
    """The file becomes `data`, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as f:
        json.dump(data, f, indent=indent, default=dataclasses.asdict)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)


def write(name: str, results: dict[str, Any]) -> Path:
    """bench/results/<name>.json with the machine's description."""
    path = RESULTS / f"{name}.json"
    write_json(path, {"date": time.strftime("%Y-%m-%d"), "machine": machine(), **results})
    say("wrote", path.relative_to(ROOT))
    return path


def table(title: str, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """To the terminal."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(*header, title=title)
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    Console().print(grid)


if __name__ == "__main__":
    _serve()
