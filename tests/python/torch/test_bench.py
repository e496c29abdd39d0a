"""The benches' own counter of live bytes, and their text."""

import pytest
import torch
from bench.live import LiveStorages
from examples.docstrings import documented
from tests.python.torch.small_models import batch, tiny_llama

from unswag.torch.audit import LiveStorages as Audited


class Hoarding(torch.autograd.Function):
    """Keeps a copy where no saved-tensor hook sees it."""

    @staticmethod
    def forward(ctx, x):
        ctx.hidden = x + 1
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def test_counts_what_hides_on_a_context_and_forgets_what_dies():
    model, data = tiny_llama(), batch()
    with LiveStorages(model, list(data.values())) as live:
        x = torch.ones(1000, requires_grad=True) * 1
        assert live.bytes == 4000 + 4000  # the leaf and the product
        y = Hoarding.apply(x)
        assert live.bytes == 4 * 4000  # and y, and the copy
        del y
        assert live.bytes == 2 * 4000
        assert live.peak == 4 * 4000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_agrees_with_the_audit(checkpointing):
    model, data = tiny_llama(layers=4), batch(64)
    if checkpointing:
        model.gradient_checkpointing_enable()
    counts = []
    for kind in (LiveStorages, Audited):
        model.zero_grad()
        with kind(model, list(data.values())) as live:
            forward = live.forward if kind is LiveStorages else lambda run: run()
            loss = forward(lambda: model(**data).loss)
            counts.append(live.bytes if kind is LiveStorages else live.bytes())
            loss.backward()
            if kind is LiveStorages:
                curve = live.backward_curve
        del loss
    assert counts[0] == counts[1] > 0
    assert len(curve) == 4 and curve == sorted(curve, reverse=True)  # layer by layer


def test_the_loss_is_no_part_of_the_peak():
    model, data = tiny_llama(layers=1), batch(64)
    with LiveStorages(model, list(data.values())) as live:
        live.forward(lambda: model(**data).loss).backward()
        without = live.peak
    with LiveStorages(model, list(data.values())) as live:
        model(**data).loss.backward()  # not told that this is the forward: the loss counts
    assert live.peak > without


def test_docstrings_are_many_and_always_the_same():
    found = list(documented())
    assert len(found) > 2000 and found == list(documented())
    dumps = next(item for item in found if item.name == "json.dumps")
    assert dumps.signature.startswith("json.dumps(obj, ") and "Serialize" in dumps.text
