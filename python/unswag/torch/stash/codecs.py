"""Codecs of the stash: a saved tensor in fewer bits, by the name that a policy gives (docs/format.md).

Block codecs cut rows (the last dimension) into blocks with a scale of their own. All of a block that contains a NaN or an
infinity is decoded as NaN.
"""

from __future__ import annotations

import torch

from unswag import _core
from unswag.torch import ops
from unswag.torch.draws import Draws

FEWEST = 1024  # a tensor of fewer elements is kept exactly: its packed form would save less than a call costs


def takes(codec: str, t: torch.Tensor) -> bool:
    """Whether `codec` makes `t` [..., cols] smaller. False for fewer than `FEWEST` elements, for rows so short that padding
    them to whole blocks outweighs the gain, and for dtypes and devices without kernels."""
    if not t.is_floating_point() or t.dtype not in ops.DTYPES or t.numel() < FEWEST or t.device.type not in ("cpu", "cuda"):
        return False
    cols = t.shape[-1]
    return _core.block_row_bytes(ops.BLOCKS[codec], cols) < cols * t.element_size()


def encode(codec: str, t: torch.Tensor, draws: Draws | None) -> tuple[torch.Tensor, ...]:
    """The packed form of `t` [..., cols]: uint8 [rows, bytes per row], which shares no memory with `t`. Rounded to nearest;
    stochastically (unbiased) where `draws` are given."""
    seed, offset = (0, 0) if draws is None else draws.next()
    with torch.no_grad():
        return (ops.block_encode(t, codec, draws is not None, seed, offset),)


def decode(codec: str, packed: tuple[torch.Tensor, ...], size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of that size and dtype, from the packed form that `encode` made."""
    return ops.block_decode(packed[0], codec, size[-1], dtype)
