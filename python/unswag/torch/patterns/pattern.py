"""What a pattern is, and how it replaces something on a module so that it can be put back."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import nn

from unswag import _core
from unswag.torch import stash

RECORD = "_unswag"  # module.__dict__[RECORD]: {attribute path: Replaced}
ABSENT = ...  # survives deepcopy and pickle as itself


@dataclass
class Replaced:
    """An attribute that we replaced: `before` what was there, ABSENT when nothing was; `ours` what we put there."""

    before: Any
    ours: Any


@dataclass
class Candidate:
    """A place where a pattern may apply.

    name     dotted name of the module in the model, "" for the model itself
    module   the module whose forward (or other attribute) would be replaced
    parts    what `find` saw and `probe` chose, for `apply`: the pattern's own business; but parts["covers"] names the children
             that the replacement no longer calls, and tells later patterns that they and the module itself are done with
    """

    name: str
    module: nn.Module
    parts: dict[str, Any] = field(default_factory=dict)


class Pattern(Protocol):
    """A shape of module that UnSwag knows how to run with less memory. One file each, listed in `patterns.ALL`.

    name     one word, the same in reports and in the options of `apply_unswag_surgery`
    saves    one line for the table of support: what is kept, and what was
    role     what its tensors play for a policy (`unswag.policy.ROLES`), or None
    """

    name: str
    saves: str

    @property
    def role(self) -> str | None: ...

    def find(self, model: nn.Module) -> Iterable[Candidate]:
        """The places in `model` with the right structure. Looks, changes nothing."""

    def probe(self, candidate: Candidate) -> str | None:
        """None if the replacement computes what the module computes, else the reason to leave it. Changes nothing
        but `candidate.parts`: random numbers, gradients, buffers and hooks of the model stay as they are."""

    def apply(self, candidate: Candidate) -> None:
        """Puts the replacement in place, by `replace` or `replace_forward` alone, so that `restore` undoes it."""


def replace(module: nn.Module, path: str, value: Any) -> None:
    """Sets the attribute `path` (dotted: "forward", "config.use_cache") below `module` on the instance, and records
    in the module what was there. A second replacement of the same path keeps the first record."""
    owner, name = _owner(module, path)
    record = module.__dict__.setdefault(RECORD, {})
    record[path] = Replaced(record[path].before if path in record else vars(owner).get(name, ABSENT), value)
    vars(owner)[name] = value


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replaces `module.forward` by the function `forward(self, …)`, bound to the instance: a deepcopy binds it to the
    copy, and class and state_dict do not change."""
    forward.__name__ = "forward"  # by which a pickled method is found again: in the class, so what is loaded is unpatched
    replace(module, "forward", types.MethodType(forward, module))


def restore(module: nn.Module) -> bool:
    """Puts back everything `replace` changed on `module`, last first; what somebody else has set since stays theirs. True if
    there was something."""
    record = module.__dict__.pop(RECORD, {})
    for path, was in reversed(record.items()):
        owner, name = _owner(module, path)
        if vars(owner).get(name, was.ours) != was.ours:
            continue
        if was.before is ABSENT:
            vars(owner).pop(name, None)
        else:
            vars(owner)[name] = was.before
    return bool(record)


def wrapped(module: nn.Module) -> bool:
    """Whether somebody else has put a forward over ours since (accelerate does, for mixed precision). Theirs calls ours, so
    neither can be taken away without the other."""
    was = module.__dict__.get(RECORD, {}).get("forward")
    return was is not None and vars(module).get("forward", was.ours) != was.ours


def values(module: nn.Module) -> dict[str, Any]:
    """What `replace` has put on `module`, by path: giving each to `replace` again brings it back after `restore`."""
    record = module.__dict__.get(RECORD, {})
    return {path: vars(owner)[name] for path in record for owner, name in [_owner(module, path)] if name in vars(owner)}


def _owner(module: nn.Module, path: str) -> tuple[Any, str]:
    parent, _, name = path.rpartition(".")
    return (attrgetter(parent)(module) if parent else module), name


def replaced(module: nn.Module, path: str = "forward") -> bool:
    """Whether UnSwag has replaced `path` on this module."""
    return path in module.__dict__.get(RECORD, {})


def foreign_forward(module: nn.Module) -> str | None:
    """Who else has replaced this module's forward, or None: a forward on the instance, or one that its class got from
    another package (Liger-Kernel and Unsloth do both)."""
    if replaced(module):
        return None
    on_instance = module.__dict__.get("forward")
    if on_instance is not None:
        return maker(on_instance)
    homes = {home.partition(".")[0] for home in (type(module).__module__, type(module).forward.__module__)}
    return next(iter(homes & {"liger_kernel", "unsloth", "unsloth_zoo"}), None)


def maker(forward: Callable[..., Any]) -> str:
    """The module of the function behind a forward, else the name of its type."""
    function = getattr(forward, "__func__", getattr(forward, "func", forward))
    return getattr(function, "__module__", None) or type(forward).__name__


def is_plain(tensor: torch.Tensor | None) -> bool:
    """As `stash.is_plain`; None is."""
    return tensor is None or stash.is_plain(tensor)


def no_kernel(*tensors: torch.Tensor | None) -> str | None:
    """The reason why the ops cannot run on these tensors (their device, and what this build has for it), or None."""
    for tensor in tensors:
        if tensor is None or tensor.is_cpu:
            continue
        if not tensor.is_cuda:
            return f"it is on {tensor.device}, where this build has no kernels; move the model to the cpu first"
        if problem := _core.cuda_problem(tensor.device.index):
            return f"it is on {tensor.device}: {problem}"
    return None
