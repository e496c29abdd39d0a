"""One Linear for gate and up is found in either order, with dropouts where they are, and anything more is left."""

from __future__ import annotations

import architectures
import matrix
import pytest
import torch
from alone import Alone
from families import distance
from modules import Fused
from torch import nn
from torch.nn import functional as F

from unswag.torch import apply_unswag_surgery, audit
from unswag.torch.patterns.fused_mlp import FusedMlp

alone = Alone(FusedMlp())
H, HIDDEN = 24, 37


class Mlp(nn.Module):  # Phi-3, GLM
    def __init__(self, act=None, p=0.0):
        super().__init__()
        self.down_proj, self.gate_up_proj = nn.Linear(HIDDEN, H, bias=False), nn.Linear(H, 2 * HIDDEN)
        self.activation_fn = act or nn.SiLU()
        self.drop = nn.Dropout(p)

    def halves(self, x):
        return self.gate_up_proj(x).chunk(2, dim=-1)

    def forward(self, x):
        gate, up = self.halves(x)
        return self.down_proj(self.drop(up * self.activation_fn(gate)))


class UpFirst(Mlp):  # Moonshine
    def halves(self, x):
        return self.gate_up_proj(x).split(HIDDEN, dim=-1)[::-1]


class Inline(Mlp):
    def __init__(self):
        super().__init__()
        del self.activation_fn

    def forward(self, x):
        gate, up = self.halves(x)
        return self.drop(self.down_proj(F.gelu(gate, approximate="tanh") * up))


KNOWN = [
    (Mlp, "silu True drop None"),
    (lambda: Mlp(nn.GELU(), 0.4), "gelu True drop None"),
    (lambda: Mlp(nn.ReLU()), "relu True drop None"),
    (lambda: UpFirst(F.silu), "silu False drop None"),
    (Inline, "gelu_tanh True None drop"),
]


def examples():
    return {"gelu": matrix.between(Fused)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("make", "wiring"), KNOWN, ids=[w for _, w in KNOWN])
def test_order_and_activation_are_found_and_the_results_equal(make, wiring, dtype):
    found = alone.candidate(make().to(dtype))
    assert alone.probe(found) is None
    w = found.parts["wiring"]
    assert f"{w.act} {w.gate_first} {w.on_h} {w.on_y}" == wiring
    module, x = found.module, (3 * torch.randn(2, 5, H)).to(dtype).requires_grad_()

    def run():
        torch.manual_seed(3)
        y = module(x)
        return y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])

    stock = run()
    alone.apply(found)
    for ours, theirs in zip(run(), stock, strict=True):
        assert ours.dtype == theirs.dtype and distance(ours, theirs) <= 8 * torch.finfo(dtype).eps


class Interleaved(Mlp):
    def halves(self, x):
        both = self.gate_up_proj(x)
        return both[..., ::2], both[..., 1::2]


class Clamped(Mlp):
    def halves(self, x):
        gate, up = super().halves(x)
        return gate.clamp(max=7.0), up


class SubNorm(Mlp):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x):
        gate, up = self.halves(x)
        return self.down_proj(self.norm(up * self.activation_fn(gate)))


class DropsUp(Mlp):
    def forward(self, x):
        gate, up = self.halves(x)
        return self.down_proj(self.drop(up) * self.activation_fn(gate))


LEFT = {
    Interleaved: "not down",
    Clamped: "not down",
    SubNorm: "norm",
    DropsUp: "not down",
    (lambda: Mlp(nn.Tanh())): "not one of",
}


@pytest.mark.parametrize(("make", "why"), LEFT.items())
def test_anything_more_is_left_with_the_reason(make, why):
    assert why in alone.probe(alone.candidate(make()))


def test_the_halves_are_kept_once_and_nothing_else():
    module = Mlp().bfloat16()
    apply_unswag_surgery(module)
    assert audit(module, x=torch.randn(64, H).bfloat16()).total == 2 * 64 * 2 * HIDDEN


@pytest.mark.parametrize("name", ["phi3", "glm", "glm4", "modernbert", "granitemoeshared"])
def test_architectures_train_as_stock_with_dropout_on(name):
    moe = dict(experts_implementation="eager") if name == "granitemoeshared" else {}
    model, batch = architectures.build(name, **moe), architectures.batch(name)
    stock = architectures.step(model, batch)
    report = apply_unswag_surgery(model, loss="stock")
    assert sum(pattern == "fused_mlp" for _, pattern in report.patched) == 2
    architectures.assert_equal(architectures.step(model, batch), stock, 1e-6)
