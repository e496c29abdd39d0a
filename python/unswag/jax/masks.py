"""Activations of the ReLU family: their backward needs one bit per element.

x is an array of any shape, float32, bfloat16, float16 or float64; the output has its shape and dtype. Values and gradients
are those of `jax.nn`, bit for bit, on the same platform: also for NaN (no gradient passes), ±0 and infinities. One exception:
`jax.nn.leaky_relu` adds its two branches, which turns a cotangent of -0 into +0 and may change the payload of a NaN or a
subnormal 16-bit cotangent; ours passes cotangents unchanged. "Saved" is what is kept from forward to backward, for n elements;
a next layer with a trained weight keeps the output as well.

`implementation` selects the kernels ("xla", "ffi", "pallas"), `layout` where the bits lie ("rows", "rows256"; docs/format.md).
None is the best for the platform and the shape; a name allows no fallback. TypeError for a dtype that is not floating,
ValueError for an unknown name.

A gradient may be differentiated again, in either mode (`jax.hessian`); `jax.jvp` through a function itself is a TypeError of
JAX. Under automatic sharding the words of a mask never hold bits of two devices (docs/jax.md).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from unswag.jax import xla
from unswag.jax.formulas import Act
from unswag.jax.how import How, choose, floating, implement, number
from unswag.jax.names import INPUT, MASK

__all__ = ["leaky_relu", "relu", "relu2", "relu6", "unswag_relu"]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _mask(x: Array, act: Act, how: How) -> Array:
    return act.value(x)


def _pack(x: Array, act: Act, how: How) -> Array:
    if how.implementation == "pallas":
        from unswag.jax import pallas  # half a second to import

        return pallas.masked(act.name, x, act.bit)
    return xla.pack(x, act.bit, 1, how.layout)


def _apply(packed: Array, dy: Array, act: Act, how: How) -> Array:
    if how.implementation == "pallas":
        from unswag.jax import pallas

        return pallas.unmasked(act.name, packed, dy, act.gradient)
    return xla.apply(packed, dy, act.gradient, 1, how.layout)


def mask_forward(x: Array, act: Act, how: How) -> tuple[Array, Array]:
    def plain(x: Array) -> tuple[Array, Array]:
        return act.value(x), _pack(x, act, how)

    y, packed = implement(how, "mask_forward", plain, x, act=act.name, slope=act.slope)
    return y, checkpoint_name(packed, MASK)


def mask_backward(act: Act, how: How, packed: Array, dy: Array) -> tuple[Array]:
    def plain(packed: Array, dy: Array) -> Array:
        return _apply(packed, dy, act, how)

    return (implement(how, "mask_backward", plain, packed, dy, act=act.name, slope=act.slope),)


_mask.defvjp(mask_forward, mask_backward)


def _masked(op: str, x: Array, act: Act, implementation: str | None, layout: str | None) -> Array:
    x = floating(op, "x", x)
    how = choose(op, x, implementation, layout, bits=1, pallas=True)
    return how.elementwise(lambda x: _mask(x, act, how), x)


def relu(x: Array, *, implementation: str | None = None, layout: str | None = None) -> Array:
    """max(x, 0), as `jax.nn.relu`. Saved: one bit per element, n / 8 bytes. The layout rows pads each row to 4 bytes, rows256
    the number of rows to a multiple of 256."""
    return _masked("relu", x, Act("relu"), implementation, layout)


unswag_relu = relu


def relu6(x: Array, *, implementation: str | None = None, layout: str | None = None) -> Array:
    """min(max(x, 0), 6), as `jax.nn.relu6`. Saved: one bit per element, n / 8 bytes."""
    return _masked("relu6", x, Act("relu6"), implementation, layout)


def leaky_relu(
    x: Array, negative_slope: float = 0.01, *, implementation: str | None = None, layout: str | None = None
) -> Array:
    """x where x >= 0, else negative_slope x, as `jax.nn.leaky_relu`. Saved: one bit per element, n / 8 bytes.

    negative_slope is a Python number: TypeError for an array.
    """
    slope = number("leaky_relu", "negative_slope", negative_slope)
    return _masked("leaky_relu", x, Act("leaky_relu", slope), implementation, layout)


class Relu2:
    """The square and its gradient."""

    def value(self, x: Array) -> Array:
        return jnp.square(jax.nn.relu(x))

    def gradients(self, dy: Array, x: Array) -> tuple[Array]:
        return (jnp.where(x > 0, dy * (x * 2), jnp.zeros_like(dy)),)


RELU2 = Relu2()


@jax.custom_vjp
def _relu2(x: Array) -> Array:
    return RELU2.value(x)


def _relu2_forward(x: Array) -> tuple[Array, Array]:
    x = checkpoint_name(x, INPUT)
    return RELU2.value(x), x


def _relu2_backward(x: Array, dy: Array) -> tuple[Array]:
    return RELU2.gradients(dy, x)


_relu2.defvjp(_relu2_forward, _relu2_backward)


def relu2(x: Array) -> Array:
    """max(x, 0)^2 (So et al. 2021, Primer), as `jnp.square(jax.nn.relu(x))`. Saved: x, n b bytes, and no bool
    beside it. Bits are not enough: the gradient is 2 max(x, 0) dy."""
    return _relu2(floating("relu2", "x", x))
