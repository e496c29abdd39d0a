"""Gated MLP with one Linear for gate and up: down(act(gate) * up), gate and up the halves of gate_up(x), in either order."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from unswag.torch.functional import gated_halves
from unswag.torch.patterns.mlp import choose, codes_of, finish, install, is_linear, others_of
from unswag.torch.patterns.pattern import Candidate
from unswag.torch.patterns.probing import takes_one_argument


@dataclass(frozen=True)
class Wiring:
    """As `gated_mlp.Wiring`, with one Linear for both."""

    gate_up: str
    down: str
    act: str
    gate_first: bool
    held: str | None
    on_h: str | None
    on_y: str | None

    @property
    def linears(self) -> tuple[str, ...]:
        return self.gate_up, self.down

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        return finish(module, self, gated_halves(getattr(module, self.gate_up)(x), self.act, self.gate_first, codes_of(module)))


class FusedMlp:
    name = "fused_mlp"
    role = "mlp"
    saves = (
        "gate and up where they are, 32 bits per hidden element in a 16-bit dtype; stock keeps act(gate) and the product too"
    )

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        proven: dict[Hashable, str | None] = {}  # by kind and wiring, as long as the candidates live
        for name, module in model.named_modules():
            linears = [(k, m) for k, m in module.named_children() if is_linear(m)]
            if len(linears) != 2 or not takes_one_argument(module):
                continue
            for (first, a), (last, b) in itertools.permutations(linears):
                if a.in_features == b.out_features and a.out_features == 2 * b.in_features:
                    yield Candidate(name, module, {"linears": (first, last), "proven": proven})

    def probe(self, candidate: Candidate) -> str | None:
        gate_up, down = candidate.parts["linears"]
        others = others_of(candidate.module, (gate_up, down))
        if isinstance(others, str):
            return others
        wirings = (
            Wiring(gate_up, down, act, gate_first, others.held, on_h, on_y)
            for (on_h, on_y), gate_first, act in itertools.product(others.places(), (True, False), others.known)
        )
        return choose(candidate, wirings, others, "down(act(gate) * up) of the halves of one Linear")

    def apply(self, candidate: Candidate) -> None:
        install(candidate)
