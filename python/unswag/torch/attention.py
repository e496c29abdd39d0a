"""Attention for transformers, with memory linear in the sequence length, for padded and packed batches too.

Transformers' SDPA path gives every layer of a padded or packed batch a mask of tokens x tokens, and each keeps a copy in its
own dtype. Here such a batch is a list of spans, each a plain SDPA call without a mask. What spans cannot express (windows,
custom masks) uses one boolean mask for the whole batch, and its attention is recomputed in the backward. Attention with dropout
on the CPU is recomputed too, with the draws of the forward, because SDPA would keep tokens x tokens several times.

A checkpointed layer that is swept in tiles of tokens has its attention computed elsewhere (`diverted`).
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from unswag.torch import stash
from unswag.torch.autograd import once_differentiable

NAME = "unswag"  # in transformers' registries of attention functions and masks


def register() -> None:
    """Registers "unswag" with transformers, as an attention function and its mask function. Changes no model."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


# ---- masks ------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Piece:
    """Queries [q0, q1) of a row attend to its keys [k0, k1): to all of them, or (causal) to those up to their own position."""

    row: int
    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool


class Spans:
    """A mask of tokens x tokens in pieces, for all layers. A query in no piece attends to nothing: its output is zero. Code
    that needs a tensor (a slice, a method, a torch operator) gets the boolean mask, which is built on first use.

    window  in causal pieces a query attends to that many keys at most, itself the last; None: to all
    """

    def __init__(
        self, pieces: Sequence[Piece], batch: int, length: int, make: Callable[[], Tensor], window: int | None = None
    ) -> None:
        self.pieces, self.batch, self.length, self.window = pieces, batch, length, window
        self._make = make
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        if self._tensor is None:
            self._tensor = self._make()
        return self._tensor

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, cls.tensor, (args, kwargs or {}))
        return function(*args, **kwargs)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | Spans | None:
    """Transformers' mask for "unswag": None where SDPA's causal flag is enough, `Spans` for padded and packed batches and for
    windows while training, else the boolean mask of "sdpa" ([batch, 1, q_length, kv_length])."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = mask_function or causal_mask_function

    def stock() -> Tensor | None:
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, function, attention_mask, **kwargs)

    training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    square = isinstance(q_offset, int) and q_offset == kv_offset == 0 and q_length == kv_length
    terms = _terms(function) if training and square else None
    if terms is None:
        return stock()
    real = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
    cut = terms.causal and terms.window is not None and terms.window < q_length
    if terms.packed is None and real is None and not cut:
        return stock()
    if is_fake(terms.packed):  # surgery's dry run: one sequence, though its fake positions cannot show it
        return None if terms.causal and terms.window is None else stock()
    pieces = pieces_of(terms, real, batch_size, q_length)
    if pieces is None:
        return stock()
    cut = terms.window is not None and any(p.causal and p.q1 - p.q0 > terms.window for p in pieces)
    return Spans(pieces, batch_size, q_length, stock, terms.window if cut else None)  # type: ignore[arg-type]


@dataclass
class Terms:
    """The conditions that a mask function of transformers combines by "and", apart from padding."""

    causal: bool = False
    window: int | None = None
    packed: Tensor | None = None  # [batch, length], the number of each token's sequence


def _terms(function: Any) -> Terms | None:
    """Reads a mask function of transformers.masking_utils. None if any part of it is unknown."""
    terms = Terms()
    todo = [function]
    while todo:
        part = todo.pop()
        if getattr(part, "__module__", None) != "transformers.masking_utils":
            return None
        inside = inspect.getclosurevars(part).nonlocals
        match part.__qualname__.split(".")[0]:
            case "and_masks":
                todo += inside["mask_functions"]
            case "causal_mask_function":
                terms.causal = True
            case "bidirectional_mask_function":
                pass
            case "sliding_window_overlay" | "sliding_window_bidirectional_overlay":
                terms.window = min(inside["sliding_window"], terms.window or inside["sliding_window"])
            case "packed_sequence_mask_function":
                terms.packed = inside["packed_sequence_mask"]
            case "remap_positions_for_packed_sequence":  # within a sequence, positions differ as indices do
                todo.append(inside["mask_function"])
            case _:
                return None
    return terms


def pieces_of(terms: Terms, real: Tensor | None, batch: int, length: int) -> list[Piece] | None:
    """The mask as pieces, to which the window is to be added where a causal one is longer. None if that is impossible: padding
    between the tokens of a sequence, or beside a sequence that a window cuts, or such a window without causality."""
    ids = torch.zeros(batch, length, dtype=torch.long, device="cpu") if terms.packed is None else terms.packed.cpu()
    kept = torch.ones(batch, length, dtype=torch.bool, device="cpu") if real is None else real.bool().cpu()
    pieces = []
    for row in range(batch):
        cuts = (torch.diff(ids[row]) != 0).nonzero().flatten().add(1).tolist()
        for start, stop in pairwise([0, *cuts, length]):
            tokens = kept[row, start:stop].nonzero().flatten()
            if not len(tokens):
                continue
            first, last = start + int(tokens[0]), start + int(tokens[-1]) + 1
            cut = terms.window is not None and stop - start > terms.window
            if last - first != len(tokens) or (cut and (not terms.causal or last - first < stop - start)):
                return None
            if not terms.causal:
                pieces.append(Piece(row, start, stop, first, last, causal=False))
                continue
            pieces.append(Piece(row, first, last, first, last, causal=True))
            if last < stop:  # padding after a sequence attends to all of it, as in transformers
                pieces.append(Piece(row, last, stop, first, last, causal=False))
    return pieces


# ---- attention --------------------------------------------------------------------------------------------------------------
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Spans | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function "unswag". query [batch, heads, length, dim]; key and value may have fewer heads.
    Returns [batch, length, heads, dim] and no weights.

    Saved: without a mask and with `Spans` what SDPA saves (q, k, v, output, lse); with a boolean mask q, k, v and the one mask
    (the attention is recomputed in the backward, because SDPA would keep its own copy of the mask in q's dtype). With
    dropout on the CPU q, k, v, the mask if there is one, and the state of the generator: 5 KB per layer."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _elsewhere.attend is not None:
        return _elsewhere.attend(module, query, key, value, attention_mask, dropout, scaling, **kwargs), None
    if isinstance(attention_mask, Spans) and attention_mask.window is not None:
        attention_mask = attention_mask.tensor()
    stash.plays("attention", query, key, value)
    causal = attention_mask is None and query.shape[2] > 1
    if (attention_mask is None or isinstance(attention_mask, Spans)) and not takes_groups(query, key, value, dropout, causal):
        key, value = (for_all_heads(t, query.shape[1]) for t in (key, value))
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
    draws = dropout > 0 and query.is_cpu
    if isinstance(attention_mask, Spans):
        size = (attention_mask.batch, attention_mask.length)
        if not special and not draws and all((t.shape[0], t.shape[2]) == size for t in (query, key, value)):
            return _attend(query, key, value, attention_mask.pieces, dropout, scaling), None
        attention_mask = attention_mask.tensor()

    def stock(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)[0]

    recompute = (
        torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and not torch.compiler.is_compiling()
    )
    masked = attention_mask is not None and attention_mask.dtype == torch.bool
    known = masked or attention_mask is None
    if not known or special or not recompute or not (draws or (masked and not dropout)):
        return stock(query, key, value, attention_mask), None
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    return AttentionAgain.apply(query, key, value, attention_mask, torch.get_rng_state() if draws else None, stock), None


class _Elsewhere(threading.local):
    attend: Callable[..., Tensor] | None = None


_elsewhere = _Elsewhere()


@contextlib.contextmanager
def diverted(attend: Callable[..., Tensor]) -> Iterator[None]:
    """Inside the block this thread's calls of `attention_forward` return `attend(module, query, key, value, attention_mask,
    dropout, scaling, **kwargs)`, [batch, length, heads, dim]."""
    before, _elsewhere.attend = _elsewhere.attend, attend
    try:
        yield
    finally:
        _elsewhere.attend = before


def takes_groups(query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool) -> bool:
    """Whether SDPA has a kernel with linear memory for keys and values with fewer heads. On CUDA its memory-efficient kernel
    does not support groups, so where flash attention does not run (sm_75, float32) SDPA would build tokens x tokens."""
    if query.shape[1] == key.shape[1] or not query.is_cuda or torch.compiler.is_compiling():
        return True
    from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

    call = SDPAParams(query, key, value, None, dropout, causal, True)
    return can_use_flash_attention(call) or can_use_cudnn_attention(call)


def for_all_heads(t: Tensor, heads: int) -> Tensor:
    """t [batch, groups, length, dim], each group repeated for its heads; recomputed under the stash, not kept."""
    repeated = repeat(t, times=heads // t.shape[1])
    stash.remember(repeated, repeat, t, times=heads // t.shape[1])
    return repeated


def repeat(t: Tensor, times: int) -> Tensor:
    return t.transpose(1, 2).repeat_interleave(times, dim=2).transpose(1, 2)  # tokens outermost, for `_split`


def _attend(
    query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece], dropout: float, scaling: float | None
) -> Tensor:
    batch, heads, length, _ = query.shape
    spans = [
        (p, (p.row * length + p.q0, p.row * length + p.q1), (p.row * length + p.k0, p.row * length + p.k1)) for p in pieces
    ]
    q = _split(query, [s for _, s, _ in spans])
    k = _split(key, [s for *_, s in spans])
    v = _split(value, [s for *_, s in spans])
    done = {
        at: F.scaled_dot_product_attention(
            q[at], k[to], v[to], dropout_p=dropout, is_causal=piece.causal, scale=scaling, enable_gqa=heads != key.shape[1]
        )
        for piece, at, to in spans
    }
    nothing = query.new_zeros(()).to(next(iter(done.values())).dtype) if done else query.new_zeros(())
    parts = [done[at][0].transpose(0, 1) if at in done else nothing.expand(at[1] - at[0], heads, value.shape[-1]) for at in q]
    joined = join(*parts)
    stash.remember(joined, join, *parts)
    return joined.view(batch, length, heads, -1)


def join(*parts: Tensor) -> Tensor:
    """[tokens, heads, dim] of all, in order."""
    return torch.cat(parts)


def _split(t: Tensor, spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
    """t [batch, heads, length, dim] cut along batch x length, in order: each of `spans` and what lies between, as
    [1, heads, span, dim]. One cut, so that the backward is one concatenation."""
    tokens = t.transpose(1, 2).flatten(0, 1)
    cuts = list(pairwise(sorted({0, len(tokens), *(edge for span in spans for edge in span)})))
    parts = tokens.split([stop - start for start, stop in cuts])
    return {cut: part.transpose(0, 1).unsqueeze(0) for cut, part in zip(cuts, parts, strict=True)}


class AttentionAgain(torch.autograd.Function):
    """y = attend(q, k, v, mask), recomputed in the backward. Saved: q, k, v, the mask, which all layers share, and, if attend
    draws random numbers, the state of the CPU's generator before them, which the backward sets while it recomputes."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        random: Tensor | None,
        attend: Callable[..., Any],
    ) -> Tensor:
        ctx.attend = attend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, mask, random)
        y: Tensor = attend(query, key, value, mask)
        return y.detach()  # y may be a view, which callers could not modify in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mask, random = ctx.saved_tensors
        needed = [i for i in range(3) if ctx.needs_input_grad[i]]
        leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        with torch.enable_grad(), torch.random.fork_rng(devices=(), enabled=random is not None):
            if random is not None:
                torch.default_generator.set_state(random)
            y = ctx.attend(*leaves, mask)
        gradients: list[Tensor | None] = [None] * 6
        for i, gradient in zip(needed, torch.autograd.grad(y, [leaves[i] for i in needed], dy), strict=True):
            gradients[i] = gradient
        return tuple(gradients)
