"""Handles: what autograd keeps in place of a saved tensor, by reference or as a recipe that recomputes it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from unswag import _core
from unswag.torch.stash.layout import Layout, storage_key, storages, version_counter

_NOTHING = torch.empty(0)

Model = weakref.ref[nn.Module] | None  # asked for names in error messages only


class Handle:
    """Stands for one saved tensor between forward and backward. `Stash.door` makes one, `open` gives the tensor back.

    Ownership. A handle belongs to the autograd node that saved the tensor, or to a recipe of which it is an input, and to
    nobody else. No handle refers to the graph. So what it holds is freed with the node, by reference counting alone.

    tier   what it costs: "device" (the storage, or what was packed in its place, is in device memory because of this handle),
           "shared" (another handle holds that storage already), "parameter" (the model holds it), "recipe" (recomputed), "host"
           or "disk" (in a store)
    bytes  of device memory that this handle adds: of whole storages, each counted when its first handle is made, whoever else
           holds it; 0 for the tiers other than "device". The inputs of a recipe are handles, which count for themselves.
    """

    __slots__ = ()

    tier: str

    @property
    def bytes(self) -> int:
        raise NotImplementedError

    def open(self) -> torch.Tensor:
        """The saved tensor: same size, dtype and device, and the same values (with a codec: the decoded ones), without a graph.
        Strides are the same, too; only a decoded tensor whose elements had gaps comes back contiguous.

        May be called any number of times, from any thread, in any autograd mode, in the CUDA stream of the forward. Several
        threads may call it at once; a recipe may then run more than once. The result may be shared with other readers. If one
        of them writes into it, whoever opens a handle on it afterwards gets a fresh tensor or an error, never what was written.

        Raises RuntimeError if what it needs was overwritten since it was saved.
        """
        raise NotImplementedError


class ByReference(_core.stash.Reference, Handle):
    """Holds the tensor itself: an alias with its storage and version counter, and the version it was saved with.

    Where something smaller turns out to do, another handle can take its place (`replace_with`). What it holds is in the core
    (bindings/stash.cpp), where most of them are made.
    """

    __slots__ = ()

    alias: torch.Tensor
    version: int
    tier: str
    role: str | None
    model: Model
    lease: Lease | None
    replacement: Handle | None

    @property
    def bytes(self) -> int:
        if self.replacement is not None:
            return self.replacement.bytes
        return sum(s.nbytes() for s in storages(self.alias)) if self.tier == "device" else 0

    def replace_with(self, replacement: Handle) -> None:
        """Lets go of the tensor; `replacement` is opened from now on."""
        self.replacement, self.tier, self.lease, self.alias = replacement, replacement.tier, None, _NOTHING

    def _overwritten(self) -> None:
        raise _overwritten(self.alias, self.alias.shape, self.version, self._description())

    def _description(self) -> str:
        if self.tier == "parameter":
            name = self._parameter_name()
            return "a parameter" if name is None else f"the parameter {name!r}"
        return "saved for backward" if self.role is None else f"saved for backward as {self.role}"

    def _parameter_name(self) -> str | None:
        model = self.model() if self.model is not None else None
        named = () if model is None else model.named_parameters(remove_duplicate=False)
        return next((name for name, parameter in named if storage_key(parameter) == storage_key(self.alias)), None)


def _overwritten(t: torch.Tensor, shape: torch.Size, version: int, description: str) -> RuntimeError:
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{t.type()} {list(shape)}], which is {description}, is at version {t._version}; "
        f"expected version {version} instead. Hint: UnSwag holds it by reference until the backward pass; "
        "do not modify it between forward and backward, or clone it first."
    )


class Stored(Handle):
    """In a store, outside the device's memory: Stored(ticket, before), where `before` is the handle that was stored before it in
    this forward. A backward pass reads backwards, so that one is prefetched when this one is opened."""

    __slots__ = ("__weakref__", "before", "ticket")

    def __init__(self, ticket: Ticket, before: Stored | None) -> None:
        self.ticket, self.before = ticket, None if before is None else weakref.ref(before)

    @property
    def tier(self) -> str:  # type: ignore[override]
        return self.ticket.tier

    @property
    def bytes(self) -> int:
        return 0

    def open(self) -> torch.Tensor:
        t = self.ticket.get()
        before = None if self.before is None else self.before()
        if before is not None:
            before.ticket.prefetch()
        return t


class Ticket(Protocol):
    """What a store gives for a tensor (`unswag.torch.store.Ticket`)."""

    @property
    def tier(self) -> str: ...

    def prefetch(self) -> None: ...

    def get(self) -> torch.Tensor: ...


class VersionGuard:
    """Checks that a tensor was not overwritten since, without holding its memory."""

    __slots__ = ("counter", "role", "shape", "version")

    def __init__(self, t: torch.Tensor, role: str) -> None:
        self.counter, self.version, self.shape, self.role = version_counter(t), t._version, t.shape, role

    def check(self) -> None:
        if self.counter._version != self.version:
            raise _overwritten(self.counter, self.shape, self.version, f"saved for backward as {self.role}")


# What all handles by reference on one storage share. It ends with the last of them.
#
# replaceable  those handles that may be replaced later; None where no output waits for that (`PendingOutput`)
# writers      the autograd Functions of others among those who save the storage: their backward may write into it, and
#              PyTorch accepts that if nobody reads it after them
# checked      False while checkpoints alone save the storage: PyTorch accepts a change if they are never recomputed
# protects(node)  whether no program that PyTorch accepts changes the content before the backward; the Function of `node` is
#              trusted
Lease = _core.stash.Lease
Leases = _core.stash.Leases  # the leases that have not ended, by storage


class Recipe(_core.stash.Recipe):
    """A tensor that is not held but recomputed: `function(*inputs, **constants)`, where `inputs` are handles or None.

    Recipe(function, inputs, constants, layout, results). Run once for all its readers: the result stays until every handle
    alive has read it, until they die, until two younger results push it out, or until a reader writes into it; then it would be
    run again. The core counts the readers (bindings/stash.cpp).
    """

    __slots__ = ()

    function: Callable[..., torch.Tensor]
    inputs: tuple[Handle | None, ...]
    constants: dict[str, Any]
    layout: Layout

    def _run(self) -> torch.Tensor:
        if torch.is_inference_mode_enabled():  # the result has a version, whatever mode its reader is in
            with torch.inference_mode(False):
                return self._run()
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._run()
        return self._checked(self.function(*[None if x is None else x.open() for x in self.inputs], **self.constants))

    def _checked(self, result: torch.Tensor) -> torch.Tensor:
        """`result`, with the strides of the output; an error if it is another tensor."""
        size, stride, dtype, device = self.layout
        if result.size() != size or result.dtype != dtype or result.device != device:
            name = getattr(self.function, "__name__", str(self.function))
            raise RuntimeError(
                f"the recipe {name} made {result.dtype} {list(result.shape)} on {result.device}, but its output was "
                f"{dtype} {list(size)} on {device}; a recipe must give the same tensor whenever it is called"
            )
        if result.stride() != stride:
            result = result.new_empty_strided(size, stride).copy_(result)
        return result


Results = _core.stash.Results  # the recipes of one stash that hold a result for another reader: two at most, known weakly


class Recomputed(_core.stash.Recomputed, Handle):
    """A recipe's tensor, or a view of it that starts `offset` elements behind its start: Recomputed(recipe, size, stride,
    offset). `guard` is a `VersionGuard` where the tensor itself must not have been overwritten since, or None."""

    __slots__ = ()

    tier = "recipe"

    recipe: Recipe
    guard: VersionGuard | None

    @classmethod
    def view(cls, recipe: Recipe, t: torch.Tensor, offset: int) -> Recomputed | None:
        """For `t`, a view that starts `offset` elements into the recipe's (dense) tensor; None if it reaches outside."""
        return cls(recipe, t.size(), t.stride(), offset) if recipe.layout.contains(t, offset) else None

    @property
    def bytes(self) -> int:
        return 0
