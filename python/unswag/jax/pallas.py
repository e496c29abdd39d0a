"""Pallas kernels for TPUs: the masks of relu, relu6 and leaky_relu, and a linear layer with relu that makes its mask itself.

`implementation="pallas"` of `unswag.jax.relu`, `relu6` and `leaky_relu`. The words are those of the layout rows256
(docs/format.md section 6). Compiled on TPUs; on CPUs the kernels are interpreted, which is slow and meant for tests; elsewhere
they are a ValueError. Forward values stay those of `jax.nn`: the kernels only pack and apply.

XLA cannot partition a kernel. Under automatic sharding over several devices the kernels are a ValueError; inside
`jax.shard_map` each device runs them on its part. There `linear_relu`, and on CPUs any kernel, needs check_vma=False; with
check_vma=True JAX raises.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from unswag.jax import xla
from unswag.jax.activations import wide, wide_type
from unswag.jax.how import differentiated_as, floating, same_dtype
from unswag.jax.masks import Act
from unswag.jax.policies import INPUT, MASK
from unswag.jax.xla import GROUP, SUBLANES, WORD

__all__ = ["apply", "linear_relu", "masked", "pack", "unmasked"]

COLS = 1024  # of a block: 1 MiB of float32 for 256 rows


# ---- where a kernel may run ----------------------------------------------------------------------------------------------

_alone = Primitive("unswag_alone")  # the identity; an error where a kernel after it would have to be partitioned


def _refuse(op: str, where: str, remedy: str) -> None:
    if op == "linear_relu":
        raise ValueError(f"{op}: x and w: {where}; {remedy}, or use relu(x @ w)")
    raise ValueError(f"{op}: implementation is 'pallas' but {where}; {remedy}, or pass implementation='xla'")


def _alone_aval(x: Any, *, op: str) -> Any:
    if any(axis is not None for axis in x.sharding.spec):
        _refuse(op, f"x is sharded as {x.sharding.spec}", "call it inside jax.shard_map")
    return x


def _alone_lowering(ctx: Any, x: Any, *, op: str) -> list[Any]:
    module = ctx.module_context
    if others := set(module.platforms) - {"tpu", "cpu"}:
        _refuse(op, f"its kernels are for tpu (and, interpreted, cpu), not {min(others)}", "run it there")
    context = module.axis_context
    automatic = getattr(context, "num_devices", 1)  # jit; inside shard_map there is a mesh
    if (mesh := getattr(context, "mesh", None)) is not None:
        manual = set(context.manual_axes) | set(mesh.manual_axes)
        automatic = 1
        for axis, size in mesh.shape.items():
            automatic *= 1 if axis in manual else size
    if automatic != 1:
        _refuse(op, f"XLA would have to partition its kernels over {automatic} devices", "call it inside jax.shard_map")
    return [x]


_alone.def_impl(lambda x, *, op: jax.jit(partial(_alone.bind, op=op))(x))
_alone.def_abstract_eval(_alone_aval)
batching.defvectorized(_alone)


def _no_derivative(*_: Any, op: str) -> Any:
    """Where JAX has dropped the rule of `differentiated_as`: in a loop that is differentiated twice."""
    remedy = "use relu(x @ w)" if op == "linear_relu" else "pass implementation='xla'"
    raise NotImplementedError(f"{op}: its Pallas kernels have no derivative in a loop that is differentiated twice; {remedy}")


ad.primitive_jvps[_alone] = _no_derivative
mlir.register_lowering(_alone, _alone_lowering)


def _run(op: str, kernel: Callable[..., None], out: Any, *operands: Array, **options: Any) -> Any:
    """pallas_call, compiled or interpreted."""

    def call(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(kernel, out, interpret=interpret, **options)

    alone = [_alone.bind(operand, op=op) for operand in operands]
    return lax.platform_dependent(*alone, tpu=call(False), cpu=call(True))


def _flat(x: Array) -> Array:
    """[..., rows, cols] as [leading, rows, cols]."""
    x = xla.as_rows(x)
    return x.reshape(-1, *x.shape[-2:])


def _block(rows: int, cols: int) -> tuple[tuple[None, int, int], Callable[..., tuple[Any, ...]]]:
    """A block of so many rows, at (leading, group, column)."""
    return (None, rows, cols), lambda leading, i, j, *_: (leading, i, j)


def _parallel(dimensions: int, sequential: int = 0) -> Any:
    semantics: Any = ("parallel",) * dimensions + ("arbitrary",) * sequential
    return pltpu.CompilerParams(dimension_semantics=semantics)


# ---- masks ---------------------------------------------------------------------------------------------------------------


def _words(tile: Callable[[int], Array], code: xla.Code, first: Any, rows: int) -> Array:
    """The 8 rows of words of one group: bit j is tile j. Rows from `rows` on give 0."""

    def bit(j: int) -> Array:
        x = tile(j)
        if rows % GROUP == 0:
            return code(x)
        row = first + j * SUBLANES + lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(row < rows, code(x), jnp.uint32(0))

    words = bit(0)
    for j in range(1, WORD):
        words |= bit(j) << j
    return words


def _pack_kernel(x: Any, words: Any, *, code: xla.Code, rows: int) -> None:
    first = pl.program_id(1) * GROUP
    words[...] = _words(lambda j: wide(x[j * SUBLANES : (j + 1) * SUBLANES, :]), code, first, rows)


def _apply_kernel(words: Any, dy: Any, dx: Any, *, use: xla.Use) -> None:
    for j in range(WORD):
        tile = slice(j * SUBLANES, (j + 1) * SUBLANES)
        dx[tile, :] = use(words[...] >> j & 1, dy[tile, :])


def pack(op: str, x: Array, code: xla.Code) -> Array:
    """As `xla.pack` with one bit in the layout rows256. `op` is for errors. JAX differentiates neither this nor `apply`."""

    def xla_form(x: Array) -> Array:
        return xla.pack(x, code, 1, "rows256")

    if x.size == 0:
        return xla_form(x)
    flat = _flat(x)
    leading, rows, cols = flat.shape
    width = min(cols, COLS)
    words = _run(
        op,
        partial(_pack_kernel, code=code, rows=rows),
        jax.eval_shape(xla_form, flat),  # with the axes of shard_map that it varies over
        flat,
        grid=(leading, pl.cdiv(rows, GROUP), pl.cdiv(cols, width)),
        in_specs=[pl.BlockSpec(*_block(GROUP, width))],
        out_specs=pl.BlockSpec(*_block(SUBLANES, width)),
        compiler_params=_parallel(3),
        cost_estimate=pl.CostEstimate(flops=2 * x.size, bytes_accessed=x.nbytes + x.size // 8, transcendentals=0),
        name=f"unswag_{op}_pack",
    )
    return words.reshape(*xla.as_rows(x).shape[:-2], *words.shape[-2:])


def apply(op: str, packed: Array, dy: Array, use: xla.Use) -> Array:
    """As `xla.apply` with one bit in the layout rows256. The result takes the place of dy where that is not used again."""
    if dy.size == 0:
        return dy
    flat, words = _flat(dy), packed.reshape(-1, *packed.shape[-2:])
    leading, rows, cols = flat.shape
    width = min(cols, COLS)
    dx = _run(
        op,
        partial(_apply_kernel, use=use),
        jax.eval_shape(lambda words, dy: xla.apply(words, dy, use, 1, "rows256"), words, flat),
        words,
        flat,
        grid=(leading, pl.cdiv(rows, GROUP), pl.cdiv(cols, width)),
        in_specs=[pl.BlockSpec(*_block(SUBLANES, width)), pl.BlockSpec(*_block(GROUP, width))],
        out_specs=pl.BlockSpec(*_block(GROUP, width)),
        input_output_aliases={1: 0},
        compiler_params=_parallel(3),
        cost_estimate=pl.CostEstimate(flops=2 * dy.size, bytes_accessed=2 * dy.nbytes + dy.size // 8, transcendentals=0),
        name=f"unswag_{op}_apply",
    )
    return dx.reshape(dy.shape)


def unmasked(op: str, packed: Array, dy: Array, act: Act) -> Array:
    """The gradient of act, which JAX differentiates by its XLA form."""

    def plain(packed: Array, dy: Array) -> Array:
        return xla.apply(packed, dy, act.gradient, 1, "rows256")

    return differentiated_as(plain, lambda packed, dy: apply(op, packed, dy, act.gradient))(packed, dy)


def masked(op: str, x: Array, act: Act) -> Array:
    """The words of act's mask; they have no derivative."""

    def plain(x: Array) -> Array:
        return xla.pack(x, act.bit, 1, "rows256")

    return differentiated_as(plain, lambda x: pack(op, x, act.bit))(x)


