"""The stash: the one door through which every tensor saved for backward passes while a model runs.

    with Stash("exact"):
        loss = model(**batch).loss
    loss.backward()

At the door a saved tensor is, in this order:

1. a parameter, a view of one, or autocast's copy of one: held by reference;
2. held already: another tensor of the same storage was kept, so this one costs nothing;
3. the output of an op with a recipe (`remember`), or a dtype cast of one: not kept, made again from the recipe's inputs, if
   no program that PyTorch accepts can change those before the backward (see `_Loose`);
4. marked by an op as playing a role (`plays`) for which the policy has a codec: encoded once, for all who save it;
5. held by reference.

Held by reference means: an alias that shares storage and version counter, and the version. A tensor that was modified in
place after it was saved is an error on the way out, as in plain PyTorch (a plain hook would lose that check). A tensor made
again serves several readers only as long as none of them writes into it; whoever comes then gets one of its own.

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
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import checkpoint as torch_checkpoint

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
    be parameters, activations, outputs remembered before, or None. What nobody saves, a program may change in place; so where
    the op itself does not save such an input, and nobody else does, a copy of it is kept if that is smaller than `output`, or
    else `output` is. Costs nothing unless `output` is saved for backward.
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


def own(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it where an op saves x, stock a float32 copy of it, and nobody would notice that x is changed afterwards:
    when a checkpoint of PyTorch's own recomputes. For norms, of 16-bit inputs."""
    if x.element_size() >= 4 or torch.compiler.is_compiling() or _top is None:
        return x
    hooks = _top(False)
    pack = None if hooks is None else getattr(hooks[0], "__qualname__", "")
    return x.clone() if pack and pack.startswith("_recomputation_hook.") else x


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
        return _modified(self.alias, self.alias.shape, self.about, self.version)


def _modified(t: torch.Tensor, shape: torch.Size, about: _About, version: int) -> str:
    return (
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{t.type()} {list(shape)}], which is {about.describe(t)}, is at version {t._version}; "
        f"expected version {version} instead. Hint: UnSwag holds it by reference until the backward pass; "
        "do not modify it between forward and backward, or clone it first."
    )


class _Guard:
    """Says whether a tensor was modified since, without keeping it."""

    __slots__ = ("about", "counter", "shape", "version")

    def __init__(self, t: torch.Tensor, about: _About) -> None:
        self.counter, self.version, self.shape, self.about = _counter(t), t._version, t.shape, about

    def check(self) -> None:
        if self.counter._version != self.version:
            raise RuntimeError(_modified(self.counter, self.shape, self.about, self.version))


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
    """Shared by all handles that keep one storage; dead when the last of them is.

    handles  those that may give way later, where somebody waits for that (`_Pending`)
    writers  the Functions of others among those who save it: their backward may write into it, and PyTorch accepts that if
             nobody reads it after them
    firm     False while checkpoints alone save it: PyTorch accepts a change if they are never recomputed
    """

    __slots__ = ("__weakref__", "firm", "handles", "writers")

    def __init__(self, firm: bool = True) -> None:
        self.handles: list[weakref.ref[_Kept]] | None = None
        self.writers: tuple[type, ...] = ()
        self.firm = firm

    def stays(self, node: Any) -> bool:
        """Whether what is kept stays as it is, in all that PyTorch accepts; the Function of `node` is trusted."""
        return self.firm and all(type(node) is getattr(writer, "_backward_cls", None) for writer in self.writers)


_Holds = dict[int, tuple[StorageWeakRef, weakref.ref[_Hold]]]  # by storage


