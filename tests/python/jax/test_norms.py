from __future__ import annotations

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from near import assert_as_near
from programs import both_ways, collectives, compiled, forward_backward, four_devices
from values import kept, normal, unit

from unswag import reference
from unswag.jax import layer_norm, rms_norm


def plain_rms(x, weight=None, bias=None, *, offset=0.0, eps=1e-6):
    """As model code has it: float32 inside, the weight on the rounded result's side."""
    v = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = v * jax.lax.rsqrt(jnp.mean(jnp.square(v), -1, keepdims=True) + eps)
    return (y if weight is None else y * (offset + weight.astype(y.dtype))).astype(x.dtype)


def plain_layer(x, weight=None, bias=None, *, eps=1e-6):
    v = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = (v - v.mean(-1, keepdims=True)) * jax.lax.rsqrt(v.var(-1, keepdims=True) + eps)
    y = y if weight is None else y * weight.astype(y.dtype)
    return (y if bias is None else y + bias.astype(y.dtype)).astype(x.dtype)


def arguments(dtype, weights, rows=(4, 33), cols=96, seed=0):
    """x, then as many weights, and dy; rows of different size and mean."""
    x, scale, mean = (normal((*rows, last), jnp.float64, seed + i) for i, last in enumerate((cols, 1, 1)))
    x = (x * 10.0**scale + mean).astype(dtype)
    return [x, *(normal((cols,), dtype, seed + 3 + i) for i in range(weights))], normal((*rows, cols), dtype, seed + 8)


