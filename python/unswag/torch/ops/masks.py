"""One-bit masks of the ReLU family, and the sign bits of an output of ReLU (docs/format.md sections 1 and 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unswag import _core
from unswag.torch.ops.register import leading, op, vmap
from unswag.torch.ops.tensors import (
    DTYPES,
    MASKS,
    as_rows,
    check_device,
    check_dtype,
    check_no_graph,
    check_packed,
    code_of,
    new_like,
    packed_shape,
    place,
)


def _forward_outputs(x: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
    check_dtype(act, "x", x)
    return new_like(x), x.new_empty(packed_shape(x), dtype=torch.uint8)


@op("(Tensor x, str act, float slope) -> (Tensor y, Tensor packed)", _forward_outputs)
def mask_forward(x: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
    """y = act(x), and the bit of each element that the backward needs.

    x       [..., cols], any supported dtype
    act     one of MASKS; slope is the factor of negative elements of the leaky ones, otherwise ignored
    y       shape and dtype of x
    packed  uint8 [..., row bytes], one bit per element, rows padded to 4 bytes: about n / 8 bytes for n elements
    """
    check_no_graph("mask_forward", x)
    code = code_of("mask_forward", act, MASKS)
    y, packed = _forward_outputs(x, act, slope)
    x, rows, cols, stride = as_rows(x)
    device, stream, threads = place(x)
    _core.mask_forward(
        code, slope, DTYPES[x.dtype], rows, cols, x.data_ptr(), stride, y.data_ptr(), cols,
        packed.data_ptr(), packed.shape[-1], device, stream, threads,
    )  # fmt: skip
    return y, packed


def _backward_outputs(dy: Tensor, packed: Tensor, act: str, slope: float) -> Tensor:
    check_dtype(act, "dy", dy)
    check_device(act, "packed", packed, "dy", dy)
    check_packed(act, "packed", packed, packed_shape(dy), dy, "pass the mask of the same call of mask_forward")
    return new_like(dy)


@op("(Tensor dy, Tensor packed, str act, float slope) -> Tensor", _backward_outputs)
def mask_backward(dy: Tensor, packed: Tensor, act: str, slope: float) -> Tensor:
    """dx = dy where the bit is set, else slope dy (or 0): shape and dtype of dy. `packed` is that of `mask_forward`."""
    check_no_graph("mask_backward", dy)
    code = code_of("mask_backward", act, MASKS)
    dx = _backward_outputs(dy, packed, act, slope)
    dy, rows, cols, stride = as_rows(dy)
    packed, _, _, packed_stride = as_rows(packed)
    device, stream, threads = place(dy)
    _core.mask_backward(
        code, slope, DTYPES[dy.dtype], rows, cols, dy.data_ptr(), stride, packed.data_ptr(), packed_stride,
        dx.data_ptr(), cols, device, stream, threads,
    )  # fmt: skip
    return dx


def _forward_vmap(info: Any, dims: Any, x: Tensor, act: str, slope: float) -> tuple[Any, Any]:
    x = leading(x, dims[0], info.batch_size)
    if x.dim() == 1:  # each example is one value with a packed row of its own
        y, packed = mask_forward(x.unsqueeze(-1), act, slope)
        return (y.squeeze(-1), packed), (0, 0)
    return mask_forward(x, act, slope), (0, 0)


def _backward_vmap(info: Any, dims: Any, dy: Tensor, packed: Tensor, act: str, slope: float) -> tuple[Tensor, int]:
    dy, packed = leading(dy, dims[0], info.batch_size), leading(packed, dims[1], info.batch_size)
    if dy.dim() == 1:
        return mask_backward(dy.unsqueeze(-1), packed, act, slope).squeeze(-1), 0
    return mask_backward(dy, packed, act, slope), 0


vmap(mask_forward, _forward_vmap)
vmap(mask_backward, _backward_vmap)


# ---- signs: what the backward of ReLU needs to know of its output -------------------------------------------------------


def _signs_encode_outputs(y: Tensor) -> Tensor:
    check_dtype("signs_encode", "y", y)
    return y.new_empty(packed_shape(y), dtype=torch.uint8)


@op("(Tensor y) -> Tensor", _signs_encode_outputs)
def signs_encode(y: Tensor) -> Tensor:
    """One bit per element of y [..., cols], not (y <= 0): the `packed` of `mask_forward(y, "relu", 0.0)` alone.

    Result: uint8 [..., row bytes], about n / 8 bytes.
    """
    check_no_graph("signs_encode", y)
    packed = _signs_encode_outputs(y)
    y, rows, cols, stride = as_rows(y)
    device, stream, threads = place(y)
    _core.mask_forward(
        MASKS["relu"], 0.0, DTYPES[y.dtype], rows, cols, y.data_ptr(), stride, 0, cols,
        packed.data_ptr(), packed.shape[-1], device, stream, threads,
    )  # fmt: skip
    return packed


def _signs_decode_outputs(packed: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    signs = packed.new_empty(shape, dtype=dtype)
    check_dtype("signs_decode", "the result", signs)
    check_packed("signs_decode", "packed", packed, packed_shape(signs), signs, "pass the shape that was encoded")
    return signs


@op("(Tensor packed, SymInt[] shape, ScalarType dtype) -> Tensor", _signs_decode_outputs)
def signs_decode(packed: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """1 where the bit is set, else 0, of this shape and dtype: it replaces y in the backward of ReLU, which only reads
    whether not (y <= 0)."""
    signs = _signs_decode_outputs(packed, shape, dtype)
    _, rows, cols, stride = as_rows(signs)
    packed, _, _, packed_stride = as_rows(packed)
    ones = signs.new_ones(cols)  # one row, read again and again
    device, stream, threads = place(signs)
    _core.mask_backward(
        MASKS["relu"], 0.0, DTYPES[dtype], rows, cols, ones.data_ptr(), 0, packed.data_ptr(), packed_stride,
        signs.data_ptr(), stride, device, stream, threads,
    )  # fmt: skip
    return signs