class _Cell:
    """A tensor that is not kept but can be made again.

    Made once for all its readers: it stays until every handle alive has read it (`waiting` is empty), until its handles
    die, until two younger ones push it out, or until a reader writes into it (`made` has its version); then it would be made
    again. `alive` and `waiting` hold ids of live handles (a handle leaves both when it dies) and change by single set
    operations, so that backward threads need no lock.
    """

    __slots__ = ("__weakref__", "alive", "constants", "inputs", "layout", "made", "recent", "remake", "waiting")

    def __init__(
        self, remake: Callable[..., torch.Tensor], inputs: tuple[Any, ...], constants: dict[str, Any], layout: _Layout,
        recent: _Recent,
    ) -> None:  # fmt: skip
        self.remake, self.inputs, self.constants, self.layout, self.recent = remake, inputs, constants, layout, recent
        self.alive: set[int] = set()
        self.waiting: set[int] = set()
        self.made: tuple[torch.Tensor, int] | None = None

    def read(self, reader: int) -> torch.Tensor:
        before = self.made
        if before is None or before[0]._version != before[1]:
            made = self._make()
            self.waiting = (self.alive if before is None else self.waiting) - {reader}
            self.made = (made, made._version) if self.waiting else None
            if self.waiting:
                self.recent.push(self)
            return made
        self.waiting.discard(reader)
        if not self.waiting:
            self.made = None
        return before[0]

    def leave(self, reader: int) -> None:
        self.alive.discard(reader)
        self.waiting.discard(reader)
        if not self.waiting:
            self.made = None

    def _make(self) -> torch.Tensor:
        if torch.is_inference_mode_enabled():  # what is made has a version, whatever mode its reader is in
            with torch.inference_mode(False):
                return self._make()
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

    __slots__ = ("__weakref__", "cell", "guard", "offset", "size", "stride")

    def __init__(self, cell: _Cell, size: torch.Size, stride: tuple[int, ...], offset: int) -> None:
        self.cell, self.size, self.stride, self.offset = cell, size, stride, offset
        self.guard: _Guard | None = None  # where the tensor itself must not have been modified since
        cell.alive.add(id(self))
        if cell.made is not None:
            cell.waiting.add(id(self))

    def open(self) -> torch.Tensor:
        if self.guard is not None:
            self.guard.check()
        made = self.cell.read(id(self))
        if self.size == made.size() and self.stride == made.stride():
            return made
        return made.as_strided(self.size, self.stride, made.storage_offset() + self.offset)

    def __del__(self) -> None:
        self.cell.leave(id(self))


class _Output:
    """The registry's entry for a remembered output. `counter` shares the output's version counter and none of its memory."""

    recipe = True  # False: not made again, but kept in a form of its own (`unswag.torch.rectified`)
    __slots__ = (
        "__weakref__", "casts", "cell", "chained", "counter", "layout", "number", "offset", "storage", "stream", "version",
    )  # fmt: skip

    def __init__(self, output: torch.Tensor, layout: _Layout, cell: _Cell | None, chained: bool = False) -> None:
        self.storage = StorageWeakRef(output.untyped_storage())
        self.version = output._version
        self.counter = _counter(output)
        self.layout = layout
        self.offset = output.storage_offset()
        self.number = output.output_nr  # among the outputs of its node
        self.stream = _stream(output)
        self.cell = cell  # None: not yet, or not at all
        self.chained = chained  # made from another such output: no third is made from it (`unswag.torch.rectified`)
        self.casts: dict[torch.dtype, _Cell] = {}

    def unchanged(self) -> bool:
        return self.counter._version == self.version

    def settled(self) -> _Cell | None:
        """The cell, if the output can be made again."""
        return self.cell

    def handle(self, t: torch.Tensor) -> _Kept | _Again | None:
        """A handle for `t`, which shares the output's storage; None if it is not all inside the output, unmodified, or used
        in another stream."""
        if t._version != self.version or not self.unchanged() or _stream(t) != self.stream:
            return None
        cell = self.settled()
        return None if cell is None else _view(cell, t, int(t.storage_offset() - self.offset))

    def cast(self, t: torch.Tensor, offset: int) -> _Again | None:
        """A handle for `t`, a view that starts `offset` elements into a dtype cast of the output; a dtype has one cell."""
        cell, key = self.settled(), t.dtype
        if cell is None:
            return None
        if key not in self.casts:
            source = cell.layout
            whole = _Again(cell, source.size, source.stride, 0)
            self.casts[key] = _Cell(_cast, (whole,), {"dtype": key}, source._replace(dtype=key), cell.recent)
        return _view(self.casts[key], t, offset)


