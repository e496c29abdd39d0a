"""The stash: the one door through which every tensor saved for backward passes while a model runs.

    with Stash("exact"):
        loss = model(**batch).loss
    loss.backward()

At the door a saved tensor is, in this order:

1. a parameter, a view of one, or autocast's copy of one: held by reference;
2. held already: another tensor of the same storage was kept, so this one costs nothing;
3. the output of an op with a recipe (`remember`), or a dtype cast of one: not kept, made again from the recipe's inputs;
4. marked by an op as playing a role (`plays`) for which the policy has a codec: encoded once, for all who save it;
5. held by reference.

Held by reference means: an alias that shares storage and version counter, and the version. A tensor that was modified in
place after it was saved is an error on the way out, as in plain PyTorch (a plain hook would lose that check).

Who owns what. Autograd owns the packed handles, handles own their cell, a cell owns the handles of its recipe's inputs.
So the graph frees everything layer by layer, as without a stash, and nothing waits for the garbage collector. The door's
registries hold weak references to storages; an entry keeps its cell only while the output's storage lives, and all of
them end with the `with` block. Identity is the storage (`_cdata`, with a weak reference beside it so that the address is
not used again), never a data pointer, never `id()` of a tensor.

On CUDA a recipe runs in the stream of its reader, and one tensor made again serves several readers. So it is for readers in the
stream in which the output was remembered (autograd runs a backward where its forward ran); others keep the tensor.

Writes that PyTorch itself cannot see (through `.data`, a raw pointer, numpy) are not seen here either.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from unswag.policy import Policy
from unswag.torch import codecs
from unswag.torch.draws import Draws, draw_seed

_KEEP_MADE = 2  # tensors made again and kept for another reader, at most, per stash
_NOTHING = torch.empty(0)
_MARK = "unswag"  # Node.metadata[_MARK]: weak reference to the registry entry of the node's output


def remember(output: torch.Tensor, remake: Callable[..., torch.Tensor], *inputs: torch.Tensor | None, **constants: Any) -> None:
    """Tells the stash that `output == remake(*inputs, **constants)`, bit for bit, whenever it is called.

    Call it on what `Function.apply` returned (inside `forward` autograd is off and this does nothing). `remake` is an op
    or a module-level function, independent of autocast and of random state; it must not write to its inputs. Inputs may
    be parameters, activations, outputs remembered before, or None. Costs nothing unless `output` is saved for backward.
    Does nothing when no stash is active on this thread, so that ops can always call it.
    """
    if torch.compiler.is_compiling():
        return
    stash = Stash.current()
    if stash is not None and output.requires_grad:
        stash.register(output, remake, inputs, constants)


def plays(role: str, *tensors: torch.Tensor) -> None:
    """Says that `tensors` play `role`: whoever saves one of them while this stash is active keeps it as the policy says.

    An op calls it before its `Function.apply`, for what it will save and what others may save of it. Does nothing when no stash
    is active on this thread or its policy keeps the role exactly.
    """
    if torch.compiler.is_compiling():
        return
    stash = Stash.current()
    if stash is not None:
        stash.mark(role, tensors)


class _Layout(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(t: torch.Tensor) -> _Layout:
        return _Layout(t.size(), t.stride(), t.dtype, t.device)


class _Kept:
    """A tensor held by reference: an alias with its storage and version counter, and the version it was saved with.

    Where something smaller turns out to do, it can give way to another handle (`unswag.torch.rectified`).
    """

    __slots__ = ("__weakref__", "about", "alias", "hold", "instead", "version")

    def __init__(self, t: torch.Tensor, about: _About, hold: _Hold | None = None) -> None:
        self.alias = t.detach()  # never t itself: an op that saves its own output would own itself
        self.version = t._version
        self.about = about
        self.hold = hold
        self.instead: _Kept | _Again | None = None

    def give_way(self, instead: _Kept | _Again) -> None:
        self.instead, self.hold, self.alias = instead, None, _NOTHING

    def open(self) -> torch.Tensor:
        if self.instead is not None:
            return self.instead.open()
        if self.alias._version != self.version:
            raise RuntimeError(self._modified())
        return self.alias

    def _modified(self) -> str:
        t = self.alias
        return (
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{t.type()} {list(t.shape)}], which is {self.about.describe(t)}, is at version {t._version}; "
            f"expected version {self.version} instead. Hint: UnSwag holds it by reference until the backward pass; "
            "do not modify it between forward and backward, or clone it first."
        )


class _About(NamedTuple):
    """What an error message says of a tensor. The model is only asked when there is something to say."""

    role: str | None
    model: weakref.ref[nn.Module] | None

    def describe(self, t: torch.Tensor) -> str:
        if self.role == "parameter":
            name = self._name(t)
            return "a parameter" if name is None else f"the parameter {name!r}"
        return "saved for backward" if self.role is None else f"saved for backward as {self.role}"

    def _name(self, t: torch.Tensor) -> str | None:
        model = self.model() if self.model is not None else None
        named = () if model is None else model.named_parameters(remove_duplicate=False)
        return next((name for name, parameter in named if _storage_key(parameter) == _storage_key(t)), None)


class _Hold:
    """Shared by all handles that keep one storage; dead when the last of them is."""

    __slots__ = ("__weakref__",)


_Holds = dict[int, tuple[StorageWeakRef, weakref.ref[_Hold]]]  # by storage


class _Cell:
    """A tensor that is not kept but can be made again.

    Made once for all its readers: it stays until every handle alive has read it (`waiting` is empty), until its handles
    die, or until two younger ones push it out; then it would be made again. `alive` and `waiting` hold ids of live
    handles (a handle leaves both when it dies) and change by single set operations, so that backward threads need no lock.
    """

    __slots__ = ("__weakref__", "alive", "constants", "inputs", "layout", "made", "recent", "remake", "waiting")

    def __init__(
        self, remake: Callable[..., torch.Tensor], inputs: tuple[Any, ...], constants: dict[str, Any], layout: _Layout,
        recent: _Recent,
    ) -> None:  # fmt: skip
        self.remake, self.inputs, self.constants, self.layout, self.recent = remake, inputs, constants, layout, recent
        self.alive: set[int] = set()
        self.waiting: set[int] = set()
        self.made: torch.Tensor | None = None

    def read(self, reader: int) -> torch.Tensor:
        made = self.made
        if made is None:
            made = self._make()
            self.waiting = self.alive - {reader}
            if self.waiting:
                self.made = made
                self.recent.push(self)
            return made
        self.waiting.discard(reader)
        if not self.waiting:
            self.made = None
        return made

    def leave(self, reader: int) -> None:
        self.alive.discard(reader)
        self.waiting.discard(reader)
        if not self.waiting:
            self.made = None

    def _make(self) -> torch.Tensor:
        with torch.no_grad():
            made = self.remake(*[None if x is None else x.open() for x in self.inputs], **self.constants)
            if (made.size(), made.dtype, made.device) != (self.layout.size, self.layout.dtype, self.layout.device):
                name = getattr(self.remake, "__name__", str(self.remake))
                raise RuntimeError(
                    f"the recipe {name} made {made.dtype} {list(made.shape)} on {made.device}, but its output was "
                    f"{self.layout.dtype} {list(self.layout.size)} on {self.layout.device}; a recipe must give the same "
                    "tensor whenever it is called"
                )
            if made.stride() != self.layout.stride:
                made = made.new_empty_strided(made.size(), self.layout.stride).copy_(made)
            return made


class _Recent:
    """The cells of one stash that keep a tensor for another reader: at most `_KEEP_MADE`, held weakly."""

    __slots__ = ("cells",)

    def __init__(self) -> None:
        self.cells: list[weakref.ref[_Cell]] = []

    def push(self, cell: _Cell) -> None:
        kept = [ref for ref in self.cells if (other := ref()) is not None and other.made is not None and other is not cell]
        for ref in kept[: 1 - _KEEP_MADE]:
            oldest = ref()
            if oldest is not None:
                oldest.made = None
        self.cells = [*kept[1 - _KEEP_MADE :], weakref.ref(cell)]


class _Again:
    """A handle on a cell: the tensor it makes, or a view of it `offset` elements behind its start."""

    __slots__ = ("__weakref__", "cell", "offset", "size", "stride")

    def __init__(self, cell: _Cell, size: torch.Size, stride: tuple[int, ...], offset: int) -> None:
        self.cell, self.size, self.stride, self.offset = cell, size, stride, offset
        cell.alive.add(id(self))
        if cell.made is not None:
            cell.waiting.add(id(self))

    def open(self) -> torch.Tensor:
        made = self.cell.read(id(self))
        if self.size == made.size() and self.stride == made.stride():
            return made
        return made.as_strided(self.size, self.stride, made.storage_offset() + self.offset)

    def __del__(self) -> None:
        self.cell.leave(id(self))


class _Output:
    """The registry's entry for a remembered output. `counter` shares the output's version counter and none of its memory."""

    recipe = True  # False: not made again, but kept in a form of its own (`unswag.torch.rectified`)
    __slots__ = ("__weakref__", "casts", "cell", "chained", "counter", "number", "offset", "storage", "stream", "version")

    def __init__(self, output: torch.Tensor, cell: _Cell, chained: bool = False) -> None:
        self.storage = StorageWeakRef(output.untyped_storage())
        self.version = output._version
        self.counter = output.detach()
        self.counter.data = output.new_empty(0)  # keeps the version counter, lets go of the storage
        self.offset = output.storage_offset()
        self.number = output.output_nr  # among the outputs of its node
        self.stream = _stream(output)
        self.cell = cell
        self.chained = chained  # made from another such output: no third is made from it (`unswag.torch.rectified`)
        self.casts: dict[torch.dtype, _Cell] = {}

    def unchanged(self) -> bool:
        return self.counter._version == self.version

    def handle(self, t: torch.Tensor) -> _Kept | _Again | None:
        """A handle for `t`, which shares the output's storage; None if it is not all inside the output, unmodified, or used
        in another stream."""
        if t._version != self.version or not self.unchanged() or _stream(t) != self.stream:
            return None
        return _view(self.cell, t, int(t.storage_offset() - self.offset))

    def cast(self, copy: torch.Tensor) -> _Cell:
        """The cell of `copy`, a dtype cast of the output; one for all copies of that dtype."""
        key = copy.dtype
        if key not in self.casts:
            source = self.cell.layout
            whole = _Again(self.cell, source.size, source.stride, 0)
            cast = source._replace(dtype=copy.dtype)
            self.casts[key] = _Cell(_cast, (whole,), {"dtype": copy.dtype}, cast, self.cell.recent)
        return self.casts[key]


class _Mark:
    """The registry's entry for a tensor that plays a role: where it lies in its storage, and its cell once it is encoded, which
    packed handles own."""

    __slots__ = ("cell", "codec", "layout", "offset", "role", "storage", "version")

    def __init__(self, t: torch.Tensor, role: str, codec: str) -> None:
        self.storage = StorageWeakRef(t.untyped_storage())
        self.role, self.codec = role, codec
        self.layout, self.offset = _Layout.of(t), int(t.storage_offset())
        self.cell: weakref.ref[_Cell] | None = None
        self.version = 0

    def whole(self, t: torch.Tensor) -> torch.Tensor | None:
        """The marked tensor, of which `t` is all or a part in any order; None if `t` is something else in its storage."""
        start = int(t.storage_offset()) - self.offset
        if t.dtype != self.layout.dtype or t.is_conj() or t.is_neg():
            return None
        if (t.size(), t.stride(), start) != (self.layout.size, self.layout.stride, 0) and not (
            t.numel() and _fills(self.layout) and _is_view(t, self.layout, start)
        ):
            return None
        return t.detach().as_strided(self.layout.size, self.layout.stride, self.offset)


def _decode(*packed: torch.Tensor, codec: str, layout: _Layout) -> torch.Tensor:
    return codecs.decode(codec, packed, layout.size, layout.dtype)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype)


def _view(cell: _Cell, t: torch.Tensor, offset: int) -> _Again | None:
    """A handle for `t`, a view that starts `offset` elements into the cell's (dense) tensor; None if it reaches outside."""
    return _Again(cell, t.size(), t.stride(), offset) if _is_view(t, cell.layout, offset) else None


