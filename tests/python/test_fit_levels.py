"""The error tables are computed anew and hold to the published ones, four significant digits; where not, it is said why.

What does not hold: published are sums over a grid that does not end at the bounds, off by up to 0.25 % where errors are small
(`REFINED`; a plain sum over 400,000 points agrees with the tool), places of a least variance of which only the variance is
right, a search that had not come to its end (fsopt), and an integral over R that diverges (seed).
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unswag import codebooks, reference
from unswag.codebooks import FUNCTIONS, Codebook, fidelity

ROOT = Path(__file__).parents[2]
PUBLISHED = json.loads(Path(__file__).with_name("published_levels.json").read_text())["functions"]

spec = importlib.util.spec_from_file_location("fit_levels", ROOT / "tools" / "fit_levels.py")
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def off(computed: float, published: float | str) -> float:
    """In units of the last of the four digits, or of those that were published; 0.5 is rounding."""
    text = published if isinstance(published, str) else repr(published)
    digits = min(4, len(text.lower().split("e")[0].strip("-").replace(".", "").lstrip("0")))
    value = float(text)
    return abs(computed - value) / 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1) if value else abs(computed) / 1e-8


def same(computed: float, published: float | str) -> bool:
    if published == "diverges":
        return computed == math.inf
    return off(computed, published) <= 0.5001


@pytest.mark.parametrize("function", FUNCTIONS)
def test_3_1_error_of_the_derivative(function):
    rows = tool.derivative_errors(function)
    for name, published in PUBLISHED[function]["derivative"].items():
        row = rows[name]
        if name.startswith("fsopt"):  # of the constants that were published: see below
            bits = int(name[-1])
            book = Codebook(bits, *map(tuple, PUBLISHED[function]["constants"][name]))
            each = [fidelity(book, function, s) for s in tool.SCALES]
            row = [*(e.mse for e in each), *(e.bias for e in each), each[1].cosine]
        for column in (0, 1, 2, 6):
            assert same(row[column], published[column]), (name, column, row[column], published[column])
        for column in (3, 4, 5):  # the constants have eight digits, so a mean has 3e-8
            close = abs(row[column] - published[column]) < 3e-8
            assert close or same(row[column], published[column]), (name, column, row[column], published[column])
    assert len(PUBLISHED[function]["derivative"]) >= 28


@pytest.mark.parametrize("function", FUNCTIONS)
def test_3_2_constants(function):
    rows, tried = tool.constants(function), 0
    for name, (bounds, levels) in PUBLISHED[function]["constants"].items():
        if name in rows and not name.startswith("fsopt"):
            for computed, published in zip((*rows[name][0], *rows[name][1]), (*bounds, *levels), strict=True):
                assert same(computed, published), (name, computed, published)
            tried += 1
    assert tried >= 26


@pytest.mark.parametrize("function", FUNCTIONS)
def test_3_3_cells_of_the_derivative(function):
    rows = tool.value_errors(function)
    for name, published in PUBLISHED[function]["value"].items():
        assert all(same(c, p) for c, p in zip(rows[name], published, strict=True)), name
    assert len(PUBLISHED[function]["value"]) == 6


# (function, row, column) of 3.4: what the tool computes and the plain sum confirms
REFINED = {
    ("silu", "fewbit_2", 2): 9.728e-05,
    ("silu", "optimal_2_s1", 2): 6.791e-05,
    ("silu", "sym_ternary", 2): 4.445e-04,
    ("silu", "sym_ternary", 3): 6.517e-04,
    ("silu", "sym_ternary", 4): 3.810e-03,
    ("silu", "optimal_3_s2", 2): 6.222e-06,
    ("silu", "optimal_3_s1", 2): 4.366e-06,
    ("silu", "optimal_3_s1", 3): 6.129e-05,
    ("silu", "optimal_4_s2", 2): 4.505e-07,
    ("silu", "optimal_4_s2", 3): 2.414e-06,
    ("silu", "fewbit_4", 2): 8.776e-07,
    ("silu", "fewbit_4", 3): 3.970e-06,
    ("silu", "optimal_4_s1", 2): 2.705e-07,
    ("gelu", "sym_ternary", 2): 2.055e-04,
    ("gelu", "fewbit_2", 2): 7.483e-05,
    ("gelu", "fewbit_3", 2): 1.269e-05,
    ("gelu", "optimal_3_s1", 2): 3.930e-06,
    ("gelu", "optimal_3_s2", 2): 7.819e-06,
    ("gelu", "optimal_4_s2", 2): 5.844e-07,
    ("gelu", "optimal_4_s2", 3): 5.020e-06,
    ("gelu", "fewbit_4", 2): 1.182e-06,
    ("gelu", "optimal_4_s1", 2): 4.543e-07,
}


def plain_mean(function: str, scale: float, values) -> float:
    """The mean of values(x) over 400,000 points of N(0, scale²)."""
    x = (np.arange(400_000) + 0.5) / 400_000 * 20 * scale - 10 * scale
    return float(np.average(values(x), weights=np.exp(-((x / scale) ** 2) / 2)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_3_4_error_of_the_function(function):
    rows = tool.function_errors(function)
    for name, published in PUBLISHED[function]["function"].items():
        book = tool.books(function)[name]
        for column, (computed, figure) in enumerate(zip(rows[name], published, strict=True)):
            if (function, name, column) in REFINED:
                value, scale = REFINED[function, name, column], tool.SCALES[column - 2]
                assert same(computed, f"{value:.3e}") and not same(computed, figure)
                assert computed == pytest.approx(float(figure), rel=2.6e-3)
                mean = plain_mean(function, scale, lambda x, book=book: tool.function_error(function, book, x))
                spread = plain_mean(
                    function, scale, lambda x, m=mean, book=book: (tool.function_error(function, book, x) - m) ** 2
                )
                assert spread == pytest.approx(computed, rel=1e-5)
            elif name == "seed" and column == 0:  # f~ ends 0.13 below f's asymptote
                assert computed == math.inf and same(tool.over_the_line(function, book), figure)
            elif name.startswith("fsopt"):
                assert computed == pytest.approx(float(figure), rel=2e-3)
            else:
                assert same(computed, figure), (name, column, computed, figure)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_3_4_the_least_error_of_the_function_is_at_most_the_published_one(function):
    for bits, published in PUBLISHED[function]["criterion"].items():
        ours = tool.over_the_line(function, tool.books(function)[f"fsopt_{bits}"])
        book = Codebook(int(bits), *map(tuple, PUBLISHED[function]["constants"][f"fsopt_{bits}"]))
        assert same(tool.over_the_line(function, book), published)
        assert ours <= tool.over_the_line(function, book)
        assert same(ours, published) or bits == "4"  # 6.656e-5, published 6.658e-5
    theirs = tool.over_the_line(function, tool.books(function)["approx_bp"])
    assert same(theirs, PUBLISHED[function]["criterion_of_approx_bp"])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_3_6_unbiased_codes(function):
    rows = tool.unbiased_errors(function)
    least = codebooks.dither(function, 2).least
    even = {("silu", "s2", 7): 4, ("gelu", "s1", 6): 3, ("gelu", "s2", 7): 4}  # published off by up to one of four digits
    for name, published in PUBLISHED[function]["unbiased"].items():
        for column, (computed, figure) in enumerate(zip(rows[name], published, strict=True)):

            def variance(*levels: float, name: str = name) -> float:
                def values(x):
                    slope = reference.activation_derivative(x, function)
                    low = np.clip(np.searchsorted(levels, slope) - 1, 0, len(levels) - 2)
                    return (slope - np.array(levels)[low]) * (np.array(levels)[low + 1] - slope)

                return plain_mean(function, float(name[1:]), values)

            if (function, name, column) in even:
                levels = np.linspace(least, 1 - least, 2 ** even[function, name, column])
                assert variance(*levels) == pytest.approx(computed, rel=1e-6)
                assert computed == pytest.approx(float(figure), rel=1e-3)
            elif name != "dither" and column == 4:  # where the variance is flat: ours is at most that at the published place
                other = float(figure)
                assert computed == pytest.approx(other, rel=1e-2)
                ours = variance(least, computed, 1 - computed, 1 - least)
                assert ours <= variance(least, other, 1 - other, 1 - least) * (1 + 1e-9)
            else:
                assert same(computed, figure), (name, column, computed, figure)


def run(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "tools" / "fit_levels.py"), *arguments]
    environment = {"PYTHONPATH": str(Path(codebooks.__file__).parents[1]), "PATH": ""}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_the_tool_prints_a_codebook_and_a_line_for_the_table():
    text = run("--function", "silu", "--bits", "2", "--scale", "1", "--method", "mm2")
    assert (
        "bounds  -0.89820427, 0, 0.89820427   of x" in text and "MSE     0.011143227" in text and "cosine  0.98560653" in text
    )
    line = json.loads(run("--function", "gelu", "--bits", "3", "--method", "value", "--json"))
    there = codebooks.codebook("gelu", 3, line["name"])
    assert (line["bits"], line["of"]) == (3, "derivative")
    assert np.allclose(line["bounds"], there.bounds, atol=1e-7) and np.allclose(line["levels"], there.levels, atol=1e-7)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_was_computed_for_the_table_can_be_computed_again(function):
    tried = 0
    for line in json.loads((ROOT / "python" / "unswag" / "codebooks.json").read_text()):
        method = next(
            (m for m in codebooks.METHODS if line["name"].startswith({"optimal": "opt_x", "value": "opt_value"}.get(m, m))),
            None,
        )
        if line["function"] == function and method is not None:
            scale = float(line["name"].rpartition("_s")[2])
            book = codebooks.fit(function, line["bits"], scale, method)
            assert (book.name, book.of, book.bits) == (line["name"], line["of"], line["bits"])
            there, here = [*line["bounds"], *line["levels"]], [*book.bounds, *book.levels]
            assert np.allclose(there, here, rtol=0, atol=1e-7), line["name"]
            tried += 1
    assert tried >= 31
