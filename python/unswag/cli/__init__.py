"""The command `unswag`. Results go to stdout, everything else to stderr. Exit codes: 0, or 1 where something does not fit, or 2
for what is not understood or missing, with one line that says what.

Each module of this package is a command, under the module's name with dashes: its function of that name. docs/cli.md is made
from them:
typer unswag.cli utils docs --name unswag --output docs/cli.md
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Annotated

import typer

import unswag

__all__ = ["app", "errors", "main"]

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


@contextlib.contextmanager
def errors(command: str) -> Iterator[None]:
    """Around a command's work: an error that its arguments have caused becomes one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, ModuleNotFoundError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        typer.echo(f"unswag {command}: {first}", err=True)
        raise typer.Exit(2) from None


for _module in pkgutil.iter_modules(__path__):
    app.command(_module.name.replace("_", "-"))(getattr(importlib.import_module(f"{__name__}.{_module.name}"), _module.name))
