"""One call of a layer in tiles of tokens: how its arguments are cut, its forward, and its backward in reverse.

The gradients of weights are summed over the tiles in float32 and given to autograd once, as those of inputs of one Function. So
hooks on parameters run once per backward pass. Hooks on modules inside the layer, and on tensors in them, run once per tile,
and the layer's own once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from unswag.torch import stash
from unswag.torch.attention import Spans, diverted
from unswag.torch.autograd import once_differentiable
from unswag.torch.checkpoint.tile_attention import Kept, KeysKnown, LayerAttention, Unswept
from unswag.torch.stash import Stash
from unswag.torch.stash.thread import state

SCALARS = (bool, int, float, str, type(None), torch.dtype)
OF_THE_BATCH = ("num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # not of tokens
ASKS = ("output_attentions", "output_router_logits")  # arguments that ask for more than hidden states


class Ticket(Protocol):
    """Stands for a tensor in a store (`unswag.torch.store`)."""

    def prefetch(self) -> None: ...
    def get(self, out: Tensor | None = None) -> Tensor: ...
    def drop(self) -> None: ...


# ---- a call of a layer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call of a layer's forward: hidden states x [batch, tokens, hidden], and its other arguments by name.

    Arguments whose name contains "position" belong to tokens: those of embeddings in their last dimension but one, the others
    in their last. A dimension of one element belongs to all tokens.
    """

    layer: nn.Module
    forward: Callable[..., Any]
    hidden: str  # the name of x
    x: Tensor
    tokens: int
    arguments: dict[str, Any]

    @classmethod
    def of(cls, function: functools.partial[Any], layer: nn.Module, args: tuple[Any, ...]) -> Call:
        names = _names(function.func)
        if names is None or len(args) > len(names):
            raise Unswept("its forward does not name its arguments")
        given = dict(zip(names, args, strict=False)) | function.keywords
        x = given.pop(names[0], None)
        if not isinstance(x, Tensor) or x.ndim != 3 or not x.is_floating_point() or not stash.is_plain(x):
            raise Unswept("its first argument is not a tensor [batch, tokens, hidden]")
        call = cls(layer, function.func, names[0], x, x.shape[1], given)
        if recorded := _recorded():
            raise Unswept(f"transformers records {', '.join(recorded)} inside it, which would be those of tiles")
        for name, value in given.items():
            if name in ASKS and value:
                raise Unswept(f"{name}=True asks for more than its hidden states")
            call._cut(name, value, 0, call.tokens)
        return call

    def tile(self, start: int, stop: int) -> dict[str, Any]:
        """The other arguments for the tokens [start, stop)."""
        return {name: self._cut(name, value, start, stop) for name, value in self.arguments.items()}

    def _cut(self, name: str, value: Any, start: int, stop: int) -> Any:
        if name in OF_THE_BATCH or isinstance(value, SCALARS) or (isinstance(value, Spans) and value.length == self.tokens):
            return value
        if "position" not in name:
            raise Unswept(f"how its argument {name} ({type(value).__name__}) belongs to tokens is not known")
        if isinstance(value, (tuple, list)):
            return type(value)(self._cut(name, part, start, stop) for part in value)
        axis = -2 if "embedding" in name else -1
        if not isinstance(value, Tensor) or value.ndim < -axis or value.requires_grad or not stash.is_plain(value):
            raise Unswept(f"how its argument {name} ({type(value).__name__}) belongs to tokens is not known")
        if value.shape[axis] == 1 != self.tokens:
            return value
        if value.shape[axis] != self.tokens:
            raise Unswept(f"its argument {name} has {value.shape[axis]} elements for {self.tokens} tokens")
        return value.narrow(axis, start, stop - start)

    def signature(self) -> Hashable:
        """Equal for calls that a proof need not tell apart: it does not contain values of tensors, nor the number of tokens."""
        device = self.x.device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        given = ((name, type(value) if name in OF_THE_BATCH else _signature(value)) for name, value in self.arguments.items())
        arguments = tuple(sorted(given, key=lambda item: item[0]))
        return self.x.dtype, device, autocast, self.layer.training, arguments


def _recorded() -> list[str]:
    """What transformers collects from modules while its model runs, hidden states aside: those it takes from whole layers."""
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    asked = collector.get() if collector is not None else None
    return sorted(name for name in asked or () if not name.startswith("_") and name != "hidden_states")


