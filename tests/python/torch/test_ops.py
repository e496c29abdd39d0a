"""torch.ops.unswag.*: schema, fake kernels, layouts, errors. Values are tested in test_functional.py and in tests/cpp."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import mmap
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from unswag import _core, reference
from unswag.torch import ops
from unswag.torch.ops.tensors import as_rows, place

pytestmark = pytest.mark.native

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
OPS = tuple(ops.OPS)
READERS = tuple(op for op in OPS if op != "cross_entropy_")  # which only read their inputs


def sample(op: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 5, 37), relayout=lambda x: x) -> tuple:
    """Arguments of an op; every tensor that may have a layout of its own goes through `relayout`."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw() -> torch.Tensor:
        return relayout(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))

    if op == "mask_forward":
        return draw(), "leaky_relu", 0.25
    if op == "mask_backward":
        x = draw()
        return draw(), relayout(ops.mask_forward(x, "leaky_relu", 0.25)[1]), "leaky_relu", 0.25
    if op == "activation_forward":
        return draw(), "silu"
    if op == "activation_backward":
        return draw(), draw(), "gelu"
    if op == "gated_forward":
        return draw(), draw(), "silu"
    if op in ("gated_backward", "gated_backward_product"):
        return draw(), draw(), draw(), "gelu_tanh"
    if op == "gated_halves_backward":
        return torch.cat([draw(), draw()], -1), draw(), "silu", False
    if op.startswith("rms_norm"):
        x, weight = draw(), torch.randn(shape[-1], generator=generator)
        if op == "rms_norm_forward":
            return x, weight, 1e-6, 0.0, True, None
        rstd = ops.rms_norm_forward(x, weight, 1e-6, 0.0, True, None)[1]
        if op == "rms_norm_apply":
            return x, rstd, weight, 0.0, True, None
        return x, rstd, weight, draw(), 0.0, True, True, True
    if op.startswith("layer_norm"):
        x, weight, bias = draw(), torch.randn(shape[-1], generator=generator), torch.randn(shape[-1], generator=generator)
        if op == "layer_norm_forward":
            return x, weight, bias, 1e-5, None
        _, mean, rstd = ops.layer_norm_forward(x, weight, bias, 1e-5, None)
        if op == "layer_norm_apply":
            return x, mean, rstd, weight, bias, None
        return x, mean, rstd, weight, draw(), True, True, True
    if op == "cross_entropy_":
        logits = draw().reshape(math.prod(shape[:-1]), shape[-1])
        labels = torch.arange(len(logits)) % shape[-1]
        row_scale = torch.linspace(0, 1, len(logits), dtype=wide)
        return logits, labels, None, row_scale, 0.5, -100, 0.1, 0.0, 1.0, True
    if op == "code_forward":
        return draw(), "silu", [-0.5, 0.1, 0.9], 2, False, True
    if op == "code_backward":
        packed = ops.code_forward(draw(), "silu", [-0.5, 0.1, 0.9], 2, False, False)[1]
        return draw(), relayout(packed), [0.0, 0.3, 0.7, 1.1], 2
    if op == "dither_forward":
        return draw(), "gelu", 3, -7, 3, True
    if op == "dither_backward":
        packed = ops.dither_forward(draw(), "gelu", 3, -7, 3, False)[1]
        return draw(), relayout(packed), "gelu", 3, -7, 3
    if op == "block_encode":
        return draw(), "int4", True, -7, 3
    if op == "block_decode":
        return relayout(ops.block_encode(draw(), "int8", False, 0, 0)), "int8", shape[-1] if shape else 1, dtype
    if op == "signs_encode":
        return (draw(),)
    if op == "signs_decode":
        return relayout(ops.signs_encode(draw())), list(shape), dtype
    if op == "nonzero_encode":
        return (relayout(draw().relu()),)
    if op == "nonzero_decode":
        values = draw()  # every element is kept: how many there are is no question of values
        bitmap = ops.mask_forward(values.square() + 1, "relu", 0.0)[1]
        offsets = torch.arange(math.prod(shape[:-1]) + 1) * math.prod(shape[-1:])
        return relayout(bitmap), offsets, values.flatten(), list(shape)
    if op == "dropout":
        return draw(), 0.5, -7, 3
    raise NotImplementedError(f"no sample for {op}: add one, and the tests below run it")


# Whose packed argument is no number, so that no view of it may be negative.
TAKE_BYTES = ("mask_backward", "code_backward", "dither_backward", "nonzero_decode", "signs_decode", "block_decode")


def tensors(args) -> list[torch.Tensor]:
    return [x for x in (args if isinstance(args, (tuple, list)) else (args,)) if isinstance(x, torch.Tensor)]


def bits(x: torch.Tensor) -> torch.Tensor:
    """For comparing to the bit, NaN included."""
    x = x.contiguous()
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).clone()


def assert_same(ours, expected) -> None:
    ours, expected = tensors(ours), tensors(expected)
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(bits(a), bits(b))


