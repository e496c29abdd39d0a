"""Dropouts draw from a seed when asked to: nothing is kept of them, and their statistics are those of dropout."""

from __future__ import annotations

import copy

import architectures
import matrix
import pytest
import torch
from alone import Alone
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unswag.torch import apply_unswag_surgery, audit, remove_unswag_surgery
from unswag.torch.patterns.dropout import Dropout

alone = Alone(Dropout())
H, HIDDEN = 13, 29


class Mlp(nn.Module):
    def __init__(self, p=0.25):
        super().__init__()
        self.fc1, self.act, self.drop, self.fc2 = nn.Linear(H, HIDDEN), nn.GELU(), nn.Dropout(p), nn.Linear(HIDDEN, H)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


def examples():
    """With a rate so small that nothing is dropped: ours draws otherwise than PyTorch."""
    return {"of nothing": matrix.between(lambda: nn.Dropout(1e-9), dropout="redrawn")}


def test_it_is_asked_for():
    model = Mlp()
    assert ("drop", "dropout") not in apply_unswag_surgery(model).patched
    assert ("drop", "dropout") in apply_unswag_surgery(model, dropout="redrawn").patched
    remove_unswag_surgery(model)
    assert "forward" not in vars(model.drop)
    with pytest.raises(ValueError, match="dropout='none'; choose 'stock' or 'redrawn'"):
        apply_unswag_surgery(model, dropout="none")


def test_nothing_is_kept_behind_the_pre_activation():
    model = Mlp().bfloat16()
    apply_unswag_surgery(model, dropout="redrawn")
    assert audit(model, x=torch.randn(64, H).bfloat16()).total == 2 * 64 * HIDDEN


def test_the_gradient_is_that_of_what_was_drawn():
    drop = alone.patched(nn.Sequential(nn.Dropout(0.25)))
    x = torch.randn(40, 50, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    y = drop(x)
    y.sum().backward()
    kept = y != 0
    assert 0.70 < kept.double().mean() < 0.80
    torch.testing.assert_close(x.grad, kept.double() / 0.75)
    torch.testing.assert_close(y, x * kept / 0.75)
    assert not torch.equal(drop(x), y)
    torch.manual_seed(1)
    assert torch.equal(drop(x), y) and torch.equal(copy.deepcopy(drop).eval()(x), x)


def test_a_checkpoint_draws_the_same_again():
    model = alone.patched(Mlp().double())
    x = torch.randn(8, H, dtype=torch.float64)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(2)
        run(x).sin().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_p_is_read_at_each_call():
    drop = alone.patched(nn.Sequential(nn.Dropout(0.25)))
    x = torch.ones(100)
    drop[0].p = 1.0
    assert not drop(x).any()
    drop[0].p = 0.0
    assert drop(x) is x or torch.equal(drop(x), x)


class OwnDropout(nn.Dropout):
    pass


def test_what_is_not_plain_dropout_stays():
    model = nn.Sequential(nn.Dropout(0.1, inplace=True), nn.Dropout(0.0), OwnDropout(0.1), nn.Dropout1d(0.1))
    assert [(found.name, reason) for found, reason in alone.tried(model)] == [("0", "it works in place (inplace=True)")]


def test_under_torch_func_and_compile_the_stock_dropout_draws():
    drop = alone.patched(nn.Sequential(nn.Dropout(0.5)))
    x = torch.ones(4, 64)
    rows = torch.func.vmap(drop, randomness="different")(x)
    assert len({tuple(row.tolist()) for row in rows}) == 4
    compiled = torch.compile(drop, backend="eager", fullgraph=True)
    assert not torch.equal(compiled(x), compiled(x))


@pytest.mark.parametrize("name", ["bert", "t5_gated"])
def test_architectures_train(name):
    """Without dropout in the end it is stock: the wiring is not touched."""
    model, batch = architectures.build(name), architectures.batch(name)
    report = apply_unswag_surgery(model, loss="stock", dropout="redrawn")
    assert sum(pattern == "dropout" for _, pattern in report.patched) > 4
    first, again = architectures.step(model, batch), architectures.step(model, batch)
    architectures.assert_equal(first, again, 1e-12)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours = architectures.step(model, batch)
    remove_unswag_surgery(model)
    architectures.assert_equal(ours, architectures.step(model, batch), 1e-6)


@pytest.mark.parametrize("change", ["forward of the class", "inplace", "function of torch"])
def test_what_changed_after_the_surgery_is_what_runs(change, monkeypatch):
    drop = alone.patched(nn.Dropout(0.5))
    if change == "inplace":
        drop.inplace = True
    elif change == "forward of the class":
        monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: 3 * x)
    else:
        monkeypatch.setattr(F, "dropout", lambda x, *_: 3 * x)
    x = torch.ones(4, 8)
    with pytest.warns(UserWarning, match="runs its own forward"):
        y = drop(x)
    assert y is x if change == "inplace" else torch.equal(y, 3 * x)


def test_in_forward_mode_the_stock_dropout_draws():
    drop, x = alone.patched(nn.Dropout(0.5)), torch.ones(4, 8)
    with forward_ad.dual_level():
        y, dy = forward_ad.unpack_dual(drop(forward_ad.make_dual(x, x)))
        assert torch.equal(y, dy)
