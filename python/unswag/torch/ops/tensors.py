"""What all ops share: the tables of the core, checks of arguments, and how a tensor is handed to the core.

Layout. An input is read where it lies if one row stride describes it: any view whose last dimension is contiguous and whose
leading dimensions collapse, including a constant row that was expanded (row stride 0). Otherwise a contiguous copy is read.
Outputs are always contiguous. Inputs are never written to, except the logits of `cross_entropy_`.

Place. One kernel function serves the CPU and CUDA. All tensors of a call are on one device. On CUDA the work is queued on the
current stream of PyTorch, like that of PyTorch's own ops, and nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unswag import _core

# name or dtype → code of the core: its position in the core's list
DTYPES: dict[torch.dtype, int] = {getattr(torch, name): code for code, name in enumerate(_core.dtypes)}
MASKS: dict[str, int] = {name: code for code, name in enumerate(_core.masks)}
ACTIVATIONS: dict[str, int] = {name: code for code, name in enumerate(_core.activations)}
BLOCKS: dict[str, int] = {name: code for code, name in enumerate(_core.blocks)}

UINT64 = 0xFFFF_FFFF_FFFF_FFFF  # the integers of torch are signed, a seed is not: `seed & UINT64`

# ---- checks -------------------------------------------------------------------------------------------------------------


def check_dtype(op: str, name: str, x: Tensor) -> int:
    """The code of the dtype of `x`; TypeError for a dtype without kernels."""
    code = DTYPES.get(x.dtype)
    if code is None:
        raise TypeError(
            f"{op}: {name} has dtype {x.dtype}; supported are {', '.join(_core.dtypes)}: "
            f"convert it, e.g. {name}.to(torch.float32)"
        )
    return code


def check_device(op: str, name: str, x: Tensor | None, like_name: str, like: Tensor) -> None:
    """`x` is on the device of `like`: the core gets addresses, which are valid on one device only."""
    if x is not None and x.device != like.device:
        raise ValueError(
            f"{op}: {name} is on device '{x.device}' but {like_name} on '{like.device}'; pass {name}.to('{like.device}')"
        )


def check_same(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """`x` has the device, the dtype and the shape of `like`."""
    check_device(op, name, x, like_name, like)
    if x.dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} has dtype {x.dtype} but {like_name} has {like.dtype}; convert one, e.g. {name}.to({like.dtype})"
        )
    if x.shape != like.shape:
        raise ValueError(
            f"{op}: {name} has shape {list(x.shape)} but {like_name} has {list(like.shape)}; "
            "they must be equal, nothing is broadcast"
        )


def check_vector(op: str, name: str, x: Tensor | None, size: int, what: str) -> None:
    """`x` is None or has the shape [size]."""
    if x is not None and (x.dim() != 1 or x.shape[0] != size):
        raise ValueError(f"{op}: {name} has shape {list(x.shape)} but {what} is {size}; pass a {name} of shape [{size}]")


def check_packed(op: str, name: str, packed: Tensor, shape: tuple[int, ...], like: Tensor, remedy: str) -> None:
    """`packed` holds the packed bytes of a tensor like `like`: uint8 of this shape."""
    if packed.dtype != torch.uint8 or packed.shape != shape:
        raise ValueError(
            f"{op}: {name} is {packed.dtype} of shape {list(packed.shape)} but a tensor of shape {list(like.shape)} needs "
            f"torch.uint8 of shape {list(shape)}; {remedy}"
        )


def code_of(op: str, act: str, codes: dict[str, int]) -> int:
    """The code of an activation or mask; ValueError with the choices for an unknown name."""
    code = codes.get(act)
    if code is None:
        raise ValueError(f"{op}: there is no activation {act!r}; choose from {', '.join(codes)}")
    return code


def check_no_graph(op: str, *inputs: Tensor | None) -> None:
    """RuntimeError where autograd follows an input: the op would cut the graph without a word."""
    if not torch.is_grad_enabled():
        return
    for x in inputs:
        if x is not None and x.requires_grad:
            raise RuntimeError(
                f"torch.ops.unswag.{op} has no derivative, and an input requires grad; call unswag.torch.functional, "
                "or call the op under torch.no_grad()"
            )


# ---- layout -------------------------------------------------------------------------------------------------------------


def as_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(tensor, rows, cols, row stride): x as rows of adjacent elements, or a copy of it when it cannot be seen that way."""
    if x.data_ptr() % x.element_size():  # e.g. torch.frombuffer at an odd offset
        x = x.clone(memory_format=torch.contiguous_format)
    shape = x.shape
    if not shape:
        return x, 1, 1, 1
    cols = shape[-1]
    rows = x.numel() // cols if cols else shape[:-1].numel()
    if x.is_contiguous():
        return x, rows, cols, cols
    stride = row_stride(x)
    if stride is None:
        if not any(x.stride()):  # one value expanded, as by the backward of sum() and mean(): one row, read again and again
            row = x.as_strided((cols,), (0,)).contiguous()
            return row, rows, cols, 0
        x, stride = x.contiguous(), cols
    return x, rows, cols, stride


def row_stride(x: Tensor) -> int | None:
    """The one stride that walks the rows of x, or None. x has elements and at least one dimension."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return None
    step, span = None, 1  # dimensions of size 1 say nothing
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != step * span:
            return None
        span *= size
    return x.shape[-1] if step is None else step


def packed_row_bytes(cols: int, bits: int = 1) -> int:
    """Bytes of one packed row (docs/format.md section 1): rows are padded to a multiple of 4 bytes."""
    return (cols * bits + 31) // 32 * 4


def packed_shape(x: Tensor, bits: int = 1) -> tuple[int, ...]:
    """Shape of the packed form of x, [..., row bytes]; a scalar is one row of one element."""
    shape = x.shape
    return (*shape[:-1], packed_row_bytes(shape[-1] if shape else 1, bits))


def new_like(x: Tensor) -> Tensor:
    """An output: contiguous and empty, with the shape, dtype and device of x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def dense(x: Tensor | None) -> Tensor | None:
    """A vector with adjacent elements, for arguments that have no stride in the core."""
    return None if x is None else x.contiguous()


def address(x: Tensor | None) -> int:
    """Where the elements of x begin; 0 is the core's word for no tensor."""
    return 0 if x is None else x.data_ptr()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and of the gradients of weights: float32, or float64 beside float64 tensors."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- place --------------------------------------------------------------------------------------------------------------


def place(x: Tensor) -> tuple[int, int, int]:
    """(device, stream, threads) in the core's terms, for work on x: device -1 is the CPU, stream a CUDA stream's handle."""
    if x.is_cuda:
        return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream, 0
    return -1, 0, torch.get_num_threads()
