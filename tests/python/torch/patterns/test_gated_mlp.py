"""down(act(gate(x)) * up(x)) is found whatever its parts are called, and anything more is left."""

from __future__ import annotations

import copy

import matrix
import pytest
import torch
from alone import Alone
from families import distance
from modules import Gated, T5Gated
from odd_weights import halved
from torch import nn
from torch.nn import functional as F

from unswag.torch.functional import gated
from unswag.torch.patterns import gated_mlp
from unswag.torch.patterns.gated_mlp import GatedMlp
from unswag.torch.patterns.pattern import replaced

alone = Alone(GatedMlp())
H, HIDDEN = 24, 64


class Mlp(nn.Module):
    def __init__(self, act=None, hidden=HIDDEN, bias=False):
        super().__init__()
        self.up_proj = nn.Linear(H, hidden, bias=bias)
        self.gate_proj = nn.Linear(H, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, H, bias=bias)
        self.act_fn = act or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Inline(nn.Module):  # no activation attribute, other names, the product the other way round
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(H, HIDDEN), nn.Linear(HIDDEN, H), nn.Linear(H, HIDDEN)

    def forward(self, hidden_states):
        return self.w2(self.w3(hidden_states) * F.silu(self.w1(hidden_states)))


class Function(Mlp):  # the activation is a plain function
    def __init__(self):
        super().__init__()
        del self.act_fn
        self.activation_fn = F.relu

    def forward(self, x):
        return self.down_proj(self.activation_fn(self.gate_proj(x)) * self.up_proj(x))


KNOWN = [
    (lambda: Mlp(), "gate_proj up_proj down_proj silu"),
    (lambda: Mlp(bias=True), "gate_proj up_proj down_proj silu"),
    (lambda: Mlp(nn.GELU()), "gate_proj up_proj down_proj gelu"),
    (lambda: Mlp(nn.GELU("tanh")), "gate_proj up_proj down_proj gelu_tanh"),
    (lambda: Mlp(nn.ReLU()), "gate_proj up_proj down_proj relu"),
    (lambda: Mlp(hidden=H), "gate_proj up_proj down_proj silu"),  # three Linears of one shape
    (Inline, "w1 w3 w2 silu"),
    (Function, "gate_proj up_proj down_proj relu"),
]
DTYPES = (torch.float32, torch.bfloat16)


def examples():
    kinds = {"module": Gated, "function": lambda: Gated(F.silu), "T5's": T5Gated}
    return {name: matrix.between(make) for name, make in kinds.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("make", "wiring"), KNOWN, ids=[w for _, w in KNOWN])
def test_parts_and_activation_are_found_and_the_results_equal(make, wiring, dtype):
    found = alone.candidate(make(), dtype)
    assert alone.probe(found) is None
    w = found.parts["wiring"]
    assert f"{w.gate} {w.up} {w.down} {w.act}" == wiring
    module = found.module
    x = (3 * torch.randn(2, 5, H)).to(dtype).requires_grad_()

    def run():
        y = module(x)
        return y, *torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))

    stock = run()
    alone.apply(found)
    assert replaced(module)
    tolerance = 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for ours, theirs in zip(run(), stock, strict=True):
        assert ours.dtype == theirs.dtype and distance(ours, theirs) <= tolerance


