"""Views, casts and parameters are told apart by where tensors lie and by what made them."""

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
        self.leases, self.notes = {}, []

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
