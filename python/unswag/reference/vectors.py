"""The golden files of tests/vectors, which hold every other implementation to the reference.

Lines of words: "case NAME key=value …" opens a case; "NAME dtype rows cols WORD…" is a tensor whose words are the hexadecimal
bits of its elements, row after row. Everything in a file is exact: bytes, or float64 truth for an error bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from unswag.reference.formats import (
    BLOCKS,
    FORMAT_VERSION,
    FP8,
    LEAKY,
    LOWEST_SLOPE,
    PREDICATES,
    Array,
    block_decode,
    block_encode,
    dither_code,
    dither_factor,
    dithered,
    draw,
    dropout,
    from_bfloat16,
    nonzero_encode,
    pack,
    pack_codes,
    pack_rows256,
    step_code,
    to_bfloat16,
)
from unswag.reference.math import (
    ACTIVATIONS,
    cross_entropy,
    gated_backward,
    gated_forward,
    layer_norm_backward,
    layer_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)


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


def _mask_vectors(rng: np.random.Generator, acts: Iterable[str]) -> Iterator[str]:
    for act in acts:
        slope = 0.25 if act in LEAKY else 0.0  # a power of two: slope x is exact
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
    for codec in BLOCKS:
        for dtype, rows, cols in (
            ("float32", 2, 1),
            ("float32", 2, 70),
            ("bfloat16", 1, 1100),
            ("float16", 3, 64),
            ("float64", 1, 33),
        ):
            for stochastic in (False, True):
                if stochastic and (codec in FP8 or cols > 100):
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


def _gated_vectors(rng: np.random.Generator, acts: Iterable[str]) -> Iterator[str]:
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
    rng = np.random.default_rng(20240229)  # shared by several files, in this order
    acts = list(ACTIVATIONS)
    files = {
        "mask": _mask_vectors(rng, [act for act in PREDICATES if not act.startswith("jax_")]),
        "philox": _philox_vectors(),
        "dropout": _dropout_vectors(rng),
        "gated": chain(
            _gated_vectors(rng, acts[:4]),
            _gated_vectors(np.random.default_rng(20240301), acts[4:]),  # one that is added at the end changes no other
        ),
        "rms_norm": _rms_norm_vectors(rng),
        "cross_entropy": _cross_entropy_vectors(rng),
        "codes": _code_vectors(rng),
        "block": _block_vectors(np.random.default_rng(9)),
        "jax_mask": _mask_vectors(rng, [act for act in PREDICATES if act.startswith("jax_")]),
        "layer_norm": _layer_norm_vectors(np.random.default_rng(20240302)),
        "dither": _dither_vectors(np.random.default_rng(7)),
        "nonzero": _nonzero_vectors(np.random.default_rng(8)),
    }
    return {f"{name}.txt": "\n".join([f"format {FORMAT_VERSION}", *lines, ""]) for name, lines in files.items()}
