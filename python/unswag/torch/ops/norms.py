"""RMSNorm and LayerNorm over the last dimension; x and one or two numbers per row are all that the backward needs.

x is [..., cols] of any supported dtype; weight and bias are [cols] of any supported dtype, or None. Statistics (mean, rstd) are
one number per row, float32 (float64 beside float64 x): 4 or 8 bytes. dw and db are sums over all rows in that dtype.
`out_dtype` is the dtype of y, None for that of x. Formulas: docs/math.md.
"""

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
    new_like,
    place,
    wide_dtype,
)

# ---- what both share ------------------------------------------------------------------------------------------------------


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> None:
    check_dtype(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no dimension to normalise over; pass x of shape [..., cols]")
    if weight is not None:
        _check_affine(op, "weight", weight, x)
    if bias is not None:
        _check_affine(op, "bias", bias, x)


def _check_affine(op: str, name: str, vector: Tensor, x: Tensor) -> None:
    check_dtype(op, name, vector)
    check_vector(op, name, vector, x.shape[-1], "the last dimension of x")
    check_device(op, name, vector, "x", x)


def _check_statistic(op: str, name: str, statistic: Tensor, x: Tensor) -> None:
    check_device(op, name, statistic, "x", x)
    if statistic.dtype != wide_dtype(x.dtype) or statistic.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: {name} is {statistic.dtype} of shape {list(statistic.shape)} but x of shape {list(x.shape)} needs "
            f"{wide_dtype(x.dtype)} of shape {list(x.shape[:-1])}; pass what {op}_forward returned"
        )


def _check_dy(op: str, dy: Tensor, x: Tensor) -> None:
    check_dtype(op, "dy", dy)
    check_device(op, "dy", dy, "x", x)
    if dy.shape != x.shape:
        raise ValueError(f"{op}: dy has shape {list(dy.shape)} but x has {list(x.shape)}; they must be equal")


def _new_y(op: str, x: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    if out_dtype is None or out_dtype == x.dtype:
        return new_like(x)
    y = torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format)
    check_dtype(op, "out_dtype", y)
    return y


def _new_dx(x: Tensor, needed: bool) -> Tensor:
    """Empty, of no elements where the gradient is not needed."""
    return new_like(x) if needed else x.new_empty(0)


def _new_sums(x: Tensor, needed: bool) -> Tensor:
    """dw or db, of no elements where it is not needed."""
    return x.new_empty(x.shape[-1:] if needed else 0, dtype=wide_dtype(x.dtype))


# ---- RMSNorm --------------------------------------------------------------------------------------------------------------


def _rms_norm_forward_outputs(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_before_weight: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check("rms_norm", x, weight)
    return _new_y("rms_norm", x, out_dtype), x.new_empty(x.shape[:-1], dtype=wide_dtype(x.dtype))


def _fill_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_before_weight: bool,
    y: Tensor, rstd: Tensor, given: bool,
) -> None:  # fmt: skip
    x, rows, cols, stride = as_rows(x)
    weight = dense(weight)
    device, stream, threads = place(x)
    _core.rms_norm_forward(
        eps, weight_offset, cast_before_weight, given, rows, cols, DTYPES[x.dtype], x.data_ptr(), stride,
        0 if weight is None else DTYPES[weight.dtype], address(weight), DTYPES[y.dtype], y.data_ptr(), cols,
        rstd.data_ptr(), device, stream, threads,
    )  # fmt: skip


