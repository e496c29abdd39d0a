"""The two packed layouts in plain XLA (docs/format.md sections 1, 5 and 6): they run on every platform and partition
by themselves.

Leading dimensions are kept and nothing is flattened or indexed by one integer: sharded arrays need no communication, and no
size overflows (docs/tpu.md).
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

WORD = 32  # bits
SUBLANES = 8  # rows of a TPU's tile of 32-bit words
GROUP = WORD * SUBLANES  # rows256: the rows whose bits share 8 words

LAYOUTS = ("rows", "rows256")

Code = Callable[[Array], Array]  # x → code < 2^bits, uint32, and 0 for NaN
Use = Callable[[Array, Array], Array]  # (code, dy) → dx


def pack(x: Array, code: Code, bits: int, layout: str) -> Array:
    """The codes of x [..., rows, cols], `bits` each: uint32 [..., rows, ceil(cols bits / 32)], or for rows256
    [..., 8 bits ceil(rows / 256), cols]."""
    return (_rows_pack if layout == "rows" else _rows256_pack)(as_rows(x), code, bits)


def apply(packed: Array, dy: Array, use: Use, bits: int, layout: str) -> Array:
    """use(code, dy) element for element, with the codes that `pack` wrote for an array of dy's shape."""
    dx = (_rows_apply if layout == "rows" else _rows256_apply)(packed, as_rows(dy), use, bits)
    return dx.reshape(dy.shape)


def as_rows(x: Array) -> Array:
    """x [..., rows, cols]; of fewer dimensions, one row."""
    return x if x.ndim >= 2 else x.reshape(1, x.size)


def _position(shape: tuple[int, ...], axis: int) -> Array:
    return lax.broadcasted_iota(jnp.uint32, shape, axis % len(shape))


def _or(words: Array, axis: int) -> Array:
    return lax.reduce(words, np.uint32(0), lax.bitwise_or, (axis % words.ndim,))


def _padded(x: Array, axis: int, multiple: int, value: float = 0) -> Array:
    after = -x.shape[axis] % multiple
    if not after:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, after)
    return jnp.pad(x, widths, constant_values=value)


# ---- rows: each row by itself, its fields one after the other ------------------------------------------------------------


def _rows_pack(x: Array, code: Code, bits: int) -> Array:
    field = code(x)
    if bits > 1:  # bit k of field i stands at bits i + k
        field = field[..., None]
        field = field >> _position((*x.shape, bits), -1) & 1
        field = field.reshape(*x.shape[:-1], x.shape[-1] * bits)
    field = _padded(field, -1, WORD)
    field = field.reshape(*field.shape[:-1], field.shape[-1] // WORD, WORD)
    return _or(field << _position(field.shape, -1), -1)


def _rows_apply(packed: Array, dy: Array, use: Use, bits: int) -> Array:
    cols = dy.shape[-1]
    words = jnp.broadcast_to(packed[..., None], (*packed.shape, WORD))
    field = words >> _position(words.shape, -1) & 1
    field = field.reshape(*packed.shape[:-1], packed.shape[-1] * WORD)[..., : cols * bits]
    if bits > 1:
        field = field.reshape(*dy.shape, bits)
        field = _or(field << _position(field.shape, -1), -1)
    return use(field, dy)


# ---- rows256: 256 rows of a column share 8 words per bit, row 8 j + s in bit j of word s ---------------------------------
# On a TPU bit j of the eight words is exactly tile j of the floats: packing moves nothing across sublanes or lanes. Without
# the barriers XLA moves the view past the comparison, fusion breaks there, and a whole array of bools or words goes to memory.


def _rows256_pack(x: Array, code: Code, bits: int) -> Array:
    *leading, rows, cols = x.shape
    groups = -(-rows // GROUP)
    view = _padded(x, -2, GROUP, np.nan).reshape(*leading, groups, WORD, SUBLANES, cols)
    field = code(lax.optimization_barrier(view))
    tile = _position(field.shape, -3)
    planes = [_or((field >> k & 1) << tile, -3) for k in range(bits)]
    return jnp.stack(planes, -3).reshape(*leading, groups * bits * SUBLANES, cols)


def _rows256_apply(packed: Array, dy: Array, use: Use, bits: int) -> Array:
    *leading, rows, cols = dy.shape
    padded = _padded(dy, -2, GROUP)
    groups = padded.shape[-2] // GROUP
    view = lax.optimization_barrier(padded.reshape(*leading, groups, WORD, SUBLANES, cols))
    planes = packed.reshape(*leading, groups, bits, 1, SUBLANES, cols)
    tile = _position(view.shape, -3)
    field = jnp.zeros(view.shape, jnp.uint32)
    for k in range(bits):
        plane = jnp.broadcast_to(planes[..., k, :, :, :], view.shape)
        field |= (plane >> tile & 1) << k
    dx = lax.optimization_barrier(use(field, view))
    return dx.reshape(padded.shape)[..., :rows, :]
