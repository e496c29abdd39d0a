"""The Pallas kernels, interpreted: the bits of jax.nn and the bytes of the XLA form, and an error where XLA would partition."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tests.python.jax.values import SIXTEEN, all_sixteen, bits, kept, normal, special

from unswag.jax import leaky_relu, relu, relu6
from unswag.jax.pallas import linear_relu

PAIRS = [(relu, jax.nn.relu), (relu6, jax.nn.relu6), (leaky_relu, jax.nn.leaky_relu)]
SHAPES = [(7,), (300, 200), (2, 3, 257, 130), (530, 1100)]


def ours(function):
    return partial(function, implementation="pallas")


def vjp_bits(function, x, dy):
    y, backward = jax.vjp(function, x)
    return bits(y), bits(backward(dy)[0])


def same(a, b):
    return all(np.array_equal(one, other) for one, other in zip(a, b, strict=True))


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize(("function", "stock"), PAIRS)
def test_every_sixteen_bit_value_has_the_bits_of_jax_nn(function, stock, dtype):
    x = all_sixteen(dtype)
    one, any_dy = jnp.ones_like(x), jnp.flip(x)
    assert same(vjp_bits(ours(function), x, one), vjp_bits(stock, x, one))
    # jax.nn.leaky_relu multiplies every dy, which quiets NaN and flushes subnormal numbers; all of ours select
    plain = partial(function, layout="rows256") if function is leaky_relu else stock
    assert same(vjp_bits(ours(function), x, any_dy), vjp_bits(plain, x, any_dy))


@pytest.mark.parametrize(
    ("function", "stock", "shape"), [(*PAIRS[0], shape) for shape in SHAPES] + [(*pair, (300, 200)) for pair in PAIRS[1:]]
)
def test_any_shape_has_the_bits_of_jax_nn_and_the_words_of_the_xla_form(function, stock, shape):
    x, dy = special(shape, jnp.float32), normal(shape, jnp.float32, seed=1)
    assert same(vjp_bits(ours(function), x, dy), vjp_bits(stock, x, dy))
    words = jax.tree.leaves(jax.vjp(ours(function), x)[1])
    assert same(words, jax.tree.leaves(jax.vjp(partial(function, layout="rows256"), x)[1]))
    assert any(one.any() for one in words)


def test_no_dimensions():
    assert [float(jax.grad(ours(relu))(x)) for x in (2.0, -2.0)] == [1, 0]


def test_float64(x64):
    x, dy = special((260, 40), jnp.float64), special((260, 40), jnp.float64, seed=1)
    assert same(vjp_bits(ours(relu6), x, dy), vjp_bits(jax.nn.relu6, x, dy))


def test_keeps_the_mask_alone():
    assert kept(ours(relu), jnp.ones((2, 512, 300))) == [("uint32", (2, 16, 300))]


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4)])
def test_no_elements(shape):
    x = jnp.zeros(shape)
    y, backward = jax.vjp(ours(relu), x)
    assert y.shape == backward(x)[0].shape == shape


def test_under_jit_vmap_scan_and_remat():
    x, dy = special((3, 270, 140), jnp.float32), normal((3, 270, 140), jnp.float32)

    def gradient(function):
        return jax.grad(lambda x: jnp.vdot(function(x), dy))

    want = bits(gradient(jax.nn.relu)(x))
    mine = ours(relu)
    for way in (
        jax.jit(mine),
        jax.vmap(mine),
        jax.vmap(mine, in_axes=2, out_axes=2),
        lambda x: jax.lax.map(mine, x),
        jax.checkpoint(mine),
    ):
        assert np.array_equal(bits(gradient(way)(x)), want)


@pytest.mark.parametrize("spec", [P("data", "model"), P("model")])
def test_inside_shard_map(spec):
    x, dy = special((2048, 256), jnp.float32), normal((2048, 256), jnp.float32)

    def both(x, dy):
        y, backward = jax.vjp(ours(relu), x)
        return y, backward(dy)[0]

    sharded = jax.shard_map(both, mesh=mesh(), in_specs=(spec, spec), out_specs=(spec, spec), check_vma=False)
    place = NamedSharding(mesh(), spec)
    got = jax.jit(sharded)(jax.device_put(x, place), jax.device_put(dy, place))
    assert same([bits(one) for one in got], vjp_bits(jax.nn.relu, x, dy))


@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("spec", [P("data", None), P(None, "model"), P()])
def test_automatic_sharding_is_an_error_that_names_the_remedy(way, spec):
    x = jax.device_put(special((512, 256), jnp.float32), NamedSharding(mesh(), spec))
    gradient = way(jax.grad(lambda x: ours(relu)(x).sum()))
    with pytest.raises(ValueError, match=r"relu: implementation is 'pallas' but .* 4 devices; .*jax.shard_map.*'xla'"):
        gradient(x)


def test_a_mesh_that_is_manual_in_part_is_an_error():
    x = special((512, 256), jnp.float32)
    gradient = jax.grad(lambda x: ours(relu)(x).sum())
    half = jax.shard_map(gradient, mesh=mesh(), in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
    with pytest.raises(ValueError, match=r"implementation is 'pallas' but .* 2 devices; .*jax.shard_map"):
        jax.jit(half)(x)


def test_one_device_of_a_mesh_is_no_automatic_sharding():
    one = Mesh(np.array(jax.devices()[:1]), ("data",))
    x = jax.device_put(special((512, 256), jnp.float32), NamedSharding(one, P("data")))
    assert same(vjp_bits(jax.jit(ours(relu)), x, x), vjp_bits(jax.nn.relu, x, x))


def test_a_layout_it_does_not_write_is_an_error():
    with pytest.raises(ValueError, match="relu: layout is 'rows', which implementation 'pallas' does not have"):
        relu(jnp.ones((4, 4)), implementation="pallas", layout="rows")
    assert kept(partial(relu, implementation="pallas", layout="rows256"), jnp.ones((4, 4))) == [("uint32", (8, 4))]


def test_a_platform_without_kernels_is_an_error():
    traced = jax.jit(jax.grad(lambda x: ours(relu)(x).sum())).trace(jnp.ones((4, 4)))
    with pytest.raises(ValueError, match=r"'pallas' but its kernels are for tpu .* not cuda; .*implementation='xla'"):
        traced.lower(lowering_platforms=("cuda",))


# ---- linear_relu


LINEAR = [((300, 200), 70), ((5,), 3), ((2, 257, 640), 1100), ((520, 1030), 130)]


@pytest.mark.parametrize(
    ("shape", "cols", "dtype"), [(*case, jnp.float32) for case in LINEAR] + [((300, 200), 70, dtype) for dtype in SIXTEEN]
)
def test_linear_relu_has_the_values_of_plain_jax_and_the_gradient_of_its_own_output(shape, cols, dtype):
    x, w = normal(shape, dtype), normal((shape[-1], cols), dtype, seed=1, scale=shape[-1] ** -0.5)
    dy = normal((*shape[:-1], cols), dtype, seed=2)
    y, backward = jax.vjp(linear_relu, x, w)
    assert y.dtype == x.dtype and y.shape == dy.shape
    plain = jax.nn.relu(jnp.matmul(x.astype(jnp.float32), w.astype(jnp.float32), precision="highest"))
    unit = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(plain), rtol=unit, atol=1e-5)

    dz = jnp.where(y > 0, dy, 0)  # exact, from the y that was returned
    _, through = jax.vjp(jnp.matmul, x, w)
    for got, want in zip(backward(dy), through(dz), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2 * unit, atol=1e-4)


def test_linear_relu_masks_what_it_returns():
    """Every value of y is tiny: bits of the unrounded sums would pass gradients where the rounded y is 0."""
    x = jnp.full((256, 8), 2.0**-14, jnp.float16)
    w = jnp.tile(jnp.asarray([2.0**-12, -(2.0**-12), 2.0**-14, 0.0], jnp.float16), (8, 32))
    y, backward = jax.vjp(lambda x: linear_relu(x, w), x)
    assert 0 < int((y > 0).sum()) < y.size / 2
    dx = backward(jnp.ones_like(y))[0]
    want = jnp.matmul((y > 0).astype(jnp.float16), w.T)
    assert np.array_equal(bits(dx), bits(want))


def test_linear_relu_keeps_mask_x_and_w():
    assert sorted(kept(linear_relu, jnp.ones((2, 512, 64)), jnp.ones((64, 300)))) == [
        ("float32", (2, 512, 64)),
        ("float32", (64, 300)),
        ("uint32", (2, 16, 300)),
    ]


def test_linear_relu_inside_shard_map():
    x, w, dy = normal((1024, 64), jnp.float32), normal((64, 256), jnp.float32, seed=1), normal((1024, 256), jnp.float32, seed=2)

    def loss(x, w, dy):
        return jax.lax.psum(jnp.vdot(linear_relu(x, w), dy), ("data", "model"))

    sharded = jax.shard_map(
        loss, mesh=mesh(), in_specs=(P("data"), P(None, "model"), P("data", "model")), out_specs=P(), check_vma=False
    )
    got = jax.jit(jax.grad(sharded, argnums=(0, 1)))(x, w, dy)
    want = jax.grad(lambda x, w: jnp.vdot(jax.nn.relu(x @ w), dy), argnums=(0, 1))(x, w)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


def test_linear_relu_under_automatic_sharding_is_an_error():
    x = jax.device_put(jnp.ones((512, 64)), NamedSharding(mesh(), P("data")))
    with pytest.raises(ValueError, match=r"linear_relu: x and w: .* 4 devices; .*jax.shard_map, or use relu"):
        jax.jit(linear_relu)(x, jnp.ones((64, 32)))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_linear_relu_without_elements(shape):
    y, backward = jax.vjp(linear_relu, jnp.ones(shape), jnp.ones((shape[1], 4)))
    assert y.shape == (shape[0], 4) and not y.any()
    assert [one.shape for one in backward(y)] == [shape, (shape[1], 4)]


@pytest.mark.parametrize(
    ("x", "w", "error", "words"),
    [
        (jnp.ones((4, 4), jnp.int32), jnp.ones((4, 4)), TypeError, "linear_relu: x has dtype int32"),
        (jnp.ones((4, 4)), jnp.ones((4, 4), jnp.bfloat16), TypeError, r"w bfloat16; pass w.astype\(float32\)"),
        (jnp.ones((4, 4)), jnp.ones((5, 4)), ValueError, r"w \(5, 4\); pass \[..., k\] and \[k, n\]"),
        (jnp.ones(()), jnp.ones((1, 4)), ValueError, r"x has shape \(\)"),
        (jnp.ones((4, 4)), jnp.ones(4), ValueError, r"w \(4,\)"),
    ],
)
def test_linear_relu_says_what_is_wrong(x, w, error, words):
    with pytest.raises(error, match=words):
        linear_relu(x, w)
