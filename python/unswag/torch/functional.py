"""Differentiable functions that keep the smallest exact form of what their backward needs.

Every function takes tensors of any shape, on the CPU or on one CUDA device, of dtype float32, float16, bfloat16 or float64.
It computes in float32 (float64 for float64) and rounds once. "Saved" is what autograd keeps from forward to backward, for n
elements of b bytes each. Inside `unswag.torch.Stash`, an output that another op saves may be recomputed in the backward instead
("recomputed under the stash").

All of them raise TypeError for another dtype, a sparse layout or an argument that is not a tensor; ValueError for a shape or
device that does not fit; NotImplementedError or RuntimeError for a device without kernels. Each message says what to do.

Under autocast the functions neither cast their inputs nor change their results: the output has the dtype of the input. They can
be differentiated once, in reverse mode; a second derivative and forward mode are errors. Activations and masks work under the
transforms of torch.func (grad, vjp, vmap). Gated units, norms, coded derivatives and vmap over dropout raise an error there
that names what to call. Sources of the formulas: docs/math.md.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from unswag import _core
from unswag.codebooks import Codebook
from unswag.torch import derivatives, ops, stash
from unswag.torch.autograd import Function, once_differentiable
from unswag.torch.derivatives import Code, Codes
from unswag.torch.draws import draw_seed

__all__ = [
    "activation",
    "dropout",
    "gated",
    "gated_halves",
    "geglu",
    "gelu",
    "layer_norm",
    "leaky_relu",
    "quick_gelu",
    "reglu",
    "relu",
    "relu2",
    "relu6",
    "rms_norm",
    "silu",
    "swiglu",
]

_DEVICES = ("cpu", "cuda", "meta")  # the core says whether it has CUDA kernels for a device


def _check(op: str, name: str, x: Tensor) -> None:
    """Rejects with one sentence what the dispatcher would reject with a page of text."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}; pass a torch.Tensor")
    if x.dtype not in ops.DTYPES:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}; pass a floating tensor, e.g. {name}.to(torch.float32)")
    if x.layout is not torch.strided:
        raise TypeError(f"{op}: {name} has layout {x.layout}; pass {name}.to_dense()")
    if x.device.type not in _DEVICES:
        raise NotImplementedError(
            f"{op}: {name} is on device '{x.device}', for which there are no kernels; pass {name}.to('cpu')"
        )
    if forward_ad._current_level >= 0 and _has_tangent(x):
        raise NotImplementedError(f"{op}: {name} has a tangent, and forward mode is not supported; use {_theirs(op)} there")


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether these tensors pass `_check` and `_no_transform`, and a Function may be applied to them past torch.func's part."""
    return not torch.compiler.is_dynamo_compiling() and _core.eager.takes(*tensors)


def _under(transform: Any) -> bool:
    """Whether this transform of torch.func is among those that are running."""
    return any(running.key() == transform for running in torch._C._functorch.get_interpreter_stack() or ())


def _has_tangent(x: Tensor) -> bool:
    """Under torch.func.jvp and jacfwd any tensor may have one, hidden by another transform."""
    return _under(torch._C._functorch.TransformType.Jvp) or forward_ad.unpack_dual(x).tangent is not None


def check_number(op: str, name: str, value: Any, remedy: str = "pass a number") -> None:
    """Raises unless value is a number or a tensor of one element, whose value is not read: that would wait for the device."""
    if isinstance(value, int | float):  # torch.compile cannot call hasattr on its own numbers
        return
    if not hasattr(value, "__float__") or (isinstance(value, Tensor) and value.is_complex()):
        raise TypeError(f"{op}: {name} is {value!r}; {remedy}")
    if math.prod(getattr(value, "shape", ())) != 1:
        raise ValueError(f"{op}: {name} is {value!r}, of shape {list(value.shape)}; {remedy}")


