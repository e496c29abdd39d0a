"""Causal attention of a layer over tiles of tokens: forward in ascending order, backward in descending order.

The keys of a tile are those of the tiles before it and its own. They are cut into blocks, and each block is a plain call of
PyTorch's flash attention, without a mask (`blocks_of`). The forward merges the blocks: with o_b and lse_b of block b

    lse = log(sum_b exp(lse_b))        o = sum_b exp(lse_b - lse) o_b

The backward of a block is exact alone, if it is given the merged o and lse: dS = P (dP - rowsum(do o)), P = exp(S - lse). Going
from the last tile to the first, the gradients of a tile's keys and values are complete when the tile is reached, because no
later query remains. So the layer holds K, V, dK and dV of all tokens (dK and dV in float32) and nothing else of that length.

A sink is a logit without a value: lse also sums exp(sink), and d sink = -sum exp(sink - lse) rowsum(do o).

Published before: SeCO and StreamBP sweep in this order. The merge: FlashAttention-2 (Dao 2023), RingAttention (Liu 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unswag.torch.attention import Piece, Spans
from unswag.torch.autograd import once_differentiable

KEY_BLOCK = 2048  # keys of one call in the backward, whose scratch grows with them

_cpu_forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_cpu_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_cuda_forward = getattr(torch.ops.aten, "_flash_attention_forward", None)
_cuda_backward = getattr(torch.ops.aten, "_flash_attention_backward", None)


class Unswept(Exception):
    """A layer cannot be swept; the message is the reason."""


class KeysKnown(Exception):
    """Ends a layer's forward once its keys and values are known."""


# ---- the kernel -------------------------------------------------------------------------------------------------------------


