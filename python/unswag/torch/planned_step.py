"""One training step of a blueprint, without data: what the whole model would hold at each instant."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from unswag.torch import scratch
from unswag.torch.blueprint import Blueprint
from unswag.torch.dry_run import copied, quietly
from unswag.torch.planned_device import planned_for
from unswag.torch.timeline import Instant, Thing, Timeline

__all__ = ["Step", "planned_step"]


@dataclass(frozen=True)
class Step:
    """Forward and backward of the whole model on `batch` sequences of `tokens` tokens.

    instants  of the layers that the blueprint has;  things  alive at them
    held      bytes on the device at each instant, scratch included, without weights and optimizer states; -1 where an instant
              says nothing of the whole model (inside a layer that stands for many: the first and the last are as high)
    stored    bytes of inputs of checkpointed layers at each instant, of the whole model
    largest   bytes of the largest of these
    at_end    bytes held after the backward: the gradients
    """

    tokens: int
    batch: int
    instants: list[Instant]
    things: list[Thing]
    held: np.ndarray
    stored: np.ndarray
    largest: int
    at_end: int

    @property
    def peak(self) -> int:
        """The most bytes that are held at any instant."""
        return int(self.held.max())

    @property
    def when(self) -> Instant:
        """The instant of the peak, the first if it is reached more than once."""
        return self.instants[int(self.held.argmax())]

    def drawn(self) -> dict[str, Any]:
        """The curve and its larger things, ready for JSON (`report.page`). Inside layers that stand for many the curve stays
        where it was."""
        held = np.where(self.held < 0, 0, self.held)
        shown = np.maximum.accumulate(np.where(self.held < 0, 0, np.arange(len(held))))
        least, last = self.peak // 1000, len(held)
        things = [
            [t.born, last if t.died is None else t.died, t.bytes, t.module, t.role, f"{t.dtype} {'×'.join(map(str, t.shape))}"]
            for t in self.things
            if t.bytes >= least
        ]
        return {"instants": [f"{i}, {i.op}" for i in self.instants], "held": held[shown].tolist(), "things": things}

    def with_store(self) -> Step:
        """The same step where a store keeps the inputs of checkpointed layers: two of them at a time are on the device, one
        that is computed with and one that is written or read."""
        away = np.maximum(self.stored - 2 * self.largest, 0)
        return replace(self, held=np.where(self.held < 0, -1, self.held - away))


def planned_step(blueprint: Blueprint, tokens: int, batch: int = 1, device: str = "cpu", surgery: bool = True) -> Step:
    """Runs forward and backward of `blueprint.model` as it is (surgery, checkpointing) under FakeTensorMode.

    device   "cpu" or "cuda": whose kernels are modelled, and whose chunks the loss takes
    surgery  whether roles are to be asked of a stash

    Raises what the model's own code raises on tensors without data.
    """
    with quietly(), planned_for(device):
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        model = copied(blueprint.model, fake)
        ids = fake.from_tensor(torch.zeros((batch, tokens), dtype=torch.long))
        line = Timeline(model, ids, scratch.of(device))
        with fake, line:
            with line.roles() if surgery else contextlib.nullcontext():
                value = model(input_ids=ids, labels=ids, use_cache=False).loss
            value.backward()
            line.name_gradients()
            del value
        model.zero_grad(set_to_none=True)
    return _whole(line, blueprint, tokens, batch)


def _whole(line: Timeline, blueprint: Blueprint, tokens: int, batch: int) -> Step:
    """Sums over the whole model. A layer that was left out holds what two like it hold both: what only one of the two holds is
    in flight between layers, and there once."""
    n = len(line.instants)

    def held(of: Callable[[Thing], bool]) -> np.ndarray:
        change = np.zeros(n + 1, np.int64)
        for thing in line.things:
            if of(thing):
                change[thing.born] += thing.bytes
                if thing.died is not None:
                    change[thing.died] -= thing.bytes
        return np.cumsum(change[:n])

    def of_all(of: Callable[[Thing], bool]) -> np.ndarray:
        total = held(of)
        for pair, times in blueprint.left_out.items():
            one, other = (held(lambda thing, layer=layer: of(thing) and _in(layer)(thing)) for layer in pair)  # type: ignore[misc]
            total += times * np.minimum(one, other)
        return total

    total, stored = of_all(lambda thing: True), of_all(_is_stored)
    largest = max((thing.bytes for thing in line.things if _is_stored(thing)), default=0)
    at_end = int(total[-1])
    total += np.array([instant.scratch for instant in line.instants], np.int64)
    pairs = [f"{layer}." for pair in blueprint.left_out for layer in pair]
    for i, instant in enumerate(line.instants):
        if any(f"{instant.module}.".startswith(layer) for layer in pairs):
            total[i] = -1
    return Step(tokens, batch, line.instants, line.things, total, stored, largest, at_end)


def _is_stored(thing: Thing) -> bool:
    return thing.role == "checkpoint"


def _in(layer: str) -> Callable[[Thing], bool]:
    return lambda thing: f"{thing.module}.".startswith(f"{layer}.")
