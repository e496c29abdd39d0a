"""What the tests of this folder share: arrays of awkward values, bits, and what a function keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from near import SEED

SIXTEEN = [jnp.bfloat16, jnp.float16]


def bits(x: Any) -> np.ndarray:
    """The bits of x, so that NaN equals NaN and -0 differs from 0."""
    x = np.asarray(x)
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize])


def all_sixteen(dtype: Any) -> jax.Array:
    """Every value of a 16-bit type, [256, 256]."""
    return jnp.asarray(np.arange(65536, dtype=np.uint16).view(jnp.dtype(dtype)).reshape(256, 256))


def special(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> jax.Array:
    """Normal values, every third one special."""
    kinds = [0.0, -0.0, np.nan, np.inf, -np.inf, 6.0, 1e-45, -1e-45, 1e-39, 6e-8, -1.0]
    x = np.random.default_rng(seed + SEED).standard_normal(shape).astype(np.float32) * 3
    for i in range(0, x.size, 3):
        x.flat[i] = kinds[i // 3 % len(kinds)]
    return jnp.asarray(x).astype(dtype)


def normal(shape: tuple[int, ...], dtype: Any, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed + SEED).standard_normal(shape) * scale).astype(dtype)


def unit(dtype: Any) -> float:
    """The unit roundoff of a 16-bit result, for `near.assert_as_near`; 0 of a wider one, whose sums have none to spare."""
    return float(jnp.finfo(dtype).eps) / 2 if jnp.dtype(dtype).itemsize == 2 else 0.0


def kept(function: Callable[..., Any], *arguments: Any) -> list[tuple[str, tuple[int, ...]]]:
    """dtype and shape of everything that forward hands to backward when both are jitted apart."""
    residuals = jax.eval_shape(lambda *given: jax.vjp(function, *given)[1], *arguments)
    return [(str(leaf.dtype), leaf.shape) for leaf in jax.tree.leaves(residuals)]
