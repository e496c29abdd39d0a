"""Codebooks: the derivative of an activation as 2^bits levels. Framework-neutral.

The code of x is the number of bounds strictly below x (or below f'(x), where the codebook says `of = "derivative"`), 0 for NaN;
the backward uses levels[code] for f'(x). The constants and where they come from are in codebooks.json.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import json
import math
from dataclasses import dataclass

__all__ = ["FUNCTIONS", "Codebook", "codebook", "names"]

FUNCTIONS = ("silu", "gelu")

# Least error on inputs of the normal distribution among those of so many bits; with 2, those whose error has no low moments,
# which is what is left after many tokens.
_DEFAULT = {
    "silu": {1: "opt_x_silu_1bit_s1", 2: "mm2_silu_2bit_s1", 3: "opt_x_silu_3bit_s1", 4: "opt_x_silu_4bit_s1"},
    "gelu": {1: "opt_x_gelu_1bit_s1", 2: "mm1_gelu_2bit_s1", 3: "opt_x_gelu_3bit_s1", 4: "opt_x_gelu_4bit_s1"},
}
_SHORT = {"seed": "seed_{}_best_tau", "optimal": "opt_x_{}_{}bit_s1", "fewbit": "fewbit_{}_{}bit"}


@dataclass(frozen=True)
class Codebook:
    """bounds ascending, one fewer than levels; at most 2^bits levels. ValueError says what does not fit.

    of  "x" or "derivative": what is compared with the bounds
    """

    bits: int
    bounds: tuple[float, ...]
    levels: tuple[float, ...]
    of: str = "x"
    name: str = "own"
    source: str = ""

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4):
            raise ValueError(f"codebook {self.name!r}: bits is {self.bits!r}; choose 1, 2, 3 or 4")
        if self.of not in ("x", "derivative"):
            raise ValueError(f"codebook {self.name!r}: of is {self.of!r}; choose 'x' or 'derivative'")
        if not 2 <= len(self.levels) <= 2**self.bits:
            raise ValueError(
                f"codebook {self.name!r}: {len(self.levels)} levels do not fit into {self.bits} bits; give 2 to {2**self.bits}"
            )
        if len(self.bounds) != len(self.levels) - 1:
            raise ValueError(
                f"codebook {self.name!r}: {len(self.bounds)} bounds for {len(self.levels)} levels; give {len(self.levels) - 1}"
            )
        if not all(math.isfinite(v) for v in (*self.bounds, *self.levels)):
            raise ValueError(f"codebook {self.name!r}: a bound or level is not finite; give numbers")
        if any(a >= b for a, b in itertools.pairwise(self.bounds)):
            raise ValueError(f"codebook {self.name!r}: bounds {list(self.bounds)} are not sorted; give them in ascending order")


@functools.cache
def _all() -> dict[tuple[str, str], Codebook]:
    text = importlib.resources.files("unswag").joinpath("codebooks.json").read_text()
    return {
        (c["function"], c["name"]): Codebook(c["bits"], tuple(c["bounds"]), tuple(c["levels"]), c["of"], c["name"], c["source"])
        for c in json.loads(text)
    }


def names(function: str, bits: int | None = None) -> list[str]:
    """The codebooks of a function, all or those of so many bits."""
    return [name for (f, name), book in _all().items() if f == function and bits in (None, book.bits)]


def codebook(function: str, bits: int, name: str | None = None) -> Codebook:
    """By name, or the default of so many bits. "seed", "optimal" and "fewbit" are short names. ValueError lists the choices."""
    if function not in FUNCTIONS:
        raise ValueError(f"no codebooks for {function!r}; choose {' or '.join(map(repr, FUNCTIONS))}")
    if isinstance(bits, bool) or bits not in (1, 2, 3, 4):
        raise ValueError(f"{function}: bits is {bits!r}; choose 1, 2, 3 or 4, or None to keep x exactly")
    full = _DEFAULT[function][bits] if name is None else _SHORT.get(name, name).format(function, bits)
    book = _all().get((function, full))
    if book is None or book.bits != bits:
        raise ValueError(f"{function}: no codebook {name!r} of {bits} bits; choose among {', '.join(names(function, bits))}")
    return book
