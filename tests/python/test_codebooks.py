"""The codebooks: all of them load, fit the derivative as well as is stated, and a wrong one is an error with its remedy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from unswag import codebooks
from unswag.codebooks import Codebook, calibrated, codebook, dither, fidelity, fit, names

erf = np.vectorize(math.erf)

DERIVATIVES = {
    "silu": lambda x: (1 + x * (1 - 1 / (1 + np.exp(-x)))) / (1 + np.exp(-x)),
    "gelu": lambda x: (1 + erf(x / math.sqrt(2))) / 2 + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi),
}


def error(book: Codebook, function: str, sigma: float) -> float:
    """E (f'(x) - level)^2 for x of N(0, sigma^2)."""
    x = np.linspace(-12 * sigma, 12 * sigma, 400_000)
    density = np.exp(-((x / sigma) ** 2) / 2)
    derivative = DERIVATIVES[function](x)
    code = np.searchsorted(book.bounds, derivative if book.of == "derivative" else x, side="left")  # bounds strictly below
    return float(np.average((derivative - np.asarray(book.levels)[code]) ** 2, weights=density))


def test_all_codebooks_load():
    found = {function: names(function) for function in codebooks.FUNCTIONS}
    assert {function: len(each) for function, each in found.items()} == {"silu": 45, "gelu": 42}
    for function, each in found.items():
        for name in each:
            books = [codebook(function, bits, name) for bits in (1, 2, 3, 4) if name in names(function, bits)]
            assert [book.name for book in books] == [name], "one number of bits each"
            assert books[0].source


@pytest.mark.parametrize("function", codebooks.FUNCTIONS)
def test_more_bits_are_better_and_the_default_is_the_best_of_its_bits(function):
    errors = [error(codebook(function, bits), function, 1.0) for bits in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    for bits in (1, 3, 4):
        others = [codebook(function, bits, name) for name in names(function, bits)]
        assert errors[bits - 1] <= min(error(book, function, 1.0) for book in others if book.of == "x") * (1 + 1e-6)
    tuned = [codebook(function, 2, name) for name in names(function, 2) if name.startswith("mm") and name.endswith("_s1")]
    assert len(tuned) == 2 and codebook(function, 2) in tuned


# Of research that is not part of this repository: mean squared errors on inputs of N(0, sigma^2)
@pytest.mark.parametrize(
    "function, bits, name, sigma, mse",
    [
        ("silu", 2, "seed", 1.0, 0.0424285815),
        ("silu", 2, "seed", 2.0, 0.0250464344),
        ("silu", 2, "fewbit", 1.0, 0.00835435782),
        ("silu", 2, "mm2_silu_2bit_s1", 1.0, 0.0111432268),
        ("silu", 1, "optimal", 1.0, 0.0320635623),
        ("silu", 3, "optimal", 0.5, 0.00199057478),
        ("silu", 3, "opt_value_silu_3bit_s1", 1.0, 0.00193654853),
        ("silu", 2, "ReSiLU2", 1.0, 0.0842041113),
        ("gelu", 4, "optimal", 1.0, 0.000588755815),
        ("gelu", 3, "fewbit", 2.0, 0.0020971723),
        ("gelu", 2, "ReGELU2", 1.0, 0.0579920044),
        ("gelu", 1, "relu_mask_gelu", 1.0, 0.0466959226),
    ],
)
def test_levels_approximate_the_derivative_as_well_as_is_stated(function, bits, name, sigma, mse):
    assert error(codebook(function, bits, name), function, sigma) == pytest.approx(mse, rel=2e-4)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((5, (0.0,), (0.0, 1.0)), "bits is 5; choose 1, 2, 3 or 4"),
        ((1, (0.0, 1.0), (0.0, 0.5, 1.0)), "3 levels do not fit into 1 bits; give 2 to 2"),
        ((1, (), (1.0,)), "1 levels do not fit into 1 bits; give 2 to 2"),
        ((2, (0.0,), (0.0, 0.5, 1.0)), "1 bounds for 3 levels; give 2"),
        ((2, (1.0, 0.0), (0.0, 0.5, 1.0)), "bounds [1.0, 0.0] are not sorted; give them in ascending order"),
        ((2, (1.0, 1.0), (0.0, 0.5, 1.0)), "are not sorted"),
        ((1, (math.nan,), (0.0, 1.0)), "a bound or level is not finite; give finite numbers"),
        ((1, (0.0,), (0.0, math.inf)), "a bound or level is not finite; give finite numbers"),
        ((1, (0.0,), (0.0, 1.0), "y"), "of is 'y'; choose 'x' or 'derivative'"),
    ],
)
def test_a_wrong_codebook_is_an_error(arguments, words):
    with pytest.raises(ValueError) as caught:
        Codebook(*arguments)
    assert words in str(caught.value) and "'own'" in str(caught.value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("relu", 2), "no codebooks for 'relu'; choose among silu, gelu, gelu_tanh, quick_gelu"),
        (("silu", 5), "silu: bits is 5; choose 1, 2, 3 or 4, or None to keep x exactly"),
        (("silu", True), "silu: bits is True"),
        (("silu", None), "silu: bits is None"),
        (("silu", 2, "nope"), "silu: no codebook 'nope' of 2 bits; choose among"),
        (("silu", 2, "opt_x_silu_3bit_s1"), "silu: no codebook 'opt_x_silu_3bit_s1' of 2 bits"),
        (("silu", 2, "ReGELU2"), "silu: no codebook 'ReGELU2' of 2 bits"),
        (("silu", 2, "regelu2"), "choose among optimal, mm1, mm2, value, fewbit, resilu2, seed, "),
        (("gelu", 3, "seed"), "choose among optimal, mm1, mm2, value, fewbit, fewbit_gelu_3bit"),
        (("gelu", 2, "dither2"), "gelu: 'dither2' has no levels, because its values are random; see unswag.codebooks.dither"),
    ],
)
def test_an_unknown_codebook_is_an_error_that_lists_the_choices(arguments, words):
    with pytest.raises(ValueError) as caught:
        codebook(*arguments)
    assert words in str(caught.value)
    if words.endswith("of 2 bits; choose among"):
        assert "seed_silu_best_tau" in str(caught.value)


