"""Where random draws come from: seeds of Philox streams (docs/format.md section 3), never the draws themselves."""

from __future__ import annotations

import dataclasses

import torch


def draw_seed() -> int:
    """A seed from torch's generator of the CPU, so that nobody waits for a device: `torch.manual_seed` gives the same again,
    and so does a checkpoint, which restores the generator before it recomputes."""
    return int(torch.randint(1 << 62, (), device="cpu"))


@dataclasses.dataclass
class Draws:
    """The streams of one forward: one seed, and for each tensor an offset of its own, so that no draw is used twice."""

    seed: int
    offset: int = 0

    def next(self) -> tuple[int, int]:
        """(seed, offset) of a stream that is 2^42 draws from the next."""
        self.offset += 1 << 40  # blocks of four
        return self.seed, self.offset