@functools.cache
def _names(forward: Callable[..., Any]) -> list[str] | None:
    """The names of the arguments of a forward, from the hidden states on."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    if not parameters or any(p.kind not in kinds for p in parameters):
        return None
    return [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] or None


def _signature(value: Any) -> Hashable:
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    if isinstance(value, Tensor):
        return value.ndim, value.dtype
    return ("spans", value.window is not None) if isinstance(value, Spans) else (type(value), value)


# ---- random numbers and autocast --------------------------------------------------------------------------------------------


class Random:
    """The states of PyTorch's generators before each tile, so that a recompute draws what the forward drew. A state that is
    equal to that of the tile before is held once: 5 KB per layer where nothing draws, and per tile where something does."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        self.states: list[tuple[Tensor, Tensor | None]] = []

    def note(self) -> None:
        with _disable_current_modes():  # the states are real where tensors have no data
            now = (torch.get_rng_state(), None if self.cuda is None else torch.cuda.get_rng_state(self.cuda))
            if self.states and all(a is b or _same(a, b) for a, b in zip(now, self.states[-1], strict=True)):
                now = self.states[-1]
        self.states.append(now)

    def set(self, tile: int) -> None:
        cpu, cuda = self.states[tile]
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self.cuda)  # type: ignore[arg-type]

    def kept_aside(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block the generators may be set; afterwards they are as before."""
        return torch.random.fork_rng([] if self.cuda is None else [self.cuda])


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Of the states of a generator, in CPU memory. Not torch.equal, which tensors without data do not allow."""
    return a is not None and b is not None and a.numpy().tobytes() == b.numpy().tobytes()


class Autocast:
    """Autocast as it is now, to be entered again."""

    def __init__(self, device: torch.device) -> None:
        self.settings = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in dict.fromkeys(("cpu", device.type))
        ]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Casts that autocast makes of weights last to the end of the block: without gradients they must not outlast it."""
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in self.settings:
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            torch.clear_autocast_cache()
            yield
            torch.clear_autocast_cache()


# ---- the sweep --------------------------------------------------------------------------------------------------------------


class Visit:
    """One call of a layer: its forward, and its backward."""

    def __init__(
        self,
        call: Call,
        tile: int,
        key_block: int,
        keep_attention: bool | None,
        current: Stash | None,
        parameters: Sequence[nn.Parameter],
        check: Callable[[nn.Module], None] = lambda layer: None,
        calls: int = -1,
    ) -> None:
        """check  raises Unswept if the layer is not what was proven;  calls  of its attention in each tile, -1 if not known"""
        self.call = replace(call, x=call.x.detach()[:, :0].clone())  # x belongs to autograd
        self.layer, self.tokens, self.size, self.key_block = call.layer, call.tokens, tile, key_block
        self.starts = list(range(0, call.tokens, tile))
        policy = None if current is None else current.policy
        self.codec = None if policy is None else policy.codec("checkpoint")
        self.tier = None if policy is None else policy.tier("checkpoint")
        self.store = None if current is None or self.tier is None else current.store(self.tier)
        self.keeps = self.tier is not None if keep_attention is None else keep_attention
        self.stored: list[list[Ticket]] = []  # of each tile: x, and with `keeps` o, lse, k, v
        self.kept: list[Kept] = []  # without a store, until autograd has them
        self.random, self.autocast = Random(call.x.device), Autocast(call.x.device)
        self.calls, self.check = calls, check
        self.training = [module.training for module in call.layer.modules()]
        self.versions = [p._version for p in parameters]
        self.returns: Any = None  # what the layer returns beside hidden states: None, or the length of its tuple

    def stop(self, start: int) -> int:
        return min(start + self.size, self.tokens)

    def run(self, attention: LayerAttention, x: Tensor, start: int) -> Tensor:
        """The layer's own forward on a tile; returns its hidden states."""
        attention.at(start, self.stop(start))
        with diverted(attention.attend):
            y = self.call.forward(self.layer, **{self.call.hidden: x}, **self.call.tile(start, self.stop(start)))
        if self.calls not in (-1, attention.calls):
            raise Unswept("it does not compute its attention in each tile")
        self.calls, self.returns = attention.calls, len(y) if isinstance(y, tuple) else None
        if isinstance(y, tuple):
            if any(part is not None for part in y[1:]):
                raise Unswept("it returns more than its hidden states")
            y = y[0]
        if not isinstance(y, Tensor) or y.shape[:2] != x.shape[:2] or y.ndim != 3:
            raise Unswept("it does not return hidden states [batch, tokens, hidden]")
        return y

    def forward(self, x: Tensor) -> Tensor:
        attention = LayerAttention(self.tokens, self.key_block)
        attention.keep = self.keeps
        y: Tensor | None = None
        before = self.random
        before.note()
        try:
            with self.autocast.entered():
                for i, start in enumerate(self.starts):
                    if i:
                        self.random.note()
                    tile = x[:, start : self.stop(start)]
                    out = self.run(attention, tile, start)
                    if y is None:
                        y = out.new_empty(x.shape[0], self.tokens, out.shape[-1])
                    y[:, start : self.stop(start)] = out
                    self._keep(tile, attention.kept)
        except Unswept:
            before.set(0)
            raise
        assert y is not None
        return y

    def _keep(self, x: Tensor, kept: Kept | None) -> None:
        if self.store is None:
            self.kept += [kept] if kept is not None else []
            return
        self.stored.append([self._put(x, self.codec), *(self._put(t, None) for t in kept or ())])

    def _put(self, t: Tensor, codec: str | None) -> Ticket:
        assert self.store is not None
        ticket: Ticket = self.store.put(t, "checkpoint", codec)
        if state.recorder is not None:
            state.recorder.note(t, ticket, self.tier or "", "checkpoint")
        return ticket

    def returned(self, y: Tensor) -> Any:
        """As the layer returns it."""
        return y if self.returns is None else (y, *(None,) * (self.returns - 1))

    def saved(self, x: Tensor) -> tuple[Tensor, ...]:
        """What autograd keeps, if no store does: x, and with `keeps` o, lse, k, v of each tile."""
        kept, self.kept = self.kept, []
        return () if self.stored else (x, *(t for tile in kept for t in tile))

    def backward(self, saved: tuple[Tensor, ...], dy: Tensor, dx: Tensor | None, again: bool) -> list[Tensor | None]:
        """Writes the gradient of x into `dx`, if that is given; it may be `dy`. Returns the gradients of the parameters.

        saved  what autograd kept
        again  whether there may be another backward pass, so that what is stored stays
        """
        x = saved[0] if saved else None
        kept = [Kept(*saved[i : i + 4]) for i in range(1, len(saved), 4)]
        if not self.starts:
            raise RuntimeError(
                "the backward of a swept layer ran before and freed what the layer kept; pass retain_graph=True to the first "
                "backward if there is to be a second"
            )
        self.check(self.layer)
        if [module.training for module in self.layer.modules()] != self.training:
            raise Unswept("it is in another mode (train or eval)")
        parameters = [p for p in self.layer.parameters() if p.requires_grad]
        if [p._version for p in parameters] != self.versions:
            raise RuntimeError(
                f"a parameter of {type(self.layer).__name__} was changed in place, or frozen, between the forward and the "
                "backward of a swept layer, whose recompute would use it; call the optimizer after the backward"
            )
        attention = LayerAttention(self.tokens, self.key_block)
        sums: list[Tensor | None] = [None] * len(parameters)
        with self.random.kept_aside():
            if self.calls and not self.keeps:
                self._find_keys(attention, x)
            elif self.calls:
                self._bring_keys(attention, kept)
            attention.passes = "backward"
            with self.autocast.entered():
                for i in reversed(range(len(self.starts))):
                    if self.calls and self.keeps:
                        o, lse = (t.get() for t in self.stored[i][1:3]) if self.stored else kept[i][:2]
                        attention.kept = Kept(o, lse, o, o)
                    self._tile(i, attention, x, dy, dx, parameters, sums)
                    if self.stored and not again:
                        for ticket in self.stored[i]:
                            ticket.drop()
        attention.release()
        if not again:  # the graph may live on
            self.starts, self.stored = [], []
            self.call = replace(self.call, arguments={})
        return [None if g is None else g.to(p.dtype) for g, p in zip(sums, parameters, strict=True)]

    def _input(self, i: int, x: Tensor | None) -> Tensor:
        start = self.starts[i]
        return self.stored[i][0].get() if x is None else x[:, start : self.stop(start)].detach()

    def _find_keys(self, attention: LayerAttention, x: Tensor | None) -> None:
        """K and V of all tokens, by the layer's forward up to its attention."""
        attention.passes = "keys"
        with torch.no_grad(), self.autocast.entered():
            for i, start in enumerate(self.starts):
                self.random.set(i)
                if self.stored and i + 1 < len(self.stored):
                    self.stored[i + 1][0].prefetch()
                with contextlib.suppress(KeysKnown):
                    self.run(attention, self._input(i, x), start)

    def _bring_keys(self, attention: LayerAttention, kept: Sequence[Kept]) -> None:
        for i, start in enumerate(self.starts):
            attention.at(start, self.stop(start))
            for ticket in self.stored[i + 1][3:] if i + 1 < len(self.stored) else ():
                ticket.prefetch()
            k, v = (t.get() for t in self.stored[i][3:]) if self.stored else kept[i][2:]
            attention.put(k, v)

    def _tile(
        self,
        i: int,
        attention: LayerAttention,
        x: Tensor | None,
        dy: Tensor,
        dx: Tensor | None,
        parameters: Sequence[nn.Parameter],
        sums: list[Tensor | None],
    ) -> None:
        here = slice(self.starts[i], self.stop(self.starts[i]))
        self.random.set(i)
        for ticket in self.stored[i - 1][:3] if self.stored and i else ():
            ticket.prefetch()
        tile = self._input(i, x)
        with torch.enable_grad():
            if dx is not None:
                tile.requires_grad_()
            with Stash():
                y = self.run(attention, tile, here.start)
        wanted = [*([tile] if dx is not None else []), *parameters]
        found = list(torch.autograd.grad(y, wanted, dy[:, here], allow_unused=True))
        if dx is not None:
            got = found.pop(0)
            dx[:, here] = 0 if got is None else got
            del got
        for j, (p, g) in enumerate(zip(parameters, found, strict=True)):
            if g is None:
                continue
            total = sums[j]
            if total is None:
                sums[j] = torch.empty(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device).copy_(g)
            else:
                total += g
        attention.kept = None


