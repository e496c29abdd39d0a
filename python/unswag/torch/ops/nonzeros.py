"""Non-zero values and where they are, lossless (docs/format.md section 8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unswag import _core
from unswag.torch.ops.register import op
from unswag.torch.ops.tensors import (
    DTYPES,
    as_rows,
    check_device,
    check_dtype,
    check_no_graph,
    check_packed,
    check_vector,
    packed_shape,
    place,
)


def _encode_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_dtype("nonzero_encode", "x", x)
    size = torch.library.get_ctx().new_dynamic_size()
    bitmap = x.new_empty(packed_shape(x), dtype=torch.uint8)
    return bitmap, x.new_empty(math.prod(x.shape[:-1]) + 1, dtype=torch.int64), x.new_empty(size)


@op("(Tensor x) -> (Tensor bitmap, Tensor offsets, Tensor values)", _encode_outputs)
def nonzero_encode(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The elements of x [..., cols] whose bits are not all 0 (so -0 and NaN are kept), in order.

    bitmap   uint8 [..., row bytes], one bit per element, rows padded to 4 bytes: about n / 8 bytes
    offsets  int64 [rows + 1]: the values of row i are values[offsets[i]:offsets[i + 1]]
    values   [offsets[rows]], dtype of x

    The number of values is known only once they have been counted: on CUDA this waits for the device.
    """
    check_no_graph("nonzero_encode", x)
    code = check_dtype("nonzero_encode", "x", x)
    bitmap = x.new_empty(packed_shape(x), dtype=torch.uint8)
    x, rows, cols, stride = as_rows(x)
    counts = x.new_empty(rows, dtype=torch.int64)
    device, stream, threads = place(x)
    _core.nonzero_count(code, rows, cols, x.data_ptr(), stride, counts.data_ptr(), device, stream, threads)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    values = x.new_empty(int(offsets[-1]))
    _core.nonzero_encode(
        code, rows, cols, x.data_ptr(), stride, offsets.data_ptr(), bitmap.data_ptr(), bitmap.shape[-1], values.data_ptr(),
        values.numel(), device, stream, threads,
    )  # fmt: skip
    return bitmap, offsets, values


def _decode_outputs(bitmap: Tensor, offsets: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    op = "nonzero_decode"
    check_dtype(op, "values", values)
    check_device(op, "offsets", offsets, "bitmap", bitmap)
    check_device(op, "values", values, "bitmap", bitmap)
    x = values.new_empty(shape)
    check_packed(op, "bitmap", bitmap, packed_shape(x), x, "pass the shape that was encoded")
    check_vector(op, "values", values, values.numel(), "their number")
    if offsets.dtype != torch.int64:
        raise TypeError(f"{op}: offsets have dtype {offsets.dtype}; pass those of nonzero_encode, torch.int64")
    check_vector(op, "offsets", offsets, math.prod(x.shape[:-1]) + 1, "the number of rows and one more")
    return x


@op("(Tensor bitmap, Tensor offsets, Tensor values, SymInt[] shape) -> Tensor", _decode_outputs)
def nonzero_decode(bitmap: Tensor, offsets: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    """The tensor that `nonzero_encode` was given, bit for bit: of this shape, in the dtype of values."""
    check_no_graph("nonzero_decode", values)
    x = _decode_outputs(bitmap, offsets, values, shape)
    _, rows, cols, stride = as_rows(x)
    bitmap, _, _, bitmap_stride = as_rows(bitmap)
    offsets, values = offsets.contiguous(), values.contiguous()
    device, stream, threads = place(x)
    _core.nonzero_decode(
        DTYPES[x.dtype], rows, cols, bitmap.data_ptr(), bitmap_stride, offsets.data_ptr(), values.data_ptr(), values.numel(),
        x.data_ptr(), stride, device, stream, threads,
    )  # fmt: skip
    return x
