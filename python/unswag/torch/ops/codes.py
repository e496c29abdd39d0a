"""The derivative of an activation as a code of 1 to 4 bits: by bounds and levels, or dithered.

x, y, dy and dx are [..., cols] of one supported dtype. `packed` is uint8 [..., row bytes], `bits` per element, rows padded to
4 bytes (docs/format.md sections 5 and 7): about n bits / 8 bytes for n elements. y has no elements where `need_y` is False.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unswag import _core
from unswag.torch.ops.register import op
from unswag.torch.ops.tensors import (
    ACTIVATIONS,
    DTYPES,
    UINT64,
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

# The activations that can be dithered: those for which docs/format.md section 7 gives the lowest derivative.
DITHERED: dict[str, int] = {name: ACTIVATIONS[name] for name in _core.dithered}


def _packed_shape(op: str, x: Tensor, bits: int) -> tuple[int, ...]:
    if not 1 <= bits <= 4:
        raise ValueError(f"{op}: bits is {bits}; pass a number from 1 to 4")
    return packed_shape(x, bits)


def _forward_outputs(op: str, x: Tensor, bits: int, need_y: bool) -> tuple[Tensor, Tensor]:
    check_dtype(op, "x", x)
    packed = x.new_empty(_packed_shape(op, x, bits), dtype=torch.uint8)
    return new_like(x) if need_y else x.new_empty(0), packed


def _backward_outputs(op: str, dy: Tensor, packed: Tensor, bits: int) -> Tensor:
    check_dtype(op, "dy", dy)
    check_device(op, "packed", packed, "dy", dy)
    check_packed(op, "packed", packed, _packed_shape(op, dy, bits), dy, "pass the codes of the forward, with its bits")
    return new_like(dy)


# ---- codes --------------------------------------------------------------------------------------------------------------


def _code_forward_outputs(
    x: Tensor, act: str, bounds: list[float], bits: int, of_derivative: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    return _forward_outputs("code_forward", x, bits, need_y)


@op(
    "(Tensor x, str act, float[] bounds, int bits, bool of_derivative, bool need_y) -> (Tensor y, Tensor packed)",
    _code_forward_outputs,
)
def code_forward(
    x: Tensor, act: str, bounds: list[float], bits: int, of_derivative: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """y = act(x), exact, and the number of bounds strictly below x (below act'(x) with `of_derivative`), 0 for NaN.

    bounds  ascending, 1 to 2^bits - 1 of them
    """
    check_no_graph("code_forward", x)
    code = code_of("code_forward", act, ACTIVATIONS)
    y, packed = _code_forward_outputs(x, act, bounds, bits, of_derivative, need_y)
    x, rows, cols, stride = as_rows(x)
    device, stream, threads = place(x)
    _core.code_forward(
        code, of_derivative, bits, bounds, DTYPES[x.dtype], rows, cols, x.data_ptr(), stride, y.data_ptr() if need_y else 0,
        cols, packed.data_ptr(), packed.shape[-1], device, stream, threads,
    )  # fmt: skip
    return y, packed


def _code_backward_outputs(dy: Tensor, packed: Tensor, levels: list[float], bits: int) -> Tensor:
    return _backward_outputs("code_backward", dy, packed, bits)


@op("(Tensor dy, Tensor packed, float[] levels, int bits) -> Tensor", _code_backward_outputs)
def code_backward(dy: Tensor, packed: Tensor, levels: list[float], bits: int) -> Tensor:
    """dx = dy levels[code]; levels has one value more than the bounds of the forward."""
    check_no_graph("code_backward", dy)
    dx = _code_backward_outputs(dy, packed, levels, bits)
    dy, rows, cols, stride = as_rows(dy)
    packed, _, _, packed_stride = as_rows(packed)
    device, stream, threads = place(dy)
    _core.code_backward(
        bits, levels, DTYPES[dy.dtype], rows, cols, dy.data_ptr(), stride, packed.data_ptr(), packed_stride,
        dx.data_ptr(), cols, device, stream, threads,
    )  # fmt: skip
    return dx


# ---- dither -------------------------------------------------------------------------------------------------------------


def _dither_forward_outputs(x: Tensor, act: str, bits: int, seed: int, offset: int, need_y: bool) -> tuple[Tensor, Tensor]:
    return _forward_outputs("dither_forward", x, bits, need_y)


@op(
    "(Tensor x, str act, int bits, int seed, int offset, bool need_y) -> (Tensor y, Tensor packed)",
    _dither_forward_outputs,
)
def dither_forward(x: Tensor, act: str, bits: int, seed: int, offset: int, need_y: bool) -> tuple[Tensor, Tensor]:
    """y = act(x), exact, and act'(x) dithered to 2^bits levels: unbiased, with higher variance than `code_forward`.

    act is one of DITHERED. The noise of element i is the draw i of Philox from (seed, offset), both taken as unsigned.
    """
    check_no_graph("dither_forward", x)
    code = code_of("dither_forward", act, DITHERED)
    y, packed = _dither_forward_outputs(x, act, bits, seed, offset, need_y)
    x, rows, cols, stride = as_rows(x)
    device, stream, threads = place(x)
    _core.dither_forward(
        code, bits, seed & UINT64, offset & UINT64, DTYPES[x.dtype], rows, cols, x.data_ptr(), stride,
        y.data_ptr() if need_y else 0, cols, packed.data_ptr(), packed.shape[-1], device, stream, threads,
    )  # fmt: skip
    return y, packed


def _dither_backward_outputs(dy: Tensor, packed: Tensor, act: str, bits: int, seed: int, offset: int) -> Tensor:
    return _backward_outputs("dither_backward", dy, packed, bits)


@op("(Tensor dy, Tensor packed, str act, int bits, int seed, int offset) -> Tensor", _dither_backward_outputs)
def dither_backward(dy: Tensor, packed: Tensor, act: str, bits: int, seed: int, offset: int) -> Tensor:
    """dx = dy times the dithered derivative: level minus the same noise, drawn again from the forward's (seed, offset)."""
    check_no_graph("dither_backward", dy)
    code = code_of("dither_backward", act, DITHERED)
    dx = _dither_backward_outputs(dy, packed, act, bits, seed, offset)
    dy, rows, cols, stride = as_rows(dy)
    packed, _, _, packed_stride = as_rows(packed)
    device, stream, threads = place(dy)
    _core.dither_backward(
        code, bits, seed & UINT64, offset & UINT64, DTYPES[dy.dtype], rows, cols, dy.data_ptr(), stride,
        packed.data_ptr(), packed_stride, dx.data_ptr(), cols, device, stream, threads,
    )  # fmt: skip
    return dx
