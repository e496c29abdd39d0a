"""The loss of a language model: from the hidden states, in chunks, instead of from logits of tokens x vocabulary.

On the instance, and in training with gradients only: the output embedding returns `LazyLogits`, and `model.loss_function`
makes the loss from them, or F.cross_entropy where a model calls that on its rows (masked, older and encoder-decoder models).
What the model does in between (a soft-cap, scale, cast or slice) is noted and done in the chunks; anything else makes the real
logits.  In evaluation, generation, without gradients, under `keep_logits()`, torch.compile and
torch.func the head works as before.

Left alone, with a reason: models with a loss of their own, heads with backward hooks, sharded heads (the chunks would run after
the weight was given back), heads whose trained weight is no plain tensor or is made by a hook. A head with a packed, frozen
weight is called on chunks as a module would be; nobody reads its weight.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from unswag.torch.loss import Head, LazyLogits, check_labels, logits_are_kept
from unswag.torch.patterns.pattern import Candidate, foreign_forward, is_plain, no_kernel, replace, replace_forward, stock

STATE = "_unswag_loss"  # head.__dict__[STATE]: _State


@dataclass
class _State:
    """linear: it is F.linear(x, weight, bias).  notes: see `Head`."""

    linear: bool
    notes: Counter[str] = field(default_factory=Counter)


class Loss:
    name = "loss"
    role = None
    saves = "hidden states' gradient and the head's (the loss's own buffers); no logits"

    def find(self, model: nn.Module) -> Iterable[Candidate]:
        names = {module: name for name, module in model.named_modules()}
        users: dict[nn.Module, list[nn.Module]] = {}  # by output embedding: the models that use it
        for module in names:
            if not (hasattr(type(module), "get_output_embeddings") and hasattr(type(module), "loss_function")):
                continue
            try:
                head = type(module).get_output_embeddings(module)
            except NotImplementedError:
                continue
            if isinstance(head, nn.Module):
                users.setdefault(head, []).append(module)
        for head, models in users.items():
            yield Candidate(names.get(head, ""), head, {"models": models})

    def probe(self, candidate: Candidate) -> str | None:
        from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

        head, models = candidate.module, candidate.parts["models"]
        losses = {model: model.loss_function for model in models}
        if not {ForCausalLMLoss, ForMaskedLMLoss} & set(losses.values()):
            names = " and ".join(sorted(getattr(loss, "__name__", str(loss)) for loss in losses.values()))
            return f"the model's loss function is {names}, not the cross-entropy of a causal or masked language model"
        for model in models:
            home = foreign_forward(model) or ""
            if home.startswith(("liger", "unsloth")):
                return f"{home} has replaced the model's forward"
        candidate.parts["models"] = [model for model, loss in losses.items() if loss is ForCausalLMLoss]
        candidate.parts["linear"] = linear = _is_linear(head)
        return _cannot_be_lazy(head, linear) or _probe_head(head, linear)

    def apply(self, candidate: Candidate) -> None:
        head = candidate.module
        replace(head, STATE, _State(candidate.parts["linear"]))
        replace_forward(head, _lazy_forward)
        for model in candidate.parts["models"]:
            replace(model, "_loss_function", _chunked_loss)


def logits_counters(model: nn.Module) -> list[Counter[str]]:
    """Of each lazy head: what made the logits of training steps after all, and how often."""
    return [vars(m)[STATE].notes for m in model.modules() if STATE in vars(m)]


def materialised(model: nn.Module) -> Counter[str]:
    """The sum of `logits_counters`."""
    return sum(logits_counters(model), Counter())


# ---- the probe ----------------------------------------------------------------------------------------------------------


def _classes(head: Any) -> int | None:
    classes = getattr(head, "out_features", None)
    if classes is None and isinstance(getattr(head, "weight", None), Tensor):
        classes = head.weight.shape[0]
    return classes


def _is_linear(head: Any) -> bool:
    """F.linear with the module's own parameters, nothing added: hooks run around forward, so they do not matter."""
    return type(head) is nn.Linear and "forward" not in vars(head) and type(head.weight) is nn.Parameter