def _is_view(t: torch.Tensor, layout: _Layout, offset: int) -> bool:
    """Whether `t`, which starts `offset` elements behind a dense tensor of that layout, lies all inside it."""
    if t.dtype != layout.dtype or t.is_conj() or t.is_neg():
        return False
    last = offset + sum((n - 1) * step for n, step in zip(t.size(), t.stride(), strict=True))
    return not t.numel() or (offset >= 0 and last < layout.size.numel())


class Recorder(Protocol):
    """Somebody who writes down what passes the doors of this thread (see `unswag.torch.audit`)."""

    holds: _Holds  # shared by all doors while it records, so that a storage is counted once

    def note(
        self, t: torch.Tensor, owner: object, tier: str, role: str | None = None, packed: tuple[torch.Tensor, ...] | None = None
    ) -> None:  # fmt: skip
        """`t` was saved and costs what `tier` says: "device" (`packed` instead of itself, if that is given), "shared", "recipe"
        or "parameter"; until `owner` dies. `role`: that of a mark."""


class _Frame(NamedTuple):
    stash: Stash
    pack: Callable[[torch.Tensor], Any]
    owner: bool  # False: entered again inside itself or another stash, whose door stays the one in use


class _Thread(threading.local):
    def __init__(self) -> None:
        self.frames: list[_Frame | None] = []  # None: stepped aside
        self.recorder: Recorder | None = None
        self.role: str | None = None
        self.kept: list[_Kept] | None = None  # of the innermost `keeping`
        self.loss_depth = 0