class _Loose:
    """An input of a recipe that nobody saves, so that a program may change it before the backward: PyTorch would not notice.

    A recipe may rely on it once somebody saves it unchanged (PyTorch refuses a change then), or on a copy (`alias` is what to
    copy, where that is smaller than the output). Otherwise the output is kept, and nothing of this.
    """

    __slots__ = ("alias", "counter", "layout", "offset", "storage", "version")

    def __init__(self, t: torch.Tensor) -> None:
        self.storage = StorageWeakRef(t.untyped_storage())
        self.version, self.counter = t._version, _counter(t)
        self.layout, self.offset = _Layout.of(t), int(t.storage_offset())
        self.alias: torch.Tensor | None = None

    @property
    def key(self) -> int:
        return self.storage.cdata

    def unchanged(self) -> bool:
        return self.counter._version == self.version

    def span(self) -> int:
        """Elements of the stretch of the storage that it lies in, the gaps with them."""
        return 1 + sum((n - 1) * step for n, step in zip(self.layout.size, self.layout.stride, strict=True))

    def nbytes(self) -> int:
        """Of `copy`."""
        return min(self.span(), self.layout.size.numel()) * self.layout.dtype.itemsize

    def copy(self) -> torch.Tensor | None:
        """What it was, in memory that nobody else has; None if it is gone or was changed."""
        t, span = self.alias, self.span()
        if t is None or not self.unchanged():
            return None
        if not 0 < span <= t.numel():
            return t.clone()
        return t.as_strided((span,), (1,), self.offset).clone().as_strided(self.layout.size, self.layout.stride)

    def found(self, t: torch.Tensor) -> torch.Tensor | None:
        """It again, with its version counter, in the storage of `t`, which somebody saves; None if it was changed."""
        if not self.unchanged() or t._version != self.version or t.dtype != self.layout.dtype or t.is_conj() or t.is_neg():
            return None
        again = self.counter.detach()
        again.data = t.detach().as_strided(self.layout.size, self.layout.stride, self.offset)
        return again


