"""The command `unswag`. Results go to stdout; exit code 0, or 2 for an argument that is not understood.

Each module of this package is a command, under the module's name: its function of that name. docs/cli.md is made from them:
typer unswag.cli utils docs --name unswag --output docs/cli.md
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Annotated

import typer

import unswag

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=True)


def main() -> None:
    """What the console script calls."""
    app(prog_name="unswag")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"unswag {unswag.__version__}")
        raise typer.Exit


@app.callback()
def _unswag(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """UnSwag cuts the activation memory of training without changing the result, and shows what is left."""


for _module in pkgutil.iter_modules(__path__):
    app.command(_module.name)(getattr(importlib.import_module(f"{__name__}.{_module.name}"), _module.name))
