"""Gated units that keep only gate and up: the backward recomputes act(gate) and the product.

gate and up have one shape and dtype: float32, bfloat16, float16 or float64; the product has the same. 16-bit values are
computed in float32 and the product is rounded once. Saved: gate and up, 2 n b bytes for n elements of b bytes. ValueError for
shapes, TypeError for dtypes that do not fit. The gradient may be differentiated again, in either mode; `jax.jvp` through a
function itself is a TypeError of JAX. Formulas: docs/math.md (Shazeer 2020, GLU Variants Improve Transformer).

`implementation` selects the kernels: "xla", or "ffi", the C++ kernels on the CPU, which round in other places. reglu has only
those of XLA.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from unswag.jax.activations import gelu_name
from unswag.jax.formulas import gradients, product
from unswag.jax.how import How, choose, floating, implement, same_dtype
from unswag.jax.names import INPUT
from unswag.jax.varying import alike

__all__ = ["geglu", "reglu", "swiglu"]


class Unit(NamedTuple):
    """The product and its gradients by the chosen kernels. JAX differentiates both by their formulas."""

    act: str
    how: How

    def value(self, gate: Array, up: Array) -> Array:
        return implement(self.how, "gated_forward", partial(product, act=self.act), gate, up, act=self.act)

    def gradients(self, dh: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        return implement(self.how, "gated_backward", partial(gradients, act=self.act), gate, up, dh, act=self.act)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gated(gate: Array, up: Array, unit: Unit) -> Array:
    return unit.value(gate, up)


def _gated_forward(gate: Array, up: Array, unit: Unit) -> tuple[Array, tuple[Array, Array]]:
    gate, up = checkpoint_name(gate, INPUT), checkpoint_name(up, INPUT)
    return unit.value(gate, up), (gate, up)


def _gated_backward(unit: Unit, kept: tuple[Array, Array], dh: Array) -> tuple[Array, Array]:
    return unit.gradients(dh, *kept)


_gated.defvjp(_gated_forward, _gated_backward)


def _checked(op: str, gate: Array, up: Array, act: str, implementation: str | None) -> Array:
    gate, up = floating(op, "gate", gate), floating(op, "up", up)
    if gate.shape != up.shape:
        raise ValueError(f"{op}: gate has shape {gate.shape} and up {up.shape}; pass arrays of one shape")
    same_dtype(op, ("gate", gate), {"up": up})
    return _gated(*alike(gate, up), Unit(act, choose(op, gate, implementation, None)))


def swiglu(gate: Array, up: Array, *, implementation: str | None = None) -> Array:
    """silu(gate) up, of two arrays of one shape and dtype; so is the result. Saved: gate and up, 2 n b bytes.

    implementation  "xla", "ffi" or None for the best on this platform
    """
    return _checked("swiglu", gate, up, "silu", implementation)


def geglu(gate: Array, up: Array, approximate: bool = True, *, implementation: str | None = None) -> Array:
    """gelu(gate) up, of two arrays of one shape and dtype; so is the result. Saved: gate and up, 2 n b bytes.

    approximate     True, the default as in `jax.nn.gelu`: the tanh form; False: the erf form
    implementation  "xla", "ffi" or None for the best on this platform
    """
    return _checked("geglu", gate, up, gelu_name("geglu", approximate), implementation)


def reglu(gate: Array, up: Array) -> Array:
    """max(gate, 0) up, of two arrays of one shape and dtype; so is the result. Saved: gate and up, 2 n b bytes."""
    return _checked("reglu", gate, up, "relu", "xla")
