"""Replacing on the instance, and putting back only what is ours."""

from __future__ import annotations

import copy
import types

import torch
from odd_weights import halved
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unswag.torch.patterns.pattern import is_plain, replace, replace_forward, replaced, restore, values, wrapped


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.settings = types.SimpleNamespace(way="stock")

    def forward(self, x):
        return x


def ours(self, x):
    return 2 * x


def test_restore_puts_back_the_first_value_of_each_path():
    model = Model()
    before = dict(vars(model))
    replace_forward(model, ours)
    replace(model, "settings.way", "first")
    replace(model, "settings.way", "second")
    assert model(3) == 6 and model.settings.way == "second" and replaced(model) and replaced(model, "settings.way")
    assert values(model) == {"forward": model.forward, "settings.way": "second"}
    assert restore(model) and vars(model) == before and model.settings.way == "stock" and model(3) == 3
    assert not restore(model) and not replaced(model)


def test_what_somebody_set_since_stays_theirs():
    model = Model()
    replace(model, "settings.way", "ours")
    model.settings.way = "theirs"
    restore(model)
    assert model.settings.way == "theirs"


def test_wrapped_means_by_somebody_else():
    model = Model()
    assert not wrapped(model)
    replace_forward(model, ours)
    assert not wrapped(model) and not wrapped(copy.deepcopy(model))
    mine = model.forward
    model.forward = types.MethodType(lambda self, x: mine(x) + 1, model)
    assert wrapped(model)
    model.forward = types.MethodType(mine.__func__, model)  # taken back, as an equal method
    assert not wrapped(model)
    del model.forward
    assert not wrapped(model)


def test_plain_is_what_can_be_read_past_its_module():
    with FakeTensorMode():
        fake = torch.empty(2)
    assert all(is_plain(t) for t in (None, torch.empty(2), nn.Parameter(torch.empty(2)), fake))
    assert not is_plain(halved(torch.ones(2))) and not is_plain(nn.UninitializedParameter())
