"""The ops `torch.ops.unswag.*`: schema, kernel and fake kernel of each; no autograd here.

Each op is two functions. `_<op>_outputs` checks the arguments and makes the empty outputs: it is the shape rule, so it is the
fake kernel too. `_<op>` fills them with the C++ core, which gets addresses and strides as integers.

Layout. An input is read where it lies if one row stride describes it: any view whose last dimension is contiguous and whose
leading dimensions collapse, a constant row expanded (row stride 0) included. Otherwise a contiguous copy of that input is
made first. Outputs are always contiguous. Inputs are never written to, `cross_entropy_`'s logits apart.

Place. One function serves the CPU and CUDA. All tensors of a call are on one device; there the work is queued in the stream
that is current in torch, as PyTorch's own ops are, and nothing waits for it.

An op has no derivative: a backward registered here would cost three times what the `autograd.Function`s of
`unswag.torch.functional` cost. Called on a tensor that autograd is following, an op would silently cut the graph, so it raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unswag import _core

_DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
DTYPES: dict[torch.dtype, int] = {_DTYPE_NAMES[name]: code for code, name in enumerate(_core.dtypes)}
MASKS: dict[str, int] = {name: code for code, name in enumerate(_core.masks)}
ACTIVATIONS: dict[str, int] = {name: code for code, name in enumerate(_core.activations)}
BLOCKS: dict[str, int] = {name: code for code, name in enumerate(_core.blocks)}
DITHERED: dict[str, int] = {name: ACTIVATIONS[name] for name in ("silu", "gelu", "gelu_tanh")}

# torch's integers are signed, a seed is not.
_64_BITS = 0xFFFF_FFFF_FFFF_FFFF

# ---- checks -------------------------------------------------------------------------------------------------------------


def _dtype(op: str, name: str, x: Tensor) -> int:
    code = DTYPES.get(x.dtype)
    if code is None:
        raise TypeError(
            f"{op}: {name} has dtype {x.dtype}; supported are {', '.join(_core.dtypes)}: "
            f"convert it, e.g. {name}.to(torch.float32)"
        )
    return code


def _beside(op: str, name: str, x: Tensor | None, like_name: str, like: Tensor) -> None:
    """`x` is on the device of `like`: a kernel gets addresses, which are good on one device only."""
    if x is not None and x.device != like.device:
        raise ValueError(
            f"{op}: {name} is on device '{x.device}' but {like_name} on '{like.device}'; pass {name}.to('{like.device}')"
        )


def _same(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """`x` has the shape and the dtype of `like`, and is beside it."""
    _beside(op, name, x, like_name, like)
    if x.dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} has dtype {x.dtype} but {like_name} has {like.dtype}; convert one, e.g. {name}.to({like.dtype})"
        )
    if x.shape != like.shape:
        raise ValueError(
            f"{op}: {name} has shape {list(x.shape)} but {like_name} has {list(like.shape)}; "
            "they must be equal, nothing is broadcast"
        )


def _code(op: str, act: str, names: dict[str, int]) -> int:
    code = names.get(act)
    if code is None:
        raise ValueError(f"{op}: there is no activation {act!r}; choose from {', '.join(names)}")
    return code


def _vector(op: str, name: str, x: Tensor | None, size: int, what: str) -> None:
    if x is not None and (x.dim() != 1 or x.shape[0] != size):
        raise ValueError(f"{op}: {name} has shape {list(x.shape)} but {what} is {size}; pass a {name} of shape [{size}]")


def _no_graph(op: str, *inputs: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for x in inputs:
        if x is not None and x.requires_grad:
            raise RuntimeError(
                f"torch.ops.unswag.{op} has no derivative, and an input requires grad; call unswag.torch.functional, "
                "or call the op under torch.no_grad()"
            )


# ---- layout -------------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> tuple[Tensor, int, int, int]:
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
    stride = _row_stride(x)
    if stride is None:
        if not any(x.stride()):  # one value expanded, as sum() and mean() give: one row of it, read again and again
            row = x.as_strided((cols,), (0,)).contiguous()
            return row, rows, cols, 0
        x, stride = x.contiguous(), cols
    return x, rows, cols, stride


def _row_stride(x: Tensor) -> int | None:
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


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dense(x: Tensor | None) -> Tensor | None:
    """A vector whose elements are adjacent, for arguments that have no stride in the core."""
    return None if x is None else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Statistics and weight gradients are float, or double beside double tensors."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- place ----------------------------------------------------------------------------------------------------------------


def _where(x: Tensor) -> tuple[int, int, int]:
    """(device, stream, threads) as the core wants them, for work on x."""
    if x.is_cuda:
        return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream, 0
    return -1, 0, torch.get_num_threads()


# ---- one-bit masks --------------------------------------------------------------------------------------------------------


def packed_row_bytes(cols: int, bits: int = 1) -> int:
    """Bytes of one packed row (docs/format.md section 1): rows are padded to a multiple of 4."""
    return (cols * bits + 31) // 32 * 4


def _packed_shape(x: Tensor) -> tuple[int, ...]:
    return (*x.shape[:-1], packed_row_bytes(x.shape[-1] if x.dim() else 1))


def _mask_forward_outputs(x: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
    _dtype(act, "x", x)
    return _empty(x), x.new_empty(_packed_shape(x), dtype=torch.uint8)


def _mask_forward(x: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
    _no_graph("mask_forward", x)
    code = _code("mask_forward", act, MASKS)
    y, packed = _mask_forward_outputs(x, act, slope)
    x, rows, cols, stride = _rows(x)
    device, stream, threads = _where(x)
    _core.mask_forward(
        code, slope, DTYPES[x.dtype], rows, cols, x.data_ptr(), stride, y.data_ptr(), cols,
        packed.data_ptr(), packed.shape[-1], device, stream, threads,
    )  # fmt: skip
    return y, packed


def _mask_backward_outputs(dy: Tensor, packed: Tensor, act: str, slope: float) -> Tensor:
    _dtype(act, "dy", dy)
    _beside(act, "packed", packed, "dy", dy)
    if packed.dtype != torch.uint8 or packed.shape != _packed_shape(dy):
        raise ValueError(
            f"{act}: packed is {packed.dtype} of shape {list(packed.shape)} but dy of shape {list(dy.shape)} needs "
            f"torch.uint8 of shape {list(_packed_shape(dy))}; pass the mask of the same call of mask_forward"
        )
    return _empty(dy)


def _mask_backward(dy: Tensor, packed: Tensor, act: str, slope: float) -> Tensor:
    _no_graph("mask_backward", dy)
    code = _code("mask_backward", act, MASKS)
    dx = _mask_backward_outputs(dy, packed, act, slope)
    dy, rows, cols, stride = _rows(dy)
    packed, _, _, packed_stride = _rows(packed)
    device, stream, threads = _where(dy)
    _core.mask_backward(
        code, slope, DTYPES[dy.dtype], rows, cols, dy.data_ptr(), stride, packed.data_ptr(), packed_stride,
        dx.data_ptr(), cols, device, stream, threads,
    )  # fmt: skip
    return dx


# ---- signs: what a ReLU's backward needs to know of its output -------------------------------------------------------------


def _signs_encode_outputs(y: Tensor) -> Tensor:
    _dtype("signs_encode", "y", y)
    return y.new_empty(_packed_shape(y), dtype=torch.uint8)


def _signs_encode(y: Tensor) -> Tensor:
    """One bit per element, not (y <= 0): the mask of `mask_forward(y, "relu", 0.0)` alone."""
    _no_graph("signs_encode", y)
    packed = _signs_encode_outputs(y)
    y, rows, cols, stride = _rows(y)
    device, stream, threads = _where(y)
    _core.mask_forward(
        MASKS["relu"], 0.0, DTYPES[y.dtype], rows, cols, y.data_ptr(), stride, 0, cols,
        packed.data_ptr(), packed.shape[-1], device, stream, threads,
    )  # fmt: skip
    return packed


def _signs_decode_outputs(packed: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    signs = packed.new_empty(shape, dtype=dtype)
    _dtype("signs_decode", "the result", signs)
    if packed.dtype != torch.uint8 or packed.shape != _packed_shape(signs):
        raise ValueError(
            f"signs_decode: packed is {packed.dtype} of shape {list(packed.shape)} but a tensor of shape {list(signs.shape)} "
            f"needs torch.uint8 of shape {list(_packed_shape(signs))}; pass the shape that was encoded"
        )
    return signs


def _signs_decode(packed: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """1 where the bit is set, else 0: a stand-in for y in ReLU's backward, which asks for not (y <= 0) alone."""
    signs = _signs_decode_outputs(packed, shape, dtype)
    _, rows, cols, stride = _rows(signs)
    packed, _, _, packed_stride = _rows(packed)
    ones = signs.new_ones(cols)  # one row, read again and again
    device, stream, threads = _where(signs)
    _core.mask_backward(
        MASKS["relu"], 0.0, DTYPES[dtype], rows, cols, ones.data_ptr(), 0, packed.data_ptr(), packed_stride,
        signs.data_ptr(), stride, device, stream, threads,
    )  # fmt: skip
    return signs


