"""Logits that a model in training computes only if they are used.

Inside a forward that was given labels the call of the output embedding (the head) is deferred: `defer` returns a `LazyLogits`,
a tensor with shape, dtype and a place in the graph, but without data.  The model's own loss then consumes the hidden states in
chunks (loss.py).  The rule is that *the logits have one value at any moment*:

* Only scalings, tanh, casts, slices and reshapes to rows stay lazy, and only until the forward ends.  The first other use makes
  the logits, with their graph, and every lazy tensor derived from them so far; after that there is no loss in chunks.
* If no loss was made in chunks, the logits that were made replace the lazy object itself, which is a plain tensor from then on.
  A forward that ends without such a loss makes them before it returns.
* If a loss was made in chunks, the object remains a `LazyLogits`.  Every use is passed on to the logits that were made,
  edits in place included.  Only what would wait for the loss's gradient (hooks, `retain_grad`, `torch.autograd.grad`) is an
  error, because that gradient never arrives.
* The head makes them as it was in the forward: if its weights, settings or values have changed since, that is an error.
* Code that bypasses `__torch_function__` (autograd.Function, DDP's reducer, C++) gets data from `__torch_dispatch__`, and a
  node in the graph whose backward runs the head again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, is_fake
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from unswag.torch.autograd import once_differentiable
from unswag.torch.loss import LossOptions, head_cross_entropy, linear_cross_entropy
from unswag.torch.planned_device import is_planned
from unswag.torch.stash import dense_stride, is_plain

LABELS = (torch.int64, torch.uint8)  # dtypes that F.cross_entropy takes
REMEDY = "run the forward under unswag.torch.loss.keep_logits()"


@dataclass(frozen=True)
class Head:
    """The output embedding of a model, as the loss in chunks uses it.

    call        [..., H] -> [..., classes]: the head's forward before it became lazy
    parameters  all parameters of the head
    linear      (weight, bias) if `call` is F.linear with them and nothing else
    dtype       of the logits
    state       returns what else `call` depends on at that time, by name: settings, buffers, classes
    notes       counts the uses that made the logits after all
    """

    call: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    classes: int
    linear: tuple[Tensor, Tensor | None] | None
    dtype: torch.dtype
    state: Callable[[], dict[str, Any]]
    notes: Counter[str]

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.call(hidden) if self.linear is None else F.linear(hidden, *self.linear)


# ---- forwards that are running --------------------------------------------------------------------------------------------


class Frame:
    """A forward of `model` that is running in this thread, and whether it was given labels."""

    def __init__(self, model: nn.Module, labels: bool) -> None:
        self.model, self.labels, self.open, self.hooks = model, labels, True, _saved_tensors_hooks()
        self.deferrals: list[weakref.ref[Deferral]] = []

    def is_here(self) -> bool:
        """Whether it is running and no checkpoint began since: the checkpoint's recompute would have no frame, and make the
        logits."""
        return self.open and _saved_tensors_hooks() == self.hooks

    def its_hooks(self) -> Any:
        """A context in which the head's saved tensors go to the hooks of its own forward, and not to those of a checkpoint in
        which the logits happen to be made."""
        here = _saved_tensors_hooks()
        if here is None or here == self.hooks:
            return contextlib.nullcontext()
        pack, unpack = self.hooks if self.open and self.hooks is not None else (Tensor.detach, lambda t: t)
        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _saved_tensors_hooks() -> Any:
    """The innermost hooks of saved tensors, such as a checkpoint's."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


_running = threading.local()


def frames() -> list[Frame]:
    """The frames of this thread, the innermost last."""
    if not hasattr(_running, "frames"):
        _running.frames = []
    found: list[Frame] = _running.frames
    return found


