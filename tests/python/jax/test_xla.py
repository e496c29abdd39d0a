"""The two layouts: golden bytes, undoing, sizes, nothing flattened."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import cases
from values import normal

from unswag import reference
from unswag.jax import xla


def codes(shape, bits, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, shape, np.uint32)


def packed_codes(code, bits, layout):
    """`code` through pack, whose input is a float array: here the code itself."""
    return jax.jit(lambda x: xla.pack(x, lambda v: jnp.nan_to_num(v).astype(jnp.uint32), bits, layout))(jnp.float32(code))


@pytest.mark.parametrize("layout", xla.LAYOUTS)
def test_golden_files(layout):
    # The codes are the twin's: XLA on the CPU takes subnormal numbers for 0, in jax.nn too (docs/format.md).
    seen = 0
    for settings, tensors in cases("codes"):
        bits, bounds = int(settings["bits"]), tuple(map(float, settings["bounds"].split(",")))
        code = reference.step_code(tensors["x"].astype(np.float32), bounds)
        packed, golden = np.asarray(packed_codes(code, bits, layout)), tensors[layout]
        assert packed.view(golden.dtype).tolist() == golden.tolist(), (settings, code.shape)
        seen += 1
    assert seen == 32


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(), (1,), (37,), (3, 0), (0, 5), (5, 31), (2, 3, 32), (2, 257, 3), (256, 8), (600, 33)])
@pytest.mark.parametrize("layout", xla.LAYOUTS)
def test_apply_reads_what_pack_wrote_and_the_twin_agrees(layout, shape, bits):
    code = codes(shape, bits)
    packed = packed_codes(code, bits, layout)
    read = jax.jit(lambda p, dy: xla.apply(p, dy, lambda c, _: c.astype(jnp.float32), bits, layout))(packed, jnp.float32(code))
    assert read.shape == shape and (np.asarray(read) == code).all()

    rows, cols = code.shape[-2:] if code.ndim >= 2 else (1, code.size)
    matrices = code.reshape(math.prod(code.shape[:-2]), rows, cols)
    if layout == "rows":
        twin = [reference.pack_codes(m, bits).view(np.uint32) for m in matrices]
    else:
        twin = [reference.pack_rows256(m, bits) for m in matrices]
    assert packed.dtype == jnp.uint32
    assert np.asarray(packed).tolist() == np.stack(twin).reshape(packed.shape).tolist()


def test_every_code_occurs_in_the_inputs():
    assert set(codes((600, 33), 4).flat) == set(range(16))


@pytest.mark.parametrize("layout", xla.LAYOUTS)
def test_padding_leaves_no_bits(layout):
    """-inf and NaN pad nothing: a predicate that is true for every number is 1 only where there are numbers."""
    x = normal((300, 37), jnp.float32)
    packed = np.asarray(xla.pack(x, lambda v: (v == v).astype(jnp.uint32), 1, layout))
    assert sum(int(word).bit_count() for word in packed.flat) == x.size


@pytest.mark.parametrize("layout", xla.LAYOUTS)
def test_leading_dimensions_pack_by_themselves(layout):
    x = normal((2, 3, 300, 40), jnp.float32)
    pack = lambda v: xla.pack(v, lambda u: (u > 0).astype(jnp.uint32), 1, layout)  # noqa: E731
    whole = pack(x)
    assert (whole == jax.vmap(jax.vmap(pack))(x)).all()
    assert whole.shape == ((2, 3, 300, 2) if layout == "rows" else (2, 3, 16, 40))
