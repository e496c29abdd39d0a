"""Activation: silu or gelu in any spelling, as a module or as a function that a module holds.

This is the activation of nearly every plain MLP, fc2(act(fc1(x))). The forward around it stays as it is, dropouts, residuals
and casts with it, so the wiring needs no proof; the Linear behind keeps nothing, because the output is made again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unswag.torch import ops
from unswag.torch.derivatives import Codes
from unswag.torch.functional import activation
from unswag.torch.patterns.gated_mlp import ACTIVATIONS, CODES, SAME, activation_distance, codes_of
from unswag.torch.patterns.pattern import (
    Candidate,
    foreign_forward,
    is_plain,
    no_kernel,
    ordinary_call,
    replace,
    replace_forward,
    replace_view,
    stock,
)
from unswag.torch.patterns.probing import (
    AUTOCAST,
    MODES,
    NO_GRAD,
    PLAIN,
    Writes,
    differs_in_use,
    distance,
    kind,
    own_forward,
    takes_one_argument,
    twin,
    value_and_gradients,
)
from unswag.torch.patterns.proof import Proof, frozen, lengths

OURS = tuple(act for act in ACTIVATIONS if act not in ("relu", "relu2"))  # which need less than their input: `patterns.relu`
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # in which a module is compared with ours
NEAR = 0.2  # what is as near as this to one of ours is an activation, and is named in the report when it is none of them
Kind = tuple[torch.dtype, bool]  # of x; under autocast
WIDTHS = (((), 1), ((), 7), ((1,), 16), ((64,), 24), ((2, 3), 16), ((2, 1, 3), 8), ((2, 3, 4), 5), ((2, 1, 2, 3), 4))
SCALES = (1e-3, 1.0, 10.0, 1e2, 1e3, 3e4, 1e30)  # of a sweep over x
HOMES = ("torch.nn.functional", "torch._C._nn")  # of the functions that an attribute may hold


class Activation:
    name = "activation"
    role = "mlp"
    saves = "its input, 16 bits per element in a 16-bit dtype; stock keeps the output too, and more where it is Python"

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        nearest: dict[Hashable, tuple[float, str]] = {}  # by kind, as long as the model lives
        proven: dict[Hashable, dict[Kind, str | None]] = {}
        for name, module in model.named_modules():
            if not (module._modules or module._parameters or module._buffers) and takes_one_argument(module):
                same = kind(module)
                if same not in nearest:
                    nearest[same] = _nearest(module)
                apart, act = nearest[same]
                if apart <= NEAR and act in OURS:
                    yield Candidate(name, module, {"act": act, "apart": apart, "like": like, "same": same, "proven": proven})
                    continue
            held = {k: act for k, v in vars(module).items() if _is_function(v) for apart, act in [_nearest(v)] if apart <= SAME}
            if held := {k: act for k, act in held.items() if act in OURS}:
                yield Candidate(name, module, {"held": held, "like": like})

    def probe(self, candidate: Candidate) -> str | None:
        module, like = candidate.module, candidate.parts["like"]
        if reason := no_kernel(like):
            return reason
        if "held" in candidate.parts:
            reasons = [_differs(getattr(module, k), act, like, like.dtype) for k, act in candidate.parts["held"].items()]
            return next((reason for reason in reasons if reason), None)
        if other := foreign_forward(module):
            return f"its forward was already replaced by {other}"
        if candidate.parts["apart"] > SAME:
            return f"it is none of {', '.join(OURS)}"
        if getattr(module, "inplace", False):
            return "it works in place"
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

        def forward(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Any:
            (x,) = (*args, *kwargs.values())
            if not ordinary(x):
                return stock(self, x)
            autocast = torch.is_autocast_enabled(x.device.type)
            if (x.dtype, autocast) not in proven:
                proof.say(self, f"x is {x.dtype}, in which its results differ{' under autocast' if autocast else ''}")
                return stock(self, x)
            return activation(x, act, codes_of(self))

        replace(candidate.module, CODES, Codes())
        replace_forward(candidate.module, forward, proof)


def seen_as(
    function: Callable[..., Any], held: Callable[[nn.Module, Callable[..., Any]], Any]
) -> Callable[[nn.Module, Any], Any]:
    """For `replace_view`: `held(module, function)` as long as the attribute holds `function`, or a copy of it."""
    known = frozen(function)

    def seen(module: nn.Module, value: Any) -> Any:
        return held(module, value) if value is function or frozen(value) == known else value

    return seen


def _held(name: str, act: str, module: nn.Module, function: Callable[..., Tensor]) -> Held:
    return Held(function, act, vars(module).get(CODES + name))


@dataclass(frozen=True)
class Held:
    """What is seen in an attribute in place of the function `stock`."""

    stock: Callable[..., Tensor]
    act: str
    codes: Codes | None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs or len(args) != 1 or not (ordinary(args[0]) and ordinary_call()):  # e.g. inplace=True
            return self.stock(*args, **kwargs)
        return activation(args[0], self.act, self.codes)


def ordinary(x: Any) -> bool:
    """Whether the ops take `x`: what a stranger's forward hands on may be anything."""
    return isinstance(x, Tensor) and is_plain(x) and x.layout is torch.strided and x.dtype in ops.DTYPES


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
        reasons[dtype, False] = reason or elsewhere(module, ours, like, dtype)
        reasons[dtype, True] = reason or elsewhere(module, ours, like, dtype, AUTOCAST)
    return reasons


def elsewhere(
    module: nn.Module, ours: Callable[[nn.Module, Tensor], Tensor], like: Tensor, dtype: torch.dtype, mode: str = PLAIN
) -> str | None:
    """How `ours` differs from the module in other shapes, modes and numbers, and for many rows; or None."""

    def draw(*shape: int) -> Tensor:  # not where y is next to nothing: of a single number, its rounding would be the result
        return 3 * torch.randn(*shape, device=like.device).clamp(-2 / 3, 2)

    def differs(inputs: list[Tensor], *modes: str) -> str | None:
        return differs_in_use(twin(module), ours, inputs, dtype, modes)

    usual = [draw(*shape, cols) for shape, cols in WIDTHS] + [draw(24, 5).T, draw(1)[0]]
    if mode == AUTOCAST:
        return differs(usual, mode)
    most = torch.finfo(dtype)
    sweeps = [torch.linspace(-scale, scale, 385, dtype=torch.float64).clamp(-most.max, most.max) for scale in SCALES]
    odd = [torch.tensor([[v, 1.0]]) for v in (0.0, -0.0, float("nan"), float("inf"), -float("inf"))]
    small = [torch.tensor([v], dtype=torch.float64) for v in (most.tiny, -most.tiny)]
    reason = differs(usual, PLAIN) or differs([x.to(like.device) for x in (*sweeps, *odd, *small)], PLAIN)
    if reason is None and dtype in (like.dtype, torch.float32):
        named = [draw(*shape) for n in lengths(module) for shape in ((n, 2), (2, n))]
        reason = differs(usual, *(mode for mode in MODES if mode not in (PLAIN, AUTOCAST))) or differs(named, PLAIN, NO_GRAD)
    return reason


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
