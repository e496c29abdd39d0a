"""silu and gelu: exact ones against fp64, coded ones against the twin; what is kept."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from near import assert_as_near
from tests.python.activations import ACTIVATIONS, of_kind
from values import SIXTEEN, all_sixteen, bits, kept, normal

from unswag import codebooks, reference
from unswag import jax as uj
from unswag.codebooks import Codebook
from unswag.jax.formulas import FUNCTIONS

ROWS = {name: row for name, row in of_kind("smooth").items() if row.ours_jax}
OURS = {name: partial(row.ours_jax, uj) for name, row in ROWS.items()}
THEIRS = {name: partial(row.jax, jax) for name, row in ROWS.items()}


def value_and_gradient(function, x):
    y, pull = jax.jit(lambda v: jax.vjp(function, v))(x)
    return np.asarray(y), np.asarray(pull(jnp.ones_like(y))[0])


def ulps(a, truth):
    """Distance in units of the last place of a's type at the truth, which is fp64."""
    finite = np.isfinite(truth)
    exponent = np.floor(np.log2(np.maximum(np.abs(truth), float(jnp.finfo(a.dtype).smallest_normal))))
    ulp = 2.0 ** (exponent - jnp.finfo(a.dtype).nmant)
    return (np.abs(a.astype(np.float64) - truth) / ulp)[finite]


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("act", OURS)
def test_every_16_bit_value_is_within_one_ulp_of_fp64_and_costs_one_rounding(act, dtype):
    """One rounding is off by 1 / sqrt(12) = 0.29 units in the root mean square."""
    x = all_sixteen(dtype)
    wide = np.asarray(x.astype(jnp.float32)).astype(np.float64)
    truths = reference.activation(wide, act), reference.activation_derivative(wide, act)
    tiny, largest = 1e-35, float(jnp.finfo(dtype).max)  # below it the exponential is subnormal, which XLA takes for 0
    for ours, truth in zip(value_and_gradient(OURS[act], x), truths, strict=True):
        assert (np.isnan(ours) == np.isnan(wide))[~np.isinf(wide)].all(), "NaN where there is none, or none where there is"
        inside = np.isfinite(truth) & (np.abs(truth) <= largest) & ((np.abs(truth) >= tiny) | (wide == 0))
        off = ulps(ours[inside], truth[inside])
        assert off.max() <= 1.0 and np.sqrt(np.mean(off**2)) <= 0.3


@pytest.mark.parametrize("act", OURS)
def test_float32_against_fp64(act):
    x = jnp.linspace(-ROWS[act].reach, ROWS[act].reach, 200_001, dtype=jnp.float32)
    wide = np.asarray(x).astype(np.float64)[None]
    truths = reference.activation(wide, act)[0], reference.activation_derivative(wide, act)[0]
    assert_as_near([(value_and_gradient(OURS[act], x), value_and_gradient(THEIRS[act], x), truths)], terms=4)