@contextlib.contextmanager
def inside_forward(model: nn.Module, labels: bool) -> Iterator[None]:
    """Put around a forward of `model`.  At its end, logits that no loss consumed are made."""
    frame = Frame(model, labels)
    frames().append(frame)
    try:
        yield
        for ref in frame.deferrals:
            deferral = ref()
            if deferral is not None and not deferral.consumed:
                deferral.make("a forward that computed no loss from them")
    finally:
        frame.open = False
        frames().remove(frame)


# ---- one deferred call of the head ----------------------------------------------------------------------------------------


class Deferral:
    """A deferred head(hidden), and the lazy tensors derived from it.  Holds `hidden`."""

    def __init__(self, head: Head, hidden: Tensor, frame: Frame) -> None:
        device = hidden.device.type
        self.head, self.hidden, self.frame, self.consumed = head, hidden, frame, False
        self.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        self.lazies: list[weakref.ref[LazyLogits]] = []  # those that derive from others after these
        self.fake = is_fake(hidden)
        self._tensors = [("the hidden states", hidden), *(("the output embedding's weights", p) for p in head.parameters)]
        self._then = self._now()
        self._samples = [] if self.fake else [_sample(t) for _, t in self._tensors]
        self._state = {} if self.fake else head.state()
        ddp = DistributedDataParallel._active_ddp_module
        self.in_ddp_sink = ddp is not None and (ddp.find_unused_parameters or ddp.static_graph)
        frame.deferrals.append(weakref.ref(self))

    def _now(self) -> list[tuple[int, int]]:
        return [] if self.fake else [(t._version, t.data_ptr() if is_plain(t) else 0) for _, t in self._tensors]

    def check(self, look: bool = True) -> None:
        """Raises RuntimeError if the head would now make something else than in its forward.

        look: compare sampled values, too, because edits through `.data` leave no other trace; on a GPU this waits for it."""
        names = [what for what, _ in self._tensors]
        changed = [what for what, then, now in zip(names, self._then, self._now(), strict=False) if then != now]
        if look and not changed:
            changed = [what for (what, t), was in zip(self._tensors, self._samples, strict=False) if not _is_like(t, was)]
        if changed:
            raise RuntimeError(
                f"unswag: these logits were not computed in the forward, and {changed[0]} have been changed in place since (by "
                f"an optimizer step?), so they can no longer be computed; read outputs.logits earlier, or {REMEDY}"
            )
        now = {} if self.fake else self.head.state()
        if now != self._state:
            names = [name for name in {**now, **self._state} if now.get(name, ...) != self._state.get(name, ...)]
            raise RuntimeError(
                f"unswag: these logits were not computed in the forward, and the output embedding is no longer what it was "
                f"(changed: {', '.join(names[:3])}), so they can no longer be computed; read outputs.logits earlier, or "
                f"{REMEDY}"
            )

    def its_autocast(self) -> Any:
        """The autocast state in which the head was called."""
        enabled, dtype = self.autocast
        return torch.autocast(self.hidden.device.type, dtype=dtype, enabled=enabled)

    def make(self, use: str) -> None:
        """Makes the logits, and everything that derives from them and is still alive; `use` says why, for the warning."""
        held = [ref() for ref in self.lazies]
        alive = [lazy for lazy in held if isinstance(lazy, LazyLogits) and lazy._node.made is None]
        del held
        if not alive:
            return
        self.check()
        self._note(use, alive[0])
        nodes = [lazy._node for lazy in alive]
        with torch.inference_mode(False), torch.enable_grad(), self.its_autocast(), self.frame.its_hooks():
            for lazy, node in zip(alive, nodes, strict=True):
                made = node.value()
                if node.foreign:
                    made = _Attached.apply(lazy, made.detach())
                for hook in node.hooks:
                    made.register_hook(hook)
                if not self.consumed and node.data is None and _use_count(lazy) == _use_count(made) == 1:
                    _take_the_place_of(lazy, made)
                    made = lazy
                node.made, node.version = made, made._version
        for node in nodes:
            parent = node.parent
            while parent is not None:
                if parent not in nodes:  # no object is left of it
                    parent.made = None
                parent = parent.parent

    def _note(self, use: str, logits: Tensor) -> None:
        self.head.notes[use] += 1
        if self.head.notes[use] == 1:
            size = logits.shape.numel() * logits.dtype.itemsize / 2**20
            because = f"`{use}` was used on them" if use.isidentifier() else f"there was {use}"
            warnings.warn(
                f"unswag: the logits of a training step were made in full ({size:,.1f} MiB): {because}. Results are correct. "
                "To save this memory, let the model compute the loss from `labels`, and use no logits.",
                stacklevel=4,
            )


