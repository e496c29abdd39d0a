"""Fits codebooks of the derivative, and recomputes their error tables (docs/math.md, "Approximation").

    python tools/fit_levels.py --function silu --bits 2 --scale 1 --method mm2         bounds, levels and errors, 8 digits
    python tools/fit_levels.py --function silu --bits 2 --method mm2 --json            a line for python/unswag/codebooks.json
    python tools/fit_levels.py --tables                                                all error tables, as Markdown

A scale is the root mean square of the inputs, which are assumed to be normally distributed.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from unswag import codebooks, reference
from unswag.codebooks import Array, Codebook, codebook, fidelity, fit, quadrature

SCALES = (0.5, 1.0, 2.0)
SIDES = {"silu": 40.0, "gelu": 12.0}  # [-side, side] stands for R: beyond, x f(x) is below 1e-15 of x


# ---- codebooks


def half_way(function: str) -> float:
    """The tau of {0, 0.5, 1}: f'(tau) = 3/4, whatever the distribution."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = reference.activation_derivative(np.array(middle), function) < 0.75
        low, high = (middle, high) if below else (low, middle)
    return low


def robust(function: str) -> Codebook:
    """2 bits: the smallest maximum, over the scales, of E e² / least E e². It is the best codebook for the mixture at which the
    two worst scales, 0.5 and 2, have equal ratios."""
    least = {s: fidelity(fit(function, 2, s), function, s).mse for s in SCALES}
    low, high = 0.0, 1.0
    for _ in range(50):
        part = (low + high) / 2
        book = fit(function, 2, {0.5: part / least[0.5], 2.0: (1 - part) / least[2.0]})
        worse = fidelity(book, function, 0.5).mse / least[0.5] > fidelity(book, function, 2.0).mse / least[2.0]
        low, high = (part, high) if worse else (low, part)
    return book


def uniform(low: float, high: float, ends: Iterable[float]) -> tuple[Array, Array]:
    """Gauss-Legendre nodes and weights for the plain integral, in panels that end at `ends` too."""
    edges = np.unique(np.clip(np.concatenate([np.arange(low, high, 0.75), [high], list(ends)]), low, high))
    at, weight = np.polynomial.legendre.leggauss(16)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (1 + at)).ravel(), (half * weight).ravel()


def function_space(function: str, bits: int) -> Codebook:
    """The symmetric codebook with the least integral of (f - f~)² over R; f~ is the integral of the levels (Approx-BP).

    On the left f~ is a sum of n hinges a_i max(x - b_i, 0). The a_i are those of least squares; the b_i are found by Newton on
    the integrals of the error from each b_i to 0, from each way to place them on the two sides of the dip's steepest point.
    """
    n = 2 ** (bits - 1) - 1

    def rest(bounds: Array) -> tuple[Array, Array, Array, Array]:
        x, weight = uniform(-SIDES[function], 0.0, bounds)
        hinges = np.maximum(x - bounds[:, None], 0)
        y = reference.activation(x, function)
        a = np.linalg.lstsq((hinges * weight) @ hinges.T, (hinges * weight) @ y, rcond=None)[0]
        return x, weight, y - a @ hinges, a

    def residual(bounds: Array) -> Array:
        x, weight, error, _ = rest(bounds)
        return np.array([np.sum((weight * error)[x > bound]) for bound in bounds])

    turn, least = -codebooks._TURN[function], math.inf
    for near in range(n + 1):
        far = np.linspace(2.8 * turn if function == "gelu" else 4.2 * turn, turn, n - near + 2)[1:-1]
        start = np.concatenate([far, np.linspace(turn, 0, near + 2)[1:-1]])
        bounds = codebooks.newton(residual, start, -math.inf)
        _, weight, error, a = rest(bounds)
        if bounds[-1] < 0 and np.abs(residual(bounds)).max() < 1e-12 and weight @ error**2 < least:
            least, found, levels = weight @ error**2, bounds, np.cumsum(a)
    left = (0.0, *map(float, levels))
    inner = tuple(map(float, found))
    mirrored = (*inner, 0.0, *(-b for b in reversed(inner))), (*left, *(1 - level for level in reversed(left)))
    return Codebook(bits, *mirrored, name=f"fsopt_{function}_{bits}bit", source="fitted")


