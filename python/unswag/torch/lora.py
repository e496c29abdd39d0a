"""LoRA beside a Linear (Hu et al. 2021) that keeps x in its own dtype, and the product of rank r.

    y = base + sum over adapters of scaling ((dropout(x) A^T) B^T + bias)

PEFT casts x to the dtype of the adapters (float32 by default), and each adapted Linear keeps a cast of its own. Here they all
keep one shared x in its own dtype; the cast exists for a few rows at a time. The dropout mask is drawn again in the backward,
from torch's random state before the forward's draws, or from a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unswag import _core
from unswag.torch import ops
from unswag.torch.autograd import Function, once_differentiable
from unswag.torch.draws import DropoutInput, Mask
from unswag.torch.planned_device import on_cuda

# Rows processed at once where the products are in 32 or 64 bits: on the CPU few enough for the cast of x to stay in the cache,
# on CUDA as many as make a cast of 2^24 elements (64 MiB in float32), because each tile queues a dozen kernels. A multiple of
# 4: each tile begins on a Philox block of four draws.
TILE = 512
TILE_ELEMENTS = 1 << 24


class Adapter(NamedTuple):
    """One LoRA adapter beside a Linear.

    a, b      [r, in] and [out, r]
    bias      [out] or None, added to the product before it is scaled
    scaling   of the product
    p, seed   dropout of x: probability, and the key of the draws, None for those of F.dropout; p = 0 draws nothing
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: float
    p: float = 0.0
    seed: int | None = None


def add_lora(
    base: Tensor, x: Tensor, adapters: Sequence[Adapter], *, round_products: bool = False, cast_x: bool = True
) -> Tensor:  # fmt: skip
    """base [..., out] plus the outputs of the adapters for x [..., in]; shape and dtype of base.

    The products are computed in the dtype of the adapters (one for all), or in autocast's. The sum is rounded to base's
    dtype once, after the last adapter; with `round_products` each product is rounded to it before it is added. Without
    dropout, results and gradients are those of the same chain of PyTorch's own ops, in the same dtypes; weight gradients are
    summed over the rows in float32 at least.

    Dropout gets x in the dtype of the adapters, or in its own with `cast_x=False`. Without a seed it draws what F.dropout
    would, one adapter after the other, from torch's generator of the device; while the call runs, one byte per element and
    adapter holds the draws.

    Saved, each only if a gradient needs it: x, shared with other ops that save it, for A; r numbers per row and adapter, for B;
    with dropout without a seed the state of the generator, 5 KB on the CPU and 16 bytes on CUDA.
    Raises TypeError if the adapters differ in dtype.
    """
    if not adapters:
        return base
    dtype = adapters[0].a.dtype
    for a, b, *_ in adapters:
        if a.dtype != dtype or b.dtype != dtype or not dtype.is_floating_point:
            found = ", ".join(sorted({str(t.dtype) for adapter in adapters for t in (adapter.a, adapter.b)}))
            raise TypeError(f"add_lora: A and B of the adapters have dtypes {found}; convert all to one floating dtype")
    compute = dtype
    if torch.is_autocast_enabled(x.device.type) and compute != torch.float64:
        compute = torch.get_autocast_dtype(x.device.type)
    if len(adapters) == 1 and not torch.compiler.is_dynamo_compiling():
        (only,) = adapters
        if not only.p and only.bias is None and is_plain_lora(x, only.a, only.b):
            sum_ = add_plain_lora(base, x, only.a, only.b, only.scaling)
            if sum_ is not None:
                return sum_
    kinds = tuple(_Kind(adapter.scaling, adapter.p if x.numel() else 0.0, adapter.seed) for adapter in adapters)
    seen = dtype if cast_x else x.dtype
    drawn = DropoutInput.of(x, seen) if any(kind.p and kind.seed is None for kind in kinds) else None
    weights = (t for adapter in adapters for t in (adapter.a, adapter.b, adapter.bias))
    y: Tensor = _AddLora.apply(base, x, _How(seen, compute, round_products, kinds, drawn), *weights)
    return y


