"""unswag prepare: .jsonl files to packed rows of tokens on disk, as `unswag.prepare_data` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unswag.cli import errors


def prepare(
    data: Annotated[list[Path], typer.Argument(help="One .jsonl file or several (or .jsonl.gz).")],
    tokenizer: Annotated[str, typer.Option(help="A folder or a name that transformers knows.")],
    output: Annotated[Path, typer.Option(help="The folder to write; it must be empty or not exist.")],
    max_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 2048,
    template: Annotated[str, typer.Option(help="auto, chat or alpaca.")] = "auto",
    too_long: Annotated[str, typer.Option(help="drop or truncate sequences longer than a row.")] = "drop",
    on_error: Annotated[str, typer.Option(help="raise, skip or quarantine a bad line.")] = "raise",
) -> None:
    """Tokenize instruction data, mask its prompts and pack it into rows, and say what became of each line.

    `unswag.data.PackedDataset.load(folder)` reads what is written.
    """
    with errors("prepare"):
        from transformers import AutoTokenizer

        from unswag import prepare_data

        rows = prepare_data(
            data, AutoTokenizer.from_pretrained(tokenizer), max_length, template=template, too_long=too_long, on_error=on_error
        )
        rows.save(output)
    print(f"{len(rows):,} rows of up to {max_length:,} tokens in {output}")