def _sample(t: Tensor) -> Any:
    """Some of the values: as bytes on the CPU, as a tensor on a GPU, where copying them out would wait for it.  None for a
    subclass, whose memory does not hold its values."""
    if not is_plain(t):
        return None
    each = int(256 ** (1 / max(1, t.ndim)))  # of each dimension
    few = t.detach()[tuple(slice(None, None, max(1, size // each)) for size in t.shape)]
    few = few.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
    return few.numpy().tobytes() if t.is_cpu else few


def _is_like(t: Tensor, sample: Any) -> bool:
    now = _sample(t)
    return torch.equal(now, sample) if isinstance(now, Tensor) else bool(now == sample)


class _Node:
    """What a lazy tensor stands for: head(hidden), or `method(*arguments)` of another one.

    made     the real tensor, with its graph;  data: its values alone, for uses below autograd
    foreign  another library's autograd.Function returned the lazy tensor, whose graph is therefore not ours
    """

    def __init__(self, deferral: Deferral, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> None:
        self.deferral, self.shape, self.stride, self.dtype = deferral, tuple(shape), tuple(stride), dtype
        self.parent: _Node | None = None
        self.step: tuple[str, tuple[Any, ...]] = ("", ())
        self.made: Tensor | None = None
        self.data: Tensor | None = None
        self.version = 0
        self.foreign = False
        self.hooks: list[Callable[[Tensor], Any]] = []

    def value(self) -> Tensor:
        """The real tensor."""
        if self.data is not None and self.data._version:
            raise RuntimeError(_EDITED)
        if self.made is None:
            self.made = self.run(self.deferral.hidden) if self.parent is None else _stepped(self.parent.value(), self.step)
            self.version = self.made._version
        return self.made

    def run(self, hidden: Tensor) -> Tensor:
        """The same, computed from other hidden states."""
        if self.parent is not None:
            return _stepped(self.parent.run(hidden), self.step)
        made = self.deferral.head(hidden)
        if tuple(made.shape) != self.shape or made.dtype != self.dtype:
            raise RuntimeError(
                f"unswag: the output embedding now returns {made.dtype} {tuple(made.shape)}; {self.dtype} {self.shape} was "
                f"expected; {REMEDY}"
            )
        return made.contiguous()

    def values(self) -> Tensor:
        """The values that the logits have now, without a graph."""
        self.check_unedited()
        if self.made is not None:
            return self.made.detach()
        if self.data is None:
            self.deferral.check()
            with torch.inference_mode(False), torch.no_grad(), self.deferral.its_autocast():
                self.data = self.run(self.deferral.hidden)
        return self.data

    def check_unedited(self) -> None:
        if (self.made is not None and self.made._version != self.version) or (self.data is not None and self.data._version):
            raise RuntimeError(_EDITED)

    def is_contiguous(self) -> bool:
        return self.stride == dense_stride(self.shape)


_EDITED = (
    "unswag: deferred logits were edited in place, and code that does not see such edits (an autograd.Function or C++ code) "
    f"uses them; pass it logits.clone(), or {REMEDY}"
)


def _stepped(made: Tensor, step: tuple[str, tuple[Any, ...]]) -> Tensor:
    out: Tensor = getattr(made, step[0])(*step[1])
    return out


_use_count: Callable[[Tensor], int] = torch._C.TensorBase._use_count  # type: ignore[attr-defined]  # references held by C++


def _take_the_place_of(lazy: Tensor, made: Tensor) -> None:
    """Turns the lazy object into `made`, as torch.utils.swap_tensors does, which refuses objects with weak references."""
    lazy.__class__, made.__class__ = made.__class__, lazy.__class__
    lazy.__dict__, made.__dict__ = made.__dict__, lazy.__dict__
    torch._C._swap_tensor_impl(lazy, made)


class _Again(torch.autograd.Function):
    """The graph of a lazy tensor, for code that bypasses `__torch_function__`: the backward runs the head again."""

    @staticmethod
    def forward(ctx: Any, node: _Node, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.node, ctx.parameters = node, parameters
        ctx.set_materialize_grads(False)
        return LazyLogits._of(node)

    @staticmethod
    @once_differentiable(sources_are_saved=False)
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        node: _Node = ctx.node
        node.check_unedited()
        node.deferral.check()
        with torch.enable_grad(), node.deferral.its_autocast():
            hidden = node.deferral.hidden.detach().requires_grad_(ctx.needs_input_grad[1])
            made = node.run(hidden)
            wanted = [t for t, needed in zip((hidden, *ctx.parameters), ctx.needs_input_grad[1:], strict=True) if needed]
            found = iter(torch.autograd.grad(made, wanted, gradient, allow_unused=True))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])


class _Attached(torch.autograd.Function):
    """A copy of `data`, at the place in the graph that another library's autograd.Function gave a lazy tensor."""

    @staticmethod
    def forward(ctx: Any, lazy: Tensor, data: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return data.clone()

    @staticmethod
    @once_differentiable(sources_are_saved=False)
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None


def _add(node: _Node) -> LazyLogits:
    deferral = node.deferral
    lazy: LazyLogits = _Again.apply(node, deferral.hidden, *(p for p in deferral.head.parameters if p.requires_grad))
    deferral.lazies.append(weakref.ref(lazy))
    return lazy


def defer(head: Head, hidden: Tensor, frame: Frame) -> Tensor:
    """Lazy logits [..., classes] in place of head(hidden), in the forward `frame`."""
    shape = (*hidden.shape[:-1], head.classes)
    return _add(_Node(Deferral(head, hidden, frame), shape, dense_stride(shape), head.dtype))


# ---- the tensor -----------------------------------------------------------------------------------------------------------


class LazyLogits(Tensor):
    """Logits [..., classes] that are made when they are used; see the head of this file.

    Any use other than the few that stay lazy makes the real logits (once, with the head and autocast state of the forward),
    warns once and counts it in `head.notes`.  Raises RuntimeError when that is no longer possible, or would be wrong.
    """

    _node: _Node

    @classmethod
    def _of(cls, node: _Node) -> LazyLogits:
        lazy: LazyLogits = Tensor._make_wrapper_subclass(
            cls, node.shape, strides=node.stride, dtype=node.dtype, device=node.deferral.hidden.device
        )
        lazy._node = node
        return lazy

    def cross_entropy(self, labels: Tensor, **options: Any) -> Tensor | None:
        """F.cross_entropy of these logits and labels [...] in chunks; `options` as in `LossOptions`, without softcap and scale.

        None if the logits are made or their forward is over, if they are not softcap tanh(scale logits / softcap), or if the
        loss of each row is asked of a head that is not linear.
        """
        node, deferral = self._node, self._node.deferral
        if not _is_open(node):
            return None
        hidden, classes, chain = _rows(node)
        form = _softcap_and_scale(chain)
        if form is None:
            return None
        chosen = LossOptions(softcap=form[0], logit_scale=form[1], **options)
        if chosen.reduction == "none" and deferral.head.linear is None:
            return None
        deferral.check(look=False)
        if deferral.fake and not is_planned():  # surgery's dry run, in which what the chunks keep is not counted
            deferral.consumed = True
            return hidden.sum()
        with deferral.its_autocast():
            loss = _chunked(deferral.head, hidden, classes, labels, chosen)
        deferral.consumed = True
        return loss

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        name = _name(func)
        if isinstance(first, LazyLogits) and first._node.made is None:
            if func in _METADATA:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            stays = _lazily(first, func, name, args[1:], kwargs)
            if stays is not None:
                return stays
        _refuse_to_wait(func, name, first, args, kwargs)
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, LazyLogits):
                x._node.deferral.make(name)
        real = lambda x: x._node.made if isinstance(x, LazyLogits) else x  # noqa: E731
        out = func(*tree_map(real, args), **tree_map(real, kwargs))
        return first if isinstance(first, LazyLogits) and out is first._node.made else out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            written = [a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write]
            written += [kwargs[s.name] for s in func._schema.arguments if s.name in kwargs and s.alias_info]
            if any(isinstance(t, LazyLogits) for t in tree_leaves(written)):
                raise RuntimeError(_EDITED)
        values = lambda x: x._node.values() if isinstance(x, LazyLogits) else x  # noqa: E731
        return func(*tree_map(values, args), **tree_map(values, kwargs))


def _is_open(node: _Node) -> bool:
    """Whether its forward is running, and it has not been made."""
    return node.made is None and node.data is None and not node.foreign and node.deferral.frame.is_here()


def _lazily(logits: LazyLogits, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result, if it stays lazy or is a loss in chunks; else None."""
    node = logits._node
    if name == "to" and len(args) == 1 and not kwargs and isinstance(args[0], (str, torch.device)):
        return logits if torch.device(args[0]) == node.deferral.hidden.device else None
    if func in (Tensor.clone, torch.clone) and node.deferral.in_ddp_sink and node.deferral.consumed and not kwargs:
        return _passed_on(logits) if not torch.is_grad_enabled() and _use_count(logits) > 1 else None
    if func is Tensor.register_hook and _is_of_fsdp(args[0]):
        node.hooks.append(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(logits, args[0])
    casts = node.deferral.consumed and name in _CASTS  # accelerate casts what a forward returns
    if node.data is not None or node.foreign or not torch.is_grad_enabled() or not (casts or _is_open(node)):
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    if func is F.cross_entropy:
        return _as_stock(logits, *args, **kwargs)
    method = _CHAIN.get(name)
    return None if method is None or kwargs else method(logits, *args)


def _passed_on(logits: LazyLogits) -> LazyLogits:
    """The clone that DDP's sink, an autograd.Function, returns: its place in the graph is the sink's."""
    node = _then(logits._node, "clone")
    node.foreign = True
    lazy = LazyLogits._of(node)
    node.deferral.lazies.append(weakref.ref(lazy))
    return lazy


def _refuse_to_wait(func: Any, name: str, first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises RuntimeError for calls that wait for the gradient of logits whose loss was made without them."""
    waits = first if func in _WAITS else (args[1:2], kwargs.get("inputs")) if func is torch.autograd.grad else None
    if func is Tensor.register_hook and _is_of_fsdp(args[1]):
        return
    for logits in tree_leaves(waits):
        if isinstance(logits, LazyLogits) and (logits._node.deferral.consumed or logits._node.made is not None):
            raise RuntimeError(
                f"unswag: `{name}` on deferred logits: the model's loss was computed without them, from the hidden states, so "
                f"its gradient never reaches them; {REMEDY}"
            )


def _is_of_fsdp(hook: Any) -> bool:
    """Whether a hook is FSDP's, which needs the gradient of any one of a forward's outputs, and gets the loss's."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("torch.distributed.")


def _name(func: Any) -> str:
    """The name of a function, or of the property that is read or set."""
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name in ("__get__", "__set__") else name


_PROPERTIES = (
    "shape dtype device ndim requires_grad is_leaf layout grad_fn _base output_nr retains_grad itemsize nbytes is_cpu "
    "is_cuda is_meta is_mps is_xpu is_nested is_mkldnn is_quantized is_sparse is_sparse_csr"
)
_METHODS = (
    "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex element_size __len__ get_device "
    "_is_view"
)
_METADATA: set[Any] = {getattr(Tensor, name).__get__ for name in _PROPERTIES.split() if hasattr(Tensor, name)}
_METADATA |= {getattr(Tensor, name) for name in _METHODS.split()}
_METADATA |= {torch.is_floating_point, torch.is_complex, torch.numel, torch.is_inference, Tensor.is_inference}
_WAITS: set[Any] = {Tensor.register_hook, Tensor.retain_grad, getattr(Tensor.grad, "__get__")}  # noqa: B009


# ---- the chain ------------------------------------------------------------------------------------------------------------


def _then(
    node: _Node,
    method: str,
    *arguments: Any,
    shape: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> _Node:
    shape = node.shape if shape is None else shape
    new = _Node(node.deferral, shape, dense_stride(shape) if stride is None else stride, dtype or node.dtype)
    new.parent, new.step = node, (method, arguments)
    return new


def _times(logits: LazyLogits, other: Any = None) -> LazyLogits | None:
    return _add(_then(logits._node, "mul", other)) if _is_number(other) else None


def _over(logits: LazyLogits, other: Any = None) -> LazyLogits | None:
    return _add(_then(logits._node, "div", other)) if _is_number(other) else None


def _tanh(logits: LazyLogits) -> LazyLogits:
    return _add(_then(logits._node, "tanh"))


def _to(logits: LazyLogits, *args: Any) -> LazyLogits | None:
    if len(args) != 1 or not isinstance(args[0], torch.dtype) or not args[0].is_floating_point:
        return None
    return logits if args[0] == logits._node.dtype else _add(_then(logits._node, "to", args[0], dtype=args[0]))


def _contiguously(logits: LazyLogits) -> LazyLogits:
    return logits if logits._node.is_contiguous() else _add(_then(logits._node, "contiguous"))


def _as_rows(how: str, logits: LazyLogits, *shape: Any) -> LazyLogits | None:
    """[rows, classes]."""
    node = logits._node
    rows, sizes = node.shape[:-1], tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if len(sizes) != 2 or sizes[0] not in (-1, torch.Size(rows).numel()) or sizes[1] not in (-1, node.shape[-1]):
        return None
    if sizes == (-1, -1) or 0 in node.shape:
        return None
    sizes = (torch.Size(rows).numel(), node.shape[-1])
    steps = [(size, stride) for size, stride in zip(rows, node.stride[:-1], strict=True) if size != 1]
    if all(outer == size * stride for (_, outer), (size, stride) in itertools.pairwise(steps)):  # a view
        stride = (steps[-1][1] if steps else node.shape[-1], node.stride[-1])
        return _add(_then(node, how, *sizes, shape=sizes, stride=stride))
    return None if how == "view" else _add(_then(node, how, *sizes, shape=sizes))


def _sliced(logits: LazyLogits, index: Any = None) -> LazyLogits | None:
    node = logits._node
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, slice) or i is Ellipsis for i in index) or index.count(Ellipsis) > 1:
        return None
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *(slice(None),) * (len(node.shape) - len(index) + 1), *index[at + 1 :])
    index = (*index, *(slice(None),) * (len(node.shape) - len(index)))
    if len(index) != len(node.shape) or not all(_is_plain_slice(i) for i in index):
        return None
    taken = [range(*i.indices(size)) for i, size in zip(index, node.shape, strict=True)]
    if taken[-1].start != 0 or taken[-1].step != 1 or not len(taken[-1]):
        return None
    shape = [len(r) for r in taken]
    stride = [step * r.step for step, r in zip(node.stride, taken, strict=True)]
    return _add(_then(node, "__getitem__", index, shape=shape, stride=stride))


def _is_plain_slice(index: slice) -> bool:
    parts = (index.start, index.stop, index.step)
    return all(part is None or type(part) is int for part in parts) and (index.step is None or index.step > 0)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


_CASTS: dict[str, Callable[..., LazyLogits | None]] = {
    "to": _to,
    "float": lambda x: _to(x, torch.float32),
    "double": lambda x: _to(x, torch.float64),
    "half": lambda x: _to(x, torch.float16),
    "bfloat16": lambda x: _to(x, torch.bfloat16),
}
_CHAIN: dict[str, Callable[..., LazyLogits | None]] = {
    **_CASTS,
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _times),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__"), _over),
    "tanh": _tanh,
    "contiguous": _contiguously,
    "view": functools.partial(_as_rows, "view"),
    "reshape": functools.partial(_as_rows, "reshape"),
    "__getitem__": _sliced,
}


# ---- the loss, in chunks --------------------------------------------------------------------------------------------------


def _rows(node: _Node) -> tuple[Tensor, int, list[tuple[str, Any]]]:
    """(hidden, classes, chain): the hidden states that these logits are of, how many classes, and the scalings and tanhs."""
    if node.parent is None:
        return node.deferral.hidden, node.deferral.head.classes, []
    hidden, classes, chain = _rows(node.parent)
    method, arguments = node.step
    if method == "__getitem__":
        return hidden[arguments[0][:-1]], node.shape[-1], chain
    if method in ("view", "reshape"):
        return hidden.reshape(-1, hidden.shape[-1]), classes, chain
    if method in ("mul", "div", "tanh"):
        chain = [*chain, (method, *arguments)]
    return hidden, classes, chain


def _softcap_and_scale(chain: Sequence[tuple[Any, ...]]) -> tuple[float, float] | None:
    """(softcap, scale) if the chain is z = softcap tanh(scale x / softcap), or scale x with softcap 0; else None."""
    inner, outer, capped = 1.0, 1.0, False  # z = outer tanh(inner x), or inner x
    for name, *constant in chain:
        if name == "tanh":
            if capped:
                return None
            capped = True
        else:
            if name == "div" and constant[0] == 0:
                return None
            factor = constant[0] if name == "mul" else 1 / constant[0]
            inner, outer = (inner, outer * factor) if capped else (inner * factor, outer)
    if not capped:
        return 0.0, inner
    return (abs(outer), inner * outer) if outer else None


def _chunked(head: Head, hidden: Tensor, classes: int, labels: Tensor, options: LossOptions) -> Tensor:
    if head.linear is None:
        call = head.call if classes == head.classes else lambda rows: head.call(rows)[..., :classes]
        wanted = tuple(p for p in head.parameters if p.requires_grad)
        return head_cross_entropy(call, wanted, classes, hidden, labels, options=options)
    weight, bias = head.linear
    if classes != head.classes:
        weight, bias = weight[:classes], None if bias is None else bias[:classes]
    return linear_cross_entropy(hidden, weight, labels, bias=bias, **vars(options))


def _as_stock(
    logits: LazyLogits,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """What F.cross_entropy returns when a model calls it with lazy logits, in their dtype; None for what the chunks cannot do:
    classes in another dimension, probabilities as targets, weights of classes."""
    if (
        logits.ndim != 2
        or weight is not None
        or size_average is not None
        or reduce is not None
        or type(target) not in (Tensor, FakeTensor)
        or target.dtype not in LABELS
        or target.shape != logits.shape[:1]
    ):
        return None
    loss = logits.cross_entropy(target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    if loss is None or is_fake(loss):
        return loss
    widened = torch.is_autocast_enabled(logits.device.type) and logits.dtype != torch.float64
    return loss.to(torch.float32 if widened else logits.dtype)
