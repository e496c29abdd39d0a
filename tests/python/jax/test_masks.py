"""The ReLU family: bit for bit jax.nn, one bit per element kept, under every transformation of JAX."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from programs import collectives, compiled, devices
from tests.python.activations import of_kind
from values import SIXTEEN, all_sixteen, bits, kept, normal, special

from unswag import jax as uj
from unswag.jax.how import choose

PAIRS = {  # ours by XLA; test_ffi.py and test_pallas.py have the other implementations
    name: (partial(row.ours_jax, uj, implementation="xla"), partial(row.jax, jax))
    for name, row in of_kind("mask", "square").items()
}
LAYOUTS = ["rows", "rows256"]


def value_and_pullback(function, x, dy):
    y, pull = jax.jit(lambda x: jax.vjp(function, x))(x)
    return y, jax.jit(lambda pull, dy: pull(dy)[0])(pull, dy)


def assert_same_bits(ours, theirs, x, dy):
    for a, b in zip(value_and_pullback(ours, x, dy), value_and_pullback(theirs, x, dy), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (bits(a) == bits(b)).all(), np.argwhere(bits(a) != bits(b))[:5]


@pytest.mark.parametrize("dy", [1.0, -2.5, np.nan, np.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("name", PAIRS)
def test_every_16_bit_value(name, dtype, layout, dy):
    ours, theirs = PAIRS[name]
    x = all_sixteen(dtype)
    assert_same_bits(lambda v: ours(v, layout=layout), theirs, x, jnp.full(x.shape, dy, dtype))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 33), (2, 300, 5), (0, 4), (4, 0), (2, 3, 4, 65)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_special_values_and_shapes(x64, name, dtype, layout, shape):
    ours, theirs = PAIRS[name]
    x, dy = special(shape, dtype), special(shape, dtype, seed=1)
    if name == "leaky_relu":  # jax.nn adds the two branches, which makes +0 of a -0 cotangent; ours passes it as it is
        dy = jnp.where(dy == 0, jnp.zeros_like(dy), dy)
    assert_same_bits(lambda v: ours(v, layout=layout), theirs, x, dy)


def test_negative_zero_passes_leaky_relu_as_it_is():
    x, dy = jnp.array([1.0, -1.0]), jnp.array([-0.0, -0.0])
    dx = jax.vjp(uj.leaky_relu, x)[1](dy)[0]
    assert np.signbit(np.asarray(dx)).all() and not np.asarray(dx).any()


@pytest.mark.parametrize("implementation", [None, "xla", "ffi"])
@pytest.mark.parametrize("slope", [0.0, 0.3, -2.0])
def test_leaky_relu_slopes(slope, implementation):
    x, dy = normal((5, 40), jnp.float32), normal((5, 40), jnp.float32, seed=1)
    ours = partial(uj.leaky_relu, negative_slope=slope, implementation=implementation)
    assert_same_bits(ours, lambda v: jax.nn.leaky_relu(v, slope), x, dy)


@pytest.mark.parametrize("implementation", [None, "xla", "ffi"])
@pytest.mark.parametrize("ours", [uj.relu, uj.relu6, uj.leaky_relu, uj.silu, uj.gelu], ids=lambda f: f.__name__)
def test_a_gradient_can_be_differentiated_again(ours, implementation):
    """jax.nn's own second derivative, of the gradient with respect to dy and x; forward-mode over it in test_second.py."""
    x, dy, ddx = (normal((3, 40), jnp.float32, seed, 2.0) for seed in range(3))

    def second(function):
        def gradient(x, dy):
            return jax.vjp(function, x)[1](dy)[0]

        return jax.vjp(gradient, x, dy)[1](ddx)

    theirs = second(getattr(jax.nn, ours.__name__))
    for a, b in zip(second(partial(ours, implementation=implementation)), theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


# ---- what is kept -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu"])
def test_one_bit_per_element_is_kept_and_nothing_else(name, dtype):
    x = normal((512, 1024), dtype)
    rows = kept(lambda v: PAIRS[name][0](v, layout="rows"), x)
    rows256 = kept(lambda v: PAIRS[name][0](v, layout="rows256"), x)
    assert rows == [("uint32", (512, 32))] and rows256 == [("uint32", (16, 1024))]
    assert 512 * 32 * 4 == 16 * 1024 * 4 == x.size // 8


def test_relu2_keeps_x_alone():
    x = normal((8, 64), jnp.bfloat16)
    assert kept(uj.relu2, x) == [("bfloat16", (8, 64))]
    assert len(kept(PAIRS["relu2"][1], x)) > 1


def test_the_compiled_forward_gives_out_only_the_mask():
    x = normal((512, 1024), jnp.float32)
    compiled = jax.jit(lambda v: jax.vjp(uj.relu, v)[1]).lower(x).compile()
    assert compiled.memory_analysis().output_size_in_bytes == x.size // 8


# ---- transformations ------------------------------------------------------------------------------------------------------


def loss(relu):
    return lambda x: (relu(x).astype(jnp.float32) ** 2).sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_vmap_scan_and_remat(layout):
    x = normal((4, 300, 24), jnp.float32)

    def ours(v):
        return uj.relu(v, layout=layout)

    def scanned(relu):
        def layer(carry, w):
            return jax.checkpoint(relu)(carry * w), None

        return lambda v: (jax.lax.scan(layer, v, jnp.arange(1.0, 4.0))[0] ** 2).sum()

    for make in (loss, lambda relu: lambda v: jax.vmap(loss(relu), in_axes=2)(v).sum(), scanned):
        a, b = (jax.jit(jax.grad(make(relu)))(x) for relu in (ours, jax.nn.relu))
        assert (bits(a) == bits(b)).all()


def test_scan_over_layers_stacks_one_mask_per_layer():
    x, w = normal((8, 64), jnp.float32), normal((5, 64), jnp.float32)
    f = lambda v: jax.lax.scan(lambda c, u: (uj.relu(c + u), None), v, w)[0]  # noqa: E731
    assert kept(f, x) == [("uint32", (5, 8, 2))]


def test_forward_mode_is_an_error_of_jax():
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(uj.relu, (jnp.ones(4),), (jnp.ones(4),))


@pytest.mark.parametrize(("layout", "spec"), [
    ("rows", P("x")), ("rows", P(None, "x")), ("rows", P(None, None, "x")),
    ("rows256", P("x")), ("rows256", P(None, "x")), ("rows256", P(None, None, "x")),
])  # fmt: skip
def test_automatic_sharding_adds_no_communication(layout, spec):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, spec)
    x, dy = (jax.device_put(normal((4, 1024, 128), jnp.float32, seed), sharding) for seed in (0, 1))

    def step(x, dy):
        y, pull = jax.vjp(lambda v: uj.relu(v, layout=layout), x)
        return y, pull(dy)[0]

    compiled = jax.jit(step, in_shardings=(sharding, sharding), out_shardings=(sharding, sharding)).lower(x, dy).compile()
    assert not collectives(compiled)
    for a, b in zip(compiled(x, dy), (jax.nn.relu(x), jnp.where(x > 0, dy, 0)), strict=True):
        assert (bits(a) == bits(b)).all()


