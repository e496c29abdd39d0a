"""For which device a step without data is planned: its tensors say "cpu", and chunks depend on the device."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

__all__ = ["is_planned", "on_cuda", "planned_for"]

_planned: contextvars.ContextVar[str | None] = contextvars.ContextVar("unswag_planned_device", default=None)


@contextlib.contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Inside it chunks are as large as on a device of this type."""
    token = _planned.set(device)
    try:
        yield
    finally:
        _planned.reset(token)


def is_planned() -> bool:
    """Whether a step is planned: all of it runs on tensors without data, the loss too."""
    return _planned.get() is not None


def on_cuda(t: torch.Tensor) -> bool:
    """Whether what works on `t` in chunks takes those of a GPU."""
    if torch.compiler.is_dynamo_compiling():
        return t.is_cuda
    planned = _planned.get()
    return t.is_cuda if planned is None else planned == "cuda"