# ---- smooth activations -----------------------------------------------------------------------------------------------------


def _activation_forward_outputs(x: Tensor, act: str) -> Tensor:
    _dtype(act, "x", x)
    return _empty(x)


def _activation_forward(x: Tensor, act: str) -> Tensor:
    _no_graph("activation_forward", x)
    code = _code("activation_forward", act, ACTIVATIONS)
    y = _activation_forward_outputs(x, act)
    x, rows, cols, stride = _rows(x)
    device, stream, threads = _where(x)
    _core.activation_forward(
        code, DTYPES[x.dtype], rows, cols, x.data_ptr(), stride, y.data_ptr(), cols, device, stream, threads
    )
    return y


def _activation_backward_outputs(x: Tensor, dy: Tensor, act: str) -> Tensor:
    _dtype(act, "x", x)
    _same(act, "dy", dy, "x", x)
    return _empty(x)


def _activation_backward(x: Tensor, dy: Tensor, act: str) -> Tensor:
    _no_graph("activation_backward", x, dy)
    code = _code("activation_backward", act, ACTIVATIONS)
    dx = _activation_backward_outputs(x, dy, act)
    x, rows, cols, x_stride = _rows(x)
    dy, _, _, dy_stride = _rows(dy)
    device, stream, threads = _where(x)
    _core.activation_backward(
        code, DTYPES[x.dtype], rows, cols, x.data_ptr(), x_stride, dy.data_ptr(), dy_stride, dx.data_ptr(), cols,
        device, stream, threads,
    )  # fmt: skip
    return dx


# ---- gated units ----------------------------------------------------------------------------------------------------------


def _gated_forward_outputs(gate: Tensor, up: Tensor, act: str) -> Tensor:
    _dtype("gated", "gate", gate)
    _same("gated", "up", up, "gate", gate)
    return _empty(gate)


def _gated_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    _no_graph("gated_forward", gate, up)
    code = _code("gated_forward", act, ACTIVATIONS)
    h = _gated_forward_outputs(gate, up, act)
    gate, rows, cols, gate_stride = _rows(gate)
    up, _, _, up_stride = _rows(up)
    device, stream, threads = _where(gate)
    _core.gated_forward(
        code, DTYPES[gate.dtype], rows, cols, gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, h.data_ptr(), cols,
        device, stream, threads,
    )  # fmt: skip
    return h


