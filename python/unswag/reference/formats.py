"""docs/format.md in plain numpy: written for reading, derived from that text and not from the C++.

Arrays are [rows, cols] of float16, float32 or float64; bfloat16 values are float32 arrays made by `from_bfloat16`. Packed bytes
are [rows, row bytes].
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from unswag.reference.math import activation_derivative

Array = NDArray[np.floating]
Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]

FORMAT_VERSION = "1.0"

# ---- format.md section 1: rows -----------------------------------------------------------------------------------------


def row_bytes(cols: int, bits: int) -> int:
    """Bytes of a packed row: padded to a multiple of 4."""
    return 4 * math.ceil(cols * bits / 32)


def pack(bit: Bools) -> Bytes:
    """One bit per element, [rows, cols] → [rows, row_bytes]."""
    rows, cols = bit.shape
    padded = np.zeros((rows, 8 * row_bytes(cols, 1)), np.uint8)
    padded[:, :cols] = bit
    bytes_of_eight = padded.reshape(rows, row_bytes(cols, 1), 8) << np.arange(8, dtype=np.uint8)
    return bytes_of_eight.sum(-1).astype(np.uint8)


def unpack(packed: Bytes, cols: int) -> Bools:
    """The inverse of `pack`."""
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


PREDICATES = {  # the bit of each mask
    "relu": not_le_zero,
    "leaky_relu": gt_zero,
    "relu6": not_le_zero_or_ge_six,
    "jax_relu": gt_zero,
    "jax_leaky_relu": ge_zero,
    "jax_relu6": gt_zero_and_lt_six,
}
LEAKY = ("leaky_relu", "jax_leaky_relu")


def mask_value(x: Array, act: str, slope: float = 0.0) -> Array:
    """y = act(x), in the dtype of x. Those of JAX turn -0 into +0."""
    if act == "relu":
        return np.where(x < 0, x.dtype.type(0), x)
    if act in LEAKY:
        with np.errstate(invalid="ignore"):  # 0 inf
            return np.where(PREDICATES[act](x), x, (x.astype(np.float64) * slope).astype(x.dtype))
    if act.startswith("jax"):
        return np.where(x <= 0, x.dtype.type(0), np.where(x > 6, x.dtype.type(6), x) if act == "jax_relu6" else x)
    return np.where(x < 0, x.dtype.type(0), np.where(x > 6, x.dtype.type(6), x))


def mask_forward(x: Array, act: str, slope: float = 0.0) -> tuple[Array, Bytes]:
    """(y, the packed mask)."""
    return mask_value(x, act, slope), pack(PREDICATES[act](x))


def mask_backward(dy: Array, packed: Bytes, act: str, slope: float = 0.0) -> Array:
    """dx: dy where the bit is set, else slope dy for a leaky mask and 0 for the others."""
    off = (dy.astype(np.float64) * slope).astype(dy.dtype) if act in LEAKY else dy.dtype.type(0)
    return np.where(unpack(packed, dy.shape[1]), dy, off)


# ---- format.md section 3: random draws ---------------------------------------------------------------------------------

_WORD = 0xFFFF_FFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox 4x32-10 (Salmon et al. 2011): four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _WORD, (a >> 32) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def draw(i: int, seed: int, offset: int) -> int:
    """The i-th 32-bit word of the stream (seed, offset)."""
    counter = offset + i // 4
    words = (counter & _WORD, counter >> 32 & _WORD, counter >> 64 & _WORD, counter >> 96 & _WORD)
    return philox4x32(words, (seed & _WORD, seed >> 32))[i % 4]


# ---- format.md section 4: dropout --------------------------------------------------------------------------------------


def dropout_keep(rows: int, cols: int, p: float, seed: int, offset: int) -> Bools:
    """Which elements are kept, each with probability 1 - p."""
    threshold = p * 2.0**32
    return np.array([draw(i, seed, offset) >= threshold for i in range(rows * cols)], bool).reshape(rows, cols)


def dropout(x: Array, p: float, seed: int, offset: int) -> Array:
    """x / (1 - p) where it is kept, else 0; computed in float64, in the dtype of x."""
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
    """The inverse of `pack_codes`."""
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
    """The inverse of `pack_rows256`."""
    planes = words.reshape(math.ceil(rows / 256), bits, 8, words.shape[1])
    code = np.zeros((rows, words.shape[1]), np.uint32)
    for row in range(rows):
        group, tile, word = row // 256, row % 256 // 8, row % 8
        for plane in range(bits):
            code[row] |= (planes[group, plane, word] >> np.uint32(tile) & 1) << np.uint32(plane)
    return code


# ---- format.md section 7: dither ----------------------------------------------------------------------------------------

# The activations that can be dithered, and the least value of their derivative.
LOWEST_SLOPE = {"silu": -0.09983932012886692, "gelu": -0.12890414518515479, "gelu_tanh": -0.12899306865877177}


def dither_units(rows: int, cols: int, seed: int, offset: int) -> NDArray[np.float64]:
    """v of each element, in (0, 1): element i has half i % 2 of draw i / 2, the low one first."""
    draws = [draw(i, seed, offset) for i in range((rows * cols + 1) // 2)]
    halves = np.array([half for word in draws for half in (word & 0xFFFF, word >> 16)], np.float64)
    return ((2 * halves[: rows * cols] + 1) / 2**17).reshape(rows, cols)


def dither_step(act: str, bits: int) -> float:
    """The distance between two levels."""
    return (1 - 2 * LOWEST_SLOPE[act]) / (2**bits - 1)


def dithered(x: Array, act: str, bits: int, seed: int, offset: int) -> NDArray[np.float64]:
    """t + v, whose integral part is the code."""
    t = (activation_derivative(x, act) - LOWEST_SLOPE[act]) / dither_step(act, bits)
    return t + dither_units(x.shape[0], x.shape[1], seed, offset)


def dither_code(x: Array, act: str, bits: int, seed: int, offset: int) -> Codes:
    """The code of each element, 0 for NaN."""
    return np.clip(np.floor(np.nan_to_num(dithered(x, act, bits, seed, offset))), 0, 2**bits - 1).astype(np.uint32)


def dither_factor(code: Codes, act: str, bits: int, seed: int, offset: int) -> NDArray[np.float64]:
    """The value that the backward uses for the derivative."""
    return LOWEST_SLOPE[act] + dither_step(act, bits) * (code + 0.5 - dither_units(code.shape[0], code.shape[1], seed, offset))


# ---- format.md section 8: non-zeros -------------------------------------------------------------------------------------

Offsets = NDArray[np.int64]


def nonzero_encode(x: NDArray[np.generic]) -> tuple[Bytes, Offsets, NDArray[np.generic]]:
    """x of any type, or the bits of its elements: bitmap [rows, row_bytes], offsets [rows + 1], values."""
    kept = x.view(f"u{x.itemsize}") != 0
    offsets = np.concatenate([[0], np.cumsum(kept.sum(-1))]).astype(np.int64)
    return pack(kept), offsets, x[kept]


def nonzero_decode(bitmap: Bytes, offsets: Offsets, values: NDArray[np.generic], cols: int) -> NDArray[np.generic]:
    """The inverse of `nonzero_encode`."""
    x = np.zeros((len(bitmap), cols), values.dtype)
    for row, kept in enumerate(unpack(bitmap, cols)):
        x[row, kept] = values[offsets[row] : offsets[row + 1]]
    return x


# ---- bfloat16: the upper half of a float32 -----------------------------------------------------------------------------


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bfloat16 numbers, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even; a NaN stays a NaN."""
    u = x.view(np.uint32)
    rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16
    return np.where(np.isnan(x), u >> 16 | 0x40, rounded).astype(np.uint16)


