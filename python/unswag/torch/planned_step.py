"""One training step of a blueprint, without data: what the whole model would hold at each instant."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from unswag.torch import scratch
from unswag.torch.blueprint import Blueprint
from unswag.torch.dry_run import copied
from unswag.torch.planned_device import planned_for
from unswag.torch.stash import Stash
from unswag.torch.timeline import Instant, Thing, Timeline

__all__ = ["Step", "planned_step"]


@dataclass(frozen=True)
class Step:
    """Forward and backward of the whole model on `batch` sequences of `tokens` tokens.

    instants  of the layers that the blueprint has;  things  alive at them
    held      bytes on the device at each instant, scratch included, without weights and optimizer states; -1 where an instant
              says nothing of the whole model (inside a layer that stands for many: the first and the last are as high)
    away      bytes by memory other than the device, at their highest
    at_end    bytes held after the backward: the gradients
    """

    tokens: int
    batch: int
    instants: list[Instant]
    things: list[Thing]
    held: np.ndarray
    at_end: int

    @property
    def peak(self) -> int:
        """The most bytes that are held at any instant."""
        return int(self.held.max())

    @property
    def when(self) -> Instant:
        """The instant of the peak, the first if it is reached more than once."""
        return self.instants[int(self.held.argmax())]

    def alive(self) -> list[Thing]:
        """What is alive at the peak, largest first, in the layers that the blueprint has."""
        at = int(self.held.argmax())
        return sorted((t for t in self.things if t.born <= at and (t.died is None or at < t.died)), key=lambda t: -t.bytes)


def planned_step(blueprint: Blueprint, tokens: int, batch: int = 1, device: str = "cpu", surgery: bool = True) -> Step:
    """Runs forward and backward of `blueprint.model` as it is (surgery, checkpointing) under FakeTensorMode.

    device   "cpu" or "cuda": whose kernels are modelled, and whose chunks the loss takes
    surgery  whether roles are to be asked of a stash

    Raises what the model's own code raises on tensors without data.
    """
    with _quiet(), planned_for(device):
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

    total = held(lambda thing: True)
    for (one, other), times in blueprint.left_out.items():
        total += times * np.minimum(held(_in(one)), held(_in(other)))
    at_end = int(total[-1])
    total += np.array([instant.scratch for instant in line.instants], np.int64)
    pairs = [f"{layer}." for pair in blueprint.left_out for layer in pair]
    for i, instant in enumerate(line.instants):
        if any(f"{instant.module}.".startswith(layer) for layer in pairs):
            total[i] = -1
    return Step(tokens, batch, line.instants, line.things, total, at_end)


def _in(layer: str) -> Callable[[Thing], bool]:
    return lambda thing: f"{thing.module}.".startswith(f"{layer}.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("torch._subclasses.fake_tensor")  # prints each error that it raises, with its traceback
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