def check_integer(op: str, name: str, value: Any, least: float = -math.inf, remedy: str = "pass an integer") -> None:
    if not isinstance(value, Integral):
        raise TypeError(f"{op}: {name} is {value!r}; {remedy}")
    if value < least:
        raise ValueError(f"{op}: {name} is {value}; {remedy}")


def number(
    op: str, name: str, value: Any, remedy: str = "pass a number", fits: Callable[[Any], bool] = lambda value: True
) -> float:
    check_number(op, name, value, remedy)
    if not fits(value):
        raise ValueError(f"{op}: {name} is {value}; {remedy}")
    return float(value)


def epsilon(op: str, eps: Any) -> float:
    return number(op, "eps", eps, "pass a number that is not negative, e.g. 1e-6", lambda eps: eps >= 0)


def probability(op: str, p: Any) -> float:
    return number(op, "p", p, "pass a probability in [0, 1)", lambda p: 0 <= p < 1)


def _act(op: str, act: Any) -> None:
    if not isinstance(act, str) or act not in ops.ACTIVATIONS:
        raise ValueError(f"{op}: act is {act!r}; choose from {', '.join(ops.ACTIVATIONS)}")


def _out_dtype(op: str, out_dtype: Any, x: Tensor) -> torch.dtype:
    if out_dtype is None:
        return x.dtype
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"{op}: out_dtype is {out_dtype!r}; pass a torch.dtype, e.g. torch.float32, or None for that of x")
    return out_dtype


_THEIRS = {  # PyTorch's equivalents
    "relu": "torch.relu(x)", "leaky_relu": "torch.nn.functional.leaky_relu(x)", "relu6": "torch.nn.functional.relu6(x)",
    "silu": "torch.nn.functional.silu(x)", "gelu": "torch.nn.functional.gelu(x)",
    "gelu_tanh": "torch.nn.functional.gelu(x, approximate='tanh')", "quick_gelu": "x * torch.sigmoid(1.702 * x)",
    "relu2": "torch.relu(x).square()", "gated": "act(gate) * up", "gated_halves": "act(gate) * up of gate_up.chunk(2, -1)",
    "rms_norm": "torch.nn.functional.rms_norm(x, ...)", "layer_norm": "torch.nn.functional.layer_norm(x, ...)",
    "dropout": "torch.nn.functional.dropout(x, p)",
}  # fmt: skip


def _theirs(op: str) -> str:
    return _THEIRS.get(op, f"PyTorch's own {op}")


def _no_transform(op: str) -> None:
    """For Functions that save more than their inputs in one call: they have no rules for torch.func."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(f"{op}: the transforms of torch.func are not supported; use {_theirs(op)} under them")


def _signature_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch inspects the signature of a `forward` that has a `setup_context` at every call, which takes 40 µs, unless the
    function has one in `__signature__`."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


def _in_memory_order(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For elementwise functions: a dense x whose dimensions lie in another order in memory (channels_last) is passed on as one
    row, in that order. So nothing is copied, and y and the gradient have the strides of x, as in PyTorch."""

    @functools.wraps(function)
    def ordered(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_contiguous():
            return function(x, *args, **kwargs)
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        sorted_x = x.permute(order)
        if not sorted_x.is_contiguous():
            return function(x, *args, **kwargs)
        back = sorted(range(x.dim()), key=order.__getitem__)
        return function(sorted_x.flatten(), *args, **kwargs).view(sorted_x.shape).permute(back)

    return ordered


# ---- one-bit masks --------------------------------------------------------------------------------------------------------


class _Mask(Function):
    generate_vmap_rule = True

    @staticmethod
    @_signature_once
    def forward(x: Tensor, act: str, slope: float) -> tuple[Tensor, Tensor]:
        return ops.mask_forward(x, act, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, float], output: tuple[Tensor, Tensor]) -> None:
        _, ctx.act, ctx.slope = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Any, ...]:
        (packed,) = ctx.saved_tensors
        return ops.mask_backward(dy, packed, ctx.act, ctx.slope), None, None


