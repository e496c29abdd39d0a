"""unswag audit: what a training step keeps for its backward pass, from the model's config alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unswag.cli import errors
from unswag.ledger import Ledger

if TYPE_CHECKING:
    from unswag.torch.blueprint import Blueprint


def audit(
    model: Annotated[str | None, typer.Argument(help="A folder, a config.json, or a name that transformers knows.")] = None,
    tokens: Annotated[int, typer.Option(help="Of the sequence.")] = 1024,
    lora: Annotated[int | None, typer.Option(help="Rank of LoRA on all Linears; without it everything is trained.")] = None,
    stock: Annotated[bool, typer.Option("--stock", help="Without UnSwag's surgery.")] = False,
    policy: Annotated[str, typer.Option(help="Of the surgery: exact, int8, int4 or 2bit.")] = "exact",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="With gradient checkpointing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a report, one file that needs no network.")] = None,
    memory: Annotated[str | None, typer.Option(help="In the report, also contexts against this memory, as planned.")] = None,
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
        made = _prepared(str(model), lora, None if stock else policy, checkpointing)
        ledger = _ledger(str(model), made, tokens)
        if html is not None:
            _report(html, ledger, made, tokens, not stock, str(model), memory, lora)
    print(ledger.to_json() if as_json else ledger)


def _prepared(model: str, lora: int | None, policy: str | None, checkpointing: bool) -> Blueprint:
    from unswag.torch.blueprint import blueprint, model_of
    from unswag.torch.ways import Way, prepared

    made = blueprint(model_of(model), lora, whole=True)
    prepared(made.model, Way("audited", {}, None if policy is None else {"policy": policy}, recompute=checkpointing), None)
    return made


def _ledger(model: str, made: Blueprint, tokens: int) -> Ledger:
    from unswag.torch.dry_run import NoDryRun, dry_run

    try:
        return dry_run(made.model, tokens)
    except NoDryRun as error:
        raise RuntimeError(f"{model}: {error}") from error


def _report(
    path: Path, ledger: Ledger, made: Blueprint, tokens: int, patched: bool, model: str, memory: str | None, lora: int | None
) -> None:  # fmt: skip
    from unswag.front import plan
    from unswag.report import page
    from unswag.torch.planned_step import planned_step

    planned = None if memory is None else plan(model, memory, lora=lora, compare=True)
    page.save(path, {"": ledger}, planned, planned_step(made, tokens, surgery=patched).drawn())
