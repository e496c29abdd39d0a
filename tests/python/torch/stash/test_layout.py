"""Views, casts and parameters are told apart by where tensors lie and by what made them."""

import pytest
import torch
from tests.python.torch.stash.small_programs import HEADS, X
from torch.nn import functional as F

from unswag.torch import stash
from unswag.torch.stash import Stash, layout


def test_on_the_cpu_there_are_no_streams():
    assert layout.stream_of(X) is None


class Notes:
    """A recorder of (shape, dtype, tier)."""

    def __init__(self):
        self.leases, self.notes = stash.Leases(), []

    def note(self, t, owner, tier, role=None, packed=None):
        self.notes.append((tuple(t.shape), t.dtype, tier))


def test_autocast_copies_of_weights_are_taken_for_weights():
    """B11: the door sees views of bf16 casts; a codec by role would compress the weights."""
    recorder = Notes()
    with stash.recording(recorder), Stash(), torch.autocast("cpu", torch.bfloat16):
        F.linear(X, HEADS[0])
    assert ((16, 16), torch.bfloat16, "parameter") in recorder.notes
    assert ((8, 16), torch.bfloat16, "device") in recorder.notes


def test_views_of_parameters_are_parameters():
    assert layout.is_parameter(HEADS[0].t()) and layout.is_parameter(HEADS[0][2:].view(-1))
    assert not layout.is_parameter(HEADS[0] * 1) and not layout.is_parameter(X)


@pytest.mark.parametrize("size", [(), (0,), (1,), (3,), (2, 0, 3), (2, 3, 4), (5, 1, 2)])
def test_dense_strides_are_those_of_a_contiguous_tensor(size):
    t = torch.empty(size)
    assert layout.dense_stride(size) == t.stride()
    assert layout.Layout.of(t).is_dense() and (not t.numel() or layout.Layout.of(t).is_contiguous())


def test_dense_is_without_gaps_and_overlaps_in_any_order():
    t = torch.empty(4, 6)
    transposed = layout.Layout.of(t.t())
    assert transposed.is_dense() and not transposed.is_contiguous()
    for other in (t[:, ::2], t[:, 1:], t.expand(2, 4, 6)):
        assert not layout.Layout.of(other).is_dense()


def test_a_layout_contains_its_parts_and_nothing_that_reaches_outside():
    t = torch.empty(4, 6)
    whole = layout.Layout.of(t[1:3])
    assert whole.contains(t[1:3], 0) and whole.contains(t[2], 6) and whole.contains(t[1:3].t(), 0) and whole.contains(t[:0], 99)
    assert not whole.contains(t[2:4], 6) and not whole.contains(t[0], -6) and not whole.contains(t[1:3].int(), 0)


def test_only_plain_strided_tensors_have_a_storage_key():
    t = torch.ones(2, 3)
    assert layout.storage_key(t) == layout.storage_key(t[1:]) is not None
    assert layout.storage_key(t.to_sparse()) is None