def fresh(args: tuple) -> tuple:
    """cross_entropy_ writes over its logits: each call gets its own."""
    return tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args)


def call(op: str, *args):
    return getattr(ops, op)(*args)


def test_every_op_is_tested_documented_and_public():
    registered = {
        name.removeprefix("unswag::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("unswag::")
    }
    assert registered == set(OPS)
    for name, (overload, kernel, _) in ops.OPS.items():
        assert getattr(ops, name).__doc__ == overload.__doc__ and name in ops.__all__
        assert overload.__doc__ == f"{overload._schema}".replace("unswag::", "") + f"\n\n{inspect.getdoc(kernel)}"
        assert len(inspect.getdoc(kernel)) > 60, name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(op, dtype):
    results = torch.library.opcheck(ops.OPS[op].overload, sample(op, dtype))
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


# Layouts: as they are; every other row; misaligned; of the negative of an imaginary part; one row that is expanded; transposed.
def _misaligned(x: torch.Tensor) -> torch.Tensor:
    if not x.numel():
        return x
    memory = bytearray(b"\0") + x.contiguous().view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(memory, dtype=x.dtype, offset=1).view(x.shape)


def _negative(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(torch.zeros_like(x), -x).conj().imag if x.dtype in (torch.float32, torch.float64) else x


RELAID = {
    "dense": lambda x: x,
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "gaps": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
    "misaligned": _misaligned,
    "negative": _negative,
}
IN_CORE = tuple(name for name in OPS if hasattr(_core.eager, name))


def test_the_core_has_the_ops_that_a_step_of_a_transformer_calls():
    assert {"rms_norm_forward", "layer_norm_backward", "gated_forward", "activation_backward"} <= set(IN_CORE)
    assert {name for name in vars(_core.eager) if not name.startswith("_")} - set(IN_CORE) == {
        "are_dense", "are_plain", "is_eager", "takes",
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 5, 37), (37,), (2, 0), (0, 4), (1, 1), (3, 1, 4)])
@pytest.mark.parametrize("layout", RELAID)
@pytest.mark.parametrize("op", OPS)
def test_past_the_dispatcher_an_op_is_the_same(op, layout, shape):
    """`ops.<name>` where it passes the dispatcher by, against the kernel that PyTorch's dispatcher calls."""
    if layout == "transposed" and len(shape) < 2:
        pytest.skip("there is nothing to transpose")
    if op == "cross_entropy_" and not shape[-1]:
        pytest.skip("there is no class")
    relayout = RELAID["dense" if op == "nonzero_encode" and layout == "negative" else layout]  # of zeros that are negative
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            args = sample(op, dtype, shape, relayout)
            given = fresh if op == "cross_entropy_" else tuple
            ours, theirs = outcome(call, op, *given(args)), outcome(ops.OPS[op].overload, *given(args))
        if isinstance(theirs, Exception):  # the sample is not one for this shape or layout
            assert type(ours) is type(theirs) and str(ours) == str(theirs)
            continue
        assert_same(ours, theirs)
        for a, b in zip(tensors(ours), tensors(theirs), strict=True):
            assert a.stride() == b.stride() and a.device == b.device


def outcome(function, *args):
    try:
        return function(*args)
    except (TypeError, ValueError, IndexError) as error:
        return error


@pytest.mark.parametrize("op", IN_CORE)
def test_the_core_takes_ordinary_tensors_and_leaves_the_rest_to_the_op(op):
    function, args = getattr(_core.eager, op), sample(op)
    with torch.no_grad():
        assert_same(function(*args), ops.OPS[op].overload(*args))
        first = args[0]
        assert function(first.to(torch.int32), *args[1:]) is NotImplemented
        assert function(first.to("meta"), *args[1:]) is NotImplemented
        assert function(torch.nn.Buffer(first).as_subclass(_Tagged), *args[1:]) is NotImplemented
        with FlopCounterMode(display=False):  # any mode that sees ops
            assert function(*args) is NotImplemented
        with torch.autograd.profiler.profile():
            assert function(*args) is NotImplemented
        assert torch.func.vmap(lambda x: torch.tensor(function(x, *args[1:]) is NotImplemented) & (x.sum() == x.sum()))(
            first[None]
        ).all()
    assert function(*args) is NotImplemented  # a graph may be recorded


class _Tagged(torch.Tensor):
    """A subclass, which may mean anything."""


def test_an_op_shows_in_a_profile():
    x = torch.randn(4, 8)
    with torch.no_grad(), torch.autograd.profiler.profile() as profile:
        ops.activation_forward(x, "silu")
    assert any(event.key == "unswag::activation_forward" for event in profile.key_averages())


@pytest.mark.parametrize("op", OPS)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)  # nonzero_encode's, which its values decide
def test_compiles_by_itself(op):
    args = sample(op)
    with torch.no_grad():
        eager = call(op, *fresh(args))
        torch.compiler.reset()
        compiled = torch.compile(lambda *a: call(op, *a), fullgraph=True, backend="aot_eager", dynamic=True)
        assert_same(compiled(*fresh(args)), eager)


