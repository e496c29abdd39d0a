"""What a model keeps for its backward pass: a ledger of what it saves, and an independent count beside it."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unswag.ledger import FREE_TIERS, Ledger, Row, role_of
from unswag.policy import STORE_TIERS
from unswag.torch import loss_buffers, stash
from unswag.torch.stash import Stash, storages


def audit(model: nn.Module, *, backward: bool = False, tokens: int = 0, **batch: Any) -> Ledger:
    """Runs `model(**batch)` once and says what it keeps for the backward pass.

    backward  also run the backward pass, for `ledger.peak`
    tokens    of the batch, for `ledger.bytes_per_token`; 0: those of the texts of an encoder and a decoder, and the patches or
              frames that a transformer makes of images or sound. Where they are not known, `ledger.tokens` stays 0

    Works on any model, patched or not: the stash of a patched model writes rows of its own; what any other model saves is
    recorded by hooks that change nothing. `ledger.alive` is counted independently of both, from weak references to the storages
    themselves, so that tensors on an autograd context, in a closure or in a registry count too. Not counted in either:
    parameters, their gradients, buffers, the batch; on lines of their own: the loss's gradient buffers and autocast's copies of
    weights.

    Random state, gradients and buffers of the model are restored; the hooks that track modules are removed.

    RuntimeError if gradients are switched off; ValueError for a model on the meta device.
    """
    refuse_meta("audit", model)
    if not torch.is_grad_enabled():
        raise RuntimeError("audit: gradients are switched off, so nothing is kept; call it outside torch.no_grad()")
    if not isinstance(tokens, int) or tokens < 0:
        raise ValueError(f"audit: tokens is {tokens!r}; pass the number of tokens of the batch")
    with _untouched(model):
        return measure(model, batch, backward=backward, tokens=tokens)


def measure(model: nn.Module, batch: dict[str, Any], *, backward: bool = False, tokens: int = 0) -> Ledger:
    """`audit`, after which random state, gradients and buffers are what the run has made of them."""
    shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    ledger = Ledger(model=type(model).__name__, batch=shapes)
    live = LiveStorages(model, batch, peaks=backward)
    recorder = _Recorder(ledger, live, _logits(model))
    with live:
        with stash.recording(recorder), _Watch(), tracked(model, recorder):
            output = model(**batch)
            loss = _loss(output)
        held = output if loss is None else loss
        del output
        recorder.finish()
        ledger.tokens = tokens or _tokens(model, batch, recorder.sequences)
        ledger.alive, ledger.loss_buffers, ledger.weight_copies = live.bytes(), live.loss_buffers(), live.weight_copies()
        if backward:
            if loss is None:
                raise RuntimeError("audit: backward=True needs a loss; pass labels, so that the model returns one")
            loss.backward()
            ledger.peak = live.peak()
    del held
    return ledger


def refuse_meta(op: str, model: nn.Module) -> None:
    """ValueError if a parameter or buffer of the model has no data."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    if (where := next((name for name, tensor in named if tensor.is_meta), None)) is not None:
        raise ValueError(
            f"{op}: {where} is on the meta device and has no data; materialise the model first "
            "(model.to_empty(device=...), then load its weights), or load it without device_map and low-memory options"
        )


