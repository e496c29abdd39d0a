"""What a step of a model takes at any length: two steps without data, and a line through them for each instant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from unswag.plans import Alive
from unswag.torch import scratch
from unswag.torch.blueprint import Blueprint
from unswag.torch.loss import rows_of_chunk
from unswag.torch.planned_step import Step, planned_step
from unswag.torch.timeline import Instant
from unswag.torch.ways import Way

__all__ = ["Forecast", "Peak", "first_length"]

CUDA_TOKENS = 4096  # of the shorter of the two steps: from there on the chunks of the loss and of LoRA have their full size


@dataclass(frozen=True)
class Peak:
    """The highest instant of a step of so many tokens. `held`: bytes without weights and optimizer states."""

    tokens: int
    held: int
    instant: Instant
    step: Step
    at: int

    def alive(self, blueprint: Blueprint) -> list[Alive]:
        """What is alive there, largest first, of the whole model: like tensors of layers left out are counted with those that
        stand for them."""
        grown = self.tokens / self.step.tokens
        pieces = []
        for thing in self.step.things:
            if thing.born <= self.at and (thing.died is None or self.at < thing.died):
                lengths = (self.step.tokens, self.step.tokens * self.step.batch)
                per_token = any(n in thing.shape for n in lengths)
                nbytes = thing.bytes * (grown if per_token else 1) * blueprint.times(thing.module)
                shape = tuple(round(n * grown) if n in lengths else n for n in thing.shape)
                pieces.append(Alive(thing.module, thing.role, shape, thing.dtype, round(nbytes)))
        return sorted(pieces, key=lambda piece: -piece.bytes)


class Forecast:
    """The peak of one way to train, at any length; `blueprint.model` is prepared for the way. The shorter of the two steps has
    `tokens` if these are fewer than what fills the chunks of the loss and of LoRA, else that many. Below it a line says more
    than a step takes, because its chunks are smaller."""

    def __init__(self, blueprint: Blueprint, way: Way, batch: int, device: str, tokens: int | None = None) -> None:
        self.blueprint, self.way, self.batch, self.device = blueprint, way, batch, device
        self.first = min(first_length(blueprint, batch, device), tokens or 1 << 62)
        self._short, self._long = (self._step(n) for n in (self.first, 2 * self.first))
        self._stored = np.array([int(step.stored.max()) for step in (self._short, self._long)], np.float64)
        if way.tier:
            self._short, self._long = self._short.with_store(), self._long.with_store()
        self._lines = np.array(list(_lines(self._short, self._long)), np.float64)
        ends = self._short.at_end, self._long.at_end
        self._end = (2 * ends[0] - ends[1], (ends[1] - ends[0]) / self.first)

    def peak(self, tokens: int) -> Peak:
        """At this length."""
        held = self._lines[:, 1] + self._lines[:, 2] * tokens
        best = int(held.argmax())
        at = int(self._lines[best, 0])
        return Peak(tokens, int(np.ceil(held[best])), self._long.instants[at], self._long, at)

    def stored(self, tokens: int) -> int:
        """Bytes in the store of such a step; 0 without one."""
        if not self.way.tier:
            return 0
        first, second = self._stored
        return int(np.ceil(first + (second - first) * (tokens - self.first) / self.first))

    def at_end(self, tokens: int) -> int:
        """Bytes held after the backward of such a step."""
        return round(self._end[0] + self._end[1] * tokens)

    def _step(self, tokens: int) -> Step:
        return planned_step(self.blueprint, tokens, self.batch, self.device, surgery=self.way.surgery is not None)


def first_length(blueprint: Blueprint, batch: int, device: str) -> int:
    """The shorter length: chunks of the loss are full there, or it is one chunk up to the longer."""
    if device == "cuda":
        return -(-CUDA_TOKENS // batch)
    classes = max((p.shape[0] for _, p in blueprint.model.named_parameters() if p.ndim == 2), default=1)
    rows = rows_of_chunk(classes, False)
    tokens = max(scratch.SHORTEST, rows * -(-scratch.SHORTEST // rows)) if rows <= 2 * scratch.SHORTEST else scratch.SHORTEST
    return -(-tokens // batch)


def _lines(short: Step, long: Step) -> Iterator[tuple[int, float, float]]:
    """(instant of the longer step, bytes at length 0, bytes per token) for each instant. Where one of the two has more of the
    same op in the same place, because it works in more chunks, their highest stands for all."""
    of_short, of_long = _places(short), _places(long)
    for place, later in of_long.items():
        earlier = of_short.get(place, [])
        if len(earlier) != len(later):
            earlier, later = ([max(at, key=lambda i: step.held[i])] if (at := found) else []
                              for step, found in ((short, earlier), (long, later)))  # fmt: skip
        for a, b in zip(earlier, later, strict=False):
            slope = (long.held[b] - short.held[a]) / (long.tokens - short.tokens)
            yield b, short.held[a] - slope * short.tokens, slope


def _places(step: Step) -> dict[tuple[str, str, str], list[int]]:
    found: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for i, instant in enumerate(step.instants):
        if step.held[i] >= 0:
            found[instant.phase, instant.module, instant.op].append(i)
    return found