@pytest.mark.parametrize(
    "name, function, bits, full",
    [
        ("optimal", "silu", 4, "opt_x_silu_4bit_s1"),
        ("value", "gelu", 3, "opt_value_gelu_3bit_s1"),
        ("mm1", "gelu", 1, "mm1_gelu_1bit_s1"),
        ("mm1", "silu", 2, "mm1_silu_2bit_s1"),
        ("mm2", "gelu", 4, "mm2_gelu_4bit_s1"),
        ("fewbit", "silu", 3, "fewbit_silu_3bit"),
        ("resilu2", "silu", 2, "ReSiLU2"),
        ("regelu2", "gelu", 2, "ReGELU2"),
        ("seed", "gelu", 2, "seed_gelu_best_tau"),
    ],
)
def test_short_names(name, function, bits, full):
    assert codebook(function, bits, name) == codebook(function, bits, full)
    assert codebook(function, bits, full).name == full


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_functions_whose_derivative_is_that_of_another(bits):
    assert codebook("gelu_tanh", bits) == codebook("gelu", bits) and names("gelu_tanh", bits) == names("gelu", bits)
    quick, silu = codebook("quick_gelu", bits), codebook("silu", bits)
    assert np.allclose(np.array(quick.bounds) * 1.702, silu.bounds, rtol=1e-15) and quick.levels == silu.levels
    assert codebook("quick_gelu", 2, "value").bounds == codebook("silu", 2, "value").bounds  # bounds of f'
    assert fidelity(quick, "quick_gelu", 2 / 1.702) == pytest.approx(fidelity(silu, "silu", 2), abs=1e-14)
    for method in codebooks.METHODS:
        fitted = fit("quick_gelu", bits, 1 / 1.702, method)
        assert fitted.levels == pytest.approx(fit("silu", bits, 1, method).levels, abs=1e-12)
        assert fidelity(fitted, "quick_gelu", 1 / 1.702).mse == pytest.approx(
            fidelity(fit("silu", bits, 1, method), "silu").mse
        )


# ---- fitting


def moments(book: Codebook, function: str, scale: float) -> list[float]:
    """E e², and E x^k e for k = 0, 1, 2, 3 and x of N(0, 1), of plain sums over 100,000 points."""
    x = (np.arange(100_000) + 0.5) / 100_000 * 18 - 9
    derivative = DERIVATIVES[function](x * scale)
    code = np.searchsorted(book.bounds, derivative if book.of == "derivative" else x * scale, side="left")
    e, density = np.asarray(book.levels)[code] - derivative, np.exp(-x * x / 2)
    return [float(np.average(values, weights=density)) for values in (e * e, *(x**k * e for k in range(4)))]


