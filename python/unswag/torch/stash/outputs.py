"""Entries of the registries of a stash, made before a tensor is saved: outputs with a recipe, and tensors with a role."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from unswag import _core
from unswag.torch.stash.handles import ByReference, Handle, Lease, Recipe, Recomputed, Results
from unswag.torch.stash.layout import Layout, stream_of, version_counter
from unswag.torch.stash.thread import state

WeakStorage = _core.stash.WeakStorage  # as torch.multiprocessing.reductions.StorageWeakRef: `cdata`, `expired()`
_METADATA = "unswag"  # Node.metadata[_METADATA]: weak reference to the registry's entry for the node's output


def attach(entry: RememberedOutput, node: Any) -> None:
    """Lets `output_of(node)` find the entry of an output of that autograd node, while the entry lives."""
    node.metadata[_METADATA] = weakref.ref(entry)


def output_of(node: Any) -> RememberedOutput | None:
    """The entry that was attached to that autograd node, if it lives."""
    ref = node.metadata.get(_METADATA)
    return None if ref is None else ref()


class OpenStash(Protocol):
    """What an output asks of the stash that remembers it (see `Stash`)."""

    results: Results
    awaited: set[PendingOutput]

    def lease(self, t: torch.Tensor, checked: bool = True) -> Lease: ...

    def by_reference(self, t: torch.Tensor, lease: Lease, tier: str) -> ByReference: ...

    def reliable(self, t: torch.Tensor, key: int, node: Any = None) -> Handle | None: ...


class RememberedOutput(_core.stash.Output):
    """The registry's entry for an output that need not be held. `counter` shares the output's version counter and none of its
    memory."""

    recomputable = True  # False: not recomputed, but held in a form of its own (`unswag.torch.stash.rectified`)
    __slots__ = ()  # the fields are in the core, whose door reads them

    def __init__(self, output: torch.Tensor, layout: Layout, recipe: Recipe | None, chained: bool = False) -> None:
        self.storage = WeakStorage(output.untyped_storage())
        self.version = output._version
        self.counter = version_counter(output)
        self.layout = layout
        self.offset = int(output.storage_offset())
        self.number = output.output_nr  # among the outputs of its node
        self.stream = stream_of(output)
        self.recipe = recipe  # None: not yet, or not at all
        self.chained = chained  # made from another such output: no third is made from it (`unswag.torch.stash.rectified`)
        self.casts: dict[torch.dtype, Recipe] = {}

    def unchanged(self) -> bool:
        return self.counter._version == self.version

    def usable_recipe(self) -> Recipe | None:
        """The recipe, if the output can be recomputed now."""
        return self.recipe

    def handle(self, t: torch.Tensor) -> Handle | None:
        """A handle for `t`, which shares the output's storage; None if it is not all inside the output, unchanged, or used
        in another stream."""
        if t._version != self.version or not self.unchanged() or stream_of(t) != self.stream:
            return None
        recipe = self.usable_recipe()
        return None if recipe is None else Recomputed.view(recipe, t, int(t.storage_offset() - self.offset))

    def cast(self, t: torch.Tensor, offset: int) -> Recomputed | None:
        """A handle for `t`, a view that starts `offset` elements into a dtype cast of the output; a dtype has one recipe."""
        recipe, key = self.usable_recipe(), t.dtype
        if recipe is None:
            return None
        if key not in self.casts:
            source = recipe.layout
            whole = Recomputed(recipe, source.size, source.stride, 0)
            self.casts[key] = Recipe(_cast, (whole,), {"dtype": key}, source._replace(dtype=key), recipe.results)
        return Recomputed.view(self.casts[key], t, offset)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype, copy=True)  # never x itself, which has readers of its own


class UnsavedInput:
    """An input of a recipe that no op saves, so that a program may overwrite it before the backward: PyTorch would not notice.

    A recipe may rely on it once an op saves it unchanged (PyTorch refuses a change then), or on a copy (`alias` is what to
    copy, where that is smaller than the output). Otherwise the output is held, and nothing of this.
    """

    __slots__ = ("alias", "counter", "layout", "offset", "storage", "version")

    def __init__(self, t: torch.Tensor) -> None:
        self.storage = WeakStorage(t.untyped_storage())
        self.version, self.counter = t._version, version_counter(t)
        self.layout, self.offset = Layout.of(t), int(t.storage_offset())
        self.alias: torch.Tensor | None = None

    @property
    def key(self) -> int:
        return self.storage.cdata

    def unchanged(self) -> bool:
        return self.counter._version == self.version

    def span(self) -> int:
        """Elements of the stretch of the storage that it lies in, the gaps with them."""
        return 1 + sum((n - 1) * step for n, step in zip(self.layout.size, self.layout.stride, strict=True))

    def copy_bytes(self) -> int:
        """The size of `copy`."""
        return min(self.span(), self.layout.size.numel()) * self.layout.dtype.itemsize

    def copy(self) -> torch.Tensor | None:
        """Its content in memory of its own; None if it is gone or was changed."""
        t, span = self.alias, self.span()
        if t is None or not self.unchanged():
            return None
        if not 0 < span <= t.numel():
            return t.clone()
        return t.as_strided((span,), (1,), self.offset).clone().as_strided(self.layout.size, self.layout.stride)

    def found_in(self, t: torch.Tensor) -> torch.Tensor | None:
        """The same tensor, with its version counter, in the storage of `t`, which an op saves; None if it was changed."""
        if not self.unchanged() or t._version != self.version or t.dtype != self.layout.dtype or t.is_conj() or t.is_neg():
            return None
        again = self.counter.detach()
        again.data = t.detach().as_strided(self.layout.size, self.layout.stride, self.offset)
        return again


class PendingOutput(RememberedOutput):
    """The entry of an output with unsaved inputs. It has no recipe before all of them are reliable or copied; handles that
    hold the output until then are replaced. `inputs` are handles, None or unsaved; the handle of the copy of an unsaved one is
    in `copied`, by its place."""

    __slots__ = ("constants", "copied", "function", "inputs", "replaceable", "stash")

    def __init__(
        self, output: torch.Tensor, layout: Layout, stash: OpenStash, function: Callable[..., torch.Tensor], inputs: list[Any],
        constants: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(output, layout, None)
        self.stash, self.function, self.inputs, self.constants = stash, function, inputs, constants
        self.copied: dict[int, weakref.ref[ByReference]] = {}
        # Leases on the output or a cast of it; of a cast, where it starts in its storage.
        self.replaceable: list[tuple[weakref.ref[Lease], int | None]] = []

    def unsaved(self) -> list[UnsavedInput]:
        return [x for x in self.inputs if isinstance(x, UnsavedInput)]

    def usable_recipe(self) -> Recipe | None:
        if self.recipe is None and all(x.alias is not None and x.unchanged() for x in self.unsaved()):
            handles = list(self.inputs)
            for i, x in enumerate(handles):
                if isinstance(x, UnsavedInput) and (copy := x.copy()) is not None:
                    lease = self.stash.lease(copy)
                    handles[i] = self.stash.by_reference(copy, lease, "device")
                    self.copied[i] = weakref.ref(handles[i])
                    x.alias = None
            self._set_recipe(handles)
        return self.recipe

    def input_saved(self, t: torch.Tensor, key: int) -> None:
        """An op saves `t`, whose storage is that of an unsaved input."""
        for i, x in enumerate(self.inputs):
            if not isinstance(x, UnsavedInput) or x.key != key or (again := x.found_in(t)) is None:
                continue
            handle = self.stash.reliable(again, key)
            if handle is None:
                continue
            self.inputs[i] = handle
            copied = self.copied[i]() if i in self.copied else None
            if copied is not None:
                copied.replace_with(handle)
        if self.recipe is None and not self.unsaved():
            self._set_recipe(self.inputs)
            for ref, cast in self.replaceable:
                lease = ref()
                for reference in (lease and lease.replaceable) or ():
                    self._replace(reference(), cast)
            self.replaceable.clear()
            self.stash.awaited.discard(self)

    def replace_later(self, lease: Lease, cast: int | None) -> None:
        """What `lease` holds, the output or a cast of it, is to be replaced once there is a recipe."""
        lease.replaceable = []
        self.replaceable.append((weakref.ref(lease), cast))
        self.stash.awaited.add(self)

    def _set_recipe(self, handles: list[Any]) -> None:
        self.recipe = Recipe(self.function, tuple(handles), self.constants, self.layout, self.stash.results)

    def _replace(self, reference: ByReference | None, cast: int | None) -> None:
        if reference is None or reference.alias._version != reference.version:
            return
        t = reference.alias
        again = self.handle(t) if cast is None else self.cast(t, int(t.storage_offset()) - cast)
        if isinstance(again, Recomputed):
            reference.replace_with(again)
            if state.recorder is not None:
                state.recorder.note(t, again, "recipe")


class MarkedTensor:
    """The registry's entry for a tensor that plays a role: where it lies in its storage, and the recipe that gives it back once
    it is encoded (`codec`; None: exactly) or stored (`tier`; None: on the device). The recipe belongs to its handles."""

    __slots__ = ("codec", "layout", "offset", "recipe", "role", "storage", "tier", "version")

    def __init__(self, t: torch.Tensor, role: str, codec: str | None, tier: str | None) -> None:
        self.storage = WeakStorage(t.untyped_storage())
        self.role, self.codec, self.tier = role, codec, tier
        self.layout, self.offset = Layout.of(t), int(t.storage_offset())
        self.recipe: weakref.ref[Recipe] | None = None
        self.version = 0

    def whole(self, t: torch.Tensor) -> torch.Tensor | None:
        """The marked tensor, of which `t` is all or a part in any order; None if `t` is something else in its storage."""
        start = int(t.storage_offset()) - self.offset
        if t.dtype != self.layout.dtype or t.is_conj() or t.is_neg():
            return None
        if (t.size(), t.stride(), start) != (self.layout.size, self.layout.stride, 0) and not (
            t.numel() and self.layout.is_dense() and self.layout.contains(t, start)
        ):
            return None
        return t.detach().as_strided(self.layout.size, self.layout.stride, self.offset)