@functools.cache
def books(function: str) -> dict[str, Codebook]:
    """All codebooks of the tables: ours newly fitted, those of others as published."""
    tau = half_way(function)
    found = {"relu_mask": Codebook(1, (0.0,), (0.0, 1.0))}
    found |= {f"fewbit_{bits}": codebook(function, bits, "fewbit") for bits in (1, 2, 3, 4)}
    found["approx_bp"] = codebook(function, 2, {"silu": "resilu2", "gelu": "regelu2"}[function])
    found |= {f"fsopt_{bits}": function_space(function, bits) for bits in (2, 3, 4)}
    found["seed"] = Codebook(2, (0.0, tau), (0.0, 0.5, 1.0))
    found["sym_ternary"] = Codebook(2, (-tau, tau), (0.0, 0.5, 1.0))
    for s in SCALES:
        found |= {f"optimal_{bits}_s{s:g}": fit(function, bits, s) for bits in (1, 2, 3, 4)}
        found |= {f"value_{bits}_s{s:g}": fit(function, bits, s, "value") for bits in (2, 3, 4)}
        matched = {method: fit(function, 2, s, method) for method in ("mm1", "mm2")}
        found |= {f"{method}_2_s{s:g}": book for method, book in matched.items() if book.name.startswith(method)}
    found["robust"] = robust(function)
    found["mix"] = fit(function, 2, dict.fromkeys(SCALES, 1.0))
    return found


# ---- tables: {row: figures}


def derivative_errors(function: str) -> dict[str, list[float]]:
    """E e² for the scales 0.5, 1 and 2, E e for each of them, and the cosine for 1."""
    rows = {}
    for name, book in books(function).items():
        if book.of == "x":
            each = [fidelity(book, function, s) for s in SCALES]
            rows[name] = [*(e.mse for e in each), *(e.bias for e in each), each[1].cosine]
    return rows


def constants(function: str) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Bounds and levels."""
    fitted = ("optimal", "mm", "robust", "mix", "value", "fsopt", "seed")
    return {name: (book.bounds, book.levels) for name, book in books(function).items() if name.startswith(fitted)}


def value_errors(function: str) -> dict[str, list[float]]:
    """E e² of cells of f' and of cells of x, at the scale they were fitted to."""
    return {
        f"{bits}_s{s:g}": [fidelity(books(function)[f"{kind}_{bits}_s{s:g}"], function, s).mse for kind in ("value", "optimal")]
        for bits in (3, 4)
        for s in SCALES
    }


def function_error(function: str, book: Codebook, x: Array) -> Array:
    """f - f~ at x, up to a constant; f~ is the integral of the levels."""
    hinges = zip(np.diff(book.levels), book.bounds, strict=True)
    return reference.activation(x, function) - book.levels[0] * x - sum(a * np.maximum(x - b, 0) for a, b in hinges)


def over_the_line(function: str, book: Codebook) -> float:
    """The integral of (f - f~)² over [-side, side]; it is that over R if f~ has both asymptotes of f."""
    x, weight = uniform(-SIDES[function], SIDES[function], book.bounds)
    return float(weight @ function_error(function, book, x) ** 2)


def function_errors(function: str) -> dict[str, list[float]]:
    """The integral of (f - f~)² over R (inf where it diverges), then with the constant of f~ that is best over [-10, 10], and
    its mean for the scales 0.5, 1 and 2."""
    rows = {}
    for name, book in books(function).items():
        if book.of == "x":
            far = book.levels[0] == 0 and book.levels[-1] == 1 and abs(np.diff(book.levels) @ book.bounds) < 1e-12
            rows[name] = [over_the_line(function, book) if far else math.inf]
            for x, weight in (uniform(-10, 10, book.bounds), *(quadrature(s, np.array(book.bounds)) for s in SCALES)):
                error = function_error(function, book, x)
                error = error - weight @ error / weight.sum()
                rows[name].append(float(weight @ error**2))
    return rows


