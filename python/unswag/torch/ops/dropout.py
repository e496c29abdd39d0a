"""Dropout whose draws are a function of (seed, offset), so that the backward draws them again (docs/format.md section 4)."""

from __future__ import annotations

from torch import Tensor

from unswag import _core
from unswag.torch.ops.register import op
from unswag.torch.ops.tensors import DTYPES, UINT64, as_rows, check_dtype, check_no_graph, new_like, place


def _outputs(x: Tensor, p: float, seed: int, offset: int) -> Tensor:
    check_dtype("dropout", "x", x)
    return new_like(x)


@op("(Tensor x, float p, int seed, int offset) -> Tensor", _outputs)
def dropout(x: Tensor, p: float, seed: int, offset: int) -> Tensor:
    """x / (1 - p) with probability 1 - p, else 0: shape and dtype of x. It is its own backward: no mask is stored.

    Element i takes the draw i of Philox from (seed, offset), both taken as unsigned; p is in [0, 1).
    """
    check_no_graph("dropout", x)
    y = _outputs(x, p, seed, offset)
    x, rows, cols, stride = as_rows(x)
    device, stream, threads = place(x)
    _core.dropout(
        p, seed & UINT64, offset & UINT64, DTYPES[x.dtype], rows, cols, x.data_ptr(), stride, y.data_ptr(), cols,
        device, stream, threads,
    )  # fmt: skip
    return y