# ---- layouts -----------------------------------------------------------------------------------------------------------


def _columns(x):  # a slice of wider rows: one row stride
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), 99).to(x.dtype)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def _transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _odd_offset(x):  # an address that is no multiple of a vector's size
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return flat.copy_(x.flatten()).view(x.shape)


def _odd_byte(x):  # not even a multiple of the element's
    buffer = bytearray(x.numel() * x.element_size() + 1)
    view = torch.frombuffer(buffer, dtype=torch.uint8)[1:]
    view.copy_(x.contiguous().flatten().view(torch.uint8))
    return torch.frombuffer(buffer, dtype=x.dtype, offset=1).view(x.shape)


def _negative_bit(x):
    y = torch._neg_view((-x).contiguous())
    assert y.is_neg()
    return y


def _middle_slice(x):  # leading dimensions that do not collapse
    wide = torch.zeros(x.shape[0], x.shape[1] + 1, *x.shape[2:], dtype=x.dtype)
    wide[:, 1:] = x
    return wide[:, 1:]


LAYOUTS = [_columns, _transposed, _odd_offset, _middle_slice]


@pytest.mark.parametrize("op", READERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(op, dtype, layout):
    plain, laid = sample(op, dtype), sample(op, dtype, relayout=layout)
    before = [bits(x) for x in tensors(laid)]
    out = call(op, *laid)
    assert_same(out, call(op, *plain))
    assert all(x.is_contiguous() for x in tensors(out))
    assert all(torch.equal(bits(x), b) for x, b in zip(tensors(laid), before, strict=True))


@pytest.mark.parametrize("op", [op for op in READERS if op not in TAKE_BYTES])
def test_negative_views_and_odd_bytes(op):
    for layout in (_negative_bit, _odd_byte):
        assert_same(call(op, *sample(op, relayout=layout)), call(op, *sample(op)))


def test_row_views_are_not_copied():
    x = torch.randn(4, 6, 8)
    for view, stride in (
        (x, 8),
        (x[..., 2:5], 8),
        (x[:, :, :1], 8),
        (x[:, 2], 48),
        (x[::2, 1], 96),
        (x[:, ::2], 16),
        (x[2:, 1], 48),
        (torch.randn(8).expand(4, 6, 8), 0),
        (x.flatten().as_strided((3, 8), (9, 1)), 9),
        (torch.randn(5, 1).t(), 5),
    ):
        seen, rows, cols, row_stride = as_rows(view)
        assert seen is view and (rows, cols, row_stride) == (view.numel() // view.shape[-1], view.shape[-1], stride)
    for view in (x.transpose(0, 1), x[:, 1:], x[..., ::2], x.permute(2, 0, 1)):
        seen, *_ = as_rows(view)
        assert seen is not view and seen.is_contiguous() and torch.equal(seen, view)


def test_one_expanded_value_costs_one_row():
    dy = torch.tensor(3.0).expand(1000, 8)
    row, rows, cols, stride = as_rows(dy)
    assert (rows, cols, stride) == (1000, 8, 0) and row.untyped_storage().nbytes() == 8 * 4
    x = torch.randn(1000, 8)
    assert_same(ops.activation_backward(x, dy, "silu"), ops.activation_backward(x, dy.contiguous(), "silu"))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_strided_view(data):
    shape = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple))
    strides = data.draw(st.tuples(*[st.integers(0, 7) for _ in shape]))
    offset = data.draw(st.integers(0, 9))
    dtype = data.draw(st.sampled_from(DTYPES))
    memory = torch.randn(200, generator=torch.Generator().manual_seed(1)).to(dtype)
    canary = bits(memory)
    x = memory.as_strided(shape, strides, offset)
    assert_same(ops.mask_forward(x, "relu", 0.0), ops.mask_forward(x.clone(memory_format=torch.contiguous_format), "relu", 0.0))
    assert_same(ops.gated_forward(x, x, "silu"), ops.gated_forward(x.contiguous(), x.contiguous(), "silu"))
    packed = ops.mask_forward(x, "relu6", 0.0)[1]
    assert_same(ops.mask_backward(x, packed, "relu6", 0.0), ops.mask_backward(x.contiguous(), packed, "relu6", 0.0))
    if shape:
        args = (None, 1e-6, 0.0, True, None)
        assert_same(ops.rms_norm_forward(x, *args), ops.rms_norm_forward(x.contiguous(), *args))
        args = (None, None, 1e-5, None)
        assert_same(ops.layer_norm_forward(x, *args), ops.layer_norm_forward(x.contiguous(), *args))
    assert torch.equal(bits(memory), canary)


SMALL = [(0, 3), (3, 0, 5), (1,), (1, 1, 1)]
NO_COLUMNS = [(0,), (2, 3, 0)]