@op(
    "(Tensor x, Tensor? weight, float eps, float weight_offset, bool cast_before_weight, ScalarType? out_dtype)"
    " -> (Tensor y, Tensor rstd)",
    _rms_norm_forward_outputs,
)
def rms_norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_before_weight: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = x rstd (weight_offset + weight), with rstd = 1 / sqrt(mean(x^2) + eps), one per row: [...].

    cast_before_weight rounds x rstd to the dtype of x before the weight is applied.
    """
    check_no_graph("rms_norm_forward", x, weight)
    y, rstd = _rms_norm_forward_outputs(x, weight, eps, weight_offset, cast_before_weight, out_dtype)
    _fill_rms_norm(x, weight, eps, weight_offset, cast_before_weight, y, rstd, given=False)
    return y, rstd


def _rms_norm_apply_outputs(
    x: Tensor, rstd: Tensor, weight: Tensor | None, weight_offset: float, cast_before_weight: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    _check("rms_norm", x, weight)
    _check_statistic("rms_norm", "rstd", rstd, x)
    return _new_y("rms_norm", x, out_dtype)


@op(
    "(Tensor x, Tensor rstd, Tensor? weight, float weight_offset, bool cast_before_weight, ScalarType? out_dtype) -> Tensor",
    _rms_norm_apply_outputs,
)
def rms_norm_apply(
    x: Tensor, rstd: Tensor, weight: Tensor | None, weight_offset: float, cast_before_weight: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """The y of `rms_norm_forward`, recomputed from x and its rstd with the same bits."""
    check_no_graph("rms_norm_apply", x, weight)
    y = _rms_norm_apply_outputs(x, rstd, weight, weight_offset, cast_before_weight, out_dtype)
    _fill_rms_norm(x, weight, 0.0, weight_offset, cast_before_weight, y, rstd.contiguous(), given=True)
    return y


def _rms_norm_backward_outputs(
    x: Tensor, rstd: Tensor, weight: Tensor | None, dy: Tensor, weight_offset: float, cast_before_weight: bool,
    need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check("rms_norm", x, weight)
    _check_statistic("rms_norm", "rstd", rstd, x)
    _check_dy("rms_norm", dy, x)
    return _new_dx(x, need_dx), _new_sums(x, need_dw)


@op(
    "(Tensor x, Tensor rstd, Tensor? weight, Tensor dy, float weight_offset, bool cast_before_weight, bool need_dx,"
    " bool need_dw) -> (Tensor dx, Tensor dw)",
    _rms_norm_backward_outputs,
)
def rms_norm_backward(
    x: Tensor, rstd: Tensor, weight: Tensor | None, dy: Tensor, weight_offset: float, cast_before_weight: bool,
    need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx (shape and dtype of x) and dw [cols], each of no elements where it is not needed; dy has the shape of x."""
    check_no_graph("rms_norm_backward", x, weight, dy)
    dx, dw = _rms_norm_backward_outputs(x, rstd, weight, dy, weight_offset, cast_before_weight, need_dx, need_dw)
    x, rows, cols, x_stride = as_rows(x)
    dy, _, _, dy_stride = as_rows(dy)
    weight, rstd = dense(weight), rstd.contiguous()
    device, stream, threads = place(x)
    scratch = None
    if need_dw and device >= 0:
        scratch = x.new_empty(_core.rms_norm_backward_scratch(rows, cols), dtype=torch.uint8)
    _core.rms_norm_backward(
        weight_offset, cast_before_weight, rows, cols, DTYPES[x.dtype], x.data_ptr(), x_stride,
        0 if weight is None else DTYPES[weight.dtype], address(weight), rstd.data_ptr(), DTYPES[dy.dtype], dy.data_ptr(),
        dy_stride, dx.data_ptr() if need_dx else 0, cols, dw.data_ptr() if need_dw else 0, address(scratch), device, stream,
        threads,
    )  # fmt: skip
    return dx, dw


# ---- LayerNorm ------------------------------------------------------------------------------------------------------------


def _layer_norm_forward_outputs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check("layer_norm", x, weight, bias)
    mean = x.new_empty(x.shape[:-1], dtype=wide_dtype(x.dtype))
    return _new_y("layer_norm", x, out_dtype), mean, torch.empty_like(mean)


