"""Smooth activations, alone and gated, computed exactly from x (docs/math.md)."""

from __future__ import annotations

from torch import Tensor

from unswag import _core
from unswag.torch.ops.register import op, vmap_elementwise
from unswag.torch.ops.tensors import (
    ACTIVATIONS,
    DTYPES,
    address,
    as_rows,
    check_dtype,
    check_no_graph,
    check_same,
    code_of,
    new_like,
    place,
)


def _forward_outputs(x: Tensor, act: str) -> Tensor:
    check_dtype(act, "x", x)
    return new_like(x)


@op("(Tensor x, str act) -> Tensor", _forward_outputs)
def activation_forward(x: Tensor, act: str) -> Tensor:
    """act(x), one of ACTIVATIONS: shape and dtype of x, rounded once. Nothing is packed; the backward reads x."""
    check_no_graph("activation_forward", x)
    code = code_of("activation_forward", act, ACTIVATIONS)
    y = _forward_outputs(x, act)
    x, rows, cols, stride = as_rows(x)
    device, stream, threads = place(x)
    _core.activation_forward(
        code, DTYPES[x.dtype], rows, cols, x.data_ptr(), stride, y.data_ptr(), cols, device, stream, threads
    )
    return y


def _backward_outputs(x: Tensor, dy: Tensor, act: str) -> Tensor:
    check_dtype(act, "x", x)
    check_same(act, "dy", dy, "x", x)
    return new_like(x)


@op("(Tensor x, Tensor dy, str act) -> Tensor", _backward_outputs)
def activation_backward(x: Tensor, dy: Tensor, act: str) -> Tensor:
    """dx = dy act'(x). x and dy have the same shape and dtype, and so has the result."""
    check_no_graph("activation_backward", x, dy)
    code = code_of("activation_backward", act, ACTIVATIONS)
    dx = _backward_outputs(x, dy, act)
    x, rows, cols, x_stride = as_rows(x)
    dy, _, _, dy_stride = as_rows(dy)
    device, stream, threads = place(x)
    _core.activation_backward(
        code, DTYPES[x.dtype], rows, cols, x.data_ptr(), x_stride, dy.data_ptr(), dy_stride, dx.data_ptr(), cols,
        device, stream, threads,
    )  # fmt: skip
    return dx


# ---- gated units ----------------------------------------------------------------------------------------------------------


def _gated_forward_outputs(gate: Tensor, up: Tensor, act: str) -> Tensor:
    check_dtype("gated", "gate", gate)
    check_same("gated", "up", up, "gate", gate)
    return new_like(gate)


@op("(Tensor gate, Tensor up, str act) -> Tensor", _gated_forward_outputs)
def gated_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """h = act(gate) up, rounded once. gate and up have the same shape and dtype, and so has h."""
    check_no_graph("gated_forward", gate, up)
    code = code_of("gated_forward", act, ACTIVATIONS)
    h = _gated_forward_outputs(gate, up, act)
    gate, rows, cols, gate_stride = as_rows(gate)
    up, _, _, up_stride = as_rows(up)
    device, stream, threads = place(gate)
    _core.gated_forward(
        code, DTYPES[gate.dtype], rows, cols, gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, h.data_ptr(), cols,
        device, stream, threads,
    )  # fmt: skip
    return h


def _fill_gated_backward(gate: Tensor, up: Tensor, dh: Tensor, act: str, dgate: Tensor, dup: Tensor, h: Tensor | None) -> None:
    """`dgate` and `dup` are contiguous, or halves of a contiguous tensor."""
    code = code_of("gated_backward", act, ACTIVATIONS)
    gate, rows, cols, gate_stride = as_rows(gate)
    up, _, _, up_stride = as_rows(up)
    dh, _, _, dh_stride = as_rows(dh)
    device, stream, threads = place(gate)
    _core.gated_backward(
        code, DTYPES[gate.dtype], rows, cols, gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, dh.data_ptr(), dh_stride,
        dgate.data_ptr(), as_rows(dgate)[3], dup.data_ptr(), as_rows(dup)[3], address(h), cols, device, stream, threads,
    )  # fmt: skip


def _gated_backward_outputs(gate: Tensor, up: Tensor, dh: Tensor, act: str) -> tuple[Tensor, Tensor]:
    check_dtype("gated", "gate", gate)
    check_same("gated", "up", up, "gate", gate)
    check_same("gated", "dh", dh, "gate", gate)
    return new_like(gate), new_like(gate)


@op("(Tensor gate, Tensor up, Tensor dh, str act) -> (Tensor dgate, Tensor dup)", _gated_backward_outputs)
def gated_backward(gate: Tensor, up: Tensor, dh: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """dgate = dh up act'(gate), dup = dh act(gate). All have one shape and dtype."""
    check_no_graph("gated_backward", gate, up, dh)
    dgate, dup = _gated_backward_outputs(gate, up, dh, act)
    _fill_gated_backward(gate, up, dh, act, dgate, dup, None)
    return dgate, dup


def _gated_backward_product_outputs(gate: Tensor, up: Tensor, dh: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    return *_gated_backward_outputs(gate, up, dh, act), new_like(gate)


@op("(Tensor gate, Tensor up, Tensor dh, str act) -> (Tensor dgate, Tensor dup, Tensor h)", _gated_backward_product_outputs)
def gated_backward_product(gate: Tensor, up: Tensor, dh: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_backward` that recomputes h = act(gate) up in the same pass, with the bits of `gated_forward`."""
    check_no_graph("gated_backward_product", gate, up, dh)
    dgate, dup, h = _gated_backward_product_outputs(gate, up, dh, act)
    _fill_gated_backward(gate, up, dh, act, dgate, dup, h)
    return dgate, dup, h


def halves(gate_up: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(gate, up): views of the two halves of the last dimension of gate_up [..., 2 n]; up first unless `gate_first`."""
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gated_halves: gate_up has shape {list(gate_up.shape)}; its last dimension must be even")
    first, second = gate_up.tensor_split(2, -1)
    return (first, second) if gate_first else (second, first)


def _gated_halves_backward_outputs(gate_up: Tensor, dh: Tensor, act: str, gate_first: bool) -> Tensor:
    check_dtype("gated_halves", "gate_up", gate_up)
    check_same("gated_halves", "dh", dh, "gate", halves(gate_up, gate_first)[0])
    return new_like(gate_up)


@op("(Tensor gate_up, Tensor dh, str act, bool gate_first) -> Tensor", _gated_halves_backward_outputs)
def gated_halves_backward(gate_up: Tensor, dh: Tensor, act: str, gate_first: bool) -> Tensor:
    """`gated_backward` of the halves of gate_up [..., 2 n], with dh [..., n]; both gradients in one tensor like gate_up."""
    check_no_graph("gated_halves_backward", gate_up, dh)
    gradient = _gated_halves_backward_outputs(gate_up, dh, act, gate_first)
    _fill_gated_backward(*halves(gate_up, gate_first), dh, act, *halves(gradient, gate_first), None)
    return gradient


for _op, _inputs in ((activation_forward, 1), (activation_backward, 2), (gated_forward, 2), (gated_backward, 3)):
    vmap_elementwise(_op, _inputs)
