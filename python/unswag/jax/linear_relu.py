"""A linear layer with relu whose kernel makes the mask from the sums, so that x w never makes a round trip through memory.

The kernel runs where those of `unswag.jax.pallas` do, and is an error elsewhere.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from unswag.jax import pallas, xla
from unswag.jax.formulas import Act, wide_type
from unswag.jax.how import differentiated_as, floating, same_dtype
from unswag.jax.names import INPUT, MASK
from unswag.jax.xla import GROUP, SUBLANES, WORD

__all__ = ["linear_relu"]

_RELU = Act("relu")


def _linear_kernel(x: Any, w: Any, y: Any, words: Any, total: Any, *, rows: int, steps: int) -> None:
    first, k = pl.program_id(1) * y.shape[0], pl.program_id(3)

    @pl.when(k == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    total[...] += jnp.dot(x[...], w[...], preferred_element_type=total.dtype)

    @pl.when(k == steps - 1)
    def _() -> None:
        z = total[...].astype(y.dtype).astype(total.dtype)  # the bits are those of the rounded sum
        y[...] = jnp.maximum(z, 0).astype(y.dtype)
        for group in range(y.shape[0] // GROUP):
            top = group * GROUP

            def tile(j: int, top: int = top) -> Array:
                return z[top + j * SUBLANES : top + (j + 1) * SUBLANES, :]

            words[group * SUBLANES : (group + 1) * SUBLANES, :] = pallas.group_words(tile, _RELU.bit, first + top, rows)


def _depth(k: int) -> tuple[int, int]:
    """Columns of x per step, and the zeros to add to k."""
    if k <= 512:
        return k, 0
    padded = k + -k % 128
    return next(depth for depth in (512, 384, 256, 128) if padded % depth == 0), padded - k


def _linear_xla(x: Array, w: Array) -> tuple[Array, Array]:
    y = jax.nn.relu(jnp.matmul(x, w))
    return y, xla.pack(y, _RELU.bit, 1, "rows256")


def _linear_forward(x: Array, w: Array) -> tuple[Array, Array]:
    """y and the words."""

    if 0 in (*x.shape, *w.shape):
        return _linear_xla(x, w)
    flat = pallas.flatten(x)
    leading, rows, k = flat.shape
    cols = w.shape[-1]
    depth, zeros = _depth(k)
    if zeros:
        flat, w = jnp.pad(flat, ((0, 0), (0, 0), (0, zeros))), jnp.pad(w, ((0, zeros), (0, 0)))
    tall, width = 2 * GROUP if rows > GROUP else GROUP, min(cols, pallas.COLS)
    steps = (k + zeros) // depth
    y, words = pallas.run(
        "linear_relu",
        partial(_linear_kernel, rows=rows, steps=steps),
        jax.eval_shape(_linear_xla, flat, w),
        flat,
        w,
        grid=(leading, pl.cdiv(rows, tall), pl.cdiv(cols, width), steps),
        in_specs=[
            pl.BlockSpec((None, tall, depth), lambda leading, i, j, k: (leading, i, k)),
            pl.BlockSpec((depth, width), lambda leading, i, j, k: (k, j)),
        ],
        out_specs=(pl.BlockSpec(*pallas.block(tall, width)), pl.BlockSpec(*pallas.block(tall // WORD, width))),
        scratch_shapes=[pltpu.VMEM((tall, width), wide_type(x))],
        compiler_params=pallas.parallel(3, sequential=1),
        cost_estimate=pl.CostEstimate(
            flops=2 * leading * rows * k * cols,
            bytes_accessed=flat.nbytes * pl.cdiv(cols, width) + w.nbytes * leading * pl.cdiv(rows, tall),
            transcendentals=0,
        ),
        name="unswag_linear_relu",
    )
    shape = xla.as_rows(x).shape
    return y.reshape(*x.shape[:-1], cols), words.reshape(*shape[:-2], *words.shape[-2:])


def _linear(x: Array, w: Array) -> tuple[Array, Array]:
    return differentiated_as(_linear_xla, _linear_forward)(x, w)


@jax.custom_vjp
def _linear_relu(x: Array, w: Array) -> Array:
    return _linear(x, w)[0]


def _linear_relu_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    y, words = _linear(x, w)
    return y, (checkpoint_name(words, MASK), checkpoint_name(x, INPUT), w)


def _linear_relu_backward(kept: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array]:
    words, x, w = kept
    dz = pallas.unmasked("linear_relu", words, dy, _RELU.gradient)
    leading = tuple(range(x.ndim - 1))
    return jnp.matmul(dz, w.T), jnp.tensordot(x, dz, (leading, leading))


_linear_relu.defvjp(_linear_relu_forward, _linear_relu_backward)


def linear_relu(x: Array, w: Array) -> Array:
    """relu(x w): the kernel that sums the product writes y and its mask; x w itself is never in memory.

    x  [..., k];  w  [k, n] of the same dtype: float32, bfloat16 or (interpreted) float16, float64. y is [..., n] in that
    dtype: sums in float32 (float64 for float64) in blocks of k, rounded once, so y differs from `jax.nn.relu(x @ w)` by
    rounding. The gradient is exactly that of the y returned: dz = dy where y > 0.
    Saved: one bit per element of y, m n / 8 bytes, and x and w as far as their gradients are wanted. The padding of the rows
    to 256 and, for k > 512, of k to a multiple of 128 (by a copy of x and w) costs where they are not such.
    TypeError for dtypes, ValueError for shapes that do not fit. The gradient may be differentiated again, in either mode.
    """
    x, w = floating("linear_relu", "x", x), floating("linear_relu", "w", w)
    same_dtype("linear_relu", ("x", x), {"w": w})
    if x.ndim == 0 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"linear_relu: x has shape {x.shape} and w {w.shape}; pass [..., k] and [k, n]")
    return _linear_relu(x, w)
