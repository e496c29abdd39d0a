"""docs/format.md and docs/math.md in plain numpy: written for reading, derived from those texts and not from the C++.

Formats work on arrays of shape [rows, cols] of float16, float32 or float64; bfloat16 values are float32 arrays made by
`from_bfloat16`. Mathematics is done in float64. `python -m unswag.reference --vectors DIR` writes the golden files.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]

FORMAT_VERSION = "1.0"

# ---- format.md section 1: rows -----------------------------------------------------------------------------------------


def row_bytes(cols: int, bits: int) -> int:
    return 4 * math.ceil(cols * bits / 32)


def pack(bit: Bools) -> Bytes:
    """One bit per element, [rows, cols] → [rows, row_bytes]."""
    rows, cols = bit.shape
    padded = np.zeros((rows, 8 * row_bytes(cols, 1)), np.uint8)
    padded[:, :cols] = bit
    bytes_of_eight = padded.reshape(rows, row_bytes(cols, 1), 8) << np.arange(8, dtype=np.uint8)
    return bytes_of_eight.sum(-1).astype(np.uint8)


def unpack(packed: Bytes, cols: int) -> Bools:
    bit = (packed[:, :, None] >> np.arange(8, dtype=np.uint8)) & 1
    return bit.reshape(len(packed), 8 * packed.shape[1])[:, :cols].astype(bool)


# ---- format.md section 2: one-bit masks --------------------------------------------------------------------------------


def not_le_zero(x: Array) -> Bools:
    return ~(x <= 0)


def gt_zero(x: Array) -> Bools:
    return x > 0


def not_le_zero_or_ge_six(x: Array) -> Bools:
    return ~((x <= 0) | (x >= 6))


def ge_zero(x: Array) -> Bools:
    return x >= 0


def gt_zero_and_lt_six(x: Array) -> Bools:
    return (x > 0) & (x < 6)


PREDICATES = {
    "relu": not_le_zero,
    "leaky_relu": gt_zero,
    "relu6": not_le_zero_or_ge_six,
    "jax_relu": gt_zero,
    "jax_leaky_relu": ge_zero,
    "jax_relu6": gt_zero_and_lt_six,
}
_LEAKY = ("leaky_relu", "jax_leaky_relu")


def mask_value(x: Array, act: str, slope: float = 0.0) -> Array:
    if act == "relu":
        return np.where(x < 0, x.dtype.type(0), x)
    if act in _LEAKY:
        with np.errstate(invalid="ignore"):  # 0 inf
            return np.where(PREDICATES[act](x), x, (x.astype(np.float64) * slope).astype(x.dtype))
    if act.startswith("jax"):  # -0 becomes +0
        return np.where(x <= 0, x.dtype.type(0), np.where(x > 6, x.dtype.type(6), x) if act == "jax_relu6" else x)
    return np.where(x < 0, x.dtype.type(0), np.where(x > 6, x.dtype.type(6), x))


def mask_forward(x: Array, act: str, slope: float = 0.0) -> tuple[Array, Bytes]:
    return mask_value(x, act, slope), pack(PREDICATES[act](x))


def mask_backward(dy: Array, packed: Bytes, act: str, slope: float = 0.0) -> Array:
    off = (dy.astype(np.float64) * slope).astype(dy.dtype) if act in _LEAKY else dy.dtype.type(0)
    return np.where(unpack(packed, dy.shape[1]), dy, off)


# ---- format.md section 3: random draws ---------------------------------------------------------------------------------

_WORD = 0xFFFF_FFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _WORD, (a >> 32) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def draw(i: int, seed: int, offset: int) -> int:
    counter = offset + i // 4
    words = (counter & _WORD, counter >> 32 & _WORD, counter >> 64 & _WORD, counter >> 96 & _WORD)
    return philox4x32(words, (seed & _WORD, seed >> 32))[i % 4]


# ---- format.md section 4: dropout --------------------------------------------------------------------------------------


def dropout_keep(rows: int, cols: int, p: float, seed: int, offset: int) -> Bools:
    threshold = p * 2.0**32
    return np.array([draw(i, seed, offset) >= threshold for i in range(rows * cols)], bool).reshape(rows, cols)


def dropout(x: Array, p: float, seed: int, offset: int) -> Array:
    keep = dropout_keep(x.shape[0], x.shape[1], p, seed, offset)
    return np.where(keep, x.astype(np.float64) / (1 - p), 0.0).astype(x.dtype)


# ---- format.md section 5: step codes ------------------------------------------------------------------------------------

Codes = NDArray[np.uint32]


def step_code(x: Array, bounds: tuple[float, ...]) -> Codes:
    """The number of bounds strictly below x; bounds are rounded to float32, or not at all for a float64 x."""
    rounded = np.asarray(bounds, np.promote_types(x.dtype, np.float32))
    return (x[:, :, None] > rounded).sum(-1).astype(np.uint32)


def pack_codes(code: Codes, bits: int) -> Bytes:
    """[rows, cols] → [rows, row_bytes]: bit k of field i is bit i bits + k of the row."""
    rows, cols = code.shape
    bit = code[:, :, None] >> np.arange(bits, dtype=np.uint32) & 1
    return pack(bit.reshape(rows, cols * bits).astype(bool))


def unpack_codes(packed: Bytes, cols: int, bits: int) -> Codes:
    bit = unpack(packed, cols * bits).reshape(len(packed), cols, bits)
    return (bit << np.arange(bits, dtype=np.uint32)).sum(-1).astype(np.uint32)


# ---- format.md section 6: rows in groups of 256 ------------------------------------------------------------------------


def pack_rows256(code: Codes, bits: int) -> NDArray[np.uint32]:
    """[rows, cols] → [8 bits ceil(rows / 256), cols]."""
    rows, cols = code.shape
    groups = math.ceil(rows / 256)
    words = np.zeros((groups, bits, 8, cols), np.uint32)
    for row in range(rows):
        group, tile, word = row // 256, row % 256 // 8, row % 8
        for plane in range(bits):
            words[group, plane, word] |= (code[row] >> np.uint32(plane) & 1) << np.uint32(tile)
    return words.reshape(groups * bits * 8, cols)


def unpack_rows256(words: NDArray[np.uint32], rows: int, bits: int) -> Codes:
    planes = words.reshape(math.ceil(rows / 256), bits, 8, words.shape[1])
    code = np.zeros((rows, words.shape[1]), np.uint32)
    for row in range(rows):
        group, tile, word = row // 256, row % 256 // 8, row % 8
        for plane in range(bits):
            code[row] |= (planes[group, plane, word] >> np.uint32(tile) & 1) << np.uint32(plane)
    return code


# ---- format.md section 7: dither ----------------------------------------------------------------------------------------

LOWEST_SLOPE = {"silu": -0.09983932012886692, "gelu": -0.12890414518515479, "gelu_tanh": -0.12899306865877177}


def dither_units(rows: int, cols: int, seed: int, offset: int) -> NDArray[np.float64]:
    """v of each element, in (0, 1): element i has half i % 2 of draw i / 2, the low one first."""
    draws = [draw(i, seed, offset) for i in range((rows * cols + 1) // 2)]
    halves = np.array([half for word in draws for half in (word & 0xFFFF, word >> 16)], np.float64)
    return ((2 * halves[: rows * cols] + 1) / 2**17).reshape(rows, cols)


def dither_step(act: str, bits: int) -> float:
    return (1 - 2 * LOWEST_SLOPE[act]) / (2**bits - 1)


def dithered(x: Array, act: str, bits: int, seed: int, offset: int) -> NDArray[np.float64]:
    """t + v, whose integral part is the code."""
    t = (activation_derivative(x, act) - LOWEST_SLOPE[act]) / dither_step(act, bits)
    return t + dither_units(x.shape[0], x.shape[1], seed, offset)


def dither_code(x: Array, act: str, bits: int, seed: int, offset: int) -> Codes:
    return np.clip(np.floor(np.nan_to_num(dithered(x, act, bits, seed, offset))), 0, 2**bits - 1).astype(np.uint32)


def dither_factor(code: Codes, act: str, bits: int, seed: int, offset: int) -> NDArray[np.float64]:
    """What stands for the derivative in the backward."""
    return LOWEST_SLOPE[act] + dither_step(act, bits) * (code + 0.5 - dither_units(code.shape[0], code.shape[1], seed, offset))


# ---- format.md section 8: non-zeros -------------------------------------------------------------------------------------

Offsets = NDArray[np.int64]


def nonzero_encode(x: NDArray[np.generic]) -> tuple[Bytes, Offsets, NDArray[np.generic]]:
    """x of any type, or the bits of its elements: bitmap [rows, row_bytes], offsets [rows + 1], values."""
    kept = x.view(f"u{x.itemsize}") != 0
    offsets = np.concatenate([[0], np.cumsum(kept.sum(-1))]).astype(np.int64)
    return pack(kept), offsets, x[kept]


def nonzero_decode(bitmap: Bytes, offsets: Offsets, values: NDArray[np.generic], cols: int) -> NDArray[np.generic]:
    x = np.zeros((len(bitmap), cols), values.dtype)
    for row, kept in enumerate(unpack(bitmap, cols)):
        x[row, kept] = values[offsets[row] : offsets[row + 1]]
    return x


# ---- bfloat16: the upper half of a float32 -----------------------------------------------------------------------------


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even; a NaN stays a NaN."""
    u = x.view(np.uint32)
    rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16
    return np.where(np.isnan(x), u >> 16 | 0x40, rounded).astype(np.uint16)


