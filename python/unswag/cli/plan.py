"""unswag plan: how to train a model in a given memory, from its config alone."""

from __future__ import annotations

from typing import Annotated

import typer

from unswag.cli import errors
from unswag.front import plan as planned

# What the drivers report as the whole memory, MiB.
GPUS = {
    "t4": 15_095, "v100": 16_151, "l4": 23_034, "rtx3090": 24_247, "rtx4090": 24_210, "a100-40": 40_339, "l40s": 45_589,
    "a100": 81_153, "h100": 81_079, "h200": 143_167, "b200": 183_359,
}  # fmt: skip


def plan(
    model: Annotated[str, typer.Argument(help="A folder, a config.json, or a name that transformers knows.")],
    memory: Annotated[str, typer.Option(help="Of the device: 16GiB, 24GB, …")] = "16GiB",
    gpu: Annotated[str | None, typer.Option(help=f"Take the memory of: {', '.join(GPUS)}.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence; without it the longest is looked for.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 1,
    lora: Annotated[int | None, typer.Option(help="Rank of LoRA on all Linears; without it everything is trained.")] = None,
    weights: Annotated[str | None, typer.Option(help="nf4: 4-bit weights, with --lora.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit or sgd.")] = "adamw",
    host_memory: Annotated[str | None, typer.Option(help="What checkpoints may take in host memory.")] = None,
    disk: Annotated[str | None, typer.Option(help="What checkpoints may take on disk.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    lossy: Annotated[bool, typer.Option("--lossy", help="Also propose codecs that change gradients.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also say what the stock model takes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Say how to train a model in a given memory, what it will take, and why. No weights are read, no GPU is needed.

    Exit code 0 if it fits, 1 if it does not, 2 for an error.
    """
    with errors("plan"):
        if gpu is not None and gpu.lower() not in GPUS:
            raise ValueError(f"--gpu {gpu} is not known; choose one of {', '.join(GPUS)}, or pass --memory")
        limit = memory if gpu is None else GPUS[gpu.lower()] << 20
        found = planned(
            model, limit, context, batch=batch, lora=lora, weights=weights, optimizer=optimizer, device=device, lossy=lossy,
            compare=compare, host_memory=host_memory, disk=disk,
        )  # fmt: skip
    print(found.to_json() if as_json else found)
    raise typer.Exit(0 if found.fits else 1)