def _cannot_be_lazy(head: nn.Module, linear: bool) -> str | None:
    if isinstance(head, (FSDPModule, FullyShardedDataParallel)):
        return "it is a sharded unit of its own; shard it together with the model's root"
    if any(isinstance(p, DTensor) for p in head.parameters()):
        return "its weight is a DTensor"
    used: Any = (head.weight, head.bias) if linear else [p for p in head.parameters() if p.requires_grad]
    if odd := [type(weight).__name__ for weight in used if not is_plain(weight)]:
        return f"its weight is a {odd[0]}, which only the head itself can use"
    if not linear and any(isinstance(v, Tensor) and v.grad_fn is not None for m in head.modules() for v in vars(m).values()):
        return "its weight is made by a hook before its forward, and its graph would be used up by the first chunk"
    if head._backward_hooks or head._backward_pre_hooks:
        return "it has backward hooks, which need the real logits"
    if not linear and any(p._backward_hooks for p in head.parameters()):
        return "one of its parameters has a gradient hook, which would see each chunk"
    if _classes(head) is None:
        return f"a {type(head).__name__} does not say how many classes it has"
    return no_kernel(*head.parameters())


def _probe_head(head: Any, linear: bool) -> str | None:
    """The head makes [2, classes] of two random rows; and, if the chunks are to use its weight, just what F.linear makes."""
    floating = next((p for p in head.parameters() if p.is_floating_point()), torch.empty(0))
    width = getattr(head, "in_features", None) or floating.shape[-1]
    x = torch.randn(2, width, device=floating.device).to(floating.dtype)
    with torch.no_grad():
        logits = head.forward(x)
        if tuple(logits.shape) != (2, _classes(head)):
            return f"it makes {tuple(logits.shape)} from 2 rows, not {(2, _classes(head))}"
        if linear and not torch.equal(logits, F.linear(x, head.weight, head.bias)):
            return "it is a Linear that does not compute x weight^T + bias"
    return None


# ---- the replacements -----------------------------------------------------------------------------------------------------


def _lazy_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The output embedding's forward: lazy logits in training, else what it was."""
    state: _State = vars(self)[STATE]
    if len(args) != 1 or kwargs or not _wanted(self, args[0]):
        return stock(self, *args, **kwargs)
    reason = _cannot_be_lazy(self, state.linear)  # hooks, sharding and devices may have changed since the surgery
    classes = _classes(self)
    if reason is not None or classes is None:
        return stock(self, *args)
    linear = (self.weight, self.bias) if state.linear else None
    return LazyLogits(Head(functools.partial(stock, self), tuple(self.parameters()), classes, linear, state.notes), args[0])


def _wanted(head: nn.Module, hidden: Any) -> bool:
    return (
        head.training
        and torch.is_grad_enabled()
        and not logits_are_kept()
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and (type(hidden) in (Tensor, nn.Parameter) or is_fake(hidden))
        and (hidden.requires_grad or any(p.requires_grad for p in head.parameters()))
    )


def _chunked_loss(
    logits: Any,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss; of lazy logits, in chunks."""
    if isinstance(logits, LazyLogits) and is_fake(logits._hidden):  # surgery's dry run: no values to make a loss of, and what
        return logits._hidden.sum()  # the chunks keep, their gradient buffers, is not counted there
    if isinstance(logits, LazyLogits) and logits.shape[-1] == vocab_size:
        shifted, targets = 0, shift_labels
        if targets is None:
            assert labels is not None
            shifted, targets = 1, F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = targets.to(logits.device)
        if targets.numel() == logits.shape[:-1].numel():
            check_labels(targets, vocab_size, ignore_index, shifted=shifted)
            loss = logits.cross_entropy(
                targets.reshape(logits.shape[:-1]), ignore_index=ignore_index, num_items=num_items_in_batch
            )
            if loss is not None:
                return loss
    from transformers.loss.loss_utils import ForCausalLMLoss

    if isinstance(logits, LazyLogits):
        logits = logits.tensor("loss_function")
    return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
