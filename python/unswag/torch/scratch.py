"""Memory that a step takes beside its tensors: what libraries keep once they have run, and what kernels take while they run.

On the CPU these are constants, fitted to the process memory of small models on 1,536 tokens (bench/planner.py): products and
attention take less than 2 MiB while they run, and what is resident follows the tensors alive to 0.5 MiB. Those of CUDA are read
from the sources of the kernels and libraries; they were not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["SHORTEST", "fixed", "of", "reserved"]

SHORTEST = 1024  # tokens of the shorter of two steps on a CPU
MIB = 1 << 20

LIBRARIES = 14.6 * MIB  # on the CPU: code that kernels are compiled to, pools, imports of the first step
TRAINED = 2.2 * MIB  # more of it where weights are trained
RECOMPUTED = 5.9 * MIB  # more of it with gradient checkpointing

WORKSPACE = 32 * MIB  # of cuBLAS on Hopper; 8 MiB before
CONTEXT = 480 * MIB  # of CUDA: the driver's and the kernels' code; not PyTorch's, and on the device all the same
SPLIT = 1.03  # what the allocator of CUDA holds for what is allocated: rounding, and pieces of blocks


def of(device: str) -> Callable[[Any, Any, Any], int]:
    """(op, arguments, result) -> bytes that the op's kernel takes on such a device while it runs."""
    return _of_cuda if device == "cuda" else lambda *_: 0


def _of_cuda(func: Any, args: Any, out: Any) -> int:
    """FlashAttention-2's backward sums dq in float32, and makes dk and dv for each query head."""
    if "flash_attention" not in str(func) or "backward" not in str(func):
        return 0
    _, query, key = args[:3]
    return int(4 * query.numel() + 2 * (query.numel() if key.shape[1] != query.shape[1] else 0) * query.element_size())


def fixed(device: str, trains_weights: bool, recomputes: bool) -> int:
    """Bytes that libraries keep from the first step on, and that PyTorch's allocator knows (on CUDA)."""
    if device == "cuda":
        return WORKSPACE
    return round(LIBRARIES + trains_weights * TRAINED + recomputes * RECOMPUTED)


def reserved(allocated: int) -> int:
    """What a process takes of a CUDA device when so much is allocated at its peak."""
    return round(allocated * SPLIT) + CONTEXT
