"""The golden files that the JAX layouts must meet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

VECTORS = Path(__file__).parents[2] / "vectors"
WORDS = {
    "uint8": np.uint8,
    "uint32": np.uint32,
    "float16": np.uint16,
    "bfloat16": np.uint16,
    "float32": np.uint32,
    "float64": np.uint64,
}


def cases(name: str) -> Iterator[tuple[dict[str, str], dict[str, np.ndarray]]]:
    """(settings, tensors) of each case of a golden file."""
    settings: dict[str, str] = {}
    tensors: dict[str, np.ndarray] = {}
    for line in (VECTORS / f"{name}.txt").read_text().splitlines()[1:]:
        first, *rest = line.split()
        if first == "case":
            if settings:
                yield settings, tensors
            settings, tensors = dict(word.split("=") for word in rest[1:]), {}
        else:
            dtype, rows, cols, *words = rest
            bits = np.array([int(word, 16) for word in words], WORDS[dtype]).reshape(int(rows), int(cols))
            tensors[first] = bits.view(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    yield settings, tensors
