"""The optional parts of the installation, and the error where something of them is missing."""

from __future__ import annotations

from typing import NoReturn

__all__ = ["missing"]


def missing(what: str, error: ModuleNotFoundError, extra: str) -> NoReturn:
    """Raises the error of `what`, for which a module was missing, anew: it says how to install the extra. If the module is one
    of ours, the error is raised as it came."""
    if error.name is None or error.name.partition(".")[0] == "unswag":
        raise error
    raise ModuleNotFoundError(
        f"{what} needs the module {error.name!r}, which is not installed. In the folder of UnSwag's sources, run: "
        f"pip install '.[{extra}]'",
        name=error.name,
    ) from error
