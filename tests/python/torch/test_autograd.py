"""once_differentiable: a second derivative is an error, never zero in silence; where no gradient comes, none is made up."""

from __future__ import annotations

import inspect

import pytest
import torch

from unswag.torch import functional
from unswag.torch.autograd import REFUSAL, Function, once_differentiable
from unswag.torch.lora import Adapter, add_lora
from unswag.torch.loss import linear_cross_entropy


class Square(torch.autograd.Function):
    """y = x^2, saving x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        assert not torch.is_grad_enabled()
        (x,) = ctx.saved_tensors
        return (2 * x * dy,)


class SquareMadeInForward(torch.autograd.Function):
    """y = x^2, saving its derivative, which autograd cannot follow back to x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(2 * x)
        return x * x

    @staticmethod
    @once_differentiable(sources_are_saved=False)
    def backward(ctx, dy):
        return (ctx.saved_tensors[0] * dy,)


@pytest.fixture
def x():
    return torch.tensor([1.0, -3.0], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("function", [Square, SquareMadeInForward])
def test_one_derivative(function, x):
    function.apply(x).sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_create_graph_alone_is_no_error(x):
    (dx,) = torch.autograd.grad(Square.apply(x).sum(), x, create_graph=True)
    assert torch.equal(dx, 2 * x)


def test_a_penalty_is_an_error_though_the_incoming_gradient_is_constant(x):
    (dx,) = torch.autograd.grad(Square.apply(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"differentiated once; .* remove_unswag_surgery"):
        dx.sum().backward()


def test_through_the_incoming_gradient(x):
    dy = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(Square.apply(x), x, dy, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.autograd.grad(dx.sum(), dy)


def test_create_graph_is_an_error_where_the_sources_are_not_saved(x):
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.autograd.grad(SquareMadeInForward.apply(x).sum(), x, create_graph=True)


def test_a_gradient_of_create_graph_can_be_edited_in_place():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (dx,) = torch.autograd.grad(Square.apply(x).sum(), x, create_graph=True)
    dx.mul_(3)
    assert torch.equal(dx.detach(), 6 * x.detach())
    with pytest.raises(NotImplementedError, match=REFUSAL[:20]):
        dx.sum().backward()


class NoGradient(torch.autograd.Function):
    """The identity, whose backward gives none."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


LABELS = torch.tensor([0, 2])
FUNCTIONS = {
    "relu": functional.relu,
    "silu": functional.silu,
    "silu, 2 bits": lambda x: functional.silu(x, bits=2),
    "swiglu": lambda x: functional.swiglu(x, x),
    "gated_halves": lambda x: functional.gated_halves(x, "silu"),
    "rms_norm": lambda x: functional.rms_norm(x, torch.ones(4)),
    "layer_norm": lambda x: functional.layer_norm(x, torch.ones(4), torch.zeros(4)),
    "dropout": functional.dropout,
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, torch.ones(3, 4), LABELS),
    "linear_cross_entropy, rows": lambda x: linear_cross_entropy(x, torch.ones(3, 4), LABELS, reduction="none"),
    "add_lora": lambda x: add_lora(x, x, [Adapter(torch.ones(2, 4), torch.ones(4, 2), None, 1.0)]),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_where_no_gradient_comes_none_is_made_up(function):
    """A weight's .grad stays None, as behind PyTorch's own functions; of 0, optimizers take a step (weight decay, momentum)."""
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(2, 4, requires_grad=True)
    (NoGradient.apply(function(x @ weight)).sum() + x.sum()).backward()
    assert weight.grad is None and torch.equal(x.grad, torch.ones(2, 4))


def test_every_function_of_ours_takes_a_gradient_that_is_none():
    every = [*torch.autograd.Function.__subclasses__(), *Function.__subclasses__()]
    ours = [f for f in every if f.__module__.startswith("unswag.torch") and f is not Function]
    assert len(ours) > 12
    without = [f.__name__ for f in ours if "ctx.set_materialize_grads(False)" not in inspect.getsource(f)]
    # the first stands behind gradients that were made, the others see gradients of steps of our own
    assert sorted(without) == ["_Counts", "_NoSecondDerivative", "_Product"]