@_in_memory_order
def relu(x: Tensor) -> Tensor:
    """max(x, 0), bit for bit as `torch.relu`: NaN stays NaN and passes its gradient.

    Saved: a mask of one bit per element, rows (last dimension) padded to 4 bytes: n / 8 bytes. Neither x nor y is saved.
    Where the next layer saves y anyway (a trained Linear), `torch.relu` adds nothing and this adds n / 8 bytes.
    """
    if not (plain := _is_plain(x)):
        _check("relu", "x", x)
    y: Tensor = (_Mask.direct if plain else _Mask.apply)(x, "relu", 0.0)[0]
    return y


@_in_memory_order
def leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    """x > 0 ? x : negative_slope x, as `torch.nn.functional.leaky_relu`. Saved: one bit per element, n / 8 bytes."""
    if not (plain := _is_plain(x)):
        _check("leaky_relu", "x", x)
    slope = number("leaky_relu", "negative_slope", negative_slope)
    y: Tensor = (_Mask.direct if plain else _Mask.apply)(x, "leaky_relu", slope)[0]
    return y


@_in_memory_order
def relu6(x: Tensor) -> Tensor:
    """min(max(x, 0), 6), bit for bit as `torch.nn.functional.relu6`. Saved: one bit per element, n / 8 bytes."""
    if not (plain := _is_plain(x)):
        _check("relu6", "x", x)
    y: Tensor = (_Mask.direct if plain else _Mask.apply)(x, "relu6", 0.0)[0]
    return y


# ---- smooth activations -----------------------------------------------------------------------------------------------------


class _Activation(Function):
    generate_vmap_rule = True

    @staticmethod
    @_signature_once
    def forward(x: Tensor, act: str) -> Tensor:
        return ops.activation_forward(x, act)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        x, ctx.act = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        return ops.activation_backward(x, dy, ctx.act), None


class _Coded(Function):
    @staticmethod
    @_signature_once
    def forward(x: Tensor, act: str, code: Code) -> tuple[Tensor, Tensor]:
        return code.forward(x, act)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, Code], output: tuple[Tensor, Tensor]) -> None:
        _, ctx.act, ctx.code = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Any, ...]:
        (packed,) = ctx.saved_tensors
        return ctx.code.backward(dy, packed, ctx.act), None, None


@_in_memory_order
def activation(x: Tensor, act: str, codes: Codes | None = None) -> Tensor:
    """act(x), one of `unswag.torch.ops.ACTIVATIONS`. Saved: x, n b bytes; y is recomputed under the stash.

    Under a policy x has the role mlp. Under "2bit" a code of the derivative is saved instead of x, n / 4 bytes, and y, if
    another op saves it, in int2; `codes` holds the codebook from call to call.
    """
    _act("activation", act)
    if not (plain := _is_plain(x)):
        _check(act, "x", x)
    code = derivatives.current(codes, act, x)
    if code is not None:
        y: Tensor = (_Coded.direct if plain else _Coded.apply)(x, act, code)[0]
        stash.plays("mlp", y)
        return y
    stash.plays("mlp", x)
    y = (_Activation.direct if plain else _Activation.apply)(x, act)
    stash.remember(y, ops.activation_forward, x, act=act)
    return y


def _with_bits(x: Tensor, act: str, bits: int | None, codebook: str | Codebook | None) -> Tensor:
    _check(act, "x", x)
    if bits is None and codebook is None:
        return activation(x, act)
    if bits is not None:  # unswag.codebooks checks the range
        check_integer(act, "bits", bits, remedy="choose 1, 2, 3 or 4, or None to keep x exactly")
    if not isinstance(codebook, str | Codebook | None):
        raise TypeError(f"{act}: codebook is {codebook!r}; pass a name or a Codebook, or None for the best one")
    _no_transform(act)
    y: Tensor = _Coded.apply(x, act, derivatives.code(act, bits, codebook))[0]
    return y


