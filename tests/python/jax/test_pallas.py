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