def unbiased_errors(function: str) -> dict[str, list[float]]:
    """Variances of codes whose mean is f': for each scale stochastic rounding of 1 bit between the ends of f'; of 1 bit
    between 0 and 1, its variance and E (bias)²; of 2 bits among {least, a, 1 - a, greatest} with the best a, and that a; of 2,
    3 and 4 bits among even steps. In the row "dither", subtractive dither of 1 to 4 bits, at any scale."""
    steps = [codebooks.dither(function, bits) for bits in (1, 2, 3, 4)]
    least, greatest = steps[0].least, 1 - steps[0].least
    rows = {}
    for s in SCALES:

        def variance(*levels: float, scale: float = s) -> float:
            """E (f' - l_i) (l_(i+1) - f') for the levels around f'."""
            ends = codebooks.preimages(function, np.array(levels[1:-1]))
            x, weight = quadrature(scale, ends)
            slope = reference.activation_derivative(x, function)
            below = np.clip(np.searchsorted(levels, slope) - 1, 0, len(levels) - 2)
            low, high = np.array(levels)[below], np.array(levels)[below + 1]
            return float(weight @ ((slope - low) * (high - slope)))

        x, weight = quadrature(s, codebooks.preimages(function, np.array([0.0, 1.0])))
        slope = reference.activation_derivative(x, function)
        part = np.clip(slope, 0, 1)
        low, high = 0.05, 0.45  # golden section
        for _ in range(45):
            a, b = high - (high - low) * 0.6180339887, low + (high - low) * 0.6180339887
            lower = variance(least, a, 1 - a, greatest) < variance(least, b, 1 - b, greatest)
            low, high = (low, b) if lower else (a, high)
        even = [variance(*np.linspace(least, greatest, 2**bits)) for bits in (2, 3, 4)]
        rows[f"s{s:g}"] = [variance(least, greatest), float(weight @ (part * (1 - part))), float(weight @ (part - slope) ** 2)]
        rows[f"s{s:g}"] += [variance(least, low, 1 - low, greatest), low, *even]
    return rows | {"dither": [d.step**2 / 12 for d in steps]}


# ---- printing


def tables() -> Iterator[str]:
    """The tables, with their published numbers."""
    figures: list[tuple[str, Callable[[str], dict[str, list[float]]], str]] = [
        ("3.1 Error of the derivative", derivative_errors, "MSE s=.5 | s=1 | s=2 | mean s=.5 | s=1 | s=2 | cosine s=1"),
        ("3.3 Cells of f' and of x", value_errors, "MSE, cells of f' | MSE, cells of x"),
        ("3.4 Error of the function", function_errors, "over R | [-10, 10] | N(0, .25) | N(0, 1) | N(0, 4)"),
        ("3.6 Variance of unbiased codes", unbiased_errors,
         "1 bit | 1 bit, in [0, 1] | its bias² | 2 bits | a | even 2 bits | even 3 bits | even 4 bits"),
    ]  # fmt: skip
    for title, table, columns in figures:
        yield from head(title, columns)
        for function in codebooks.FUNCTIONS:
            for name, row in table(function).items():
                name = "dither of 1 to 4 bits" if name == "dither" else name
                yield f"| {function} | {name} | " + " | ".join("diverges" if v == math.inf else f"{v:.5e}" for v in row) + " |"
    yield from head("3.2 Constants", "bounds | levels")
    for function in codebooks.FUNCTIONS:
        for name, (bounds, levels) in constants(function).items():
            yield f"| {function} | {name} | {shown(bounds)} | {shown(levels)} |"


def head(title: str, columns: str) -> Iterator[str]:
    yield f"\n## {title}\n\n| function | codebook | {columns} |\n|{'---|' * (columns.count('|') + 3)}"


def shown(values: Iterable[float]) -> str:
    return ", ".join(f"{value + 0.0:.8g}" for value in values)


def line(book: Codebook, function: str) -> str:
    """The line for python/unswag/codebooks.json."""
    eight = {"bounds": [float(f"{b:.8g}") for b in book.bounds], "levels": [float(f"{level:.8g}") for level in book.levels]}
    head = {"name": book.name, "function": function, "bits": book.bits, "of": book.of, "source": "computed"}
    return json.dumps(head | eight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--function", choices=list(codebooks._LIKE), default="silu", help="the activation (silu)")
    parser.add_argument("--bits", type=int, choices=(1, 2, 3, 4), default=2, help="bits of a code (2)")
    parser.add_argument("--scale", type=float, default=1.0, help="root mean square of the inputs (1)")
    parser.add_argument("--method", choices=codebooks.METHODS, default="optimal", help=(
        "optimal: least squared error; mm1: also E x e = 0; mm2: also E x³ e = 0; value: cells of f' (optimal)"))  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a line for codebooks.json instead")
    parser.add_argument("--tables", action="store_true", help="recompute and print the error tables of all codebooks (10 s)")
    options = parser.parse_args()
    if options.tables:
        for row in tables():
            print(row)
        return
    try:
        book = fit(options.function, options.bits, options.scale, options.method)
    except ValueError as error:
        parser.error(str(error))
    if options.json:
        print(line(book, options.function))
        return
    error = fidelity(book, options.function, options.scale)
    compared = "x" if book.of == "x" else "f'(x)"
    print(f"name    {book.name}\nbounds  {shown(book.bounds)}   of {compared}\nlevels  {shown(book.levels)}")
    print(f"MSE     {error.mse:.8g}\nmean    {error.bias:.8g}\ncosine  {error.cosine:.8g}")


if __name__ == "__main__":
    main()
