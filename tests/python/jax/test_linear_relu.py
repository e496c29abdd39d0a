"""linear_relu, interpreted: the values of plain JAX, the gradient of its own output, and what it keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tests.python.jax.values import SIXTEEN, bits, kept, normal

from unswag.jax.linear_relu import linear_relu


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))


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