def forward_backward_of(relu):
    def step(x, dy):
        y, pull = jax.vjp(relu, x)
        return y, pull(dy)[0]

    return step


def assert_local(relu, x, dy):
    """Bits of jax.nn, and every device works by itself."""
    program = compiled(forward_backward_of(relu), x, dy)
    assert not collectives(program)
    for a, b in zip(program(x, dy), (jax.nn.relu(x), jnp.where(x > 0, dy, 0)), strict=True):
        assert a.sharding.is_equivalent_to(x.sharding, x.ndim) and (bits(a) == bits(b)).all()


@pytest.mark.parametrize("ours", [{"layout": "rows"}, {"layout": "rows256"}, {"implementation": "ffi"}, {}], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8])
def test_few_rows_or_columns_on_a_device_need_no_communication(count, ours):
    """12 rows, 5 columns of 96 x 40 on a device of eight: no word may hold bits of two devices."""
    mesh = devices(count)
    shapes = [((96, 40 * 3), P("data")), ((96, 40 * 3), P(None, "data"))]
    for shape, spec in [*shapes, ((2, 768, 24), P(None, "data")), ((24,), P("data"))][: None if count in (3, 8) else 2]:
        x, dy = (jax.device_put(special(shape, jnp.float32, seed), NamedSharding(mesh, spec)) for seed in (0, 1))
        assert_local(partial(uj.relu, **ours), x, dy)


@pytest.mark.parametrize("spec", [P("a"), P("b"), P(("a", "b")), P(("b", "a")), P("b", "a"), P(None, ("a", "b"))], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_axes_of_devices(layout, spec):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:6]).reshape(2, 3), ("a", "b"))
    x, dy = (jax.device_put(special((48, 60), jnp.float32, seed), NamedSharding(mesh, spec)) for seed in (0, 1))
    assert_local(partial(uj.relu, layout=layout), x, dy)


@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_explicit_sharding(layout, spec):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    x, dy = (jax.device_put(special((256, 64), jnp.float32, seed), NamedSharding(mesh, spec)) for seed in (0, 1))
    assert_local(partial(uj.relu, layout=layout), x, dy)
    uncut = 1 if (layout == "rows256") == (spec == P(None, "x")) else 4  # an explicit axis cuts what it is said to cut
    assert choose("relu", x, "xla", layout, bits=1).parts == uncut


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shardings_that_jax_does_not_show_are_right_too(layout):
    """Given by in_shardings alone: then the words are summed over the devices."""
    sharding = NamedSharding(devices(4), P("data") if layout == "rows256" else P(None, "data"))
    x, dy = special((256, 64), jnp.float32), special((256, 64), jnp.float32, 1)
    step = jax.jit(forward_backward_of(partial(uj.relu, layout=layout)), in_shardings=(sharding, sharding))
    for a, b in zip(step(x, dy), (jax.nn.relu(x), jnp.where(x > 0, dy, 0)), strict=True):
        assert (bits(a) == bits(b)).all()