class _Kind(NamedTuple):
    """The settings of an adapter, without its weights."""

    scaling: float
    p: float
    seed: int | None

    def drop(self, x: Tensor, first_row: int, mask: Mask | None) -> Tensor:
        """Rows of x from `first_row` on: elements dropped, the others divided by 1 - p. It is its own backward."""
        if mask is not None:
            return mask.times(x, first_row)
        if not self.p:
            return x
        dropped: Tensor = ops.dropout(x, self.p, self.seed, first_row * x.shape[1] // 4)
        return dropped


class _How(NamedTuple):
    dtype: torch.dtype  # x is cast to it, and then dropped
    compute: torch.dtype  # of the products
    round_products: bool
    kinds: tuple[_Kind, ...]
    drawn: DropoutInput | None = None  # where torch's generator draws

    def masks(self, state: Tensor | None = None) -> tuple[list[Mask | None], Tensor | None]:
        """(the mask of each adapter, the random state before the draws). A mask is None if nothing is drawn, or from a seed.
        With `state`, the masks are drawn again from it."""
        if self.drawn is None:
            return [None] * len(self.kinds), None
        ps = [0.0 if kind.seed is not None else kind.p for kind in self.kinds]
        return self.drawn.draw(ps) if state is None else (self.drawn.draw_again(ps, state), state)


def is_plain_lora(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether `add_plain_lora` takes these: ordinary tensors of one dtype, which autocast keeps, and x of so few rows that
    `tiles` makes one slice of them. Not to be traced by torch.compile."""
    if not _core.eager.are_dense(x, a, b):
        return False
    cols, cuda = x.shape[-1], x.is_cuda
    if x.numel() > cols * _step(x.numel(), cols, x.dtype, cuda):
        return False
    device = "cuda" if cuda else "cpu"
    return not torch.is_autocast_enabled(device) or x.dtype in (torch.float64, torch.get_autocast_dtype(device))


def add_plain_lora(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor | None:
    """`add_lora` for one adapter without dropout and bias for which `is_plain_lora` says yes; None if base is of another dtype
    than x or lies otherwise in memory."""
    if not _core.eager.are_dense(base, x):
        return None
    y: Tensor = _AddPlainLora.direct(base, x, a, b, scaling)
    return y


def tiles(rows: int, cols: int, compute: torch.dtype, cuda: bool) -> list[slice]:
    """The slices of rows of x [rows, cols] that are processed at once. For 16-bit products it is one slice: x is not cast to a
    wider dtype, and a single product sums in float32."""
    step = _step(rows, cols, compute, cuda)
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _step(rows: int, cols: int, compute: torch.dtype, cuda: bool) -> int:
    """How many of `rows` rows."""
    if compute.itemsize < 4:
        return max(rows, 1)
    return max(TILE_ELEMENTS // max(cols, 1) // 4 * 4, 4) if cuda else TILE


class _AddPlainLora(Function):
    """`_AddLora` for one adapter without dropout and bias, all in one dtype and one tile: the same products in fewer calls."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        xa = F.linear(x, a)
        y = F.linear(xa, b).mul_(scaling).add_(base)
        need_a, need_b = ctx.needs_input_grad[2:4]
        ctx.scaling = scaling
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if need_a else None, xa if need_b else None, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, xa, a, b = ctx.saved_tensors
        need_base, need_x = ctx.needs_input_grad[:2]
        if torch.is_autocast_enabled(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                dx, da, db = _plain_gradients(dy, ctx.scaling, x, xa, a, b, need_x)
        else:
            dx, da, db = _plain_gradients(dy, ctx.scaling, x, xa, a, b, need_x)
        return dy if need_base else None, dx, da, db, None


def _plain_gradients(
    dy: Tensor, scaling: float, x: Tensor | None, xa: Tensor | None, a: Tensor, b: Tensor, need_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB), each None where it is not needed."""
    dproduct = dy.reshape(-1, dy.shape[-1]) * scaling
    db = None if xa is None else torch.mm(dproduct.t(), xa.view(-1, xa.shape[-1]))
    if x is None and not need_x:
        return None, None, db
    dxa = torch.mm(dproduct, b)
    da = None if x is None else torch.mm(dxa.t(), x.view(-1, x.shape[-1]))
    dx = torch.mm(dxa, a).view(*dy.shape[:-1], a.shape[1]) if need_x else None
    return dx, da, db


class _AddLora(Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, how: _How, *weights: Tensor | None) -> Tensor:
        xs, bases = x.reshape(-1, x.shape[-1]), base.reshape(-1, base.shape[-1])
        y = torch.empty_like(base, memory_format=torch.contiguous_format)  # not a view: it may be modified in place
        ys, (masks, state) = y.view(bases.shape), how.masks()
        total = torch.promote_types(base.dtype, how.compute)
        parts: list[Any] = [None if w is None else w.to(how.compute) for w in weights]
        products = [xs.new_empty(xs.shape[0], a.shape[0], dtype=how.compute) for a in parts[::3]]
        for tile in tiles(xs.shape[0], xs.shape[1], how.compute, on_cuda(x)):
            x_tile, sum_ = xs[tile].to(how.dtype), bases[tile]
            for kind, mask, a, b, bias, xa in zip(
                how.kinds, masks, parts[::3], parts[1::3], parts[2::3], products, strict=True
            ):
                torch.mm(kind.drop(x_tile, tile.start, mask).to(how.compute), a.t(), out=xa[tile])
                product = F.linear(xa[tile], b, bias).mul_(kind.scaling)
                sum_ = sum_ + product.to(base.dtype) if how.round_products else sum_.to(total) + product
            ys[tile] = sum_
        needs = ctx.needs_input_grad[3:]
        ctx.how, ctx.x_shape, ctx.x_dtype = how, x.shape, x.dtype
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in weights[2::3]]
        saved = [xa if need_b else None for xa, need_b in zip(products, needs[1::3], strict=True)]
        drops = ctx.needs_input_grad[1] or any(needs[::3])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(state if drops else None, x if any(needs[::3]) else None, *saved, *weights[::3], *weights[1::3])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        how: _How = ctx.how
        n = len(how.kinds)
        state, x, *saved = ctx.saved_tensors
        products, weights = saved[:n], [*zip(saved[n : 2 * n], saved[2 * n :], strict=True)]
        need_base, need_x, _, *needs = ctx.needs_input_grad
        need_a, need_b, need_bias = needs[::3], needs[1::3], needs[2::3]
        dys, xs = dy.reshape(-1, dy.shape[-1]), None if x is None else x.reshape(-1, x.shape[-1])

        def zeros(needed: bool, *shape: int) -> Tensor | None:
            return torch.zeros(shape, dtype=how.compute, device=dy.device) if needed else None

        das = [zeros(need, *a.shape) for need, (a, _) in zip(need_a, weights, strict=True)]
        dbs = [zeros(need, *b.shape) for need, (_, b) in zip(need_b, weights, strict=True)]
        dbiases = [zeros(need, b.shape[0]) for need, (_, b) in zip(need_bias, weights, strict=True)]
        dx = torch.empty(ctx.x_shape, dtype=ctx.x_dtype, device=dy.device) if need_x else None
        with torch.autocast(dy.device.type, enabled=False):
            parts = [(a.to(how.compute), b.to(how.compute)) for a, b in weights]
            masks = how.masks(state)[0] if state is not None else [None] * n
            for tile in tiles(dys.shape[0], ctx.x_shape[-1], how.compute, on_cuda(dy)):
                x_tile = None if xs is None else xs[tile].to(how.dtype)
                dx_tile: Any = None
                for i in reversed(range(n)):  # the order in which autograd sums
                    kind, (a, b) = how.kinds[i], parts[i]
                    dproduct = dys[tile].to(how.compute) * kind.scaling
                    if (db := dbs[i]) is not None:
                        db.addmm_(dproduct.t(), products[i][tile])
                    if (dbias := dbiases[i]) is not None:
                        dbias += dproduct.sum(0)
                    if not (need_a[i] or need_x):
                        continue
                    dxa = dproduct @ b
                    if (da := das[i]) is not None and x_tile is not None:
                        da.addmm_(dxa.t(), kind.drop(x_tile, tile.start, masks[i]).to(how.compute))
                    if need_x:
                        part = kind.drop((dxa @ a).to(how.dtype), tile.start, masks[i])
                        dx_tile = part if dx_tile is None else dx_tile + part
                if dx is not None:
                    dx.view(-1, dx.shape[-1])[tile].copy_(dx_tile)
        grads: list[Tensor | None] = []
        for i in range(n):
            dtypes = weights[i][0].dtype, weights[i][1].dtype, ctx.bias_dtypes[i]
            made = (das[i], dbs[i], dbiases[i])
            grads += [None if grad is None else grad.to(dtype) for grad, dtype in zip(made, dtypes, strict=True)]
        return dy if need_base else None, dx, None, *grads
