"""The loss of a language model, computed in chunks from the hidden states, without logits of tokens x vocabulary.

On the instance, and only inside a training forward that was given labels: the output embedding returns `LazyLogits`, and
`model.loss_function` makes the loss from them, or F.cross_entropy where a model calls that on its rows (masked, older and
encoder-decoder models).  What the model does in between (a soft-cap, scale, cast or slice) is noted and done in the chunks;
anything else makes the real logits.  Without labels, in evaluation, generation, without gradients, under `keep_logits()`,
torch.compile and torch.func the head works as before, and so it does where somebody would notice: hooks on it, global hooks,
anomaly mode, a TorchFunctionMode.

Left alone, with a reason: models with a loss of their own, sharded heads (the chunks would run after the weight was given
back), heads whose trained weight is no plain tensor, and heads that are not the same on a chunk of rows as on all: that draw,
change their buffers, or mix rows. A head with a packed, frozen weight is called on chunks as a module would be; nobody reads
its weight.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from unswag.torch.lazy_logits import LABELS, Frame, Head, LazyLogits, defer, frames, inside_forward
from unswag.torch.loss import check_labels, logits_are_kept
from unswag.torch.patterns.pattern import (
    HOOKS,
    METHODS,
    RECORD,
    Candidate,
    cannot_operate,
    floating_parameter,
    foreign_forward,
    is_plain,
    no_kernel,
    replace,
    replace_forward,
    replace_view,
    stock,
    stock_class,
    wrap_method,
)
from unswag.torch.patterns.probing import has_hooks, setting
from unswag.torch.patterns.proof import others_global_hooks

STATE = "_unswag_loss"  # head.__dict__[STATE]: _State


@dataclass
class _State:
    """linear: it is F.linear(x, weight, bias).  code: `_code` of what was proven.  dtypes: of its output, by input's and
    autocast's.  notes: see `Head`."""

    linear: bool
    code: tuple[Any, ...]
    dtypes: dict[Any, torch.dtype] = field(default_factory=dict)
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
                head = _head_of(module)
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
            if problem := cannot_operate(model):
                return f"the model that uses it cannot be patched: {problem}"
        candidate.parts["causal"] = [model for model, loss in losses.items() if loss is ForCausalLMLoss]
        candidate.parts["linear"] = linear = _is_linear(head)
        try:
            return _cannot_be_lazy(head, linear) or _probe_head(head, linear)
        except Exception as error:  # whatever a stranger's head does on two rows
            return f"it cannot be tried ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"

    def apply(self, candidate: Candidate) -> None:
        head = candidate.module
        replace_forward(head, _lazy_forward)
        replace(head, STATE, _State(candidate.parts["linear"], _code(head)))
        for model in candidate.parts["models"]:
            wrap_method(model, "forward", functools.partial(_framed, _place_of_labels(model)))
        for model in candidate.parts["causal"]:
            replace_view(model, "loss_function", _LossFunction())


def logits_counters(model: nn.Module) -> list[Counter[str]]:
    """Of each lazy head: what made the logits of training steps after all, and how often."""
    return [vars(m)[STATE].notes for m in model.modules() if STATE in vars(m)]


def materialised(model: nn.Module) -> Counter[str]:
    """The sum of `logits_counters`."""
    return sum(logits_counters(model), Counter())


# ---- the probe ----------------------------------------------------------------------------------------------------------


def _sizes(head: Any) -> tuple[int | None, int | None]:
    """(classes, H)."""
    shapes = [tuple(p.shape) for p in head.parameters() if p.ndim == 2]
    parts = [m for m in head.modules() if hasattr(m, "in_features")]
    classes = getattr(head, "out_features", None) or (shapes[0][0] if shapes and not parts else None)
    width = parts[0].in_features if parts else next((shape[1] for shape in shapes), None)
    turned = (classes, width) not in shapes and (width, classes) in shapes  # so PEFT writes them for a tied head to be saved
    return (width, classes) if turned else (classes, width)


def _is_linear(head: Any) -> bool:
    """F.linear with the module's own parameters, nothing added."""
    return stock_class(head) is nn.Linear and "forward" not in vars(head) and type(head.weight) is nn.Parameter


def _code(head: nn.Module) -> tuple[Any, ...]:
    """What runs when `head` is called: classes and functions, which somebody may change after the surgery."""
    return F.linear, *((type(m), stock_class(m).forward, vars(m).get("forward")) for m in head.modules())


