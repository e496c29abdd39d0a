"""What is said where a package that we do not require is not installed."""

from __future__ import annotations

from typing import NoReturn


def missing(what: str, error: ModuleNotFoundError, extra: str) -> NoReturn:
    """Raises the error of `what`, for which a module is missing, and says what to install, unless the module is ours."""
    if error.name is None or error.name.partition(".")[0] == "unswag":
        raise error
    raise ModuleNotFoundError(
        f"{what} needs the module {error.name!r}, which is not installed: pip install 'unswag[{extra}]'", name=error.name
    ) from error