_thread = _Thread()


class Stash:
    """The door, for the time of one forward. A context manager; enter it around the model's forward.

    policy  a `Policy` or its name
    model   only for names in error messages; held weakly

    Steps aside (everything is then as without it) when gradients are off, when other saved-tensor hooks are already in
    place (a checkpoint, save_on_cpu or an offloader around the model: ours would switch theirs off), inside another stash
    (that one stays in use), under torch.func and under torch.compile.
    """

    def __init__(self, policy: str | Policy = "exact", model: nn.Module | None = None) -> None:
        self.policy = Policy.named(policy)
        self._model = weakref.ref(model) if model is not None else None
        self._outputs: dict[int, _Output] = {}  # by storage
        self._marks: dict[int, list[_Mark]] = {}  # by storage
        self._draws: Draws | None = None
        self._holds: _Holds = {}
        self._recent = _Recent()

    @staticmethod
    def current() -> Stash | None:
        """The stash whose door a tensor saved now, on this thread, would pass; None if there is none."""
        frame = _thread.frames[-1] if _thread.frames else None
        if frame is None or (_functorch is not None and _functorch() is not None):
            return None
        hooks = _top_hooks()
        return frame.stash if hooks is not None and hooks[0] is frame.pack else None

    def __enter__(self) -> Stash:
        if torch.compiler.is_compiling():
            _warn_compiled()
        else:
            _thread.frames.append(self._frame())
        return self

    def __exit__(self, *exception: object) -> None:
        if not torch.compiler.is_compiling():
            leave()

    def _frame(self) -> _Frame | None:
        if not torch.is_grad_enabled() or not _can_enter():
            return None
        if _top_hooks() is None:
            return self._open(self.door, unpack)
        within = Stash.current()
        if within is None:
            _warn_once("other saved-tensor hooks are in place around it (a checkpoint or an offloader); they stay in use")
            return None
        return self._open(self.door, unpack) if within.passive else _thread.frames[-1]._replace(owner=False)  # type: ignore[union-attr]

    def enter_behind(self, pack: Callable[[torch.Tensor], Any]) -> None:
        """Enters with `pack` as the hook, on top of whatever hooks are in place; `pack` calls `door`. See `leave`."""
        _thread.frames.append(self._open(pack, unpack))

    def _open(self, pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> _Frame:
        if _thread.recorder is not None:
            self._holds = _thread.recorder.holds
        if self.policy.rounding == "stochastic":
            self._draws = Draws(draw_seed())
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
        return _Frame(self, pack, owner=True)

    def _close(self) -> None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        self._outputs.clear()
        self._marks.clear()
        self._holds = {}

    passive = False  # True: a stash entered inside this one takes over

    def door(self, t: torch.Tensor) -> _Kept | _Again:
        """The handle that stands for `t` until the backward pass; `unpack` gives the tensor back."""
        if _is_parameter(t) or _is_cast_of_parameter(t):
            return self._keep(t, _Hold(), "parameter")
        key = _storage_key(t)
        if key is None:
            return self._keep(t, _Hold(), "device")
        hold = self._held(key)
        if hold is not None:
            return self._keep(t, hold, "shared")
        made_again = self._from_recipe(t, key)
        if made_again is not None:
            if _thread.recorder is not None and isinstance(made_again, _Again):
                _thread.recorder.note(t, made_again, "recipe")
            return made_again
        coded = self._coded(t, key)
        if coded is not None:
            return coded
        return self._keep(t, self._hold(t, key), "device")

    def _keep(self, t: torch.Tensor, hold: _Hold, tier: str) -> _Kept:
        if _thread.recorder is not None:
            _thread.recorder.note(t, hold, tier)
        role = "parameter" if tier == "parameter" else _thread.role
        kept = _Kept(t, _About(role, self._model), hold)
        if _thread.kept is not None and tier == "device":
            _thread.kept.append(kept)
        return kept

    def free(self, t: torch.Tensor) -> _Kept | _Again | None:
        """A handle for `t` if one costs nothing: its storage is held already, or it has a recipe."""
        key = _storage_key(t)
        if key is None or _is_parameter(t):
            return None
        hold = self._held(key)
        if hold is not None:
            return self._keep(t, hold, "shared")
        output = self._outputs.get(key)
        return self._from_recipe(t, key) if output is None or output.recipe else None

    def _hold(self, t: torch.Tensor, key: int) -> _Hold:
        """Held from now on, until the last handle that shares the result dies."""
        hold = _Hold()
        self._holds[key] = (StorageWeakRef(t.untyped_storage()), weakref.ref(hold))
        return hold

    def _held(self, key: int) -> _Hold | None:
        storage, hold = self._holds.get(key, (None, None))
        return None if storage is None or hold is None or storage.expired() else hold()

    def _from_recipe(self, t: torch.Tensor, key: int) -> _Kept | _Again | None:
        self._prune()
        output = self._outputs.get(key)
        if output is not None:
            return output.handle(t)
        copy = t if t._base is None else t._base
        source, number = _cast_from(copy)
        if source is None:
            return None
        mark = source.metadata.get(_MARK)
        output = None if mark is None else mark()
        if (
            output is None
            or not output.recipe
            or output.number != number
            or not output.unchanged()
            or _stream(t) != output.stream
            or copy._version
            or t._version
            or not _is_cast(copy, output.cell.layout)
        ):
            return None
        return _view(output.cast(copy), t, int(t.storage_offset() - copy.storage_offset()))

    def register(
        self, output: torch.Tensor, remake: Callable[..., torch.Tensor], inputs: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:  # fmt: skip
        """What `remember` does, for the stash whose door is in use."""
        self._prune()
        key = _storage_key(output)
        if key is None or not _is_dense(output):
            return
        handles = tuple(None if x is None else self.door(x) for x in inputs)
        entry = _Output(output, _Cell(remake, handles, constants, _Layout.of(output), self._recent))
        self._outputs[key] = entry
        if output.grad_fn is not None:
            output.grad_fn.metadata[_MARK] = weakref.ref(entry)  # type: ignore[index]

    def mark(self, role: str, tensors: tuple[torch.Tensor, ...]) -> None:
        """What `plays` does, for the stash whose door is in use."""
        codec = self.policy.codec(role)
        if codec is None:
            return
        self._prune()
        for t in tensors:
            key = _storage_key(t)
            if key is None or not codecs.takes(codec, t):
                continue
            marks = self._marks.setdefault(key, [])
            if not any((mark.layout, mark.offset) == (_Layout.of(t), t.storage_offset()) for mark in marks):
                marks.append(_Mark(t, role, codec))

    def _coded(self, t: torch.Tensor, key: int) -> _Again | None:
        """A handle on the packed form of `t`, which is marked; None if it is not."""
        for mark in self._marks.get(key, ()):
            if mark.storage.expired():
                continue
            whole = mark.whole(t)
            if whole is None:
                continue
            cell = None if mark.cell is None else mark.cell()
            packed = None
            if cell is None or mark.version != t._version:
                packed = codecs.encode(mark.codec, whole, self._draws)
                about = _About(mark.role, self._model)
                layout = mark.layout if _fills(mark.layout) else mark.layout._replace(stride=_dense_stride(mark.layout.size))
                kept = tuple(_Kept(part, about) for part in packed)
                cell = _Cell(_decode, kept, {"codec": mark.codec, "layout": layout}, layout, self._recent)
                mark.cell, mark.version = weakref.ref(cell), t._version
            if (t.size(), t.stride()) == (mark.layout.size, mark.layout.stride):
                handle = _Again(cell, cell.layout.size, cell.layout.stride, 0)
            else:
                handle = _Again(cell, t.size(), t.stride(), int(t.storage_offset()) - mark.offset)
            if _thread.recorder is not None:
                _thread.recorder.note(t, cell, "shared" if packed is None else "device", mark.role, packed)
            return handle
        return None

    def _prune(self) -> None:
        for key in [key for key, output in self._outputs.items() if output.storage.expired()]:
            del self._outputs[key]
        for key in [key for key, marks in self._marks.items() if all(mark.storage.expired() for mark in marks)]:
            del self._marks[key]


def leave() -> None:
    """Leaves the stash entered last on this thread."""
    frame = _thread.frames.pop()
    if frame is not None and frame.owner:
        frame.stash._close()


def step_aside() -> None:
    """Stands for a stash that is not entered, until `leave`."""
    _thread.frames.append(None)


@contextlib.contextmanager
def role(name: str) -> Iterator[None]:
    """What is saved inside plays this role (one of `policy.ROLES`), whatever module runs."""
    before, _thread.role = _thread.role, name
    try:
        yield
    finally:
        _thread.role = before


def current_role() -> str | None:
    """The role set by `role`, if any."""
    return _thread.role


@contextlib.contextmanager
def keeping() -> Iterator[list[_Kept]]:
    """The list it gives gets the handles of what a door on this thread keeps as it is inside."""
    before, _thread.kept = _thread.kept, []
    try:
        yield _thread.kept
    finally:
        _thread.kept = before


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """`recorder` is told of everything that passes a door on this thread inside."""
    before, _thread.recorder = _thread.recorder, recorder
    try:
        yield
    finally:
        _thread.recorder = before


# The loss's own gradient buffers (dhidden, dW) live from forward to backward but are not activations: counted apart.

_loss_buffers: dict[int, StorageWeakRef] = {}


def mark_loss_buffer(t: torch.Tensor) -> None:
    """Says that the storage of `t` is a gradient buffer of the loss. Held weakly."""
    for key in [key for key, storage in _loss_buffers.items() if storage.expired()]:
        del _loss_buffers[key]
    storage = t.untyped_storage()
    _loss_buffers[storage._cdata] = StorageWeakRef(storage)


def is_loss_buffer(key: int | None) -> bool:
    """Whether the storage with this `_cdata`, which the caller knows to be alive, was marked."""
    storage = _loss_buffers.get(key) if key is not None else None
    return storage is not None and not storage.expired()


@contextlib.contextmanager
def inside_loss() -> Iterator[None]:
    """The work of the loss, forward or backward: what lives only inside does not count as a peak of the model."""
    _thread.loss_depth += 1
    try:
        yield
    finally:
        _thread.loss_depth -= 1


def is_inside_loss() -> bool:
    return _thread.loss_depth > 0


def unpack(handle: _Kept | _Again) -> torch.Tensor:
    """The tensor that the handle stands for."""
    return handle.open()


def _stream(t: torch.Tensor) -> torch.cuda.Stream | None:
    """The CUDA stream in which work on `t` is queued now."""
    return torch.cuda.current_stream(t.device) if t.is_cuda and torch.cuda.is_initialized() else None


def _storage_key(t: torch.Tensor) -> int | None:
    """The address of the storage object, or None for what has no storage of its own (sparse, wrapper subclasses)."""
    return t.untyped_storage()._cdata if is_plain(t) and t.layout is torch.strided else None


def is_plain(t: torch.Tensor) -> bool:
    """Whether its elements are what its memory holds: no shard, no packed weight, no other subclass."""
    return type(t) in (torch.Tensor, nn.Parameter, FakeTensor)


def _is_dense(t: torch.Tensor) -> bool:
    return _fills(_Layout.of(t))


def _fills(layout: _Layout) -> bool:
    """Whether the elements fill a stretch of the storage without gaps or overlaps, in any order of dimensions."""
    step = 1
    for stride, n in sorted((s, n) for s, n in zip(layout.stride, layout.size, strict=True) if n != 1):
        if stride != step:
            return layout.size.numel() == 0
        step *= n
    return True


def _dense_stride(size: torch.Size) -> tuple[int, ...]:
    """Of a contiguous tensor of that size."""
    strides, step = [], 1
    for n in reversed(size):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def _is_cast(copy: torch.Tensor, layout: _Layout) -> bool:
    """Whether `copy`, cast from the tensor of that layout or a view of it, has its elements in the same order."""
    return copy.device == layout.device and copy.numel() == layout.size.numel() and (
        (copy.size(), copy.stride()) == (layout.size, layout.stride) or (copy.is_contiguous() and _contiguous(layout))
    )  # fmt: skip


def _contiguous(layout: _Layout) -> bool:
    step = 1
    for n, stride in zip(reversed(layout.size), reversed(layout.stride), strict=True):
        if n != 1 and stride != step:
            return False
        step *= n
    return True


def _is_parameter(t: torch.Tensor) -> bool:
    return isinstance(t, nn.Parameter) or isinstance(t._base, nn.Parameter)


def _is_cast_of_parameter(t: torch.Tensor) -> bool:
    """Autocast's copy of a weight, or a view of it: a cast whose source is a leaf that accumulates into a parameter."""
    source, _ = _cast_from(t if t._base is None else t._base)
    return source is not None and isinstance(getattr(source, "variable", None), nn.Parameter)


# Views that keep the order of the elements; if they keep their number too, they keep all.
_ORDERLY = ("ViewBackward0", "UnsafeViewBackward0", "SliceBackward0", "AliasBackward0")


def _cast_from(t: torch.Tensor) -> tuple[Any, int]:
    """The autograd node, and the number of its output, that `t` is a dtype cast of (behind views of it that keep the order);
    (None, 0) if it is none."""
    node: Any = t.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return None, 0
    node, number = node.next_functions[0]
    while node is not None and node.name() in _ORDERLY:
        node, number = node.next_functions[0]
    return node, number


# Saved-tensor hooks of others. The private functions are looked up once; without them the stash steps aside.

_top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_enabled = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", None)
_functorch = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)


def _top_hooks() -> Any:
    return None if _top is None else _top(False)


def _can_enter() -> bool:
    if _top is None or _enabled is None or _functorch is None:
        _warn_once(f"torch {torch.__version__} does not say which saved-tensor hooks are in place")
        return False
    if _functorch() is not None:
        _warn_once("torch.func transforms do not support saved-tensor hooks")
        return False
    return _enabled()


_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"UnSwag's stash steps aside: {reason}. Ops and chunked loss still apply.", stacklevel=2)


@torch.compiler.assume_constant_result
def _warn_compiled() -> None:
    _warn_once("torch.compile decides itself what is saved")
