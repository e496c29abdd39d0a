"""fc2(F.gelu(fc1(x))) is found where the forward names its activation; where it holds one, `activation` does it."""

from __future__ import annotations

import matrix
import pytest
import torch
from alone import Alone
from families import distance
from modules import Plain
from torch import nn
from torch.nn import functional as F

from unswag.torch import apply_unswag_surgery, audit
from unswag.torch.patterns.plain_mlp import PlainMlp

alone = Alone(PlainMlp())
H, HIDDEN = 13, 29


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(H, HIDDEN), nn.Linear(HIDDEN, H, bias=False)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Dropping(Mlp):  # PatchTSMixer
    def __init__(self):
        super().__init__()
        self.dropout1, self.dropout2 = nn.Dropout(0.4), nn.Dropout(0.3)

    def forward(self, x):
        return self.dropout2(self.fc2(self.dropout1(F.silu(self.fc1(x)))))


class Narrow(Mlp):  # both orders of the Linears fit
    def forward(self, x):
        return self.fc1(F.gelu(self.fc2(x), approximate="tanh"))


def square():
    module = Narrow()
    module.fc1, module.fc2 = nn.Linear(H, H), nn.Linear(H, H)
    return module


KNOWN = [(Mlp, "fc1 fc2 gelu None None"), (Dropping, "fc1 fc2 silu dropout1 dropout2"), (square, "fc2 fc1 gelu_tanh None None")]


def examples():
    return {"gelu": matrix.between(Plain)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("make", "wiring"), KNOWN, ids=[w for _, w in KNOWN])
def test_activation_and_dropouts_are_found_and_the_results_equal(make, wiring, dtype):
    found = alone.candidate(make().to(dtype))
    assert alone.probe(found) is None
    w = found.parts["wiring"]
    assert f"{w.fc1} {w.fc2} {w.act} {w.on_h} {w.on_y}" == wiring
    module, x = found.module, (3 * torch.randn(2, 5, H)).to(dtype).requires_grad_()

    def run():
        torch.manual_seed(3)
        y = module(x)
        return y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])

    stock = run()
    alone.apply(found)
    for ours, theirs in zip(run(), stock, strict=True):
        assert ours.dtype == theirs.dtype and distance(ours, theirs) <= 8 * torch.finfo(dtype).eps


class Residual(Mlp):
    def forward(self, x):
        return x + super().forward(x)


class Relu(Mlp):
    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


class ReadsWeight(Mlp):
    def forward(self, x):
        return F.linear(F.gelu(self.fc1(x)), self.fc2.weight)


class Linear(Mlp):
    def forward(self, x):
        return self.fc2(self.fc1(x))


@pytest.mark.parametrize("make", [Residual, Relu, ReadsWeight, Linear])
def test_anything_else_is_left(make):
    assert "its forward is not fc2(act(fc1(x)))" in alone.probe(alone.candidate(make()))


def test_an_mlp_that_holds_its_activation_is_no_candidate():
    module = Mlp()
    module.act = nn.GELU()
    assert not list(PlainMlp().find(module))


def test_one_number_is_kept_per_element():
    module = Mlp().bfloat16()
    apply_unswag_surgery(module)
    assert audit(module, x=torch.randn(64, H).bfloat16()).total == 2 * 64 * HIDDEN
