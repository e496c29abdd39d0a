"""Sizes of memory as people write them."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
}


def bytes_of(size: int | str, argument: str) -> int:
    """The bytes of a number or of a text like "64GiB", "1.5 GiB" or "500MB" (powers of 1024 and of 1000).

    ValueError for anything else, for what is negative and from 2^63 on; `argument` is its name in the message."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return _fitting(size, size, argument)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    if found is None or found[2] not in _UNITS:
        raise ValueError(f'{argument}={size!r} is no size; pass a number of bytes, or a text like "64GiB" or "500MB"')
    return _fitting(size, float(found[1]) * _UNITS[found[2]], argument)


def _fitting(size: int | str, nbytes: float, argument: str) -> int:
    if nbytes >= 1 << 63:
        raise ValueError(f"{argument}={size!r} is more than a signed 64-bit size holds; pass less than 8 EiB (2^63 bytes)")
    return int(nbytes)


def show(nbytes: float) -> str:
    """The same for people, in the largest binary unit that leaves at least 1: "1.50 GiB"."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(nbytes) >= 1 << shift:
            return f"{nbytes / (1 << shift):,.{2 if shift >= 30 else 1}f} {unit}"
    return f"{nbytes:,.0f} bytes"
