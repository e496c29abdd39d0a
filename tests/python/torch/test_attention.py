"""The mask in pieces says what transformers' mask says; the attention over it is SDPA's, and can be edited in place."""

from __future__ import annotations

import families
import pytest
import torch
from families import assert_close, packed, padded, plain, step
from in_place import assert_trains_as
from torch import nn

import unswag
from unswag.torch import attention
from unswag.torch.attention import AttentionAgain, Piece, Spans, Terms, attention_mask, pieces_of

TOLERANCE = 2e-6  # fp32, other orders of summation
BATCHES = {"plain": plain, "padded": padded, "packed": packed}


def dense(spans):
    """What the pieces say, as a boolean mask."""
    mask = torch.zeros(spans.batch, 1, spans.length, spans.length, dtype=torch.bool)
    for p in spans.pieces:
        block = torch.ones(p.q1 - p.q0, p.k1 - p.k0, dtype=torch.bool)
        mask[p.row, 0, p.q0 : p.q1, p.k0 : p.k1] |= block.tril() if p.causal else block
    at = torch.arange(spans.length)
    return mask if spans.window is None else mask & (at[:, None] - at < spans.window)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "window", "packed", "packed window"])
def test_pieces_say_what_the_mask_says(kind, seed):
    from transformers import masking_utils as m

    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    batch, length, window = 3, 24, draw(2, 30)
    real = None
    function = {
        "causal": m.causal_mask_function,
        "bidirectional": m.bidirectional_mask_function,
        "packed": m.causal_mask_function,
    }.get(kind, m.sliding_window_causal_mask_function(window))
    if kind.startswith("packed"):
        positions = torch.stack(
            [torch.cat([torch.arange(n), torch.arange(length - n)]) for n in (draw(1, 24) for _ in range(batch))]
        )
        function = m.packed_sequence_compatibility_function(function, positions, m.find_packed_sequence_indices(positions))
    else:
        real = torch.zeros(batch, length, dtype=torch.bool)
        for row in real:
            start = draw(0, length)
            row[start : draw(start, length) + 1] = True
    arguments = dict(mask_function=function, attention_mask=real, local_size=window if "window" in kind else None)
    got = attention_mask(batch, length, length, allow_is_causal_skip=False, **arguments)
    want = m.sdpa_mask(batch, length, length, allow_is_causal_skip=False, **arguments)
    if isinstance(got, Spans):
        assert torch.equal(dense(got), want)
    else:
        assert "window" in kind and torch.equal(got, want)


def test_pieces_are_read_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        assert pieces_of(Terms(causal=True), None, 1, 4) == [Piece(0, 0, 4, 0, 4, causal=True)]


def test_both_forms_are_reached():
    """The random cases above contain windows that pieces can say and windows that they cannot."""
    from transformers import masking_utils as m

    real = torch.ones(1, 24, dtype=torch.bool)
    real[0, 20:] = False
    kinds = [
        type(
            attention_mask(1, 24, 24, mask_function=m.sliding_window_causal_mask_function(w), attention_mask=real, local_size=w)
        )
        for w in (23, 24)
    ]
    assert kinds == [torch.Tensor, Spans]


def test_an_unknown_mask_function_gets_the_boolean_mask():
    real = torch.ones(1, 8, dtype=torch.bool)
    real[0, 6:] = False
    got = attention_mask(1, 8, 8, mask_function=lambda b, h, q, k: (k <= q) & (k != 3), attention_mask=real)
    assert got.dtype == torch.bool and not got[0, 0, 5, 3]


def test_spans_become_the_tensor_on_any_other_use():
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, 6:] = False
    spans = attention_mask(2, 8, 8, attention_mask=real)
    assert isinstance(spans, Spans)
    want = dense(spans)
    assert torch.equal(spans[..., :4], want[..., :4])
    assert spans.shape == want.shape and spans.dtype == torch.bool and torch.equal(spans.to("cpu"), want)
    assert torch.equal(torch.logical_not(spans), ~want)


def test_a_penalty_on_gradients_through_a_masked_batch_is_an_error():
    q, k, v = (torch.randn(1, 2, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    y = AttentionAgain.apply(q, k, v, mask, None, lambda q, k, v, m: nn.functional.scaled_dot_product_attention(q, k, v, m))
    (dv,) = torch.autograd.grad(y.sum(), v, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        dv.pow(2).sum().backward()


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_groups_that_no_kernel_takes_are_repeated_and_not_kept(batch, monkeypatch):
    """As on a GPU without flash attention; here the question alone is answered otherwise."""
    model = families.build("llama")
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    stock = step(model, batch())
    unswag.apply_unswag_surgery(model)
    kept = unswag.audit(model, **batch()).total
    asked = []

    def none_takes_them(query, key, value, dropout, causal):
        asked.append(key.shape[1])
        return key.shape[1] == query.shape[1]

    monkeypatch.setattr(attention, "takes_groups", none_takes_them)
    assert_close(step(model, batch()), stock, TOLERANCE)
    assert set(asked) == {model.config.num_key_value_heads}
    assert unswag.audit(model, **batch()).total == kept


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (2, 1, 4, 8), (2, 3, 1, 8)], ids=str)
@pytest.mark.parametrize("masked, dropout", [(True, 0.0), (False, 0.2), (True, 0.2)])
def test_the_output_can_be_edited_in_place(shape, masked, dropout):
    """With one head or one token transposing is contiguous, so that what stock returns is a view."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = nn.Module()
    module.is_causal = True
    mask = torch.ones(2, 1, shape[2], shape[2], dtype=torch.bool).tril() if masked else None
    ours, stock = (
        lambda q, k, v, f=f: f(module, q, k, v, mask, dropout=dropout)[0]
        for f in (attention.attention_forward, sdpa_attention_forward)
    )
    assert_trains_as(stock, ours, shape, shape, shape)
