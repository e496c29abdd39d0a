from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from near import assert_as_near
from programs import both_ways, collectives, compiled, forward_backward, four_devices
from tests.python.activations import ACTIVATIONS, Row
from values import SIXTEEN, all_sixteen, bits, kept, normal

from unswag import jax as uj
from unswag import reference
from unswag.jax import geglu, reglu, swiglu


def pair(row: Row):
    """(ours, the plain spelling) of a gated unit."""
    return partial(row.gated_jax, uj), lambda gate, up: row.jax(jax, gate) * up


UNITS = {name: pair(row) for name, row in ACTIVATIONS.items() if row.gated_jax}
each_unit = pytest.mark.parametrize(("act", "ours", "plain"), [(act, *both) for act, both in UNITS.items()], ids=UNITS)


def truth(act, gate, up, dh):
    gate, up, dh = (np.asarray(x, np.float64) for x in (gate, up, dh))
    with np.errstate(all="ignore"):
        return (reference.gated_forward(gate, up, act), *reference.gated_backward(gate, up, dh, act))


ROUNDINGS = 4  # of one element
# float32 results off by a few units become 16-bit ones that are not the nearest: of float16, 13 bits shorter, 1 in 1,000
NOT_NEAREST = 2**-10


def neighbours(x, exact):
    """How many numbers of x's 16-bit type lie between x and the rounded exact result."""
    order = lambda x: np.where((b := bits(x).astype(np.int32)) & 0x8000, -(b & 0x7FFF), b)  # noqa: E731
    with np.errstate(over="ignore"):
        return np.abs(order(x) - order(exact.astype(np.asarray(x).dtype)))


@pytest.mark.parametrize("dtype", SIXTEEN)
@each_unit
def test_every_gate_value(act, ours, plain, dtype):
    """At most one number from the float64 result, and hardly more results that are not the nearest than the plain spelling."""
    gate = all_sixteen(dtype)
    up, dh = (normal(gate.shape, dtype, seed) for seed in (1, 2))
    exact = truth(act, gate, up, dh)
    size = np.abs(np.asarray(gate, np.float64))
    finite = np.isfinite(size) & ((size == 0) | (size >= np.finfo(np.float32).tiny))
    # XLA on the CPU takes subnormal float32 for 0: gates (bfloat16 has them too), and what exp gives below this
    smallest = 1e-35
    found = forward_backward(ours, [gate, up], dh)
    for x, other, t in zip(found, forward_backward(plain, [gate, up], dh), exact, strict=True):
        normal_range = finite & (np.abs(t) > smallest)
        off = neighbours(x, t)[normal_range]
        assert off.max() <= 1
        assert (off > 0).mean() <= (neighbours(other, t)[normal_range] > 0).mean() + NOT_NEAREST
        assert np.abs(np.asarray(x, np.float64))[finite & ~normal_range].max() <= 2 * smallest


@each_unit
def test_infinite_gates_have_the_derivative_of_the_limit(act, ours, plain):
    gate = jnp.asarray([np.inf, -np.inf, np.nan], jnp.float32)
    _, dgate, _ = forward_backward(ours, [gate, jnp.full(3, 2.0)], jnp.full(3, 3.0))
    np.testing.assert_array_equal(dgate, [6.0, 0.0, np.nan if act != "relu" else 0.0])


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@each_unit
def test_as_exact_as_the_plain_spelling(act, ours, plain, implementation):
    if act != "relu":
        ours = partial(ours, implementation=implementation)
    ours, plain, found = both_ways(ours), both_ways(plain), []
    for seed in range(3):
        gate, up, dh = (normal((64, 256), jnp.float32, 3 * seed + i, 3.0) for i in range(3))
        found.append([ours(dh, gate, up), plain(dh, gate, up), truth(act, gate, up, dh)])
    assert_as_near(found, ROUNDINGS)


@each_unit
def test_formula(x64, act, ours, plain):
    gate, up, dh = (normal((8, 32), jnp.float64, seed, 3.0) for seed in range(3))
    for x, t in zip(forward_backward(ours, [gate, up], dh), truth(act, gate, up, dh), strict=True):
        assert x.dtype == jnp.float64
        np.testing.assert_allclose(x, t, rtol=1e-12, atol=1e-12)


@each_unit
def test_keeps_gate_and_up_alone(act, ours, plain):
    for dtype, shape in [(jnp.bfloat16, (3, 5, 7)), (jnp.float32, (4,)), (jnp.float16, ())]:
        gate, up = normal(shape, dtype), normal(shape, dtype, 1)
        assert kept(ours, gate, up) == [(jnp.dtype(dtype).name, shape)] * 2
        scanned = kept(lambda g, u: jax.lax.map(lambda pair: ours(*pair), (g, u)), gate[None], up[None])
        assert scanned == [(jnp.dtype(dtype).name, (1, *shape))] * 2


@each_unit
def test_transformations(act, ours, plain):
    gate, up, dh = (normal((3, 5, 7), jnp.float32, seed) for seed in range(3))
    direct = forward_backward(ours, [gate, up], dh)
    for function in (
        lambda g, u: jax.lax.scan(lambda _, pair: (0, jax.checkpoint(jax.vmap(ours))(*pair)), 0, (g, u))[1],
        jax.shard_map(ours, mesh=four_devices(), in_specs=PartitionSpec(), out_specs=PartitionSpec()),
    )[: None if act == "silu" else 1]:
        for x, other in zip(forward_backward(function, [gate, up], dh), direct, strict=True):
            np.testing.assert_allclose(x, other, rtol=1e-5, atol=1e-5)
    assert ours(gate[:, :0], up[:, :0]).shape == (3, 0, 7)


def test_shard_map_with_one_array_that_every_device_has():
    gate, up, dh = normal((8, 5), jnp.float32), normal((2, 5), jnp.float32, 1), normal((8, 5), jnp.float32, 2)
    over = jax.shard_map(
        swiglu, mesh=four_devices(), in_specs=(PartitionSpec("data"), PartitionSpec()), out_specs=PartitionSpec("data")
    )
    expected = forward_backward(lambda gate, up: swiglu(gate, jnp.tile(up, (4, 1))), [gate, up], dh)
    for x, other in zip(forward_backward(over, [gate, up], dh), expected, strict=True):
        np.testing.assert_allclose(x, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec(None, None, "data")])
def test_sharding_adds_no_collectives(spec):
    sharding = NamedSharding(four_devices(), spec)
    gate, up = jax.device_put((normal((8, 4, 12), jnp.float32), normal((8, 4, 12), jnp.float32, 1)), sharding)

    def run(gate, up):
        h, pull = jax.vjp(swiglu, gate, up)
        return h, *pull(h)

    program = compiled(run, gate, up)
    assert not collectives(program)
    assert all(out.is_equivalent_to(sharding, 3) for out in program.output_shardings)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: swiglu(x, x[1:]), ValueError, r"swiglu: gate has shape \(4,\) and up \(3,\); pass arrays of one shape"),
        (
            lambda x: geglu(x, x.astype(jnp.bfloat16)),
            TypeError,
            r"geglu: gate has dtype float32 and up bfloat16; pass up.astype",
        ),
        (lambda x: reglu(x.astype(int), x), TypeError, "reglu: gate has dtype int32; pass a floating array"),
        (lambda x: reglu(x, "up"), TypeError, "reglu: up is a str; pass a jax array"),
    ],
)
def test_wrong_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call(jnp.ones(4))
