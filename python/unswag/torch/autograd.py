"""What our `autograd.Function`s share: a second derivative is an error, and where no gradient arrives none is passed on."""

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


class Function(torch.autograd.Function):
    """Has `direct`: `apply` without its Python part, which takes as long as the autograd engine's own. That part serves
    torch.func, default arguments and torch.compile, and must not be left out where any of them is in use
    (`_core.eager.takes`)."""

    direct: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.direct = super(torch.autograd.Function, cls).apply  # type: ignore[misc]


def once_differentiable(
    backward: Callable[..., tuple[Any, ...]] | None = None, *, sources_are_saved: bool = True
) -> Callable[..., Any]:
    """Makes a second derivative a NotImplementedError, always. A decorator for `backward`.

    torch.autograd.function.once_differentiable looks at the incoming gradients only. Where they are constants, as in a
    gradient penalty on y.sum(), it silently drops the penalty's gradient. Here the computed gradients are connected to the
    saved tensors in the graph, so differentiating them raises; create_graph=True alone does not.

    sources_are_saved=False: the gradients were computed in the forward, and what they depend on is not among the saved tensors.
    Then there is nothing to connect them to, and create_graph=True itself raises.

    Where no gradient arrives (from a checkpoint that has none, say), none is passed on, as in PyTorch's own functions: a
    parameter's .grad stays None instead of 0. For that the forward calls `ctx.set_materialize_grads(False)`.
    """
    if backward is None:
        return functools.partial(once_differentiable, sources_are_saved=sources_are_saved)

    @functools.wraps(backward)
    def once(ctx: Any, *dy: Any) -> tuple[Any, ...]:
        if dy[0] is None and all(gradient is None for gradient in dy):
            return (None,) * len(ctx.needs_input_grad)
        again = torch.is_grad_enabled()  # create_graph
        if again and not sources_are_saved:
            raise NotImplementedError(REFUSAL)
        if not again:
            return backward(ctx, *dy)
        with torch.no_grad():
            grads = backward(ctx, *dy)
        made = [grad for grad in grads if isinstance(grad, Tensor)]
        sources = [x for x in (*ctx.saved_tensors, *dy) if isinstance(x, Tensor)]
        guarded = iter(_NoSecondDerivative.apply(len(made), *made, *sources))
        return tuple(next(guarded) if isinstance(grad, Tensor) else None for grad in grads)

    return once


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on gradients, with their sources as inputs in the graph; differentiating it is an error."""

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
