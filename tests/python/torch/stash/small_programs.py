"""Functions of few tensors, with recipes, and what they keep and give with and without a stash."""

import contextlib

import torch
from small_models import made, rms_norm, weight
from torch import nn
from torch.nn import functional as F

from unswag.torch import functional
from unswag.torch.audit import LiveStorages
from unswag.torch.stash import Stash, remember

NO_STASH = contextlib.nullcontext


class PythonDoor(Stash):
    """A stash whose hook is `Stash.door` itself: what the core's door does for the common cases is done in Python."""

    def door(self, t, depth=1):
        return super().door(t, depth + 1)


def leaf(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def block(x, w, *heads):
    """A norm that several Linears read: the plainest use of a recipe."""
    y = rms_norm(x, w, 1e-6)
    return sum(F.linear(y, head).sin().sum() for head in heads)


X, W = leaf(8, 16), weight(16)


HEADS = [weight(16, 16, seed=seed) for seed in (1, 2, 3)]


def grads(door, function, *leaves, backwards=1):
    with door():
        loss = function(*leaves)
    for _ in range(backwards - 1):
        loss.backward(retain_graph=True)
    loss.backward()
    found = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    return found


def assert_equal_with_and_without(function, *leaves, backwards=1):
    for ours, plain in zip(
        grads(Stash, function, *leaves, backwards=backwards),
        grads(NO_STASH, function, *leaves, backwards=backwards),
        strict=True,
    ):
        assert torch.equal(ours, plain)


def bytes_kept(door, function, *leaves):
    """Bytes alive after the forward; what the graph keeps, when only a scalar comes back."""
    weights = nn.ParameterList(t for t in leaves if isinstance(t, nn.Parameter))
    with LiveStorages(weights, leaves) as live:
        with door():
            loss = function(*leaves)
        assert loss.numel() == 1
        return live.bytes() - loss.nbytes


def twice(x):
    made.append("twice")
    return x * 2


class Doubled(torch.autograd.Function):
    """x * 2, saving x (as norms and activations do) or nothing (as dropout does)."""

    @staticmethod
    def forward(ctx, x, saves):
        if saves:
            ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2, None


def doubled(x, saves=True):
    y = Doubled.apply(x, saves)
    remember(y, twice, x)
    return y


class Doubling(torch.autograd.Function):
    """x², of which the backward writes into what it saved: PyTorch accepts that where nobody reads it afterwards."""

    @staticmethod
    def forward(ctx, x, times):
        ctx.save_for_backward(*[x] * times)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        x, *others = ctx.saved_tensors
        x.mul_(2)
        return (others[-1] if others else x) * dy, None


def dropped(x):
    return functional.dropout(x, 0.5)
