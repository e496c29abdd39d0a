"""Gradient checkpointing under the stash: the recompute of a checkpointed layer runs under a stash of its own.

PyTorch runs only the innermost saved-tensor hooks, so the stash around the model does not see what a checkpointed layer saves.
In the layer's first forward that is right: only the layer's inputs are kept, and those do pass the model's stash. In the
recompute it is not: without recipes and sharing, a layer would again keep everything twice. `prepare` therefore wraps the
function that the model calls to checkpoint a layer (`_gradient_checkpointing_func` in transformers and in libraries that
follow its convention):

* non-reentrant: a `context_fn` whose two contexts put a pair of hooks before the checkpoint's own and delegate to them,
  so that counting, early stop and the check of metadata go on as in PyTorch;
* reentrant: the layer's function runs inside a stash of its own when it is recomputed.

Inside the recompute everything is kept exactly, whatever the policy: it lives for one layer's backward only. The policy's role
"checkpoint" says how the inputs are kept from which a layer is recomputed.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import nn

from unswag.torch import stash
from unswag.torch.checkpoint.sweep import Sweep
from unswag.torch.stash import Stash

ATTRIBUTE = "_gradient_checkpointing_func"  # of a module: the function that it calls to checkpoint a layer


def prepare(model: nn.Module, sweep: Sweep | None = None) -> list[str]:
    """Makes the model's checkpointed layers recompute under a stash, or swept where that is asked for and proven. Call it
    before each forward: trainers install a new checkpoint function whenever they switch checkpointing on. Idempotent.

    Returns one sentence for each kind of checkpoint function that was not wrapped, with the reason, for the report.
    """
    notes: dict[str, None] = {}
    for module in _modules_of(model):
        plain = module.__dict__.get(ATTRIBUTE)
        if plain is None or type(plain) is StashedCheckpoint:
            continue
        reason = _reason_to_leave(plain)
        if reason is None:
            setattr(module, ATTRIBUTE, StashedCheckpoint(plain, sweep))
        elif getattr(module, "gradient_checkpointing", True):
            notes[f"checkpointing is not changed: {reason}"] = None
    return list(notes)


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of `model`; walked anew only after one of them got another child, because this runs before each forward."""
    if torch.compiler.is_compiling():  # which would guard what is remembered here
        return list(model.modules())
    known = _walks.get(model)
    if known is None or known[0] != _changes[0]:
        modules = list(model.modules())
        _walked.update(modules)
        known = _walks[model] = _changes[0], [weakref.ref(module) for module in modules]
    return [module for ref in known[1] if (module := ref()) is not None]


_walks: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[weakref.ref[nn.Module]]]] = weakref.WeakKeyDictionary()
_walked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_changes = [0]  # how often a module of `_walked` got a child


def _count(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    # Not the lists that a forward makes of some of its layers; in a traced forward, whose guards would hold _walked, none
    if not torch.compiler.is_dynamo_compiling() and parent in _walked:
        _changes[0] += 1


nn.modules.module.register_module_module_registration_hook(_count)


def release(model: nn.Module) -> None:
    """Undoes `prepare`."""
    for module in model.modules():
        function = vars(module).get(ATTRIBUTE)
        if isinstance(function, StashedCheckpoint):
            setattr(module, ATTRIBUTE, function.plain)


def _reason_to_leave(plain: Any) -> str | None:
    function, settings = _parts(plain)
    if getattr(function, "__module__", None) != "torch.utils.checkpoint" or function.__name__ != "checkpoint":
        return f"{getattr(function, '__qualname__', function)!s} is not torch's checkpoint (it never is with offload=True)"
    if settings.get("use_reentrant") is False:
        if "context_fn" in settings:
            return "it has a context_fn of its own, and there can be only one"
        if _debugs(settings):
            return "debug=True does not allow a context_fn, which UnSwag needs"
        if not delegation_works():
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

    def __init__(self, plain: Callable[..., Any], sweep: Sweep | None = None) -> None:
        self.plain, self.sweep = plain, sweep

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (self.plain,)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        settings = _parts(self.plain)[1] | kwargs
        if torch.compiler.is_compiling() or "context_fn" in kwargs or _debugs(settings) or Stash.current() is None:
            return self.plain(function, *args, **kwargs)
        stash.plays("checkpoint", *(a for a in args if isinstance(a, torch.Tensor) and a.requires_grad))
        with stash.role("checkpoint"):  # in the first forward only the layer's inputs pass the door
            if self.sweep is not None and not kwargs:
                swept = self.sweep.run(function, args)
                if swept is not NotImplemented:
                    return swept
            if settings.get("use_reentrant") is False:
                return self.plain(function, *args, context_fn=_contexts, **kwargs)
            return self.plain(functools.partial(_run_stashed, function), *args, **kwargs)


def _run_stashed(function: Callable[..., Any], *args: Any) -> Any:
    """The function of a reentrant checkpoint. In its first forward gradients are off, and so is the stash."""
    with Stash():
        return function(*args)


# The non-reentrant checkpoint's hooks: in the first forward they count what is saved and keep nothing; in the recompute
# they collect the tensors, which the first pair's unpack then hands out. We let them collect handles of a stash.


class _Placeholder(NamedTuple):
    """Takes the place of a recomputed tensor in the checkpoint's records: its handle, and the metadata that is compared."""

    handle: Any
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False


class _Link:
    """Shared by the two contexts of one checkpointed call: whether hooks were in place to delegate to."""

    def __init__(self) -> None:
        self.delegated = False


def _contexts() -> tuple[Any, Any]:
    link = _Link()
    return _first_forward(link), _Recompute(link)


@contextlib.contextmanager
def _first_forward(link: _Link) -> Iterator[None]:
    hooks = stash.top_hooks()
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
        hooks = stash.top_hooks()
        if hooks is None or not self.link.delegated:
            stash.step_aside()
        else:
            Stash().enter_behind(hooks[0], _Placeholder)

    def __exit__(self, *exception: object) -> None:
        stash.leave()


def _unpack_recomputed(unpack: Callable[[Any], Any], packed: Any) -> torch.Tensor:
    recomputed = unpack(packed)
    return stash.unpack(recomputed.handle) if isinstance(recomputed, _Placeholder) else recomputed


@functools.cache
def delegation_works() -> bool:
    """Whether the checkpoint of this PyTorch can be wrapped. Tried once on a small function, in a thread of its own so that
    the caller's hooks and modes play no part."""
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
    except Exception:  # a later PyTorch may fail in any way; its checkpoint is then not wrapped
        return False
    (plain,) = torch.autograd.grad(function(x).sum(), x)
    return link.delegated and len(calls) == 3 and torch.equal(ours, plain)