@pytest.mark.parametrize(
    ("op", "shape"),
    [(op, shape) for op in OPS for shape in SMALL]
    + [(op, shape) for op in READERS for shape in NO_COLUMNS]
    + [(op, ()) for op in READERS if "norm" not in op and op != "gated_halves_backward"],
)
def test_small_and_empty(op, shape):
    args = sample(op, shape=shape)
    out = tensors(call(op, *fresh(args)))
    if op == "nonzero_encode":  # without values nothing says how many there are
        return assert_same(ops.nonzero_decode(*out, list(shape)), args)
    with torch.no_grad():
        fake = tensors(call(op, *[x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]))
    assert [x.shape for x in out] == [x.shape for x in fake]
    if op.endswith("norm_backward") and args[0].numel() == 0:
        assert all(sums.shape == shape[-1:] and not sums.any() for sums in out[1:])  # the sum over no rows


@pytest.mark.parametrize("op", READERS)
def test_inputs_in_read_only_memory(op):
    """A write to an input would end the process."""
    expected = call(op, *sample(op))

    def read_only(x: torch.Tensor) -> torch.Tensor:
        writable = mmap.mmap(-1, max(1, x.nbytes))
        writable.write(x.contiguous().view(torch.uint8).numpy().tobytes())
        held.append(writable)
        protect(writable)
        return torch.frombuffer(writable, dtype=x.dtype, count=x.numel()).view(x.shape)

    held: list[mmap.mmap] = []
    args = [read_only(x) if isinstance(x, torch.Tensor) else x for x in sample(op)]
    assert_same(call(op, *args), expected)


def protect(memory: mmap.mmap) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), 1) == 0  # PROT_READ


@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_threads(op):
    args = sample(op, shape=(64, 2051))
    one = call(op, *fresh(args))
    torch.set_num_threads(2)
    assert_same(call(op, *fresh(args)), one)


# ---- values that only the ops have -------------------------------------------------------------------------------------


def test_mask_bytes_are_the_format(backend):
    x = torch.randn(5, 77)
    x[0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), 6.0])
    for act in ops.MASKS:  # JAX's too
        y, packed = ops.mask_forward(x, act, 0.5)
        value, expected = reference.mask_forward(x.numpy(), act, 0.5)
        assert (packed.numpy() == expected).all()
        np.testing.assert_array_equal(y.numpy(), value)


def test_dropout_is_the_format(backend):
    x = torch.randn(3, 50)
    y = ops.dropout(x, 0.25, -1, -2)  # as unsigned: 2^64 - 1, 2^64 - 2, so that the counter carries
    np.testing.assert_allclose(y.numpy(), reference.dropout(x.numpy(), 0.25, 2**64 - 1, 2**64 - 2), rtol=1e-6)
    assert 0 < int((y == 0).sum()) < y.numel()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_are_the_format(backend, bits):
    x = torch.randn(5, 77) * 2
    x[0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), 0.25])
    bounds = [k / 4 - 1.5 for k in range(2**bits - 1)]
    levels = [k / 8 - 0.25 for k in range(2**bits)]
    y, packed = ops.code_forward(x, "gelu", bounds, bits, False, True)
    code = reference.step_code(x.numpy(), tuple(bounds))
    assert (packed.numpy() == reference.pack_codes(code, bits)).all()
    assert_same(y, ops.activation_forward(x, "gelu"))
    dy = torch.randn(5, 77)
    assert_same(ops.code_backward(dy, packed, levels, bits), dy * torch.tensor(levels)[torch.from_numpy(code.astype(np.int64))])


