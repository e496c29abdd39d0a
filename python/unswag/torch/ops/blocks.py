"""Block codecs: lossy, 2 to 8 bits per value and a scale per block (docs/format.md section 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from unswag import _core
from unswag.torch.ops.register import op
from unswag.torch.ops.tensors import BLOCKS, DTYPES, UINT64, as_rows, check_dtype, check_no_graph, place


def _packed_shape(op: str, x: Tensor, codec: str) -> tuple[int, ...]:
    code = BLOCKS.get(codec)
    if code is None:
        raise ValueError(f"{op}: there is no block codec {codec!r}; choose from {', '.join(BLOCKS)}")
    return (*x.shape[:-1], _core.block_row_bytes(code, x.shape[-1] if x.dim() else 1))


def _encode_outputs(x: Tensor, codec: str, stochastic: bool, seed: int, offset: int) -> Tensor:
    check_dtype("block_encode", "x", x)
    return x.new_empty(_packed_shape("block_encode", x, codec), dtype=torch.uint8)


@op("(Tensor x, str codec, bool stochastic, int seed, int offset) -> Tensor", _encode_outputs)
def block_encode(x: Tensor, codec: str, stochastic: bool, seed: int, offset: int) -> Tensor:
    """x [..., cols] of any supported dtype in blocks of `codec`, one of BLOCKS.

    Result: uint8 [..., row bytes], where `_core.block_row_bytes` gives the bytes of a row: the bits of each value, and 2 bytes
    of scale per block (int8: 8.5 bits per value, int4 5, int2 2.25; docs/format.md section 9).

    stochastic rounds up or down by chance, drawn by Philox from (seed, offset), both taken as unsigned: unbiased, with higher
    variance. Otherwise rounding is to nearest, and seed and offset are ignored.
    """
    check_no_graph("block_encode", x)
    packed = _encode_outputs(x, codec, stochastic, seed, offset)
    x, rows, cols, stride = as_rows(x)
    device, stream, threads = place(x)
    _core.block_encode(
        BLOCKS[codec], stochastic, seed & UINT64, offset & UINT64, DTYPES[x.dtype], rows, cols, x.data_ptr(), stride,
        packed.data_ptr(), packed.shape[-1], device, stream, threads,
    )  # fmt: skip
    return packed


def _decode_outputs(packed: Tensor, codec: str, cols: int, dtype: torch.dtype) -> Tensor:
    op = "block_decode"
    x = torch.empty((*packed.shape[:-1], cols), dtype=dtype, device=packed.device)
    check_dtype(op, "dtype", x)
    if packed.dtype != torch.uint8 or packed.shape != _packed_shape(op, x, codec):
        raise ValueError(
            f"{op}: packed is {packed.dtype} of shape {list(packed.shape)} but {cols} columns in {codec} need torch.uint8 of "
            f"shape {list(_packed_shape(op, x, codec))}; pass what block_encode returned, and its columns"
        )
    return x


@op("(Tensor packed, str codec, int cols, ScalarType dtype) -> Tensor", _decode_outputs)
def block_decode(packed: Tensor, codec: str, cols: int, dtype: torch.dtype) -> Tensor:
    """The values of `block_encode`'s result, uint8 [..., row bytes], as [..., cols] of this dtype."""
    x = _decode_outputs(packed, codec, cols, dtype)
    packed, rows, _, packed_stride = as_rows(packed)
    device, stream, threads = place(packed)
    _core.block_decode(
        BLOCKS[codec], DTYPES[dtype], rows, cols, packed.data_ptr(), packed_stride, x.data_ptr(), cols, device, stream, threads
    )
    return x