class LiveStorages(TorchDispatchMode):
    """Counts the storages that ops made while it is active and that are still alive, no matter what holds them.

    Each is known by a weak reference and counted once, at its full size. Not counted: the model's parameters and buffers,
    their gradients, the inputs; nor, but reported apart, the loss's gradient buffers and casts of parameters (autocast's).
    What is made without an op (numpy, the saved state of the random generator) is not seen.
    """

    def __init__(self, model: nn.Module | None = None, inputs: Any = None, peaks: bool = True) -> None:
        super().__init__()
        self._peaks = peaks  # False: `peak` stays 0, and counting costs half
        self._parameters = list(model.parameters()) if model is not None else []
        fixed = [*self._parameters, *(model.buffers() if model is not None else ()), *tree_leaves(inputs)]
        self._fixed = {s._cdata: StorageWeakRef(s) for t in fixed for s in storages(t)}
        self._weights = {s._cdata for t in self._parameters for s in storages(t)}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._copies: dict[int, StorageWeakRef] = {}
        self._total = 0  # of `_made`, also of what has died since the last look
        self._peak = 0

    def bytes(self) -> int:
        """Bytes alive now, less what is not counted."""
        return self._split()[0]

    def peak(self) -> int:
        """The highest that `bytes` was after any op, outside the loss (`loss_buffers.inside_loss`)."""
        return self._peak

    def loss_buffers(self) -> int:
        """Bytes alive now of the loss's own gradient buffers."""
        return self._split()[1]

    def weight_copies(self) -> int:
        """Bytes alive now of casts of parameters."""
        return self._split()[2]

    def is_fixed(self, key: int | None) -> bool:
        """Whether that storage, alive, is one of a parameter, a buffer or an input."""
        return key in self._fixed and not self._fixed[key].expired()

    def is_weight_copy(self, key: int | None) -> bool:
        """Whether that storage, alive, is a cast of a parameter."""
        return key in self._copies and not self._copies[key].expired()

    def is_apart(self, key: int) -> bool:
        """Whether that storage, alive, is not counted by `bytes`."""
        return self.is_fixed(key) or self.is_weight_copy(key) or loss_buffers.is_loss_buffer(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        taken = {s._cdata for t in tree_leaves((args, kwargs)) for s in storages(t)}  # a view makes no storage
        made = [s for t in tree_leaves(out) for s in storages(t) if s._cdata not in taken or s._cdata in self._made]
        if func is torch.ops.aten._to_copy.default and all(s._cdata in self._weights for s in storages(args[0])):
            self._copies.update({s._cdata: StorageWeakRef(s) for s in made})
        for s in made:
            known, size = self._made.get(s._cdata, (None, 0))
            if known is None or known.expired() or size != s.nbytes():
                self._made[s._cdata] = (StorageWeakRef(s), s.nbytes())
                self._total += s.nbytes()
        if self._peaks and self._total > self._peak and not loss_buffers.is_inside_loss():
            self._peak = max(self._peak, self._split()[0])
        return out

    def _split(self) -> tuple[int, int, int]:
        """(activations, loss buffers, weight copies) in bytes; forgets what has died."""
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        self._total = sum(size for _, size in self._made.values())
        gradients = {s._cdata for p in self._parameters if p.grad is not None for s in storages(p.grad)}
        activations = buffers = copies = 0
        for key, (_, size) in self._made.items():
            if key in gradients:
                continue
            if loss_buffers.is_loss_buffer(key):
                buffers += size
            elif self.is_weight_copy(key):
                copies += size
            else:
                activations += size
        return activations, buffers, copies


class _Watch(Stash):
    """A stash that keeps everything as autograd would, for a model that has none of its own."""

    passive = True

    def register(self, *args: Any) -> None:
        pass


class _Recorder:
    """Turns what is saved into rows of a ledger: of what is still kept when the forward has ended."""

    def __init__(self, ledger: Ledger, live: LiveStorages, logits: _Logits | None) -> None:
        self.leases = stash.Leases()
        self.module = ""
        self.sequences: list[tuple[str, torch.Size]] = []  # (module, shape) of each output [batch, length, width]
        self._ledger = ledger
        self._live = live
        self._logits = logits
        self._rows: list[tuple[weakref.ref[Any], Row]] = []

    def note(
        self, t: torch.Tensor, owner: object, tier: str, role: str | None = None, packed: tuple[torch.Tensor, ...] | None = None
    ) -> None:  # fmt: skip
        if tier == "parameter" or all(self._live.is_apart(s._cdata) for s in storages(t)):
            return
        kept = 0
        if tier in STORE_TIERS:
            kept = sum(part.numel() * part.element_size() for part in packed or (t,))
        elif tier == "device":
            kept = sum(s.nbytes() for part in packed or (t,) for s in storages(part))
        bits = 8.0 * t.element_size() if packed is None else 8.0 * kept / max(t.numel(), 1)
        is_logits = self._logits is not None and self._logits.are(t, self.module)
        row = Row(
            module=self.module,
            role=role or stash.current_role() or ("logits" if is_logits else role_of(self.module)),
            shape=tuple(t.shape),
            dtype=str(t.dtype).removeprefix("torch."),
            bits=bits if tier not in FREE_TIERS else 0.0,
            tier=tier,
            bytes=kept,
        )
        self._rows.append((weakref.ref(owner), row))

    def finish(self) -> None:
        self._ledger.rows += [row for owner, row in self._rows if owner() is not None]
        self._rows.clear()
        self.leases.clear()


class _Logits(NamedTuple):
    """How the logits of a language model are known: by the size of the vocabulary, in its head or in a module around it."""

    head: str
    vocabulary: int

    def are(self, t: torch.Tensor, module: str) -> bool:
        around = not module or self.head == module or self.head.startswith(f"{module}.")
        return around and t.dim() > 1 and t.shape[-1] == self.vocabulary


def _logits(model: nn.Module) -> _Logits | None:
    module: Any
    for module in model.modules():
        if hasattr(module, "get_output_embeddings"):
            try:
                head = module.get_output_embeddings()
            except Exception:  # of a model that has none and says so
                continue
            names = [name for name, part in model.named_modules() if part is head]
            weight = getattr(head, "weight", None)
            if names and weight is not None and weight.dim() == 2:
                return _Logits(names[0], getattr(head, "out_features", weight.shape[0]))
    return None


@contextlib.contextmanager
def tracked(model: nn.Module, recorder: Any) -> Iterator[None]:
    """Keeps `recorder.module` at the name of the module that runs, and adds to `recorder.sequences` which sequences modules
    return, as (name, shape). By global hooks: a hook on a module would change what a patched parent does with it (a LoRA
    adapter with hooks is run as PEFT runs it)."""
    names = {module: name for name, module in model.named_modules()}
    stack = [""]

    def enter(module: nn.Module, *_: Any) -> None:
        if module in names:
            stack.append(names[module])
            recorder.module = stack[-1]

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        if module in names:
            recorder.module = stack[-2]
            name = stack.pop()
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, torch.Tensor) and first.dim() == 3 and first.is_floating_point():
                recorder.sequences.append((name, first.shape))

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Puts back random state, gradients and buffers."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_inference()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            for p, _ in gradients:
                p.grad = None
            yield
        finally:
            for p, gradient in gradients:
                p.grad = gradient
            with torch.no_grad():
                for b, before in buffers:
                    if not torch.equal(b, before):  # batch_norm bumps no version
                        b.copy_(before)


