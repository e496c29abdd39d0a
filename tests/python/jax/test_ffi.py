"""The C++ kernels under jit: the bits of jax.nn, the bytes of the XLA layout, every transformation, no communication."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from values import SIXTEEN, all_sixteen, bits, normal, special

import unswag.jax as uj
from unswag import _core
from unswag.jax import ffi, formulas, masks, xla
from unswag.jax.how import How, choose

pytestmark = pytest.mark.native

MASKS: dict[str, tuple[Callable[..., Array], Callable[..., Array], float]] = {
    "relu": (uj.relu, jax.nn.relu, 0.0),
    "relu6": (uj.relu6, jax.nn.relu6, 0.0),
    "leaky_relu": (partial(uj.leaky_relu, negative_slope=0.3), partial(jax.nn.leaky_relu, negative_slope=0.3), 0.3),
}
SMOOTH: dict[str, tuple[Callable[..., Array], int]] = {  # function and number of arguments
    "silu": (uj.silu, 1),
    "gelu": (uj.gelu, 1),
    "gelu_erf": (partial(uj.gelu, approximate=False), 1),
    "swiglu": (uj.swiglu, 2),
    "geglu": (uj.geglu, 2),
    "geglu_erf": (partial(uj.geglu, approximate=False), 2),
}
ALL = {**{name: (ours, 1) for name, (ours, _, _) in MASKS.items()}, **SMOOTH}
SHAPES = [(), (1,), (31,), (64,), (0,), (3, 0), (0, 5), (5, 33), (7, 1), (2, 3, 64), (2, 0, 32), (4, 1000), (300, 96)]


def step(function: Callable[..., Array], arguments: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
    """Value and gradients, jitted."""

    def run(arguments: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
        y, back = jax.vjp(function, *arguments)
        return y, *back(dy)

    return jax.jit(run)(arguments, dy)


def native(function: Callable[..., Array]) -> Callable[..., Array]:
    return partial(function, implementation="ffi")


def assert_same(ours: Array, theirs: Array) -> None:
    """Bit for bit. A NaN of 16 bits is a NaN: which one XLA rounds it to depends on what it is fused with."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    a, b = bits(ours), bits(theirs)
    if a.dtype == np.uint16:
        a, b = (np.where(np.isnan(np.float32(x)), 0x7FFF, raw) for x, raw in ((ours, a), (theirs, b)))
    np.testing.assert_array_equal(a, b)


def as_jax_adds(name: str, dx: Array) -> Array:
    """The gradient of jax.nn.leaky_relu is a sum, one part of which is 0: that makes +0 of -0 and flushes subnormals."""
    return dx + 0 if name == "leaky_relu" else dx


# ---- masks: the bits of jax.nn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("name", MASKS)
def test_every_value_of_16_bits(name, dtype):
    ours, theirs, _ = MASKS[name]
    x = all_sixteen(dtype)
    for dy in (jnp.ones_like(x), normal(x.shape, dtype), special(x.shape, dtype), x[::-1]):
        y, dx = step(native(ours), (x,), dy)
        expected, gradient = step(theirs, (x,), dy)
        assert_same(y, expected)
        assert_same(as_jax_adds(name, dx), gradient)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_any_shape(name, shape):
    ours, theirs, _ = MASKS[name]
    x, dy = special(shape, jnp.float32), special(shape, jnp.float32, seed=1)
    y, dx = step(native(ours), (x,), dy)
    expected, gradient = step(theirs, (x,), dy)
    assert_same(y, expected)
    assert_same(as_jax_adds(name, dx), gradient)


@pytest.mark.parametrize("name", MASKS)
def test_float64(name, x64):
    ours, theirs, _ = MASKS[name]
    x, dy = special((9, 130), jnp.float64), special((9, 130), jnp.float64, seed=1)
    x = x.at[0, :4].set(jnp.asarray([5e-324, -5e-324, 2.2e-308, 5.999999999999999]))
    y, dx = step(native(ours), (x,), dy)
    expected, gradient = step(theirs, (x,), dy)
    assert_same(y, expected)
    assert_same(as_jax_adds(name, dx), gradient)


