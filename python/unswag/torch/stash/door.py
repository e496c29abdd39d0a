"""The door of a stash: its pack hook, which chooses a handle for each tensor that autograd saves (see the package)."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils import checkpoint as torch_checkpoint

from unswag import _core
from unswag.policy import Policy
from unswag.torch.draws import Draws, draw_seed
from unswag.torch.stash import codecs
from unswag.torch.stash.handles import ByReference, Handle, Lease, Leases, Recipe, Recomputed, Results, Stored, VersionGuard
from unswag.torch.stash.hooks import can_enter, top_hooks, torch_interpreter, warn_compiled, warn_once
from unswag.torch.stash.layout import (
    Layout,
    cast_from,
    dense_stride,
    is_cast_of_parameter,
    is_parameter,
    is_whole_cast,
    storage_key,
    stream_of,
    version_counter,
)
from unswag.torch.stash.outputs import MarkedTensor, PendingOutput, RememberedOutput, UnsavedInput, attach, output_of
from unswag.torch.stash.thread import Frame, state


def remember(
    output: torch.Tensor, recompute: Callable[..., torch.Tensor], *inputs: torch.Tensor | None, **constants: Any
) -> None:
    """Tells the stash that `output == recompute(*inputs, **constants)`, bit for bit, whenever it is called.

    Call it on what `Function.apply` returned (inside `forward` autograd is off and this does nothing). `recompute` is an op
    or a module-level function, independent of autocast and of random state; it must not write to its inputs. Inputs may
    be parameters, activations, outputs remembered before, or None. A program may overwrite an input that no op saves, and
    PyTorch would not notice; then a copy of the input is held if that is smaller than `output`, or else `output` is.

    Costs nothing unless `output` is saved for backward. Does nothing when no stash is active on this thread, so that ops can
    always call it.
    """
    if torch.compiler.is_dynamo_compiling() or not state.frames:
        return
    stash = Stash.current()
    if stash is None or not output.requires_grad:
        return
    if stash.remembers is None or not stash.remembers(output, recompute, inputs, constants):
        stash.register(output, recompute, inputs, constants)


def plays(role: str, *tensors: torch.Tensor) -> None:
    """Says that `tensors` play `role` (one of `policy.ROLES`): any op that saves one of them while this stash is active keeps
    it in the form that the policy names for that role.

    An op calls it before its `Function.apply`, for what it will save and what others may save of it. Does nothing when no stash
    is active on this thread or its policy keeps the role exactly.
    """
    if torch.compiler.is_dynamo_compiling():
        return
    frame = state.frames[-1] if state.frames else None
    if frame is None or not frame.stash.has_forms:
        return
    stash = Stash.current()
    if stash is not None:
        stash.mark(role, tensors)


unpack: Callable[[Handle], torch.Tensor] = _core.stash.unpack  # handle.open(): the unpack hook of every stash


def leave() -> None:
    """Leaves the stash entered last on this thread."""
    frame = state.frames.pop()
    if frame is not None and frame.owner:
        frame.stash.close()


def step_aside() -> None:
    """Stands for a stash that is not entered, until `leave`."""
    state.frames.append(None)


class Entries(NamedTuple):
    """How many entries the registries of a stash have, for tests and debugging.

    outputs  outputs with a recipe or a form of their own;  marks  storages with tensors that play a role
    pending  storages for which a recipe waits;  awaited  outputs whose handles are to be replaced
    leases   storages that are held by reference
    """

    outputs: int
    marks: int
    pending: int
    awaited: int
    leases: int


class OpenStores(Protocol):
    """The stores of a model (`unswag.torch.store.Stores`)."""

    def of(self, tier: str) -> Any:
        """The store of that tier, whose `put(t, role)` gives a `handles.Ticket`."""


_NOT_ENTERED: Any = None  # what a stash has beside its registries exists while it is entered


class Stash:
    """Keeps what one forward saves for its backward in the smallest form. A context manager around the model's forward.

    policy  a `Policy` or its name
    model   only for names in error messages; held weakly
    stores  where the policy's tiers are kept (`unswag.torch.store.Stores`); None: in stores of its own

    Has no effect when gradients are off, when other saved-tensor hooks are already in place (a checkpoint, save_on_cpu or an
    offloader around the model: ours would switch theirs off), inside another stash (that one stays in use), under torch.func
    and under torch.compile. Except for the first and the third, it warns once.
    """

    def __init__(
        self, policy: str | Policy = "exact", model: nn.Module | None = None, stores: OpenStores | None = None
    ) -> None:  # fmt: skip
        self.policy = Policy.named(policy)
        self.has_forms = self.policy.lossy or bool(self.policy.tiers)  # whether a role is kept otherwise than by reference
        self._stores = stores
        self._stored: weakref.ref[Stored] | None = None  # the handle that was stored last
        self.results: Results = _NOT_ENTERED
        self.awaited: set[PendingOutput] = set()  # those whose handles are to be replaced
        self._model = weakref.ref(model) if model is not None else None
        self._outputs: dict[int, RememberedOutput] = {}  # by storage
        self._marks: dict[int, list[MarkedTensor]] = {}  # by storage
        self._pending: dict[int, list[weakref.ref[PendingOutput]]] = {}  # by the storage of their unsaved inputs
        self._leases: Leases = _NOT_ENTERED
        self.remembers: Callable[..., bool] | None = None  # `register` in the core; False where it is not done
        self._draws: Draws | None = None

    @staticmethod
    def current() -> Stash | None:
        """The stash whose door a tensor saved now, on this thread, would pass; None if there is none."""
        frame = state.frames[-1] if state.frames else None
        if frame is None or (torch_interpreter is not None and torch_interpreter() is not None):
            return None
        hooks = top_hooks()
        return frame.stash if hooks is not None and hooks[0] is frame.pack else None

    def __enter__(self) -> Stash:
        if torch.compiler.is_compiling():
            warn_compiled()
        else:
            state.frames.append(self._frame())
        return self

    def __exit__(self, *exception: object) -> None:
        if not torch.compiler.is_compiling():
            leave()

    def _frame(self) -> Frame | None:
        if not torch.is_grad_enabled() or not can_enter():
            return None
        if top_hooks() is None:
            return self._open(self._pack())
        within = Stash.current()
        if within is None:
            warn_once("other saved-tensor hooks are in place around it (a checkpoint or an offloader); they stay in use")
            return None
        return self._open(self._pack()) if within.passive else state.frames[-1]._replace(owner=False)  # type: ignore[union-attr]

    def enter_behind(self, collect: Callable[[Any], Any], told: Callable[..., Any]) -> None:
        """Enters on top of whatever hooks are in place (see `leave`). Of each saved tensor `collect` gets
        `told(handle, shape, dtype, device)`."""
        state.frames.append(self._open(self._pack(collect, told)))

    def _pack(self, collect: Callable[[Any], Any] | None = None, told: Callable[..., Any] | None = None) -> Any:
        """The pack hook: the core's door, which makes the common handles itself and asks `door` for the others."""
        self.results = Results()
        self._leases = Leases() if state.recorder is None else state.recorder.leases
        if type(self).door is not _DOOR:
            return self.door if collect is None or told is None else functools.partial(_collecting, self.door, collect, told)
        door = _core.stash.Door(
            self.door, self._leases, self.results, self._outputs, self._marks, self._pending, state,
            self._model, ByReference, Recomputed, RememberedOutput, Recipe, Layout, version_counter,
            (_CHECKPOINT, _FUNCTION), collect, told,
        )  # fmt: skip
        if type(self).register is _REGISTER:
            self.remembers = door.remember
        return door

    def _open(self, pack: Callable[[torch.Tensor], Any]) -> Frame:
        if self.policy.rounding == "stochastic":
            self._draws = Draws(draw_seed())
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
        return Frame(self, pack, owner=True)

    def close(self) -> None:
        """Takes the hooks away and empties the registries. `leave` calls it for the stash that put the hooks there."""
        torch._C._autograd._pop_saved_tensors_default_hooks()
        self._outputs.clear()
        self._marks.clear()
        self._pending.clear()
        self.awaited.clear()
        self._stored = None
        self.results = self._leases = _NOT_ENTERED
        self.remembers = None

    passive = False  # True: a stash entered inside this one takes over

    def door(self, t: torch.Tensor, depth: int = 1) -> Handle:
        """The pack hook: returns the handle that stands for `t` until the backward pass; `unpack` gives the tensor back.

        depth  how many Python frames lie between this one and the code that saves `t`
        """
        if is_parameter(t) or is_cast_of_parameter(t):
            return self.by_reference(t, Lease(), "parameter")
        key = storage_key(t)
        if key is None:
            return self.by_reference(t, Lease(), "device")
        saver = sys._getframe(depth)
        checkpoint = saver.f_globals is _CHECKPOINT
        lease = self._leases.get(key)
        if lease is not None:
            if saver.f_code is _APPLY:
                lease.writers += _writers(saver)
            if not (lease.checked or checkpoint):
                lease.checked = True
                self._tell_pending(t, key)
            return self.by_reference(t, lease, "shared")
        handle: Handle | None = self._from_recipe(t, key)
        if handle is not None:
            if state.recorder is not None and isinstance(handle, Recomputed):
                state.recorder.note(t, handle, "recipe")
            if checkpoint:
                _guard(t, handle)
            return handle
        handle = self._coded(t, key)
        if handle is None:
            lease = self.lease(t, checked=not checkpoint)
            if saver.f_code is _APPLY:
                lease.writers += _writers(saver)
            if self._pending:
                self._replace_later(t, key, lease)
            handle = self.by_reference(t, lease, "device")
            if checkpoint:
                return handle
        elif checkpoint:
            _guard(t, handle)
        self._tell_pending(t, key)
        return handle

    def by_reference(self, t: torch.Tensor, lease: Lease, tier: str) -> ByReference:
        """A handle that holds `t` under that lease; `tier` as `Handle.tier`."""
        if state.recorder is not None:
            state.recorder.note(t, lease, tier)
        reference = ByReference(t, tier, state.role, self._model, lease)
        if lease.replaceable is not None:
            lease.replaceable.append(weakref.ref(reference))
        if state.references is not None and tier == "device":
            state.references.append(reference)
        return reference

    def packed(
        self, parts: tuple[torch.Tensor, ...], role: str | None, tier: str | None = None
    ) -> tuple[ByReference | Stored, ...]:  # fmt: skip
        """Handles that hold tensors of our own making, in which a saved tensor of that role is packed, on the device or in the
        store of that tier."""
        if tier is None:
            return tuple(ByReference(part, "device", role, self._model) for part in parts)
        return tuple(self._store(part, role, tier) for part in parts)

    def _store(self, part: torch.Tensor, role: str | None, tier: str) -> Stored:
        if self._stores is None:
            from unswag.torch.store import Stores  # which is above the stash

            self._stores = Stores()
        before = None if self._stored is None else self._stored()
        handle = Stored(self._stores.of(tier).put(part, role), before)
        self._stored = weakref.ref(handle)
        return handle

    def free(self, t: torch.Tensor) -> Handle | None:
        """A handle for `t` if one costs nothing: its storage is held already, or it has a recipe."""
        key = storage_key(t)
        if key is None or is_parameter(t):
            return None
        lease = self._leases.get(key)
        if lease is not None:
            return self.by_reference(t, lease, "shared") if lease.protects(None) else None
        output = self._outputs.get(key)
        return self._from_recipe(t, key) if output is None or output.recomputable else None

    def lease(self, t: torch.Tensor, checked: bool = True) -> Lease:
        """A new lease on the storage of `t`, which is held by reference from now on, until the last handle under it dies."""
        return self._leases.add(t.untyped_storage(), checked)

    def reliable(self, t: torch.Tensor, key: int, node: Any = None) -> Handle | None:
        """A handle for `t`, an input of the op of `node`, that no program which PyTorch accepts can invalidate: another op
        saves `t`, it can be recomputed without its storage, or it is held in fewer bits. None if nothing of this applies."""
        lease = self._leases.get(key)
        if lease is not None:
            return self.by_reference(t, lease, "shared") if lease.protects(node) else None
        handle = self._from_recipe(t, key)
        return self._coded(t, key) if handle is None else handle

    def register(
        self,
        output: torch.Tensor,
        recompute: Callable[..., torch.Tensor],
        inputs: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> None:
        """Does the work of `remember`, for the stash in use."""
        self._prune()
        key = storage_key(output)
        layout = Layout.of(output)
        if key is None or not (output.is_contiguous() or layout.is_dense()):
            return
        handles = [None if x is None else self._input(x, output.grad_fn) for x in inputs]
        entry: RememberedOutput
        if any(type(x) is UnsavedInput for x in handles):
            entry = self._waiting(PendingOutput(output, layout, self, recompute, handles, constants), inputs)
        else:
            entry = RememberedOutput(output, layout, Recipe(recompute, tuple(handles), constants, layout, self.results))
        self.add_output(key, entry, output.grad_fn)

    def add_output(self, key: int, entry: RememberedOutput, node: Any) -> None:
        """Puts an output of the autograd node `node` (None if it has none) into the registry, by its storage."""
        self._outputs[key] = entry
        if node is not None:
            attach(entry, node)

    def mark(self, role: str, tensors: tuple[torch.Tensor, ...]) -> None:
        """Does the work of `plays`, for the stash in use."""
        wanted, tier = self.policy.codec(role), self.policy.tier(role)
        if wanted is None and tier is None:
            return
        self._prune()
        for t in tensors:
            key = storage_key(t)
            if key is None or t.numel() < codecs.FEWEST:
                continue
            codec = wanted if wanted is not None and codecs.takes(wanted, t) else None
            if codec is None and tier is None:
                continue
            marks = self._marks.setdefault(key, [])
            if not any((mark.layout, mark.offset) == (Layout.of(t), t.storage_offset()) for mark in marks):
                marks.append(MarkedTensor(t, role, codec, tier))

    def entries(self) -> Entries:
        """How many entries the registries have now."""
        return Entries(len(self._outputs), len(self._marks), len(self._pending), len(self.awaited), len(self._leases or ()))

    def _from_recipe(self, t: torch.Tensor, key: int) -> Handle | None:
        self._prune()
        output, cast = self._source(t, key)
        if output is None:
            return None
        return output.handle(t) if cast is None else output.cast(t, int(t.storage_offset()) - cast)

    def _source(self, t: torch.Tensor, key: int) -> tuple[RememberedOutput | None, int | None]:
        """The entry of the output that shares the storage of `t`, and None; or of that of which `t` is a part of a dtype cast,
        and where the cast starts in its storage."""
        output = self._outputs.get(key)
        if output is not None:
            return output, None
        copy = t if t._base is None else t._base
        source, number = cast_from(copy)
        if source is None:
            return None, None
        output = output_of(source)
        if (
            output is None
            or not output.recomputable
            or output.number != number
            or not output.unchanged()
            or stream_of(t) != output.stream
            or copy._version
            or t._version
            or not is_whole_cast(copy, output.layout)
        ):
            return None, None
        return output, int(copy.storage_offset())

    def _replace_later(self, t: torch.Tensor, key: int, lease: Lease) -> None:
        """`t` is going to be held under `lease`; if it is, or is cast from, a pending output, then only until there is a
        recipe."""
        output, cast = self._source(t, key)
        if isinstance(output, PendingOutput) and output.recipe is None:
            output.replace_later(lease, cast)

    def _tell_pending(self, t: torch.Tensor, key: int) -> None:
        """`t` is saved: recipes that wait for that can rely on it now."""
        if self._pending:
            for ref in self._pending.pop(key, ()):
                if (pending := ref()) is not None:
                    pending.input_saved(t, key)

    def _waiting(self, entry: PendingOutput, inputs: tuple[torch.Tensor, ...]) -> PendingOutput:
        small = sum(x.copy_bytes() for x in entry.unsaved()) < entry.layout.size.numel() * entry.layout.dtype.itemsize
        for x, t in zip(entry.inputs, inputs, strict=True):
            if isinstance(x, UnsavedInput):
                x.alias = t.detach() if small else None
                self._pending.setdefault(x.key, []).append(weakref.ref(entry))
        return entry

    def _input(self, x: torch.Tensor, node: Any) -> Handle | UnsavedInput:
        """What a recipe relies on for its input `x`. A parameter is held by its version, as by the ops that save it."""
        if is_parameter(x) or is_cast_of_parameter(x):
            return self.by_reference(x, Lease(), "parameter")
        key = storage_key(x)
        if key is None:
            return self.door(x)
        return self.reliable(x, key, node) or UnsavedInput(x)

    def _coded(self, t: torch.Tensor, key: int) -> Recomputed | None:
        """A handle on the packed or stored form of `t`; None if `t` is not marked."""
        for mark in self._marks.get(key, ()):
            if mark.storage.expired():
                continue
            whole = mark.whole(t)
            if whole is None:
                continue
            recipe = None if mark.recipe is None else mark.recipe()
            packed = None
            if recipe is None or mark.version != t._version:
                packed = (whole,) if mark.codec is None else codecs.encode(mark.codec, whole, self._draws)
                layout = mark.layout
                if not layout.is_dense():
                    layout = layout._replace(stride=dense_stride(layout.size))
                constants = {"codec": mark.codec, "layout": layout}
                recipe = Recipe(_decode, self.packed(packed, mark.role, mark.tier), constants, layout, self.results)
                mark.recipe, mark.version = weakref.ref(recipe), t._version
            if (t.size(), t.stride()) == (mark.layout.size, mark.layout.stride):
                handle = Recomputed(recipe, recipe.layout.size, recipe.layout.stride, 0)
            else:
                handle = Recomputed(recipe, t.size(), t.stride(), int(t.storage_offset()) - mark.offset)
            if state.recorder is not None:
                state.recorder.note(t, recipe, "shared" if packed is None else mark.tier or "device", mark.role, packed)
            return handle
        return None

    def _prune(self) -> None:
        for key in [key for key, output in self._outputs.items() if output.storage.expired()]:
            del self._outputs[key]
        if self._marks:
            for key in [key for key, marks in self._marks.items() if all(mark.storage.expired() for mark in marks)]:
                del self._marks[key]
        if self._pending:
            for key in [key for key, refs in self._pending.items() if all(ref() is None for ref in refs)]:
                del self._pending[key]


_DOOR, _REGISTER = Stash.door, Stash.register
_CHECKPOINT = vars(torch_checkpoint)  # the globals of the code that saves what a checkpoint recomputes from
_FUNCTION = vars(torch.autograd.function)  # those of `apply`
_APPLY = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)


def _writers(saver: types.FrameType) -> tuple[type, ...]:
    """The autograd Function from whose `apply` the hook was called, if it is not one of ours."""
    cls: type = saver.f_locals["cls"]
    return () if cls.__module__.startswith("unswag.") else (cls,)


def _collecting(
    door: Callable[[torch.Tensor, int], Any], collect: Callable[[Any], Any], told: Callable[..., Any], t: torch.Tensor
) -> Any:
    handle = door(t, 2)
    collect(told(handle, t.shape, t.dtype, t.device))
    return handle


def _guard(t: torch.Tensor, handle: Handle) -> None:
    """Makes it an error if `t`, from which a checkpoint recomputes, is overwritten, as in PyTorch: nobody checks what is saved
    inside the checkpoint."""
    if isinstance(handle, Recomputed):
        handle.guard = VersionGuard(t, "checkpoint")


def _decode(*packed: torch.Tensor, codec: str | None, layout: Layout) -> torch.Tensor:
    return packed[0] if codec is None else codecs.decode(codec, packed, layout.size, layout.dtype)