@_in_memory_order
def silu(x: Tensor, *, bits: int | None = None, codebook: str | Codebook | None = None) -> Tensor:
    """x / (1 + e^-x) (Elfwing et al. 2017). Saved: x, n b bytes; y is recomputed under the stash.

    bits      1 to 4: only a code of the derivative is saved, n bits / 8 bytes. Lossy: y is exact, the gradient is not
              (docs/policies.md)
    codebook  the levels of the derivative: a name of `unswag.codebooks`, "dither2" (unbiased, with higher variance), or a
              Codebook; by default the best with this number of bits
    """
    return _with_bits(x, "silu", bits, codebook)


def gelu_name(op: str, approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate is {approximate!r}; choose 'none' or 'tanh'")
    return "gelu" if approximate == "none" else "gelu_tanh"


@_in_memory_order
def gelu(
    x: Tensor, approximate: str = "none", *, bits: int | None = None, codebook: str | Codebook | None = None
) -> Tensor:  # fmt: skip
    """x Phi(x) with the normal distribution's Phi, or with `approximate="tanh"` its tanh form (Hendrycks & Gimpel 2016).

    Saved: x, n b bytes; y is recomputed under the stash. `bits` and `codebook` as in `silu`.
    """
    return _with_bits(x, gelu_name("gelu", approximate), bits, codebook)


@_in_memory_order
def quick_gelu(x: Tensor) -> Tensor:
    """x / (1 + e^(-1.702 x)) (Hendrycks & Gimpel 2016). Saved: x, n b bytes; y is recomputed under the stash."""
    return activation(x, "quick_gelu")


@_in_memory_order
def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2, bit for bit as `torch.relu(x).square()` (So et al. 2021, Primer).

    Saved: x, n b bytes; y is recomputed under the stash. relu2(relu(x)) equals relu2(x), and so do their gradients.
    """
    return activation(x, "relu2")


# ---- gated units ----------------------------------------------------------------------------------------------------------


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.act = act
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, up)
        return ops.gated_forward(gate, up, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = ops.gated_backward(gate, up, dh, ctx.act)
        return dgate if ctx.needs_input_grad[0] else None, dup if ctx.needs_input_grad[1] else None, None


class _GatedCoded(Function):
    """h = act(gate) * up, which saves act(gate), up and a code of act'(gate). Its second result is act(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str, code: Code) -> tuple[Tensor, Tensor]:
        ctx.act, ctx.code = act, code
        h = ops.gated_forward(gate, up, act)
        value, packed = code.forward(gate, act)
        stash.plays("mlp", value, up)
        ctx.mark_non_differentiable(value)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(packed, value, up)
        return h, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, _: None) -> tuple[Any, ...]:
        packed, value, up = ctx.saved_tensors
        need_gate, need_up = ctx.needs_input_grad[:2]
        dgate = ctx.code.backward(dh * up, packed, ctx.act) if need_gate else None
        return dgate, dh * value if need_up else None, None, None


def gated(gate: Tensor, up: Tensor, act: str, codes: Codes | None = None) -> Tensor:
    """act(gate) * up, rounded once (Shazeer 2020); `act` is one of `unswag.torch.ops.ACTIVATIONS`.

    gate, up: same shape, same dtype; nothing is broadcast. Result: that shape and dtype.
    Saved: gate and up, 2 n b bytes, not act(gate); h is recomputed under the stash.

    Under a policy gate and up have the role mlp. Under "2bit" a code of act'(gate), and act(gate) and up in int2, are saved:
    6.5 bits per element of h; `codes` holds the codebook from call to call.
    """
    _act("gated", act)
    if not (plain := _is_plain(gate, up)):
        _check("gated", "gate", gate)
        _check("gated", "up", up)
        _no_transform("gated")
    code = derivatives.current(codes, act, gate, up)
    if code is not None:
        h, value = (_GatedCoded.direct if plain else _GatedCoded.apply)(gate, up, act, code)
        stash.remember(h, _product, value, up)
        coded: Tensor = h
        return coded
    stash.plays("mlp", gate, up)
    h = (_Gated.direct if plain else _Gated.apply)(gate, up, act)
    stash.remember(h, ops.gated_forward, gate, up, act=act)
    exact: Tensor = h
    return exact


