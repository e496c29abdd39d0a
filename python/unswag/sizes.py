"""Sizes of memory as people write them. Framework-neutral."""

from __future__ import annotations

import re

__all__ = ["parse", "show"]

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


def parse(name: str, size: str | int | float) -> int:
    """Bytes of "16GiB" (2^30 each), "24 GB" (10^9 each) or a number of bytes; `name` is the argument's, for errors.

    ValueError for anything else, and for less than one byte.
    """
    found: float | None = None
    if isinstance(size, (int, float)) and not isinstance(size, bool):
        found = float(size)
    elif isinstance(size, str) and (match := re.fullmatch(r"\s*([\d_]*\.?\d+)\s*([a-zA-Z]*)\s*", size)):
        unit = UNITS.get(match[2].lower())
        found = None if unit is None else float(match[1]) * unit
    if found is None or not 1 <= found < 2**63:
        raise ValueError(f"{name}={size!r} is no size of memory; pass bytes, or a text such as '16GiB', '24GB' or '500MiB'")
    return int(found)


def show(nbytes: float) -> str:
    """"1.5 GiB": in the largest binary unit that leaves at least 1."""
    for unit, words in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(nbytes) >= unit:
            return f"{nbytes / unit:,.{2 if unit >= 2**30 else 1}f} {words}"
    return f"{nbytes:,.0f} bytes"
