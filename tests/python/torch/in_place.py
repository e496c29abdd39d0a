"""What programs do to a tensor in place, and whether ours trains then as stock does."""

from __future__ import annotations

import torch

EDITS = {
    "mul_": lambda y: y.mul_(2),
    "add_": lambda y: y.add_(1),
    "clamp_": lambda y: y.clamp_(-0.5, 0.5),
    "slice": lambda y: y.__setitem__((..., 0), 0.0),
    "relu_": lambda y: torch.relu_(y),
    "copy_": lambda y: y.copy_(y * 2),
    "view": lambda y: y.view(-1).mul_(2),
    "transpose": lambda y: y.transpose(0, -1).mul_(2),
    "select": lambda y: y[0].mul_(3),
    "chunk": lambda y: y.chunk(2, -1)[1].clamp_(max=0.1),
}


def train(function, edit, *shapes):
    """(y edited, its strides, the gradients) of y = function(x, …), or the RuntimeError."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=g, requires_grad=True) for shape in shapes]
    torch.manual_seed(1)
    try:
        y = function(*(leaf * 1 for leaf in leaves))
        stride = y.stride()
        edit(y)
        y.backward(torch.arange(1.0, y.numel() + 1).view(y.shape))
    except RuntimeError as error:
        return error
    return y.detach(), stride, [leaf.grad for leaf in leaves]


def assert_trains_as(stock, ours, *shapes, strides=True):
    """After every edit: where stock trains, ours does, with the same results."""
    for name, edit in EDITS.items():
        want, have = train(stock, edit, *shapes), train(ours, edit, *shapes)
        if isinstance(want, RuntimeError):
            continue
        assert not isinstance(have, RuntimeError), (name, have)
        assert have[1] == want[1] or not strides, name
        torch.testing.assert_close((have[0], have[2]), (want[0], want[2]), rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023