@pytest.mark.parametrize("scale", [0.05, 1.2, 6.0])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("function", codebooks.FUNCTIONS)
def test_fitted_codebooks_are_stationary_and_have_no_moments(function, bits, scale):
    least = fidelity(fit(function, bits, scale), function, scale).mse
    for method in codebooks.METHODS:
        book = fit(function, bits, scale, method)
        assert len(book.levels) == 2**bits and book.of == ("derivative" if method == "value" else "x")
        square, *found = moments(book, function, scale)
        mse, mean, _ = fidelity(book, function, scale)
        assert mse == pytest.approx(square, rel=1e-3) and abs(mean) < 1e-12
        assert abs(found[0]) < 3e-5
        if method == "value":
            assert mse <= least * (1 + 1e-6)
        elif method == "optimal":
            middle = (np.array(book.levels[1:]) + np.array(book.levels[:-1])) / 2
            assert np.allclose(DERIVATIVES[function](np.array(book.bounds)), middle, rtol=0, atol=1e-9)
            for i in range(2**bits):  # worse wherever a level or a bound is moved
                levels, bounds = list(book.levels), list(book.bounds)
                levels[i] += 1e-3
                assert fidelity(Codebook(bits, book.bounds, tuple(levels)), function, scale).mse > mse
                if i < len(bounds):
                    bounds[i] += 1e-3 * scale
                    assert fidelity(Codebook(bits, tuple(bounds), book.levels), function, scale).mse > mse
        else:
            kind = book.name.split("_")[0]
            assert kind == "mm1" or method == "mm2"
            assert abs(found[1]) < 3e-5 and (abs(found[3]) < 3e-5 or kind == "mm1")
            assert np.allclose(book.levels, 1 - np.array(book.levels[::-1]), rtol=0, atol=1e-15) and abs(found[2]) < 3e-5
            assert least <= mse <= 2 * least


def test_without_a_solution_for_mm2_it_is_mm1():
    for function, bits, scale in (("gelu", 2, 2.0), ("silu", 2, 2.5), ("silu", 1, 1.0)):
        assert fit(function, bits, scale, "mm2") == fit(function, bits, scale, "mm1")
    assert fit("silu", 2, 2.0, "mm2").name == "mm2_silu_2bit_s2"


def test_a_mixture_of_scales():
    both = fit("silu", 2, {0.5: 1.0, 2.0: 1.0})
    assert fit("silu", 2, {1.0: 3.0}).bounds == pytest.approx(fit("silu", 2, 1.0).bounds, abs=1e-12)

    def mean(book):
        return fidelity(book, "silu", 0.5).mse + fidelity(book, "silu", 2.0).mse

    assert mean(both) < min(mean(fit("silu", 2, s)) for s in (0.5, 0.9, 1.0, 1.2, 2.0))


def test_calibrated_to_a_large_normal_sample_is_fitted():
    x = np.random.default_rng(1).standard_normal((300, 1500)).astype(np.float32)
    for method in codebooks.METHODS:
        book, other = calibrated("silu", 2, method, x), fit("silu", 2, 1.0, method)
        assert np.allclose(book.bounds, other.bounds, atol=0.06) and np.allclose(book.levels, other.levels, atol=0.03)
        assert fidelity(book, "silu").mse == pytest.approx(fidelity(other, "silu").mse, rel=0.01)
        assert book == calibrated("silu", 2, method, x), "the same every time"
    assert calibrated("quick_gelu", 2, "optimal", x / 1.702).bounds == pytest.approx(
        np.array(calibrated("silu", 2, "optimal", x).bounds) / 1.702, abs=1e-3
    )