def _fill_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, y: Tensor, mean: Tensor, rstd: Tensor, given: bool
) -> None:
    x, rows, cols, stride = as_rows(x)
    weight, bias = dense(weight), dense(bias)
    device, stream, threads = place(x)
    _core.layer_norm_forward(
        eps, given, rows, cols, DTYPES[x.dtype], x.data_ptr(), stride,
        0 if weight is None else DTYPES[weight.dtype], address(weight), 0 if bias is None else DTYPES[bias.dtype],
        address(bias), DTYPES[y.dtype], y.data_ptr(), cols, mean.data_ptr(), rstd.data_ptr(), device, stream, threads,
    )  # fmt: skip


@op(
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType? out_dtype) -> (Tensor y, Tensor mean, Tensor rstd)",
    _layer_norm_forward_outputs,
)
def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y = (x - mean) rstd weight + bias, with rstd = 1 / sqrt(variance + eps); mean and rstd are one per row: [...]."""
    check_no_graph("layer_norm_forward", x, weight, bias)
    y, mean, rstd = _layer_norm_forward_outputs(x, weight, bias, eps, out_dtype)
    _fill_layer_norm(x, weight, bias, eps, y, mean, rstd, given=False)
    return y, mean, rstd


def _layer_norm_apply_outputs(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    _check("layer_norm", x, weight, bias)
    _check_statistic("layer_norm", "mean", mean, x)
    _check_statistic("layer_norm", "rstd", rstd, x)
    return _new_y("layer_norm", x, out_dtype)


@op(
    "(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, ScalarType? out_dtype) -> Tensor",
    _layer_norm_apply_outputs,
)
def layer_norm_apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    """The y of `layer_norm_forward`, recomputed from x and its statistics with the same bits."""
    check_no_graph("layer_norm_apply", x, weight, bias)
    y = _layer_norm_apply_outputs(x, mean, rstd, weight, bias, out_dtype)
    _fill_layer_norm(x, weight, bias, 0.0, y, mean.contiguous(), rstd.contiguous(), given=True)
    return y


def _layer_norm_backward_outputs(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, dy: Tensor, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check("layer_norm", x, weight)
    _check_statistic("layer_norm", "mean", mean, x)
    _check_statistic("layer_norm", "rstd", rstd, x)
    _check_dy("layer_norm", dy, x)
    return _new_dx(x, need_dx), _new_sums(x, need_dw), _new_sums(x, need_db)


@op(
    "(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor dy, bool need_dx, bool need_dw, bool need_db)"
    " -> (Tensor dx, Tensor dw, Tensor db)",
    _layer_norm_backward_outputs,
)
def layer_norm_backward(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, dy: Tensor, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (shape and dtype of x), dw and db [cols], each of no elements where it is not needed; dy has the shape of x."""
    check_no_graph("layer_norm_backward", x, weight, dy)
    dx, dw, db = _layer_norm_backward_outputs(x, mean, rstd, weight, dy, need_dx, need_dw, need_db)
    x, rows, cols, x_stride = as_rows(x)
    dy, _, _, dy_stride = as_rows(dy)
    weight, mean, rstd = dense(weight), mean.contiguous(), rstd.contiguous()
    device, stream, threads = place(x)
    scratch = None
    if (need_dw or need_db) and device >= 0:
        scratch = x.new_empty(_core.layer_norm_backward_scratch(rows, cols), dtype=torch.uint8)
    _core.layer_norm_backward(
        rows, cols, DTYPES[x.dtype], x.data_ptr(), x_stride, 0 if weight is None else DTYPES[weight.dtype], address(weight),
        mean.data_ptr(), rstd.data_ptr(), DTYPES[dy.dtype], dy.data_ptr(), dy_stride, dx.data_ptr() if need_dx else 0, cols,
        dw.data_ptr() if need_dw else 0, db.data_ptr() if need_db else 0, address(scratch), device, stream, threads,
    )  # fmt: skip
    return dx, dw, db
