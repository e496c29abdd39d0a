"""Replacing on the instance: what is called, what is copied, and putting back only what is ours."""

from __future__ import annotations

import copy
import io
import pickle
import types

import families
import pytest
import torch
from odd_weights import halved
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import unswag
from unswag.torch.patterns.pattern import (
    bring_back,
    cannot_operate,
    is_plain,
    replace,
    replace_forward,
    replace_view,
    replaced,
    restore,
    state,
    stock,
    stock_class,
    wrap_method,
    wrapped,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.way, self.weight = "stock", nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.weight


def ours(self, x):
    return 2 * stock(self, x)


def test_restore_puts_back_the_first_value_of_each_attribute():
    model = Model()
    before, forward = dict(vars(model)), Model.forward
    replace_forward(model, ours)
    replace(model, "way", "first")
    replace(model, "way", "second")
    assert model(3) == 6 and model.way == "second" and replaced(model) and replaced(model, "way")
    assert Model.forward is forward and isinstance(model, Model) and type(model).__name__ == "Model"
    had = state(model)
    assert restore(model) and vars(model) == before and type(model) is Model and model(3) == 3
    assert not restore(model) and not replaced(model)
    bring_back(model, had)
    assert model(3) == 6 and model.way == "second"
    restore(model)
    assert vars(model) == before


def test_what_somebody_set_since_stays_theirs():
    model = Model()
    replace(model, "way", "ours")
    model.way = "theirs"
    restore(model)
    assert model.way == "theirs"


def test_a_forward_of_the_instance_is_stock_and_comes_back():
    model = Model()
    model.forward = mine = lambda x: x + 1
    replace_forward(model, ours)
    assert model(3) == 8 and not wrapped(model)
    restore(model)
    assert vars(model)["forward"] is mine


def test_wraps_go_around_what_was_there():
    model = Model()
    wrap_method(model, "forward", lambda inner, self, x: inner(self, x) + 1)
    assert model(3) == 4
    replace_forward(model, ours)
    wrap_method(model, "forward", lambda inner, self, x: inner(self, x) + 1)
    assert model(3) == 7


def test_the_module_that_is_called_acts():
    """copy.copy and the replicas of nn.DataParallel share __dict__."""
    model = Model()
    replace_forward(model, ours)
    replica = model._replicate_for_data_parallel()
    replica.weight = torch.tensor(5.0)
    shallow = copy.copy(model)
    shallow._parameters = {"weight": nn.Parameter(torch.tensor(7.0))}
    deep = copy.deepcopy(model)
    deep.weight.data.fill_(9.0)
    assert [float(m(torch.ones(()))) for m in (model, replica, shallow, deep)] == [2, 10, 14, 18]
    restore(shallow)
    assert type(shallow) is Model and [float(m(torch.ones(()))) for m in (model, shallow)] == [2, 7]


def test_a_pickle_is_stock():
    model = Model()
    replace_forward(model, ours)
    replace(model, "way", "ours")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(model, protocol)
        again = pickle.loads(data)
        assert b"unswag" not in data and type(again) is Model and again.way == "stock" and again(3) == 3


def test_an_instance_made_by_the_operated_class_is_stock():
    model = Model()
    replace_forward(model, ours)
    again = type(model)()
    assert again(3) == 3 and not replaced(again) and stock_class(again) is Model
    assert not restore(again) and type(again) is Model


def test_who_derives_from_the_operated_class_keeps_its_own_method():
    model = Model()
    replace_forward(model, ours)
    model.__class__ = type("New", (type(model),), {"forward": lambda self, x: 100 * super(type(self), self).forward(x)})
    assert model(3) == 600
    restore(model)
    assert model(3) == 300


def test_an_attribute_is_seen_as_the_instance_says():
    model, other = Model(), Model()
    replace_view(model, "way", lambda self, way: way.upper())
    assert (model.way, other.way, vars(model)["way"]) == ("STOCK", "stock", "stock")
    model.way = "new"
    assert model.way == "NEW" and copy.deepcopy(model).way == "NEW" and pickle.loads(pickle.dumps(model)).way == "new"
    restore(model)
    assert model.way == "new" and type(model) is Model


def test_what_cannot_be_derived_from_is_left():
    assert cannot_operate(Model()) is None
    assert "TorchScript" in cannot_operate(torch.jit.trace(Model(), torch.ones(())))
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    assert "parametrized" in cannot_operate(linear)


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


def test_modules_that_pass_on_what_they_lack_are_copied_themselves():
    """PEFT's models do so: a __deepcopy__ of the model inside would be taken for theirs."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Model()

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    around = Around()
    replace_forward(around.inner, ours)
    for made in (copy.copy(around), copy.deepcopy(around)):
        assert type(made) is Around and made.inner(3) == 6


# ---- whoever takes down what a model does gets stock's own forward -----------------------------------------------------------


def pair():
    torch.manual_seed(0)
    parts = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.5)
    stock = nn.Sequential(*parts).eval()
    ours = copy.deepcopy(stock)
    unswag.apply_unswag_surgery(ours)
    return stock, ours


def saved_and_loaded(traced):
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


TAKERS = {
    "torch.export": lambda m, x: torch.export.export(m, (x,)).module(),
    "torch.export, strict": lambda m, x: torch.export.export(m, (x,), strict=True).module(),
    "torch.jit.trace": lambda m, x: saved_and_loaded(torch.jit.trace(m, (x,))),
    "torch.jit.trace, no_grad": lambda m, x: saved_and_loaded(torch.no_grad()(torch.jit.trace)(m, (x,))),
    "make_fx": lambda m, x: make_fx(m)(x),
}


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_exported_or_traced_is_stock(take):
    stock, ours = pair()
    x = torch.randn(5, 16)
    for model in (stock, ours):
        taken = take(model, x)
        assert torch.equal(taken(2 * x), stock(2 * x))
        assert "unswag" not in str(getattr(taken, "graph", ""))
    assert replaced(ours[1]) and ours(x).grad_fn is not None


def test_a_causal_language_model_is_exported_as_stock():
    model = families.build("llama").eval()
    tokens = torch.arange(12)[None]
    want = model(tokens).logits
    unswag.apply_unswag_surgery(model)
    with torch.no_grad():
        made = torch.export.export(model, (tokens,), {"use_cache": False}).module()(tokens, use_cache=False)
    torch.testing.assert_close(made.logits, want, atol=2e-5, rtol=1e-4)


def test_symbolic_trace_of_an_operated_model_says_what_to_do():
    stock, ours = pair()
    with pytest.raises(TypeError, match=r"symbolic_trace .* remove_unswag_surgery\(model\)"):
        torch.fx.symbolic_trace(ours)
    unswag.remove_unswag_surgery(ours)
    x = torch.randn(5, 16)
    assert torch.equal(torch.fx.symbolic_trace(ours)(x), stock(x))


def test_a_copy_on_the_meta_device_has_the_shapes_of_stock():
    _, ours = pair()
    y = copy.deepcopy(ours).to("meta")(torch.empty(5, 16, device="meta", requires_grad=True))
    assert y.is_meta and y.shape == (5, 16) and y.requires_grad
    model = families.build("llama")
    unswag.apply_unswag_surgery(model)
    tokens = torch.zeros(2, 12, dtype=torch.long, device="meta")
    for labels in (None, tokens):
        assert copy.deepcopy(model).to("meta")(input_ids=tokens, labels=labels).logits.shape == (2, 12, model.config.vocab_size)


def test_a_property_is_seen_and_set_as_it_was():
    class Named(Model):
        @property
        def title(self):
            return getattr(self, "given", "none")

        @title.setter
        def title(self, value):
            self.given = value

    model = Named()
    replace_view(model, "title", lambda self, value: f"{value}, seen")
    assert model.title == "none, seen"
    model.title = "one"
    assert model.title == "one, seen" and copy.deepcopy(model).title == "one, seen" and Named().title == "none"
    restore(model)
    assert model.title == "one" and type(model) is Named
