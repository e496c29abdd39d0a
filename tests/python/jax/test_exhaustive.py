"""Every float32 through the masks, by XLA and by the C++ kernels: the bits of jax.nn, value and gradient."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax

import unswag.jax as uj

pytestmark = [pytest.mark.exhaustive, pytest.mark.native]

FUNCTIONS = {
    "relu": (uj.relu, jax.nn.relu),
    "relu6": (uj.relu6, jax.nn.relu6),
    "leaky_relu": (uj.leaky_relu, jax.nn.leaky_relu),
}
CHUNK = 1 << 24


def step(function, x: Array) -> tuple[Array, Array]:
    y, back = jax.vjp(function, x)
    return y, back(jnp.full_like(x, 1.5))[0]


@jax.jit
def floats(start: Array) -> Array:
    return lax.bitcast_convert_type(lax.iota(jnp.uint32, CHUNK) + start, jnp.float32).reshape(-1, 4096)


@jax.jit
def different(ours: tuple[Array, Array], theirs: tuple[Array, Array]) -> Array:
    def bits(x: Array) -> Array:
        return lax.bitcast_convert_type(x, jnp.uint32)

    return sum(jnp.sum(bits(a) != bits(b)) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_float(name, implementation):
    ours, theirs = FUNCTIONS[name]
    run = jax.jit(partial(step, partial(ours, implementation=implementation)))
    reference = jax.jit(partial(step, theirs))
    for start in range(0, 1 << 32, CHUNK):
        x = floats(jnp.uint32(start))
        assert not different(run(x), reference(x)), f"among the floats from {start:#x} on"
