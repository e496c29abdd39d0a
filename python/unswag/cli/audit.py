"""unswag audit: what a training step keeps for its backward pass, from the model's config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unswag.cli import errors
from unswag.ledger import Ledger


def audit(
    model: Annotated[str | None, typer.Argument(help="A folder, a config.json, or a name that transformers knows.")] = None,
    tokens: Annotated[int, typer.Option(help="Of the sequence.")] = 1024,
    lora: Annotated[int | None, typer.Option(help="Rank of LoRA on all Linears; without it everything is trained.")] = None,
    stock: Annotated[bool, typer.Option("--stock", help="Without UnSwag's surgery.")] = False,
    policy: Annotated[str, typer.Option(help="Of the surgery: exact, int8, int4 or 2bit.")] = "exact",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="With gradient checkpointing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a report, one file that needs no network.")] = None,
    diff: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two audits that --json wrote, instead of making one.")
    ] = None,
) -> None:
    """Say what a training step keeps for its backward pass, by module, role and tensor. Nothing is computed, and no weights are
    read."""
    with errors("audit"):
        if (model is None) == (diff is None):
            raise ValueError("pass a model, or --diff with two files that `unswag audit --json` wrote")
        if diff is not None:
            ledgers = [Ledger.from_json(path.read_text()) for path in diff]
            shown = ledgers[0].compare(ledgers[1], (diff[0].stem, diff[1].stem))
            if html is not None:
                shown.save_html(html)
            typer.echo(str(shown))
            return
        ledger = _of(str(model), tokens, lora, None if stock else policy, checkpointing)
        if html is not None:
            ledger.save_html(html)
    print(ledger.to_json() if as_json else ledger)


def _of(model: str, tokens: int, lora: int | None, policy: str | None, checkpointing: bool) -> Ledger:
    from unswag.torch.blueprint import blueprint, model_of
    from unswag.torch.dry_run import NoDryRun, dry_run
    from unswag.torch.ways import Way, prepared

    made = blueprint(model_of(model), lora, whole=True).model
    surgery = None if policy is None else {"policy": policy}
    prepared(made, Way("audited", {}, surgery, recompute=checkpointing), None)
    try:
        return dry_run(made, tokens)
    except NoDryRun as error:
        raise RuntimeError(f"{model}: {error}") from error
