"""unswag max-context: the longest context that really trains in a given memory, by trying."""

from __future__ import annotations

from typing import Annotated

import typer

from unswag.cli import errors


def max_context(
    model: Annotated[str, typer.Argument(help="A folder, a config.json, or a name that transformers knows.")],
    memory: Annotated[str, typer.Option(help="Of the process on a CPU, of PyTorch's allocator on CUDA.")],
    lora: Annotated[int | None, typer.Option(help="Rank of LoRA on all Linears; without it everything is trained.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    disk: Annotated[str | None, typer.Option(help="What checkpoints may take on disk.")] = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Also use codecs that change gradients.")] = False,
    tries: Annotated[int, typer.Option(help="At most so many contexts are tried.")] = 6,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Run training steps of random weights, each context in a process of its own under the memory limit, and say which trains.

    The plan says where to begin and is printed beside what was measured. Exit code 0 if a context trains, 1 if none does, 2 for
    an error.
    """
    with errors("max-context"):
        from unswag.torch.max_context import find_max_context

        found = find_max_context(
            model, memory, lora=lora, optimizer=optimizer, device=device, disk=disk, lossy=lossy, most_tries=tries
        )
    print(found.to_json() if as_json else found)
    raise typer.Exit(0 if found.context else 1)