# ---- format.md section 9: block codecs -----------------------------------------------------------------------------------

# codec → (values per block, bits per value)
BLOCKS = {"int8": (32, 8), "int4": (16, 4), "int2": (64, 2), "e4m3": (32, 8), "e5m2": (32, 8)}
FP8 = {"e4m3": (3, 7, 448.0, 0x7E), "e5m2": (2, 15, 57344.0, 0x7B)}  # mantissa, bias, largest, its code


def block_row_bytes(codec: str, cols: int) -> int:
    """Bytes of an encoded row: the values of whole blocks, 2 bytes of scale for each block, padded to a multiple of 4."""
    n, bits = BLOCKS[codec]
    return 4 * math.ceil(math.ceil(cols / n) * (n * bits // 8 + 2) / 4)


def hadamard(n: int) -> NDArray[np.float64]:
    """The Hadamard matrix [n, n] in Sylvester's order; n is a power of two."""
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
    """The values of the codes 0 to the largest, ascending."""
    mantissa, bias, _, largest = FP8[codec]
    code = np.arange(largest + 1)
    exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
    return np.where(
        exponent == 0, fraction * 2.0 ** (1 - bias - mantissa), (1 + fraction / 2.0**mantissa) * 2.0 ** (exponent - bias)
    )


def _fp8(v: NDArray[np.float32], codec: str) -> NDArray[np.uint8]:
    """The code of the nearest value, ties to the even code; 0 for NaN."""
    values = _fp8_values(codec)
    v = np.nan_to_num(v, nan=0.0)
    magnitude = np.minimum(np.abs(v.astype(np.float64)), values[-1])
    above = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    low, high = magnitude - values[above - 1], values[above] - magnitude
    up = (high < low) | ((high == low) & (above % 2 == 0))
    return (np.where(up, above, above - 1) | np.signbit(v) * 0x80).astype(np.uint8)


def _block_scale(codec: str, block: NDArray[np.float32], t: NDArray[np.float32], stochastic: bool) -> np.float32:
    """The scale of a block, a bfloat16 as float32; NaN where a number of the block is not finite."""
    n, bits = BLOCKS[codec]
    f32, whole = np.float32, 2 ** (bits - 1)
    if not np.isfinite(block).all() or not np.isfinite(t).all():
        return f32(np.nan)
    extreme = t[np.argmax(np.abs(t))]
    if codec in FP8:
        scale = np.abs(extreme) / f32(FP8[codec][2])
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
    """The codes of v = t / scale; u holds the draws of stochastic rounding, None for the nearest."""
    _, bits = BLOCKS[codec]
    if codec in FP8:
        return _fp8(v, codec)
    if codec == "int2":
        code = (v[:, None] > np.array([-2, 0, 2], np.float32)).sum(-1) if u is None else np.floor((v + 3) * np.float32(0.5) + u)
        return np.clip(np.nan_to_num(code, nan=3), 0, 3).astype(np.uint8)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    whole = np.round(v) if u is None else np.floor(v + u)
    return (np.clip(np.nan_to_num(whole, nan=high), low, high) - low).astype(np.uint8)


def _group_blocks(codec: str, cols: int) -> list[tuple[int, int]]:
    """(first element, blocks) of each group of a row."""
    n, _ = BLOCKS[codec]
    blocks = math.ceil(cols / n)
    return [(16 * n * g, min(16, blocks - 16 * g)) for g in range(math.ceil(blocks / 16))]


def block_encode(x: Array, codec: str, stochastic: bool = False, seed: int = 0, offset: int = 0) -> Bytes:
    """x as [rows, block_row_bytes] in `codec`, one of BLOCKS."""
    n, bits = BLOCKS[codec]
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
                    t = block if codec in FP8 else _rotated(block)
                    scale = _block_scale(codec, block, t, stochastic)
                    inverse = np.float32(0) if not abs(scale) > 0 else np.float32(1) / scale
                    u = None
                    if stochastic:
                        halves = [draw(i // 2, seed, offset) >> 16 * (i % 2) & 0xFFFF for i in (row * blocks * n + at).tolist()]
                        u = np.array([(2 * half + 1) / 2**17 for half in halves], np.float32)
                    codes[at] = _block_code(codec, t * inverse, u)
                    scales.append(scale)
            packed = pack_codes(codes[None].astype(np.uint32), bits)[0, : blocks * n * bits // 8]
            halves16 = (np.array(scales, np.float32).view(np.uint32) >> 16).astype("<u2")
            used = np.concatenate([packed, halves16.view(np.uint8)])
            out[row, : len(used)] = used
    return out


def block_decode(packed: Bytes, codec: str, cols: int) -> Array:
    """[rows, cols] in float64, not yet rounded to a dtype."""
    n, bits = BLOCKS[codec]
    blocks = math.ceil(cols / n)
    x = np.zeros((len(packed), blocks * n))
    end = blocks * n * bits // 8
    for row, line in enumerate(packed):
        code = unpack_codes(line[None, :end], blocks * n, bits)[0]
        scale = from_bfloat16(line[end : end + 2 * blocks].copy().view("<u2")).astype(np.float64)
        number = 0
        for start, lanes in _group_blocks(codec, cols):
            for lane in range(lanes):
                at = start + lane + lanes * np.arange(n)
                c = code[at].astype(np.int64)
                if codec in FP8:
                    value = np.where(c & 0x80, -1.0, 1.0) * _fp8_values(codec)[c & 0x7F]
                    x[row, at] = value * scale[number]
                else:
                    q = 2 * c - 3 if codec == "int2" else c - 2 ** (bits - 1)
                    x[row, at] = hadamard(n) @ q * (scale[number] / n)
                number += 1
    return x[:, :cols]
