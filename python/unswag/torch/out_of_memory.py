"""What an out-of-memory error of a patched model says: which memory, where, what is alive there, and what to turn next.

Nothing runs for this until there is such an error. Then the same step runs once more on tensors without data, which says what
is alive at its peak; what the failing process itself holds cannot be told apart by module any more.

Covered is the forward of the model, and whatever runs inside it. An error in the backward, the recompute of checkpointed layers
included, and in the optimizer's step is PyTorch's own.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from unswag import sizes
from unswag.policy import Policy
from unswag.torch.blueprint import blueprint
from unswag.torch.dry_run import checkpoints
from unswag.torch.forecast import Forecast
from unswag.torch.operation import CPU_ALLOCATOR
from unswag.torch.ways import Way, prepared

__all__ = ["explain"]

MARK = "\nUnSwag: "
MOST = 5


def explain(
    model: nn.Module, policy: Policy, error: BaseException, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:  # fmt: skip
    """Adds to the message of an out-of-memory error that `model(*args, **kwargs)` raised; the error stays the same object."""
    said = str(error.args[0]) if error.args else ""
    memory = "the memory of this process (pageable)" if CPU_ALLOCATOR in said else "the memory of the device"
    lines = [f"{memory} ran out in the {_where(model, error)}."]
    try:
        lines += _alive(model, policy, args, kwargs)
    except Exception as failed:  # whatever a second run of the model's code raises: the first error is the one to report
        lines.append(
            f"What is alive there is not known ({type(failed).__name__}: {str(failed).strip().partition(chr(10))[0]})."
        )
    lines.append(f"Next: {_next(model, policy)}.")
    error.args = (said + MARK + "\n  ".join(lines), *error.args[1:])


def _where(model: nn.Module, error: BaseException) -> str:
    """The innermost module of the model in the traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    found, at = "", error.__traceback__
    while at is not None:
        local = at.tb_frame.f_locals.get("self")
        if isinstance(local, nn.Module):
            found = names.get(id(local), found) or found
        at = at.tb_next
    return f"forward of {found}" if found else "forward of the model"


def _alive(model: nn.Module, policy: Policy, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return ["What is alive there is not known: the batch has no input_ids of [batch, tokens]."]
    batch, tokens = ids.shape
    recompute = bool(checkpoints(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = blueprint(model)
        way = Way("as it is", {}, {"policy": dataclasses.replace(policy, tiers={})}, recompute)
        prepared(made.model, way, None)
        peak = Forecast(made, way, batch, ids.device.type, tokens).peak(tokens)
    found = [f"Computed without data, a step of {batch} × {tokens} tokens holds {sizes.show(peak.held)} beside weights and "
             f"optimizer states, at its highest in {peak.instant}. The largest there:"]  # fmt: skip
    for piece in peak.alive(made)[:MOST]:
        shape = "×".join(map(str, piece.shape))
        found.append(f"  {sizes.show(piece.bytes)}: {piece.role} of {piece.module or 'the model'}, {piece.dtype} {shape}")
    return found


def _next(model: nn.Module, policy: Policy) -> str:
    """What takes the most off, and is not on yet."""
    trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad == trains) for trains in (True, False))
    if checkpoints(model) is False:
        return "model.activation_checkpointing_enable() keeps one hidden state per layer"
    if not policy.tiers:
        return "apply_unswag_surgery(model, store='disk') keeps those of the checkpointed layers on a disk"
    if trained > frozen:
        return "LoRA, which has no gradients and optimizer states of the weights"
    return "a shorter context; unswag.plan(model, memory=...) says which fits"
