"""LoRA's product beside a Linear (Hu et al. 2021) that keeps x as it is, and the rank-r product.

    y = base + scaling ((dropout(x) A^T) B^T + bias)

PEFT casts x to the dtype of the adapters (float32 by default), and each adapted Linear keeps a cast of its own. Here every
Linear keeps the one x that they share, in its own dtype; the cast exists for a few rows at a time, and a dropped element is
drawn again from its seed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unswag.torch import ops
from unswag.torch.functional import _once_differentiable

# Rows done at once where the products are in 32 or 64 bits: small enough for the cast of x to stay in the cache. A multiple of 4,
# so that each tile begins on a Philox block of four draws.
TILE = 512


class Adapter(NamedTuple):
    """One LoRA adapter beside a Linear.

    a, b      [r, in] and [out, r], of one floating dtype
    bias      [out] or None, added to the product before it is scaled
    scaling   of the product
    p, seed   dropout of x: probability, and the key of the draws; p = 0 draws nothing
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: float
    p: float = 0.0
    seed: int = 0


def add_lora(base: Tensor, x: Tensor, adapter: Adapter, *, dtype: torch.dtype | None = None, round_product: bool = False) -> Tensor:
    """base + scaling ((dropout(x) A^T) B^T + bias), shape [..., out], for base [..., out] and x [..., in].

    The products are computed in the dtype of the adapter, or in autocast's. Their sum with `base` is rounded to `dtype`
    (default: what `base` and the product promote to); with `round_product` the product is rounded to base's dtype first.
    Without dropout, results and gradients are those of the same chain of PyTorch's own ops, in the same dtypes; the weight
    gradients of 16-bit adapters are summed in float32.

    Saved, each only for a gradient that is asked for: x (shared with whoever else keeps it) for that of A, the product with A
    (r numbers per row) for that of B. Errors: TypeError where A and B differ in dtype.
    """
    a, b = adapter.a, adapter.b
    if a.dtype != b.dtype or not a.dtype.is_floating_point:
        raise TypeError(f"add_lora: A has dtype {a.dtype} and B has {b.dtype}; convert both to one floating dtype")
    compute = a.dtype
    if torch.is_autocast_enabled(x.device.type) and compute != torch.float64:
        compute = torch.get_autocast_dtype(x.device.type)
    how = _How(adapter.scaling, adapter.p, adapter.seed, compute, dtype or torch.promote_types(base.dtype, compute), round_product)
    y: Tensor = _AddLora.apply(base, x, a, b, adapter.bias, how)
    return y


class _How(NamedTuple):
    scaling: float
    p: float
    seed: int
    compute: torch.dtype  # of the products
    out: torch.dtype
    round_product: bool

    def tiles(self, rows: int) -> list[slice]:
        """16-bit products take all rows at once: x is cast to nothing wider, and one product sums in float32."""
        step = TILE if self.compute.itemsize >= 4 else max(rows, 1)
        return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]

    def drop(self, x: Tensor, first_row: int) -> Tensor:
        """Elements of x (rows from `first_row` on) dropped, the others divided by 1 - p; its own backward."""
        return ops.dropout(x, self.p, self.seed, first_row * x.shape[1] // 4) if self.p else x


class _AddLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, how: _How) -> Tensor:
        rows, product = x.reshape(-1, x.shape[-1]), base.reshape(-1, base.shape[-1])
        y = torch.empty(base.shape, dtype=how.out, device=base.device)
        xa = x.new_empty(rows.shape[0], a.shape[0], dtype=how.compute)
        with torch.autocast(x.device.type, enabled=False):
            to_rank, from_rank = a.to(how.compute), b.to(how.compute)
            shift = None if bias is None else bias.to(how.compute)
            for tile in how.tiles(rows.shape[0]):
                torch.mm(how.drop(rows[tile].to(a.dtype), tile.start).to(how.compute), to_rank.t(), out=xa[tile])
                delta = F.linear(xa[tile], from_rank, shift).mul_(how.scaling)
                torch.add(product[tile], delta.to(base.dtype) if how.round_product else delta, out=y.view(product.shape)[tile])
        ctx.how, ctx.base_dtype = how, base.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[2] else None, xa if needs[3] else None, a, b)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return y

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, xa, a, b = ctx.saved_tensors
        how: _How = ctx.how
        need_base, need_x, need_a, need_b, need_bias, _ = ctx.needs_input_grad
        grads, rows = dy.reshape(-1, dy.shape[-1]), None if x is None else x.reshape(-1, x.shape[-1])
        dx = torch.empty(ctx.x_shape, dtype=ctx.x_dtype, device=dy.device) if need_x else None
        da, db, dbias = (
            torch.zeros(size, dtype=how.compute, device=dy.device) if need else None
            for size, need in ((a.shape, need_a), (b.shape, need_b), (b.shape[:1], need_bias))
        )
        with torch.autocast(dy.device.type, enabled=False):
            to_rank, from_rank = a.to(how.compute), b.to(how.compute)
            for tile in how.tiles(grads.shape[0]):
                dproduct = grads[tile].to(ctx.base_dtype) if how.round_product else grads[tile]
                dproduct = dproduct.to(how.compute) * how.scaling
                if db is not None:
                    db.addmm_(dproduct.t(), xa[tile])
                if dbias is not None:
                    dbias += dproduct.sum(0)
                if da is None and dx is None:
                    continue
                dxa = dproduct @ from_rank
                if da is not None:
                    da.addmm_(dxa.t(), how.drop(rows[tile].to(a.dtype), tile.start).to(how.compute))
                if dx is not None:
                    dx.view(-1, a.shape[1])[tile] = how.drop((dxa @ to_rank).to(a.dtype), tile.start)
        to = (None if grad is None else grad.to(like) for grad, like in ((da, a.dtype), (db, b.dtype), (dbias, ctx.bias_dtype)))
        return dy.to(ctx.base_dtype) if need_base else None, dx, *to, None
