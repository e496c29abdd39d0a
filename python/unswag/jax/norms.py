"""RMSNorm and LayerNorm that keep x and one number per row; everything else is recomputed from them.

x is [..., cols], float32, bfloat16, float16 or float64, weight and bias are [cols] of any floating dtype; y has the shape and
dtype of x. 16-bit values are computed in float32 and rounded once. Saved: x, which is the residual stream and usually kept
anyway, and rstd, 4 bytes per row (8 for float64). The gradient may be differentiated again, in either mode; `jax.jvp` of the
functions themselves raises JAX's TypeError. Formulas: docs/math.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from unswag.jax.formulas import wide
from unswag.jax.how import floating, number
from unswag.jax.names import INPUT, STAT
from unswag.jax.varying import alike

__all__ = ["layer_norm", "rms_norm"]


def _mean(x: Array) -> Array:
    return jnp.mean(x, -1, keepdims=True)


def _over_rows(x: Array, like: Array | None) -> Array | None:
    """Sum over all but the last dimension: the gradient of a weight."""
    return None if like is None else jnp.sum(x, tuple(range(x.ndim - 1))).astype(like.dtype)


def _centred(x: Array, centre: bool) -> Array:
    v = wide(x)
    return v - _mean(v) if centre else v


def _affine(xhat: Array, weight: Array | None, bias: Array | None, offset: float) -> Array:
    y = xhat if weight is None else xhat * (offset + weight.astype(xhat.dtype))
    return y if bias is None else y + bias.astype(xhat.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _norm(x: Array, weight: Array | None, bias: Array | None, eps: float, offset: float, centre: bool) -> Array:
    return _norm_forward(x, weight, bias, eps, offset, centre)[0]


def _norm_forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, offset: float, centre: bool
) -> tuple[Array, tuple[Any, ...]]:
    x = checkpoint_name(x, INPUT)
    v = _centred(x, centre)
    rstd = checkpoint_name(lax.rsqrt(_mean(v * v) + eps), STAT)
    return _affine(v * rstd, weight, bias, offset).astype(x.dtype), (x, rstd, weight, bias)


def _norm_backward(eps: float, offset: float, centre: bool, kept: tuple[Any, ...], dy: Array) -> tuple[Any, ...]:
    x, rstd, weight, bias = kept
    xhat, d = _centred(x, centre) * rstd, wide(dy)
    g = d if weight is None else d * (offset + weight.astype(d.dtype))
    dx = g - xhat * _mean(g * xhat)
    if centre:
        dx = dx - _mean(dx)  # not mean(g): the mean of xhat is only nearly 0
    return (rstd * dx).astype(x.dtype), _over_rows(d * xhat, weight), _over_rows(d, bias)


_norm.defvjp(_norm_forward, _norm_backward)


def _checked(op: str, x: Array, vectors: dict[str, Array | None]) -> tuple[Array, list[Array | None]]:
    x = floating(op, "x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {x.shape}; pass [..., cols] with at least one column")
    checked: list[Array | None] = []
    for name, vector in vectors.items():
        if vector is not None:
            vector = floating(op, name, vector)
            if vector.shape != x.shape[-1:]:
                raise ValueError(f"{op}: {name} has shape {vector.shape}; pass {x.shape[-1:]}, the last dimension of x")
        checked.append(vector)
    x, *checked = alike(x, *checked)
    return x, checked


def _epsilon(op: str, eps: float) -> float:
    return number(op, "eps", eps, "pass a number that is not negative, e.g. 1e-6", lambda eps: eps >= 0)


def rms_norm(x: Array, weight: Array | None = None, *, eps: float = 1e-6, weight_offset: float = 0.0) -> Array:
    """x rstd (weight_offset + weight), rstd = 1 / sqrt(mean(x^2) + eps) over the last dimension (Zhang and Sennrich 2019).

    weight_offset  1 for models that store weight - 1 (Gemma)
    Saved: x and rstd, 4 bytes per row.
    """
    x, (weight,) = _checked("rms_norm", x, {"weight": weight})
    offset = number("rms_norm", "weight_offset", weight_offset)
    return _norm(x, weight, None, _epsilon("rms_norm", eps), offset, False)


def layer_norm(x: Array, weight: Array | None = None, bias: Array | None = None, *, eps: float = 1e-6) -> Array:
    """(x - mean) rstd weight + bias, rstd = 1 / sqrt(mean((x - mean)^2) + eps) over the last dimension (Ba et al. 2016).

    Saved: x and rstd, 4 bytes per row; the mean is recomputed from x.
    """
    x, (weight, bias) = _checked("layer_norm", x, {"weight": weight, "bias": bias})
    return _norm(x, weight, bias, _epsilon("layer_norm", eps), 0.0, True)
