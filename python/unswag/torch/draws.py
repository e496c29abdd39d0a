"""Seeds and generator states from which random draws can be repeated, so that the draws themselves need not be kept: Philox
streams (docs/format.md section 3) and PyTorch's own generator."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 128  # bytes: more than a thread of CUDA loads at once, and less than its allocator aligns to


def draw_seed() -> int:
    """A seed from PyTorch's CPU generator, so that no device has to be waited for. `torch.manual_seed` makes it repeat, and so
    does a checkpoint, which restores the generator before it recomputes."""
    return int(torch.randint(1 << 62, (), device="cpu"))


@dataclasses.dataclass
class Draws:
    """The streams of one forward: one seed, and for each tensor an offset of its own, so that no draw is used twice."""

    seed: int
    offset: int = 0

    def next(self) -> tuple[int, int]:
        """(seed, offset) of a new stream, 2^42 draws away from the next one."""
        self.offset += 1 << 40  # blocks of four
        return self.seed, self.offset


class Mask(NamedTuple):
    """What F.dropout multiplies with: scale [] where `kept` [rows, cols] is true, else 0."""

    kept: Tensor
    scale: Tensor

    def times(self, x: Tensor, first_row: int) -> Tensor:
        """x times the rows from `first_row` on, rounded once."""
        return x.mul(self.kept[first_row : first_row + len(x)]).mul_(self.scale)


class DropoutInput(NamedTuple):
    """All that the draws of F.dropout(x, p) depend on, besides p and the random state.

    The CPU's draws follow the elements in one order for every dtype but float64. CUDA's kernel draws for as many elements at
    once as the dtype, the strides and the alignment (address modulo ALIGNMENT) let it load at once.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    alignment: int

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype) -> DropoutInput:
        """Of F.dropout(x.to(dtype), p)."""
        if x.dtype != dtype:
            copy = torch.empty_like(x, dtype=dtype, device="meta")
            return cls(x.shape, copy.stride(), dtype, x.device, 0)
        return cls(x.shape, x.stride(), dtype, x.device, x.data_ptr() % ALIGNMENT if x.is_cuda else 0)

    def draw(self, ps: Sequence[float]) -> tuple[list[Mask | None], Tensor]:
        """The masks of F.dropout(x, p) for one p after the other, None for p = 0, and the random state before. Afterwards
        PyTorch's generator for the device is in the state in which those calls leave it. A copy of it draws, so that draws in
        other threads do not change the masks."""
        own = _generator(self.device)
        generator = own.clone_state()
        state = generator.get_state()
        masks = [self._mask(p, generator) for p in ps]
        own.set_state(generator.get_state())
        return masks, state

    def draw_again(self, ps: Sequence[float], state: Tensor) -> list[Mask | None]:
        """The masks that `draw` gave; PyTorch's generator is not changed."""
        generator = _generator(self.device).clone_state()
        generator.set_state(state)
        return [self._mask(p, generator) for p in ps]

    def _mask(self, p: float, generator: torch.Generator) -> Mask | None:
        if not p:
            return None
        if self.device.type == "cuda":
            kept = torch._fused_dropout(self._input(), 1 - p, generator=generator)[1]
            wide = torch.promote_types(self.dtype, torch.float32)
        else:
            layout = torch.empty_strided(self.shape, self.stride, device="meta")
            drawn = torch.float64 if self.dtype == torch.float64 else torch.bool
            kept = torch.empty_like(layout, dtype=drawn, device=self.device).bernoulli_(1 - p, generator=generator)
            wide = self.dtype  # in which F.dropout divides its noise
        scale = torch.ones((), dtype=wide, device="cpu").div_(1 - p)
        return Mask(kept.bool().reshape(-1, self.shape[-1]), scale)

    def _input(self) -> Tensor:
        """An uninitialised input: CUDA's kernel needs one to multiply, but the draws do not depend on its values."""
        size = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        first = self.alignment // self.dtype.itemsize
        memory = torch.empty(first + size, dtype=self.dtype, device=self.device)
        return memory.as_strided(self.shape, self.stride, first)


def _generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