def _loss(output: Any) -> torch.Tensor | None:
    """The loss in a model's output: `.loss`, `["loss"]`, or a scalar tensor (alone or first)."""
    if isinstance(output, dict):
        found = output.get("loss")
    elif isinstance(output, (tuple, list)):
        found = output[0] if output else None
    else:
        found = getattr(output, "loss", output)
    return found if isinstance(found, torch.Tensor) and found.numel() == 1 else None


def config_of(model: nn.Module) -> Any:
    """The config of the model, or of the outermost module in it that has one (under DDP and its like); None without one."""
    configs = (vars(module).get("config") for module in model.modules())
    return next((config for config in configs if hasattr(config, "to_dict")), None)


def _tokens(model: nn.Module, batch: dict[str, Any], sequences: list[tuple[str, torch.Size]]) -> int:
    """Tokens of the batch, 0 if they are not known. Of text, as many as it has; of the decoder's text, too. Images and sound:
    the length of what the layers of a transformer return, `sequences`. Without a config, the rows of the first tensor."""
    config = config_of(model)
    text = batch.get("input_ids", batch.get("inputs_embeds"))
    first = text if text is not None else next((t for t in batch.values() if isinstance(t, torch.Tensor) and t.dim()), None)
    found = _rows(first) if text is not None or config is None else _length(config, _of_encoder(model, sequences))
    if getattr(config, "is_encoder_decoder", False):
        given = (batch.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
        return found and found + next((_rows(t) for t in given if t is not None), 0)
    return found


def _rows(t: Any) -> int:
    """Elements of ids [batch, length], rows of embeddings [batch, length, width]; 0 for an image."""
    if not isinstance(t, torch.Tensor) or t.dim() > 3:
        return 0
    return t.numel() if t.dim() <= 2 and not t.is_floating_point() else t.shape[:-1].numel()


def _of_encoder(model: nn.Module, sequences: list[tuple[str, torch.Size]]) -> list[tuple[str, torch.Size]]:
    """Those that the encoder of an encoder-decoder returned; of any other model all."""
    whole: Any = next((module for module in model.modules() if hasattr(module, "get_encoder")), None)
    encoder = None if whole is None else whole.get_encoder()
    names = {name for name, module in model.named_modules() if module is encoder}
    inside = [(name, shape) for name, shape in sequences if any(name == of or name.startswith(f"{of}.") for of in names if of)]
    return inside or sequences


def _length(config: Any, sequences: list[tuple[str, torch.Size]]) -> int:
    """batch x length of the sequences that the modules of a transformer return, if most have the same and some of these are as
    wide as the hidden states; 0 for networks whose length changes on the way."""
    parts = (config, *vars(config).values())
    widths = {getattr(part, "hidden_size", None) for part in parts if hasattr(part, "to_dict")}
    counts = Counter(shape[:2] for _, shape in sequences)
    (most, times), *_ = counts.most_common(1) or [(torch.Size(), 0)]
    if 2 * times <= len(sequences) or not any(shape[:2] == most and shape[2] in widths for _, shape in sequences):
        return 0
    return most.numel()