def _cannot_be_lazy(head: nn.Module, linear: bool) -> str | None:
    if isinstance(head, (FSDPModule, FullyShardedDataParallel)):
        return "it is an FSDP unit of its own; shard it together with the model's root"
    if any(isinstance(p, DTensor) for p in head.parameters()):
        return "its weight is a DTensor"
    used: Any = (head.weight, head.bias) if linear else [p for p in head.parameters() if p.requires_grad]
    if odd := [type(weight).__name__ for weight in used if not is_plain(weight)]:
        return f"its weight is a {odd[0]}, which only the head itself can use"
    if any(isinstance(v, Tensor) and v.grad_fn is not None for m in head.modules() for v in vars(m).values()):
        return "its weight is computed by a hook before each forward, and the first chunk's backward would free its graph"
    if not linear and any(p._backward_hooks for p in head.parameters()):
        return "one of its parameters has a gradient hook, which would run once per chunk"
    if any(isinstance(m, _DropoutNd) and m.p > 0 for m in head.modules()):
        return "it has dropout, and chunks would draw in another order"
    if None in _sizes(head):
        return f"the number of classes of a {type(head).__name__} cannot be read from it"
    return no_kernel(*head.parameters())


def _probe_head(head: Any, linear: bool) -> str | None:
    """The head makes [2, classes] of two random rows, of each row by itself what it makes of both, without a draw and without a
    trace; and, if the chunks are to use its weight, just what F.linear makes."""
    floating = floating_parameter(head)
    classes, width = _sizes(head)
    x = torch.randn(2, width or 0, device=floating.device).to(floating.dtype)
    twin = _twin(head).train()
    buffers, drawn = [b.clone() for b in twin.buffers()], torch.get_rng_state()
    with torch.no_grad():
        logits = twin(x)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, classes):
            return f"it returns shape {tuple(getattr(logits, 'shape', ()))} for 2 rows, not {(2, classes)}"
        if linear and not torch.equal(logits, F.linear(x, head.weight, head.bias)):
            return "it is a Linear that does not compute x weight^T + bias"
        if not all(map(torch.equal, twin.buffers(), buffers)):
            return "its forward changes its buffers, which would happen once per chunk"
        if not torch.equal(torch.get_rng_state(), drawn):
            return "its forward draws random numbers, and chunks would draw in another order"
        apart = torch.cat([twin(x[:1]), twin(x[1:])])
        if (apart - logits).float().norm() > 0.01 * logits.float().norm():  # roundings are far below
            return "its output for a row depends on the other rows"
    return None


def _twin(head: nn.Module) -> nn.Module:
    """A copy without hooks that shares the parameters and nothing else."""
    twin = copy.deepcopy(head, {id(p): p for p in head.parameters()})
    for module in twin.modules():
        vars(module).update({hooks: type(vars(module)[hooks])() for hooks in HOOKS})
    return twin


# ---- the replacements -----------------------------------------------------------------------------------------------------


def _place_of_labels(model: nn.Module) -> int | None:
    names = list(inspect.signature(model.forward).parameters)
    return names.index("labels") if "labels" in names else None