def _product(value: Tensor, up: Tensor) -> Tensor:
    return value * up


class _GatedHalves(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, act: str, gate_first: bool) -> Tensor:
        ctx.act, ctx.gate_first = act, gate_first
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate_up)
        return gated_of_halves(gate_up, act, gate_first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
        (gate_up,) = ctx.saved_tensors
        return ops.gated_halves_backward(gate_up, dh, ctx.act, ctx.gate_first), None, None


def gated_of_halves(gate_up: Tensor, act: str, gate_first: bool) -> Tensor:
    """The value of `gated_halves`: the stash recomputes it with this function."""
    h: Tensor = ops.gated_forward(*ops.halves(gate_up, gate_first), act)
    return h


def gated_halves(gate_up: Tensor, act: str, gate_first: bool = True, codes: Codes | None = None) -> Tensor:
    """act(gate) * up of the two halves of the last dimension, rounded once: `gated` for one Linear that computes both.

    gate_up: [..., 2 n], gate first or, with `gate_first=False`, up first. Result: [..., n].
    Saved: gate_up, 2 n b bytes. The gradient is computed as one tensor, so that no halves have to be joined. Policies apply as
    in `gated`.
    """
    _act("gated_halves", act)
    if not (plain := _is_plain(gate_up)):
        _check("gated_halves", "gate_up", gate_up)
        _no_transform("gated_halves")
    gate, up = ops.halves(gate_up, gate_first)
    if derivatives.current(codes, act, gate) is not None:
        return gated(gate, up, act, codes)
    stash.plays("mlp", gate_up)
    h: Tensor = (_GatedHalves.direct if plain else _GatedHalves.apply)(gate_up, act, bool(gate_first))
    stash.remember(h, gated_of_halves, gate_up, act=act, gate_first=bool(gate_first))
    return h


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Saved: gate and up, see `gated`."""
    return gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate, approximate) * up. Saved: gate and up, see `gated`."""
    return gated(gate, up, gelu_name("geglu", approximate))


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate) * up. Saved: gate and up, see `gated`."""
    return gated(gate, up, "relu")


# ---- RMSNorm --------------------------------------------------------------------------------------------------------------


class _RmsNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_before_weight: bool,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, rstd = ops.rms_norm_forward(x, weight, eps, weight_offset, cast_before_weight, out_dtype)
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.weight_offset, ctx.cast_before_weight = weight_offset, cast_before_weight
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, rstd, weight)
        return y, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Any, ...]:
        x, rstd, weight = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[:2]
        dx, dw = ops.rms_norm_backward(x, rstd, weight, dy, ctx.weight_offset, ctx.cast_before_weight, need_dx, need_dw)
        # dw is summed in float and rounded to the weight's dtype once, here.
        return dx if need_dx else None, dw.to(ctx.weight_dtype) if need_dw else None, None, None, None, None


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x rstd (weight_offset + weight) over the last dimension, rstd = 1 / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019).

    x: [..., cols]; weight: [cols] of any supported dtype, or None for no weight. Result: shape of x, dtype `out_dtype` or that
    of x. weight_offset: 1 for models that store weight - 1 (Gemma). cast_before_weight: round x rstd to the dtype of x before
    the weight is applied (Llama); otherwise everything is float32 until the result (Gemma).
    Saved: x, which other ops that save it share, and rstd: 4 bytes per row (8 for float64); y is recomputed under the stash.
    """
    if not (plain := _is_plain(x, weight)):
        _check("rms_norm", "x", x)
        if weight is not None:
            _check("rms_norm", "weight", weight)
        _no_transform("rms_norm")
    if type(out_dtype) is not torch.dtype:
        out_dtype = _out_dtype("rms_norm", out_dtype, x)
    if type(eps) is not float or not eps >= 0:
        eps = epsilon("rms_norm", eps)
    if type(weight_offset) is not float:
        weight_offset = number("rms_norm", "weight_offset", weight_offset)
    if x.element_size() < 4:
        x = stash.own(x)
    stash.plays("residual", x)
    y, rstd = (_RmsNorm.direct if plain else _RmsNorm.apply)(x, weight, eps, weight_offset, bool(cast_before_weight), out_dtype)
    stash.remember(
        y, ops.rms_norm_apply, x, rstd, weight,
        weight_offset=weight_offset, cast_before_weight=bool(cast_before_weight), out_dtype=out_dtype,
    )  # fmt: skip
    result: Tensor = y
    return result