def no_kernel(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """The reason why there is no flash attention for heads of `dim` elements that may be called by blocks, or None."""
    if device.type == "cpu":
        missing = None in (_cpu_forward, _cpu_backward)
        dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    elif device.type == "cuda":
        missing = None in (_cuda_forward, _cuda_backward)
        dtypes = (torch.bfloat16, torch.float16)
        if dim > 256:
            return f"flash attention on CUDA takes heads of at most 256 elements, and these have {dim}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "flash attention on CUDA needs compute capability 8.0"
    else:
        return f"there is no flash attention by blocks on {device.type}"
    if missing:
        return f"torch {torch.__version__} lacks the function that computes attention by blocks"
    return None if dtype in dtypes else f"flash attention on {device.type} does not take {dtype}"


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(o, lse) of one block: o as q [batch, heads, queries, dim], lse [batch, heads, queries], natural logarithm, float32."""
    if not q.is_cuda:
        o, lse = _cpu_forward(q, k, v, 0.0, causal, scale=scale)  # type: ignore[misc]
        return o, lse
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o, lse, *_ = _cuda_forward(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale)  # type: ignore[misc]
    return o.transpose(1, 2), lse


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one block, of the merged o and lse."""
    if not q.is_cuda:
        dq, dk, dv = _cpu_backward(do, q, k, v, o, lse, 0.0, causal, scale=scale)  # type: ignore[misc]
        return dq, dk, dv
    do, q, k, v, o = (t.transpose(1, 2) for t in (do, q, k, v, o))
    unused = torch.empty(0, dtype=torch.int64, device=q.device)  # what dropout would need
    gradients = _cuda_backward(  # type: ignore[misc]
        do, q, k, v, o, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal, unused, unused, scale=scale
    )
    dq, dk, dv = (t.transpose(1, 2) for t in gradients)
    return dq, dk, dv


# ---- blocks -----------------------------------------------------------------------------------------------------------------

ALL, UP_TO, FROM = "all", "up to", "from"


class Block(NamedTuple):
    """Queries [q0, q1) attend to keys [k0, k1): to all of them; "up to": query q0 + i to k0 .. k0 + i; "from": to k0 + i and
    the later ones. In the last two there are as many keys as queries."""

    q0: int
    q1: int
    k0: int
    k1: int
    keys: str


def blocks_of(pieces: Sequence[Piece], window: int | None, start: int, stop: int) -> Iterator[Block]:
    """The blocks of the queries [start, stop); each query has a key in each block it is in."""
    for piece in pieces:
        u, v = max(piece.q0, start), min(piece.q1, stop)
        if u >= v:
            continue
        if not piece.causal:
            yield Block(u, v, piece.k0, piece.k1, ALL)
            continue
        step = v - u if window is None else window
        for q0 in range(u, v, step):
            q1 = min(q0 + step, v)
            whole = piece.k0 if window is None else max(piece.k0, q1 - window)  # from here on keys that all queries see
            if whole < q0:
                yield Block(q0, q1, whole, q0, ALL)
            yield Block(q0, q1, q0, q1, UP_TO)
            if window is None:
                continue
            first = max(piece.k0, q0 - window + 1)  # query q0 + i sees key q0 - window + 1 + i and the later ones
            if first < whole:
                seen_by_all = first - (q0 - window + 1)  # queries that would see keys before the piece, too
                if seen_by_all:
                    yield Block(q0, q0 + seen_by_all, first, whole, ALL)
                q0 += seen_by_all
                yield Block(q0, q0 + whole - first, first, whole, FROM)


# ---- the attention of a layer -----------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What the backward may reuse of a tile's forward: o [batch, heads, tile, dim], lse [batch, heads, tile], and the tile's
    keys and values."""

    o: Tensor
    lse: Tensor
    k: Tensor
    v: Tensor


class LayerAttention:
    """The attention of one layer in one pass over its tiles. `attend` is what `attention.diverted` calls.

    passes  "forward": computes o; "keys": learns K and V only (`KeysKnown`); "backward": computes o, or takes it from `kept`,
            in a graph whose backward adds to dK and dV
    keep    "forward": `kept` holds the tile's `Kept` afterwards
    """

    def __init__(self, tokens: int, key_block: int = KEY_BLOCK) -> None:
        self.tokens, self.key_block = tokens, key_block
        self.passes = "forward"
        self.keep = False
        self.kept: Kept | None = None
        self.calls = 0  # in this tile
        self.start = self.stop = 0
        self.rows: list[tuple[slice, list[Piece]]] = []
        self.window: int | None = None
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.dk: Tensor | None = None
        self.dv: Tensor | None = None

    def at(self, start: int, stop: int) -> None:
        """The next calls are of the tokens [start, stop)."""
        self.start, self.stop, self.calls = start, stop, 0

    def release(self) -> None:
        self.k = self.v = self.dk = self.dv = self.kept = None

    def put(self, k: Tensor, v: Tensor) -> None:
        """Writes down the keys and values of the tile."""
        if self.k is None or self.v is None:
            self.k, self.v = self._whole(k), self._whole(v)
        self.k[:, :, self.start : self.stop] = k.detach()
        self.v[:, :, self.start : self.stop] = v.detach()

    def _whole(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        batch, heads, _, dim = t.shape
        return t.new_empty(batch, self.tokens, heads, dim, dtype=dtype or t.dtype).transpose(1, 2)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | Spans | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As `attention.attention_forward`, for a tile. Raises Unswept for what it cannot do exactly."""
        if mask is not None and not isinstance(mask, Spans):
            raise Unswept("its attention gets a mask that is a tensor")
        self._refuse(module, query, key, value, mask, dropout, kwargs)
        self.calls += 1
        if self.calls > 1:
            raise Unswept("it computes more than one attention")
        if torch.is_autocast_enabled(query.device.type):  # as autocast does for scaled_dot_product_attention
            query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        wide, dim = max(query.shape[-1], value.shape[-1]), value.shape[-1]
        if reason := no_kernel(query.device, query.dtype, wide):
            raise Unswept(reason)
        if wide % 8 and query.is_cuda:
            wide += -wide % 8
        query, key, value = (F.pad(t, (0, wide - t.shape[-1])) if t.shape[-1] < wide else t for t in (query, key, value))
        if not self.rows:
            self._read(mask, query.shape[0])
        if self.passes == "keys":
            self.put(key, value)
            raise KeysKnown
        o: Tensor = TileAttention.apply(query, key, value, kwargs.get("s_aux"), self, scale)
        return o[..., :dim].transpose(1, 2).contiguous()

    def _refuse(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Spans | None,
        dropout: float,
        kwargs: dict[str, Any],
    ) -> None:
        if dropout:
            raise Unswept(f"its attention has dropout ({dropout:g})")
        if other := next((name for name in ("position_bias", "softcap", "cache") if kwargs.get(name) is not None), None):
            raise Unswept(f"its attention has a {other}")
        causal = kwargs.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise Unswept("its attention is not causal")
        here = (q.shape[0], self.stop - self.start)
        if any((t.shape[0], t.shape[2]) != here for t in (q, k, v)) or (mask is not None and mask.length != self.tokens):
            raise Unswept("its attention does not see the tokens of the layer, each once")
        if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1]:
            raise Unswept("the heads of its queries, keys and values do not fit together")

    def _read(self, mask: Spans | None, batch: int) -> None:
        """The pieces of the rows; rows beside each other with the same pieces are computed together."""
        if mask is None:
            self.rows = [(slice(0, batch), [Piece(0, 0, self.tokens, 0, self.tokens, causal=True)])]
            return
        if mask.batch != batch:
            raise Unswept("its mask has another number of rows")
        if any(p.k1 > p.q0 and not p.causal for p in mask.pieces):
            raise Unswept("its attention is not causal")
        of_row = [[replace(p, row=0) for p in mask.pieces if p.row == row] for row in range(batch)]
        self.window = mask.window
        row = 0
        for pieces, group in groupby(of_row):
            count = len(list(group))
            self.rows.append((slice(row, row + count), pieces))
            row += count

    def blocks(self) -> Iterator[tuple[slice, Block]]:
        for rows, pieces in self.rows:
            for block in blocks_of(pieces, self.window, self.start, self.stop):
                yield rows, block

    def forward(self, q: Tensor, sinks: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        """(o, lse) of the tile's queries [batch, heads, tile, dim], over the keys up to their own."""
        assert self.k is not None
        assert self.v is not None
        parts = list(self.blocks())
        here = slice(self.start, self.stop)
        if sinks is None and parts == [(slice(0, len(q)), Block(self.start, self.stop, self.start, self.stop, UP_TO))]:
            return _forward(q, self.k[:, :, here], self.v[:, :, here], True, scale)
        wide = torch.promote_types(q.dtype, torch.float32)
        batch, heads, tokens, dim = q.shape
        merged = q.new_zeros(batch, tokens, heads, dim, dtype=wide).transpose(1, 2)  # in the order that the layer goes on with
        total = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
        if sinks is not None:
            total.copy_(sinks[:, None])
        for rows, block in parts:
            queries = slice(block.q0 - self.start, block.q1 - self.start)
            keys = slice(block.k0, block.k1)
            flipped = block.keys == FROM
            query, k, v = (_flip(t, flipped) for t in (q[rows, :, queries], self.k[rows, :, keys], self.v[rows, :, keys]))
            o, lse = _forward(query, k, v, block.keys != ALL, scale)
            o, lse = _flip(o, flipped), _flip(lse, flipped)
            before = total[rows, :, queries]
            after = torch.logaddexp(before, lse)
            merged[rows, :, queries] *= (before - after).exp_()[..., None]
            merged[rows, :, queries] += o.to(wide).mul_((lse - after).exp_()[..., None])
            total[rows, :, queries] = after
        return merged.to(q.dtype), total

    def backward(self, do: Tensor, q: Tensor, o: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the tile. Adds to dK and dV of the tiles before it."""
        assert self.k is not None
        assert self.v is not None
        wide = torch.promote_types(q.dtype, torch.float32)
        if self.dk is None or self.dv is None:
            self.dk, self.dv = self._whole(self.k, wide).zero_(), self._whole(self.v, wide).zero_()
        dq = q.new_zeros(q.shape, dtype=wide)
        for rows, block in self.blocks():
            queries = slice(block.q0 - self.start, block.q1 - self.start)
            flipped = block.keys == FROM
            size = self.key_block if block.keys == ALL else block.k1 - block.k0
            of_queries = [_flip(t[rows, :, queries], flipped) for t in (do, q, o, lse)]
            for k0 in range(block.k0, block.k1, size):
                keys = slice(k0, min(k0 + size, block.k1))
                k, v = (_flip(t[rows, :, keys], flipped) for t in (self.k, self.v))
                dout, query, out, logsum = of_queries
                parts = _backward(dout, query, k, v, out, logsum, block.keys != ALL, scale)
                dq_part, dk_part, dv_part = (_flip(t, flipped) for t in parts)
                dq[rows, :, queries] += dq_part
                self.dk[rows, :, keys] += dk_part
                self.dv[rows, :, keys] += dv_part
        here = slice(self.start, self.stop)
        return dq.to(q.dtype), self.dk[:, :, here].to(q.dtype), self.dv[:, :, here].to(q.dtype)


def _flip(t: Tensor, flipped: bool) -> Tensor:
    """t [batch, heads, tokens] or [batch, heads, tokens, dim], the tokens in reverse order. Reversed, "from" is "up to"."""
    return t.flip(2) if flipped else t


class TileAttention(torch.autograd.Function):
    """o = attention of a tile. Saved: q, o, lse and the sinks; k and v are the layer's."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layer: LayerAttention, scale: float) -> Tensor:
        ctx.set_materialize_grads(False)
        if layer.passes == "forward":
            layer.put(k, v)
        kept = layer.kept if layer.passes == "backward" else None
        o, lse = layer.forward(q, sinks, scale) if kept is None else (kept.o, kept.lse)
        if layer.passes == "forward":
            layer.kept = Kept(o, lse, k, v) if layer.keep else None
            return o
        ctx.layer, ctx.scale, ctx.at = layer, scale, (layer.start, layer.stop)
        ctx.save_for_backward(q, o, lse, sinks)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, o, lse, sinks = ctx.saved_tensors
        layer: LayerAttention = ctx.layer
        assert ctx.at == (layer.start, layer.stop)
        do = do.contiguous()
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            drawn = (do * o).sum(-1, dtype=lse.dtype)
            dsinks = -(drawn * (sinks[:, None] - lse).exp()).sum((0, 2)).to(sinks.dtype)
        return *layer.backward(do, q, o, lse, ctx.scale), dsinks, None, None