def test_the_default_on_a_tpu_has_256_rows_on_every_device(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    found = {}
    for rows in (255, 256, 512, 1024, 1536):
        for count in (1, 4):
            x = jax.device_put(jnp.ones((rows - rows % count, 8)), NamedSharding(devices(count), P("data")))
            found[rows, count] = choose("relu", x, None, None, bits=1).layout
    assert [key for key, layout in found.items() if layout == "rows256"] == [
        *[(256, 1), (512, 1), (1024, 1), (1024, 4), (1536, 1)]
    ]
    local = []

    def each(x):
        local.append(choose("relu", x, None, None, bits=1))
        return x

    jax.shard_map(each, mesh=devices(4), in_specs=P("data"), out_specs=P("data"))(jnp.ones((1536, 8)))
    assert local[0].layout == "rows256" and local[0].parts == 1, "384 rows by themselves"


def test_parts_do_not_change_what_one_device_keeps():
    x = normal((96, 40), jnp.float32)
    assert kept(partial(uj.relu, layout="rows"), x) == [("uint32", (96, 2))]
    assert kept(partial(uj.relu, layout="rows256"), x) == [("uint32", (8, 40))]
    shared = jax.device_put(x, NamedSharding(devices(4), P("data")))
    assert kept(partial(uj.relu, layout="rows256"), shared) == [("uint32", (4, 8, 40))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_shard_map(layout):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = normal((4, 300, 64), jnp.float32)
    ours = jax.shard_map(lambda v: uj.relu(v, layout=layout), mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    assert (bits(jax.jit(jax.grad(loss(ours)))(x)) == bits(jax.grad(loss(jax.nn.relu))(x))).all()


# ---- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: uj.relu(jnp.arange(3)), TypeError, ["relu: x has dtype int32", "x.astype(jnp.float32)"]),
    (lambda: uj.relu6("x"), TypeError, ["relu6: x is a str", "jnp.asarray(x)"]),
    (lambda: uj.relu(jnp.ones(3), implementation="cuda"), ValueError, ["relu: implementation is 'cuda'", "'xla'"]),
    (lambda: uj.relu(jnp.ones(3), layout="cols"), ValueError, ["relu: layout is 'cols'", "'rows' or 'rows256'"]),
    (lambda: uj.leaky_relu(jnp.ones(3), jnp.ones(())), TypeError, ["negative_slope is an array", "Python number"]),
])  # fmt: skip
def test_errors_name_argument_value_and_remedy(call, error, words):
    with pytest.raises(error) as raised:
        call()
    assert all(word in str(raised.value) for word in words), raised.value


def test_numpy_arrays_and_numbers_are_taken():
    assert uj.relu(np.array([-1.0, 2.0], np.float32)).tolist() == [0.0, 2.0]
    assert uj.relu(-3.0) == 0


# ---- weak types -------------------------------------------------------------------------------------------------------------


TRANSFORMS = {
    "value": lambda f: f,
    "jit": jax.jit,
    "grad": lambda f: jax.grad(lambda v: f(v).sum()),
    "jit grad": lambda f: jax.jit(jax.grad(lambda v: f(v).sum())),
    "grad grad": lambda f: jax.grad(lambda v: jax.grad(lambda v: f(v * v).sum())(v).sum()),
    "checkpoint": lambda f: jax.jit(jax.grad(lambda v: (jax.checkpoint(f)(v) + v).sum())),
    "vmap grad": lambda f: lambda x: jax.vmap(lambda v, _: jax.grad(lambda v: f(v).sum())(v), (None, 0))(x, jnp.ones(3)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "silu", "gelu"])
def test_a_weak_type_comes_back(name, transform):
    """As from jax.nn, whose gelu alone loses that of the value: a bfloat16 array times such a number is bfloat16."""
    transform = TRANSFORMS[transform]
    for x, weak in ((2.0, True), (jnp.full(3, 2, jnp.float32), False)):
        stock = transform(getattr(jax.nn, name))(x)
        for implementation in (None, "xla"):
            mine = transform(partial(getattr(uj, name), implementation=implementation))(x)
            assert mine.weak_type == weak and ((jnp.ones(3, jnp.bfloat16) * mine).dtype == jnp.bfloat16) == weak
            np.testing.assert_allclose(np.asarray(mine, float), np.asarray(stock, float), rtol=1e-4)


def test_a_weak_type_comes_back_from_a_code():
    assert jax.grad(lambda x: uj.silu(x, bits=2))(2.0).weak_type and uj.silu(2.0, bits=2).weak_type
