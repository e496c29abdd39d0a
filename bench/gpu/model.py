"""Stage 4: steps of whole models, stock, with Liger and with UnSwag's `exact`: peak bytes, seconds, equal losses.

The shapes of TinyLlama-1.1B and of four layers of Llama-3.1-8B, random weights, batch 1, SDPA. A step is forward and backward.
First some steps with plain SGD, whose losses must be equal up to rounding; then steps that are timed, the weights fixed. The
peak is what the allocator had at most in a step, with weights and gradients; beside it what it had before the step.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu.stage import Checks, Notes, NotMeasured, Settings, at_most, holds, none, synchronize

NAME = "gpu-model"
TITLE = "TinyLlama-1.1B and four layers of Llama-3.1-8B: stock, Liger, UnSwag"

SIDES = ("stock", "ours", "liger")  # Liger last: it patches classes for the whole process
LEARNING_STEPS, TIMED_STEPS = 5, 10
LOSS_APART = {"bfloat16": 5e-3, "float16": 2e-3}  # relative, at most, in any of the learning steps
SHAPES: dict[str, dict[str, Any]] = {
    "TinyLlama-1.1B": dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "Llama-3.1-8B, 4 layers": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "dry": dict(
        hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    shape: str
    training: str  # lora (r = 16 on all linears) | full
    dtype: str
    tokens: int
    checkpointing: bool = False

    def __str__(self) -> str:
        return f"{self.shape}, {self.training}, {self.dtype}, {self.tokens:,} tokens" + ", checkpointing" * self.checkpointing


JOBS = (
    Job("TinyLlama-1.1B", "lora", "bfloat16", 8192),
    Job("TinyLlama-1.1B", "full", "bfloat16", 8192),
    Job("Llama-3.1-8B, 4 layers", "lora", "bfloat16", 8192),
    Job("Llama-3.1-8B, 4 layers", "full", "bfloat16", 8192),
    Job("TinyLlama-1.1B", "lora", "float16", 8192),
)
DRY = (Job("dry", "lora", "bfloat16", 64), Job("dry", "full", "bfloat16", 64))


class Model:
    """`model` and `batch` of a job, operated on for one side. `patched` counts what the surgery replaced."""

    def __init__(self, job: Job, side: str, device: str):
        import transformers
        from transformers import LlamaConfig, LlamaForCausalLM

        transformers.logging.set_verbosity_error()
        if side == "liger" and importlib.util.find_spec("liger_kernel") is None:
            raise NotMeasured("liger-kernel is absent")
        config = LlamaConfig(**SHAPES[job.shape], max_position_embeddings=1 << 20, use_cache=False, attn_implementation="sdpa")
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, job.dtype))
        try:
            with torch.device(device):
                self.model: Any = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        self.model.train()
        if side == "liger":
            try:
                from liger_kernel.transformers import apply_liger_kernel_to_llama

                apply_liger_kernel_to_llama(model=self.model)
            except ImportError as error:
                raise NotMeasured(f"liger-kernel cannot be used: {error}") from None
        if job.training == "lora":
            from peft import LoraConfig, get_peft_model

            self.model = get_peft_model(self.model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
            torch.manual_seed(1)
            for name, p in self.model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(p, std=0.02)
        self.patched: dict[str, int] = {}
        if side == "ours":
            from bench.smollm2 import patched
            from unswag import apply_unswag_surgery

            self.patched = patched(apply_unswag_surgery(self.model, verify=False, verbose=False))
        if job.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        vocabulary = SHAPES[job.shape]["vocab_size"]
        ids = torch.randint(0, vocabulary, (1, job.tokens), generator=torch.Generator().manual_seed(2)).to(device)
        self.batch = {"input_ids": ids, "labels": ids}
        self.job = job

    def step(self) -> torch.Tensor:
        """Its loss. In float16 the loss is scaled, as it is in training; the gradients are then those of the scaled loss."""
        loss = self.model(**self.batch).loss
        (loss * self.scale).backward()
        return loss.detach()

    @property
    def scale(self) -> float:
        return 1024.0 if self.job.dtype == "float16" else 1.0

    def learn(self, rate: float) -> None:
        """Plain SGD, which keeps nothing."""
        with torch.no_grad():
            for p in self.model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=rate / self.scale)

    def forget(self) -> None:
        self.model.zero_grad(set_to_none=True)


def memory(device: str) -> int:
    return torch.cuda.memory_allocated() if device.startswith("cuda") else 0


def measure(job: Job, side: str, settings: Settings) -> dict[str, Any]:
    device = settings.device
    run = Model(job, side, device)
    losses = []
    for _ in range(2 if settings.dry else LEARNING_STEPS):
        losses.append(run.step().item())
        without = [n for n, p in run.model.named_parameters() if p.requires_grad and p.grad is None]
        run.learn(1e-2 if job.training == "full" else 0.1)
        run.forget()
    times, idle, peak = [], memory(device), 0
    for i in range(2 if settings.dry else TIMED_STEPS + 2):
        if settings.cuda and i == 2:  # after the first two, whose autotuning and caches are not those of a step
            torch.cuda.reset_peak_memory_stats()
        synchronize(device)
        start = time.perf_counter()
        run.step()
        synchronize(device)
        times.append(time.perf_counter() - start)
        run.forget()
    if settings.cuda:
        peak = torch.cuda.max_memory_allocated()
    times = times[2:] or times
    return {
        "job": str(job), "side": side, "losses": losses, "seconds": {"best": min(times), "median": statistics.median(times)},
        "idle_bytes": idle, "peak_bytes": peak, "patched": run.patched,
        "checks": {
            "losses are finite": holds(all(abs(x) < float("inf") for x in losses)),
            "parameters without a gradient": none(len(without)),
        },
    }  # fmt: skip


def jobs(settings: Settings) -> dict[str, tuple[Job, str]]:
    return {f"{job}, {side}": (job, side) for side in SIDES for job in (DRY if settings.dry else JOBS)}


def pieces(settings: Settings) -> list[str]:
    return list(jobs(settings))


def run(piece: str, settings: Settings, notes: Notes) -> dict[str, Any]:
    job, side = jobs(settings)[piece]
    if side != "liger":
        return measure(job, side, settings)
    if not settings.cuda:
        raise NotMeasured("Liger needs a GPU")
    try:
        return measure(job, side, settings)
    except NotMeasured:
        raise
    except Exception as error:  # a peer's fault is no fault of ours
        torch.cuda.synchronize()
        raise NotMeasured(f"Liger failed: {type(error).__name__}: {error}"[:500]) from error


def checks(pieces: dict[str, dict[str, Any]]) -> Checks:
    found: Checks = {}
    by_job: dict[str, dict[str, dict[str, Any]]] = {}
    for r in pieces.values():
        if "job" in r:
            by_job.setdefault(r["job"], {})[r["side"]] = r
    for job, sides in by_job.items():
        if "ours" not in sides:
            continue
        ours = sides["ours"]
        for side in ("stock", "liger"):
            if side not in sides:
                continue
            other = sides[side]
            if side == "stock":
                apart = max(abs(a / b - 1) for a, b in zip(ours["losses"], other["losses"], strict=True))
                limit = next(limit for dtype, limit in LOSS_APART.items() if dtype in job)
                found[f"{job}: losses, relative difference to stock"] = at_most(apart, limit)
            found[f"{job}: seconds, of {side}"] = at_most(ours["seconds"]["best"] / other["seconds"]["best"], 1.0, must=False)
            if other["peak_bytes"]:
                found[f"{job}: peak, of {side}"] = at_most(ours["peak_bytes"] / other["peak_bytes"], 1.0, must=False)
    return found


def table(pieces: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = [
        (
            r["job"], r["side"], f"{r['seconds']['best']:.3f}", f"{r['seconds']['median']:.3f}",
            f"{r['peak_bytes'] / 2**20:,.0f}", f"{r['idle_bytes'] / 2**20:,.0f}",
            f"{r['losses'][0]:.4f} … {r['losses'][-1]:.4f}",
        )
        for r in sorted(pieces.values(), key=lambda r: r.get("job", ""))
        if "job" in r
    ]  # fmt: skip
    return ("job", "side", "s, best", "median", "peak MiB", "idle MiB", "loss"), rows
