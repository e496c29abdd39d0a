"""Attention by tiles and blocks equals attention with the whole mask, in values and all gradients."""

import itertools

import pytest
import torch
from torch import nn

from unswag.torch.attention import Piece, Spans
from unswag.torch.checkpoint.tile_attention import (
    ALL,
    FROM,
    UP_TO,
    Block,
    KeysKnown,
    LayerAttention,
    Unswept,
    blocks_of,
    no_kernel,
)

TOKENS = 37


def visible(pieces, window, rows, tokens=TOKENS):
    """The mask [rows, tokens, tokens] that pieces and a window stand for."""
    seen = torch.zeros(rows, tokens, tokens, dtype=torch.bool)
    for piece in pieces:
        for q in range(piece.q0, piece.q1):
            last = q + 1 if piece.causal else piece.k1
            first = piece.k0 if window is None or not piece.causal else max(piece.k0, q + 1 - window)
            seen[piece.row, q, first:last] = True
    return seen


def causal(row, start, stop):
    return Piece(row, start, stop, start, stop, causal=True)


MASKS = {
    "causal": ([causal(0, 0, TOKENS), causal(1, 0, TOKENS)], None),
    "packed": ([causal(0, 0, 9), causal(0, 9, TOKENS), causal(1, 0, 30), causal(1, 30, TOKENS)], None),
    "padded": ([causal(0, 5, TOKENS), causal(1, 0, 20), Piece(1, 20, TOKENS, 0, 20, causal=False)], None),
    **{f"window {w}": ([causal(0, 0, TOKENS), causal(1, 0, TOKENS)], w) for w in (1, 2, 7, 8, 9, 20, 36)},
    "packed, window 6": ([causal(0, 0, 9), causal(0, 9, TOKENS), causal(1, 0, 30), causal(1, 30, TOKENS)], 6),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("tile", [1, 8, 13, TOKENS])
def test_blocks_cover_the_mask_once(name, tile):
    pieces, window = MASKS[name]
    covered = torch.zeros(2, TOKENS, TOKENS, dtype=torch.long)
    for row, start in itertools.product(range(2), range(0, TOKENS, tile)):
        for block in blocks_of([p for p in pieces if p.row == row], window, start, min(start + tile, TOKENS)):
            queries, keys = block.q1 - block.q0, block.k1 - block.k0
            seen = torch.ones(queries, keys, dtype=torch.long)
            if block.keys != ALL:
                assert queries == keys
                seen = seen.tril() if block.keys == UP_TO else seen.triu()
            assert seen.any(1).all()
            covered[row, block.q0 : block.q1, block.k0 : block.k1] += seen
    assert torch.equal(covered, visible(pieces, window, 2).long())


def test_a_window_has_blocks_of_all_kinds():
    found = list(blocks_of([causal(0, 0, TOKENS)], 8, 8, 16))
    assert found == [Block(8, 16, 8, 16, UP_TO), Block(8, 15, 1, 8, FROM)]
    assert {b.keys for b in blocks_of([causal(0, 3, TOKENS)], 9, 8, 16)} == {ALL, UP_TO, FROM}


def inputs(heads, groups, dim, value_dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, TOKENS, dim), (2, groups, TOKENS, dim), (2, groups, TOKENS, value_dim)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    sinks = torch.randn(heads, generator=generator).to(dtype).requires_grad_()
    return q, k, v, sinks, torch.randn(2, TOKENS, heads, value_dim, generator=generator).to(dtype)


def whole(q, k, v, sinks, seen, scale):
    """[batch, tokens, heads, dim], a row without keys is zero."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~seen[:, None], -torch.inf)
    top = (
        torch.zeros(2, q.shape[1], TOKENS, 1, dtype=q.dtype) - torch.inf
        if sinks is None
        else sinks[:, None, None].expand(2, -1, TOKENS, 1)
    )
    probabilities = torch.cat([scores, top], -1).softmax(-1)[..., :-1].nan_to_num()
    return (probabilities @ v).transpose(1, 2)


def in_tiles(q, k, v, sinks, mask, scale, dy, tile, key_block, keep):
    """(y, gradients) by a forward in ascending and a backward in descending order."""
    module, starts = nn.Module(), list(range(0, TOKENS, tile))
    forward = LayerAttention(TOKENS, key_block)
    forward.keep = keep
    leaves = [q, k, v, *([sinks] if sinks is not None else [])]
    settings = {"scaling": scale, "s_aux": sinks}

    def call(attention, start, *tensors):
        attention.at(start, min(start + tile, TOKENS))
        return attention.attend(module, *(t[:, :, start : start + tile] for t in tensors), mask, **settings)

    ys, kept = [], []
    with torch.no_grad():
        for start in starts:
            ys.append(call(forward, start, q, k, v))
            kept.append(forward.kept)
    backward = LayerAttention(TOKENS, key_block)
    backward.passes = "keys"
    for start in starts:
        with pytest.raises(KeysKnown):
            call(backward, start, q, k, v)
    backward.passes = "backward"
    sums = [torch.zeros_like(t) for t in leaves]
    for start, saved in zip(reversed(starts), reversed(kept), strict=True):
        backward.kept = saved
        y = call(backward, start, q, k, v)
        for total, got in zip(sums, torch.autograd.grad(y, leaves, dy[:, start : start + tile]), strict=True):
            total += got
    return torch.cat(ys, 1), sums


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("heads", [(4, 2, 8, 8), (2, 2, 8, 8), (3, 1, 12, 8)], ids=["GQA", "MHA", "MQA, values narrower"])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_equal_those_of_the_whole(name, heads, sinks):
    pieces, window = MASKS[name]
    seen = visible(pieces, window, 2)
    mask = None if name == "causal" else Spans(pieces, 2, TOKENS, lambda: seen[:, None], window)
    *qkv, s, dy = inputs(*heads)
    s = s if sinks else None
    y = whole(*qkv, s, seen, 0.3)
    wanted = torch.autograd.grad(y, [*qkv, *([s] if sinks else [])], dy)
    for tile, key_block, keep in ((8, 5, False), (13, 64, True), (TOKENS, 64, False), (1, 64, False)):
        ours, gradients = in_tiles(*qkv, s, mask, 0.3, dy, tile, key_block, keep)
        torch.testing.assert_close(ours, y, rtol=1e-11, atol=1e-12)
        for got, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def test_sixteen_bit_gradients_are_as_good_as_those_of_the_whole():
    *qkv, _, dy = inputs(4, 2, 16, 16, dtype=torch.bfloat16)
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(2, -1, -1)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    truth = torch.autograd.grad(whole(*exact, None, seen, 0.25), exact, dy.double())
    plain = nn.functional.scaled_dot_product_attention(*qkv, is_causal=True, scale=0.25, enable_gqa=True)
    stock = torch.autograd.grad(plain.transpose(1, 2), qkv, dy)
    ours = in_tiles(*qkv, None, None, 0.25, dy, 13, 16, False)[1]
    for got, theirs, true in zip(ours, stock, truth, strict=True):
        assert (got.double() - true).norm() <= 1.25 * (theirs.double() - true).norm()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"softcap": 30.0}, "softcap"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "not causal"),
        ({"mask": torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)}, "tensor"),
        ({"mask": Spans([Piece(0, 0, 4, 0, TOKENS, causal=False)], 2, TOKENS, torch.tensor)}, "not causal"),
    ],
)
def test_what_it_cannot_do_it_refuses(arguments, reason):
    *qkv, _, _ = inputs(4, 2, 8, 8)
    attention = LayerAttention(TOKENS)
    attention.at(0, TOKENS)
    with pytest.raises(Unswept, match=reason):
        attention.attend(nn.Module(), *qkv, arguments.pop("mask", None), scaling=None, **arguments)


def test_keys_of_other_tokens_are_refused():
    q, k, v, *_ = inputs(4, 2, 8, 8)
    attention = LayerAttention(TOKENS)
    attention.at(0, 8)
    with pytest.raises(Unswept, match="does not see the tokens"):
        attention.attend(nn.Module(), q[:, :, :8], k, v, None)


def test_no_kernel_names_what_is_missing(monkeypatch):
    assert no_kernel(torch.device("cpu"), torch.float64, 8) is None
    assert "float8" in no_kernel(torch.device("cpu"), torch.float8_e4m3fn, 8)
    assert "meta" in no_kernel(torch.device("meta"), torch.float32, 8)
    monkeypatch.setattr("unswag.torch.checkpoint.tile_attention._cpu_backward", None)
    assert "lacks" in no_kernel(torch.device("cpu"), torch.float32, 8)
