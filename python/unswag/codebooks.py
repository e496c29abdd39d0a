"""Codebooks: the derivative of an activation as 2^bits levels. Framework-neutral.

The code of x is the number of bounds strictly below x (or below f'(x), where the codebook says `of = "derivative"`), 0 for NaN;
the backward uses levels[code] as f'(x). The constants and their sources are in codebooks.json; `fit` makes a codebook for
normally distributed inputs, `calibrated` for the actual inputs of a layer.

    >>> codebook("silu", 2, "optimal").levels
    (0.03359467, 0.34452635, 0.65547365, 0.96640533)
    >>> [round(level, 8) for level in fit("silu", 2, 1.0).levels]
    [0.03359467, 0.34452635, 0.65547365, 0.96640533]
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unswag.reference.math import activation_derivative

__all__ = [
    "FUNCTIONS", "METHODS", "SMOOTH", "Codebook", "Dither", "Fidelity",
    "calibrated", "codebook", "dither", "fidelity", "fit", "names", "quadrature",
]  # fmt: skip

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

FUNCTIONS = ("silu", "gelu")
# f' is that of one of these at a multiple of x. gelu_tanh differs from gelu by 0.001, less than any codebook's error;
# quick_gelu is x s(1.702 x), so f'(x) = silu'(1.702 x).
_LIKE = {"silu": ("silu", 1.0), "gelu": ("gelu", 1.0), "gelu_tanh": ("gelu", 1.0), "quick_gelu": ("silu", 1.702)}
SMOOTH = tuple(_LIKE)  # the activations that have codebooks

# For each number of bits the least error on normally distributed inputs; for 2 bits, among codebooks whose error has zero low
# moments, because these do not average out over many tokens.
_DEFAULT = {
    "silu": {1: "opt_x_silu_1bit_s1", 2: "mm2_silu_2bit_s1", 3: "opt_x_silu_3bit_s1", 4: "opt_x_silu_4bit_s1"},
    "gelu": {1: "opt_x_gelu_1bit_s1", 2: "mm1_gelu_2bit_s1", 3: "opt_x_gelu_3bit_s1", 4: "opt_x_gelu_4bit_s1"},
}
_SHORT = {
    "optimal": "opt_x_{}_{}bit_s1",
    "mm1": "mm1_{}_{}bit_s1",
    "mm2": "mm2_{}_{}bit_s1",
    "value": "opt_value_{}_{}bit_s1",
    "fewbit": "fewbit_{}_{}bit",
    "resilu2": "ReSiLU2",
    "regelu2": "ReGELU2",
    "seed": "seed_{}_best_tau",
}


@dataclass(frozen=True)
class Codebook:
    """Bounds in ascending order, one fewer than levels; at most 2^bits levels. ValueError otherwise.

    of  "x" or "derivative": what is compared with the bounds
    """

    bits: int
    bounds: tuple[float, ...]
    levels: tuple[float, ...]
    of: str = "x"
    name: str = "own"
    source: str = ""

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4):
            raise ValueError(f"codebook {self.name!r}: bits is {self.bits!r}; choose 1, 2, 3 or 4")
        if self.of not in ("x", "derivative"):
            raise ValueError(f"codebook {self.name!r}: of is {self.of!r}; choose 'x' or 'derivative'")
        if not 2 <= len(self.levels) <= 2**self.bits:
            raise ValueError(
                f"codebook {self.name!r}: {len(self.levels)} levels do not fit into {self.bits} bits; give 2 to {2**self.bits}"
            )
        if len(self.bounds) != len(self.levels) - 1:
            raise ValueError(
                f"codebook {self.name!r}: {len(self.bounds)} bounds for {len(self.levels)} levels; give {len(self.levels) - 1}"
            )
        if not all(math.isfinite(v) for v in (*self.bounds, *self.levels)):
            raise ValueError(f"codebook {self.name!r}: a bound or level is not finite; give finite numbers")
        if any(a >= b for a, b in itertools.pairwise(self.bounds)):
            raise ValueError(f"codebook {self.name!r}: bounds {list(self.bounds)} are not sorted; give them in ascending order")


@functools.cache
def _all() -> dict[tuple[str, str], Codebook]:
    text = importlib.resources.files("unswag").joinpath("codebooks.json").read_text()
    return {
        (c["function"], c["name"]): Codebook(c["bits"], tuple(c["bounds"]), tuple(c["levels"]), c["of"], c["name"], c["source"])
        for c in json.loads(text)
    }


def _like(function: str) -> tuple[str, float]:
    if function not in _LIKE:
        raise ValueError(f"no codebooks for {function!r}; choose among {', '.join(_LIKE)}")
    return _LIKE[function]


def _check_bits(function: str, bits: object) -> None:
    if isinstance(bits, bool) or bits not in (1, 2, 3, 4):
        raise ValueError(f"{function}: bits is {bits!r}; choose 1, 2, 3 or 4, or None to keep x exactly")


def names(function: str, bits: int | None = None) -> list[str]:
    """The names of the codebooks of a function, of all widths or of this number of bits."""
    function, _ = _like(function)
    return [name for (f, name), book in _all().items() if f == function and bits in (None, book.bits)]


def codebook(function: str, bits: int, name: str | None = None) -> Codebook:
    """The codebook of silu, gelu, gelu_tanh or quick_gelu with this name, or the default with this number of bits.

    Short names, for the widths that have them: "optimal" (least squared error on N(0, 1)), "mm1", "mm2" (zero moments of the
    error, see `fit`), "value" (cells of f'), "fewbit", "resilu2", "regelu2", "seed". ValueError lists the choices.
    """
    table, stretch = _like(function)
    _check_bits(function, bits)
    if name == "dither2":
        raise ValueError(f"{function}: 'dither2' has no levels, because its values are random; see unswag.codebooks.dither")
    full = _DEFAULT[table][bits] if name is None else _SHORT.get(name, name).format(table, bits)
    book = _all().get((table, full))
    if book is None or book.bits != bits:
        there = names(table, bits)
        short = [short for short, full in _SHORT.items() if full.format(table, bits) in there]
        raise ValueError(f"{function}: no codebook {name!r} of {bits} bits; choose among {', '.join(short + there)}")
    return _stretched(book, stretch)


def _stretched(book: Codebook, stretch: float) -> Codebook:
    """For f'(stretch x)."""
    if stretch == 1 or book.of == "derivative":
        return book
    return replace(book, bounds=tuple(bound / stretch for bound in book.bounds))


# The positive x where f'' is 0: x tanh(x / 2) = 2 for silu. f' falls from 0, rises between -turn and turn, and falls to 1.
_TURN = {"silu": 2.3993572805154675, "gelu": math.sqrt(2)}


@dataclass(frozen=True)
class Dither:
    """Unbiased codes k = round((f'(x) - least + u) / step), read as least + k step - u; u is uniform in ±step / 2.

    u is drawn at random, and drawn again to read k. 0 <= k < 2^bits, as f' lies in [least, least + (2^bits - 1) step]. The
    variance is step² / 12.
    """

    bits: int
    least: float
    step: float


def dither(function: str, bits: int) -> Dither:
    """The dither of silu, gelu, gelu_tanh or quick_gelu, with 1 to 4 bits. "dither2" is the one with 2 bits."""
    table, _ = _like(function)
    _check_bits(function, bits)
    least = float(_derivative(np.array(-_TURN[table]), table))
    return Dither(bits, least, (1 - 2 * least) / (2**bits - 1))


# ---- fitting: docs/math.md, "Approximation" ------------------------------------------------------------------------------
# q is the level of the cell of x, e = q - f'(x). Least E e² makes each level the mean of f' in its cell, and each bound the
# place where f' is half way between two levels. Least E e² such that E x^k e = 0 for some k means the same for the target
# f' + sum of nu_k x^k, nu being Lagrange's multipliers. So one search serves: dynamic programming over the cuts of a grid,
# then, where the distribution is smooth, Newton on the bounds.

METHODS = ("optimal", "mm1", "mm2", "value")
_POWERS: dict[str, tuple[int, ...]] = {"optimal": (), "mm1": (1,), "mm2": (1, 3), "value": ()}  # k of E x^k e = 0
_REACH = 12.0  # in scales: a normal distribution has 4e-33 beyond
_GAUSS = np.polynomial.legendre.leggauss(16)
_DRAWN = 1 << 16  # values of a sample that are used


def quadrature(scale: float | Mapping[float, float], ends: Array, least: float = -math.inf) -> tuple[Array, Array]:
    """Gauss-Legendre nodes x, ascending, and weights for N(0, scale²) above `least`. Panels also end at `ends`.

    A mapping of several scales to their parts is a mixture of normal distributions.
    """
    scales = scale if isinstance(scale, Mapping) else {scale: 1.0}
    reach = _REACH * max(scales)
    panels = [ends, np.linspace(-24, 24, 33), np.array([-reach, reach, least])]
    panels += [np.linspace(-_REACH * s, _REACH * s, 25) for s in scales]
    edges: Array = np.unique(np.clip(np.concatenate(panels), max(-reach, least), reach))
    at, weight = _GAUSS
    half = np.diff(edges)[:, None] / 2
    x = (edges[:-1, None] + half * (1 + at)).ravel()
    density = np.sum([part / s * np.exp(-((x / s) ** 2) / 2) for s, part in scales.items()], axis=0)
    return x, (half * weight).ravel() * density / (math.sqrt(2 * math.pi) * sum(scales.values()))


def _derivative(x: Array, function: str) -> Array:
    """f' in float64, by the formulas of `unswag.reference`, which are not repeated here."""
    return np.asarray(activation_derivative(x, function), np.float64)


class Fidelity(NamedTuple):
    """E e², E e, and the cosine E f' q / sqrt(E f'² E q²)."""

    mse: float
    bias: float
    cosine: float


def fidelity(book: Codebook, function: str, scale: float = 1.0) -> Fidelity:
    """How close a codebook is to f' on inputs from N(0, scale²); gelu_tanh is treated as gelu."""
    table, stretch = _like(function)
    bounds = np.array(book.bounds) * (stretch if book.of == "x" else 1.0)
    points = _normal(table, {scale * stretch: 1.0}, bounds, book.of)
    q = np.array(book.levels)[np.searchsorted(bounds, points.key, side="left")]
    e = q - points.slope
    return Fidelity(points.mean(e**2), points.mean(e), points.mean(q * points.slope)
                    / math.sqrt(points.mean(q**2) * points.mean(points.slope**2)))  # fmt: skip


def fit(function: str, bits: int, scale: float | Mapping[float, float] = 1.0, method: str = "optimal") -> Codebook:
    """The codebook with this number of bits for inputs from N(0, scale²), or from a mixture {scale: part, ...} of them.

    method  "optimal"  least E e², e = level - f'(x)
            "mm1"      least E e² such that E x e = 0, symmetric as f' is: the level at -x is 1 - that at x. So E x^k e = 0 for
                       even k too
            "mm2"      such that E x³ e = 0 too. Where this at least doubles E e² (2 bits: above a scale of 1.2 for gelu, 2.2
                       for silu; always with 1 bit), mm1 is returned, and named so
            "value"    least E e² among cells of f' instead of x: the same with 1 or 2 bits, up to 35 % less with 3 or 4
    """
    table, stretch = _checked(function, bits, method)
    scales = scale if isinstance(scale, Mapping) else {scale: 1.0}
    if not all(math.isfinite(v) and v > 0 for pair in scales.items() for v in pair) or not scales:
        raise ValueError(f"{function}: scale is {scale!r}; give the root mean square of the inputs, above 0")
    of, half, count = ("derivative" if method == "value" else "x"), bool(_POWERS[method]), 2**bits
    scales = {s * stretch: part for s, part in scales.items()}
    reach = _REACH * max(scales)
    grid = np.sinh(np.linspace(-math.asinh(reach), math.asinh(reach), 128 * bits + 1))
    points = _normal(table, scales, grid, "x", _POWERS[method])
    if half:
        count, grid = count // 2, grid[grid > 0]
    if of == "derivative":
        points = points.by_slope()
        cuts = np.arange(1, len(points.key) // len(_GAUSS[0])) * len(_GAUSS[0])
    else:
        cuts = np.searchsorted(points.key, grid)
        cuts = cuts[(cuts > 0) & (cuts < len(points.key))]
    bounds, powers = points.cells(count, cuts)

    def solved(bounds: Array) -> tuple[Array, Array]:
        return _normal(table, scales, bounds, of, powers).levels(bounds)[:2]

    def residual(bounds: Array) -> Array:
        level, nu = solved(bounds)
        target = bounds if of == "derivative" else _derivative(bounds, table) + nu @ _raised(bounds, powers)
        return target - (level[:-1] + level[1:]) / 2

    bounds = newton(residual, bounds, 0.0 if half else -math.inf)
    levels = solved(bounds)[0]
    if half:
        bounds, levels = np.concatenate((-bounds[::-1], [0.0], bounds)), np.concatenate((1 - levels[::-1], levels))
    else:
        mirrored = (1 if of == "derivative" else 0) - bounds[::-1]
        if np.allclose(bounds, mirrored, rtol=0, atol=1e-10):  # make it exact
            bounds, levels = (bounds + mirrored) / 2, (levels + 1 - levels[::-1]) / 2
        elif bounds.sum() < mirrored.sum():  # always the same of two mirror images
            bounds, levels = mirrored, 1 - levels[::-1]
    shown = "_".join(f"s{s / stretch:g}" for s in scales)
    return _made(function, bits, of, bounds, levels, powers, shown, stretch)


def calibrated(function: str, bits: int, method: str, sample: Array, weight: Array | None = None) -> Codebook:
    """The codebook for inputs distributed like a sample, an array of any shape and floating dtype (gates of a first batch).

    weight, of the same shape, weights the errors: E w e² is minimised. For act(gate) up, whose gradient has the error
    dh up e, give up². Methods are those of `fit`, with E w e = 0 besides the moments and without symmetry. Of a large sample
    65,536 values are used, always the same ones. ValueError for a sample that is not finite or has fewer different
    values than levels.
    """
    table, stretch = _checked(function, bits, method)
    x, w = np.ravel(sample), None if weight is None else np.ravel(weight)
    if w is not None and w.shape != x.shape:
        raise ValueError(f"{function}: weight has {w.size} values, but the sample has {x.size}; give one for each")
    if x.size > _DRAWN:
        drawn = np.random.default_rng(0).integers(0, x.size, _DRAWN)
        x, w = x[drawn], None if w is None else w[drawn]
    x, w = x.astype(np.float64) * stretch, np.ones(x.size) if w is None else w.astype(np.float64)
    if not (np.isfinite(x).all() and np.isfinite(w).all() and (w >= 0).all()):
        raise ValueError(f"{function}: the sample has values or weights that are not finite, or weights below 0; remove them")
    x, inverse = np.unique(x[w > 0], return_inverse=True)
    powers = (0, *_POWERS[method]) if _POWERS[method] else ()
    weights: Array = np.bincount(inverse, w[w > 0]).astype(np.float64)
    points = _Points(_derivative(x, table), weights, x, _raised(x, powers), powers)
    if method == "value":
        points = points.by_slope()
    cuts = np.arange(1, len(x))
    if len(x) > 256 * bits:  # this many cells of equal weight
        sums = np.cumsum(points.weight)
        cuts = np.unique(np.searchsorted(sums, np.linspace(0, sums[-1], 256 * bits + 1)[1:-1], side="right"))
        cuts = cuts[(cuts > 0) & (cuts < len(x))]
    cuts = cuts[points.key[cuts - 1] < points.key[cuts]]
    if len(cuts) < 2**bits - 1:
        raise ValueError(f"{function}: the sample has {len(x)} different values, too few for {2**bits} levels; give more")
    bounds, powers = points.cells(2**bits, cuts)
    levels = replace(points, powers=powers, raised=_raised(x, powers)).levels(bounds)[0]
    return _made(function, bits, "derivative" if method == "value" else "x", bounds, levels, powers, "sample", stretch)


def _checked(function: str, bits: int, method: str) -> tuple[str, float]:
    like = _like(function)
    _check_bits(function, bits)
    if method not in METHODS:
        raise ValueError(f"{function}: method is {method!r}; choose among {', '.join(METHODS)}")
    return like


def _made(
    function: str, bits: int, of: str, bounds: Array, levels: Array, powers: tuple[int, ...], where: str, stretch: float
) -> Codebook:
    kind = "opt_value" if of == "derivative" else "mm2" if 3 in powers else "mm1" if 1 in powers else "opt_x"
    book = Codebook(
        bits, tuple(map(float, bounds)), tuple(map(float, levels)), of, f"{kind}_{function}_{bits}bit_{where}", "fitted"
    )
    return _stretched(book, stretch)


def _raised(x: Array, powers: tuple[int, ...]) -> Array:
    return np.stack([x**k for k in powers]) if powers else np.zeros((0, len(x)))


@dataclass(frozen=True)
class _Points:
    """A distribution: points with weights, in ascending order of `key`, which is what is compared with bounds."""

    slope: Array  # f'
    weight: Array
    key: Array
    raised: Array  # x^k, [powers, points]
    powers: tuple[int, ...]  # each k of E x^k e = 0

    def mean(self, values: Array) -> float:
        return float(self.weight @ values / self.weight.sum())

    def by_slope(self) -> _Points:
        order = np.argsort(self.slope, kind="stable")
        return replace(self, slope=self.slope[order], weight=self.weight[order], key=self.slope[order])

    def levels(self, bounds: Array) -> tuple[Array, Array, float]:
        """The levels of least E e² such that each E x^k e is 0, the multipliers nu, and E e²."""
        code = np.searchsorted(bounds, self.key, side="left")

        def sums(values: Array) -> Array:
            return np.asarray(np.bincount(code, values, len(bounds) + 1), np.float64)

        mass: Array = np.maximum(sums(self.weight), 1e-300)  # during the search a cell can be empty
        level: Array = sums(self.weight * self.slope) / mass
        nu: Array = np.zeros(len(self.powers))
        if self.powers:
            weighted = self.weight * self.raised
            moments = np.stack([sums(row) for row in weighted])
            missing = weighted @ self.slope - moments @ level
            nu = np.asarray(np.linalg.lstsq(moments / mass @ moments.T, missing, rcond=None)[0], np.float64)
            level = np.asarray(level + nu @ moments / mass, np.float64)
        return level, nu, self.mean((level[code] - self.slope) ** 2)

    def cells(self, count: int, cuts: Indices) -> tuple[Array, tuple[int, ...]]:
        """The bounds of the best `count` cells that begin at `cuts`, and the powers, without 3 where it costs too much."""
        best, found, least, nu = math.inf, np.zeros(0), 0.0, np.zeros(len(self.powers))
        for turn in range(12 if self.powers else 1):
            at = _segments(self.weight, self.slope + nu @ self.raised, count, cuts)
            bounds = (self.key[at - 1] + self.key[at]) / 2
            if turn == 0:
                least = replace(self, powers=(), raised=self.raised[:0]).levels(bounds)[2]
            _, new, mse = self.levels(bounds)
            if mse < best:
                best, found = mse, bounds
            nu = (nu + new) / 2
        if 3 in self.powers and (best > 2 * least or len(self.powers) > count):
            return replace(self, powers=self.powers[:-1], raised=self.raised[:-1]).cells(count, cuts)
        return found, self.powers


def _normal(
    function: str, scales: Mapping[float, float], bounds: Array, of: str = "x", powers: tuple[int, ...] = ()
) -> _Points:
    """A mixture of normal distributions, only its right half if there are powers, exact for cells with these bounds."""
    ends = preimages(function, bounds) if of == "derivative" else bounds
    x, weight = quadrature(scales, ends, 0.0 if powers else -math.inf)
    slope = _derivative(x, function)
    points = _Points(slope, weight, x, _raised(x, powers), powers)
    return points.by_slope() if of == "derivative" else points


def preimages(function: str, values: Array) -> Array:
    """All x where f'(x) is one of the values; an end of a branch that has none."""
    turn = _TURN[function]
    ends = np.array([-60.0, -turn, turn, 60.0])[:, None]
    sign = np.array([[-1], [1], [-1]])  # f' falls, rises, falls
    low, high = (end + 0 * values for end in (ends[:-1], ends[1:]))
    for _ in range(56):
        middle = (low + high) / 2
        below = sign * (_derivative(middle, function) - values) < 0
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low.ravel()


def _segments(weight: Array, target: Array, count: int, cuts: Indices) -> Indices:
    """Where the second and later segments begin, of the `count` segments with the least sum of squares about their means."""
    ends = np.array([0, *cuts, len(weight)])
    mass, first, second = (np.concatenate(([0.0], np.cumsum(v)))[ends] for v in (weight, weight * target, weight * target**2))
    size = mass[:, None] - mass
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = (second[:, None] - second) - (first[:, None] - first) ** 2 / size  # [end, begin]
    cost[~(size > 0)] = np.inf
    least, choices = cost[:, 0], []
    for _ in range(count - 1):
        total = cost + least
        choices.append(np.argmin(total, axis=1))
        least = total[np.arange(len(ends)), choices[-1]]
    found = [len(ends) - 1]
    for choice in reversed(choices):
        found.append(int(choice[found[-1]]))
    return ends[found[:0:-1]]


def newton(residual: Callable[[Array], Array], bounds: Array, least: float) -> Array:
    """The zero of the residual near `bounds`, which stay ascending and above `least`."""
    if not len(bounds):
        return bounds
    found = residual(bounds)
    for _ in range(40):
        size, h = np.abs(found).max(), 1e-7 * np.abs(bounds).max()
        slopes = np.stack([(residual(bounds + h * unit) - found) / h for unit in np.eye(len(bounds))], axis=1)
        step = np.linalg.lstsq(slopes, -found, rcond=None)[0]
        for halvings in range(30):
            tried = bounds + step / 2**halvings
            if np.all(np.diff(tried, prepend=least) > 0) and np.abs(new := residual(tried)).max() < size:
                bounds, found = tried, new
                break
        else:
            break
        if np.abs(found).max() < 1e-14:
            break
    return bounds
