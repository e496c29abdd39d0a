"""Packed experts of a mixture, from the tokens to their weighted sum, as transformers' grouped_mm computes them.

Transformers sorts the tokens by expert (grouped_mm), and keeps x, gate and up, act(gate), the product and the result for each
token and each of its experts. Here x is gathered again and the product is recomputed. Of the result the backward needs only the
inner product with the gradient, which equals the inner product of the gradient before `down` with the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unswag.torch import stash
from unswag.torch.autograd import once_differentiable
from unswag.torch.derivatives import Codes
from unswag.torch.functional import gated_halves


def grouped(
    hidden: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: str, gate_first: bool,
    codes: Codes | None = None,
) -> Tensor:  # fmt: skip
    """y[t] = sum over j of weights[t, j] down_e(act(gate_e(x[t])) * up_e(x[t])), e = index[t, j]; as transformers' grouped_mm.

    hidden [tokens, H], index and weights [tokens, k]; gate_up [experts, 2 n, H], down [experts, H, n]. Result: as hidden.
    Saved: gate and up, 2 k n numbers per token, and small vectors; under the stash no inputs or products of the experts.
    """
    k = index.shape[-1]
    expert, order = torch.sort(index.reshape(-1))
    token = order // k
    counts = torch.histc(expert.float() if expert.is_cpu else expert.int(), len(down), 0, len(down) - 1)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    x = rows(hidden, token)
    stash.remember(x, rows, hidden, token)
    h = gated_halves(F.grouped_mm(x.to(gate_up.dtype), gate_up.mT, offs=ends), act, gate_first, codes)
    result: Tensor = _Combine.apply(h, down, weights.reshape(-1)[order], ends, order, token, k)
    return result.to(hidden.dtype)


def rows(x: Tensor, index: Tensor) -> Tensor:
    return x[index]


class _Combine(torch.autograd.Function):
    """y[t] = sum of weight[s] down_e(h[s]) over the s of token t. With d[s] = dy[t] and q[s] = d[s] down_e:

        dh = weight q,    dweight = <d, down_e(h)> = <q, h>,    ddown_e = sum over the s of e of (weight d)^T h

    Saved: h, which the stash recomputes, and the weights; not down_e(h)."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, down: Tensor, weight: Tensor, ends: Tensor, order: Tensor, token: Tensor, k: int
    ) -> Tensor:
        y = F.grouped_mm(h, down.mT, offs=ends) * weight.unsqueeze(-1)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, down, weight, ends, token)
        return y[place].view(-1, k, y.shape[-1]).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, down, weight, ends, token = ctx.saved_tensors
        need_dh, need_ddown, need_dweight = ctx.needs_input_grad[:3]
        d = dy[token]
        dh = ddown = dweight = None
        if need_dh or need_dweight:
            q = F.grouped_mm(d.to(h.dtype), down, offs=ends)
            if need_dweight:
                wide = torch.promote_types(weight.dtype, torch.float32)
                dweight = q.to(wide, copy=True).mul_(h).sum(-1).to(weight.dtype)
            if need_dh:
                dh = (q * weight.unsqueeze(-1)).to(h.dtype)
        if need_ddown:
            ddown = F.grouped_mm((d * weight.unsqueeze(-1)).to(h.dtype).mT, h, offs=ends)
        return dh, ddown, dweight, None, None, None, None
