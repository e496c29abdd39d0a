"""What the backwards of our `autograd.Function`s have in common: none has a second derivative, and none makes up a gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

REFUSAL = (
    "UnSwag's functions can be differentiated once; for second derivatives use PyTorch's own function, "
    "or remove_unswag_surgery(model)"
)


def once_differentiable(
    backward: Callable[..., tuple[Any, ...]] | None = None, *, sources_are_saved: bool = True
) -> Callable[..., Any]:
    """Makes a second derivative a NotImplementedError, always. A decorator for `backward`.

    torch.autograd.function.once_differentiable looks at the incoming gradients only: where they are constants, as in a
    gradient penalty on y.sum(), it lets the penalty's gradient vanish without a word. Here the gradients hang in the graph of
    the saved tensors too, and differentiating them is the error; create_graph=True alone is none.

    sources_are_saved=False: the gradients were made in the forward, and what they depend on is not among the saved tensors.
    Then there is nothing to hang them on, and create_graph=True itself is the error.

    Where no gradient comes (of a checkpoint that gives none, say), none goes on, as in PyTorch's own functions: a parameter's
    .grad stays None, and is not 0. For that the forward calls `ctx.set_materialize_grads(False)`.
    """
    if backward is None:
        return functools.partial(once_differentiable, sources_are_saved=sources_are_saved)

    @functools.wraps(backward)
    def once(ctx: Any, *dy: Any) -> tuple[Any, ...]:
        if all(gradient is None for gradient in dy):
            return (None,) * len(ctx.needs_input_grad)
        again = torch.is_grad_enabled()  # create_graph
        if again and not sources_are_saved:
            raise NotImplementedError(REFUSAL)
        with torch.no_grad():
            grads = backward(ctx, *dy)
        if not again:
            return grads
        made = [grad for grad in grads if isinstance(grad, Tensor)]
        sources = [x for x in (*ctx.saved_tensors, *dy) if isinstance(x, Tensor)]
        guarded = iter(_NoSecondDerivative.apply(len(made), *made, *sources))
        return tuple(next(guarded) if isinstance(grad, Tensor) else None for grad in grads)

    return once


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on gradients, in the graph of what they were made from, where differentiating again is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.clone() for grad in tensors[:count])  # a view could not be changed in place, as gradients may be

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(REFUSAL)
