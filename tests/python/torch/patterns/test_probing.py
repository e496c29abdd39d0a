"""Modules of one kind run the same code with the same settings; anything else is another kind."""

from __future__ import annotations

import types

import pytest
import torch
from odd_weights import halved
from torch import nn
from torch.nn import functional as F

from unswag.torch.patterns.probing import kind, sealed


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.eps, self.act, self.scaling, self.names = 1e-6, F.silu, {"a": 0.5}, ["a", ("b", {1})]

    def forward(self, x):
        return self.act(self.linear(x)) * self.eps


def test_values_of_tensors_do_not_count():
    assert kind(Part()) == kind(Part())


CHANGES = {
    "a number": lambda m: setattr(m, "eps", 1e-5),
    "a number of another type": lambda m: setattr(m, "eps", True),
    "a function": lambda m: setattr(m, "act", F.gelu),
    "inside a dict": lambda m: m.scaling.update(a=0.25),
    "inside a list": lambda m: m.names[1][1].add(2),
    "a new attribute": lambda m: setattr(m, "clamp", None),
    "an object": lambda m: setattr(m, "config", types.SimpleNamespace()),
    "a forward on the instance": lambda m: setattr(m, "forward", types.MethodType(Part.forward, m)),
    "a forward on a child": lambda m: setattr(m.linear, "forward", types.MethodType(nn.Linear.forward, m.linear)),
    "a hook": lambda m: m.register_forward_hook(lambda *_: None),
    "a hook on a child": lambda m: m.linear.register_forward_pre_hook(lambda *_: None),
    "evaluation": lambda m: m.eval(),
    "another class": lambda m: setattr(m, "linear", nn.Bilinear(3, 1, 4)),
    "a dtype": lambda m: m.to(torch.bfloat16),
    "a shape": lambda m: setattr(m, "linear", nn.Linear(5, 4)),
    "no bias": lambda m: setattr(m.linear, "bias", None),
    "a weight that is no plain tensor": lambda m: setattr(m.linear, "weight", halved(m.linear.weight)),
    "a buffer": lambda m: m.register_buffer("shift", torch.zeros(4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_anything_else_does(change):
    plain, other, another = Part(), Part(), Part()
    CHANGES[change](other)
    assert kind(other) != kind(plain)
    CHANGES[change](another)
    own = ("an object", "a forward", "a hook")  # each its own
    assert (kind(other) == kind(another)) == (not change.startswith(own))


@pytest.mark.parametrize("started", [False, True])
def test_a_probe_leaves_the_seed_of_cuda_alone(started, monkeypatch):
    """torch.manual_seed would seed a CUDA that starts after the surgery with 0, whatever the user has seeded."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with sealed():
            draws.append(torch.rand(3))
    assert torch.equal(*draws) and torch.equal(torch.get_rng_state(), before)
    assert seeds == [0, 0] * started
