"""Modules of one kind run the same code with the same settings; anything else is another kind. Probes leave no trace."""

from __future__ import annotations

import collections
import copy
import types
import warnings

import pytest
import torch
from odd_weights import halved
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from unswag.torch import apply_unswag_surgery
from unswag.torch.patterns.probing import kind, sealed, twin


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


# ---- twins -------------------------------------------------------------------------------------------------------------------


class Stats:
    def __init__(self):
        self.count, self.shapes = 0, []


class Log(nn.Module):
    """An RMSNorm that keeps a log, in one of many ways."""

    calls = 0
    seen_by_all: list[int] = []  # noqa: RUF012

    def __init__(self, write):
        super().__init__()
        self.write, self.weight, self.eps = WRITES[write], nn.Parameter(torch.ones(32)), 1e-6
        self.n, self.log, self.table, self.names, self.nested = 0, [], {}, set(), {"a": [[]]}
        self.recent, self.stats, self.tensor = collections.deque(maxlen=3), Stats(), torch.zeros(3)

    def forward(self, x):
        self.write(self, x)
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


WRITES = {
    "n": lambda m, x: setattr(m, "n", m.n + 1),
    "last": lambda m, x: setattr(m, "last", x.detach()),
    "log": lambda m, x: m.log.append(x.shape),
    "table": lambda m, x: m.table.__setitem__(x.dtype, 1),
    "names": lambda m, x: m.names.add(str(x.dtype)),
    "nested": lambda m, x: m.nested["a"][0].append(1),
    "recent": lambda m, x: m.recent.append(x.shape),
    "stats": lambda m, x: (setattr(m.stats, "count", m.stats.count + 1), m.stats.shapes.append(x.shape)),
    "tensor": lambda m, x: m.tensor.add_(1),
    "weight": lambda m, x: m.weight.data is None or m.get_parameter("weight").detach().mul_(1),
    "calls": lambda m, x: setattr(type(m), "calls", type(m).calls + 1),
    "seen_by_all": lambda m, x: m.seen_by_all.append(1),
}


def snapshot(module):
    held = {k: repr(v) for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "stats", "write")}
    tensors = {k: (id(t), t._version, repr(t)) for k, t in (*module.named_parameters(), *module.named_buffers())}
    return (
        held,
        tensors,
        vars(module.stats).copy(),
        list(module.stats.shapes),
        module.tensor._version,
        Log.calls,
        list(Log.seen_by_all),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_a_forward_that_writes_leaves_no_trace_of_probes_and_stays(write, training):
    model = nn.Sequential(nn.Linear(8, 32), Log(write)).train(training)
    before = snapshot(model[1])
    report = apply_unswag_surgery(model)
    assert snapshot(model[1]) == before
    assert report.skipped == [("1", f"rms_norm: its forward writes to its {write}, which the replacement would not")]
    model(torch.randn(3, 8))
    assert snapshot(model[1]) != before
    Log.calls = 0
    Log.seen_by_all.clear()


@pytest.mark.parametrize("write", ["log", "calls"])
def test_so_do_activations_and_mlps(write):
    class Act(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.log = []

        def forward(self, x):
            WRITES[write](self, x)
            return F.silu(x)

    class Mlp(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.gate, self.up, self.down, self.act = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8), act
            self.log, self.calls = [], 0

        def forward(self, x):
            if not isinstance(self.act, Act):
                self.log.append(1)
            return self.down(self.act(self.gate(x)) * self.up(x))

    model = nn.Sequential(Act(), Mlp(Act()), Mlp(nn.SiLU()))
    report = apply_unswag_surgery(model)
    assert report.patched == [("2.act", "activation"), ("", "stash")]
    assert all(m.log == [] and type(m).__dict__.get("calls", 0) == 0 for m in model.modules() if hasattr(m, "log"))
    assert any(name == "2" and "its forward writes to its log" in why for name, why in report.skipped)


def test_a_twin_shares_nothing_that_can_be_written_to():
    module = Log("n")
    made = twin(module)
    before = snapshot(module)
    for write in set(WRITES) - {"calls"}:
        WRITES[write](made, torch.ones(2, 32))
    with torch.no_grad():
        made.weight.add_(1)
    assert snapshot(module) == before and made.n == 1 and made.stats.count == 1
    assert made.weight.requires_grad and not made.tensor.requires_grad


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrized_parts_are_not_advanced(norm):
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down, self.act = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8), nn.SiLU()

        def forward(self, x):
            return self.down(self.act(self.gate(x)) * self.up(x))

    model = nn.Sequential(Mlp(), nn.LayerNorm(8), nn.Linear(8, 8)).train()
    for part in (model[0].gate, model[0].down, model[2]):
        norm(part)
    stock = copy.deepcopy(model)
    before = {k: (t._version, t.clone()) for k, t in (*model.named_buffers(), *model.named_parameters())}
    report = apply_unswag_surgery(model)
    assert ("0", "gated_mlp") in report.patched
    for k, t in (*model.named_buffers(), *model.named_parameters()):
        assert t._version == before[k][0] and torch.equal(t, before[k][1])
    x = torch.randn(3, 8)
    for _ in range(2):
        torch.testing.assert_close(model(x), stock(x))
    with pytest.raises(ValueError, match="is parametrized: reading its parameters may change"):
        twin(model[2])


def test_a_module_that_knows_its_model_has_a_twin():
    model = nn.Sequential(nn.Linear(3, 3), Log("n"))
    model[1].__dict__["parents"] = [model]
    made = twin(model[1])
    assert made.parents[0] is not model and made.parents[0][1] is made and made.parents[0][0].weight is not model[0].weight


# ---- where users go ---------------------------------------------------------------------------------------------------------


class OwnGated(nn.Module):
    def __init__(self, before, factor):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.act, self.before, self.factor = nn.SiLU(), Hidden(before), Hidden(factor)

    def forward(self, x):
        z = self.before.f(x)
        return self.down(self.act(self.gate(z)) * self.up(z)) * self.factor.f(x)


class OwnNorm(nn.Module):
    def __init__(self, before, factor):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(16)), 1e-6
        self.before, self.factor = Hidden(before), Hidden(factor)

    def forward(self, x):
        z = self.before.f(x)
        return self.weight * (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + self.eps)) * self.factor.f(x)


