"""Gated MLP: down(act(gate(x)) * up(x)), whatever its parts are called."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from unswag.torch.functional import gated
from unswag.torch.patterns.mlp import choose, codes_of, finish, install, is_linear, others_of
from unswag.torch.patterns.pattern import Candidate
from unswag.torch.patterns.probing import takes_one_argument


@dataclass(frozen=True)
class Wiring:
    """Which child is which, the activation and the attribute that holds it, if any; and the dropouts, if any."""

    gate: str
    up: str
    down: str
    act: str
    held: str | None
    on_h: str | None  # the dropout on the product
    on_y: str | None  # the dropout on the result
    up_first: bool = False  # the Linears are called in the module's order: they may draw (LoRA's dropout) and have hooks

    @property
    def linears(self) -> tuple[str, ...]:
        return self.gate, self.up, self.down

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        names = (self.up, self.gate) if self.up_first else (self.gate, self.up)
        made = {name: getattr(module, name)(x) for name in names}
        return finish(module, self, gated(made[self.gate], made[self.up], self.act, codes_of(module)))


class GatedMlp:
    name = "gated_mlp"
    role = "mlp"
    saves = "gate and up: 32 bits per hidden element in a 16-bit dtype; stock keeps act(gate) and the product too, 64 bits"

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        proven: dict[Hashable, str | None] = {}  # by kind and wiring, as long as the candidates live
        for name, module in model.named_modules():
            linears = {k: m for k, m in module.named_children() if is_linear(m)}
            if len(linears) == 3 and takes_one_argument(module) and (orders := list(_orders(linears))):
                yield Candidate(name, module, {"orders": orders, "proven": proven})

    def probe(self, candidate: Candidate) -> str | None:
        orders = candidate.parts["orders"]
        others = others_of(candidate.module, orders[0])
        if isinstance(others, str):
            return others
        wirings = (
            Wiring(gate, up, down, act, others.held, on_h, on_y, up_first)
            for up_first, (on_h, on_y), (gate, up, down), act in itertools.product(
                (False, True), others.places(), orders, others.known
            )
        )
        return choose(candidate, wirings, others, "down(act(gate(x)) * up(x))")

    def apply(self, candidate: Candidate) -> None:
        install(candidate)


def _orders(linears: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The (gate, up, down) that the shapes allow."""
    for gate, up, down in itertools.permutations(linears):
        g, u, d = linears[gate], linears[up], linears[down]
        if (g.in_features, g.out_features) == (u.in_features, u.out_features) == (d.out_features, d.in_features):
            yield gate, up, down
