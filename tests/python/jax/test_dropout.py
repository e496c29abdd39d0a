from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from programs import collectives, compiled, forward_backward, four_devices
from values import bits, kept, normal

from unswag.jax import dropout

KEY = jax.random.key(3)


@pytest.mark.parametrize(("dtype", "rate"), [(jnp.float32, 0.1), (jnp.bfloat16, 0.5), (jnp.float16, 0.1), (jnp.float64, 0.9)])
def test_the_backward_draws_the_mask_of_the_forward(x64, dtype, rate):
    x = jnp.ones((40, 50), dtype)
    y, dx = forward_backward(lambda x: dropout(x, rate, KEY), [x], x)
    np.testing.assert_array_equal(bits(y), bits(dx))
    assert y.dtype == dtype
    fraction = float(np.mean(np.asarray(y) == 0))
    assert abs(fraction - rate) < 5 * np.sqrt(rate * (1 - rate) / x.size)
    np.testing.assert_array_equal(np.unique(np.asarray(y)), np.asarray([0, 1 / (1 - rate)]).astype(dtype))


def test_the_draws_are_those_of_bernoulli():
    x = normal((7, 9), jnp.float32)
    keep = jax.random.bernoulli(KEY, 0.75, x.shape)
    np.testing.assert_array_equal(dropout(x, 0.25, KEY), jnp.where(keep, x / 0.75, 0))
    assert (np.asarray(dropout(x, 0.25, jax.random.key(4))) != np.asarray(dropout(x, 0.25, KEY))).any()


def test_keeps_the_key_alone():
    x = normal((40, 50), jnp.float32)
    assert kept(lambda x: dropout(x, 0.5, KEY), x) == [("key<fry>", ())]
    old = jax.random.PRNGKey(3)
    assert kept(lambda x: dropout(x, 0.5, old), x) == [("uint32", (2,))]
    np.testing.assert_array_equal(dropout(x, 0.5, old), dropout(x, 0.5, KEY))


def test_nothing_is_dropped():
    x = normal((4, 5), jnp.float32)
    for y in (dropout(x, 0.0, KEY), dropout(x, 0.5, KEY, deterministic=True), dropout(x, 0, KEY)):
        np.testing.assert_array_equal(bits(y), bits(x))
    assert kept(lambda x: dropout(x, 0.5, KEY, deterministic=True), x) == []


def test_dropped_elements_hide_nan_and_infinity():
    x = jnp.asarray([np.nan, np.inf, -np.inf, -0.0] * 50, jnp.float32)
    y, dx = forward_backward(lambda x: dropout(x, 0.5, KEY), [x], x)
    keep = np.asarray(jax.random.bernoulli(KEY, 0.5, x.shape))
    for found in (y, dx):
        np.testing.assert_array_equal(bits(found[~keep]), 0)
        np.testing.assert_array_equal(found[keep], x[keep])
    assert dropout(jnp.zeros((3, 0)), 0.5, KEY).shape == (3, 0)


def test_transformations():
    x, dy = normal((4, 6, 5), jnp.float32), normal((4, 6, 5), jnp.float32, 1)
    keys = jax.random.split(KEY, 4)
    masks = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (6, 5)))(keys)
    one = lambda x, key: dropout(x, 0.5, key)  # noqa: E731
    for function in (
        lambda x: jax.vmap(one)(x, keys),
        lambda x: jax.lax.scan(lambda _, given: (0, jax.checkpoint(one)(*given)), 0, (x, keys))[1],
    ):
        y, dx = forward_backward(function, [x], dy)
        np.testing.assert_array_equal(y, jnp.where(masks, 2 * x, 0))
        np.testing.assert_array_equal(dx, jnp.where(masks, 2 * dy, 0))


def test_shard_map_with_a_key_for_each_device():
    x, dy = normal((6, 5), jnp.float32), normal((24, 5), jnp.float32, 1)

    def local(x):
        return dropout(x, 0.5, jax.random.fold_in(KEY, jax.lax.axis_index("data")))

    over = jax.shard_map(local, mesh=four_devices(), in_specs=PartitionSpec(), out_specs=PartitionSpec("data"))
    y, dx = forward_backward(over, [x], dy)
    masks = [jax.random.bernoulli(jax.random.fold_in(KEY, i), 0.5, x.shape) for i in range(4)]
    np.testing.assert_array_equal(y, jnp.concatenate([jnp.where(m, x * 2, 0) for m in masks]))
    np.testing.assert_allclose(dx, sum(jnp.where(m, d * 2, 0) for m, d in zip(masks, jnp.split(dy, 4), strict=True)), rtol=1e-6)


def test_every_sharding_draws_the_same_and_needs_no_communication():
    x = normal((8, 12), jnp.float32)
    alone = forward_backward(lambda x: dropout(x, 0.5, KEY), [x], x)
    for spec in (PartitionSpec(None, "data"),):
        shared = jax.device_put(x, NamedSharding(four_devices(), spec))

        def run(x):
            y, pull = jax.vjp(lambda x: dropout(x, 0.5, KEY), x)
            return y, *pull(x)

        program = compiled(run, shared)
        assert not collectives(program)
        for a, b in zip(program(shared), alone, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: dropout(x, 1.0, KEY), ValueError, "dropout: rate is 1.0; choose 0 <= rate < 1"),
        (lambda x: dropout(x, -0.1, KEY), ValueError, "dropout: rate is -0.1; choose"),
        (lambda x: dropout(x, float("nan"), KEY), ValueError, "dropout: rate is nan; choose"),
        (lambda x: dropout(x, jnp.float32(0.5), KEY), TypeError, "dropout: rate is an array; pass a Python number"),
        (lambda x: dropout(x.astype(int), 0.5, KEY), TypeError, "dropout: x has dtype int32; pass a floating array"),
        (lambda x: dropout(x, 0.5, 7), TypeError, r"dropout: key is a int; pass one from jax.random.key"),
        (lambda x: dropout(x, 0.5, None), TypeError, r"dropout: key is a NoneType; pass one from jax.random.key"),
        (lambda x: dropout(x, 0.5, jax.random.split(KEY)), ValueError, r"dropout: key has shape \(2,\); pass one key"),
    ],
)
def test_wrong_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call(jnp.ones(4))
