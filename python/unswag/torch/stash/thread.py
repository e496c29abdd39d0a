"""What a thread knows of stashes: which are entered, which role runs, and who records or collects."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

from unswag.torch.stash.handles import ByReference, Leases


class Recorder(Protocol):
    """Writes down what passes the doors of a thread (see `recording` and `unswag.torch.audit`)."""

    leases: Leases  # shared by all doors while it records, so that a storage is counted once

    def note(
        self, t: torch.Tensor, owner: object, tier: str, role: str | None = None, packed: tuple[torch.Tensor, ...] | None = None
    ) -> None:  # fmt: skip
        """`t` was saved and costs what `tier` says, as `Handle.tier` (`packed` instead of itself, if that is given), until
        `owner` dies. `role`: the one that `plays` gave it."""


class Frame(NamedTuple):
    """A stash that is entered, and the pack hook by which it is known to be in use."""

    stash: Any  # a Stash
    pack: Callable[[torch.Tensor], Any]
    owner: bool  # False: entered again inside itself or another stash, whose door stays the one in use


class ThreadState(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame | None] = []  # None: stepped aside
        self.recorder: Recorder | None = None
        self.role: str | None = None
        self.references: list[ByReference] | None = None  # of the innermost `collecting_references`


state = ThreadState()


def idle() -> bool:
    """Whether this thread is in no stash, role, recording or collection: as tests must leave it."""
    return not state.frames and state.recorder is None and state.role is None and state.references is None


@contextlib.contextmanager
def role(name: str) -> Iterator[None]:
    """What is saved inside the block plays this role (one of `policy.ROLES`), whatever module runs."""
    before, state.role = state.role, name
    try:
        yield
    finally:
        state.role = before


def current_role() -> str | None:
    """The role set by `role`, if any."""
    return state.role


@contextlib.contextmanager
def collecting_references() -> Iterator[list[ByReference]]:
    """Yields a list that collects the handles of storages that are first held by reference inside the block (this thread
    only)."""
    before, state.references = state.references, []
    try:
        yield state.references
    finally:
        state.references = before


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """`recorder` is told of every tensor that passes a door inside the block (this thread only)."""
    before, state.recorder = state.recorder, recorder
    try:
        yield
    finally:
        state.recorder = before
