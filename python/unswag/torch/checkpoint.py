"""Gradient checkpointing under the stash: what a checkpointed layer recomputes passes a door too.

Only the innermost saved-tensor hooks run, so a stash around the model sees nothing of what a checkpointed layer saves.
In the layer's first forward that is right: nothing of it is kept but the inputs, which do pass the model's door. In the
recompute it is not: without recipes and sharing a layer would again keep everything twice. `prepare` therefore wraps the
function that the model calls to checkpoint a layer (`_gradient_checkpointing_func`, in transformers and what follows its
custom):

* non-reentrant: a `context_fn` whose two contexts put a pair of hooks before the checkpoint's own and delegate to them,
  so that counting, early stop and the check of metadata go on as in torch;
* reentrant: the layer's function runs inside a stash of its own when it is recomputed.

Inside the recompute everything is kept exactly, whatever the policy: it lives for one layer's backward only. What the policy's
role "checkpoint" encodes is what a layer is recomputed from.

A layer that is too large to recompute whole will be recomputed in tiles of tokens by a function with the same place here.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import nn

from unswag.torch import stash
from unswag.torch.stash import Stash

_NAME = "_gradient_checkpointing_func"


def prepare(model: nn.Module) -> list[str]:
    """Makes the model's checkpointed layers recompute under a stash. Call it before each forward: trainers put in a new
    checkpoint function whenever they switch checkpointing on. Idempotent.

    Returns what was left as it is and why, one sentence each, for the report.
    """
    notes: dict[str, None] = {}
    for module in model.modules():
        plain = vars(module).get(_NAME)
        if plain is None or isinstance(plain, StashedCheckpoint):
            continue
        reason = _reason_to_leave(plain)
        if reason is None:
            setattr(module, _NAME, StashedCheckpoint(plain))
        elif getattr(module, "gradient_checkpointing", True):
            notes[f"checkpointing is left as it is: {reason}"] = None
    return list(notes)


def release(model: nn.Module) -> None:
    """Undoes `prepare`."""
    for module in model.modules():
        function = vars(module).get(_NAME)
        if isinstance(function, StashedCheckpoint):
            setattr(module, _NAME, function.plain)


def _reason_to_leave(plain: Any) -> str | None:
    function, settings = _parts(plain)
    if getattr(function, "__module__", None) != "torch.utils.checkpoint" or function.__name__ != "checkpoint":
        return f"{getattr(function, '__qualname__', function)!s} is not torch's checkpoint (with offload=True it never is)"
    if settings.get("use_reentrant") is False:
        if "context_fn" in settings:
            return "it has a context_fn of its own"
        if _debugs(settings):
            return "debug=True takes no context_fn"
        if not _delegation_works():
            return f"the hooks of torch {torch.__version__}'s checkpoint cannot be wrapped"
    return None


def _parts(plain: Any) -> tuple[Any, dict[str, Any]]:
    if isinstance(plain, functools.partial):
        return plain.func, plain.keywords
    return plain, {}


def _debugs(settings: dict[str, Any]) -> bool:
    everywhere: bool | None = getattr(torch.utils.checkpoint, "_checkpoint_debug_enabled", None)
    return settings.get("debug", False) if everywhere is None else everywhere


class StashedCheckpoint:
    """Stands in for the checkpoint function `plain` of a module; calls it so that the recompute runs under a stash.

    Knows nothing of the module. Pickled and deep-copied it is `plain`, so that a saved model opens where UnSwag is absent."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (self.plain,)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        settings = _parts(self.plain)[1] | kwargs
        if torch.compiler.is_compiling() or "context_fn" in kwargs or _debugs(settings) or Stash.current() is None:
            return self.plain(function, *args, **kwargs)
        stash.plays("checkpoint", *(a for a in args if isinstance(a, torch.Tensor) and a.requires_grad))
        with stash.role("checkpoint"):  # the layer's own saved tensors do not pass a door in its first forward
            if settings.get("use_reentrant") is False:
                return self.plain(function, *args, context_fn=_contexts, **kwargs)
            return self.plain(functools.partial(_run_stashed, function), *args, **kwargs)


def _run_stashed(function: Callable[..., Any], *args: Any) -> Any:
    """The function of a reentrant checkpoint. In its first forward gradients are off, and so is the stash."""
    with Stash():
        return function(*args)


# The non-reentrant checkpoint's hooks: in the first forward they count what is saved and keep nothing; in the recompute
# they collect the tensors, which the first pair's unpack then hands out. We let them collect handles of a stash.


class _Stand(NamedTuple):
    """Stands for a recomputed tensor in the checkpoint's records: its handle, and the metadata that is compared."""

    handle: Any
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False


class _Link:
    """What the two contexts of one checkpointed call know of each other."""

    def __init__(self) -> None:
        self.delegated = False


def _contexts() -> tuple[Any, Any]:
    link = _Link()
    return _first_forward(link), _Recompute(link)


@contextlib.contextmanager
def _first_forward(link: _Link) -> Iterator[None]:
    hooks = stash._top_hooks()
    if hooks is None:
        yield
        return
    pack, unpack = hooks
    link.delegated = True
    with torch.autograd.graph.saved_tensors_hooks(pack, functools.partial(_unpack_recomputed, unpack)):
        yield


class _Recompute:
    """The context of the recompute; entered once per backward pass, in the thread of that pass."""

    def __init__(self, link: _Link) -> None:
        self.link = link

    def __enter__(self) -> None:
        hooks = stash._top_hooks()
        if hooks is None or not self.link.delegated:
            stash.step_aside()
        else:
            door = Stash()
            door.enter_behind(functools.partial(_pack_recomputed, door.door, hooks[0]))

    def __exit__(self, *exception: object) -> None:
        stash.leave()


def _pack_recomputed(door: Callable[[torch.Tensor, int], Any], collect: Callable[[Any], Any], t: torch.Tensor) -> Any:
    handle = door(t, 2)
    collect(_Stand(handle, t.shape, t.dtype, t.device))
    return handle


def _unpack_recomputed(unpack: Callable[[Any], Any], packed: Any) -> torch.Tensor:
    recomputed = unpack(packed)
    return stash.unpack(recomputed.handle) if isinstance(recomputed, _Stand) else recomputed


@functools.cache
def _delegation_works() -> bool:
    """Whether this torch's checkpoint lets itself be wrapped: tried once on a small function, in a thread of its own so
    that neither hooks nor modes of the caller take part."""
    tried: list[bool] = []
    thread = threading.Thread(target=lambda: tried.append(_try_delegation()))
    thread.start()
    thread.join()
    return tried == [True]


def _try_delegation() -> bool:
    calls = []

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return (x.sin() * x).exp()

    x = torch.linspace(-1, 1, 8, dtype=torch.float64, device="cpu", requires_grad=True)
    link = _Link()
    try:
        y = torch.utils.checkpoint.checkpoint(
            function, x, use_reentrant=False, preserve_rng_state=False,
            context_fn=lambda: (_first_forward(link), _Recompute(link)),
        )  # fmt: skip
        (ours,) = torch.autograd.grad(y.sum(), x)
    except Exception:  # whatever a later torch makes of it: then its checkpoint is used as it is
        return False
    (plain,) = torch.autograd.grad(function(x).sum(), x)
    return link.delegated and len(calls) == 3 and torch.equal(ours, plain)
