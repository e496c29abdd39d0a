"""Gated MLP: down(act(gate(x)) * up(x)), whatever its parts are called."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unswag.torch.functional import gated
from unswag.torch.patterns.pattern import Candidate, foreign_forward, no_kernel, replace, replace_forward
from unswag.torch.patterns.probing import distance, has_hooks, takes_one_argument, twin, value_and_gradients

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
GRID = 12.0  # pre-activations of the probes span -GRID…GRID; gelu and gelu_tanh are 5e-4 apart there, and 8e-8 near 0
SAME = 1e-9  # a hundredth of a rounding in float32; some spell sqrt(2 / pi) with eight digits and are 1e-10 off
ROWS = 8
PROVEN = "_unswag_activation"  # module.__dict__[PROVEN]: the activation that was compared with ours


@dataclass(frozen=True)
class Wiring:
    """Which child is which, the activation between them, and the attribute that holds it, if any."""

    gate: str
    up: str
    down: str
    act: str
    held: str | None

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        gate, up, down = (getattr(module, name) for name in (self.gate, self.up, self.down))
        return down(gated(gate(x), up(x), self.act))

    def activation(self, module: nn.Module) -> Any:
        return getattr(module, self.held) if self.held else None


class GatedMlp:
    name = "gated_mlp"
    saves = "gate and up: 32 bits per hidden element in a 16-bit dtype; stock keeps act(gate) and the product too, 64 bits"

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        for name, module in model.named_modules():
            linears = {k: m for k, m in module.named_children() if _is_linear(m)}
            if len(linears) == 3 and takes_one_argument(module) and (orders := list(_orders(linears))):
                yield Candidate(name, module, {"orders": orders})

    def probe(self, candidate: Candidate) -> str | None:
        module, orders = candidate.module, candidate.parts["orders"]
        if other := foreign_forward(module):
            return f"its forward was already replaced by {other}"
        if reason := no_kernel(next(module.parameters(), None)):
            return reason
        others = {k: m for k, m in module.named_children() if k not in orders[0]}
        others |= {k: v for k, v in vars(module).items() if callable(v) and not k.startswith("_")}
        own = [k for k, _ in itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))]
        if own or len(others) > 1:
            return f"it has more parts than three Linears and an activation: {', '.join((*others, *own))}"
        known: list[str] = list(ACTIVATIONS)
        for name, part in others.items():
            if isinstance(part, nn.Module) and has_hooks(part):
                return f"its activation {name} has hooks, which would not run"
            known = [k for k, f in ACTIVATIONS.items() if same_activation(part, f)]
            if not known:
                return f"its activation {name} is none of {', '.join(ACTIVATIONS)}"
        reasons = []
        for (gate, up, down), act in itertools.product(orders, known):
            wiring = Wiring(gate, up, down, act, next(iter(others), None))
            if (reason := _differs(module, wiring)) is None:
                candidate.parts |= {"wiring": wiring, "covers": tuple(others)}
                return None
            reasons.append(reason)
        return f"its forward is not down(act(gate(x)) * up(x)): {reasons[0]}"

    def apply(self, candidate: Candidate) -> None:
        wiring: Wiring = candidate.parts["wiring"]

        def forward(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
            (x,) = (*args, *kwargs.values())
            act = wiring.activation(self)
            if act is not vars(self)[PROVEN] or (isinstance(act, nn.Module) and has_hooks(act)):  # changed since the surgery
                return type(self).forward(self, x)
            return wiring(self, x)

        replace(candidate.module, PROVEN, wiring.activation(candidate.module))
        replace_forward(candidate.module, forward)


class Drawn(nn.Module):
    """Stands in for a Linear of any kind (LoRA, 4-bit, sharded) in a probe: y[j] = x[index[j]] scale[j] + shift[j]. It has
    the shapes of the Linear it stands for, costs next to nothing at any size, and has no weight to be read past it."""

    def __init__(self, linear: Any, shifts: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        n = self.out_features
        self.index = torch.randint(self.in_features, (n,), device=device)
        self.scale = nn.Parameter(torch.randn(n, device=device).to(dtype))
        self.shift = nn.Parameter(
            (shifts * torch.linspace(-1, 1, n, device=device)[torch.randperm(n, device=device)]).to(dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.index] * self.scale + self.shift


def _is_linear(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _orders(linears: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The (gate, up, down) that the shapes allow."""
    for gate, up, down in itertools.permutations(linears):
        g, u, d = linears[gate], linears[up], linears[down]
        if (g.in_features, g.out_features) == (u.in_features, u.out_features) == (d.out_features, d.in_features):
            yield gate, up, down


def same_activation(act: Any, known: Callable[[Tensor], Tensor]) -> bool:
    return activation_distance(act, known) <= SAME


def activation_distance(act: Any, known: Callable[[Tensor], Tensor]) -> float:
    """How far `act`, a module or a function, is from `known`, in values and derivatives on a grid in fp64; inf for what is no
    function of one fp64 tensor on the CPU."""
    grid = torch.linspace(-GRID, GRID, 4801, dtype=torch.float64).requires_grad_()
    call = act.forward if isinstance(act, nn.Module) else act
    try:
        theirs = value_and_gradients(lambda: call(grid.clone()), [grid])
    except Exception:
        return float("inf")
    return max(distance(a, b) for a, b in zip(value_and_gradients(lambda: known(grid), [grid]), theirs, strict=True))


def _differs(module: nn.Module, wiring: Wiring) -> str | None:
    """How `wiring` differs from the module's own forward, or None: with drawn Linears and pre-activations all over the grid,
    training and not; in fp64, and for the dtypes of the results in the module's own dtype."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    for dtype, training in itertools.product(dict.fromkeys((torch.float64, like.dtype)), (True, False)):
        children: dict[str, nn.Module] = {
            name: Drawn(getattr(module, name), GRID if name == wiring.gate else 1.0, dtype, like.device)
            for name in (wiring.gate, wiring.up, wiring.down)
        }
        children |= {k: twin(m) for k, m in module.named_children() if k not in children}
        copy = twin(module, **children)
        copy.training = training
        leaves = list(copy.parameters())
        x = torch.randn(ROWS, getattr(module, wiring.gate).in_features, device=like.device).to(dtype).requires_grad_()
        try:
            theirs = value_and_gradients(lambda: type(module).forward(copy, x), [x, *leaves])  # noqa: B023
        except Exception as error:
            return f"it does not call three Linears ({type(error).__name__}: {error})"
        ours = value_and_gradients(lambda: wiring(copy, x), [x, *leaves])  # noqa: B023
        worst = max(distance(a, b) for a, b in zip(ours, theirs, strict=True))
        if worst > (1e-10 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps):
            return f"results differ by {worst:.1e} in {dtype}"
    return None
