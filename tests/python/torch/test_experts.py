"""Experts in one call: transformers' results at odd sizes, no worse in bfloat16, gradients for what needs one."""

from __future__ import annotations

import copy

import pytest
import torch
from families import distance
from packed_experts import build, inputs, step

from unswag.torch.experts import grouped


def in_one_call(module):
    """What the module computes, by `grouped`."""
    return lambda hidden, index, weights: grouped(
        hidden, index, weights, module.gate_up_proj, module.down_proj, "silu", gate_first=True
    )


def test_in_bfloat16_no_gradient_is_further_from_the_truth_than_stock():
    module = build(dtype=torch.bfloat16)
    data = inputs(tokens=200, dtype=torch.bfloat16, weight_dtype=torch.float32)
    exact = copy.deepcopy(module).double()
    exact.config._experts_implementation = "eager"
    truth = step(exact, *(x.detach().double().requires_grad_() if x.is_floating_point() else x for x in data))
    exact.config._experts_implementation = "grouped_mm"
    stock = step(module, *data)
    for ours, theirs, true in zip(step(module, *data, in_one_call(module)), stock, truth, strict=True):
        limit = 1.25 * distance(theirs, true) + 2.0**-8 / 4  # a rounding to bfloat16, whatever sums the products
        assert ours.dtype == theirs.dtype and distance(ours, true) <= limit


@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 3), (13, 1), (7, 2)])
def test_odd_sizes(tokens, k):
    module, data = build(), inputs(tokens, k)
    stock = step(module, *data)
    for ours, theirs in zip(step(module, *data, in_one_call(module)), stock, strict=True):
        assert distance(ours, theirs) <= 2e-6


@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj", "hidden", "weights"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_theirs(frozen):
    module, data = build(), inputs()
    stock = step(module, *data)
    names = ["hidden", "weights", "gate_up_proj", "down_proj"]
    leaves = dict(zip(names, [data[0], data[2], *module.parameters()], strict=True))
    leaves[frozen].requires_grad_(False)
    in_one_call(module)(*data).sin().sum().backward()
    assert leaves[frozen].grad is None
    for name, want in zip(names, stock[1:], strict=True):
        assert name == frozen or distance(leaves[name].grad, want) <= 2e-6


def test_double_backward_is_refused():
    module, data = build(), inputs()
    (g,) = torch.autograd.grad(in_one_call(module)(*data).sum(), data[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="once"):
        g.sum().backward()
