"""once_differentiable: a second derivative is an error, never zero in silence."""

from __future__ import annotations

import pytest
import torch

from unswag.torch.autograd import REFUSAL, once_differentiable


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