class OwnLayerNorm(nn.LayerNorm):
    def __init__(self, before, factor):
        super().__init__(16)
        self.before, self.factor = Hidden(before), Hidden(factor)

    def forward(self, x):
        return super().forward(self.before.f(x)) * self.factor.f(x)


class OwnSwish(nn.Module):
    def __init__(self, before, factor):
        super().__init__()
        self.before, self.factor = Hidden(before), Hidden(factor)

    def forward(self, x):
        z = self.before.f(x)
        return z * torch.sigmoid(z) * self.factor.f(x)


class Hidden:
    """Holds a function that is no part of a module."""

    def __init__(self, f):
        self.f = f


def same(x):
    return x


def one(x):
    return 1


OWN = {"gated_mlp": OwnGated, "rms_norm": OwnNorm, "layer_norm": OwnLayerNorm, "activation": OwnSwish}
PATHS = {
    "1-D": (same, lambda x: 1 + (x.dim() == 1)),
    "3-D": (same, lambda x: 1 + (x.dim() == 3)),
    "4-D": (same, lambda x: 1 + (x.dim() == 4)),
    "one row": (same, lambda x: 1 + (x.shape[0] == 1)),
    "many rows": (same, lambda x: 1 + (x.shape[0] > 1000)),
    "strides": (same, lambda x: 1 + (not x.is_contiguous())),
    "without grad": (same, lambda x: 1 + (not torch.is_grad_enabled())),
    "inference": (same, lambda x: 1 + torch.is_inference_mode_enabled()),
    "frozen": (same, lambda x: 1 + (torch.is_grad_enabled() and not x.requires_grad)),
    "in evaluation without grad": (same, lambda x: 1 + (x.dim() == 3 and not torch.is_grad_enabled())),
    "clamp": (lambda x: x.clamp(-500, 500), one),
    "NaN": (torch.nan_to_num, one),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OWN)
def test_a_module_that_computes_something_else_elsewhere_is_left(name, path):
    model = nn.Sequential(nn.Linear(16, 16), OWN[name](*PATHS[path]), nn.Linear(16, 4))
    assert ("1", name) not in apply_unswag_surgery(model).patched


@pytest.mark.parametrize("name", OWN)
def test_the_same_module_without_another_path_is_found(name):
    model = nn.Sequential(nn.Linear(16, 16), OWN[name](same, one), nn.Linear(16, 4))
    assert ("1", name) in apply_unswag_surgery(model).patched


@pytest.mark.parametrize("name", OWN)
def test_numbers_of_rows_that_the_code_names_are_tried(name):
    class More(OWN[name]):
        def forward(self, x):
            return super().forward(x) * (1 + (x.shape[0] > 5000))

    class JustSoMany(OWN[name]):
        def forward(self, x):
            return super().forward(x) * (1 + (x.shape[0] == 77))

    for cls in (More, JustSoMany):
        model = nn.Sequential(nn.Linear(16, 16), cls(same, one), nn.Linear(16, 4))
        assert ("1", name) not in apply_unswag_surgery(model).patched


@pytest.mark.parametrize("width", [16, 7])
def test_a_width_that_an_activation_treats_otherwise(width):
    model = nn.Sequential(nn.Linear(16, width), OwnSwish(same, lambda x: 1 + (x.shape[-1] == width)), nn.Linear(width, 4))
    assert ("1", "activation") not in apply_unswag_surgery(model).patched


@pytest.mark.parametrize("name", OWN)
def test_another_path_under_autocast(name):
    stock = nn.Sequential(nn.Linear(16, 16), OWN[name](same, lambda x: 1 + torch.is_autocast_enabled("cpu")), nn.Linear(16, 4))
    ours = copy.deepcopy(stock)
    apply_unswag_surgery(ours)
    x = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(ours(x), stock(x))
