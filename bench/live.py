"""The bytes really alive, counted without asking anyone: every storage that an op returns is watched by a weak reference.

Independent of the ledger: it sees tensors held on a context, in a closure or in a registry as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel


class _Storage(NamedTuple):
    alive: StorageWeakRef
    bytes: int
    rows: tuple[int, int]  # shape at birth, as (rows, columns)
    of_loss: bool  # born while the loss ran
    of_weight: bool  # autocast's copy of a parameter, or the gradient of one in the making


class LiveStorages(TorchDispatchMode):
    """While active, follows every storage that comes out of an op.

    Not counted: parameters, buffers, gradients of parameters, `inputs`, casts of parameters to another dtype (autocast's
    copies), and, on a line of their own, the loss's gradient buffers: of what was born while the loss ran, one storage of the
    shape of the hidden states (as rows) and one of the shape of the head's weight. Autograd adds the two gradients of a weight
    that head and embedding share in place, but not under a mode such as this one: their sum, soon `.grad`, is not counted.

    The loss runs from the return of the backbone to the end of the forward, and in the backward until the hidden states have
    their gradient. Nothing is hooked to the head: a head with hooks computes its logits in full.
    """

    def __init__(self, model: torch.nn.Module, inputs: list[torch.Tensor]):
        super().__init__()
        self.model = model
        self.peak = 0  # the most bytes alive at any moment outside the loss
        self.backward_curve: list[int] = []  # alive when the backward reaches the input of each layer, last layer first
        self._outside = {_address(t) for t in (*model.parameters(), *model.buffers(), *inputs)}
        self._followed: dict[int, _Storage] = {}  # an address is not used again while its weak reference lives
        self._at_most = 0  # alive, if nothing has been freed since the last look
        self._forward = self._loss = False
        self._loss_shapes: tuple[tuple[int, int], ...] = ()
        head = model.get_output_embeddings()
        self._head_shape = head.weight.shape
        layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        backbone = next(m.base_model for m in model.modules() if isinstance(m, PreTrainedModel))
        self._hooks = [backbone.register_forward_hook(self._enter_loss)]
        self._hooks += [layer.register_forward_pre_hook(self._enter_layer) for layer in layers]

    def forward(self, run):
        """`run()` is the forward with its loss."""
        self._forward = True
        try:
            return run()
        finally:
            self._forward = False

    def __exit__(self, *exception):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*exception)

    @property
    def bytes(self) -> int:
        """Alive now, without what is not counted."""
        return self._look()[0]

    @property
    def loss_buffers(self) -> int:
        """Bytes of the loss's own gradient buffers, alive now."""
        return self._look()[1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        of_weight = func is torch.ops.aten._to_copy.default and _address(args[0]) in self._outside
        if func is torch.ops.aten.add.Tensor and not self._forward and not torch.is_grad_enabled():
            of_weight = all(isinstance(t, torch.Tensor) and t.shape == self._head_shape for t in (out, *args[:2]))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf, of_weight)
        if not self._loss and self._at_most > self.peak:
            self.peak = max(self.peak, self.bytes)
        return out

    def _follow(self, tensor: torch.Tensor, of_weight: bool) -> None:
        storage, key = tensor.untyped_storage(), _address(tensor)
        known = self._followed.get(key)
        if key not in self._outside and (known is None or known.alive.expired()):
            size = storage.nbytes()
            self._followed[key] = _Storage(StorageWeakRef(storage), size, _rows(tensor), self._loss, of_weight)
            self._at_most += size

    def _look(self) -> tuple[int, int]:
        self._followed = {key: s for key, s in self._followed.items() if not s.alive.expired()}
        grads = {_address(p.grad) for p in self.model.parameters() if p.grad is not None}
        buffers: dict[tuple[int, int], int] = {}  # shape -> bytes
        total = 0
        for key, s in self._followed.items():
            if key in grads or s.of_weight:
                continue
            if s.of_loss and s.rows in self._loss_shapes and s.rows not in buffers:
                buffers[s.rows] = s.bytes
            else:
                total += s.bytes
        self._at_most = total + sum(buffers.values())
        return total, sum(buffers.values())

    def _enter_loss(self, backbone, args, output) -> None:
        if self._forward:
            self._loss = True
            self._loss_shapes = _rows(output[0]), tuple(self._head_shape)
            output[0].register_hook(self._leave_loss)

    def _leave_loss(self, grad) -> None:
        self._loss = False

    def _enter_layer(self, layer, args) -> None:
        if self._forward and args[0].requires_grad:
            args[0].register_hook(lambda grad: self.backward_curve.append(self.bytes))


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _rows(tensor: torch.Tensor) -> tuple[int, int]:
    columns = tensor.shape[-1] if tensor.dim() else 1
    return tensor.numel() // max(columns, 1), columns
