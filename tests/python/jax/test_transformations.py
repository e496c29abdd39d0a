"""Every function under the transformations of JAX: stock's value, or an error that says so; never a zero in silence."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from programs import QUICK
from values import normal

from unswag import jax as uj
from unswag.jax.blocks import gated_mlp, linear_cross_entropy, mlp

LABELS = jnp.asarray([1, -100, 4, 0])
KEY = jax.random.key(3)


def cross_entropy(hidden, weight):
    losses = -jnp.take_along_axis(jax.nn.log_softmax(hidden @ weight.T), jnp.maximum(LABELS, 0)[:, None], -1)[:, 0]
    return jnp.where(LABELS >= 0, losses, 0)


def norm(x, weight, bias, centre=True):
    v = x - x.mean(-1, keepdims=True) if centre else x
    return v * jax.lax.rsqrt((v * v).mean(-1, keepdims=True) + 1e-6) * weight + bias


X, UP, DOWN, ROW = (4, 6), (6, 10), (10, 5), (6,)
CASES = {  # ours, stock's spelling, shapes
    "relu": (uj.relu, jax.nn.relu, [X]),
    "relu, rows256": (partial(uj.relu, layout="rows256"), jax.nn.relu, [X]),
    "relu, pallas": (partial(uj.relu, implementation="pallas"), jax.nn.relu, [X]),
    "leaky_relu": (uj.leaky_relu, jax.nn.leaky_relu, [X]),
    "relu2": (uj.relu2, lambda x: jnp.square(jax.nn.relu(x)), [X]),
    "silu": (uj.silu, jax.nn.silu, [X]),
    "gelu": (uj.gelu, jax.nn.gelu, [X]),
    "swiglu": (uj.swiglu, lambda g, u: jax.nn.silu(g) * u, [X, X]),
    "geglu, ffi": (partial(uj.geglu, implementation="ffi"), lambda g, u: jax.nn.gelu(g) * u, [X, X]),
    "rms_norm": (uj.rms_norm, lambda x, w: norm(x, w, 0, False), [X, ROW]),
    "layer_norm": (uj.layer_norm, norm, [X, ROW, ROW]),
    "dropout": (
        lambda x: uj.dropout(x, 0.5, KEY),
        lambda x: jnp.where(jax.random.bernoulli(KEY, 0.5, x.shape), 2 * x, 0),
        [X],
    ),
    "mlp, mask": (partial(mlp, keep="mask", chunk=3), lambda x, u, d: jax.nn.relu(x @ u) @ d, [X, UP, DOWN]),
    "mlp, relu2": (partial(mlp, act="relu2", chunk=3), lambda x, u, d: jnp.square(jax.nn.relu(x @ u)) @ d, [X, UP, DOWN]),
    "gated_mlp": (partial(gated_mlp, chunk=3), lambda x, g, u, d: (jax.nn.silu(x @ g) * (x @ u)) @ d, [X, UP, UP, DOWN]),
    "cross entropy": (
        lambda h, w: linear_cross_entropy(h, w, LABELS, reduction="none", chunk=3), cross_entropy, [X, (9, 6)],
    ),
    "linear_relu": (lambda x, w: _linear_relu(x, w), lambda x, w: jax.nn.relu(x @ w), [X, UP]),
}  # fmt: skip
CODES = {
    "silu": lambda x: uj.silu(x, bits=2),
    "gelu": lambda x: uj.gelu(x, bits=4, layout="rows256"),
    "gelu, erf": lambda x: uj.gelu(x, False, bits=1, codebook="optimal"),
}


def _linear_relu(x, w):
    from unswag.jax.linear_relu import linear_relu

    return linear_relu(x, w)


def arguments(shapes):
    return [normal(shape, jnp.float64, i) for i, shape in enumerate(shapes)]


def loss(function):
    """dy depends on the arguments."""
    return lambda *args: jnp.sum(jnp.sin(function(*args)))


def gradient_sum(function):
    """dy does not: then a derivative that forgets what was kept is 0."""
    return lambda x, *rest: jnp.sum(jax.grad(lambda x: jnp.sum(function(x, *rest)))(x) ** 2)


def along(function, x, rest):
    """The gradient of one loss along a line of scales of x."""
    return lambda scale: jax.grad(lambda x: loss(function)(x * scale, *rest))(x)


SECOND = {  # of the arguments x, *rest
    "reverse over reverse": lambda f: jax.grad(lambda *a: sum(jnp.sum(g**2) for g in jax.grad(loss(f), range(len(a)))(*a))),
    "of a constant cotangent": lambda f: jax.grad(gradient_sum(f)),
    "forward over reverse": lambda f: lambda x, *rest: jax.jvp(jax.grad(lambda x: loss(f)(x, *rest)), (x,), (jnp.cos(x),))[1],
    "vmap of both": lambda f: lambda x, *rest: jax.vmap(
        lambda s: jax.grad(lambda x: gradient_sum(f)(x * s, *rest))(x)
    )(jnp.arange(1.0, 3.0)),
    "grad of vmap": lambda f: lambda x, *rest: jax.grad(
        lambda s: jnp.sum(jnp.cos(jax.vmap(along(f, x, rest))(s)))
    )(jnp.arange(1.0, 3.0)),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(gradient_sum(jax.checkpoint(f, policy=uj.save())))),
    "scan": lambda f: jax.grad(
        lambda x, *rest: jax.lax.scan(lambda c, s: (c + gradient_sum(f)(x * s, *rest), None), 0.0, jnp.arange(1.0, 3.0))[0]
    ),
}  # fmt: skip


BOTH = ["reverse over reverse", "forward over reverse"]
TRIED = [(name, how) for name in CASES for how in (SECOND if name in ("relu", "silu") else BOTH)]


@pytest.mark.parametrize(("name", "how"), TRIED)
def test_second_derivatives_are_those_of_stock(x64, name, how):
    ours, stock, shapes = CASES[name]
    args = arguments(shapes)
    found, expected = (jax.jit(SECOND[how](function), compiler_options=QUICK)(*args) for function in (ours, stock))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "how"), [(name, how) for name in ("relu", "silu", "swiglu") for how in ("scan", *BOTH)])
def test_second_derivatives_through_the_kernels(name, how):
    """Of float32, which has kernels on the CPU; JAX drops custom derivatives inside a scan."""
    ours, stock, shapes = CASES[name]
    args = [normal(shape, jnp.float32, i) for i, shape in enumerate(shapes)]
    found, expected = (jax.jit(SECOND[how](function), compiler_options=QUICK)(*args) for function in (ours, stock))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_loop_over_pallas_kernels_says_why_it_cannot_be_differentiated_twice():
    ours = partial(uj.relu, implementation="pallas")
    inner = jax.grad(lambda x: jax.lax.scan(lambda c, s: (c + jnp.sum(ours(x * s)), None), 0.0, jnp.ones(2))[0])
    with pytest.raises(NotImplementedError, match=r"relu: its Pallas kernels have no derivative .* pass implementation='xla'"):
        jax.grad(lambda x: jnp.sum(jnp.cos(inner(x))))(normal(X, jnp.float32))


@pytest.mark.parametrize("how", SECOND)
@pytest.mark.parametrize("name", CODES)
def test_second_derivatives_of_codes_are_refused(name, how):
    op = name.split(",")[0]
    with pytest.raises(NotImplementedError, match=rf"{op}: bits is \d: a gradient from a code cannot .* leave out bits"):
        jax.jit(SECOND[how](CODES[name]))(normal(X, jnp.float32))


@pytest.mark.parametrize("name", CODES)
def test_a_gradient_from_a_code_may_be_differentiated_by_anything_else(name):
    x, dy, v = (normal(X, jnp.float32, seed) for seed in range(3))
    levels = jax.vjp(CODES[name], x)[1](jnp.ones_like(x))[0]
    by_dy = jax.grad(lambda dy: jnp.sum(jax.vjp(CODES[name], x)[1](dy)[0] * v))(dy)
    np.testing.assert_allclose(by_dy, levels * v, rtol=1e-6)
    scale = jax.grad(lambda s: jnp.sum(jax.grad(lambda x: s * jnp.sum(CODES[name](x)))(x)))(2.0)
    np.testing.assert_allclose(scale, levels.sum(), rtol=1e-5)


@pytest.mark.parametrize("name", ["relu", "swiglu", "rms_norm", "dropout", "gated_mlp", "gelu"])
def test_forward_mode_of_the_function_itself_is_an_error_of_jax(name):
    function, _, shapes = CASES[name]
    args = tuple(normal(shape, jnp.float32, i) for i, shape in enumerate(shapes))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(function, args, args)


# ---- export -----------------------------------------------------------------------------------------------------------------

EXPORTED = {  # of x [..., 64]
    "relu": uj.relu,
    "relu, rows256": partial(uj.relu, layout="rows256"),
    "silu": uj.silu,
    "silu, codes": partial(uj.silu, bits=3),
    "swiglu": lambda x: uj.swiglu(x, x + 1),
    "rms_norm": uj.rms_norm,
    "dropout": lambda x: uj.dropout(x, 0.5, KEY),
    "mlp": lambda x: mlp(x, jnp.ones((64, 40)), jnp.ones((40, 8)), keep="mask", chunk=3),
    "gated_mlp": lambda x: gated_mlp(x, *[jnp.ones((64, 40))] * 2, jnp.ones((40, 8)), chunk=3),
    "cross entropy": lambda x: linear_cross_entropy(x, jnp.ones((9, 64)) / 8, jnp.zeros(x.shape[:-1], int)),
}


ONE = [(name, "4, 64", ("cpu",)) for name in ("relu", "silu")]
ALL = [(name, "2, b, 64", ("cpu", "tpu", "cuda")) for name in EXPORTED]


@pytest.mark.parametrize(("name", "symbolic", "platforms"), [*ONE, *ALL])
@pytest.mark.filterwarnings("ignore:.*so they are not cut into chunks")
def test_export(name, symbolic, platforms):
    """Plain XLA, which runs where UnSwag is not."""
    program = jax.jit(jax.value_and_grad(loss(EXPORTED[name])), compiler_options=QUICK)
    exported = export.export(program, platforms=platforms)(jax.ShapeDtypeStruct(export.symbolic_shape(symbolic), jnp.float32))
    assert "custom_call @unswag" not in exported.mlir_module()
    x = normal((4, 64) if symbolic[0] == "4" else (2, 7, 64), jnp.float32)
    for a, b in zip(exported.call(x), program(x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_export_of_what_was_asked_for_by_name_is_that_or_an_error():
    program = jax.jit(jax.grad(loss(partial(uj.relu, implementation="ffi"))))
    calls = [export.DisabledSafetyCheck.custom_call(f"unswag_mask_{way}_v1") for way in ("forward", "backward")]
    assert "custom_call @unswag" in export.export(program, disabled_checks=calls)(jnp.ones((4, 64))).mlir_module()
    with pytest.raises(NotImplementedError, match="'ffi' is for the CPU"):
        export.export(program, platforms=("cpu", "tpu"))(jnp.ones((4, 64)))


@pytest.mark.parametrize(("symbolic", "rows"), [("b, c", (3, 45)), ("b, 32*c", (3, 64)), ("b", (5,))])
@pytest.mark.parametrize("name", ["relu", "relu, rows256", "silu, codes"])
def test_export_of_any_number_of_columns(name, symbolic, rows):
    program = jax.jit(jax.value_and_grad(loss(EXPORTED[name])))
    exported = export.export(program)(jax.ShapeDtypeStruct(export.symbolic_shape(symbolic), jnp.float32))
    for a, b in zip(exported.call(normal(rows, jnp.float32)), program(normal(rows, jnp.float32)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_symbolic_tokens_are_cut_into_chunks_where_they_are_enough():
    def exported(constraints):
        shape = export.symbolic_shape("s, 64", constraints=constraints)
        return export.export(jax.jit(EXPORTED["mlp"]))(jax.ShapeDtypeStruct(shape, jnp.float32))

    with pytest.warns(UserWarning, match=r"mlp: the s tokens to export may be fewer than chunk, 3, .*constraints=\['s >= 3'\]"):
        exported([])
    assert "tensor<3x40xf32>" in exported(["s >= 3"]).mlir_module()
