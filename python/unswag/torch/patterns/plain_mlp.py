"""Plain MLP whose forward calls its activation by name: fc2(F.gelu(fc1(x))). `activation` handles one that a module stores."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from unswag.torch.functional import activation
from unswag.torch.patterns.mlp import KEEP_INPUT, choose, codes_of, finish, install, is_linear, others_of
from unswag.torch.patterns.pattern import Candidate
from unswag.torch.patterns.probing import takes_one_argument


@dataclass(frozen=True)
class Wiring:
    """Which child is which, the activation between them, and the dropouts, if any."""

    fc1: str
    fc2: str
    act: str
    held: None
    on_h: str | None
    on_y: str | None

    @property
    def linears(self) -> tuple[str, ...]:
        return self.fc1, self.fc2

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        return finish(module, self, activation(getattr(module, self.fc1)(x), self.act, codes_of(module)))


class PlainMlp:
    name = "plain_mlp"
    role = "mlp"
    saves = "the pre-activation: 16 bits per hidden element in a 16-bit dtype; stock keeps the activation's output too, 32"

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        proven: dict[Hashable, str | None] = {}  # by kind and wiring, as long as the candidates live
        for name, module in model.named_modules():
            children = dict(module.named_children())
            linears = [k for k, m in children.items() if is_linear(m)]
            inverse = len(linears) == 2 and _shape(children[linears[0]]) == _shape(children[linears[1]])[::-1]
            if (
                inverse
                and takes_one_argument(module)
                and all(k in linears or type(m) is nn.Dropout for k, m in children.items())
            ):
                yield Candidate(name, module, {"linears": linears, "proven": proven})

    def probe(self, candidate: Candidate) -> str | None:
        linears = candidate.parts["linears"]
        others = others_of(candidate.module, linears)
        if isinstance(others, str):
            return others
        if others.held:
            return f"its activation is stored in {others.held}, where the pattern `activation` patches it"
        wirings = (
            Wiring(fc1, fc2, act, None, on_h, on_y)
            for (on_h, on_y), (fc1, fc2), act in itertools.product(others.places(), itertools.permutations(linears), KEEP_INPUT)
        )
        return choose(candidate, wirings, others, "fc2(act(fc1(x)))")

    def apply(self, candidate: Candidate) -> None:
        install(candidate)


def _shape(linear: nn.Module) -> tuple[int, int]:
    return linear.in_features, linear.out_features  # type: ignore[return-value]
