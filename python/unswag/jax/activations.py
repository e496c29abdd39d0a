"""silu and gelu: exact, from x, or with `bits`, which keeps only a code of the derivative.

x is an array of any shape, float32, bfloat16, float16 or float64; the output has its shape and dtype. 16-bit values are
computed in float32 and rounded once. "Saved" is what is kept from forward to backward, for n elements of b bytes; a next layer
with a trained weight keeps the output as well. The gradient may be differentiated again, in either mode (`jax.hessian`);
`jax.jvp` through a function itself is a TypeError of JAX. `implementation` selects the kernels: "xla", or "ffi", the C++
kernels on the CPU, which have no codes and round in other places.

Codes are lossy: the values are exact, the gradients are not (docs/math.md gives the errors). The levels are constants, so these
gradients have no derivative: differentiating them by x again is a NotImplementedError. `codebook` is a name known to
`unswag.codebooks.codebook` ("optimal", "mm1", "mm2", "fewbit", "resilu2", "seed", …) or a Codebook, such as
`unswag.codebooks.calibrated` returns. The code 0, also that of NaN, is the lowest level.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from unswag import codebooks
from unswag.codebooks import Codebook
from unswag.jax import xla
from unswag.jax.formulas import FUNCTIONS, gradient, value, wide
from unswag.jax.how import How, choose, floating, implement, integer, one_of
from unswag.jax.names import CODE, INPUT

__all__ = ["gelu", "silu"]


# ---- exact --------------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _exact(x: Array, act: str, how: How) -> Array:
    return implement(how, "activation_forward", partial(value, act=act), x, act=act)


def _exact_forward(x: Array, act: str, how: How) -> tuple[Array, Array]:
    x = checkpoint_name(x, INPUT)
    return implement(how, "activation_forward", partial(value, act=act), x, act=act), x


def _exact_backward(act: str, how: How, x: Array, dy: Array) -> tuple[Array]:
    return (implement(how, "activation_backward", partial(gradient, act=act), x, dy, act=act),)


_exact.defvjp(_exact_forward, _exact_backward)


# ---- codes --------------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _coded(x: Array, act: str, book: Codebook, how: How) -> Array:
    return value(x, act)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _code(x: Array, act: str, book: Codebook, how: How) -> Array:
    def code(x: Array) -> Array:
        of = wide(x) if book.of == "x" else FUNCTIONS[act][1](wide(x))
        bounds = (np.asarray(bound, of.dtype) for bound in book.bounds)
        return sum(((of > bound).astype(jnp.uint32) for bound in bounds), start=jnp.zeros(x.shape, jnp.uint32))

    return xla.pack(x, code, book.bits, how.layout)


@_code.defjvp
def _code_has_no_derivative(act: str, book: Codebook, how: How, *_: Any) -> Any:
    """Asked for only where a gradient is differentiated by x: what it looks up is constant, and the derivative would be 0."""
    raise NotImplementedError(
        f"{act.removesuffix('_tanh')}: bits is {book.bits}: a gradient from a code cannot be differentiated by x again; "
        "leave out bits and codebook where second derivatives are wanted"
    )


def _coded_forward(x: Array, act: str, book: Codebook, how: How) -> tuple[Array, Array]:
    return value(x, act), checkpoint_name(_code(x, act, book, how), CODE)


def _coded_backward(act: str, book: Codebook, how: How, packed: Array, dy: Array) -> tuple[Array]:
    def use(code: Array, dy: Array) -> Array:
        level = jnp.full(dy.shape, book.levels[0], wide(dy).dtype)
        for i, slope in enumerate(book.levels[1:], start=1):
            level = jnp.where(code == i, np.asarray(slope, level.dtype), level)
        return (level * wide(dy)).astype(dy.dtype)

    return (xla.apply(packed, dy, use, book.bits, how.layout),)


_coded.defvjp(_coded_forward, _coded_backward)


def _activation(
    x: Array,
    function: str,
    act: str,
    bits: int | None,
    codebook: str | Codebook | None,
    implementation: str | None,
    layout: str | None,
) -> Array:
    x = floating(function, "x", x)
    if bits is not None:  # how many there may be unswag.codebooks says
        integer(function, "bits", bits, "choose 1, 2, 3 or 4, or None to keep x exactly")
    if not isinstance(codebook, str | Codebook | None):
        raise TypeError(f"{function}: codebook is {codebook!r}; pass a name or a Codebook, or None for the best one")
    if isinstance(codebook, Codebook):
        if bits not in (None, codebook.bits):
            raise ValueError(f"{function}: bits is {bits} but the codebook has {codebook.bits}; leave bits out")
        book = codebook
    elif bits is not None:
        book = codebooks.codebook(function, bits, codebook)
    elif codebook is not None:
        raise ValueError(f"{function}: codebook is {codebook!r} but bits is None, which keeps x exactly; name the bits too")
    else:
        how = choose(function, x, implementation, layout)
        if layout is not None:
            raise ValueError(f"{function}: layout is {layout!r} but bits is None: nothing is packed; leave layout out")
        return how.elementwise(lambda x: _exact(x, act, how), x)
    if implementation == "ffi":
        raise ValueError(f"{function}: implementation 'ffi' has no codes; leave it out, or leave out bits and codebook")
    how = choose(function, x, implementation, layout, bits=book.bits)
    return how.elementwise(lambda x: _coded(x, act, book, how), x)


def gelu_name(op: str, approximate: bool) -> str:
    """The name in the table. approximate is a bool, as in JAX: PyTorch's 'none' would count as true."""
    return "gelu_tanh" if one_of(op, "approximate", approximate, (True, False)) else "gelu"


def silu(
    x: Array,
    *,
    bits: int | None = None,
    codebook: str | Codebook | None = None,
    implementation: str | None = None,
    layout: str | None = None,
) -> Array:
    """x / (1 + e^-x), as `jax.nn.silu`. Saved: x, n b bytes (`jax.nn.silu` keeps two more arrays).

    bits            1 to 4: only a code of the derivative is saved, n bits / 8 bytes. Lossy: the gradient has the error of the
                    codebook
    codebook        the levels of the derivative; None: the best with this number of bits
    implementation  "xla", "ffi" or None for the best on this platform
    layout          where the bits of a code lie (docs/format.md): "rows", "rows256" or None for the best
    """
    return _activation(x, "silu", "silu", bits, codebook, implementation, layout)


def gelu(
    x: Array,
    approximate: bool = True,
    *,
    bits: int | None = None,
    codebook: str | Codebook | None = None,
    implementation: str | None = None,
    layout: str | None = None,
) -> Array:
    """x Phi(x), or with `approximate` its tanh form, as `jax.nn.gelu`. Saved: x, n b bytes.

    bits, codebook, implementation and layout as in `silu`. Codes are those of the erf form, whose derivative differs from that
    of the tanh form by at most 0.001.
    """
    act = gelu_name("gelu", approximate)
    return _activation(x, "gelu", act, bits, codebook, implementation, layout)
