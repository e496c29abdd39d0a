"""Activation: silu or gelu in any spelling, as a module or as a function stored on a module.

This is the activation of nearly every plain MLP, fc2(act(fc1(x))). The forward around it is unchanged, with its dropouts,
residuals and casts, so only the activation is probed. The next Linear keeps nothing, because its input is recomputed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unswag.torch.derivatives import Codes
from unswag.torch.functional import activation
from unswag.torch.patterns.mlp import (
    ACTIVATIONS,
    CODES,
    KEEP_INPUT,
    SAME,
    activation_distance,
    codes_of,
    differs_elsewhere,
)
from unswag.torch.patterns.pattern import (
    Candidate,
    floating_parameter,
    no_kernel,
    ops_take,
    ordinary_call,
    reason_to_leave,
    replace,
    replace_unary_forward,
    replace_view,
    stock,
)
from unswag.torch.patterns.probing import (
    AUTOCAST,
    Writes,
    distance,
    kind,
    own_forward,
    takes_one_argument,
    twin,
    value_and_gradients,
)
from unswag.torch.patterns.proof import Proof, seen_as

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # in which a module is compared with ours
NEAR = 0.2  # what is as near as this to one of ours is an activation, and the report names it when it is not equal
Kind = tuple[torch.dtype, bool]  # of x; under autocast
HOMES = ("torch.nn.functional", "torch._C._nn")  # of the functions that an attribute may hold


class Activation:
    name = "activation"
    role = "mlp"
    saves = "its input, 16 bits per element in a 16-bit dtype; stock keeps the output too, and more where it is Python"

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        like = floating_parameter(model)
        nearest: dict[Hashable, tuple[float, str]] = {}  # by kind, as long as the model lives
        proven: dict[Hashable, dict[Kind, str | None]] = {}
        for name, module in model.named_modules():
            if not (module._modules or module._parameters or module._buffers) and takes_one_argument(module):
                same = kind(module)
                if same not in nearest:
                    nearest[same] = _nearest(module)
                apart, act = nearest[same]
                if apart <= NEAR and act in KEEP_INPUT:
                    yield Candidate(name, module, {"act": act, "apart": apart, "like": like, "same": same, "proven": proven})
                    continue
            held = {k: act for k, v in vars(module).items() if _is_function(v) for apart, act in [_nearest(v)] if apart <= SAME}
            if held := {k: act for k, act in held.items() if act in KEEP_INPUT}:
                yield Candidate(name, module, {"held": held, "like": like})

    def probe(self, candidate: Candidate) -> str | None:
        module, like = candidate.module, candidate.parts["like"]
        if "held" in candidate.parts:
            if reason := no_kernel(like):
                return reason
            reasons = [_differs(getattr(module, k), act, like, like.dtype) for k, act in candidate.parts["held"].items()]
            return next((reason for reason in reasons if reason), None)
        if reason := reason_to_leave(module, like):
            return reason
        if candidate.parts["apart"] > SAME:
            return f"it is close to {candidate.parts['act']}, but not equal to it"
        if getattr(module, "inplace", False):
            return "it works in place (inplace=True)"
        same, proven = candidate.parts["same"], candidate.parts["proven"]
        if same not in proven:
            proven[same] = _reasons(module, candidate.parts["act"], like)
        differs = proven[same]
        candidate.parts["proven"] = frozenset(kind for kind, reason in differs.items() if reason is None)
        return differs[like.dtype, False] or differs[torch.float32, False]

    def apply(self, candidate: Candidate) -> None:
        for k, act in candidate.parts.get("held", {}).items():
            replace(candidate.module, CODES + k, Codes())
            replace_view(candidate.module, k, seen_as(vars(candidate.module)[k], functools.partial(_held, k, act)))
        if "held" in candidate.parts:
            return
        act, proven, proof = candidate.parts["act"], candidate.parts["proven"], Proof(candidate)

        def forward(self: nn.Module, x: Tensor) -> Any:
            if not ops_take(x):
                return stock(self, x)
            autocast = torch.is_autocast_enabled(x.device.type)
            if (x.dtype, autocast) not in proven:
                proof.say(self, f"x is {x.dtype}, for which its results differ{' under autocast' if autocast else ''}")
                return stock(self, x)
            return activation(x, act, codes_of(self))

        replace(candidate.module, CODES, Codes())
        replace_unary_forward(candidate.module, forward, proof)


def _held(name: str, act: str, module: nn.Module, function: Callable[..., Tensor]) -> HeldActivation:
    return HeldActivation(function, act, vars(module).get(CODES + name))


@dataclass(frozen=True)
class HeldActivation:
    """What an attribute reads as in place of the function `stock`."""

    stock: Callable[..., Tensor]
    act: str
    codes: Codes | None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs or len(args) != 1 or not (ops_take(args[0]) and ordinary_call()):  # e.g. inplace=True
            return self.stock(*args, **kwargs)
        return activation(args[0], self.act, self.codes)


def _is_function(value: Any) -> bool:
    function = value.func if isinstance(value, functools.partial) else value
    return callable(function) and getattr(function, "__module__", None) in HOMES


def _nearest(act: Any) -> tuple[float, str]:
    """How near it is to the nearest of the known activations, and which that is; of a module, in training and not."""
    acts = [act]
    if isinstance(act, nn.Module):
        acts = [twin(act), twin(act)]
        acts[0].training, acts[1].training = True, False
    return min((max(activation_distance(a, f) for a in acts), name) for name, f in ACTIVATIONS.items())


def _reasons(module: nn.Module, act: str, like: Tensor) -> dict[Kind, str | None]:
    """How ours differs from the module, by dtype and autocast; None where it does not."""
    reasons: dict[Kind, str | None] = {}

    def ours(_: nn.Module, x: Tensor) -> Tensor:
        return activation(x, act)

    for dtype in dict.fromkeys((like.dtype, *FLOATS)):
        reason = _differs(functools.partial(own_forward, twin(module)), act, like, dtype)
        reasons[dtype, False] = reason or differs_elsewhere(module, ours, like, dtype)
        reasons[dtype, True] = reason or differs_elsewhere(module, ours, like, dtype, AUTOCAST)
    return reasons


def _differs(theirs: Callable[[Tensor], Tensor], act: str, like: Tensor, dtype: torch.dtype) -> str | None:
    """How ours differs from theirs in `dtype`, on the device of `like`, beyond roundings; or None."""
    x = (3 * torch.randn(64, 24, device=like.device)).to(dtype).requires_grad_()
    try:
        want = value_and_gradients(lambda: theirs(x), [x])
    except Writes as error:
        return str(error)
    except Exception as error:
        return f"it raises {type(error).__name__}: {error}"
    worst = max(distance(a, b) for a, b in zip(value_and_gradients(lambda: activation(x, act), [x]), want, strict=True))
    return f"results differ by {worst:.1e} in {dtype}" if worst > max(8 * torch.finfo(dtype).eps, SAME) else None
