"""Pallas kernels for TPUs that pack and apply the masks of relu, relu6 and leaky_relu, and what other kernels run by.

`implementation="pallas"` of `unswag.jax.relu`, `relu6` and `leaky_relu` selects them. The words are those of the layout rows256
(docs/format.md section 6). Compiled on TPUs; on CPUs the kernels are interpreted, which is slow and meant for tests; elsewhere
they are a ValueError. The kernels only pack and apply: forward values are those of `jax.nn`.

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
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from unswag.jax import xla
from unswag.jax.formulas import wide
from unswag.jax.how import differentiated_as
from unswag.jax.xla import GROUP, SUBLANES, WORD

__all__ = ["apply", "masked", "pack", "unmasked"]

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


def run(op: str, kernel: Callable[..., None], out: Any, *operands: Array, **options: Any) -> Any:
    """pallas_call: compiled on a TPU, interpreted on a CPU, an error elsewhere or where XLA would partition it.

    op names the function in errors; out is the shape of the result or a tuple of them; options go to pallas_call.
    """

    def call(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(kernel, out, interpret=interpret, **options)

    alone = [_alone.bind(operand, op=op) for operand in operands]
    return lax.platform_dependent(*alone, tpu=call(False), cpu=call(True))


def flatten(x: Array) -> Array:
    """[..., rows, cols] as [leading, rows, cols]."""
    x = xla.as_rows(x)
    return x.reshape(-1, *x.shape[-2:])


def block(rows: int, cols: int) -> tuple[tuple[None, int, int], Callable[..., tuple[Any, ...]]]:
    """A block of so many rows, at (leading, group, column)."""
    return (None, rows, cols), lambda leading, i, j, *_: (leading, i, j)


def parallel(dimensions: int, sequential: int = 0) -> Any:
    """Compiler parameters of a grid: the first dimensions in any order, the last `sequential` ones in theirs."""
    semantics: Any = ("parallel",) * dimensions + ("arbitrary",) * sequential
    return pltpu.CompilerParams(dimension_semantics=semantics)


# ---- masks ---------------------------------------------------------------------------------------------------------------


def group_words(tile: Callable[[int], Array], code: xla.Code, first: Any, rows: int) -> Array:
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
    words[...] = group_words(lambda j: wide(x[j * SUBLANES : (j + 1) * SUBLANES, :]), code, first, rows)


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
    flat = flatten(x)
    leading, rows, cols = flat.shape
    width = min(cols, COLS)
    words = run(
        op,
        partial(_pack_kernel, code=code, rows=rows),
        jax.eval_shape(xla_form, flat),  # with the axes of shard_map that it varies over
        flat,
        grid=(leading, pl.cdiv(rows, GROUP), pl.cdiv(cols, width)),
        in_specs=[pl.BlockSpec(*block(GROUP, width))],
        out_specs=pl.BlockSpec(*block(SUBLANES, width)),
        compiler_params=parallel(3),
        cost_estimate=pl.CostEstimate(flops=2 * x.size, bytes_accessed=x.nbytes + x.size // 8, transcendentals=0),
        name=f"unswag_{op}_pack",
    )
    return words.reshape(*xla.as_rows(x).shape[:-2], *words.shape[-2:])


def apply(op: str, packed: Array, dy: Array, use: xla.Use) -> Array:
    """As `xla.apply` with one bit in the layout rows256. The result takes the place of dy where that is not used again."""
    if dy.size == 0:
        return dy
    flat, words = flatten(dy), packed.reshape(-1, *packed.shape[-2:])
    leading, rows, cols = flat.shape
    width = min(cols, COLS)
    dx = run(
        op,
        partial(_apply_kernel, use=use),
        jax.eval_shape(lambda words, dy: xla.apply(words, dy, use, 1, "rows256"), words, flat),
        words,
        flat,
        grid=(leading, pl.cdiv(rows, GROUP), pl.cdiv(cols, width)),
        in_specs=[pl.BlockSpec(*block(SUBLANES, width)), pl.BlockSpec(*block(GROUP, width))],
        out_specs=pl.BlockSpec(*block(GROUP, width)),
        input_output_aliases={1: 0},
        compiler_params=parallel(3),
        cost_estimate=pl.CostEstimate(flops=2 * dy.size, bytes_accessed=2 * dy.nbytes + dy.size // 8, transcendentals=0),
        name=f"unswag_{op}_apply",
    )
    return dx.reshape(dy.shape)


def unmasked(op: str, packed: Array, dy: Array, use: xla.Use) -> Array:
    """`apply`, which JAX differentiates by its XLA form."""

    def plain(packed: Array, dy: Array) -> Array:
        return xla.apply(packed, dy, use, 1, "rows256")

    return differentiated_as(plain, lambda packed, dy: apply(op, packed, dy, use))(packed, dy)


def masked(op: str, x: Array, code: xla.Code) -> Array:
    """`pack`; JAX takes the words, which are integers, for constant."""

    def plain(x: Array) -> Array:
        return xla.pack(x, code, 1, "rows256")

    return differentiated_as(plain, lambda x: pack(op, x, code))(x)
