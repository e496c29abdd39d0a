"""ReLU and ReLU²: a module without weights that runs torch's relu, whatever its class, or a function stored on a module."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unswag.torch.patterns.mlp import differs_elsewhere
from unswag.torch.patterns.pattern import (
    Candidate,
    ordinary_call,
    reason_to_leave,
    replace,
    replace_unary_forward,
    replace_view,
    stock,
    stock_class,
)
from unswag.torch.patterns.probing import AUTOCAST, PLAIN, Writes, own_forward, takes_one_argument, twin
from unswag.torch.patterns.proof import Proof, seen_as
from unswag.torch.stash import Stash
from unswag.torch.stash.rectified import rectified, squared

KEPT = "_unswag_kept"  # module.__dict__[KEPT]: how often its output was kept as what, since the surgery
FUNCTIONS = (F.relu, torch.relu, F.relu_, torch.relu_, Tensor.relu, Tensor.relu_)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPECIAL = (float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45, -1e-45)

Call = Callable[[nn.Module, Tensor, Counter[str]], Tensor]


class Relu:
    name = "relu"
    role = None
    saves = (
        "1 bit per element; 1 bit and the non-zeros where the next layer keeps the output, or the output itself where that is "
        "smaller; nothing where it can be recomputed. Stock keeps the output, and of relu² the square too"
    )

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        for name, module in model.named_modules():
            if held := [k for k, v in vars(module).items() if any(v is relu for relu in FUNCTIONS)]:
                yield Candidate(name, module, {"held": held})
            elif (
                {"relu", "relu_"} & set(getattr(getattr(stock_class(module).forward, "__code__", None), "co_names", ()))
                and not (module._modules or module._parameters or module._buffers)
                and takes_one_argument(module)
            ):
                yield Candidate(name, module)

    def probe(self, candidate: Candidate) -> str | None:
        module = candidate.module
        if "held" in candidate.parts:
            return None  # it is torch's own
        if reason := reason_to_leave(module):
            return reason
        reasons = []
        for call in (_relu, _squared):
            if (reason := _differs(module, call) or _elsewhere(module, call)) is None:
                candidate.parts |= {"call": call, "covers": ()}
                return None
            reasons.append(reason)
        return f"it is neither relu ({reasons[0]}) nor its square ({reasons[1]})"

    def apply(self, candidate: Candidate) -> None:
        module, kept = candidate.module, Counter[str]()
        proof = Proof(candidate)
        replace(module, KEPT, kept)
        if "held" in candidate.parts:
            for k in candidate.parts["held"]:
                replace_view(module, k, seen_as(vars(module)[k], _held))
            return
        call: Call = candidate.parts["call"]

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            return call(self, x, vars(self)[KEPT])

        replace_unary_forward(module, forward, proof)


def _held(module: nn.Module, function: Callable[..., Tensor]) -> HeldRelu:
    return HeldRelu(function, vars(module)[KEPT])


@dataclass(frozen=True)
class HeldRelu:
    """What an attribute reads as in place of torch's relu."""

    stock: Callable[..., Tensor]
    kept: Counter[str]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not args or not isinstance(args[0], Tensor) or not ordinary_call():
            return self.stock(*args, **kwargs)
        return rectified(lambda x: self.stock(x, *args[1:], **kwargs), args[0], self.kept)


def kept_as(model: nn.Module) -> list[Counter[str]]:
    """What the patched ReLUs of `model` count."""
    return [vars(module)[KEPT] for module in model.modules() if KEPT in vars(module)]


def _relu(module: nn.Module, x: Tensor, kept: Counter[str]) -> Tensor:
    return rectified(lambda x: stock(module, x), x, kept)


def _squared(module: nn.Module, x: Tensor, kept: Counter[str]) -> Tensor:
    return squared(x, kept)


def _differs(module: nn.Module, call: Call) -> str | None:
    """How `call` under a stash differs from the module's own forward, bit by bit, or None: with special numbers in x and dy,
    and a reader of y that keeps it or not."""
    for dtype, training, reader in itertools.product(DTYPES, (True, False), (torch.neg, torch.sin)):
        copy = twin(module)
        copy.training = training
        x = torch.cat([torch.linspace(-12, 12, 90), torch.tensor(SPECIAL)]).to(dtype)
        dy = torch.cat([torch.tensor(SPECIAL), torch.randn(90)]).to(dtype)
        kept: Counter[str] = Counter()

        def run(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
            leaf = x.clone().requires_grad_()  # noqa: B023
            y = f(leaf * 1)  # no leaf, so that it may work in place
            (dx,) = torch.autograd.grad(reader(y), leaf, dy)  # noqa: B023
            return y.detach(), dx

        try:
            theirs = run(lambda x: own_forward(copy, x))  # noqa: B023
            with Stash():
                ours = run(lambda x: call(copy, x, kept))  # noqa: B023
        except Writes as error:
            return str(error)
        except Exception as error:  # no function of one tensor of that dtype
            return f"it raises {type(error).__name__} for {dtype}"
        if not all(_same_bits(a, b) for a, b in zip(ours, theirs, strict=True)):
            return f"results differ in {dtype}"
        if not +kept:
            return "it saves something else for the backward pass"
    return None


def _elsewhere(module: nn.Module, call: Call) -> str | None:
    """As `_differs`, of other shapes and modes. relu's values are the module's own anyway."""

    def ours(module: nn.Module, x: Tensor) -> Tensor:
        return call(module, x, Counter())

    modes = (PLAIN, AUTOCAST) if call is _squared else ()
    reasons = (differs_elsewhere(module, ours, torch.empty(0), torch.float32, mode) for mode in modes)
    return next((reason for reason in reasons if reason), None)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
