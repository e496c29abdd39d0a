"""What the patterns of MLPs share: one table of activations, each told from the others."""

from __future__ import annotations

import pytest
import torch

from unswag import _core
from unswag.torch.functional import activation
from unswag.torch.patterns.mlp import ACTIVATIONS, SAME, activation_distance, same_activation


def test_the_activations_are_those_of_the_core():
    assert list(ACTIVATIONS) == list(_core.activations)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_an_activation_is_itself_and_no_other(act):
    """gelu and its tanh form are the nearest to each other."""
    for other, known in ACTIVATIONS.items():
        assert same_activation(ACTIVATIONS[act], known) == (act == other)
        assert act == other or activation_distance(ACTIVATIONS[act], known) > 100 * SAME


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_table_computes_what_the_core_computes(act):
    x = torch.linspace(-12, 12, 999)
    torch.testing.assert_close(ACTIVATIONS[act](x), activation(x, act))