def _gated_backward_outputs(gate: Tensor, up: Tensor, dh: Tensor, act: str) -> tuple[Tensor, Tensor]:
    _dtype("gated", "gate", gate)
    _same("gated", "up", up, "gate", gate)
    _same("gated", "dh", dh, "gate", gate)
    return _empty(gate), _empty(gate)


def _gated_backward_product_outputs(gate: Tensor, up: Tensor, dh: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    return *_gated_backward_outputs(gate, up, dh, act), _empty(gate)


def _fill_gated_backward(gate: Tensor, up: Tensor, dh: Tensor, act: str, dgate: Tensor, dup: Tensor, h: Tensor | None) -> None:
    """`dgate` and `dup` are contiguous, or halves of a contiguous tensor."""
    code = _code("gated_backward", act, ACTIVATIONS)
    gate, rows, cols, gate_stride = _rows(gate)
    up, _, _, up_stride = _rows(up)
    dh, _, _, dh_stride = _rows(dh)
    device, stream, threads = _where(gate)
    _core.gated_backward(
        code, DTYPES[gate.dtype], rows, cols, gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, dh.data_ptr(), dh_stride,
        dgate.data_ptr(), _rows(dgate)[3], dup.data_ptr(), _rows(dup)[3], _address(h), cols, device, stream, threads,
    )  # fmt: skip


def _gated_backward(gate: Tensor, up: Tensor, dh: Tensor, act: str) -> tuple[Tensor, Tensor]:
    _no_graph("gated_backward", gate, up, dh)
    dgate, dup = _gated_backward_outputs(gate, up, dh, act)
    _fill_gated_backward(gate, up, dh, act, dgate, dup, None)
    return dgate, dup


def _gated_backward_product(gate: Tensor, up: Tensor, dh: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    _no_graph("gated_backward_product", gate, up, dh)
    dgate, dup, h = _gated_backward_product_outputs(gate, up, dh, act)
    _fill_gated_backward(gate, up, dh, act, dgate, dup, h)
    return dgate, dup, h


def _gated_halves_backward_outputs(gate_up: Tensor, dh: Tensor, act: str, gate_first: bool) -> Tensor:
    _dtype("gated_halves", "gate_up", gate_up)
    _same("gated_halves", "dh", dh, "gate", halves(gate_up, gate_first)[0])
    return _empty(gate_up)


def _gated_halves_backward(gate_up: Tensor, dh: Tensor, act: str, gate_first: bool) -> Tensor:
    _no_graph("gated_halves_backward", gate_up, dh)
    gradient = _gated_halves_backward_outputs(gate_up, dh, act, gate_first)
    _fill_gated_backward(*halves(gate_up, gate_first), dh, act, *halves(gradient, gate_first), None)
    return gradient


def halves(gate_up: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(gate, up): views of the two halves of the last dimension."""
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gated_halves: gate_up has shape {list(gate_up.shape)}; its last dimension must be even")
    first, second = gate_up.tensor_split(2, -1)
    return (first, second) if gate_first else (second, first)


# ---- RMSNorm --------------------------------------------------------------------------------------------------------------


def _rms_norm_check(x: Tensor, weight: Tensor | None) -> None:
    _dtype("rms_norm", "x", x)
    if x.dim() == 0:
        raise ValueError("rms_norm: x has no dimension to normalise over; pass x of shape [..., cols]")
    if weight is not None:
        _dtype("rms_norm", "weight", weight)
        _vector("rms_norm", "weight", weight, x.shape[-1], "the last dimension of x")
        _beside("rms_norm", "weight", weight, "x", x)


def _rms_norm_y(x: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    y = torch.empty_like(x, dtype=out_dtype or x.dtype, memory_format=torch.contiguous_format)
    _dtype("rms_norm", "out_dtype", y)
    return y


def _rms_norm_rstd_check(x: Tensor, rstd: Tensor) -> None:
    _beside("rms_norm", "rstd", rstd, "x", x)
    if rstd.dtype != _wide(x.dtype) or rstd.shape != x.shape[:-1]:
        raise ValueError(
            f"rms_norm: rstd is {rstd.dtype} of shape {list(rstd.shape)} but x of shape {list(x.shape)} needs "
            f"{_wide(x.dtype)} of shape {list(x.shape[:-1])}; pass what rms_norm_forward gave"
        )


def _rms_norm_forward_outputs(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_before_weight: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _rms_norm_check(x, weight)
    return _rms_norm_y(x, out_dtype), x.new_empty(x.shape[:-1], dtype=_wide(x.dtype))


def _fill_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_before_weight: bool,
    y: Tensor, rstd: Tensor, given: bool,
) -> None:  # fmt: skip
    x_dtype, y_dtype = DTYPES[x.dtype], DTYPES[y.dtype]
    x, rows, cols, stride = _rows(x)
    weight = _dense(weight)
    device, stream, threads = _where(x)
    _core.rms_norm_forward(
        eps, weight_offset, cast_before_weight, given, rows, cols, x_dtype, x.data_ptr(), stride,
        0 if weight is None else DTYPES[weight.dtype], _address(weight), y_dtype, y.data_ptr(), cols,
        rstd.data_ptr(), device, stream, threads,
    )  # fmt: skip


def _rms_norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_before_weight: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _no_graph("rms_norm_forward", x, weight)
    y, rstd = _rms_norm_forward_outputs(x, weight, eps, weight_offset, cast_before_weight, out_dtype)
    _fill_rms_norm(x, weight, eps, weight_offset, cast_before_weight, y, rstd, given=False)
    return y, rstd


def _rms_norm_apply_outputs(
    x: Tensor, rstd: Tensor, weight: Tensor | None, weight_offset: float, cast_before_weight: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    _rms_norm_check(x, weight)
    _rms_norm_rstd_check(x, rstd)
    return _rms_norm_y(x, out_dtype)


def _rms_norm_apply(
    x: Tensor, rstd: Tensor, weight: Tensor | None, weight_offset: float, cast_before_weight: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    _no_graph("rms_norm_apply", x, weight)
    y = _rms_norm_apply_outputs(x, rstd, weight, weight_offset, cast_before_weight, out_dtype)
    _fill_rms_norm(x, weight, 0.0, weight_offset, cast_before_weight, y, rstd.contiguous(), given=True)
    return y


def _rms_norm_backward_outputs(
    x: Tensor, rstd: Tensor, weight: Tensor | None, dy: Tensor, weight_offset: float, cast_before_weight: bool,
    need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _rms_norm_check(x, weight)
    _rms_norm_rstd_check(x, rstd)
    _dtype("rms_norm", "dy", dy)
    _beside("rms_norm", "dy", dy, "x", x)
    if dy.shape != x.shape:
        raise ValueError(f"rms_norm: dy has shape {list(dy.shape)} but x has {list(x.shape)}; they must be equal")
    return (
        _empty(x) if need_dx else x.new_empty(0),
        x.new_empty(x.shape[-1:] if need_dw else 0, dtype=_wide(x.dtype)),
    )


def _rms_norm_backward(
    x: Tensor, rstd: Tensor, weight: Tensor | None, dy: Tensor, weight_offset: float, cast_before_weight: bool,
    need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _no_graph("rms_norm_backward", x, weight, dy)
    dx, dw = _rms_norm_backward_outputs(x, rstd, weight, dy, weight_offset, cast_before_weight, need_dx, need_dw)
    x_dtype, dy_dtype = DTYPES[x.dtype], DTYPES[dy.dtype]
    x, rows, cols, x_stride = _rows(x)
    dy, _, _, dy_stride = _rows(dy)
    weight, rstd = _dense(weight), rstd.contiguous()
    device, stream, threads = _where(x)
    scratch = None
    if need_dw and device >= 0:
        scratch = x.new_empty(_core.rms_norm_backward_scratch(rows, cols), dtype=torch.uint8)
    _core.rms_norm_backward(
        weight_offset, cast_before_weight, rows, cols, x_dtype, x.data_ptr(), x_stride,
        0 if weight is None else DTYPES[weight.dtype], _address(weight), rstd.data_ptr(), dy_dtype, dy.data_ptr(), dy_stride,
        dx.data_ptr() if need_dx else 0, cols, dw.data_ptr() if need_dw else 0, _address(scratch), device, stream, threads,
    )  # fmt: skip
    return dx, dw


# ---- LayerNorm ------------------------------------------------------------------------------------------------------------


def _layer_norm_check(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    _dtype("layer_norm", "x", x)
    if x.dim() == 0:
        raise ValueError("layer_norm: x has no dimension to normalise over; pass x of shape [..., cols]")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            _dtype("layer_norm", name, vector)
            _vector("layer_norm", name, vector, x.shape[-1], "the last dimension of x")
            _beside("layer_norm", name, vector, "x", x)


def _layer_norm_y(x: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    y = torch.empty_like(x, dtype=out_dtype or x.dtype, memory_format=torch.contiguous_format)
    _dtype("layer_norm", "out_dtype", y)
    return y


def _layer_norm_statistics_check(x: Tensor, mean: Tensor, rstd: Tensor) -> None:
    for name, vector in (("mean", mean), ("rstd", rstd)):
        _beside("layer_norm", name, vector, "x", x)
        if vector.dtype != _wide(x.dtype) or vector.shape != x.shape[:-1]:
            raise ValueError(
                f"layer_norm: {name} is {vector.dtype} of shape {list(vector.shape)} but x of shape {list(x.shape)} needs "
                f"{_wide(x.dtype)} of shape {list(x.shape[:-1])}; pass what layer_norm_forward gave"
            )


def _layer_norm_forward_outputs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    _layer_norm_check(x, weight, bias)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=_wide(x.dtype)) for _ in range(2))
    return _layer_norm_y(x, out_dtype), mean, rstd


def _fill_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, y: Tensor, mean: Tensor, rstd: Tensor, given: bool
) -> None:
    x_dtype, y_dtype = DTYPES[x.dtype], DTYPES[y.dtype]
    x, rows, cols, stride = _rows(x)
    weight, bias = _dense(weight), _dense(bias)
    device, stream, threads = _where(x)
    _core.layer_norm_forward(
        eps, given, rows, cols, x_dtype, x.data_ptr(), stride, 0 if weight is None else DTYPES[weight.dtype], _address(weight),
        0 if bias is None else DTYPES[bias.dtype], _address(bias), y_dtype, y.data_ptr(), cols, mean.data_ptr(),
        rstd.data_ptr(), device, stream, threads,
    )  # fmt: skip


def _layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    _no_graph("layer_norm_forward", x, weight, bias)
    y, mean, rstd = _layer_norm_forward_outputs(x, weight, bias, eps, out_dtype)
    _fill_layer_norm(x, weight, bias, eps, y, mean, rstd, given=False)
    return y, mean, rstd


def _layer_norm_apply_outputs(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    _layer_norm_check(x, weight, bias)
    _layer_norm_statistics_check(x, mean, rstd)
    return _layer_norm_y(x, out_dtype)


def _layer_norm_apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    _no_graph("layer_norm_apply", x, weight, bias)
    y = _layer_norm_apply_outputs(x, mean, rstd, weight, bias, out_dtype)
    _fill_layer_norm(x, weight, bias, 0.0, y, mean.contiguous(), rstd.contiguous(), given=True)
    return y


def _layer_norm_backward_outputs(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, dy: Tensor, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _layer_norm_check(x, weight, None)
    _layer_norm_statistics_check(x, mean, rstd)
    _dtype("layer_norm", "dy", dy)
    _beside("layer_norm", "dy", dy, "x", x)
    if dy.shape != x.shape:
        raise ValueError(f"layer_norm: dy has shape {list(dy.shape)} but x has {list(x.shape)}; they must be equal")
    dw, db = (x.new_empty(x.shape[-1:] if need else 0, dtype=_wide(x.dtype)) for need in (need_dw, need_db))
    return _empty(x) if need_dx else x.new_empty(0), dw, db


def _layer_norm_backward(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, dy: Tensor, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _no_graph("layer_norm_backward", x, weight, dy)
    dx, dw, db = _layer_norm_backward_outputs(x, mean, rstd, weight, dy, need_dx, need_dw, need_db)
    x_dtype, dy_dtype = DTYPES[x.dtype], DTYPES[dy.dtype]
    x, rows, cols, x_stride = _rows(x)
    dy, _, _, dy_stride = _rows(dy)
    weight, mean, rstd = _dense(weight), mean.contiguous(), rstd.contiguous()
    device, stream, threads = _where(x)
    scratch = None
    if (need_dw or need_db) and device >= 0:
        scratch = x.new_empty(_core.layer_norm_backward_scratch(rows, cols), dtype=torch.uint8)
    _core.layer_norm_backward(
        rows, cols, x_dtype, x.data_ptr(), x_stride, 0 if weight is None else DTYPES[weight.dtype], _address(weight),
        mean.data_ptr(), rstd.data_ptr(), dy_dtype, dy.data_ptr(), dy_stride, dx.data_ptr() if need_dx else 0, cols,
        dw.data_ptr() if need_dw else 0, db.data_ptr() if need_db else 0, _address(scratch), device, stream, threads,
    )  # fmt: skip
    return dx, dw, db


# ---- cross-entropy --------------------------------------------------------------------------------------------------------


def _cross_entropy_outputs(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, row_scale: Tensor | None, gradient_scale: float,
    ignore_index: int, label_smoothing: float, softcap: float, logit_scale: float, write_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "cross_entropy_"
    _dtype(op, "logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"{op}: logits have shape {list(logits.shape)}; pass [rows, classes], e.g. logits.flatten(0, -2)")
    if labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels have dtype {labels.dtype}; pass labels.to(torch.int64)")
    rows, classes = logits.shape
    wide = _wide(logits.dtype)
    _vector(op, "labels", labels, rows, "the number of rows of logits")
    _vector(op, "class_weight", class_weight, classes, "the number of classes")
    _vector(op, "row_scale", row_scale, rows, "the number of rows of logits")
    _beside(op, "labels", labels, "logits", logits)
    for name, vector in (("class_weight", class_weight), ("row_scale", row_scale)):
        _beside(op, name, vector, "logits", logits)
        if vector is not None and vector.dtype != wide:
            raise TypeError(f"{op}: {name} has dtype {vector.dtype}; pass {name}.to({wide})")
    return logits.new_empty(rows, dtype=wide), logits.new_empty(rows, dtype=wide)


def _cross_entropy(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, row_scale: Tensor | None, gradient_scale: float,
    ignore_index: int, label_smoothing: float, softcap: float, logit_scale: float, write_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """On the CPU a label out of range is a ValueError and nothing is written. On CUDA it cannot be seen without waiting for the
    device: loss, lse and gradient of its row are NaN. `loss.check_labels` waits and looks."""
    _no_graph("cross_entropy_", logits, class_weight)
    loss, lse = _cross_entropy_outputs(
        logits, labels, class_weight, row_scale, gradient_scale, ignore_index, label_smoothing, softcap, logit_scale,
        write_gradient,
    )  # fmt: skip
    here, rows, cols, stride = _rows(logits)
    if here is not logits:
        raise ValueError(
            f"cross_entropy_: logits with strides {list(logits.stride())} cannot be written in place; pass logits.contiguous()"
        )
    labels, class_weight, row_scale = labels.contiguous(), _dense(class_weight), _dense(row_scale)
    device, stream, threads = _where(logits)
    _core.cross_entropy(
        DTYPES[logits.dtype], rows, cols, logits.data_ptr(), stride, labels.data_ptr(), _address(class_weight),
        _address(row_scale), gradient_scale, ignore_index, label_smoothing, softcap, logit_scale, write_gradient,
        loss.data_ptr(), lse.data_ptr(), device, stream, threads,
    )  # fmt: skip
    return loss, lse


# ---- block codecs -----------------------------------------------------------------------------------------------------------


def _block_shape(op: str, x: Tensor, codec: str) -> tuple[int, ...]:
    code = BLOCKS.get(codec)
    if code is None:
        raise ValueError(f"{op}: there is no block codec {codec!r}; choose from {', '.join(BLOCKS)}")
    return (*x.shape[:-1], _core.block_row_bytes(code, x.shape[-1] if x.dim() else 1))


def _block_encode_outputs(x: Tensor, codec: str, stochastic: bool, seed: int, offset: int) -> Tensor:
    _dtype("block_encode", "x", x)
    return x.new_empty(_block_shape("block_encode", x, codec), dtype=torch.uint8)


def _block_encode(x: Tensor, codec: str, stochastic: bool, seed: int, offset: int) -> Tensor:
    _no_graph("block_encode", x)
    packed = _block_encode_outputs(x, codec, stochastic, seed, offset)
    x, rows, cols, stride = _rows(x)
    device, stream, threads = _where(x)
    _core.block_encode(
        BLOCKS[codec], stochastic, seed & _64_BITS, offset & _64_BITS, DTYPES[x.dtype], rows, cols, x.data_ptr(), stride,
        packed.data_ptr(), packed.shape[-1], device, stream, threads,
    )  # fmt: skip
    return packed


def _block_decode_outputs(packed: Tensor, codec: str, cols: int, dtype: torch.dtype) -> Tensor:
    op = "block_decode"
    x = torch.empty((*packed.shape[:-1], cols), dtype=dtype, device=packed.device)
    _dtype(op, "dtype", x)
    if packed.dtype != torch.uint8 or packed.shape != _block_shape(op, x, codec):
        raise ValueError(
            f"{op}: packed is {packed.dtype} of shape {list(packed.shape)} but {cols} columns in {codec} need torch.uint8 of "
            f"shape {list(_block_shape(op, x, codec))}; pass what block_encode gave, and its columns"
        )
    return x


def _block_decode(packed: Tensor, codec: str, cols: int, dtype: torch.dtype) -> Tensor:
    x = _block_decode_outputs(packed, codec, cols, dtype)
    packed, rows, _, packed_stride = _rows(packed)
    device, stream, threads = _where(packed)
    _core.block_decode(
        BLOCKS[codec], DTYPES[dtype], rows, cols, packed.data_ptr(), packed_stride, x.data_ptr(), cols, device, stream, threads
    )
    return x


# ---- dropout --------------------------------------------------------------------------------------------------------------


def _dropout_outputs(x: Tensor, p: float, seed: int, offset: int) -> Tensor:
    _dtype("dropout", "x", x)
    return _empty(x)


def _dropout(x: Tensor, p: float, seed: int, offset: int) -> Tensor:
    _no_graph("dropout", x)
    y = _dropout_outputs(x, p, seed, offset)
    x, rows, cols, stride = _rows(x)
    device, stream, threads = _where(x)
    _core.dropout(
        p, seed & _64_BITS, offset & _64_BITS, DTYPES[x.dtype], rows, cols, x.data_ptr(), stride, y.data_ptr(), cols,
        device, stream, threads,
    )  # fmt: skip
    return y


# ---- step codes and dither ------------------------------------------------------------------------------------------------


def _packed_code_shape(op: str, x: Tensor, bits: int) -> tuple[int, ...]:
    if not 1 <= bits <= 4:
        raise ValueError(f"{op}: bits is {bits}; pass a number from 1 to 4")
    return (*x.shape[:-1], packed_row_bytes(x.shape[-1] if x.dim() else 1, bits))


def _coded_forward_outputs(op: str, x: Tensor, bits: int, need_y: bool) -> tuple[Tensor, Tensor]:
    _dtype(op, "x", x)
    packed = x.new_empty(_packed_code_shape(op, x, bits), dtype=torch.uint8)
    return _empty(x) if need_y else x.new_empty(0), packed


def _coded_backward_outputs(op: str, dy: Tensor, packed: Tensor, bits: int) -> Tensor:
    _dtype(op, "dy", dy)
    _beside(op, "packed", packed, "dy", dy)
    shape = _packed_code_shape(op, dy, bits)
    if packed.dtype != torch.uint8 or packed.shape != shape:
        raise ValueError(
            f"{op}: packed is {packed.dtype} of shape {list(packed.shape)} but dy of shape {list(dy.shape)} and {bits} bits "
            f"need torch.uint8 of shape {list(shape)}; pass the codes of the forward, with its bits"
        )
    return _empty(dy)


def _code_forward_outputs(
    x: Tensor, act: str, bounds: list[float], bits: int, of_derivative: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    return _coded_forward_outputs("code_forward", x, bits, need_y)


def _code_forward(
    x: Tensor, act: str, bounds: list[float], bits: int, of_derivative: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    _no_graph("code_forward", x)
    code = _code("code_forward", act, ACTIVATIONS)
    y, packed = _code_forward_outputs(x, act, bounds, bits, of_derivative, need_y)
    x, rows, cols, stride = _rows(x)
    device, stream, threads = _where(x)
    _core.code_forward(
        code, of_derivative, bits, bounds, DTYPES[x.dtype], rows, cols, x.data_ptr(), stride, y.data_ptr() if need_y else 0,
        cols, packed.data_ptr(), packed.shape[-1], device, stream, threads,
    )  # fmt: skip
    return y, packed


def _code_backward_outputs(dy: Tensor, packed: Tensor, levels: list[float], bits: int) -> Tensor:
    return _coded_backward_outputs("code_backward", dy, packed, bits)


def _code_backward(dy: Tensor, packed: Tensor, levels: list[float], bits: int) -> Tensor:
    _no_graph("code_backward", dy)
    dx = _code_backward_outputs(dy, packed, levels, bits)
    dy, rows, cols, stride = _rows(dy)
    packed, _, _, packed_stride = _rows(packed)
    device, stream, threads = _where(dy)
    _core.code_backward(
        bits, levels, DTYPES[dy.dtype], rows, cols, dy.data_ptr(), stride, packed.data_ptr(), packed_stride,
        dx.data_ptr(), cols, device, stream, threads,
    )  # fmt: skip
    return dx


def _dither_forward_outputs(x: Tensor, act: str, bits: int, seed: int, offset: int, need_y: bool) -> tuple[Tensor, Tensor]:
    return _coded_forward_outputs("dither_forward", x, bits, need_y)


def _dither_forward(x: Tensor, act: str, bits: int, seed: int, offset: int, need_y: bool) -> tuple[Tensor, Tensor]:
    _no_graph("dither_forward", x)
    code = _code("dither_forward", act, DITHERED)
    y, packed = _dither_forward_outputs(x, act, bits, seed, offset, need_y)
    x, rows, cols, stride = _rows(x)
    device, stream, threads = _where(x)
    _core.dither_forward(
        code, bits, seed & _64_BITS, offset & _64_BITS, DTYPES[x.dtype], rows, cols, x.data_ptr(), stride,
        y.data_ptr() if need_y else 0, cols, packed.data_ptr(), packed.shape[-1], device, stream, threads,
    )  # fmt: skip
    return y, packed


def _dither_backward_outputs(dy: Tensor, packed: Tensor, act: str, bits: int, seed: int, offset: int) -> Tensor:
    return _coded_backward_outputs("dither_backward", dy, packed, bits)


def _dither_backward(dy: Tensor, packed: Tensor, act: str, bits: int, seed: int, offset: int) -> Tensor:
    _no_graph("dither_backward", dy)
    code = _code("dither_backward", act, DITHERED)
    dx = _dither_backward_outputs(dy, packed, act, bits, seed, offset)
    dy, rows, cols, stride = _rows(dy)
    packed, _, _, packed_stride = _rows(packed)
    device, stream, threads = _where(dy)
    _core.dither_backward(
        code, bits, seed & _64_BITS, offset & _64_BITS, DTYPES[dy.dtype], rows, cols, dy.data_ptr(), stride,
        packed.data_ptr(), packed_stride, dx.data_ptr(), cols, device, stream, threads,
    )  # fmt: skip
    return dx


# ---- non-zeros, lossless ----------------------------------------------------------------------------------------------------


def _nonzero_encode_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _dtype("nonzero_encode", "x", x)
    size = torch.library.get_ctx().new_dynamic_size()
    bitmap = x.new_empty(_packed_shape(x), dtype=torch.uint8)
    return bitmap, x.new_empty(math.prod(x.shape[:-1]) + 1, dtype=torch.int64), x.new_empty(size)


def _nonzero_encode(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """bitmap [..., row bytes], offsets [rows + 1] and values [offsets[rows]] of docs/format.md section 8. How many values there
    are is known when they have been counted: on CUDA this waits for the device."""
    _no_graph("nonzero_encode", x)
    code = _dtype("nonzero_encode", "x", x)
    bitmap = x.new_empty(_packed_shape(x), dtype=torch.uint8)
    x, rows, cols, stride = _rows(x)
    counts = x.new_empty(rows, dtype=torch.int64)
    device, stream, threads = _where(x)
    _core.nonzero_count(code, rows, cols, x.data_ptr(), stride, counts.data_ptr(), device, stream, threads)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    values = x.new_empty(int(offsets[-1]))
    _core.nonzero_encode(
        code, rows, cols, x.data_ptr(), stride, offsets.data_ptr(), bitmap.data_ptr(), bitmap.shape[-1], values.data_ptr(),
        values.numel(), device, stream, threads,
    )  # fmt: skip
    return bitmap, offsets, values


def _nonzero_decode_outputs(bitmap: Tensor, offsets: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    op = "nonzero_decode"
    _dtype(op, "values", values)
    _beside(op, "offsets", offsets, "bitmap", bitmap)
    _beside(op, "values", values, "bitmap", bitmap)
    x = values.new_empty(shape)
    if bitmap.dtype != torch.uint8 or bitmap.shape != _packed_shape(x):
        raise ValueError(
            f"{op}: bitmap is {bitmap.dtype} of shape {list(bitmap.shape)} but a tensor of shape {list(x.shape)} needs "
            f"torch.uint8 of shape {list(_packed_shape(x))}; pass the shape that was encoded"
        )
    _vector(op, "values", values, values.numel(), "their number")
    if offsets.dtype != torch.int64:
        raise TypeError(f"{op}: offsets have dtype {offsets.dtype}; pass those of nonzero_encode, torch.int64")
    _vector(op, "offsets", offsets, math.prod(x.shape[:-1]) + 1, "the number of rows and one more")
    return x


def _nonzero_decode(bitmap: Tensor, offsets: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    _no_graph("nonzero_decode", values)
    x = _nonzero_decode_outputs(bitmap, offsets, values, shape)
    _, rows, cols, stride = _rows(x)
    bitmap, _, _, bitmap_stride = _rows(bitmap)
    offsets, values = offsets.contiguous(), values.contiguous()
    device, stream, threads = _where(x)
    _core.nonzero_decode(
        DTYPES[x.dtype], rows, cols, bitmap.data_ptr(), bitmap_stride, offsets.data_ptr(), values.data_ptr(), values.numel(),
        x.data_ptr(), stride, device, stream, threads,
    )  # fmt: skip
    return x


# ---- registration ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("unswag", "DEF")


def _register(schema: str, kernel: Callable[..., Any], outputs: Callable[..., Any]) -> torch._ops.OpOverload:
    name = schema.partition("(")[0]
    _library.define(schema)
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    torch.library.register_fake(f"unswag::{name}", outputs, lib=_library)
    op: torch._ops.OpOverload = getattr(torch.ops.unswag, name).default
    return op


mask_forward = _register(
    "mask_forward(Tensor x, str act, float slope) -> (Tensor y, Tensor packed)", _mask_forward, _mask_forward_outputs
)
mask_backward = _register(
    "mask_backward(Tensor dy, Tensor packed, str act, float slope) -> Tensor", _mask_backward, _mask_backward_outputs
)
signs_encode = _register("signs_encode(Tensor y) -> Tensor", _signs_encode, _signs_encode_outputs)
signs_decode = _register(
    "signs_decode(Tensor packed, SymInt[] shape, ScalarType dtype) -> Tensor", _signs_decode, _signs_decode_outputs
)
activation_forward = _register(
    "activation_forward(Tensor x, str act) -> Tensor", _activation_forward, _activation_forward_outputs
)
activation_backward = _register(
    "activation_backward(Tensor x, Tensor dy, str act) -> Tensor", _activation_backward, _activation_backward_outputs
)
gated_forward = _register("gated_forward(Tensor gate, Tensor up, str act) -> Tensor", _gated_forward, _gated_forward_outputs)
gated_backward = _register(
    "gated_backward(Tensor gate, Tensor up, Tensor dh, str act) -> (Tensor dgate, Tensor dup)",
    _gated_backward,
    _gated_backward_outputs,
)
gated_backward_product = _register(
    "gated_backward_product(Tensor gate, Tensor up, Tensor dh, str act) -> (Tensor dgate, Tensor dup, Tensor h)",
    _gated_backward_product,
    _gated_backward_product_outputs,
)
gated_halves_backward = _register(
    "gated_halves_backward(Tensor gate_up, Tensor dh, str act, bool gate_first) -> Tensor",
    _gated_halves_backward,
    _gated_halves_backward_outputs,
)
rms_norm_forward = _register(
    "rms_norm_forward(Tensor x, Tensor? weight, float eps, float weight_offset, bool cast_before_weight, ScalarType? out_dtype)"
    " -> (Tensor y, Tensor rstd)",
    _rms_norm_forward,
    _rms_norm_forward_outputs,
)
rms_norm_apply = _register(
    "rms_norm_apply(Tensor x, Tensor rstd, Tensor? weight, float weight_offset, bool cast_before_weight, ScalarType? out_dtype)"
    " -> Tensor",
    _rms_norm_apply,
    _rms_norm_apply_outputs,
)
rms_norm_backward = _register(
    "rms_norm_backward(Tensor x, Tensor rstd, Tensor? weight, Tensor dy, float weight_offset, bool cast_before_weight,"
    " bool need_dx, bool need_dw) -> (Tensor dx, Tensor dw)",
    _rms_norm_backward,
    _rms_norm_backward_outputs,
)
layer_norm_forward = _register(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType? out_dtype)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _layer_norm_forward,
    _layer_norm_forward_outputs,
)
layer_norm_apply = _register(
    "layer_norm_apply(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, ScalarType? out_dtype) -> Tensor",
    _layer_norm_apply,
    _layer_norm_apply_outputs,
)
layer_norm_backward = _register(
    "layer_norm_backward(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor dy, bool need_dx, bool need_dw,"
    " bool need_db) -> (Tensor dx, Tensor dw, Tensor db)",
    _layer_norm_backward,
    _layer_norm_backward_outputs,
)
cross_entropy_ = _register(
    "cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor? class_weight, Tensor? row_scale, float gradient_scale,"
    " int ignore_index, float label_smoothing, float softcap, float logit_scale, bool write_gradient)"
    " -> (Tensor loss, Tensor lse)",
    _cross_entropy,
    _cross_entropy_outputs,
)
block_encode = _register(
    "block_encode(Tensor x, str codec, bool stochastic, int seed, int offset) -> Tensor", _block_encode, _block_encode_outputs
)
block_decode = _register(
    "block_decode(Tensor packed, str codec, int cols, ScalarType dtype) -> Tensor", _block_decode, _block_decode_outputs
)
dropout = _register("dropout(Tensor x, float p, int seed, int offset) -> Tensor", _dropout, _dropout_outputs)
code_forward = _register(
    "code_forward(Tensor x, str act, float[] bounds, int bits, bool of_derivative, bool need_y) -> (Tensor y, Tensor packed)",
    _code_forward,
    _code_forward_outputs,
)
code_backward = _register(
    "code_backward(Tensor dy, Tensor packed, float[] levels, int bits) -> Tensor", _code_backward, _code_backward_outputs
)
dither_forward = _register(
    "dither_forward(Tensor x, str act, int bits, int seed, int offset, bool need_y) -> (Tensor y, Tensor packed)",
    _dither_forward,
    _dither_forward_outputs,
)
dither_backward = _register(
    "dither_backward(Tensor dy, Tensor packed, str act, int bits, int seed, int offset) -> Tensor",
    _dither_backward,
    _dither_backward_outputs,
)
nonzero_encode = _register(
    "nonzero_encode(Tensor x) -> (Tensor bitmap, Tensor offsets, Tensor values)", _nonzero_encode, _nonzero_encode_outputs
)
nonzero_decode = _register(
    "nonzero_decode(Tensor bitmap, Tensor offsets, Tensor values, SymInt[] shape) -> Tensor",
    _nonzero_decode,
    _nonzero_decode_outputs,
)


# ---- vmap of the elementwise ops: the mapped dimension becomes one more leading dimension ---------------------------------


def _leading(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _mask_forward_vmap(info: Any, dims: Any, x: Tensor, act: str, slope: float) -> tuple[Any, Any]:
    x = _leading(x, dims[0], info.batch_size)
    if x.dim() == 1:  # each example is one value with a packed row of its own
        y, packed = mask_forward(x.unsqueeze(-1), act, slope)
        return (y.squeeze(-1), packed), (0, 0)
    return mask_forward(x, act, slope), (0, 0)


def _mask_backward_vmap(info: Any, dims: Any, dy: Tensor, packed: Tensor, act: str, slope: float) -> tuple[Tensor, int]:
    dy, packed = _leading(dy, dims[0], info.batch_size), _leading(packed, dims[1], info.batch_size)
    if dy.dim() == 1:
        return mask_backward(dy.unsqueeze(-1), packed, act, slope).squeeze(-1), 0
    return mask_backward(dy, packed, act, slope), 0


def _elementwise_vmap(op: torch._ops.OpOverload, inputs: int) -> Callable[..., Any]:
    def rule(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
        tensors = [_leading(x, dim, info.batch_size) for x, dim in zip(args[:inputs], dims[:inputs], strict=True)]
        out = op(*tensors, *args[inputs:])
        return out, tuple(0 for _ in out) if isinstance(out, tuple) else 0

    return rule


torch.library.register_vmap("unswag::mask_forward", _mask_forward_vmap, lib=_library)
torch.library.register_vmap("unswag::mask_backward", _mask_backward_vmap, lib=_library)
for _op, _inputs in ((activation_forward, 1), (activation_backward, 2), (gated_forward, 2), (gated_backward, 3)):
    torch.library.register_vmap(_op._name, _elementwise_vmap(_op, _inputs), lib=_library)