def test_a_zero_cotangent_keeps_its_sign_and_a_subnormal_one_its_value():
    x, dy = jnp.ones(4), jnp.asarray([-0.0, 1e-45, -1e-45, 0.0])
    for ours, _, _ in MASKS.values():
        np.testing.assert_array_equal(bits(step(native(ours), (x,), dy)[1]), bits(dy))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_the_bytes_are_those_of_the_layout_rows(name, shape):
    act = formulas.Act(name, MASKS[name][2])
    for dtype in (jnp.float32, *SIXTEEN):
        x = special(shape, dtype)
        _, packed = jax.jit(partial(ffi.mask_forward, act=name, slope=act.slope))(x)
        expected = jax.jit(lambda x: xla.pack(x, act.bit, 1, "rows"))(x)
        assert packed.dtype == expected.dtype == jnp.uint32 and packed.shape == expected.shape
        np.testing.assert_array_equal(packed, expected)


# ---- smooth activations and gated units --------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "unit"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2), (jnp.float16, 2e-3)])
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions_differ_from_xla_by_rounding(name, dtype, unit):
    function, count = SMOOTH[name]
    arguments = tuple(normal((3, 5, 77), dtype, seed, 3) for seed in range(count))
    dy = normal((3, 5, 77), dtype, 9)
    for ours, plain in zip(step(native(function), arguments, dy), step(function, arguments, dy), strict=True):
        assert ours.dtype == dtype
        a, b = np.float64(ours), np.float64(plain)  # near a zero of the derivative it is off by units of the other factors
        np.testing.assert_allclose(a, b, rtol=unit, atol=unit * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions_in_float64(name, x64):
    function, count = SMOOTH[name]
    arguments = tuple(normal((4, 33), jnp.float64, seed, 3) for seed in range(count))
    dy = normal((4, 33), jnp.float64, 9)
    for ours, plain in zip(step(native(function), arguments, dy), step(function, arguments, dy), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "swiglu"])
def test_any_shape_of_smooth_functions(name, shape):
    function, count = SMOOTH[name]
    arguments = tuple(normal(shape, jnp.float32, seed) for seed in range(count))
    for ours, plain in zip(
        step(native(function), arguments, jnp.ones(shape)), step(function, arguments, jnp.ones(shape)), strict=True
    ):
        assert ours.shape == shape
        np.testing.assert_allclose(ours, plain, rtol=2e-6, atol=2e-6)


# ---- transformations ---------------------------------------------------------------------------------------------------


def arguments_of(name: str, shape: tuple[int, ...]) -> tuple[Array, ...]:
    return tuple(normal(shape, jnp.float32, seed) for seed in range(ALL[name][1]))


@pytest.mark.parametrize("name", ALL)
def test_without_jit(name):
    function, arguments = native(ALL[name][0]), arguments_of(name, (3, 40))
    y, back = jax.vjp(function, *arguments)
    for eager, jitted in zip((y, *back(y)), step(function, arguments, y), strict=True):
        np.testing.assert_array_equal(eager, jitted)


@pytest.mark.parametrize("name", ALL)
def test_vmap(name):
    function, arguments = native(ALL[name][0]), arguments_of(name, (4, 3, 64))
    dy = normal((4, 64), jnp.float32, 5)

    def one(*arguments: Array) -> tuple[Array, ...]:  # the last argument is not batched
        y, back = jax.vjp(function, *arguments[:-1])
        return y, *back(arguments[-1])

    outs = jax.jit(jax.vmap(one, (*[1] * len(arguments), None)))(*arguments, dy)
    for i in range(3):
        each = jax.jit(one)(*(x[:, i] for x in arguments), dy)
        for all_, alone in zip(outs, each, strict=True):
            np.testing.assert_array_equal(all_[i], alone)


def test_scan_and_remat_keep_the_mask_alone():
    w = normal((3, 64, 64), jnp.float32, scale=0.2)
    x = normal((8, 64), jnp.float32, 1)

    def loss(implementation: str, policy: Any, w: Array) -> Array:
        @partial(jax.checkpoint, policy=policy)
        def layer(x: Array, w: Array) -> tuple[Array, None]:
            return uj.relu(x @ w, implementation=implementation), None

        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    expected = jax.jit(jax.grad(partial(loss, "xla", None)))(w)
    for policy in (None, uj.save("unswag_mask")):
        np.testing.assert_array_equal(jax.jit(jax.grad(partial(loss, "ffi", policy)))(w), expected)


