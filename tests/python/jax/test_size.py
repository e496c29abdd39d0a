"""More than 2^31 elements, run and not only compiled: some rows on both sides of 2^31, against jax.nn of those rows alone."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from values import bits

import unswag.jax as uj

pytestmark = [pytest.mark.slow, pytest.mark.native]

COLUMNS = 14336
ROWS = (1 << 31) // COLUMNS + 235  # 150,031: no multiple of 256
BORDER = (1 << 31) // COLUMNS  # the row that holds element 2^31
PROBES = [0, 255, 256, BORDER - 1, BORDER, BORDER + 1, ROWS - 1]


def numbers(rows: Array | int, seed: int) -> Array:
    """Rows of bfloat16 that depend on their number: mixed signs, hardly a zero."""
    row = jnp.atleast_1d(rows).astype(jnp.uint32)[:, None]
    column = lax.broadcasted_iota(jnp.uint32, (1, COLUMNS), 1)
    hashed = (row * jnp.uint32(2654435761) + column * jnp.uint32(40503) + jnp.uint32(seed)) * jnp.uint32(2246822519)
    return ((hashed >> 15).astype(jnp.int32) - 65536).astype(jnp.bfloat16) / 256


@pytest.mark.parametrize(
    "arguments",
    [{"implementation": "xla", "layout": "rows"}, {"implementation": "xla", "layout": "rows256"}, {"implementation": "ffi"}],
    ids=["rows", "rows256", "ffi"],
)
def test_relu(arguments):
    relu = partial(uj.relu, **arguments)
    fill = jax.jit(lambda seed: numbers(jnp.arange(ROWS), seed))
    rows = jnp.asarray(PROBES)

    x = jax.block_until_ready(fill(1))
    assert x.size > 1 << 31
    y, back = jax.jit(partial(jax.vjp, relu))(x)
    del x
    got = np.asarray(y[rows])
    del y
    (dx,) = jax.jit(lambda back, dy: back(dy))(back, fill(2))

    want, theirs = jax.vjp(jax.nn.relu, numbers(rows, 1))
    (slope,) = theirs(numbers(rows, 2))
    assert np.array_equal(bits(got), bits(want))
    assert np.array_equal(bits(dx[rows]), bits(slope))
    assert 0.4 < float(jnp.mean(slope != 0)) < 0.6
