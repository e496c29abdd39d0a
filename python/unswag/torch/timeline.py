"""What is alive at each instant of a training step, storage by storage.

An instant is the moment after an op. A `Timeline` is a dispatch mode: it sees every tensor that an op makes, and looks after
each op which storages are gone. It runs on real tensors and, with the same result, on tensors without data
(`torch._subclasses.FakeTensorMode`), which is how the planner runs it.

What autograd and the stash hold, Python's references and the gradients are all in it, because it asks the storages themselves.
Not in it: parameters, buffers and the batch; memory that a kernel takes and gives back within its op (`unswag.torch.scratch`
models that); what is made without an op.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unswag.ledger import role_of
from unswag.torch import loss_buffers, stash
from unswag.torch.audit import tracked
from unswag.torch.stash import storages

__all__ = ["Instant", "Thing", "Timeline"]

PHASES = ("forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Instant:
    """The moment after `op`, in a phase (`PHASES`), of a module. `scratch`: bytes that the op's kernel takes while it runs."""

    phase: str
    module: str
    op: str
    scratch: int = 0

    def __str__(self) -> str:
        where = {"loss": "the loss", "optimizer": "the optimizer's step"}.get(self.phase, self.phase)
        return f"{where} of {self.module}" if self.module and self.phase in ("forward", "backward") else where


@dataclass
class Thing:
    """A storage: made at instant `born`, first seen gone at instant `died` (None: alive at the end)."""

    born: int
    bytes: int
    module: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    died: int | None = None


@dataclass
class _Alive:
    ref: StorageWeakRef
    thing: Thing


class Timeline(TorchDispatchMode):
    """The instants of the steps that run inside it, and the things alive at them.

    model    whose modules are named; its parameters and buffers, and `inputs`, are not counted
    scratch  (op, arguments, result) -> bytes that its kernel takes while it runs
    """

    def __init__(self, model: nn.Module, inputs: Any, scratch: Callable[[Any, Any, Any], int] = lambda *_: 0) -> None:
        super().__init__()
        self.instants: list[Instant] = []
        self.things: list[Thing] = []
        self.phase = "forward"
        self.leases = stash.Leases()
        self.sequences: list[Any] = []
        self._model, self._scratch = model, scratch
        self._alive: dict[int, _Alive] = {}
        fixed = (*model.parameters(), *model.buffers(), *tree_leaves(inputs))
        self._fixed = {s._cdata: StorageWeakRef(s) for t in fixed for s in storages(t)}
        self._module, self._starts, self._names = "", [0], [""]
        self._stack = ExitStack()

    def __enter__(self) -> Timeline:
        self._stack.enter_context(tracked(self._model, self))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()
        self._look()

    @contextmanager
    def roles(self) -> Iterator[None]:
        """Around a forward under a stash: what passes its door gets the role that it plays."""
        with stash.recording(self):
            yield
        self.leases.clear()

    @property
    def module(self) -> str:
        """Of whose code runs; in a backward, of the module whose forward made the node."""
        node = torch._C._current_autograd_node()
        if self._module or node is None:
            return self._module
        return self._names[bisect.bisect_right(self._starts, node._sequence_nr()) - 1] if _is_numbered(node) else self._last

    @module.setter
    def module(self, name: str) -> None:
        self._module = name
        self._starts.append(torch.autograd._get_sequence_nr())
        self._names.append(name)

    def note(
        self, t: torch.Tensor, owner: object, tier: str, role: str | None = None, packed: tuple[torch.Tensor, ...] | None = None
    ) -> None:  # fmt: skip
        """For `stash.recording`."""
        role = role or stash.current_role()
        if tier != "device" or role is None:
            return
        for part in packed or (t,):
            for s in storages(part):
                if (known := self._alive.get(s._cdata)) is not None:
                    known.thing.role = role

    _last = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for more often than anything is computed
        out = func(*args, **(kwargs or {}))
        module = self._last = self.module
        backward = torch._C._current_autograd_node() is not None
        phase = "loss" if loss_buffers.is_inside_loss() else "backward" if backward and self.phase == "forward" else self.phase
        self._look()
        here = len(self.instants)
        self.instants.append(Instant(phase, module, str(func), self._scratch(func, args, out)))
        for t in tree_leaves(out):
            for s in storages(t):
                known = self._alive.get(s._cdata)
                if known is not None and known.thing.bytes == s.nbytes():
                    continue
                if s._cdata in self._fixed and not self._fixed[s._cdata].expired():
                    continue
                shape, dtype = tuple(t.shape), str(t.dtype).removeprefix("torch.")
                thing = Thing(here, s.nbytes(), module, role_of(module), shape, dtype)
                self.things.append(thing)
                self._alive[s._cdata] = _Alive(StorageWeakRef(s), thing)
        return out

    def name_gradients(self) -> None:
        """After a backward: the storages of gradients belong to their parameters' modules, under the role "gradient"."""
        for name, p in self._model.named_parameters():
            for s in storages(p.grad) if p.grad is not None else ():
                if (known := self._alive.get(s._cdata)) is not None:
                    known.thing.module, known.thing.role = name.rpartition(".")[0], "gradient"

    def _look(self) -> None:
        """Finds what has died since the last op."""
        here = len(self.instants)
        for key in [key for key, alive in self._alive.items() if alive.ref.expired()]:
            self._alive.pop(key).thing.died = here


def _is_numbered(node: Any) -> bool:
    return bool(node._sequence_nr() < 1 << 63)  # those that gather gradients have the largest number