# ---- LayerNorm ------------------------------------------------------------------------------------------------------------


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = ops.layer_norm_forward(x, weight, bias, eps, out_dtype)
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, rstd, weight)
        return y, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Any, ...]:
        x, mean, rstd, weight = ctx.saved_tensors
        need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
        dx, dw, db = ops.layer_norm_backward(x, mean, rstd, weight, dy, need_dx, need_dw, need_db)
        # dw and db are summed in float and rounded to the parameter's dtype once, here.
        return (
            dx if need_dx else None,
            dw.to(ctx.weight_dtype) if need_dw else None,
            db.to(ctx.bias_dtype) if need_db else None,
            None,
            None,
        )


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """(x - mean) rstd weight + bias over the last dimension, rstd = 1 / sqrt(variance + eps) (Ba, Kiros, Hinton 2016).

    x: [..., cols]; weight, bias: [cols] of any supported dtype, or None. Everything is float32 until the result, which is
    rounded once. Result: shape of x, dtype `out_dtype` or that of x.
    Saved: x, which other ops that save it share, and mean and rstd: 8 bytes per row (16 for float64); y is recomputed under the
    stash.
    """
    if not (plain := _is_plain(x, weight, bias)):
        _check("layer_norm", "x", x)
        for name, vector in (("weight", weight), ("bias", bias)):
            if vector is not None:
                _check("layer_norm", name, vector)
        _no_transform("layer_norm")
    out_dtype = _out_dtype("layer_norm", out_dtype, x)
    eps = epsilon("layer_norm", eps)
    if x.element_size() < 4:
        x = stash.own(x)
    stash.plays("residual", x)
    y, mean, rstd = (_LayerNorm.direct if plain else _LayerNorm.apply)(x, weight, bias, eps, out_dtype)
    stash.remember(y, ops.layer_norm_apply, x, mean, rstd, weight, bias, out_dtype=out_dtype)
    result: Tensor = y
    return result


# ---- dropout --------------------------------------------------------------------------------------------------------------


class _Dropout(Function):
    @staticmethod
    @_signature_once
    def forward(x: Tensor, p: float, seed: int) -> Tensor:
        return ops.dropout(x, p, seed, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, int], output: Tensor) -> None:
        _, ctx.p, ctx.seed = inputs
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return ops.dropout(dy, ctx.p, ctx.seed, 0), None, None


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """x / (1 - p) with probability 1 - p, else 0 (Srivastava et al. 2014); x itself when not training or p is 0.

    Saved: only a seed; the backward draws again (Philox, docs/format.md section 4). PyTorch saves a mask of n bytes.
    The draws differ from those of `torch.nn.functional.dropout`. ValueError for p outside [0, 1); RuntimeError inside a CUDA
    graph, whose replays would all drop the same elements.
    """
    _check("dropout", "x", x)
    p = probability("dropout", p)
    if not training or p == 0:
        return x
    if torch._C._are_functorch_transforms_active() and _under(torch._C._functorch.TransformType.Vmap):
        raise NotImplementedError(f"dropout: torch.func.vmap is not supported; use {_theirs('dropout')} under it")
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dropout: a CUDA graph is being captured, and every replay would drop the same elements; use "
            "torch.nn.functional.dropout inside graphs"
        )
    seed = draw_seed()
    y: Tensor = _Dropout.apply(x, p, seed)
    stash.remember(y, ops.dropout, x, p=p, seed=seed, offset=0)
    return y
