"""The C++ core under jit, on the CPU and on CUDA devices: one XLA custom call each, with the packed bytes of the layout rows.

A call maps rows to rows: its operands and results are [*batch, last], with one batch and any last dimensions. So vmap is one
dimension more, and XLA partitions the batch by itself: no array is gathered. Rows whose length is a multiple of 32 are handed
over word by word, [..., cols / 32, 32], and may be cut between words. A jax that cannot be told so (PARTITIONS is False, jax
0.4.38) gathers first under automatic sharding, and its shard_map asks for check_rep=False.

What `jax.export` exports runs where UnSwag is not, and its shapes may be symbolic: there a call that was not asked for by name
is lowered to the same in plain JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.interpreters import ad, batching, mlir

from unswag import _core
from unswag.jax import formulas, xla
from unswag.jax.xla import WORD

try:
    from jax import ffi
except ImportError:  # before jax 0.5
    from jax.extend import ffi  # type: ignore[no-redef,attr-defined]

__all__ = [
    "CUDA",
    "PARTITIONS",
    "activation_backward",
    "activation_forward",
    "gated_backward",
    "gated_forward",
    "mask_backward",
    "mask_forward",
]

PARTITIONS = hasattr(ffi, "register_ffi_target_as_batch_partitionable")  # else automatic sharding gathers first

_targets = _core.xla_targets()
CUDA = "CUDA" in _targets  # whether this build has kernels for it

for _platform, _handlers in _targets.items():
    for _name, _capsule in _handlers.items():
        ffi.register_ffi_target(_name, _capsule, platform=_platform)
if PARTITIONS:
    for _name in _targets["cpu"]:
        ffi.register_ffi_target_as_batch_partitionable(_name)


# ---- the primitive -------------------------------------------------------------------------------------------------------
# Not ffi_call, whose attributes, the number of batch dimensions among them, vmap leaves as they are.

_call_p = Primitive("unswag_ffi")
_call_p.multiple_results = True


def call(
    target: str, operands: tuple[Array, ...], results: tuple[tuple[Any, Any], ...], named: bool = True, **attributes: Any
) -> list[Array]:
    """The custom call of a handler, under all transformations. results: last dimension and dtype of each. named: whether the
    caller asked for this implementation by name."""
    types = tuple((last, np.dtype(dtype).name) for last, dtype in results)
    return _call_p.bind(*operands, target=target, results=types, named=named, attributes=tuple(sorted(attributes.items())))


@partial(jax.jit, static_argnames=("target", "results", "named", "attributes"))
def _alone(*operands: Array, **parameters: Any) -> list[Array]:
    return _call_p.bind(*operands, **parameters)


@_call_p.def_impl
def _impl(*operands: Array, **parameters: Any) -> list[Array]:
    return _alone(*operands, **parameters)


@_call_p.def_abstract_eval
def _types(*operands: Any, results: Any, **parameters: Any) -> list[Any]:
    x = operands[-1]
    return [x.update(shape=(*x.shape[:-1], last), dtype=jnp.dtype(name), weak_type=False) for last, name in results]


def _batched(operands: Any, axes: Any, **parameters: Any) -> tuple[list[Array], list[int]]:
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    moved = (
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    )
    results = _call_p.bind(*moved, **parameters)
    return results, [0] * len(results)


def _sharding_rule(avals_in: Any, avals_out: Any) -> str:
    """Every batch dimension may be cut, the last of each operand and result may not."""
    batch = len(avals_in[0].shape) - 1
    factors = [chr(ord("i") + i) if i < 18 else f"z_{i - 17}" for i in range(batch + len(avals_in) + len(avals_out))]
    sizes = dict(zip(factors, avals_in[0].shape[:-1], strict=False))
    last = iter(factors[batch:])

    def mapping(aval: Any) -> str:
        name = next(last)
        sizes[name] = aval.shape[-1]
        return "[" + ", ".join([*factors[:batch], name]) + "]"

    operands, results = (", ".join(map(mapping, avals)) for avals in (avals_in, avals_out))
    listed = ", ".join(f"{name}={size}" for name, size in sizes.items())
    whole = ", ".join(factors[batch:])
    return f"#sdy.op_sharding_rule<({operands})->({results}) {{{listed}}} need_replication={{{whole}}}>"


def _lower(context: Any, *operands: Any, target: str, results: Any, named: bool, attributes: Any) -> Any:
    if not named and getattr(context.module_context.lowering_parameters, "for_export", False):
        return _lower_plain(context, *operands, target=target, attributes=attributes)
    extra = {}
    if PARTITIONS:
        batch = len(context.avals_in[0].shape) - 1
        extra["mhlo.frontend_attributes"] = mlir.ir_attribute({"num_batch_dims": str(batch)})
        if getattr(jax.config, "jax_use_shardy_partitioner", True):
            extra["sdy.sharding_rule"] = ir.Attribute.parse(_sharding_rule(context.avals_in, context.avals_out))
    return ffi.ffi_lowering(target, extra_attributes=extra)(context, *operands, **dict(attributes))


def _lower_plain(context: Any, *operands: Any, target: str, attributes: Any) -> Any:
    plain = partial(_PLAIN[target], **dict(attributes))
    return mlir.lower_fun(plain, multiple_results=True)(context, *operands)


def _lower_elsewhere(context: Any, *operands: Any, target: str, named: bool, attributes: Any, **parameters: Any) -> Any:
    if not named:  # of a program for several platforms; `how.implement` has none of these calls for one without kernels
        return _lower_plain(context, *operands, target=target, attributes=attributes)
    platforms = context.module_context.platforms
    build = "" if CUDA or "cuda" not in platforms else ", or build UnSwag with UNSWAG_CUDA=ON (needs nvcc)"
    raise NotImplementedError(
        f"implementation 'ffi' is for the CPU{' and CUDA' if CUDA else ''}, but this is compiled for {', '.join(platforms)}; "
        f"pass None or 'xla'{build}"
    )


def _differentiated(primals: Any, tangents: Any, *, target: str, attributes: Any, **parameters: Any) -> Any:
    """As the same in plain JAX: a gradient may be differentiated again."""
    results = _call_p.bind(*primals, target=target, attributes=attributes, **parameters)
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    return results, list(jax.jvp(partial(_PLAIN[target], **dict(attributes)), primals, tangents)[1])


batching.primitive_batchers[_call_p] = _batched
ad.primitive_jvps[_call_p] = _differentiated
mlir.register_lowering(_call_p, _lower_elsewhere)
for _platform in ("cpu", *(["cuda"] if CUDA else [])):
    mlir.register_lowering(_call_p, _lower, platform=_platform)


# ---- masks -----------------------------------------------------------------------------------------------------------------


def _words(x: Array) -> tuple[Array, tuple[int, ...]]:
    """x with its rows cut into words where they are whole words, and the shape of its packed form."""
    *leading, cols = x.shape if x.ndim >= 2 else (1, x.size)
    words = -(-cols // WORD)
    whole = cols % WORD == 0
    return x.reshape(*leading, words, WORD) if whole else x.reshape(*leading, cols), (*leading, words)


def mask_attributes(act: str, slope: float, dtype: Any) -> dict[str, Any]:
    """act and slope as attributes of a custom call."""
    rounded = float(np.asarray(slope).astype(dtype))  # as jax.nn has it
    return {"act": np.int64(_core.masks.index(f"jax_{act}")), "slope": np.float64(rounded)}


def mask_forward(x: Array, act: str, slope: float, named: bool = True) -> tuple[Array, Array]:
    """The activation of x and its mask, as `xla.pack` writes it in the layout rows."""
    view, packed_shape = _words(x)
    last = 1 if view.ndim > len(packed_shape) else packed_shape[-1]
    results = ((view.shape[-1], x.dtype), (last, np.uint32))
    y, packed = call("unswag_mask_forward_v1", (view,), results, named, **mask_attributes(act, slope, x.dtype))
    return y.reshape(x.shape), packed.reshape(packed_shape)


def mask_backward(packed: Array, dy: Array, act: str, slope: float, named: bool = True) -> Array:
    act = act if slope else "relu"  # 0, and not 0 dy, which may be -0 or NaN
    view, packed_shape = _words(dy)
    if view.ndim > len(packed_shape):
        packed = packed[..., None]
    result = ((view.shape[-1], dy.dtype),)
    (dx,) = call("unswag_mask_backward_v1", (packed, view), result, named, **mask_attributes(act, slope, dy.dtype))
    return dx.reshape(dy.shape)


# ---- elementwise -----------------------------------------------------------------------------------------------------------
# Every dimension is one of the batch.


def _elementwise(target: str, act: str, named: bool, count: int, *operands: Array) -> list[Array]:
    x = operands[0]
    results = ((1, x.dtype),) * count
    code = np.int64(_core.activations.index(act))
    return [y[..., 0] for y in call(target, tuple(v[..., None] for v in operands), results, named, act=code)]


def activation_forward(x: Array, act: str, named: bool = True) -> Array:
    return _elementwise("unswag_activation_forward_v1", act, named, 1, x)[0]


def activation_backward(x: Array, dy: Array, act: str, named: bool = True) -> Array:
    return _elementwise("unswag_activation_backward_v1", act, named, 1, x, dy)[0]


def gated_forward(gate: Array, up: Array, act: str, named: bool = True) -> Array:
    return _elementwise("unswag_gated_forward_v1", act, named, 1, gate, up)[0]


def gated_backward(gate: Array, up: Array, dh: Array, act: str, named: bool = True) -> tuple[Array, Array]:
    dgate, dup = _elementwise("unswag_gated_backward_v1", act, named, 2, gate, up, dh)
    return dgate, dup


# ---- the same in plain JAX -------------------------------------------------------------------------------------------------


def _act(act: int, slope: float) -> formulas.Act:
    return formulas.Act(_core.masks[act].removeprefix("jax_"), float(slope))


def _plain_mask_forward(x: Array, *, act: int, slope: float) -> tuple[Array, Array]:
    return _act(act, slope).value(x), xla.pack_rows(x, _act(act, slope).bit, 1)


def _plain_mask_backward(packed: Array, dy: Array, *, act: int, slope: float) -> tuple[Array]:
    return (xla.apply_rows(packed, dy, _act(act, slope).gradient, 1),)


_PLAIN: dict[str, Callable[..., tuple[Array, ...]]] = {
    "unswag_mask_forward_v1": _plain_mask_forward,
    "unswag_mask_backward_v1": _plain_mask_backward,
    "unswag_activation_forward_v1": lambda x, act: (formulas.value(x, _core.activations[act]),),
    "unswag_activation_backward_v1": lambda x, dy, act: (formulas.gradient(x, dy, _core.activations[act]),),
    "unswag_gated_forward_v1": lambda gate, up, act: (formulas.product(gate, up, _core.activations[act]),),
    "unswag_gated_backward_v1": lambda gate, up, dh, act: formulas.gradients(gate, up, dh, _core.activations[act]),
}