class _Pending(_Output):
    """The entry of an output with loose inputs. It has no cell before all are firm or copied; what is kept of the output
    until then gives way. `inputs` are handles, None or loose; what a loose one was copied to is in `copied`, by its place."""

    __slots__ = ("constants", "copied", "door", "inputs", "kept", "remake")

    def __init__(
        self, output: torch.Tensor, layout: _Layout, door: Stash, remake: Callable[..., torch.Tensor], inputs: list[Any],
        constants: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(output, layout, None)
        self.door, self.remake, self.inputs, self.constants = door, remake, inputs, constants
        self.copied: dict[int, weakref.ref[_Kept]] = {}
        self.kept: list[tuple[weakref.ref[_Hold], int | None]] = []  # and, of a cast, where it starts in its storage

    def loose(self) -> list[_Loose]:
        return [x for x in self.inputs if isinstance(x, _Loose)]

    def settled(self) -> _Cell | None:
        if self.cell is None and all(x.alias is not None and x.unchanged() for x in self.loose()):
            handles = list(self.inputs)
            for i, x in enumerate(handles):
                if isinstance(x, _Loose) and (copy := x.copy()) is not None:
                    handles[i] = self.door._keep(copy, self.door._hold(copy, copy.untyped_storage()._cdata), "device")
                    self.copied[i] = weakref.ref(handles[i])
                    x.alias = None
            self._settle(handles)
        return self.cell

    def firm(self, t: torch.Tensor, key: int) -> None:
        """Somebody saves `t`, whose storage is that of a loose input."""
        for i, x in enumerate(self.inputs):
            if not isinstance(x, _Loose) or x.key != key or (again := x.found(t)) is None:
                continue
            handle = self.door._firm(again, key)
            if handle is None:
                continue
            self.inputs[i] = handle
            copied = self.copied[i]() if i in self.copied else None
            if copied is not None:
                copied.give_way(handle)
        if self.cell is None and not self.loose():
            self._settle(self.inputs)
            for ref, cast in self.kept:
                hold = ref()
                for kept in (hold and hold.handles) or ():
                    self._replace(kept(), cast)
            self.kept.clear()
            self.door._awaited.discard(self)

    def wait(self, hold: _Hold, cast: int | None) -> None:
        """What `hold` keeps, the output or a cast of it, is to give way."""
        hold.handles = []
        self.kept.append((weakref.ref(hold), cast))
        self.door._awaited.add(self)

    def _settle(self, handles: list[Any]) -> None:
        self.cell = _Cell(self.remake, tuple(handles), self.constants, self.layout, self.door._recent)

    def _replace(self, kept: _Kept | None, cast: int | None) -> None:
        if kept is None or kept.alias._version != kept.version:
            return
        t = kept.alias
        again = self.handle(t) if cast is None else self.cast(t, int(t.storage_offset()) - cast)
        if isinstance(again, _Again):
            kept.give_way(again)
            if _thread.recorder is not None:
                _thread.recorder.note(t, again, "recipe")


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
    return x.to(dtype, copy=True)  # never x itself, which has readers of its own


def _counter(t: torch.Tensor) -> torch.Tensor:
    """A tensor that shares the version counter of `t` and none of its memory."""
    counter = t.detach()
    counter.data = t.new_empty(0)
    return counter


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
        self._pending: dict[int, list[weakref.ref[_Pending]]] = {}  # by the storage of their loose inputs
        self._awaited: set[_Pending] = set()  # those for which something is kept
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
        self._pending.clear()
        self._awaited.clear()
        self._holds = {}

    passive = False  # True: a stash entered inside this one takes over

    def door(self, t: torch.Tensor, depth: int = 1) -> _Kept | _Again:
        """The handle that stands for `t` until the backward pass; `unpack` gives the tensor back. `depth`: how many Python
        functions lie between this one and who saves `t`."""
        if _is_parameter(t) or _is_cast_of_parameter(t):
            return self._keep(t, _Hold(), "parameter")
        key = _storage_key(t)
        if key is None:
            return self._keep(t, _Hold(), "device")
        saver = sys._getframe(depth)
        checkpoint = saver.f_globals is _CHECKPOINT
        hold = self._held(key)
        if hold is not None:
            if saver.f_code is _APPLY:
                hold.writers += _writers(saver)
            if not (hold.firm or checkpoint):
                hold.firm = True
                self._firmed(t, key)
            return self._keep(t, hold, "shared")
        handle = self._from_recipe(t, key)
        if handle is not None:
            if _thread.recorder is not None and isinstance(handle, _Again):
                _thread.recorder.note(t, handle, "recipe")
            if checkpoint:
                self._guard(t, handle)
            return handle
        handle = self._coded(t, key)
        if handle is None:
            hold = self._hold(t, key, firm=not checkpoint)
            if saver.f_code is _APPLY:
                hold.writers += _writers(saver)
            if self._pending:
                self._wait(t, key, hold)
            handle = self._keep(t, hold, "device")
            if checkpoint:
                return handle
        elif checkpoint:
            self._guard(t, handle)
        self._firmed(t, key)
        return handle

    def _firmed(self, t: torch.Tensor, key: int) -> None:
        """Recipes that wait for somebody to save `t` can rely on it now."""
        if self._pending:
            for ref in self._pending.pop(key, ()):
                if (pending := ref()) is not None:
                    pending.firm(t, key)

    def _guard(self, t: torch.Tensor, handle: _Kept | _Again) -> None:
        """What a checkpoint recomputes from must be as it was, as in PyTorch: what it saves inside is checked by nobody."""
        if isinstance(handle, _Again):
            handle.guard = _Guard(t, _About("checkpoint", self._model))

    def _keep(self, t: torch.Tensor, hold: _Hold, tier: str) -> _Kept:
        if _thread.recorder is not None:
            _thread.recorder.note(t, hold, tier)
        role = "parameter" if tier == "parameter" else _thread.role
        kept = _Kept(t, _About(role, self._model), hold)
        if hold.handles is not None:
            hold.handles.append(weakref.ref(kept))
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
            return self._keep(t, hold, "shared") if hold.stays(None) else None
        output = self._outputs.get(key)
        return self._from_recipe(t, key) if output is None or output.recipe else None

    def _hold(self, t: torch.Tensor, key: int, firm: bool = True) -> _Hold:
        """Held from now on, until the last handle that shares the result dies."""
        hold = _Hold(firm)
        self._holds[key] = (StorageWeakRef(t.untyped_storage()), weakref.ref(hold))
        return hold

    def _held(self, key: int) -> _Hold | None:
        storage, hold = self._holds.get(key, (None, None))
        return None if storage is None or hold is None or storage.expired() else hold()

    def _from_recipe(self, t: torch.Tensor, key: int) -> _Kept | _Again | None:
        self._prune()
        output, cast = self._source(t, key)
        if output is None:
            return None
        return output.handle(t) if cast is None else output.cast(t, int(t.storage_offset()) - cast)

    def _source(self, t: torch.Tensor, key: int) -> tuple[_Output | None, int | None]:
        """The entry of the output that shares the storage of `t`, and None; or of that of which `t` is a part of a dtype cast,
        and where the cast starts in its storage."""
        output = self._outputs.get(key)
        if output is not None:
            return output, None
        copy = t if t._base is None else t._base
        source, number = _cast_from(copy)
        if source is None:
            return None, None
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
            or not _is_cast(copy, output.layout)
        ):
            return None, None
        return output, int(copy.storage_offset())

    def _wait(self, t: torch.Tensor, key: int, hold: _Hold) -> None:
        """`t` is going to be kept; if it is, or is cast from, an output whose recipe is not firm yet, then only until it is."""
        output, cast = self._source(t, key)
        if isinstance(output, _Pending) and output.cell is None:
            output.wait(hold, cast)

    def register(
        self, output: torch.Tensor, remake: Callable[..., torch.Tensor], inputs: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:  # fmt: skip
        """What `remember` does, for the stash whose door is in use."""
        self._prune()
        key = _storage_key(output)
        layout = _Layout.of(output)
        if key is None or not _fills(layout):
            return
        handles = [None if x is None else self._input(x, output.grad_fn) for x in inputs]
        entry: _Output
        if any(type(x) is _Loose for x in handles):
            entry = self._later(_Pending(output, layout, self, remake, handles, constants), inputs)
        else:
            entry = _Output(output, layout, _Cell(remake, tuple(handles), constants, layout, self._recent))
        self._outputs[key] = entry
        if output.grad_fn is not None:
            output.grad_fn.metadata[_MARK] = weakref.ref(entry)  # type: ignore[index]

    def _later(self, entry: _Pending, inputs: tuple[torch.Tensor, ...]) -> _Pending:
        small = sum(x.nbytes() for x in entry.loose()) < entry.layout.size.numel() * entry.layout.dtype.itemsize
        for x, t in zip(entry.inputs, inputs, strict=True):
            if isinstance(x, _Loose):
                x.alias = t.detach() if small else None
                self._pending.setdefault(x.key, []).append(weakref.ref(entry))
        return entry

    def _input(self, x: torch.Tensor, node: Any) -> _Kept | _Again | _Loose:
        """What a recipe relies on for its input `x`. A parameter is held by its version, as by the ops that save it."""
        if _is_parameter(x) or _is_cast_of_parameter(x):
            return self._keep(x, _Hold(), "parameter")
        key = _storage_key(x)
        if key is None:
            return self.door(x)
        return self._firm(x, key, node) or _Loose(x)

    def _firm(self, x: torch.Tensor, key: int, node: Any = None) -> _Kept | _Again | None:
        """A handle for `x`, an input of the op of `node`, that no program which PyTorch accepts can spoil, or None: somebody
        saves it, it can be made again without its storage, or it is kept in fewer bits."""
        hold = self._held(key)
        if hold is not None:
            return self._keep(x, hold, "shared") if hold.stays(node) else None
        made_again = self._from_recipe(x, key)
        return self._coded(x, key) if made_again is None else made_again

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
                layout = mark.layout if _fills(mark.layout) else mark.layout._replace(stride=dense_stride(mark.layout.size))
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
        if self._pending:
            for key in [key for key, refs in self._pending.items() if all(ref() is None for ref in refs)]:
                del self._pending[key]


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


_CHECKPOINT = vars(torch_checkpoint)  # the globals of who saves what a checkpoint recomputes from
_APPLY = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)


def _writers(saver: types.FrameType) -> tuple[type, ...]:
    """The Function that saves, from whose `apply` the hook was called, if it is none of ours."""
    cls: type = saver.f_locals["cls"]
    return () if cls.__module__.startswith("unswag.") else (cls,)


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


def dense_stride(size: Sequence[int]) -> tuple[int, ...]:
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