_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


class SweptLayer(torch.autograd.Function):
    """y = layer(x), swept. Its inputs are also the layer's parameters that require gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, visit: Visit, *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.visit = visit
        y = visit.forward(x)
        ctx.save_for_backward(*visit.saved(x))
        return y

    @staticmethod
    @functools.partial(once_differentiable, sources_are_saved=False)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        visit: Visit = ctx.visit
        dx = None
        if ctx.needs_input_grad[0]:
            mine = _holders(dy) == _sole_holders() and dy.is_contiguous() and dy.dtype == visit.call.x.dtype
            dx = dy if mine else torch.empty(dy.shape, dtype=visit.call.x.dtype, device=dy.device)
        again = _keeps_graph is None or _keeps_graph()
        try:
            return dx, None, *visit.backward(ctx.saved_tensors, dy, dx, again)
        except Unswept as reason:
            raise RuntimeError(
                f"{type(visit.layer).__name__} was swept in the forward, but in the backward {reason}; do not change the model "
                "between the two, or use sweep=False"
            ) from None


# ---- who holds a gradient ---------------------------------------------------------------------------------------------------
#
# A gradient may be overwritten if nobody but the running backward holds it: no other branch of the graph, no hook, no alias.


def _holders(dy: Any) -> tuple[int, int, int]:
    """Counts of references to dy: by Python, as a tensor, to its storage."""
    return sys.getrefcount(dy), dy._use_count(), torch._C._storage_Use_Count(dy.untyped_storage()._cdata)


class _Counts(torch.autograd.Function):
    """The identity; its backward writes down who holds its gradient, which nobody else does."""

    seen: tuple[int, int, int] | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    @functools.partial(once_differentiable, sources_are_saved=False)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor]:
        _Counts.seen = _holders(dy)
        return (dy,)


@functools.cache
def _sole_holders() -> tuple[int, int, int] | None:
    """`_holders` of a gradient that only the running backward holds; None if this PyTorch does not tell it from a held one."""
    found: list[tuple[int, int, int] | None] = []
    thread = threading.Thread(target=lambda: found.append(_count_holders()))
    thread.start()
    thread.join()
    return found[0] if found else None


def _count_holders() -> tuple[int, int, int] | None:
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(2, device="cpu", requires_grad=True)
            counts: list[tuple[int, int, int] | None] = []
            held: list[Tensor] = []
            for hook in (None, held.append, lambda g: held.append(g.detach())):
                y = _Counts.apply(x)
                if hook is not None:
                    y.register_hook(hook)
                (y * 2).sum().backward()
                counts.append(_Counts.seen)
            one = _Counts.apply(x)
            (one + _Counts.apply(x)).mul(2).sum().backward()
            counts.append(_Counts.seen)
    except Exception:  # a later PyTorch may count otherwise, or not at all
        return None
    return None if counts[0] in counts[1:] else counts[0]