# ---- format.md section 9: block codecs -----------------------------------------------------------------------------------

_BLOCK = {"int8": (32, 8), "int4": (16, 4), "int2": (64, 2), "e4m3": (32, 8), "e5m2": (32, 8)}  # numbers, bits
_FP8 = {"e4m3": (3, 7, 448.0, 0x7E), "e5m2": (2, 15, 57344.0, 0x7B)}  # mantissa, bias, largest, its code


def block_row_bytes(codec: str, cols: int) -> int:
    n, bits = _BLOCK[codec]
    return 4 * math.ceil(math.ceil(cols / n) * (n * bits // 8 + 2) / 4)


def hadamard(n: int) -> NDArray[np.float64]:
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def _rotated(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """H block, by butterflies of pairs 1, 2, 4, … apart, each sum rounded to float32."""
    t = block.copy()
    half = 1
    while half < len(t):
        pairs = t.reshape(-1, 2, half)
        t = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).reshape(-1)
        half *= 2
    return t


def _fp8_values(codec: str) -> NDArray[np.float64]:
    """Of the codes 0 to the largest, ascending."""
    mantissa, bias, _, largest = _FP8[codec]
    code = np.arange(largest + 1)
    exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
    return np.where(
        exponent == 0, fraction * 2.0 ** (1 - bias - mantissa), (1 + fraction / 2.0**mantissa) * 2.0 ** (exponent - bias)
    )


def _fp8(v: NDArray[np.float32], codec: str) -> NDArray[np.uint8]:
    """The nearest, of two as near the one with the even code; of NaN 0."""
    values = _fp8_values(codec)
    v = np.nan_to_num(v, nan=0.0)
    magnitude = np.minimum(np.abs(v.astype(np.float64)), values[-1])
    above = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    low, high = magnitude - values[above - 1], values[above] - magnitude
    up = (high < low) | ((high == low) & (above % 2 == 0))
    return (np.where(up, above, above - 1) | np.signbit(v) * 0x80).astype(np.uint8)


def _block_scale(codec: str, block: NDArray[np.float32], t: NDArray[np.float32], stochastic: bool) -> np.float32:
    """A bfloat16 as float32; NaN where a number of the block is not finite."""
    n, bits = _BLOCK[codec]
    f32, whole = np.float32, 2 ** (bits - 1)
    if not np.isfinite(block).all() or not np.isfinite(t).all():
        return f32(np.nan)
    extreme = t[np.argmax(np.abs(t))]
    if codec in _FP8:
        scale = np.abs(extreme) / f32(_FP8[codec][2])
    elif codec == "int2" and not stochastic:
        squares = f32(0)
        for v in t:
            squares = squares + v * v
        if not np.isfinite(squares):
            return f32(np.nan)
        scale = f32(0.498) * np.sqrt(squares / f32(n))
    else:
        scale = np.abs(extreme) / f32(3 if codec == "int2" else whole - 1) if stochastic else extreme / f32(-whole)
    if scale == 0:
        return f32(0)
    scale = np.copysign(np.maximum(np.abs(scale), f32(2.0**-100)), scale)
    bits_up: np.float32 = ((scale.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(f32)
    return bits_up


def _block_code(codec: str, v: NDArray[np.float32], u: NDArray[np.float32] | None) -> NDArray[np.uint8]:
    """Of v = t / scale; u: stochastic."""
    _, bits = _BLOCK[codec]
    if codec in _FP8:
        return _fp8(v, codec)
    if codec == "int2":
        code = (v[:, None] > np.array([-2, 0, 2], np.float32)).sum(-1) if u is None else np.floor((v + 3) * np.float32(0.5) + u)
        return np.clip(np.nan_to_num(code, nan=3), 0, 3).astype(np.uint8)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    whole = np.round(v) if u is None else np.floor(v + u)
    return (np.clip(np.nan_to_num(whole, nan=high), low, high) - low).astype(np.uint8)


def _group_blocks(codec: str, cols: int) -> list[tuple[int, int]]:
    """(first element, blocks) of each group of a row."""
    n, _ = _BLOCK[codec]
    blocks = math.ceil(cols / n)
    return [(16 * n * g, min(16, blocks - 16 * g)) for g in range(math.ceil(blocks / 16))]


def block_encode(x: Array, codec: str, stochastic: bool = False, seed: int = 0, offset: int = 0) -> Bytes:
    n, bits = _BLOCK[codec]
    rows, cols = x.shape
    out = np.zeros((rows, block_row_bytes(codec, cols)), np.uint8)
    blocks = math.ceil(cols / n)
    with np.errstate(all="ignore"):
        for row in range(rows):
            padded = np.zeros(blocks * n, np.float32)
            padded[:cols] = x[row].astype(np.float32)
            codes, scales = np.zeros(blocks * n, np.uint8), []
            for start, lanes in _group_blocks(codec, cols):
                for lane in range(lanes):
                    at = start + lane + lanes * np.arange(n)
                    block = padded[at]
                    t = block if codec in _FP8 else _rotated(block)
                    scale = _block_scale(codec, block, t, stochastic)
                    inverse = np.float32(0) if not abs(scale) > 0 else np.float32(1) / scale
                    u = None
                    if stochastic:
                        halves = [draw(i // 2, seed, offset) >> 16 * (i % 2) & 0xFFFF for i in (row * blocks * n + at).tolist()]
                        u = np.array([(2 * half + 1) / 2**17 for half in halves], np.float32)
                    codes[at] = _block_code(codec, t * inverse, u)
                    scales.append(scale)
            per = 8 // bits
            packed = (codes.reshape(-1, per) << (np.arange(per, dtype=np.uint8) * bits)).sum(-1).astype(np.uint8)
            halves16 = (np.array(scales, np.float32).view(np.uint32) >> 16).astype("<u2")
            used = np.concatenate([packed, halves16.view(np.uint8)])
            out[row, : len(used)] = used
    return out


def block_decode(packed: Bytes, codec: str, cols: int) -> Array:
    """In float64, not yet rounded to a dtype."""
    n, bits = _BLOCK[codec]
    blocks = math.ceil(cols / n)
    x = np.zeros((len(packed), blocks * n))
    per, end = 8 // bits, blocks * n * bits // 8
    for row, line in enumerate(packed):
        code = (line[:end, None] >> (np.arange(per, dtype=np.uint8) * bits) & (2**bits - 1)).reshape(-1)
        scale = from_bfloat16(line[end : end + 2 * blocks].copy().view("<u2")).astype(np.float64)
        number = 0
        for start, lanes in _group_blocks(codec, cols):
            for lane in range(lanes):
                at = start + lane + lanes * np.arange(n)
                c = code[at].astype(np.int64)
                if codec in _FP8:
                    value = np.where(c & 0x80, -1.0, 1.0) * _fp8_values(codec)[c & 0x7F]
                    x[row, at] = value * scale[number]
                else:
                    q = 2 * c - 3 if codec == "int2" else c - 2 ** (bits - 1)
                    x[row, at] = hadamard(n) @ q * (scale[number] / n)
                number += 1
    return x[:, :cols]


# ---- math.md: activations, in float64 ----------------------------------------------------------------------------------

_erfc = np.vectorize(math.erfc, otypes=[np.float64])
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715
_QUICK_SCALE = 1.702


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1, e) / (1 + e)


def _normal(x: Array) -> Array:
    """Phi(x), the normal distribution."""
    return _erfc(-x / math.sqrt(2)) / 2


def activation(x: Array, act: str) -> Array:
    x = x.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if act == "silu":
            return x * _sigmoid(x)
        if act == "gelu":
            return x * _normal(x)
        if act == "gelu_tanh":  # (1 + tanh u) / 2 = sigmoid(2 u)
            return x * _sigmoid(2 * _TANH_SCALE * (x + _TANH_CUBE * x**3))
        if act == "quick_gelu":
            return x * _sigmoid(_QUICK_SCALE * x)
        relu = np.where(x < 0, 0.0, x)
        return relu * relu if act == "relu2" else relu


def activation_derivative(x: Array, act: str) -> Array:
    x = x.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if act == "silu":
            s = _sigmoid(x)
            return s + x * s * _sigmoid(-x)
        if act == "gelu":
            return _normal(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        if act == "gelu_tanh":
            u = 2 * _TANH_SCALE * (x + _TANH_CUBE * x**3)
            s = _sigmoid(u)
            return s + x * s * _sigmoid(-u) * 2 * _TANH_SCALE * (1 + 3 * _TANH_CUBE * x**2)
        if act == "quick_gelu":
            s = _sigmoid(_QUICK_SCALE * x)
            return s + _QUICK_SCALE * x * s * _sigmoid(-_QUICK_SCALE * x)
        if act == "relu2":
            return np.where(x < 0, 0.0, 2 * x)
        return not_le_zero(x).astype(np.float64)


# ---- math.md: gated units, RMSNorm, LayerNorm, cross-entropy, in float64 -----------------------------------------------


def gated_forward(gate: Array, up: Array, act: str) -> Array:
    return activation(gate, act) * up


def gated_backward(gate: Array, up: Array, dh: Array, act: str) -> tuple[Array, Array]:
    return dh * up * activation_derivative(gate, act), dh * activation(gate, act)


def rms_norm_forward(x: Array, weight: Array | None, eps: float, weight_offset: float = 0.0) -> tuple[Array, Array]:
    x = x.astype(np.float64)
    rstd = 1 / np.sqrt((x * x).mean(-1) + eps)
    factor = 1.0 if weight is None else weight_offset + weight.astype(np.float64)
    return x * rstd[:, None] * factor, rstd


def rms_norm_backward(
    x: Array, rstd: Array, weight: Array | None, dy: Array, weight_offset: float = 0.0
) -> tuple[Array, Array]:
    xhat = x.astype(np.float64) * rstd[:, None]
    g = dy * (1.0 if weight is None else weight_offset + weight.astype(np.float64))
    dx = rstd[:, None] * (g - xhat * (g * xhat).mean(-1, keepdims=True))
    return dx, (dy * xhat).sum(0)


def layer_norm_forward(x: Array, weight: Array | None, bias: Array | None, eps: float) -> tuple[Array, Array, Array]:
    x = x.astype(np.float64)
    mean = x.mean(-1)
    rstd = 1 / np.sqrt(((x - mean[:, None]) ** 2).mean(-1) + eps)
    y = (x - mean[:, None]) * rstd[:, None]
    if weight is not None:
        y = y * weight.astype(np.float64)
    if bias is not None:
        y = y + bias.astype(np.float64)
    return y, mean, rstd


def layer_norm_backward(x: Array, mean: Array, rstd: Array, weight: Array | None, dy: Array) -> tuple[Array, Array, Array]:
    """dx, dw, db."""
    xhat = (x.astype(np.float64) - mean[:, None]) * rstd[:, None]
    g = dy * (1.0 if weight is None else weight.astype(np.float64))
    dx = rstd[:, None] * (g - g.mean(-1, keepdims=True) - xhat * (g * xhat).mean(-1, keepdims=True))
    return dx, (dy * xhat).sum(0), dy.astype(np.float64).sum(0)


def cross_entropy(
    logits: Array,
    labels: NDArray[np.int64],
    class_weight: Array | None = None,
    row_scale: Array | None = None,
    gradient_scale: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
) -> tuple[Array, Array, Array]:
    """loss [rows], lse [rows], gradient [rows, classes] with respect to the logits; all 0 in ignored rows."""
    rows, classes = logits.shape
    z = logit_scale * logits.astype(np.float64)
    dz = np.full_like(z, logit_scale)
    if softcap:
        z = softcap * np.tanh(z / softcap)
        dz *= 1 - (z / softcap) ** 2
    top = z.max(-1)
    lse = top + np.log(np.exp(z - top[:, None]).sum(-1))
    w = np.ones(classes) if class_weight is None else class_weight.astype(np.float64)
    loss, gradient = np.zeros(rows), np.zeros_like(z)
    for row, label in enumerate(labels):
        if label == ignore_index:
            lse[row] = 0
            continue
        # The target: (1 - smoothing) on the label, smoothing / classes on each class, all times the class weights.
        target = label_smoothing / classes * w
        target[label] += (1 - label_smoothing) * w[label]
        loss[row] = (target * (lse[row] - z[row])).sum()
        softmax = np.exp(z[row] - lse[row])
        scale = gradient_scale * (1.0 if row_scale is None else float(row_scale[row]))
        gradient[row] = (target.sum() * softmax - target) * dz[row] * scale
    return loss, lse, gradient


# ---- golden files ------------------------------------------------------------------------------------------------------
# Lines of words: "case NAME key=value …" opens a case; "NAME dtype rows cols WORD…" is a tensor whose words are the hexadecimal
# bits of its elements, row after row.  Everything in a file is exact: bytes, or float64 truth for an error bound.


def _special(rng: np.random.Generator, rows: int, cols: int) -> NDArray[np.float32]:
    """Values of every kind; each row starts elsewhere among the special ones."""
    below_six = np.nextafter(np.float32(6), np.float32(0))
    special = [0.0, -0.0, math.nan, math.inf, -math.inf, 6.0, below_six, 1e-45, -1e-45, 1e-39, 6e-8, -1.0, 65504.0]
    x = (rng.standard_normal((rows, cols)) * 4).astype(np.float32)
    for i in range(rows * cols):
        if i % 3 == 0:
            x.flat[i] = special[i // 3 % len(special)]
    return x


def _line(name: str, dtype: str, x: NDArray[np.generic]) -> str:
    """`dtype` names the format of the elements; x holds them, or their bits."""
    width = {"float64": 16, "float32": 8, "float16": 4, "bfloat16": 4, "uint32": 8, "uint8": 2, "int64": 16}[dtype]
    x = np.ascontiguousarray(np.atleast_2d(x))
    bits = x.view({16: np.uint64, 8: np.uint32, 4: np.uint16, 2: np.uint8}[width])
    return " ".join([name, dtype, *map(str, x.shape), *(f"{int(v):0{width}x}" for v in bits.flat)])


def _as(x: NDArray[np.float32], dtype: str) -> tuple[NDArray[np.generic], Array]:
    """x rounded to `dtype`: what is stored, and its value."""
    if dtype == "bfloat16":
        bits = to_bfloat16(x)
        return bits, from_bfloat16(bits)
    with np.errstate(over="ignore", under="ignore"):
        rounded = x.astype(dtype)
    return rounded, rounded


def _mask_vectors(rng: np.random.Generator, acts: list[str]) -> Iterator[str]:
    for act in acts:
        slope = 0.25 if act in _LEAKY else 0.0  # a power of two: slope x is exact
        for dtype in ("float32", "float16", "bfloat16", "float64"):
            for rows, cols in ((1, 1), (3, 7), (2, 8), (2, 31), (2, 32), (3, 33), (2, 100)):
                stored, value = _as(_special(rng, rows, cols), dtype)
                yield f"case mask act={act} slope={slope}"
                yield _line("x", dtype, stored)
                yield _line("packed", "uint8", pack(PREDICATES[act](value)))


def _philox_vectors() -> Iterator[str]:
    for seed, offset, n in ((0, 0, 9), (0x0123456789ABCDEF, 5, 16), (2**64 - 1, 2**64 - 2, 13), (1, 2**32 - 1, 8)):
        yield f"case philox seed={seed} offset={offset}"
        yield _line("draws", "uint32", np.array([draw(i, seed, offset) for i in range(n)], np.uint32))


def _dropout_vectors(rng: np.random.Generator) -> Iterator[str]:
    for p, seed, offset in ((0.5, 0, 0), (0.5, 7, 2**63), (0.0, 3, 1), (0.75, 2**64 - 1, 11)):  # 1 / (1 - p) is exact
        for dtype in ("float32", "float16", "bfloat16", "float64"):
            stored, value = _as(rng.standard_normal((3, 37)).astype(np.float32), dtype)
            yield f"case dropout p={p} seed={seed} offset={offset}"
            yield _line("x", dtype, stored)
            dropped = dropout(value, p, seed, offset)
            yield _line("y", dtype, to_bfloat16(dropped.astype(np.float32)) if dtype == "bfloat16" else dropped)


def _code_vectors(rng: np.random.Generator) -> Iterator[str]:
    bounds: dict[int, tuple[float, ...]] = {1: (0.0,), 2: (-1.5, 0.25, 1.5), 3: (-3.0, -1.5, -0.5, 0.0, 0.5, 1.5, 3.0)}
    bounds[4] = tuple(k / 2 - 3.5 for k in range(15))
    for bits in bounds:
        for dtype in ("float32", "bfloat16"):
            for rows, cols in ((1, 1), (3, 31), (2, 33), (259, 2)):
                stored, value = _as(_special(rng, rows, cols), dtype)
                code = step_code(value, bounds[bits])
                yield f"case codes bits={bits} bounds={','.join(map(str, bounds[bits]))}"
                yield _line("x", dtype, stored)
                yield _line("rows", "uint8", pack_codes(code, bits))
                yield _line("rows256", "uint32", pack_rows256(code, bits))


def _block_vectors(rng: np.random.Generator) -> Iterator[str]:
    for codec in _BLOCK:
        for dtype, rows, cols in (
            ("float32", 2, 1),
            ("float32", 2, 70),
            ("bfloat16", 1, 1100),
            ("float16", 3, 64),
            ("float64", 1, 33),
        ):
            for stochastic in (False, True):
                if stochastic and (codec in _FP8 or cols > 100):
                    continue
                x = rng.standard_normal((rows, cols)).astype(np.float32)
                x[0, ::7] *= 30
                if rows == 3:
                    x[1, 5], x[2] = math.inf, 0
                stored, value = _as(x, dtype)
                packed = block_encode(value, codec, stochastic, 5, 2**33)
                yield f"case block codec={codec} stochastic={int(stochastic)} seed=5 offset={2**33}"
                yield _line("x", dtype, stored)
                yield _line("packed", "uint8", packed)
                yield _line("decoded", "float64", block_decode(packed, codec, cols))


def _dither_vectors(rng: np.random.Generator) -> Iterator[str]:
    """No t + v is so near to a whole number that a backend's rounding of f'(x) could show in the bytes."""
    for act in LOWEST_SLOPE:
        for bits, seed, offset in ((1, 0, 0), (2, 7, 2**63), (3, 2**64 - 1, 11), (4, 5, 2**64 - 1)):
            for dtype in ("float32", "bfloat16"):
                stored, value = _as((rng.standard_normal((3, 37)) * 2).astype(np.float32), dtype)
                away = dithered(value, act, bits, seed, offset)
                sure = np.abs(away - np.round(away)) > 1e-3
                stored, value = np.where(sure, stored, stored.dtype.type(0)), np.where(sure, value, np.float32(0))
                away = dithered(value, act, bits, seed, offset)
                assert (np.abs(away - np.round(away)) > 1e-4).all()
                dy, dy_value = _as(rng.standard_normal((3, 37)).astype(np.float32), dtype)
                code = dither_code(value, act, bits, seed, offset)
                yield f"case dither act={act} bits={bits} seed={seed} offset={offset}"
                yield _line("x", dtype, stored)
                yield _line("packed", "uint8", pack_codes(code, bits))
                yield _line("dy", dtype, dy)
                yield _line("dx", "float64", dy_value * dither_factor(code, act, bits, seed, offset))


def _nonzero_vectors(rng: np.random.Generator) -> Iterator[str]:
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        for rows, cols in ((1, 1), (3, 7), (2, 32), (3, 33), (2, 100)):
            stored, _ = _as(np.where(rng.random((rows, cols)) < 0.4, np.float32(0), _special(rng, rows, cols)), dtype)
            bitmap, offsets, values = nonzero_encode(stored)
            yield "case nonzero"
            yield _line("x", dtype, stored)
            yield _line("bitmap", "uint8", bitmap)
            yield _line("offsets", "int64", offsets)
            yield _line("values", dtype, values)


def _gated_vectors(rng: np.random.Generator, acts: list[str]) -> Iterator[str]:
    for act in acts:
        for dtype in ("float32", "bfloat16"):
            tensors = [_as((rng.standard_normal((3, 37)) * 3).astype(np.float32), dtype) for _ in range(3)]
            (gate, up, dh), (g, u, d) = zip(*tensors, strict=True)
            dgate, dup = gated_backward(g, u, d, act)
            yield f"case gated act={act}"
            yield _line("gate", dtype, gate)
            yield _line("up", dtype, up)
            yield _line("dh", dtype, dh)
            yield _line("h", "float64", gated_forward(g, u, act))
            yield _line("dgate", "float64", dgate)
            yield _line("dup", "float64", dup)


def _rms_norm_vectors(rng: np.random.Generator) -> Iterator[str]:
    for weight_offset in (0.0, 1.0):
        x, w, dy = ((rng.standard_normal(shape) * 2).astype(np.float32) for shape in ((5, 67), 67, (5, 67)))
        y, rstd = rms_norm_forward(x, w, 1e-6, weight_offset)
        dx, dw = rms_norm_backward(x, rstd, w, dy, weight_offset)
        yield f"case rms_norm eps=1e-6 weight_offset={weight_offset}"
        for name, value in (("x", x), ("weight", w), ("dy", dy)):
            yield _line(name, "float32", value)
        for name, truth in (("y", y), ("rstd", rstd), ("dx", dx), ("dw", dw)):
            yield _line(name, "float64", truth)


def _layer_norm_vectors(rng: np.random.Generator) -> Iterator[str]:
    for shift in (0.0, 30.0):  # a mean far from 0
        x, w, b, dy = ((rng.standard_normal(shape) * 2).astype(np.float32) for shape in ((5, 67), 67, 67, (5, 67)))
        x += np.float32(shift)
        y, mean, rstd = layer_norm_forward(x, w, b, 1e-5)
        dx, dw, db = layer_norm_backward(x, mean, rstd, w, dy)
        yield "case layer_norm eps=1e-5"
        for name, value in (("x", x), ("weight", w), ("bias", b), ("dy", dy)):
            yield _line(name, "float32", value)
        for name, truth in (("y", y), ("mean", mean), ("rstd", rstd), ("dx", dx), ("dw", dw), ("db", db)):
            yield _line(name, "float64", truth)


def _cross_entropy_vectors(rng: np.random.Generator) -> Iterator[str]:
    for smoothing, softcap, scale in ((0.0, 0.0, 1.0), (0.1, 0.0, 1.0), (0.1, 30.0, 0.5)):
        logits = (rng.standard_normal((6, 83)) * 8).astype(np.float32)
        labels = np.array([0, 82, -100, 5, 41, 7], np.int64)
        loss, lse, gradient = cross_entropy(logits, labels, label_smoothing=smoothing, softcap=softcap, logit_scale=scale)
        yield f"case cross_entropy ignore_index=-100 label_smoothing={smoothing} softcap={softcap} logit_scale={scale}"
        yield _line("logits", "float32", logits)
        yield _line("labels", "int64", labels)
        for name, truth in (("loss", loss), ("lse", lse), ("gradient", gradient)):
            yield _line(name, "float64", truth)


def vectors() -> dict[str, str]:
    """File name → text of every golden file."""
    rng = np.random.default_rng(20240229)
    files = {
        "mask": _mask_vectors(rng, ["relu", "leaky_relu", "relu6"]),
        "philox": _philox_vectors(),
        "dropout": _dropout_vectors(rng),
        "gated": chain(
            _gated_vectors(rng, ["silu", "gelu", "gelu_tanh", "relu"]),
            _gated_vectors(np.random.default_rng(20240301), ["relu2", "quick_gelu"]),
        ),
        "rms_norm": _rms_norm_vectors(rng),
        "cross_entropy": _cross_entropy_vectors(rng),
        "codes": _code_vectors(rng),
        "block": _block_vectors(np.random.default_rng(9)),
        "jax_mask": _mask_vectors(rng, ["jax_relu", "jax_leaky_relu", "jax_relu6"]),
        "layer_norm": _layer_norm_vectors(np.random.default_rng(20240302)),
        "dither": _dither_vectors(np.random.default_rng(7)),
        "nonzero": _nonzero_vectors(np.random.default_rng(8)),
    }
    return {f"{name}.txt": "\n".join([f"format {FORMAT_VERSION}", *lines, ""]) for name, lines in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m unswag.reference", description="Writes the golden files.")
    parser.add_argument("--vectors", type=Path, required=True, metavar="DIR")
    directory: Path = parser.parse_args().vectors
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in vectors().items():
        (directory / name).write_text(text)


if __name__ == "__main__":
    main()
