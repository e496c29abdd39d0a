"""Whether a result is as near to the truth as another one: a measure whose verdict does not hang on the machine.

XLA, oneDNN and BLAS choose how they sum, and how they compute exp, by instruction set, shape and number of threads, and which
element of a draw is worst is luck. So errors are root mean squares over all elements of some draws, relative to the truth's:

    ours <= 1.25 theirs + u sqrt(n) + v / 4

u = 2^-24, the unit roundoff of the sums in float32, and n the terms of the longest: recursive summation of numbers of both
signs is off by about u sqrt(n) / 3, and no way of summing is worse (Higham and Mary 2019). v, the unit roundoff of the result,
is for 16-bit results, where one rounding is off by 0.4 v.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

SEED = 1000 * int(os.environ.get("UNSWAG_TEST_SEED", "0"))  # added to the seeds of random tests: tools/isa_matrix.sh

Results = Sequence[Any]  # arrays


def off(pairs: Iterable[tuple[Any, Any]]) -> float:
    """Root mean square of the error over all draws of a result, relative to that of the truth."""
    wide = [(np.asarray(x, np.float64), np.asarray(t, np.float64)) for x, t in pairs]
    error, size = (math.sqrt(sum(float(np.sum(v * v)) for v in of)) for of in ([x - t for x, t in wide], [t for _, t in wide]))
    return error / max(size, np.finfo(np.float32).tiny)


def assert_as_near(draws: Iterable[tuple[Results, Results, Results]], terms: int, result: float = 0.0) -> None:
    """Of each draw our results, the others and the truth. terms: of the longest sum. result: v, 0 for float32."""
    for i, each in enumerate(zip(*(zip(*draw, strict=True) for draw in draws), strict=True)):
        ours, theirs = off((x, t) for x, _, t in each), off((y, t) for _, y, t in each)
        limit = 1.25 * theirs + 2.0**-24 * math.sqrt(terms) + result / 4
        assert ours <= limit, f"result {i}: ours is off by {ours:.2e}, the other by {theirs:.2e}; allowed {limit:.2e}"