def test_of_a_large_sample_values_are_drawn_with_their_weights():
    x = np.random.default_rng(3).standard_normal(200_000)
    book = calibrated("silu", 2, "optimal", x, x < 0)
    assert max(book.bounds) < 0 and max(book.levels) < 0.5


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("function", codebooks.FUNCTIONS)
def test_calibrated_is_best_on_its_own_sample(function, bits):
    random = np.random.default_rng(2)
    x = 0.6 * random.standard_t(3, (61, 67)) - 0.4
    weight = random.standard_normal(x.shape) ** 2 * (1 + x**2)
    slope = DERIVATIVES[function](x)

    def e(book):
        return np.asarray(book.levels)[np.searchsorted(book.bounds, slope if book.of == "derivative" else x)] - slope

    def mse(book):
        return float(np.average(e(book) ** 2, weights=weight))

    best = mse(calibrated(function, bits, "optimal", x, weight))
    others = [codebook(function, bits, name) for name in names(function, bits)]
    others += [fit(function, bits, float(np.sqrt(np.mean(x**2)))), calibrated(function, bits, "optimal", x)]
    assert best < min(mse(book) for book in others if book.of == "x")
    assert mse(calibrated(function, bits, "value", x, weight)) <= best * 1.01
    for method, powers in (("mm1", (0, 1)), ("mm2", (0, 1, 3))):
        book = calibrated(function, bits, method, x, weight)
        assert best <= mse(book) < 4 * best
        if book.name.startswith(method):
            assert all(abs(np.average(x**k * e(book), weights=weight)) < 1e-9 for k in powers)


def test_a_sample_with_few_different_values():
    book = calibrated("silu", 2, "optimal", np.array([-1.0, 0.0, 1.0, 2.0] * 5))
    assert np.allclose(book.bounds, [-0.5, 0.5, 1.5]) and np.allclose(book.levels, DERIVATIVES["silu"](np.array([-1, 0, 1, 2])))
    ends = np.array([-100.0, -50.0, 60.0, 70.0, 80.0, 0.0, 1.0, 2.0])  # f' is 0 or 1 at many of them
    assert len(calibrated("silu", 2, "value", ends).levels) == 4
    with pytest.raises(ValueError, match="different values, too few for 4 levels"):
        calibrated("silu", 2, "value", np.array([60.0, 70.0, 80.0, 90.0, 0.0, 1.0]))
    weight = np.array([1.0, 0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="3 different values, too few for 4 levels; give more"):
        calibrated("silu", 2, "optimal", np.array([0.0, 1.0, 2.0, 3.0]), weight)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: fit("relu", 2), "no codebooks for 'relu'"),
        (lambda: fit("silu", 5), "silu: bits is 5"),
        (lambda: fit("silu", 2, 1.0, "best"), "silu: method is 'best'; choose among optimal, mm1, mm2, value"),
        (lambda: fit("silu", 2, 0.0), "silu: scale is 0.0; give the root mean square of the inputs, above 0"),
        (lambda: fit("silu", 2, math.nan), "silu: scale is nan"),
        (lambda: fit("silu", 2, {}), "silu: scale is {}"),
        (lambda: calibrated("silu", 2, "optimal", np.array([])), "0 different values, too few for 4 levels"),
        (lambda: calibrated("silu", 2, "optimal", np.array([1.0, math.nan])), "values or weights that are not finite"),
        (lambda: calibrated("silu", 2, "optimal", np.ones(4), -np.ones(4)), "weights below 0; remove them"),
        (lambda: calibrated("silu", 2, "optimal", np.ones(4), np.ones(3)), "weight has 3 values, but the sample has 4"),
        (lambda: dither("relu", 2), "no codebooks for 'relu'"),
        (lambda: dither("silu", 0), "silu: bits is 0"),
    ],
)
def test_what_cannot_be_fitted_is_an_error(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("function", codebooks.FUNCTIONS)
def test_dither_is_unbiased_at_every_x(function, bits):
    book = dither(function, bits)
    x = np.array([-30.0, -2.4, -1.4142, -0.3, 0.0, 0.1, 1.0, 1.4142, 2.4, 30.0])[:, None]
    u = ((np.arange(100_000) + 0.5) / 100_000 - 0.5) * book.step
    k = np.rint((DERIVATIVES[function](x) - book.least + u) / book.step)
    assert k.min() >= 0 and k.max() <= 2**bits - 1
    e = book.least + k * book.step - u - DERIVATIVES[function](x)
    assert np.abs(e.mean(-1)).max() < 2e-5 * book.step and np.allclose(e.var(-1), book.step**2 / 12, rtol=1e-3)
    assert np.abs(e).max() <= book.step / 2 * (1 + 1e-9)
