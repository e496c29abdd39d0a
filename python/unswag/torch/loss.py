"""Linear + cross-entropy in chunks of rows: logits of size tokens x classes are neither built nor kept.

    logits = hidden weight^T + bias,   z = softcap tanh(logit_scale logits / softcap)   (softcap 0: z = logit_scale logits)
    loss   = cross_entropy(z, labels)

The forward visits the rows once.  For each chunk it makes the logits, lets the native op overwrite them with d loss / d logits,
and at once turns that into dhidden and dweight; the backward only scales these by the incoming gradient.  Rows whose label is
`ignore_index` are skipped: their gradient is zero.  Under transforms of torch.func and in forward mode the logits are made and
the loss is the formula above (`_formula`).

This module takes hidden states, weights and labels.  lazy_logits.py stands in for the logits of a model in training and calls
`linear_cross_entropy` or `head_cross_entropy` once it knows what the model makes of them.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, is_fake
from torch.autograd import forward_ad
from torch.nn import functional as F

from unswag.torch import loss_buffers, ops
from unswag.torch.autograd import once_differentiable
from unswag.torch.functional import check_integer, check_number
from unswag.torch.planned_device import is_planned, on_cuda

NumItems = Tensor | float | None

# A chunk holds at most this many logits: 64 MiB in float32, 32 MiB in 16 bits.  Smaller chunks cost time (dweight is read and
# written once per chunk), larger ones memory.
CHUNK_LOGITS = 1 << 24
# On a GPU at least so many rows, because there a chunk's products take less time than dweight: 6 operations for each row and
# weight, while 8 bytes of each weight's sum are read and written.  An H100 does 300 operations in the time of a byte, so that
# the two meet at 400 rows.
GPU_ROWS = 1024
# On a CPU at most so many rows where the layers are swept, so that a chunk is no larger than what they need.  At 49,152 classes
# a row then takes 1.6 % longer than in a chunk of 2^24 logits (341 rows).
ROWS_BESIDE_SWEPT_LAYERS = 256

_REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class LossOptions:
    """What the loss does with the logits; see `linear_cross_entropy`."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    class_weight: Tensor | None = None
    reduction: str = "mean"
    num_items: NumItems = None
    chunk_rows: int | None = None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: NumItems = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight, bias), labels)` without the logits.

    Args:
        hidden: [..., H], float32, float64, bfloat16 or float16.
        weight: [classes, H], same dtype (any floating dtype under autocast, whose dtype is then used for the products).
        labels: [...] integers in [0, classes) or `ignore_index`.  Not shifted: row i of `hidden` predicts label i.
        bias: [classes].
        softcap: 0, or s in z = s tanh(logit_scale logits / s), as Gemma 2 has it.
        class_weight: [classes], as `weight` of `F.cross_entropy`.
        reduction: "mean" (over labels that count, weighted by `class_weight`), "sum" or "none" ([...] losses).
        num_items: with "mean", the number to divide the sum by: the labels of a whole gradient accumulation window.  0 divides
            like any number, as in transformers: the loss is inf, or NaN when every label is ignored.
        chunk_rows: rows per chunk; by default as many as make 2^24 logits, on a GPU at least 1024.

    Returns a scalar (for "none": [...]) in float32 (float64 when the products are in float64).  When every label is ignored it
    is NaN for "mean" without `num_items`, else 0, and the gradients are zero, as in PyTorch.

    Saved for the backward: dhidden (H elements per row, in the dtype of the products), dweight and dbias in their own dtype,
    each only if its gradient is needed; for "none": hidden, weight and labels by reference, and the backward recomputes the
    logits.  dweight of 16-bit products is summed in float32.

    Under transforms of torch.func and in forward mode the logits are made, by PyTorch's own functions, and any derivative
    works.  Elsewhere a second derivative is a NotImplementedError.

    Raises ValueError for shapes that do not fit, a label out of range (with its position; not under torch.func), an unknown
    reduction, a `class_weight` or `num_items` that requires grad; TypeError for dtypes; NotImplementedError for tensor
    subclasses such as a sharded DTensor.
    """
    options = LossOptions(ignore_index, label_smoothing, softcap, logit_scale, class_weight, reduction, num_items, chunk_rows)
    _check(hidden, weight, labels, bias, options)
    if _is_transformed(hidden, weight, bias):
        return _formula(F.linear(hidden, weight, bias), labels, options)
    make = functools.partial(_LinearSweep, _product_dtype(hidden))
    return _loss(make, hidden, labels, options, (weight, bias))


def head_cross_entropy(
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    classes: int,
    hidden: Tensor,
    labels: Tensor,
    *,
    options: LossOptions = LossOptions(),
) -> Tensor:
    """The same for a head that is not a plain `nn.Linear` (LoRA, 4-bit, bias added elsewhere): it is called on chunks of rows.

    `parameters` are the tensors that get gradients; `head` maps [rows, H] to [rows, classes].  Saved: dhidden and one gradient
    for each parameter.  Reduction "none" is not offered: it would have to call a head with dropout a second time.
    """
    if options.reduction == "none":
        raise ValueError('head_cross_entropy: reduction "none" is not supported; use "mean" or "sum"')
    check_inputs(hidden, labels, classes, options)
    if _is_transformed(hidden, *parameters):
        return _formula(head(hidden), labels, options)
    make = functools.partial(_HeadSweep, head, classes)
    return _loss(make, hidden, labels, options, parameters)


def check_labels(labels: Tensor, classes: int, ignore_index: int = -100, *, shifted: int = 0) -> None:
    """Raises ValueError for the first label outside [0, classes) that is not `ignore_index`, naming where it is.

    `shifted` is added to the position along the last dimension: labels of the next token were moved by one.
    """
    bad = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bad.any():
        position = bad.nonzero()[0].tolist()
        label = labels[tuple(position)].item()
        if position:
            position[-1] += shifted
        raise ValueError(
            f"labels{position} is {label}, outside [0, {classes}); use {ignore_index} (ignore_index) for positions without a "
            "label, and check that the tokenizer belongs to this model"
        )


# ---- checks -------------------------------------------------------------------------------------------------------------


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which F.linear would run here: autocast's, else that of `hidden`."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: LossOptions) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias), ("class_weight", options.class_weight)):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer, FakeTensor):
            raise NotImplementedError(
                f"linear_cross_entropy: {name} is a {type(tensor).__name__}; pass a plain tensor (of a sharded one: "
                "full_tensor() or its local shard)"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"linear_cross_entropy: {name} has dtype {tensor.dtype}; a floating dtype is needed")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit; pass hidden "
            "[..., H] and weight [classes, H]"
        )
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            f"linear_cross_entropy: hidden has dtype {hidden.dtype} but weight {weight.dtype}; cast one, or use torch.autocast"
        )
    for name, vector in (("bias", bias), ("class_weight", options.class_weight)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(
                f"linear_cross_entropy: {name} has shape {tuple(vector.shape)}; one value per class is needed: "
                f"({weight.shape[0]},)"
            )
    check_inputs(hidden, labels, weight.shape[0], options)


def check_inputs(hidden: Tensor, labels: Tensor, classes: int, options: LossOptions) -> None:
    """Raises ValueError or TypeError for options and labels that do not fit; see `linear_cross_entropy`.  Reads the values of
    labels, and of no other tensor."""
    op = "linear_cross_entropy"
    if options.reduction not in _REDUCTIONS:
        raise ValueError(f'reduction is {options.reduction!r}; use "mean", "sum" or "none"')
    if options.num_items is not None and options.reduction != "mean":
        raise ValueError(f'num_items goes with reduction "mean", not "{options.reduction}"')
    if options.chunk_rows is not None:
        check_integer(op, "chunk_rows", options.chunk_rows, 1, "pass a positive number of rows, e.g. 4096")
    check_integer(op, "ignore_index", options.ignore_index)
    for name in ("label_smoothing", "softcap", "logit_scale"):  # their ranges the core knows
        check_number(op, name, getattr(options, name))
    if options.num_items is not None:
        check_number(op, "num_items", options.num_items, "pass a number, or a tensor of one element")
    for name, constant in (("class_weight", options.class_weight), ("num_items", options.num_items)):
        if isinstance(constant, Tensor) and (_has_tangent(constant) or (torch.is_grad_enabled() and constant.requires_grad)):
            raise ValueError(
                f"{name} requires grad, and the loss has no gradient for it; pass {name}.detach(), or use F.cross_entropy"
            )
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels are a {type(labels).__name__}; pass a torch.Tensor of integers")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels have dtype {labels.dtype}; integers are needed")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit hidden {tuple(hidden.shape)}: one label per row of hidden is needed, "
            f"{tuple(hidden.shape[:-1])}"
        )
    if not _under_functorch() and not is_fake(labels):  # whose tensors have no values to look at
        check_labels(labels, classes, options.ignore_index)


def _under_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _is_transformed(*tensors: Tensor | None) -> bool:
    """Whether other derivatives may be asked for than those that the chunks make."""
    return _under_functorch() or any(map(_has_tangent, tensors))


# ---- one sweep over the rows ----------------------------------------------------------------------------------------------


class _LinearSweep:
    """logits = x weight^T + bias for chunks of rows, and dx, dweight, dbias from d loss / d logits of each chunk."""

    def __init__(self, dtype: torch.dtype, x: Tensor, parameters: Sequence[Tensor | None], needs: Sequence[bool]):
        weight, bias = parameters
        assert weight is not None
        self.dtype, self.x = dtype, x
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.classes = weight.shape[0]
        self.out_dtypes = [None if p is None else p.dtype for p in parameters]
        # Products of 16-bit numbers are summed over the chunks in float32 and rounded once.
        self.dx = x.new_zeros(x.shape, dtype=dtype) if needs[0] else None
        self.dweight = weight.new_zeros(weight.shape, dtype=self.sum_dtype) if needs[1] else None
        self.dbias = weight.new_zeros(self.classes, dtype=self.sum_dtype) if needs[2] else None
        self.buffer: Tensor | None = None

    def logits(self, rows: Tensor | slice) -> Tensor:
        self.chunk = self.x[rows].to(self.dtype)
        n = self.chunk.shape[0]
        if self.buffer is None or self.buffer.shape[0] < n:
            self.buffer = self.weight.new_empty(n, self.classes)
        out = self.buffer[:n]
        if self.bias is None:
            return torch.mm(self.chunk, self.weight.T, out=out)
        return torch.addmm(self.bias, self.chunk, self.weight.T, out=out)

    def backward(self, rows: Tensor | slice, dlogits: Tensor) -> None:
        if self.dx is not None:
            self.dx[rows] = torch.mm(dlogits, self.weight)
        if self.dweight is not None:
            _add_product(self.dweight, dlogits.T, self.chunk)
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.sum_dtype)

    def gradients(self, scale: float) -> list[Tensor | None]:
        """dx, and `scale` times dweight and dbias in the dtypes of the parameters."""
        self.buffer = None
        sums = (self.dweight, self.dbias)
        return [self.dx, *(_finished(total, scale, dtype) for total, dtype in zip(sums, self.out_dtypes, strict=True))]


class _HeadSweep:
    """The same for any head: a small autograd graph per chunk."""

    def __init__(
        self,
        head: Callable[[Tensor], Tensor],
        classes: int,
        x: Tensor,
        parameters: Sequence[Tensor],
        needs: Sequence[bool],
    ):
        self.head, self.classes, self.x, self.parameters = head, classes, x, parameters
        self.dtype = _product_dtype(x)
        self.sum_dtype = torch.promote_types(self.dtype, torch.float32)
        self.any = any(needs)
        self.dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0] else None
        self.sums = [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) if need else None
            for p, need in zip(parameters, needs[1:], strict=True)
        ]

    def logits(self, rows: Tensor | slice) -> Tensor:
        with torch.set_grad_enabled(self.any), _kept_for_the_chunk():
            self.chunk = self.x[rows].detach().requires_grad_(self.dx is not None)
            self.made = self.head(self.chunk)
        if self.made.shape != (self.chunk.shape[0], self.classes):
            raise ValueError(
                f"the head made logits of shape {tuple(self.made.shape)} from {self.chunk.shape[0]} rows; expected "
                f"{(self.chunk.shape[0], self.classes)}"
            )
        # The op writes over its argument, and a node of the head may have kept its own output: give it a copy.
        return self.made.detach().clone(memory_format=torch.contiguous_format)

    def backward(self, rows: Tensor | slice, dlogits: Tensor) -> None:
        wanted: list[tuple[Tensor, Tensor | None]] = [(self.chunk, None)] if self.dx is not None else []
        wanted += [(p, total) for p, total in zip(self.parameters, self.sums, strict=True) if total is not None]
        gradients = torch.autograd.grad(self.made, [p for p, _ in wanted], dlogits, allow_unused=True)
        del self.made
        for (_, total), gradient in zip(wanted, gradients, strict=True):
            if gradient is None:
                continue
            if total is None:
                self.dx[rows] = gradient  # type: ignore[index]
            else:
                total += gradient

    def gradients(self, scale: float) -> list[Tensor | None]:
        """dx, and `scale` times the gradients of the parameters in their dtypes."""
        return [self.dx, *(_finished(t, scale, p.dtype) for t, p in zip(self.sums, self.parameters, strict=True))]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in the dtype of total."""
    if total.is_cuda and a.dtype != total.dtype:  # 16-bit numbers go through the tensor cores as they are
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _finished(total: Tensor | None, scale: float, dtype: torch.dtype | None) -> Tensor | None:
    if total is None or dtype is None:
        return None
    return (total if scale == 1 else total.mul_(scale)).to(dtype)


def _kept_for_the_chunk() -> Any:
    """Hooks under which what a head saves lives no longer than its chunk, and does not pass the hooks around the model.

    Detached, because a hook that keeps an operation's own output would make a cycle that is never freed.
    """
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda t: t)


def _rows_with_label(labels: Tensor, options: LossOptions) -> Tensor:
    if is_fake(labels):  # of a planned step: a causal loss has no label for the last token
        return torch.arange(max(0, labels.numel() - 1), device=labels.device)
    return (labels != options.ignore_index).nonzero().squeeze(1)


class _Limit(threading.local):
    rows: int | None = None


_limit = _Limit()


@contextlib.contextmanager
def beside_swept_layers() -> Iterator[None]:
    """Inside the block, in this thread, chunks on a CPU have at most `ROWS_BESIDE_SWEPT_LAYERS` rows, unless a call says how
    many."""
    before, _limit.rows = _limit.rows, ROWS_BESIDE_SWEPT_LAYERS
    try:
        yield
    finally:
        _limit.rows = before


def rows_of_chunk(classes: int, cuda: bool) -> int:
    """How many rows a chunk has at most, on CUDA or elsewhere."""
    rows = max(1, CHUNK_LOGITS // max(1, classes))
    if cuda:
        return max(rows, GPU_ROWS)
    return rows if _limit.rows is None else min(rows, _limit.rows)


def _sweep(
    sweep: _LinearSweep | _HeadSweep,
    labels: Tensor,
    kept: Tensor,
    options: LossOptions,
    *,
    gradient_scale: float = 1.0,
    row_scale: Tensor | None = None,
    write_gradient: bool = False,
) -> Tensor:
    """Visits the rows `kept`, which have a label, in chunks; returns the loss of each row, 0 for the others."""
    losses = sweep.x.new_zeros(labels.shape, dtype=sweep.sum_dtype)
    class_weight = None if options.class_weight is None else options.class_weight.to(sweep.sum_dtype)
    everything = kept.numel() == labels.numel()
    limit = options.chunk_rows or rows_of_chunk(sweep.classes, on_cuda(labels))
    chunks = math.ceil(kept.numel() / limit)
    for i in range(chunks):  # of nearly equal size; the borders depend on the labels and the limit alone
        begin, end = i * kept.numel() // chunks, (i + 1) * kept.numel() // chunks
        rows = slice(begin, end) if everything else kept[begin:end]
        logits = sweep.logits(rows)
        losses[rows], _ = ops.cross_entropy_(
            logits,
            labels[rows],
            class_weight,
            None if row_scale is None else row_scale[rows],
            gradient_scale,
            options.ignore_index,
            options.label_smoothing,
            options.softcap,
            options.logit_scale,
            write_gradient,
        )
        if write_gradient:
            sweep.backward(rows, logits)
    return losses


def _formula(logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    """The loss by the formula at the head of this file, with logits."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * options.logit_scale
    if options.softcap:
        z = options.softcap * torch.tanh(z / options.softcap)
    loss = F.cross_entropy(
        z.reshape(-1, z.shape[-1]),
        labels.reshape(-1).long(),
        None if options.class_weight is None else options.class_weight.to(z.dtype),
        ignore_index=options.ignore_index,
        reduction=options.reduction if options.num_items is None else "sum",
        label_smoothing=options.label_smoothing,
    )
    if options.num_items is not None:
        return loss / options.num_items
    return loss.view(labels.shape) if options.reduction == "none" else loss


def _denominator(labels: Tensor, kept: Tensor, options: LossOptions) -> float:
    if options.reduction != "mean":
        return 1.0
    if options.num_items is not None:
        return float(options.num_items)
    if options.class_weight is not None:
        return float(options.class_weight[labels[kept]].sum(dtype=torch.float64))
    return float(kept.numel())


# ---- autograd -------------------------------------------------------------------------------------------------------------


def _loss(
    make: Callable[..., _LinearSweep | _HeadSweep],
    hidden: Tensor,
    labels: Tensor,
    options: LossOptions,
    parameters: Sequence[Tensor | None],
) -> Tensor:
    shape = labels.shape
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    kept = _rows_with_label(labels, options)
    denominator = _denominator(labels, kept, options)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (hidden, *parameters)):
        losses = _sweep(make(hidden, parameters, [False] * (1 + len(parameters))), labels, kept, options)
        return losses.view(shape) if options.reduction == "none" else reduced(losses, denominator)
    if options.reduction == "none":
        return _RowLosses.apply(make, labels, kept, options, hidden, *parameters).view(shape)
    return _ReducedLoss.apply(make, labels, kept, options, denominator, hidden, *parameters)


def reduced(losses: Tensor, denominator: float) -> Tensor:
    """The sum of the rows' losses, taken in float64, over `denominator`; a scalar of their dtype."""
    return (losses.sum(dtype=torch.float64) / denominator).to(losses.dtype)  # over nothing: 0 / 0 = NaN, as in PyTorch


class _ReducedLoss(torch.autograd.Function):
    """The summed or averaged loss; its gradients are made in the forward and saved."""

    @staticmethod
    def forward(
        ctx: Any,
        make: Callable[..., _LinearSweep | _HeadSweep],
        labels: Tensor,
        kept: Tensor,
        options: LossOptions,
        denominator: float,
        hidden: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        with loss_buffers.inside_loss():
            sweep = make(hidden, parameters, ctx.needs_input_grad[5:])
            scale = 1 / denominator if denominator else math.inf
            # In float16, softmax / rows is below the smallest number for most classes: there the division comes last.
            late = scale if sweep.dtype == torch.float16 and math.isfinite(scale) else 1.0
            losses = _sweep(sweep, labels, kept, options, gradient_scale=scale / late, write_gradient=True)
            buffers = sweep.gradients(late)
        for buffer in buffers:
            if buffer is not None:
                loss_buffers.mark_loss_buffer(buffer)
        ctx.save_for_backward(*buffers)
        ctx.set_materialize_grads(False)
        ctx.late = late
        return reduced(losses, denominator)

    @staticmethod
    @once_differentiable(sources_are_saved=False)
    @loss_buffers.inside_loss()
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, *dparameters = ctx.saved_tensors
        scale = 1.0 if is_planned() else float(dloss)
        return (
            *(None,) * 5,
            _scaled(dhidden, scale * ctx.late),
            *(_scaled(gradient, scale) for gradient in dparameters),
        )


def _scaled(buffer: Tensor | None, scale: float) -> Tensor | None:
    """scale * buffer.  The buffer itself is returned only when no later backward needs it: a leaf takes the tensor that it gets
    as its `.grad` and adds to it in place."""
    if buffer is None:
        return None
    if scale != 1:
        return buffer * scale
    return buffer.clone() if _graph_is_kept() else buffer


def _graph_is_kept() -> bool:
    """Whether the running backward was called with retain_graph=True."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


class _RowLosses(torch.autograd.Function):
    """One loss per row.  The incoming gradient of each row is known in the backward only, which therefore sweeps again."""

    @staticmethod
    def forward(
        ctx: Any,
        make: Callable[..., _LinearSweep | _HeadSweep],
        labels: Tensor,
        kept: Tensor,
        options: LossOptions,
        hidden: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        ctx.make, ctx.options = make, options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(labels, hidden, *parameters)
        with loss_buffers.inside_loss():
            return _sweep(make(hidden, parameters, [False] * (1 + len(parameters))), labels, kept, options)

    @staticmethod
    @once_differentiable
    @loss_buffers.inside_loss()
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        labels, hidden, *parameters = ctx.saved_tensors
        sweep = ctx.make(hidden, parameters, ctx.needs_input_grad[4:])
        kept = _rows_with_label(labels, ctx.options)
        _sweep(sweep, labels, kept, ctx.options, row_scale=dlosses.contiguous(), write_gradient=True)
        return (None, None, None, None, *sweep.gradients(1.0))


# ---- whether a model in training makes its logits ---------------------------------------------------------------------------

_keep_logits: contextvars.ContextVar[bool] = contextvars.ContextVar("unswag_keep_logits", default=False)


@contextlib.contextmanager
def keep_logits() -> Iterator[None]:
    """A context manager within which a patched model in training makes its logits, as the original model does."""
    token = _keep_logits.set(True)
    try:
        yield
    finally:
        _keep_logits.reset(token)


def logits_are_kept() -> bool:
    """Whether this context is inside `keep_logits()`."""
    return _keep_logits.get()