CASES = [  # name, ours, plain, number of weights
    ("rms", rms_norm, plain_rms, 0),
    ("rms, weight", rms_norm, plain_rms, 1),
    ("rms, offset", partial(rms_norm, weight_offset=1.0), partial(plain_rms, offset=1.0), 1),
    ("layer", layer_norm, plain_layer, 0),
    ("layer, weight", layer_norm, plain_layer, 1),
    ("layer, weight, bias", layer_norm, plain_layer, 2),
]
each_norm = pytest.mark.parametrize(("ours", "plain", "weights"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@each_norm
def test_as_exact_as_the_plain_spelling(x64, ours, plain, weights, dtype):
    """The truth is the plain spelling in float64."""
    ours, plain, found = both_ways(ours), both_ways(plain), []
    for seed in range(0, 30, 10):
        args, dy = arguments(dtype, weights, seed=seed)
        exact = plain(*(x.astype(jnp.float64) for x in (dy, *args)))
        found.append([ours(dy, *args), plain(dy, *args), exact])
        assert all(x.dtype == dtype and x.shape == t.shape for x, t in zip(found[-1][0], exact, strict=True))
    assert_as_near(found, 132, unit(dtype))


@each_norm
def test_formula(x64, ours, plain, weights):
    """The truth in numpy, from the page and not from JAX."""
    if ours is layer_norm:
        args, dy = arguments(jnp.float64, weights)
        x, d = np.asarray(args[0]), np.asarray(dy)
        w = np.asarray(args[1]) if weights else 1.0
        rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        xhat = (x - x.mean(-1, keepdims=True)) * rstd
        g = d * w
        dx = rstd * (g - g.mean(-1, keepdims=True) - xhat * (g * xhat).mean(-1, keepdims=True))
        exact = [xhat * w + (np.asarray(args[2]) if weights == 2 else 0), dx, (d * xhat).sum((0, 1)), d.sum((0, 1))]
    else:
        offset = 1.0 if isinstance(ours, partial) else 0.0
        args, dy = arguments(jnp.float64, weights)
        x, d = (np.asarray(a).reshape(-1, 96) for a in (args[0], dy))
        w = np.asarray(args[1]) if weights else None
        y, rstd = reference.rms_norm_forward(x, w, 1e-6, offset)
        exact = [y, *reference.rms_norm_backward(x, rstd, w, d, offset)]
    for found, t in zip(forward_backward(ours, args, dy), exact, strict=False):
        np.testing.assert_allclose(np.asarray(found).reshape(t.shape), t, rtol=0, atol=1e-12 * np.abs(t).max())


def test_weights_of_another_dtype():
    x, weight = normal((5, 8), jnp.bfloat16), normal((8,), jnp.float32, 1)
    y, dx, dweight = forward_backward(rms_norm, [x, weight], jnp.ones((5, 8), jnp.bfloat16))
    assert (y.dtype, dx.dtype, dweight.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


def test_weight_gradients_are_summed_in_float32():
    """A sum of 4096 equal terms kept in bfloat16 would stop at 256."""
    x, weight = jnp.ones((4096, 2), jnp.bfloat16), jnp.ones(2, jnp.bfloat16)
    _, _, dweight = forward_backward(partial(rms_norm, eps=0.0), [x, weight], x)
    np.testing.assert_array_equal(np.asarray(dweight, np.float32), 4096)


@each_norm
def test_keeps_x_and_one_number_per_row(ours, plain, weights):
    for dtype in (jnp.bfloat16, jnp.float32):
        args, _ = arguments(dtype, weights)
        name = jnp.dtype(dtype).name
        row = [(name, (4, 33, 96)), ("float32", (4, 33, 1))]
        assert Counter(kept(ours, *args)) == Counter([*row, *[(name, (96,))] * weights])
        scanned = kept(lambda x, *w: jax.lax.map(lambda x: ours(x, *w), x), *args)
        assert Counter(scanned) == Counter([*row, *[(name, (96,))] * weights])


@each_norm
def test_awkward_rows_stay_by_themselves(ours, plain, weights):
    args, dy = arguments(jnp.float32, weights, rows=(8,))
    clean = forward_backward(ours, args, dy)
    x = args[0].at[1, 0].set(np.nan).at[2, 3].set(np.inf).at[3].set(0.0).at[4].set(-0.0)
    y, dx, *_ = forward_backward(ours, [x, *args[1:]], dy)
    for found, expected in [(y, clean[0]), (dx, clean[1])]:
        np.testing.assert_array_equal(found[jnp.array([0, 5, 6, 7])], expected[jnp.array([0, 5, 6, 7])])
        assert np.isnan(found[1]).all() and np.isfinite(found[3:5]).all()
    assert np.isnan(dx[2]).any()


@each_norm
def test_no_rows(ours, plain, weights):
    args, _ = arguments(jnp.float32, weights, rows=(2, 0))
    y, dx, *dweights = forward_backward(ours, args, jnp.zeros((2, 0, 96)))
    assert y.shape == dx.shape == (2, 0, 96) and not any(d.any() for d in dweights)


@each_norm
def test_transformations(ours, plain, weights):
    args, dy = arguments(jnp.float32, weights, rows=(8, 3))
    direct = forward_backward(ours, args, dy)
    data, everywhere = PartitionSpec("data"), PartitionSpec()
    specs = (data, *[everywhere] * weights)
    mapped = partial(jax.shard_map, ours, mesh=four_devices(), in_specs=specs, out_specs=data)
    for function in (
        lambda x, *w: jax.lax.map(lambda x: jax.checkpoint(jax.vmap(lambda x: ours(x, *w)))(x), x),
        mapped(check_vma=True),
        mapped(check_vma=False),
    )[: None if weights == 2 else 2]:
        for x, other in zip(forward_backward(function, args, dy), direct, strict=True):
            np.testing.assert_allclose(x, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


@each_norm
def test_sharded_rows_need_no_communication(ours, plain, weights):
    args, dy = arguments(jnp.float32, weights, rows=(8, 4))
    sharding = NamedSharding(four_devices(), PartitionSpec("data") if weights == 1 else PartitionSpec(None, "data"))
    x, d = jax.device_put((args[0], dy), sharding)
    others = jax.device_put(args[1:], NamedSharding(four_devices(), PartitionSpec()))

    def run(x, d, *weights, frozen):
        y, pull = jax.vjp(ours, x, *weights)
        return y, *(pull(d)[:1] if frozen else pull(d))

    program = compiled(partial(run, frozen=True), x, d, *others)
    assert not collectives(program)
    assert program.output_shardings[1].is_equivalent_to(sharding, 3)
    if weights:
        assert set(collectives(compiled(partial(run, frozen=False), x, d, *others))) == {"all-reduce"}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: rms_norm(x.astype(int)), TypeError, "rms_norm: x has dtype int32; pass a floating array"),
        (lambda x: rms_norm(x[0, 0]), ValueError, r"rms_norm: x has shape \(\); pass \[..., cols\]"),
        (lambda x: rms_norm(x[:, :0]), ValueError, r"rms_norm: x has shape \(2, 0\); pass"),
        (lambda x: rms_norm(x, x), ValueError, r"rms_norm: weight has shape \(2, 4\); pass \(4,\), the last dimension of x"),
        (lambda x: layer_norm(x, bias=x[0, :3]), ValueError, r"layer_norm: bias has shape \(3,\); pass \(4,\)"),
        (lambda x: layer_norm(x, x[0].astype(int)), TypeError, "layer_norm: weight has dtype int32"),
    ],
)
def test_wrong_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call(jnp.ones((2, 4)))