# ---- relu(x w) with its mask, and no round trip of x w through memory ----------------------------------------------------


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

            words[group * SUBLANES : (group + 1) * SUBLANES, :] = _words(tile, _RELU.bit, first + top, rows)


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
    flat = _flat(x)
    leading, rows, k = flat.shape
    cols = w.shape[-1]
    depth, zeros = _depth(k)
    if zeros:
        flat, w = jnp.pad(flat, ((0, 0), (0, 0), (0, zeros))), jnp.pad(w, ((0, zeros), (0, 0)))
    tall, width = 2 * GROUP if rows > GROUP else GROUP, min(cols, COLS)
    steps = (k + zeros) // depth
    y, words = _run(
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
        out_specs=(pl.BlockSpec(*_block(tall, width)), pl.BlockSpec(*_block(tall // WORD, width))),
        scratch_shapes=[pltpu.VMEM((tall, width), wide_type(x))],
        compiler_params=_parallel(3, sequential=1),
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
    dz = unmasked("linear_relu", words, dy, _RELU)
    leading = tuple(range(x.ndim - 1))
    return jnp.matmul(dz, w.T), jnp.tensordot(x, dz, (leading, leading))


_linear_relu.defvjp(_linear_relu_forward, _linear_relu_backward)


def linear_relu(x: Array, w: Array) -> Array:
    """relu(x w): the kernel that sums the product writes y and its mask, so x w itself is never in memory.

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