@pytest.mark.parametrize("act", FUNCTIONS)
def test_the_table_of_formulas(x64, act):
    """Every name of the table, which the C++ core has too where it was built, is the function of docs/math.md."""
    x = np.linspace(-ACTIVATIONS[act].reach, ACTIVATIONS[act].reach, 4001)[None]
    for f, truth in zip(FUNCTIONS[act], (reference.activation, reference.activation_derivative), strict=True):
        np.testing.assert_allclose(f(jnp.asarray(x)), truth(x, act), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("act", OURS)
def test_gradients_at_infinity(act):
    x = jnp.array([np.inf, -np.inf, np.nan, 1e30, -1e30], jnp.float32)
    dx = value_and_gradient(OURS[act], x)[1]
    assert dx[0] == 1 and dx[1] == 0 and np.isnan(dx[2]) and dx[3] == 1 and dx[4] == 0


@pytest.mark.parametrize("act", OURS)
def test_exact_keeps_x_alone(act):
    x = normal((8, 64), jnp.bfloat16)
    assert kept(OURS[act], x) == [("bfloat16", (8, 64))]
    assert len(kept(THEIRS[act], x)) > 1


# ---- codes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "rows256"])
@pytest.mark.parametrize("bits_", [1, 2, 3, 4])
@pytest.mark.parametrize("function", codebooks.FUNCTIONS)
def test_every_codebook_gives_its_levels(function, bits_, layout):
    x = normal((260, 40), jnp.float32, scale=2.0)
    dy = normal(x.shape, jnp.float32, seed=1)
    wide = np.asarray(x).astype(np.float64)
    tried = 0
    for name in codebooks.names(function, bits_):
        book = codebooks.codebook(function, bits_, name)
        y, pull = jax.vjp(lambda v, name=name: OURS[function](v, bits=bits_, codebook=name, layout=layout), x)
        of = np.asarray(x) if book.of == "x" else reference.activation_derivative(wide, function).astype(np.float32)
        code = reference.step_code(of, book.bounds)
        expected = np.asarray(book.levels, np.float32)[code] * np.asarray(dy)
        close_to_bound = np.abs(of[..., None] - np.float32(book.bounds)).min(-1) < (0 if book.of == "x" else 1e-6)
        assert (bits(pull(dy)[0]) == bits(expected))[~close_to_bound].all(), name
        assert (bits(y) == bits(OURS[function](x, implementation="xla"))).all()
        tried += 1
    assert tried >= 3


@pytest.mark.parametrize("bits_", [1, 2, 3, 4])
def test_codes_are_all_that_is_kept(bits_):
    x = normal((512, 64), jnp.bfloat16)
    assert kept(lambda v: uj.silu(v, bits=bits_, layout="rows"), x) == [("uint32", (512, 2 * bits_))]
    assert kept(lambda v: uj.silu(v, bits=bits_, layout="rows256"), x) == [("uint32", (16 * bits_, 64))]


def test_seed_codebook_is_the_founding_one():
    x = jnp.array([-1.0, 0.0, 0.1, 0.5, 0.6, 9.0])
    dx = jax.grad(lambda v: uj.silu(v, bits=2, codebook="seed").sum())(x)
    assert dx.tolist() == [0, 0, 0.5, 0.5, 1, 1]


@pytest.mark.parametrize(("act", "name"), [("silu", "mm1"), ("silu", "mm2"), ("silu", "resilu2"), ("gelu", "regelu2"),
                                           ("gelu_tanh", "mm1"), ("gelu_tanh", "fewbit")])  # fmt: skip
def test_short_names(act, name):
    x = normal((31, 8), jnp.float32)
    book = codebooks.codebook(act, 2, name)
    for function in (lambda v: OURS[act](v, bits=2, codebook=name), lambda v: OURS[act](v, codebook=book)):
        levels = np.asarray(book.levels, np.float32)[reference.step_code(np.asarray(x), book.bounds)]
        assert (np.asarray(jax.vjp(function, x)[1](jnp.ones_like(x))[0]) == levels).all()


def test_own_codebook():
    book = Codebook(1, (0.5,), (0.25, 2.0))
    assert jax.grad(lambda v: uj.silu(v, codebook=book).sum())(jnp.array([0.5, 0.6])).tolist() == [0.25, 2.0]


def test_nan_has_the_lowest_level():
    assert jax.grad(lambda v: uj.silu(v, bits=2, codebook="seed").sum())(jnp.array([np.nan])).tolist() == [0]


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda x: uj.silu(x, bits=5), ValueError, ["bits is 5", "1, 2, 3 or 4", "None to keep x"]),
    (lambda x: uj.silu(x, bits=2, codebook="best"), ValueError, ["no codebook 'best' of 2 bits", "ReSiLU2"]),
    (lambda x: uj.gelu(x, bits=2, codebook="dither2"), ValueError, ["gelu: 'dither2' has no levels"]),
    (lambda x: uj.silu(x, codebook="seed"), ValueError, ["codebook is 'seed' but bits is None", "name the bits"]),
    (lambda x: uj.gelu(x, layout="rows"), ValueError, ["layout is 'rows' but bits is None"]),
    (lambda x: uj.gelu(x, bits=2, codebook=Codebook(1, (0.0,), (0.0, 1.0))), ValueError, ["bits is 2", "has 1"]),
    (lambda x: Codebook(2, (1.0, 0.5), (0.0, 1.0, 2.0)), ValueError, ["bounds [1.0, 0.5] are not sorted", "ascending"]),
    (lambda x: uj.silu(x.astype(int)), TypeError, ["silu: x has dtype int32"]),
])  # fmt: skip
def test_errors_name_argument_value_and_remedy(call, error, words):
    with pytest.raises(error) as raised:
        call(jnp.ones(3))
    assert all(word in str(raised.value) for word in words), raised.value