# ---- devices -----------------------------------------------------------------------------------------------------------

COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")


def mesh(rows: int, cols: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[: rows * cols]).reshape(rows, cols), ("rows", "cols"))


@pytest.mark.skipif(not ffi.PARTITIONS, reason="this jax cannot be told how a custom call is partitioned")
@pytest.mark.parametrize("grid", [(4, 1), (1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_automatic_sharding_adds_no_communication(name, grid):
    function, arguments = native(ALL[name][0]), arguments_of(name, (8, 256))
    dy = normal((8, 256), jnp.float32, 5)
    sharding = NamedSharding(mesh(*grid), PartitionSpec("rows", "cols"))

    def run(arguments: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
        y, back = jax.vjp(function, *arguments)
        return y, *back(dy)

    placed = jax.device_put((arguments, dy), sharding)
    compiled = jax.jit(run).lower(*placed).compile()
    text = compiled.as_text()
    assert "unswag_" in text and not COLLECTIVE.search(text)
    for sharded, alone in zip(compiled(*placed), step(function, arguments, dy), strict=True):
        assert sharded.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_array_equal(sharded, alone)


@pytest.mark.parametrize("name", ALL)
def test_automatic_sharding_of_what_does_not_divide(name):
    function, arguments = native(ALL[name][0]), arguments_of(name, (8, 100))
    dy = normal((8, 100), jnp.float32, 5)
    placed = jax.device_put((arguments, dy), NamedSharding(mesh(1, 4), PartitionSpec("rows", "cols")))
    for sharded, alone in zip(step(function, *placed), step(function, arguments, dy), strict=True):
        np.testing.assert_array_equal(sharded, alone)


@pytest.mark.parametrize("name", ALL)
def test_shard_map(name):
    function, arguments = native(ALL[name][0]), arguments_of(name, (8, 256))
    dy = normal((8, 256), jnp.float32, 5)
    spec = PartitionSpec("rows", "cols")

    @partial(jax.shard_map, mesh=mesh(2, 2), in_specs=spec, out_specs=spec)
    def run(arguments: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
        y, back = jax.vjp(function, *arguments)
        return y, *back(dy)

    for sharded, alone in zip(jax.jit(run)(arguments, dy), step(function, arguments, dy), strict=True):
        np.testing.assert_array_equal(sharded, alone)


# ---- choice and errors -------------------------------------------------------------------------------------------------


def lowered(function: Callable[[Array], Any], platform: str) -> str:
    return jax.jit(function).trace(jnp.ones((8, 64))).lower(lowering_platforms=(platform,)).as_text()


def gradient_of(name: str, **options: Any) -> Callable[[Array], Any]:
    function, count = ALL[name]
    function = partial(function, **(options or {"implementation": "ffi"}))

    def run(x: Array) -> Any:
        y, back = jax.vjp(function, *[x] * count)
        return y, back(y)

    return run


def test_where_the_best_is_native_it_is_so_on_the_cpu_alone():
    def run(x: Array) -> tuple[Array, Array]:
        y, packed = masks.mask_forward(x, formulas.Act("relu"), How(None, "rows"))
        return y, masks.mask_backward(formulas.Act("relu"), How(None, "rows"), packed, y)[0]

    assert lowered(run, "cpu").count("@unswag_mask") == 2
    assert "@unswag" not in lowered(run, "tpu") and "@unswag" not in lowered(run, "cuda")
    x = special((8, 64), jnp.float32)
    for ours, plain in zip(jax.jit(run)(x), step(jax.nn.relu, (x,), jax.nn.relu(x)), strict=True):
        assert_same(ours, plain)
    assert choose("f", x, None, None) == How(None if ffi.PARTITIONS else "xla", "rows")
    assert choose("f", x, None, "rows256") == How("xla", "rows256")
    assert choose("f", x, "xla", None) == choose("f", np.ones((8, 64)), None, None) == How("xla", "rows")


def test_bad_input_says_what_to_do():
    x = jnp.ones((256, 64))
    with pytest.raises(ValueError, match="layout is 'rows256', which implementation 'ffi' does not have; choose 'rows'"):
        uj.relu(x, implementation="ffi", layout="rows256")
    with pytest.raises(ValueError, match="implementation is 'cuda'; choose None or 'xla' or 'ffi'"):
        uj.swiglu(x, x, implementation="cuda")
    with pytest.raises(ValueError, match="silu: implementation 'ffi' has no codes"):
        uj.silu(x, bits=2, implementation="ffi")
    for platform in ("tpu", "rocm"):
        text = rf"'ffi' is for the CPU(?: and CUDA)?, but this is compiled for {platform}; pass None or 'xla'$"
        with pytest.raises(NotImplementedError, match=text):
            lowered(gradient_of("relu"), platform)


@pytest.mark.skipif(ffi.CUDA, reason="this build has CUDA kernels")
def test_without_cuda_kernels_the_error_says_how_to_get_them():
    with pytest.raises(NotImplementedError, match="compiled for cuda; pass None or 'xla', or build UnSwag with UNSWAG_CUDA=ON"):
        lowered(gradient_of("relu"), "cuda")


def test_a_packed_array_of_another_shape_is_refused():
    with pytest.raises(Exception, match="mask_backward: packed has 8 rows of 2 words; pass 8 rows of 4 uint32 words"):
        ffi.call(
            "unswag_mask_backward_v1",
            (jnp.zeros((8, 2), jnp.uint32), jnp.ones((8, 100))),
            ((100, jnp.float32),),
            **ffi.mask_attributes("relu", 0.0, jnp.float32),
        )


# ---- CUDA: what can be seen without a device ---------------------------------------------------------------------------

CALLS = {"relu": "mask", "relu6": "mask", "leaky_relu": "mask", "silu": "activation", "swiglu": "gated", "geglu": "gated"}


def test_lowered_for_cuda_the_calls_are_those_of_the_cpu():
    """In a process of its own, where a build without CUDA kernels hands out the CPU's handlers for them: nothing is run."""
    code = """
        from unswag import _core
        targets = _core.xla_targets()
        _core.xla_targets = lambda: {"cpu": targets["cpu"], "CUDA": targets.get("CUDA", targets["cpu"])}
        from test_ffi import ffi, CALLS, gradient_of, lowered
        assert ffi.CUDA
        for name, kind in CALLS.items():
            for_cpu, for_cuda = (lowered(gradient_of(name), platform) for platform in ("cpu", "cuda"))
            assert for_cpu == for_cuda and for_cuda.count("stablehlo.custom_call @unswag_") == 2, for_cuda
            for direction in ("forward", "backward"):
                assert for_cuda.count(f"@unswag_{kind}_{direction}_v1(") == 1, for_cuda
            assert "@unswag" not in lowered(gradient_of(name, implementation=None), "cuda")
            assert "@unswag" not in lowered(gradient_of(name, implementation="xla"), "cuda")
        print("lowered", *targets)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert run.stdout.startswith("lowered cpu"), run.stderr


@pytest.mark.parametrize("platform", ["cpu", "CUDA"])
def test_a_handler_says_which_interface_it_has_and_whether_it_may_be_recorded(platform):
    """Asked as XLA asks when a handler is registered; structs of third_party/xla/ffi/api/c_api.h, in words of 8 bytes."""
    targets = _core.xla_targets()
    assert ("CUDA" in targets) == bool(_core.cuda_architectures())
    if platform not in targets:
        pytest.skip("this build has no CUDA kernels")
    assert targets[platform].keys() == targets["cpu"].keys() and len(targets["cpu"]) == 6

    def words(*values: int) -> Any:
        return (ctypes.c_size_t * len(values))(*values)

    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    for capsule in targets[platform].values():
        metadata = words(36, 24, 0, 0, 0)  # its size; version: size, extension, major and minor; traits
        extension = words(32, 1, 0, ctypes.addressof(metadata))  # base: size, kind, next; metadata
        frame = words(168, ctypes.addressof(extension), *[0] * 20)  # size, extension, and nothing to compute
        handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address(capsule, None))
        assert handler(ctypes.addressof(frame)) is None
        assert metadata[3] == 1 << 32, "version 0.1"
        assert metadata[4] & 0xFFFFFFFF == (platform == "CUDA")
