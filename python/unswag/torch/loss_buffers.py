"""What the audit needs to know of a chunked loss: which storages are its gradient buffers, and whether it is at work.

The gradients that a loss makes in its forward (dhidden, dweight) live until the backward, but they are no activations. They
are counted apart.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_buffers: dict[int, StorageWeakRef] = {}


class _Depth(threading.local):
    value = 0


_depth = _Depth()


def mark_loss_buffer(t: torch.Tensor) -> None:
    """Says that the storage of `t` is a gradient buffer of the loss. Held weakly."""
    for key in [key for key, storage in _buffers.items() if storage.expired()]:
        del _buffers[key]
    storage = t.untyped_storage()
    _buffers[storage._cdata] = StorageWeakRef(storage)


def is_loss_buffer(key: int | None) -> bool:
    """Whether the storage with this `_cdata`, which the caller knows to be alive, was marked."""
    storage = _buffers.get(key) if key is not None else None
    return storage is not None and not storage.expired()


def entries() -> int:
    """How many storages are registered; those that died since the last mark are still among them."""
    return len(_buffers)


@contextlib.contextmanager
def inside_loss() -> Iterator[None]:
    """Around the work of the loss, forward or backward: what lives only inside the block does not count as a peak of the
    model."""
    _depth.value += 1
    try:
        yield
    finally:
        _depth.value -= 1


def is_inside_loss() -> bool:
    """Whether this thread is inside a block of `inside_loss`."""
    return _depth.value > 0
