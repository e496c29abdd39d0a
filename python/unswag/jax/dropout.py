"""Dropout that keeps no mask: the backward draws it again from the key."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from unswag.jax.how import floating, number
from unswag.jax.varying import alike

__all__ = ["dropout"]


def _dropped(x: Array, key: Array, rate: float) -> Array:
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / np.asarray(1 - rate, x.dtype), jnp.zeros_like(x))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dropout(x: Array, key: Array, rate: float) -> Array:
    return _dropped(x, key, rate)


def _dropout_forward(x: Array, key: Array, rate: float) -> tuple[Array, Array]:
    return _dropped(x, key, rate), key


def _dropout_backward(rate: float, key: Array, dy: Array) -> tuple[Array, None]:
    return _dropped(dy, key, rate), None


_dropout.defvjp(_dropout_forward, _dropout_backward)


def _checked(key: Array) -> Array:
    if not isinstance(key, Array):
        raise TypeError(f"dropout: key is a {type(key).__name__}; pass one from jax.random.key")
    if key.ndim != (0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1):  # uint32 as from jax.random.PRNGKey
        raise ValueError(f"dropout: key has shape {key.shape}; pass one key, e.g. key[0]")
    return key


def dropout(x: Array, rate: float, key: Array, *, deterministic: bool = False) -> Array:
    """x / (1 - rate) with probability 1 - rate, else 0 (Srivastava et al. 2014); x itself when `deterministic`.

    x     any shape, float32, bfloat16, float16 or float64; the output has its shape and dtype
    rate  0 <= rate < 1, a Python number;  key  from `jax.random.key`: one draw, use it once
    Saved: the key. The draws are those of `jax.random.bernoulli(key, 1 - rate, x.shape)`, in which every sharding agrees.
    """
    x = floating("dropout", "x", x)
    rate = number("dropout", "rate", rate, "choose 0 <= rate < 1", lambda rate: 0 <= rate < 1)
    return x if deterministic or rate == 0 else _dropout(*alike(x, _checked(key)), rate)