class Dropping(Mlp):
    """T5 has the first alone; its Linear may be wider than the rest, of which the weight's dtype tells."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Dropout(0.3), nn.Dropout(0.2)

    def forward(self, x):
        h = self.first(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        if isinstance(self.down_proj.weight, torch.Tensor) and h.dtype != self.down_proj.weight.dtype:
            h = h.to(self.down_proj.weight.dtype)
        return self.last(self.down_proj(h))


def test_dropouts_keep_their_place_and_their_draws():
    found = alone.candidate(Dropping())
    assert alone.probe(found) is None
    assert (found.parts["wiring"].on_h, found.parts["wiring"].on_y) == ("first", "last")
    module, x = found.module, torch.randn(5, H)

    def run():
        torch.manual_seed(3)
        y = module(x)
        return y, *torch.autograd.grad(y.sin().sum(), list(module.parameters()))

    stock = run()
    alone.apply(found)
    for ours, theirs in zip(run(), stock, strict=True):
        assert distance(ours, theirs) <= 1e-6


class DropsTheGate(Dropping):
    def forward(self, x):
        return self.down_proj(self.last(self.first(self.act_fn(self.gate_proj(x))) * self.up_proj(x)))


def test_a_cast_between_the_linears_is_left():
    module = Dropping().bfloat16()
    module.down_proj.float()
    (found,) = GatedMlp().find(nn.Sequential(module))
    assert "casts between its Linears" in alone.probe(found)


class SubNorm(Mlp):  # BitNet
    def __init__(self):
        super().__init__()
        self.ffn_sub_norm = nn.LayerNorm(HIDDEN)

    def forward(self, x):
        return self.down_proj(self.ffn_sub_norm(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Multiplied(Mlp):  # Falcon H1
    factor = 1.001

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x) * self.factor) * self.up_proj(x))


class Dropped(Mlp):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


class Shifted(Mlp):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))


class OwnScale(Mlp):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * self.scale)


class ReachesIn(Mlp):  # would miss LoRA and 4-bit weights if it were patched as calls of its children
    def forward(self, x):
        return F.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


class NoActivation(Mlp):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))


class EvalOnly(Mlp):  # another function in training
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if self.training else y


class TrainingOnly(Mlp):  # another function in evaluation
    def forward(self, x):
        y = super().forward(x)
        return y if self.training else 2 * y


class Nearly(nn.Module):  # gelu_tanh with one constant off in the fifth digit
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.04472 * x**3)))


class OneSided(nn.Module):  # silu below 8: a probe with small numbers would not see it
    def forward(self, x):
        return F.silu(x).clamp(max=8.0)


LEFT = {
    DropsTheGate: "not down",
    SubNorm: "ffn_sub_norm",
    Multiplied: "not down",
    Dropped: "not down",
    Shifted: "not down",
    OwnScale: "scale",
    ReachesIn: "does not call its Linears",
    NoActivation: "not down",
    EvalOnly: "not down",
    TrainingOnly: "not down",
    (lambda: Mlp(nn.Tanh())): "act_fn is not one of",
    (lambda: Mlp(Nearly())): "act_fn is not one of",
    (lambda: Mlp(OneSided())): "act_fn is not one of",
}


@pytest.mark.parametrize(("make", "why"), LEFT.items(), ids=[*(k.__name__ for k in LEFT)])
def test_anything_more_is_left_with_the_reason(make, why):
    found = alone.candidate(make())
    assert why in alone.probe(found)
    assert "wiring" not in found.parts


def test_zero_weights_hide_nothing():
    """A fresh LoRA and a zero down projection make every output zero: the probe draws weights of its own."""
    wrong, right = Shifted(), Mlp()
    for module in (wrong, right):
        for p in module.parameters():
            nn.init.zeros_(p)
    assert alone.probe(alone.candidate(wrong)) is not None
    assert alone.probe(alone.candidate(right)) is None


class Quantised(nn.Module):
    """Linear-like by protocol alone: packed weights, no `weight` of shape (out, in)."""

    def __init__(self, n, m):
        super().__init__()
        self.in_features, self.out_features = n, m
        self.codes = nn.Parameter(torch.randint(-8, 8, (m, n)).to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.codes.to(x.dtype) / 8)


def test_children_are_called_as_modules():
    module = Mlp()
    module.gate_proj, module.down_proj = Quantised(H, HIDDEN), Quantised(HIDDEN, H)
    called = []
    for child in (module.gate_proj, module.up_proj, module.down_proj):
        child.register_forward_hook(lambda m, *_: called.append(m))
    x = torch.randn(4, H)
    stock = module(x)
    found = alone.candidate(module)
    called.clear()
    assert alone.probe(found) is None
    assert not called
    alone.apply(found)
    torch.testing.assert_close(module(x), stock)
    assert called == [module.gate_proj, module.up_proj, module.down_proj]


def test_hooks_on_the_activation_are_not_bypassed():
    module = Mlp()
    module.act_fn.register_forward_hook(lambda *_: None)
    assert "hooks" in alone.probe(alone.candidate(module))


def test_the_argument_may_be_named_as_in_stock():
    found = alone.candidate(Inline())
    assert alone.probe(found) is None
    alone.apply(found)
    x = torch.randn(2, H)
    assert torch.equal(found.module(hidden_states=x), found.module(x))


def test_attention_and_plain_mlp_are_no_candidates():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(H, HIDDEN), nn.Linear(HIDDEN, H)

    class Three(nn.Module):  # three Linears, other shapes
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(H, HIDDEN), nn.Linear(H, 2 * HIDDEN), nn.Linear(HIDDEN, H)

    assert not list(GatedMlp().find(nn.Sequential(Plain(), Three())))


@pytest.mark.parametrize(("make", "change"), [(Mlp, "replaced"), (Mlp, "hooked"), (Function, "replaced")])
def test_an_activation_changed_after_the_surgery_is_the_one_that_runs(make, change):
    module = make()
    found = alone.candidate(module)
    assert alone.probe(found) is None
    alone.apply(found)
    copied = copy.deepcopy(module)  # its activation is its own, and still the one that was proven
    name = "act_fn" if make is Mlp else "activation_fn"
    if change == "replaced":
        setattr(module, name, nn.Tanh() if make is Mlp else torch.tanh)
    else:
        module.act_fn.register_forward_hook(lambda m, args, out: 3 * out)
    x = torch.randn(2, H)
    assert torch.equal(module(x), type(module).forward(module, x))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_mlp, "gated", lambda *args: (seen.append(args), gated(*args))[1])
        module(x), copied(x)
    assert len(seen) == 1


def test_weights_are_never_read():
    """Each Linear's own forward is, also where its weight is no plain tensor."""
    module = Mlp()
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(module, name).weight = halved(torch.randn_like(getattr(module, name).weight))
    x = torch.randn(2, H)
    want = module(x)
    found = alone.candidate(module)
    assert alone.probe(found) is None
    alone.apply(found)
    assert distance(module(x), want) < 1e-6
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


class UpFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(H, HIDDEN), nn.Linear(H, HIDDEN), nn.Linear(HIDDEN, H)

    def forward(self, x):
        return self.down(self.up(x) * F.silu(self.gate(x)))


class GateFirst(UpFirst):
    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("kind, first", [(UpFirst, "up"), (GateFirst, "gate")])
def test_the_linears_are_called_in_the_modules_order(kind, first):
    """They may draw (LoRA with dropout), and hooks of the user may count on it."""
    module, called = kind(), []
    assert alone.operate(module) == {}
    for name in ("gate", "up", "down"):
        getattr(module, name).register_forward_hook(lambda *_, name=name: called.append(name))
    module(torch.randn(3, H))
    assert called[0] == first and called[2:] == ["down"]


@pytest.mark.parametrize("name", ["up_proj", "gate_proj", "down_proj"])
def test_what_stands_in_the_instance_in_place_of_a_linear_is_called(name):
    """As in the module's own forward, which reads attributes: the instance's come before its children."""
    stock, x = Mlp(), torch.randn(3, H)
    mlp = alone.patched(copy.deepcopy(stock))
    for module in (mlp, stock):
        linear = getattr(module, name)
        vars(module)[name] = lambda h, linear=linear: 2 * linear(h)
    assert replaced(mlp)
    torch.testing.assert_close(mlp(x), stock(x))