@pytest.mark.parametrize("act", ops.DITHERED)
def test_dither_is_the_format(backend, act):
    x, dy = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1))
    _, packed = ops.dither_forward(x, act, 2, -1, -2, False)  # as unsigned: 2^64 - 1, 2^64 - 2, so that the counter carries
    code = reference.unpack_codes(packed.numpy(), 50, 2)
    away = reference.dithered(x.numpy(), act, 2, 2**64 - 1, 2**64 - 2)
    sure = np.abs(away - np.round(away)) > 1e-5
    assert (code == reference.dither_code(x.numpy(), act, 2, 2**64 - 1, 2**64 - 2))[sure].all() and sure.sum() > 140
    factor = reference.dither_factor(code, act, 2, 2**64 - 1, 2**64 - 2)
    np.testing.assert_allclose(ops.dither_backward(dy, packed, act, 2, -1, -2), dy.numpy() * factor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nonzeros_come_back_bit_for_bit(backend, dtype):
    x = torch.randn(4, 3, 77).relu().to(dtype)
    x[0, 0, :5] = torch.tensor([float("nan"), -0.0, float("-inf"), 1e-45, -1e-40], dtype=torch.float64).to(dtype)
    bitmap, offsets, values = ops.nonzero_encode(x)
    kept = bits(x) != 0
    assert (bitmap.numpy().reshape(12, -1) == reference.pack(kept.reshape(12, 77).numpy())).all()
    assert_same(values, x[kept])
    assert offsets.tolist() == [0, *kept.reshape(12, 77).sum(-1).cumsum(0).tolist()]
    assert_same(ops.nonzero_decode(bitmap, offsets, values, [4, 3, 77]), x)


def test_product_again_is_the_product(backend):
    gate, up, dh = torch.randn(3, 7, 45).to(torch.bfloat16)
    for act in ops.ACTIVATIONS:
        dgate, dup, h = ops.gated_backward_product(gate, up, dh, act)
        assert_same(h, ops.gated_forward(gate, up, act))
        assert_same((dgate, dup), ops.gated_backward(gate, up, dh, act))


@pytest.mark.parametrize("shape", [(3, 7, 45), (2, 1), (1, 33), (5, 0), (0, 4), (17,)], ids=str)
@pytest.mark.parametrize("gate_first", [True, False])
def test_halves_are_gate_and_up(backend, shape, gate_first):
    """The same bits, into one tensor, from halves of one tensor and of a strided view of one."""
    gate, up, dh = torch.randn(3, *shape).to(torch.bfloat16)
    one = torch.cat([gate, up] if gate_first else [up, gate], -1)
    for gate_up in (one, torch.stack([one, one], -1)[..., 0], torch.cat([one, one[..., :3]], -1)[..., : one.shape[-1]]):
        for act in ops.ACTIVATIONS:
            want = ops.gated_backward(gate, up, dh, act)
            assert_same(
                torch.cat(want if gate_first else want[::-1], -1), ops.gated_halves_backward(gate_up, dh, act, gate_first)
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_again_is_the_norm(backend, dtype):
    x, weight = torch.randn(6, 45).to(dtype), torch.randn(45)
    for cast in (False, True):
        for out_dtype in (None, torch.float32, torch.bfloat16):
            y, rstd = ops.rms_norm_forward(x, weight, 1e-5, 1.0, cast, out_dtype)
            assert y.dtype == (out_dtype or dtype)
            assert_same(ops.rms_norm_apply(x, rstd, weight, 1.0, cast, out_dtype), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_applied_again_is_bit_identical(backend, dtype):
    """What the stash relies on, with every kind of weight and bias; and their gradients alone."""
    x, dy = (torch.randn(7, 61, dtype=torch.float64).to(dtype) for _ in range(2))
    vectors = [None, torch.randn(61), torch.randn(61).to(torch.bfloat16)]
    for weight, bias in itertools.product(vectors, vectors):
        for out_dtype in (None, torch.float32, torch.bfloat16):
            y, mean, rstd = ops.layer_norm_forward(x, weight, bias, 1e-5, out_dtype)
            assert y.dtype == (out_dtype or dtype) and mean.dtype == rstd.dtype == (
                dtype if dtype == torch.float64 else torch.float32
            )
            assert_same(ops.layer_norm_apply(x, mean, rstd, weight, bias, out_dtype), y)
        dx, dw, db = ops.layer_norm_backward(x, mean, rstd, weight, dy, True, True, True)
        for wanted in range(3):
            alone = ops.layer_norm_backward(x, mean, rstd, weight, dy, *(i == wanted for i in range(3)))
            assert_same(alone[wanted], (dx, dw, db)[wanted])
            assert sum(t.numel() for t in alone) == alone[wanted].numel()


@pytest.mark.parametrize("offset", [0.0, 40.0])
def test_layer_norm_against_the_twin(backend, offset):
    x, dy = (torch.randn(9, 130, dtype=torch.float64) + c for c in (offset, 0.0))
    weight, bias = torch.randn(2, 130, dtype=torch.float64)
    y, mean, rstd = ops.layer_norm_forward(x, weight, bias, 1e-5, None)
    gradients = ops.layer_norm_backward(x, mean, rstd, weight, dy, True, True, True)
    truth = reference.layer_norm_forward(x.numpy(), weight.numpy(), bias.numpy(), 1e-5)
    for ours, true in zip((y, mean, rstd), truth, strict=True):
        np.testing.assert_allclose(ours, true, rtol=1e-12, atol=1e-12)
    truth = reference.layer_norm_backward(x.numpy(), truth[1], truth[2], weight.numpy(), dy.numpy())
    for ours, true in zip(gradients, truth, strict=True):
        np.testing.assert_allclose(ours, true, rtol=1e-11, atol=1e-11)


def test_cross_entropy_against_the_twin(backend):
    logits = torch.randn(9, 130) * 5
    labels = torch.tensor([0, 129, -100, 3, 3, 64, 65, 1, 2])
    class_weight, row_scale = torch.rand(130), torch.rand(9)
    options = dict(gradient_scale=0.5, ignore_index=-100, label_smoothing=0.1, softcap=20.0, logit_scale=1.5)
    truth = reference.cross_entropy(logits.numpy(), labels.numpy(), class_weight.numpy(), row_scale.numpy(), **options)
    kept = logits.clone()
    loss, lse = ops.cross_entropy_(kept, labels, class_weight, row_scale, *options.values(), False)
    assert_same(kept, logits)  # write_gradient=False writes nothing
    loss, lse = ops.cross_entropy_(kept, labels, class_weight, row_scale, *options.values(), True)
    for ours, true in zip((loss, lse, kept), truth, strict=True):
        np.testing.assert_allclose(ours, true, rtol=3e-6, atol=3e-7)


def test_cross_entropy_writes_rows_of_a_wider_buffer():
    buffer = torch.full((4, 20), 7.0)
    buffer[:, :13] = torch.randn(4, 13)
    plain = buffer[:, :13].clone()
    args = (torch.arange(4), None, None, 1.0, -100, 0.0, 0.0, 1.0, True)
    assert_same(ops.cross_entropy_(buffer[:, :13], *args), ops.cross_entropy_(plain, *args))
    assert torch.equal(buffer[:, :13], plain) and (buffer[:, 13:] == 7).all()


# ---- errors: what, which value, what to do -----------------------------------------------------------------------------

X = torch.randn(2, 3)
WRONG = [
    (lambda: ops.activation_forward(X.int(), "silu"), TypeError, "x has dtype torch.int32; supported are float32.*convert"),
    (lambda: ops.activation_forward(X.to(torch.complex64), "silu"), TypeError, "complex64"),
    (lambda: ops.activation_forward(X.bool(), "silu"), TypeError, "torch.bool"),
    (lambda: ops.activation_forward(X.to(torch.float8_e4m3fn), "silu"), TypeError, "float8_e4m3fn"),
    (lambda: ops.activation_forward(X, "mish"), ValueError, "no activation 'mish'; choose from silu, gelu"),
    (lambda: ops.mask_forward(X, "silu", 0.0), ValueError, "no activation 'silu'; choose from relu, leaky_relu"),
    (lambda: ops.activation_backward(X, X[:1], "silu"), ValueError, r"dy has shape \[1, 3\] but x has \[2, 3\]"),
    (lambda: ops.activation_backward(X, X.half(), "silu"), TypeError, "dy has dtype torch.float16 but x has torch.float32"),
    (lambda: ops.gated_forward(X, X[:, :1], "silu"), ValueError, "nothing is broadcast"),
    (lambda: ops.gated_forward(X, X.double(), "silu"), TypeError, r"convert one, e.g. up.to\(torch.float32\)"),
    (lambda: ops.gated_backward(X, X, X[0], "silu"), ValueError, "dh has shape"),
    (lambda: ops.gated_halves_backward(X, X, "silu", True), ValueError, "its last dimension must be even"),
    (lambda: ops.mask_backward(X, torch.zeros(2, 3, dtype=torch.uint8), "relu", 0.0), ValueError, r"shape \[2, 4\]"),
    (lambda: ops.mask_backward(X, torch.zeros(2, 4), "relu", 0.0), ValueError, "packed is torch.float32"),
    (lambda: ops.rms_norm_forward(X, torch.ones(2), 1e-6, 0.0, True, None), ValueError, r"pass a weight of shape \[3\]"),
    (lambda: ops.rms_norm_forward(X[0, 0], None, 1e-6, 0.0, True, None), ValueError, "no dimension to normalise over"),
    (lambda: ops.rms_norm_forward(X, None, 1e-6, 0.0, True, torch.int8), TypeError, "out_dtype has dtype torch.int8"),
    (lambda: ops.rms_norm_forward(X, None, -1.0, 0.0, True, None), ValueError, "eps"),
    (lambda: ops.rms_norm_apply(X, torch.ones(3), None, 0.0, True, None), ValueError, r"of shape \[2\]; pass what"),
    (lambda: ops.layer_norm_forward(X, torch.ones(2), None, 1e-5, None), ValueError, r"pass a weight of shape \[3\]"),
    (lambda: ops.layer_norm_forward(X, None, torch.ones(1, 3), 1e-5, None), ValueError, r"pass a bias of shape \[3\]"),
    (lambda: ops.layer_norm_forward(X[0, 0], None, None, 1e-5, None), ValueError, "no dimension to normalise over"),
    (lambda: ops.layer_norm_forward(X, None, None, 1e-5, torch.int8), TypeError, "out_dtype has dtype torch.int8"),
    (lambda: ops.layer_norm_forward(X, None, None, -1.0, None), ValueError, "eps"),
    (lambda: ops.layer_norm_apply(X, torch.ones(2), torch.ones(3), None, None, None), ValueError, r"rstd is .*; pass what"),
    (lambda: ops.layer_norm_backward(X, torch.ones(2), torch.ones(2), None, X[0], True, True, True), ValueError, "dy has"),
    (lambda: _cross_entropy(torch.randn(2, 2, 3)), ValueError, r"logits.flatten\(0, -2\)"),
    (lambda: _cross_entropy(torch.randn(3, 2).t()), ValueError, r"pass logits.contiguous\(\)"),
    (lambda: _cross_entropy(X.clone(), torch.tensor([0.0, 1.0])), TypeError, r"labels.to\(torch.int64\)"),
    (lambda: _cross_entropy(X.clone(), torch.tensor([0])), ValueError, r"labels has shape \[1\].*is 2"),
    (lambda: _cross_entropy(X.clone(), class_weight=torch.ones(2)), ValueError, "number of classes is 3"),
    (lambda: _cross_entropy(X.clone(), row_scale=torch.ones(2).double()), TypeError, r"row_scale.to\(torch.float32\)"),
    (lambda: ops.dropout(X, 1.5, 0, 0), ValueError, "p is 1.5"),
    (lambda: ops.code_forward(X, "silu", [0.0], 5, False, True), ValueError, "bits is 5; pass a number from 1 to 4"),
    (lambda: ops.code_forward(X, "silu", [0.0, 1.0], 1, False, True), ValueError, "count is 2; pass a number from 1 to 1"),
    (lambda: ops.code_forward(X, "silu", [0.0] * 16, 4, False, True), ValueError, "16 bounds; pass at most 15"),
    (lambda: ops.code_forward(X, "silu", [1.0, 0.0], 2, False, True), ValueError, "bounds.*ascending order"),
    (lambda: ops.code_backward(X, torch.zeros(2, 3, dtype=torch.uint8), [0.0, 1.0], 1), ValueError, r"shape \[2, 4\]"),
    (lambda: ops.code_backward(X, torch.zeros(2, 4, dtype=torch.uint8), [0.0], 1), ValueError, "count is 1"),
    (lambda: ops.dither_forward(X, "relu", 2, 0, 0, True), ValueError, "no activation 'relu'; choose from silu, gelu"),
    (lambda: ops.nonzero_decode(*ops.nonzero_encode(X), [2, 40]), ValueError, "pass the shape that was encoded"),
    (lambda: _short_of_values(X), ValueError, "outside .*; pass the sums of what nonzero_count gave"),
]  # fmt: skip


def _short_of_values(x):
    bitmap, offsets, values = ops.nonzero_encode(x)
    return ops.nonzero_decode(bitmap, offsets, values[:-1], list(x.shape))


def _cross_entropy(logits, labels=None, class_weight=None, row_scale=None):
    labels = torch.tensor([0, 1]) if labels is None else labels
    return ops.cross_entropy_(logits, labels, class_weight, row_scale, 1.0, -100, 0.0, 0.0, 1.0, True)


@pytest.mark.parametrize(("wrong", "error", "text"), WRONG)
def test_errors_say_what_to_do(wrong, error, text):
    with pytest.raises(error, match=text):
        wrong()


# ---- place -------------------------------------------------------------------------------------------------------------

NOWHERE = 99  # a CUDA device that no machine has


def put(patch: pytest.MonkeyPatch, where: tuple[int, int, int]) -> None:
    """Every family of ops believes that tensors are there."""
    for module in {inspect.getmodule(op.kernel) for op in ops.OPS.values()}:
        patch.setattr(module, "place", lambda x: where)


@pytest.mark.parametrize("op", OPS)
def test_device_stream_and_threads_reach_the_core(op, monkeypatch):
    """Each of the three, in its place: the core says what is wrong with it, and nothing is computed."""
    problem = _core.cuda_problem(NOWHERE)
    kind = RuntimeError if _core.cuda_architectures() else NotImplementedError
    for where, error, text in (
        ((NOWHERE, 0, 0), (kind, ValueError), re.escape(problem)),
        ((-1, 7, 1), ValueError, "a device's stream is given, but no device"),
        ((-1, 0, -3), ValueError, "threads is -3"),
    ):
        args = sample(op)
        before = [x.clone() for x in tensors(args)]
        with monkeypatch.context() as patch:
            put(patch, where)
            with pytest.raises(error, match=text):
                call(op, *args)
        assert_same(args, before)


def test_the_current_stream_of_the_tensors_own_device(monkeypatch):
    asked = []

    def current_stream(device):
        asked.append(device)
        return types.SimpleNamespace(cuda_stream=0xABC0 + device.index)

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    with FakeTensorMode():
        x = torch.empty(3, device="cuda:1")
        assert place(x) == (1, 0xABC1, 0) and asked == [torch.device("cuda:1")]
    torch.set_num_threads(2)  # put back by the fixture
    assert place(X) == (-1, 0, 2) and len(asked) == 1


def test_one_function_serves_both_devices():
    for op in OPS:
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"unswag::{op}", key), (op, key)


@pytest.mark.parametrize(("rows", "cols", "need_dw"), [(5, 37, True), (0, 37, True), (5, 37, False)])
def test_rms_norm_backward_brings_scratch_where_a_device_needs_it(rows, cols, need_dw, monkeypatch):
    seen, plain = {}, _core.rms_norm_backward

    def backward(*args):
        *args, scratch, device, stream, threads = args
        seen.update(scratch=scratch, place=(device, stream, threads))
        plain(*args, scratch, -1, 0, 1)

    made, empty = [], torch.Tensor.new_empty
    monkeypatch.setattr(_core, "rms_norm_backward", backward)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: made.append(empty(*args, **kw)) or made[-1])
    x, rstd, weight, dy, *_ = sample("rms_norm_backward", shape=(rows, cols))
    for where in ((-1, 0, 1), (0, 64, 0)):
        made.clear()
        put(monkeypatch, where)
        ops.rms_norm_backward(x, rstd, weight, dy, 0.0, True, True, need_dw)
        scratch = [t for t in made if t.dtype == torch.uint8]
        assert seen["place"] == where and len(scratch) == (where[0] >= 0 and need_dw)
        assert seen["scratch"] == (scratch[0].data_ptr() if scratch else 0)
        assert all(t.nbytes == _core.rms_norm_backward_scratch(rows, cols) and t.device == x.device for t in scratch)
    assert (_core.rms_norm_backward_scratch(rows, cols) > 0) == (rows > 0)


@pytest.mark.parametrize(("need_dw", "need_db"), [(True, False), (False, True), (False, False)])
def test_layer_norm_backward_brings_scratch_where_a_device_needs_it(need_dw, need_db, monkeypatch):
    seen, plain = [], _core.layer_norm_backward

    def backward(*args):
        *args, scratch, _, _, _ = args
        seen.append(scratch)
        plain(*args, 0, -1, 0, 1)

    monkeypatch.setattr(_core, "layer_norm_backward", backward)
    x, mean, rstd, weight, dy, *_ = sample("layer_norm_backward", shape=(5, 37))
    for where in ((-1, 0, 1), (0, 64, 0)):
        put(monkeypatch, where)
        ops.layer_norm_backward(x, mean, rstd, weight, dy, True, need_dw, need_db)
    assert [address != 0 for address in seen] == [False, need_dw or need_db]
    assert _core.layer_norm_backward_scratch(5, 37) == 2 * _core.rms_norm_backward_scratch(5, 37)


def _elsewhere(op: str) -> list[int]:
    """The places of an op's tensors, but the first."""
    return [i for i, x in enumerate(sample(op)) if isinstance(x, torch.Tensor)][1:]


@pytest.mark.parametrize(("op", "at"), [(op, at) for op in OPS for at in _elsewhere(op)])
@pytest.mark.parametrize("device", ["meta", "cuda:1"])
def test_all_tensors_of_a_call_are_on_one_device(op, at, device):
    """An address of another device would be read all the same."""
    with FakeTensorMode() if device != "meta" else contextlib.nullcontext():
        args = list(sample(op))
        name = getattr(torch.ops.unswag, op).default._schema.arguments[at].name
        if device == "meta":
            args[at] = args[at].to("meta")  # the kernel itself
        else:
            args = [torch.empty_like(x, device="cuda:0") if isinstance(x, torch.Tensor) else x for x in args]
            args[at] = torch.empty_like(args[at], device=device)
        here = args[0].device
        _, kernel, outputs = ops.OPS[op]
        for function in (kernel, outputs) if device == "meta" else (outputs,):
            with pytest.raises(
                ValueError, match=rf"{name} is on device '{device}' but \w+ on '{here}'; pass {name}\.to\('{here}'"
            ):
                function(*args)


# ---- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [3, -1, 2**40, -(2**63)])
def test_label_out_of_range_writes_nothing(label):
    logits = torch.randn(2, 3)
    before = logits.clone()
    with pytest.raises(ValueError, match=f"{label}"):
        _cross_entropy(logits, torch.tensor([0, label]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "op", [op for op in OPS if op not in ("mask_backward", "nonzero_decode", "signs_decode", "block_decode")]
)
def test_an_op_does_not_cut_the_graph_in_silence(op):
    args = sample(op)
    args[0].requires_grad_()
    with pytest.raises(RuntimeError, match="no derivative"):
        call(op, *args)
    with torch.no_grad():
        call(op, *args)


def test_core_refuses_codes_and_backends_that_do_not_exist():
    with pytest.raises(ValueError, match="activation code 9 does not exist"):
        _core.activation_forward(9, 0, 1, 1, 0, 1, 0, 1, -1, 0, 1)
    with pytest.raises(TypeError):
        _core.activation_forward(-1, 0, 1, 1, 0, 1, 0, 1, -1, 0, 1)
    current = _core.current_backend()
    with pytest.raises(ValueError, match="'quantum'"):
        _core.use_backend("quantum")
    assert _core.current_backend() == current and current in _core.backend_names()


def test_the_core_has_the_dtypes_of_the_tests_threads_and_a_version():
    assert set(ops.DTYPES) == set(DTYPES)
    assert _core.default_threads() >= 1 and _core.version()[0].isdigit()


def test_a_pytorch_without_its_private_names_is_called_through_its_dispatcher():
    code = """
import torch
del torch._C._functorch.is_functorch_wrapped_tensor
from unswag import _core
from unswag.torch import functional
x = torch.randn(3, 4, requires_grad=True)
functional.rms_norm(x, torch.ones(4)).sum().backward()
with torch.no_grad():
    assert x.grad is not None and not _core.eager.is_eager() and not _core.eager.takes(x)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
