"""What optimizers hold between steps, and what their step takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

__all__ = ["OPTIMIZERS", "Optimizer"]

BLOCK = 256  # numbers per scale of bitsandbytes' 8-bit states
SMALL = 4096  # tensors below have 32-bit states there

Trained = Iterable[tuple[float, torch.nn.Parameter]]  # (how many there are of it, parameter)


@dataclass(frozen=True)
class Optimizer:
    """states     bytes that it keeps for one parameter
    temporaries   how many copies of a parameter's gradient its step makes: on the CPU one parameter after the other, on CUDA
                  (`foreach`) of all at once
    """

    states: Callable[[torch.nn.Parameter], int]
    temporaries: int

    def held(self, trained: Trained) -> int:
        """Bytes between steps."""
        return round(sum(times * self.states(p) for times, p in trained))

    def step(self, trained: Trained, device: str) -> int:
        """Bytes that a step takes beside states and gradients."""
        sizes = [(times, self.temporaries * p.nbytes) for times, p in trained]
        if device == "cuda":
            return round(sum(times * n for times, n in sizes) / max(1, self.temporaries))
        return max((n for _, n in sizes), default=0)


def _adam_8bit(p: torch.nn.Parameter) -> int:
    return 8 * p.numel() if p.numel() < SMALL else 2 * p.numel() + 8 * -(-p.numel() // BLOCK)


OPTIMIZERS = {
    "adamw": Optimizer(lambda p: 2 * p.nbytes, 2),  # torch.optim.AdamW: both moments in the parameter's dtype
    "adamw_8bit": Optimizer(_adam_8bit, 0),  # bitsandbytes.optim.AdamW8bit
    "sgd": Optimizer(lambda p: 0, 0),  # without momentum
}
