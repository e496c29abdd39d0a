"""Blocks that process the tokens in chunks, forward and backward: no array of tokens x ff or tokens x classes is built, and
none is kept unless `keep` says so. This, more than the mask, is what makes long contexts fit.

x and hidden are [..., tokens, H], with any leading dimensions; a chunk is `chunk` tokens of every sequence; the last one may be
shorter. Weights and biases have the dtype of x: float32, bfloat16, float16 or float64. Products are those of plain JAX
in that dtype; weight gradients are summed over the chunks in float32 (float64) and rounded once. A gradient may be
differentiated again, in either mode; `jax.jvp` of the functions themselves raises JAX's TypeError. Invalid shapes, values
and names raise ValueError, dtypes that do not match raise TypeError. Formulas: docs/math.md.

"Saved" is what is kept from forward to backward, besides the weights, for tokens of b bytes per element. Under jit a gradient
that is not used (of a frozen weight) costs nothing: it is not computed, and nothing is kept for it.

Leading dimensions need no vmap, which would sum the weight gradients of each example separately. Leading dimensions may be
sharded. Under automatic sharding the compiler decides whether the gradients of trained weights are summed over the devices in
the loop or after it; inside shard_map they are summed once. Tokens that are sharded automatically would be gathered chunk by
chunk: shard them with shard_map, where each device processes its own tokens. A symbolic number of tokens (`jax.export`) is cut
into chunks if it is known to be at least one chunk.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from unswag.jax import xla
from unswag.jax.formulas import Act, wide, wide_type
from unswag.jax.gated import Unit
from unswag.jax.how import How, choose, floating, integer, number, one_of, same_dtype
from unswag.jax.masks import RELU2, Relu2
from unswag.jax.names import INPUT, MASK, STAT
from unswag.jax.varying import alike

__all__ = ["gated_mlp", "linear_cross_entropy", "mlp"]

Step = Callable[[Any, Any, int, Any], tuple[Any, Any]]  # (carry, first token, tokens, kept) → carry, to keep


def _sweep(step: Step, carry: Any, tokens: int, chunk: int, kept: tuple[Any, Any] = ((), ())) -> tuple[Any, tuple[Any, Any]]:
    """Runs `step` chunk by chunk. What it keeps of the whole chunks is stacked; that of a shorter last chunk is separate."""
    # for a symbolic number of tokens these are not ints, and both parts may be empty
    whole, rest = (1, 0) if tokens == chunk else divmod(tokens, chunk)
    stacked, last = kept
    if not _none(whole):
        carry, stacked = lax.scan(
            lambda carry, given: step(carry, given[0] * chunk, chunk, given[1]), carry, (jnp.arange(whole), stacked)
        )
    if not _none(rest):
        carry, last = step(carry, whole * chunk, rest, last)
    return carry, (stacked, last)


def _none(count: Any) -> bool:
    return isinstance(count, int) and count == 0


def _take(x: Array, start: Any, size: int, axis: int = -2) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _put(buffer: Array, piece: Array, start: Any, axis: int = -2) -> Array:
    return lax.dynamic_update_slice_in_dim(buffer, piece, start, axis)


def _zeros(like: Array) -> Array:
    """Zeros, to which the gradient of a weight is added."""
    return jnp.zeros_like(like, dtype=wide_type(like))


def _over_tokens(x: Array, d: Array) -> Array:
    """x^T d, summed over all dimensions but the last."""
    tokens = tuple(range(x.ndim - 1))
    return jnp.tensordot(x, d, (tokens, tokens), preferred_element_type=wide_type(d))


def _back(d: Array, weight: Array) -> Array:
    """d weight^T, not rounded."""
    return jnp.tensordot(d, weight, ((-1,), (1,)), preferred_element_type=wide_type(d))


def _chunk(op: str, chunk: Any, tokens: Any) -> Any:
    """The tokens of a chunk; all, if their number is symbolic and may be smaller, as no slice of it may then be so long."""
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"{op}: chunk is {chunk!r}; pass a positive number of tokens, e.g. 4096")
    if isinstance(tokens, int):
        return chunk
    try:
        long = tokens >= chunk
    except jax.core.InconclusiveDimensionOperation:
        long = False
    if long:
        return chunk
    warnings.warn(
        f"{op}: the {tokens} tokens to export may be fewer than chunk, {chunk}, so they are not cut into chunks; "
        f"pass constraints=['{tokens} >= {chunk}'] to jax.export.symbolic_shape",
        stacklevel=3,
    )
    return tokens


# ---- MLP ----------------------------------------------------------------------------------------------------------------
# z = x into + bias, h = unit(z), y = h down + bias.  `into` is (up,) or (gate, up).


class _Mlp(NamedTuple):
    unit: Act | Relu2 | Unit
    keep: str
    chunk: int
    mask: How

    def value(self, z: tuple[Array, ...]) -> Array:
        return self.unit.value(*z)

    def gradients(self, z: tuple[Array, ...], dh: Array) -> tuple[Array, ...]:
        if isinstance(self.unit, Act):
            return (self.unit.gradient(self.unit.bit(*z), dh),)
        return self.unit.gradients(dh, *z)


# Only those that `unswag.jax` has functions for.
_GATED = ("silu", "gelu", "gelu_tanh", "relu")
_PLAIN = ("relu", "relu2", "leaky_relu", "relu6")
_KEEP = ("mask", "pre_activation", "recompute")

Weights = tuple[Array, ...]


def _affine(x: Array, weight: Array, bias: Array | None) -> Array:
    y = x @ weight
    return y if bias is None else y + bias


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _mlp(x: Array, into: Weights, into_bias: Array | None, down: Array, down_bias: Array | None, how: _Mlp) -> Array:
    return _mlp_forward(x, into, into_bias, down, down_bias, how._replace(keep="recompute"))[0]


def _mlp_forward(
    x: Array, into: Weights, into_bias: Array | None, down: Array, down_bias: Array | None, how: _Mlp
) -> tuple[Array, tuple[Any, ...]]:
    x = checkpoint_name(x, INPUT)

    def step(y: Array, start: Any, size: int, _: Any) -> tuple[Array, Weights]:
        z = tuple(_affine(_take(x, start, size), weight, into_bias) for weight in into)
        y = _put(y, _affine(how.value(z), down, down_bias), start)
        if how.keep == "mask":
            assert isinstance(how.unit, Act)
            _, layout, parts = how.mask
            return y, (xla.pack(xla.cut(z[0], parts, layout), how.unit.bit, 1, layout),)
        return y, z if how.keep == "pre_activation" else ()

    y = jnp.zeros_like(x, shape=(*x.shape[:-1], down.shape[1]))
    y, kept = _sweep(step, y, x.shape[-2], how.chunk)
    kept = jax.tree.map(partial(checkpoint_name, name=MASK if how.keep == "mask" else INPUT), kept)
    return y, (x, into, into_bias, down, down_bias, kept)


def _mlp_backward(how: _Mlp, residuals: tuple[Any, ...], dy: Array) -> tuple[Any, ...]:
    x, into, into_bias, down, down_bias, kept = residuals

    def unmask(packed: Array, dh: Array) -> Array:
        assert isinstance(how.unit, Act)
        return xla.apply(packed, dh, how.unit.gradient, 1, how.mask.layout)

    def step(carry: tuple[Any, ...], start: Any, size: int, kept: Weights) -> tuple[tuple[Any, ...], tuple[()]]:
        dx, dinto, dinto_bias, ddown, ddown_bias = carry
        x_, dy_ = _take(x, start, size), _take(dy, start, size)
        # with a mask, only the gradient of down needs z and h
        z = kept if how.keep == "pre_activation" else tuple(_affine(x_, weight, into_bias) for weight in into)
        dh = _back(dy_, down).astype(x.dtype)
        if how.keep == "mask":
            dz: Weights = (how.mask.elementwise(partial(unmask, kept[0]), dh),)
        else:
            dz = how.gradients(z, dh)
        dx_ = sum((_back(d, weight) for d, weight in zip(dz[1:], into[1:], strict=True)), start=_back(dz[0], into[0]))
        return (
            _put(dx, dx_.astype(x.dtype), start),
            tuple(sum_ + _over_tokens(x_, d) for sum_, d in zip(dinto, dz, strict=True)),
            None if dinto_bias is None else dinto_bias + _sum(dz[0]),
            ddown + _over_tokens(how.value(z), dy_),
            None if ddown_bias is None else ddown_bias + _sum(dy_),
        ), ()

    weights = (into, into_bias, down, down_bias)
    carry = (jnp.zeros_like(x), *jax.tree.map(_zeros, weights))
    (dx, *sums), _ = _sweep(step, carry, x.shape[-2], how.chunk, kept)
    return dx, *jax.tree.map(lambda sum_, like: sum_.astype(like.dtype), tuple(sums), weights)


def _sum(d: Array) -> Array:
    return jnp.sum(wide(d), tuple(range(d.ndim - 1)))


_mlp.defvjp(_mlp_forward, _mlp_backward)


def _checked(op: str, x: Array, into: dict[str, Array], down: Array, biases: dict[str, Array | None]) -> tuple[Any, ...]:
    x, down = floating(op, "x", x), floating(op, "down", down)
    into = {name: floating(op, name, weight) for name, weight in into.items()}
    given = {name: floating(op, name, bias) for name, bias in biases.items() if bias is not None}
    same_dtype(op, ("x", x), {**into, "down": down, **given})
    if x.ndim < 2:
        raise ValueError(f"{op}: x has shape {x.shape}; pass [..., tokens, hidden], e.g. x[None] for one token")
    first, *others = into
    for name, weight in into.items():
        if weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
            raise ValueError(f"{op}: {name} has shape {weight.shape}; pass [{x.shape[-1]}, ff], as x has shape {x.shape}")
    for name in others:
        if into[name].shape != into[first].shape:
            raise ValueError(f"{op}: {first} has shape {into[first].shape} and {name} {into[name].shape}; pass one shape")
    ff = into[first].shape[1]
    if down.ndim != 2 or down.shape[0] != ff:
        raise ValueError(f"{op}: down has shape {down.shape}; pass [{ff}, out], as {first} has shape {into[first].shape}")
    for name, size in (("up_bias", ff), ("down_bias", down.shape[1])):
        if name in given and given[name].shape != (size,):
            raise ValueError(f"{op}: {name} has shape {given[name].shape}; pass ({size},)")
    x, down, up_bias, down_bias, *weights = alike(x, down, given.get("up_bias"), given.get("down_bias"), *into.values())
    return x, tuple(weights), up_bias, down, down_bias


def mlp(
    x: Array,
    up: Array,
    down: Array,
    *,
    act: str = "relu",
    up_bias: Array | None = None,
    down_bias: Array | None = None,
    negative_slope: float = 0.01,
    keep: str = "recompute",
    chunk: int = 4096,
    layout: str | None = None,
) -> Array:
    """act(x up + up_bias) down + down_bias, with the values of plain JAX.

    x     [..., tokens, H]; up [H, ff], down [ff, out], up_bias [ff], down_bias [out]; the output is [..., tokens, out]
    act   "relu", "relu2", "leaky_relu" (its `negative_slope` is a Python number) or "relu6"
    keep  what is kept besides x (b H bytes per token, which the gradient of `up` needs):
          "recompute"       nothing; the backward recomputes x up
          "mask"            one bit per element, ff / 8 bytes per token, and x is not kept if `up` and `down` are frozen; not
                            for relu2, whose gradient is 2 max(z, 0) dh. A trained `down` needs h, hence x up again: then the
                            mask saves nothing over "recompute"
          "pre_activation"  z = x up + up_bias, b ff bytes per token; no product is recomputed
    chunk tokens of each sequence at a time. Transient: a few arrays [..., chunk, ff]; with the layout rows256, choose a
          multiple of 256, to which the mask of each chunk is padded
    layout where the bits of "mask" lie (docs/format.md); None is the best for the platform and the shape

    Plain JAX keeps x, ff bytes per token (a bool) or b ff (z), and b ff (h) where `down` is trained.
    """
    one_of("mlp", "act", act, _PLAIN)
    one_of("mlp", "keep", keep, _KEEP)
    if keep == "mask" and act == "relu2":
        raise ValueError(
            "mlp: keep is 'mask' but act is 'relu2', whose gradient needs z; choose keep='pre_activation' or 'recompute'"
        )
    if layout is not None and keep != "mask":
        raise ValueError(f"mlp: layout is {layout!r} but keep is {keep!r}: nothing is packed; leave layout out")
    slope = number("mlp", "negative_slope", negative_slope)
    arrays = _checked("mlp", x, {"up": up}, down, {"up_bias": up_bias, "down_bias": down_bias})
    unit = RELU2 if act == "relu2" else Act(act, slope if act == "leaky_relu" else 0.0)
    tokens = arrays[0].shape[-2]
    chunk = _chunk("mlp", chunk, tokens)
    size = min(chunk, tokens) if isinstance(tokens, int) else chunk
    like: Any = jax.ShapeDtypeStruct((size, arrays[3].shape[0]), arrays[0].dtype)
    cuts = 1, math.lcm(xla.cuts(arrays[0])[1], xla.cuts(arrays[1][0])[1])  # the tokens of a chunk are on one device
    return _mlp(*arrays, _Mlp(unit, keep, chunk, choose("mlp", like, "xla", layout, bits=int(keep == "mask"), cuts=cuts)))


def gated_mlp(
    x: Array, gate: Array, up: Array, down: Array, *, act: str = "silu", keep: str = "recompute", chunk: int = 4096
) -> Array:
    """(act(x gate) * (x up)) down; the product in the brackets is rounded once.

    x     [..., tokens, H]; gate and up [H, ff], down [ff, out]; the output is [..., tokens, out]
    act   "silu", "gelu" (the erf form), "gelu_tanh" or "relu"
    keep  what is kept besides x (b H bytes per token):
          "recompute"       nothing; the backward recomputes x gate and x up
          "pre_activation"  both, 2 b ff bytes per token
    chunk tokens of each sequence at a time. Transient: a few arrays [..., chunk, ff]
    """
    one_of("gated_mlp", "act", act, _GATED)
    one_of("gated_mlp", "keep", keep, _KEEP[1:])
    arrays = _checked("gated_mlp", x, {"gate": gate, "up": up}, down, {})
    how = choose("gated_mlp", arrays[0], "xla" if act == "relu" else None, None)
    return _mlp(*arrays, _Mlp(Unit(act, how), keep, _chunk("gated_mlp", chunk, arrays[0].shape[-2]), how))


# ---- linear + cross-entropy ---------------------------------------------------------------------------------------------


class _Loss(NamedTuple):
    ignore_index: int
    label_smoothing: float
    softcap: float
    logit_scale: float
    chunk: int

    def logits(self, hidden: Array, weight: Array) -> tuple[Array, Array | float]:
        """z [..., classes] and its derivative by hidden weight^T."""
        logits = _back(hidden, weight)
        z = logits * self.logit_scale
        if not self.softcap:
            return z, self.logit_scale
        t = jnp.tanh(z / self.softcap)
        return t * self.softcap, (1 - t) * (1 + t) * self.logit_scale

    def rows(self, hidden: Array, labels: Array, classes: int) -> tuple[Array, Array, Array, Array]:
        """(hidden, 0 in ignored rows; whether a row counts; whether its label is in range; whether a class is the label)."""
        counts = labels != self.ignore_index
        right = (labels >= 0) & (labels < classes)
        own = lax.broadcasted_iota(labels.dtype, (*labels.shape, classes), labels.ndim) == labels[..., None]
        return jnp.where(counts[..., None], hidden, 0), counts, right, own


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _losses(hidden: Array, weight: Array, labels: Array, how: _Loss) -> Array:
    return _losses_forward(hidden, weight, labels, how)[0]


def _losses_forward(hidden: Array, weight: Array, labels: Array, how: _Loss) -> tuple[Array, tuple[Any, ...]]:
    hidden = checkpoint_name(hidden, INPUT)

    def step(carry: tuple[Array, ...], start: Any, size: int, _: Any) -> tuple[tuple[Array, ...], tuple[()]]:
        rows, counts, right, own = how.rows(_take(hidden, start, size), _take(labels, start, size, -1), weight.shape[0])
        z, _ = how.logits(rows, weight)
        top = jnp.max(z, -1)
        z = z - top[..., None]
        total = jnp.sum(jnp.exp(z), -1)
        target = jnp.sum(jnp.where(own, z, 0), -1)
        if how.label_smoothing:
            target = (1 - how.label_smoothing) * target + how.label_smoothing * jnp.mean(z, -1)
        loss = jnp.where(counts, jnp.where(right, jnp.log(total) - target, np.nan), 0)
        return tuple(_put(buffer, piece, start, -1) for buffer, piece in zip(carry, (loss, top, total), strict=True)), ()

    zeros = jnp.zeros_like(hidden, shape=labels.shape, dtype=wide_type(hidden))
    (losses, top, total), _ = _sweep(step, (zeros, zeros, zeros), labels.shape[-1], how.chunk)
    return losses, (hidden, weight, labels, checkpoint_name(top, STAT), checkpoint_name(total, STAT))


def _losses_backward(how: _Loss, residuals: tuple[Any, ...], dlosses: Array) -> tuple[Any, ...]:
    hidden, weight, labels, *stats = residuals
    # the softmax divided by the number of rows underflows in float16
    product = wide_type(hidden) if hidden.dtype == jnp.float16 else hidden.dtype

    def step(carry: tuple[Array, Array], start: Any, size: int, _: Any) -> tuple[tuple[Array, Array], tuple[()]]:
        dhidden, dweight = carry
        rows, counts, right, own = how.rows(_take(hidden, start, size), _take(labels, start, size, -1), weight.shape[0])
        dloss, top, total = (_take(x, start, size, -1)[..., None] for x in (dlosses, *stats))
        z, slope = how.logits(rows, weight)
        d = jnp.exp(z - top) / total - jnp.where(own, 1 - how.label_smoothing, 0)
        if how.label_smoothing:
            d = d - how.label_smoothing / weight.shape[0]
        d = jnp.where(counts[..., None], jnp.where(right[..., None], d * slope * dloss, np.nan), 0).astype(product)
        drows = jnp.tensordot(d, weight.astype(product), 1, preferred_element_type=wide_type(hidden))
        return (
            _put(dhidden, drows.astype(hidden.dtype), start),
            dweight + _over_tokens(d, rows.astype(product)),
        ), ()

    carry = (jnp.zeros_like(hidden), _zeros(weight))
    (dhidden, dweight), _ = _sweep(step, carry, labels.shape[-1], how.chunk)
    return dhidden, dweight.astype(weight.dtype), None


_losses.defvjp(_losses_forward, _losses_backward)

# Per chunk, 512 MiB in float32. With fewer, reading and writing dweight once per chunk costs more than the products.
_LOGITS = 1 << 27

_LARGEST = float(np.finfo(np.float32).max)


def _checked_labels(labels: Array, rows: tuple[int, ...], classes: int, ignore_index: int) -> Array:
    op = "linear_cross_entropy"
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{op}: labels has dtype {labels.dtype}; pass integers, e.g. labels.astype(jnp.int32)")
    if labels.shape != rows:
        raise ValueError(f"{op}: labels has shape {labels.shape}; pass {rows}, one label per row of hidden")
    if not isinstance(labels, jax.core.Tracer) and labels.is_fully_addressable:
        values = np.asarray(labels)
        wrong = np.argwhere(((values < 0) | (values >= classes)) & (values != ignore_index))
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise ValueError(
                f"{op}: labels{list(at)} is {values[at]}; pass labels in [0, {classes}), or {ignore_index} (ignore_index) for "
                "rows without one"
            )
    return labels.astype(jnp.int64 if labels.dtype.itemsize == 8 else jnp.int32)


def linear_cross_entropy(
    hidden: Array,
    weight: Array,
    labels: Array,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Array:
    """Softmax cross-entropy of z = softcap tanh(logit_scale hidden weight^T / softcap), or z = logit_scale hidden weight^T.

    hidden   [..., tokens, H]; weight [classes, H], as in an embedding (for a Dense layer: kernel.T)
    labels   [..., tokens], integers in [0, classes) or ignore_index. Row i of hidden predicts label i
    softcap  0, or the cap of Gemma 2
    reduction "mean" (over the labels that count), "sum" or "none"; the result is a scalar or [..., tokens], float32 (float64)
    chunk    tokens of each sequence at a time; None: as many as make 2^27 logits

    Logits are not rounded to 16 bits. Rows with ignore_index are not read: their loss and gradient are 0. When no label counts,
    "mean" is NaN and every gradient 0. A label out of range raises ValueError if labels are concrete; under jit they are not,
    and its loss and gradients are NaN.

    Saved: hidden, b H bytes per token, and the largest logit and the sum of exponentials, 8 bytes per token (16 for float64).
    The backward recomputes the logits, chunk by chunk.
    """
    op = "linear_cross_entropy"
    hidden, weight = floating(op, "hidden", hidden), floating(op, "weight", weight)
    if hidden.ndim < 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden has shape {hidden.shape} and weight {weight.shape}; pass [..., tokens, H] and [classes, H]"
        )
    same_dtype(op, ("hidden", hidden), {"weight": weight})
    *leading, tokens, _ = hidden.shape
    classes = weight.shape[0]
    if classes == 0:
        raise ValueError(f"{op}: weight has shape {weight.shape}; pass at least one class")
    ignore_index = integer(op, "ignore_index", ignore_index)
    labels = _checked_labels(labels, (*leading, tokens), classes, ignore_index)
    if chunk is None:
        chunk = max(1, _LOGITS // (classes * max(1, math.prod(size for size in leading if isinstance(size, int)))))
    how = _Loss(
        ignore_index,
        number(op, "label_smoothing", label_smoothing, "choose 0 <= label_smoothing <= 1", lambda share: 0 <= share <= 1),
        number(op, "softcap", softcap, "choose a positive cap, or 0 for none", lambda cap: 0 <= cap <= _LARGEST),
        number(op, "logit_scale", logit_scale, "choose a finite number", lambda scale: abs(scale) <= _LARGEST),
        _chunk(op, chunk, tokens),
    )
    one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    hidden, weight, labels = alike(hidden, weight, labels)
    losses = _losses(hidden, weight, labels, how)
    if reduction == "none":
        return losses
    total = jnp.sum(losses)
    if reduction == "sum":
        return total
    per_sequence = jnp.sum(labels != ignore_index, -1, dtype=jnp.int32)  # no single axis has 2^31 tokens, but all together may
    return total / jnp.sum(per_sequence.astype(total.dtype))
