"""A training step without data: what it would keep for its backward pass, from shapes alone."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections import OrderedDict
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unswag.ledger import Ledger
from unswag.torch.audit import config_of, measure
from unswag.torch.patterns.probing import HOOKS

__all__ = ["NoDryRun", "checkpoints", "copied", "dry_run", "quietly"]

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class NoDryRun(Exception):
    """A model cannot be run without data; the message says why."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Around runs without data: FakeTensorMode's own log prints each error that it raises, with its traceback."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@quietly()
def dry_run(model: nn.Module, tokens: int = 64) -> Ledger:
    """The ledger of a training step of a copy of `model` on tensors that have shapes and no data: nothing is computed, and the
    model is not touched. In the model's dtype, without autocast, in training mode, with its gradient checkpointing.

    The batch is one sequence of so many tokens, one image or one recording of the size that the config names, with labels if
    the model takes any; `ledger.batch` says which. Hooks of the model do not run, but for those of transformers and PEFT.

    NoDryRun if the batch is not known or the forward does not run on such tensors.
    """
    try:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        copy = copied(model, fake)
        device = next(model.parameters()).device
        failed: Exception | None = None
        for shapes in _batches(model, tokens):
            batch: dict[str, Any] = {}
            for name, (shape, dtype) in shapes.items():
                batch[name] = fake.from_tensor(torch.zeros(shape, dtype=dtype, device=device))
            if _accepts(model, "use_cache", others=True):
                # without a cache transformers looks for packed sequences in the values of the positions
                batch["use_cache"] = not checkpoints(model)
            try:
                with fake:
                    return measure(copy, batch)
            except Exception as error:  # whatever the model's forward does on such tensors: another form of labels may do
                failed = failed or error
        if failed is None:
            raise NoDryRun("which input it takes is unclear, because it is no model of transformers")
        raise NoDryRun(f"a run without data fails with {type(failed).__name__}: {_line(failed)}") from failed
    except NoDryRun:
        raise
    except Exception as error:  # of copying the model, or of its config
        raise NoDryRun(f"a copy without data cannot be made: {type(error).__name__}: {_line(error)}") from error


def checkpoints(model: nn.Module) -> bool | None:
    """Whether gradient checkpointing is switched on; None if the model has none."""
    switches = [vars(module).get("gradient_checkpointing") for module in model.modules()]
    return None if all(switch is None for switch in switches) else any(switches)


def copied(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """The model in training mode, with parameters and buffers that have no data, and without hooks of strangers."""
    memo: dict[int, Any] = {id(b): fake.from_tensor(b) for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(fake.from_tensor(p.detach()), requires_grad=p.requires_grad)
        vars(memo[id(p)]).update(vars(p))  # what a packed weight says of itself: bitsandbytes' quant_state
    copy = deepcopy(model, memo).train()
    for module in copy.modules():
        known = [hook for hook in module._forward_hooks.values() if _is_known(hook)]
        module.__dict__.update({hooks: OrderedDict() for hooks in HOOKS})
        for hook in known:
            module.register_forward_hook(hook)
    return copy


def _is_known(hook: Any) -> bool:
    """Whether it belongs to the training: embeddings whose output requires a gradient, for checkpointing under LoRA."""
    return getattr(hook, "__module__", "").partition(".")[0] in ("transformers", "peft")


def _accepts(model: nn.Module, name: str, others: bool = False) -> bool:
    """Whether the forward has an argument of that name, or names none at all, as wrappers do; `others`: or takes any beside."""
    parameters = inspect.signature(model.forward).parameters
    any_name = [p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()]
    return name in parameters or (any(any_name) if others else all(any_name))


def _batches(model: nn.Module, tokens: int) -> Iterator[Shapes]:
    """What the model may take, the likeliest first: its input with each form of labels, and at last without."""
    main = getattr(model, "main_input_name", "input_ids")
    like = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config = config_of(model)
    vision = getattr(config, "vision_config", config)
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions"))
    text: tuple[int, ...] = (1, min([tokens, *(limit for limit in limits if isinstance(limit, int) and limit > 0)]))
    one: tuple[int, ...] = (1,)
    shape: tuple[int, ...]
    if main == "input_ids":
        if config is None and not {"input_ids", "args", "kwargs"} & set(inspect.signature(model.forward).parameters):
            return
        shape, like, labels = text, torch.long, [text, one]
    elif main == "pixel_values":
        size = getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape, labels = (1, getattr(vision, "num_channels", 3), height, width), [one, (1, height, width), text]
    elif main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        shape, labels = (1, getattr(config, "num_mel_bins", 80), frames), [text, one]
    elif main == "input_values":
        bins = getattr(config, "num_mel_bins", None)
        shape, labels = (1, 16000) if bins is None else (1, config.max_length, bins), [one, text]
    else:
        return
    batch: Shapes = {main: (shape, like)}
    if _accepts(model, "labels"):
        yield from (batch | {"labels": (form, torch.long)} for form in labels)
    if getattr(config, "is_encoder_decoder", False):
        yield batch | {"decoder_input_ids": (text, torch.long)}
    yield batch


def _line(error: Exception) -> str:
    """The first line of a message, not too long for a report."""
    first = str(error).strip().partition("\n")[0]
    return first.rstrip(".") if len(first) <= 120 else f"{first[:119]}…"
