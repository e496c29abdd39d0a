"""The two packed layouts in plain XLA (docs/format.md sections 1, 5 and 6): they run on every platform, and XLA can
partition them.

Leading dimensions are kept and nothing is flattened or indexed by one integer, so no size overflows (docs/tpu.md). Sharded
arrays need no communication where a device's part is whole words: 256 rows for rows256, 32 fields for rows. Elsewhere
`cut` reshapes the array so that this holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
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
    return (pack_rows if layout == "rows" else pack_rows256)(as_rows(x), code, bits)


def apply(packed: Array, dy: Array, use: Use, bits: int, layout: str) -> Array:
    """use(code, dy) element for element, with the codes that `pack` wrote for an array of dy's shape."""
    dx = (apply_rows if layout == "rows" else apply_rows256)(packed, as_rows(dy), use, bits)
    return dx.reshape(dy.shape)


def as_rows(x: Array) -> Array:
    """x as [..., rows, cols]; an x of fewer than two dimensions becomes one row."""
    return x if x.ndim >= 2 else x.reshape(1, x.size)


def _position(shape: tuple[int, ...], axis: int) -> Array:
    return lax.broadcasted_iota(jnp.uint32, shape, axis % len(shape))


def _or(words: Array, axis: int) -> Array:
    """Bitwise or over an axis. No two words share a bit, so a sum does it. On CPUs XLA cannot reduce by "or" across devices."""
    return jnp.sum(words, axis, dtype=jnp.uint32)


def _padded(x: Array, axis: int, multiple: int, value: float = 0) -> Array:
    size = x.shape[axis]
    after = -(-size // multiple) * multiple - size
    if after == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, after)
    return jnp.pad(x, widths, constant_values=value)


def cuts(x: Array) -> tuple[int, int]:
    """The numbers of parts into which devices may have cut the last two dimensions of x. For explicit mesh axes the type of x
    says so; each automatic axis may cut both. Axes that JAX does not show (given by in_shardings alone) are not counted."""
    sharding: Any = getattr(jax.typeof(x), "sharding", None) if hasattr(jax, "typeof") else None
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty:
        return 1, 1
    automatic = math.prod(mesh.shape[name] for name in mesh.auto_axes)

    def parts(names: Any) -> int:
        names = names if isinstance(names, tuple) else (names,) if isinstance(names, str) else ()
        return automatic * math.prod(mesh.shape[name] for name in names if name not in mesh.manual_axes)

    rows, cols = [*(None, None), *sharding.spec][-2:]
    return parts(rows), parts(cols)


def parts(shape: tuple[int, ...], cuts: tuple[int, int], bits: int, layout: str) -> int:
    """The number of parts into which `cut` must cut an array so that no word has bits of two devices; 1 if none has anyway."""
    axis, multiple = (-2, GROUP) if layout == "rows256" else (-1, WORD)
    if len(shape) < -axis or not isinstance(size := shape[axis], int):
        return 1
    most = math.gcd(size, cuts[axis])  # the parts of a sharding are equal, so there cannot be more
    whole = size // most * (bits if layout == "rows" else 1) % multiple == 0
    return 1 if whole else most


def cut(x: Array, parts: int, layout: str) -> Array:
    """x as [..., parts, rows / parts, cols] for rows256, [..., rows, parts, cols / parts] for rows: packed part by part."""
    if parts == 1:
        return x
    axis = x.ndim - (2 if layout == "rows256" else 1)
    return x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])


# ---- rows: each row by itself, its fields one after the other ------------------------------------------------------------


def pack_rows(x: Array, code: Code, bits: int) -> Array:
    field = code(x)
    if bits > 1:  # bit k of field i goes to bits i + k
        field = field[..., None]
        field = field >> _position((*x.shape, bits), -1) & 1
        field = field.reshape(*x.shape[:-1], x.shape[-1] * bits)
    field = _padded(field, -1, WORD)
    field = field.reshape(*field.shape[:-1], field.shape[-1] // WORD, WORD)
    return _or(field << _position(field.shape, -1), -1)


def apply_rows(packed: Array, dy: Array, use: Use, bits: int) -> Array:
    cols = dy.shape[-1]
    words = jnp.broadcast_to(packed[..., None], (*packed.shape, WORD))
    field = words >> _position(words.shape, -1) & 1
    field = field.reshape(*packed.shape[:-1], packed.shape[-1] * WORD)
    field = lax.slice_in_dim(field, 0, cols * bits, axis=-1)
    if bits > 1:
        field = field.reshape(*dy.shape, bits)
        field = _or(field << _position(field.shape, -1), -1)
    return use(field, dy)


# ---- rows256: 256 rows of a column share 8 words per bit, row 8 j + s in bit j of word s ---------------------------------
# On a TPU bit j of the eight words is exactly tile j of the floats: packing moves nothing across sublanes or lanes. Without
# the barriers XLA moves the view past the comparison, which breaks the fusion: a whole array of bools or words goes to memory.


def pack_rows256(x: Array, code: Code, bits: int) -> Array:
    *leading, rows, cols = x.shape
    groups = -(-rows // GROUP)
    view = _padded(x, -2, GROUP, np.nan).reshape(*leading, groups, WORD, SUBLANES, cols)
    field = code(lax.optimization_barrier(view))
    tile = _position(field.shape, -3)
    planes = [_or((field >> k & 1) << tile, -3) for k in range(bits)]
    return jnp.stack(planes, -3).reshape(*leading, groups * bits * SUBLANES, cols)


def apply_rows256(packed: Array, dy: Array, use: Use, bits: int) -> Array:
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
    return lax.slice_in_dim(dx.reshape(padded.shape), 0, rows, axis=-2)
