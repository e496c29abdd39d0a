"""Cross-entropy whose gradient overwrites the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from unswag import _core
from unswag.torch.ops.register import op
from unswag.torch.ops.tensors import (
    DTYPES,
    address,
    as_rows,
    check_device,
    check_dtype,
    check_no_graph,
    check_vector,
    dense,
    place,
    wide_dtype,
)


def _outputs(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, row_scale: Tensor | None, gradient_scale: float,
    ignore_index: int, label_smoothing: float, softcap: float, logit_scale: float, write_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "cross_entropy_"
    check_dtype(op, "logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"{op}: logits have shape {list(logits.shape)}; pass [rows, classes], e.g. logits.flatten(0, -2)")
    if labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels have dtype {labels.dtype}; pass labels.to(torch.int64)")
    rows, classes = logits.shape
    wide = wide_dtype(logits.dtype)
    check_vector(op, "labels", labels, rows, "the number of rows of logits")
    check_vector(op, "class_weight", class_weight, classes, "the number of classes")
    check_vector(op, "row_scale", row_scale, rows, "the number of rows of logits")
    check_device(op, "labels", labels, "logits", logits)
    for name, vector in (("class_weight", class_weight), ("row_scale", row_scale)):
        check_device(op, name, vector, "logits", logits)
        if vector is not None and vector.dtype != wide:
            raise TypeError(f"{op}: {name} has dtype {vector.dtype}; pass {name}.to({wide})")
    return logits.new_empty(rows, dtype=wide), logits.new_empty(rows, dtype=wide)


@op(
    "(Tensor(a!) logits, Tensor labels, Tensor? class_weight, Tensor? row_scale, float gradient_scale, int ignore_index,"
    " float label_smoothing, float softcap, float logit_scale, bool write_gradient) -> (Tensor loss, Tensor lse)",
    _outputs,
)
def cross_entropy_(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, row_scale: Tensor | None, gradient_scale: float,
    ignore_index: int, label_smoothing: float, softcap: float, logit_scale: float, write_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and log-sum-exp of each row; with `write_gradient` the logits are overwritten with their gradient.

    logits        [rows, classes], any supported dtype; the gradient has the same shape and dtype, so no other buffer is needed
    labels        int64 [rows]; rows with the label ignore_index have loss, lse and gradient 0
    class_weight  [classes] or None; row_scale [rows] or None, a factor of each row's gradient: float32, float64 beside float64
    loss, lse     [rows] of that dtype: 4 bytes per row each (8 for float64)

    logits are multiplied by logit_scale and then, unless softcap is 0, become softcap tanh(z / softcap). The gradient is
    multiplied by gradient_scale. Formulas: docs/math.md.

    On the CPU a label that is out of range is a ValueError, and nothing is written. On CUDA it cannot be seen without waiting
    for the device: loss, lse and gradient of its row become NaN. `loss.check_labels` waits and looks.
    """
    check_no_graph("cross_entropy_", logits, class_weight)
    loss, lse = _outputs(
        logits, labels, class_weight, row_scale, gradient_scale, ignore_index, label_smoothing, softcap, logit_scale,
        write_gradient,
    )  # fmt: skip
    here, rows, cols, stride = as_rows(logits)
    if here is not logits:
        raise ValueError(
            f"cross_entropy_: logits with strides {list(logits.stride())} cannot be written in place; pass logits.contiguous()"
        )
    labels, class_weight, row_scale = labels.contiguous(), dense(class_weight), dense(row_scale)
    device, stream, threads = place(logits)
    _core.cross_entropy(
        DTYPES[logits.dtype], rows, cols, logits.data_ptr(), stride, labels.data_ptr(), address(class_weight),
        address(row_scale), gradient_scale, ignore_index, label_smoothing, softcap, logit_scale, write_gradient,
        loss.data_ptr(), lse.data_ptr(), device, stream, threads,
    )  # fmt: skip
    return loss, lse
