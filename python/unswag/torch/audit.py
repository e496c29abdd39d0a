"""What a model keeps for its backward pass: the ledger of what passed the door, and an independent count beside it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unswag.ledger import Ledger, Row, role_of
from unswag.torch import loss_buffers, stash
from unswag.torch.stash import Stash, storages


def audit(model: nn.Module, *, backward: bool = False, **batch: Any) -> Ledger:
    """Runs `model(**batch)` once and says what it keeps for the backward pass.

    Works on any model, patched or not: a patched model's stash writes its own rows, any other model is watched by a door
    that changes nothing. `ledger.alive` is counted without the door, from weak references to the storages themselves, so
    that tensors on an autograd context, in a closure or in a registry count too. Not counted in either: parameters, their
    gradients, buffers, the batch; on lines of their own: the loss's gradient buffers and autocast's copies of weights.

    backward=True also runs the backward pass, for `ledger.peak`.

    The model is left as it was: random state, gradients and buffers are put back, the hooks that track modules removed.
    RuntimeError if gradients are switched off.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError("audit: gradients are switched off, so nothing is kept; call it outside torch.no_grad()")
    ledger = Ledger(tokens=_tokens(batch))
    live = LiveStorages(model, batch, peaks=backward)
    recorder = _Recorder(ledger, live)
    with _untouched(model), live:
        with stash.recording(recorder), _Watch(), _tracked(model, recorder):
            output = model(**batch)
            loss = _loss(output)
        held = output if loss is None else loss
        del output
        recorder.finish()
        ledger.alive, ledger.loss_buffers, ledger.weight_copies = live.bytes(), live.loss_buffers(), live.weight_copies()
        if backward:
            if loss is None:
                raise RuntimeError("audit: backward=True needs a loss; pass labels, so that the model returns one")
            loss.backward()
            ledger.peak = live.peak()
    del held
    return ledger


class LiveStorages(TorchDispatchMode):
    """Counts the storages that ops made while it is active and that somebody still holds, whoever that is.

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
    """A door that keeps everything as autograd would; a model's own stash takes its place."""

    passive = True

    def register(self, *args: Any) -> None:
        pass


class _Recorder:
    """Turns what passes the doors into rows of a ledger: of what is still kept when the forward has ended."""

    def __init__(self, ledger: Ledger, live: LiveStorages) -> None:
        self.leases: dict[Any, Any] = {}
        self.module = ""
        self._ledger = ledger
        self._live = live
        self._rows: list[tuple[weakref.ref[Any], Row]] = []

    def note(
        self, t: torch.Tensor, owner: object, tier: str, role: str | None = None, packed: tuple[torch.Tensor, ...] | None = None
    ) -> None:  # fmt: skip
        if tier == "parameter" or all(self._live.is_apart(s._cdata) for s in storages(t)):
            return
        kept = sum(s.nbytes() for part in packed or (t,) for s in storages(part)) if tier == "device" else 0
        bits = 8.0 * t.element_size() if packed is None else 8.0 * kept / t.numel()
        row = Row(
            module=self.module,
            role=role or stash.current_role() or role_of(self.module),
            shape=tuple(t.shape),
            dtype=str(t.dtype).removeprefix("torch."),
            bits=bits if tier == "device" else 0.0,
            tier=tier,
            bytes=kept,
        )
        self._rows.append((weakref.ref(owner), row))

    def finish(self) -> None:
        self._ledger.rows += [row for owner, row in self._rows if owner() is not None]
        self._rows.clear()
        self.leases.clear()


@contextlib.contextmanager
def _tracked(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Keeps `recorder.module` at the name of the module that runs. By global hooks: a hook on a module would change what a
    patched parent does with it (a LoRA adapter with hooks is run as PEFT runs it)."""
    names = {module: name for name, module in model.named_modules()}
    stack = [""]

    def enter(module: nn.Module, *_: Any) -> None:
        if module in names:
            stack.append(names[module])
            recorder.module = stack[-1]

    def leave(module: nn.Module, *_: Any) -> None:
        if module in names:
            stack.pop()
            recorder.module = stack[-1]

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


def _tokens(batch: dict[str, Any]) -> int:
    """Tokens in the batch: elements of `input_ids`, else rows of `inputs_embeds`, else of the first tensor. 0, which is shown
    as unknown, for images: how many patches they become only the model knows."""
    tensors = [t for t in batch.values() if isinstance(t, torch.Tensor) and t.dim() > 0]
    first = batch.get("input_ids", batch.get("inputs_embeds", tensors[0] if tensors else None))
    if not isinstance(first, torch.Tensor) or first.dim() > 3:
        return 0
    return first.numel() if first.dim() <= 2 and not first.is_floating_point() else first.shape[:-1].numel()