def _framed(place: int | None, inner: Callable[..., Any], self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model's forward, which says whether it was given labels."""
    given = kwargs.get("labels") is not None or (place is not None and len(args) > place and args[place] is not None)
    if torch.compiler.is_compiling():
        return inner(self, *args, **kwargs)
    with inside_forward(self, given):
        return inner(self, *args, **kwargs)


def _head_of(model: Any) -> Any:
    """The output embedding."""
    return type(model).get_output_embeddings(model)


def _lazy_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The output embedding's forward: lazy logits in a training forward with labels, else what it was."""
    state: _State = vars(self)[STATE]
    if len(args) != 1 or kwargs or not _trains(self, args[0]):
        return stock(self, *args, **kwargs)
    hidden = args[0]
    # In a dry run the copy of a model may call the model itself: TRL's forward does.
    running = [frame for frame in frames() if _head_of(frame.model) is self or is_fake(hidden)]
    if not running:
        return stock(self, hidden)
    frame = next((frame for frame in reversed(running) if frame.labels), None)
    reason = "a forward without labels" if frame is None else _real_because(self, state, frame)
    if frame is None or reason is not None:
        state.notes[str(reason)] += 1
        return stock(self, hidden)
    linear = (self.weight, self.bias) if state.linear else None
    depends = dict if state.linear else functools.partial(_depends_on, self)
    call, classes = functools.partial(stock, self), self.weight.shape[0] if state.linear else _sizes(self)[0]
    head = Head(call, tuple(self.parameters()), classes or 0, linear, _dtype(self, state, hidden), depends, state.notes)
    return defer(head, hidden, frame)


def _trains(head: nn.Module, hidden: Any) -> bool:
    return (
        head.training
        and not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and not logits_are_kept()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and (type(hidden) in (Tensor, nn.Parameter) or is_fake(hidden))
        and (hidden.requires_grad or any(p.requires_grad for p in head.parameters()))
    )


def _real_because(head: nn.Module, state: _State, frame: Frame) -> str | None:
    """Why a training forward with labels needs the head's real logits, or None.  What the surgery saw may have changed."""
    if not frame.is_here():
        return "a checkpoint, or other hooks of saved tensors, around the output embedding"
    if any(map(has_hooks, head.modules())) or others_global_hooks():
        return "hooks on the output embedding"
    if torch.is_anomaly_enabled():
        return "anomaly mode"
    # A TorchDispatchMode sees the ops of the chunks; one of __torch_function__ would not see F.linear.
    if modes := [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]:
        return f"the mode {type(modes[0]).__name__}"
    if _code(head) != state.code:
        return "an output embedding that changed after the surgery"
    if (reason := _cannot_be_lazy(head, state.linear)) is not None:
        return f"an output embedding that cannot run in chunks: {reason}"
    return None


def _dtype(head: nn.Module, state: _State, hidden: Tensor) -> torch.dtype:
    """Of the logits."""
    device = hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if state.linear:
        return hidden.dtype if autocast is None or hidden.dtype == torch.float64 else autocast
    if (hidden.dtype, autocast) not in state.dtypes:
        with torch.no_grad():
            made: Tensor = stock(head, hidden.detach().reshape(-1, hidden.shape[-1])[:1])
        state.dtypes[hidden.dtype, autocast] = made.dtype
    return state.dtypes[hidden.dtype, autocast]


def _depends_on(head: nn.Module) -> dict[str, Any]:
    """What a call of `head` depends on, by name: which tensors it has, its settings, and its parts' classes."""
    found: dict[str, Any] = {}
    for name, module in head.named_modules():
        at = f"{name}." if name else ""
        found[f"{at}__class__"] = type(module)
        found |= {f"{at}{key}": id(p) for key, p in module._parameters.items()}
        found |= {f"{at}{key}": (id(b), b._version, b.data_ptr()) for key, b in module._buffers.items() if b is not None}
        own = ("_parameters", "_buffers", "_modules", STATE, RECORD, METHODS)
        found |= {f"{at}{key}": setting(value) for key, value in vars(module).items() if key not in own}
    return found


class _LossFunction:
    """What `model.loss_function` is: ours in the place of transformers' ForCausalLMLoss, as long as that is the model's and
    calls what it called at the surgery."""

    def __init__(self) -> None:
        self.calls = self._calls()

    @staticmethod
    def _calls() -> tuple[Any, ...]:
        from transformers.loss import loss_utils

        return loss_utils.ForCausalLMLoss, loss_utils.fixed_cross_entropy, F.cross_entropy

    def __call__(self, model: nn.Module, stocks: Any) -> Any:
        return _chunked_loss if stocks is self.calls[0] and self._calls() == self.calls else stocks


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
    if isinstance(logits, LazyLogits) and logits.shape[-1] == vocab_size:
        shifted, targets = 0, shift_labels
        if targets is None:
            assert labels is not None
            shifted, targets = 1, F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = targets.to(logits.device)
        several = isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() != 1
        if targets.numel() == logits.shape[:-1].numel() and targets.dtype in LABELS and not several:
            if not is_fake(targets):
                check_labels(targets, vocab_size, ignore_index, shifted=shifted)
            loss = logits.cross_entropy(
                targets.reshape(logits.shape[:-1]), ignore_index=ignore_index, num_items=num_items_in_batch
            )
            if loss is not None:
                return loss.view(num_items_in_batch.shape) if isinstance(num_items_in_batch, Tensor) else loss
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
