"""unswag.torch.functional: values and gradients against PyTorch and float64, what is saved, and how it behaves in autograd."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from in_place import assert_trains_as
from near import SEED, assert_as_near
from tests.python.activations import ACTIVATIONS, of_kind
from torch.autograd import forward_ad

from unswag import reference
from unswag.torch import functional as F
from unswag.torch import nn
from unswag.torch.loss import linear_cross_entropy
from unswag.torch.stash import Stash

pytestmark = pytest.mark.native

TORCH = torch.nn.functional
NAN, INF = math.nan, math.inf


def pairs(*kinds: str) -> dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]]:
    """name → (ours, PyTorch's spelling) of the activations of these kinds."""
    return {name: (partial(row.ours, F), partial(row.torch, torch)) for name, row in of_kind(*kinds).items()}


def gated_pair(name: str) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    row = ACTIVATIONS[name]
    ours = partial(row.gated, F) if row.gated else partial(F.gated, act=name)
    return ours, lambda gate, up: row.torch(torch, gate) * up


MASKS, SMOOTH, SQUARES = pairs("mask"), pairs("smooth"), pairs("square")
GATED = {f"gated_{name}": gated_pair(name) for name in ACTIVATIONS}


def llama_norm(x, w, eps=1e-6):
    """As transformers spells it: float32 inside, rounded before the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def gemma_norm(x, w, eps=1e-6):
    """As transformers spells it: 1 + weight, rounded at the end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (1 + w.to(wide.dtype))).to(x.dtype)


NORMS = {
    "llama": (F.rms_norm, llama_norm),
    "gemma": (lambda x, w: F.rms_norm(x, w, weight_offset=1.0, cast_before_weight=False), gemma_norm),
    "layer": (F.layer_norm, lambda x, w, b: TORCH.layer_norm(x, x.shape[-1:], w, b)),
}
ALL = {**MASKS, **SMOOTH, **SQUARES, **GATED, **NORMS}


def inputs(name: str, dtype: torch.dtype, shape=(6, 37), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + SEED)
    count = 1 if name in MASKS | SMOOTH | SQUARES else 2
    shapes = [shape, shape[-1:], shape[-1:]][: 3 if name == "layer" else 2] if name in NORMS else [shape] * count
    return [(2 * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_() for s in shapes]


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff of a 16-bit result, 0 of a wider one."""
    return torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0


def gradients(f, xs, dy) -> tuple[torch.Tensor, ...]:
    xs = [x.detach().clone().requires_grad_() for x in xs]
    return torch.autograd.grad(f(*xs), xs, dy)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).clone()


def every_16_bit_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


# ---- derivatives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name):
    xs = inputs(name, torch.float64, (3, 5))
    assert torch.autograd.gradcheck(ALL[name][0], xs)  # nondet_tol 0: the same bits twice


@pytest.mark.parametrize("gate_first", [True, False])
def test_halves_are_gated_and_keep_what_they_are_given(gate_first):
    gate, up = inputs("gated_silu", torch.float64, (3, 5))
    one = torch.cat([gate, up] if gate_first else [up, gate], -1).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: F.gated_halves(x, "silu", gate_first), (one,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        h = F.gated_halves(one, "gelu", gate_first)
    assert torch.equal(h, F.gated(gate, up, "gelu")) and [t.data_ptr() for t in kept] == [one.data_ptr()]


def test_gradcheck_without_weight():
    (x, _) = inputs("llama", torch.float64, (3, 5))
    assert torch.autograd.gradcheck(lambda x: F.rms_norm(x, eps=1e-3), (x,))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_are_torch_to_the_bit_for_every_16_bit_value(backend, name, dtype):
    ours, torchs = MASKS[name]
    x = every_16_bit_value(dtype)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    y, expected = ours(x), torchs(x)
    nan = x.isnan()
    assert torch.equal(bits(y)[~nan], bits(expected)[~nan]) and y[nan].isnan().all()
    (dx,), (expected,) = gradients(ours, [x], dy), gradients(torchs, [x], dy)
    if name == "relu6":  # PyTorch's own loop and tail disagree about NaN; ours passes the gradient, as relu's does
        assert torch.equal(bits(dx)[nan], bits(dy)[nan])
        dx, expected = dx[~nan], expected[~nan]
    assert torch.equal(bits(dx), bits(expected))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_are_torch_to_the_bit_for_special_values(backend, name, dtype):
    ours, torchs = MASKS[name]
    below, above = math.nextafter(6, 0), math.nextafter(6, 7)
    x = torch.tensor(
        [0.0, -0.0, 1e-45, -1e-45, 1e-310, -1e-310, INF, -INF, NAN, 6.0, below, above, 1e30, -1e30, -1.0], dtype=dtype
    )
    for dy in (torch.full_like(x, -3.0), torch.full_like(x, INF), torch.full_like(x, NAN), torch.full_like(x, -0.0)):
        assert torch.equal(bits(ours(x)), bits(torchs(x)))
        (dx,), (expected,) = gradients(ours, [x], dy), gradients(torchs, [x], dy)
        same = x.isnan() if name == "relu6" else torch.zeros_like(x, dtype=torch.bool)
        if dy.isnan().all():  # any NaN is a NaN
            assert torch.equal(dx.isnan()[~same], expected.isnan()[~same])
        else:
            assert torch.equal(bits(dx)[~same], bits(expected)[~same])


def _neighbours_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many 16-bit values lie between two 16-bit numbers."""
    order = [torch.where(i < 0, -(i & 0x7FFF), i) for i in (bits(x).int() for x in (a, b))]
    return (order[0] - order[1]).abs()


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smooth_values_and_derivatives_for_every_16_bit_value(backend, name, dtype):
    """At most one neighbour off the float64 truth, and hardly more values that are not the nearest one than PyTorch has:
    float32 results off by a few units are not the nearest of float16, 13 bits shorter, 1 in 1,000 times."""
    ours, torchs = SMOOTH[name]
    x = every_16_bit_value(dtype)
    x = x[x.isfinite()]
    one = torch.ones_like(x)
    exact = reference.activation(x.double().numpy(), name), reference.activation_derivative(x.double().numpy(), name)
    value, slope = (torch.from_numpy(e).to(dtype) for e in exact)
    for a, t, truth in (
        (ours(x), torchs(x), value),
        (*gradients(ours, [x], one), *gradients(torchs, [x], one), slope),
    ):
        far = _neighbours_apart(a, truth)
        assert far.max() <= 1, f"x = {x[far.argmax()]}: {a[far.argmax()]} is not {truth[far.argmax()]}"
        assert (far > 0).sum() <= (_neighbours_apart(t, truth) > 0).sum() + len(x) / 1024


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_smooth_special_values(backend, name, dtype):
    ours, _ = SMOOTH[name]
    x = torch.tensor([0.0, -0.0, INF, NAN], dtype=dtype).repeat(9)
    y, (dx,) = ours(x), gradients(ours, [x], torch.ones_like(x))
    assert torch.equal(bits(y[:3]), bits(torch.tensor([0.0, -0.0, INF], dtype=dtype)))
    assert y[3::4].isnan().all() and dx[3::4].isnan().all()
    assert (dx[:2] == 0.5).all() and (y[2::4] == INF).all()
    assert torch.equal(bits(y[:32]), bits(y[:4]).repeat(8)) and torch.equal(y[32:35], y[:3])  # vector body and tail


@pytest.mark.parametrize("name", SQUARES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_squares_are_torch_to_the_bit(backend, name, dtype):
    """Every 16-bit value, NaN, infinities and subnormals among them, and the squares that are subnormal or overflow."""
    ours, torchs = SQUARES[name]
    x = every_16_bit_value(dtype) if dtype != torch.float32 else every_16_bit_value(torch.bfloat16).float() * 1.0000001
    for dy in (torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype), torch.full_like(x, INF)):
        y, expected = ours(x), torchs(x)
        nan = x.isnan()
        assert torch.equal(bits(y)[~nan], bits(expected)[~nan]) and y[nan].isnan().all()
        (dx,), (expected,) = gradients(ours, [x], dy), gradients(torchs, [x], dy)
        same = ~nan & (2 * x.float() <= torch.finfo(dtype).max)  # PyTorch rounds 2 x to float16, where it may be inf
        assert torch.equal(bits(dx)[same], bits(expected)[same]) and dx[nan].isnan().all() and expected[nan].isnan().all()
    assert torch.equal(bits(ours(torch.relu(x)))[~nan], bits(ours(x))[~nan])  # relu(x) may be kept instead


# ---- as near to float64 as PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", {**SMOOTH, **SQUARES, **GATED, **NORMS})
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_torch(backend, name, dtype):
    ours, torchs = ALL[name]
    draws = []
    for seed in range(3):
        xs = inputs(name, dtype, (64, 257), seed)
        dy = torch.randn(64, 257, generator=torch.Generator().manual_seed(seed + 100 + SEED)).to(dtype)
        wide = [x.detach().double() for x in xs]
        truth = [torchs(*wide), *gradients(torchs, wide, dy.double())]
        results = [[f(*xs).detach(), *gradients(f, xs, dy)] for f in (ours, torchs)]
        assert all(a.dtype == t.dtype == dtype for a, t in zip(*results, strict=True))
        draws.append([[x.double() for x in each] for each in (*results, truth)])
    assert_as_near(draws, 257 if name in NORMS else 4, unit(dtype))


# ---- saved bytes -------------------------------------------------------------------------------------------------------


def saved_bytes(f, xs) -> int:
    """Bytes of unique storages that autograd holds for f(*xs)."""
    held: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = f(*xs)
    total = sum(x.untyped_storage().nbytes() for x in held.values())
    del y
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(8, 64), (3, 7), (5, 33)])
def test_saved_bytes_are_those_of_the_docstrings(dtype, rows, cols):
    b = torch.empty((), dtype=dtype).element_size()
    n = rows * cols * b
    for name in ALL:
        xs = inputs(name, dtype, (rows, cols))
        if name in MASKS:
            expected = rows * 4 * -(-cols // 32)
        elif name in SMOOTH | SQUARES:
            expected = n
        elif name in GATED:
            expected = 2 * n
        else:
            expected = n + (8 if name == "layer" else 4) * rows + cols * b  # x, (mean,) rstd, and the weight, a parameter
        assert saved_bytes(ALL[name][0], xs) == expected, name


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_held_past_what_is_saved(name):
    """By weak references to storages, so that tensors on ctx or in closures count too."""
    xs = inputs(name, torch.float32, (4, 40))
    held = [x.detach().clone().requires_grad_() for x in xs]
    y = ALL[name][0](*held)
    alive = weakref.ref(y.untyped_storage())
    references = [weakref.ref(x.untyped_storage()) for x in held]
    node = y.grad_fn
    del y, held
    assert alive() is None  # the output belongs to who reads it
    kept = [r() is not None for r in references]
    # A leaf stays alive with its gradient's node; what the node saved is visible on it.
    assert len(node.saved_tensors) == dict.fromkeys(MASKS | SMOOTH | SQUARES, 1).get(
        name, {"layer": 4}.get(name, 3 if name in NORMS else 2)
    )
    assert all(kept)


@pytest.mark.parametrize("name", {**SMOOTH, **SQUARES, **GATED, **NORMS})
def test_under_the_stash_the_output_is_made_again(name):
    """A Linear saves its input: under the stash that is not kept, and the gradients are the same to the bit."""
    f = ALL[name][0]
    xs = inputs(name, torch.bfloat16, (6, 32))
    linear = torch.nn.Linear(32, 8).to(torch.bfloat16)

    def step():
        y = f(*(x * 1 for x in xs))
        output = weakref.ref(y.untyped_storage())
        z = linear(y)
        del y
        alive = output() is not None
        return alive, torch.autograd.grad(z, [*xs, *linear.parameters()], torch.ones_like(z))

    alive, plain = step()
    assert alive
    with Stash("exact"):
        alive, stashed = step()
    assert not alive
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(stashed, plain, strict=True))


# ---- autograd ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_inputs_and_incoming_gradients_are_untouched(name):
    xs = inputs(name, torch.float32)
    dy = torch.randn(6, 37)
    before = [bits(t) for t in (*xs, dy)]
    ALL[name][0](*xs).backward(dy)
    assert all(torch.equal(bits(t), b) for t, b in zip((*xs, dy), before, strict=True))
    assert all(t._version == 0 for t in (*xs, dy))


@pytest.mark.parametrize("name", ALL)
def test_the_backward_is_linear_in_the_cotangent(name):
    xs = inputs(name, torch.float64)
    a, b = torch.randn(2, 6, 37, dtype=torch.float64)
    f = ALL[name][0]
    for sum_, one, two in zip(gradients(f, xs, 3 * a - b), gradients(f, xs, a), gradients(f, xs, b), strict=True):
        torch.testing.assert_close(sum_, 3 * one - two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_expanded_and_strided_cotangents(name):
    xs = inputs(name, torch.float32)
    f = ALL[name][0]
    for dy in (torch.tensor(0.5).expand(6, 37), torch.randn(37).expand(6, 37), torch.randn(37, 6).t()):
        for a, b in zip(gradients(f, xs, dy), gradients(f, xs, dy.contiguous()), strict=True):
            assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("name", GATED)
def test_the_same_tensor_twice(name):
    ours, torchs = GATED[name]
    (x, _) = inputs(name, torch.float64)
    for f in (lambda x: ours(x, x),):
        torch.testing.assert_close(torch.autograd.grad(f(x).sum(), x), torch.autograd.grad(torchs(x, x).sum(), x))


@pytest.mark.parametrize("name", {**GATED, **NORMS})
@pytest.mark.parametrize("wanted", [0, 1])
def test_only_one_input_requires_grad(name, wanted):
    f = ALL[name][0]
    xs = inputs(name, torch.float32)
    dy = torch.randn(6, 37)
    both = gradients(f, xs, dy)
    one = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(xs)]
    f(*one).backward(dy)
    assert torch.equal(one[wanted].grad, both[wanted]) and one[1 - wanted].grad is None


def test_layer_norm_is_exact_where_the_mean_is_far_from_zero():
    """In float32, where E[x^2] - E[x]^2 would have no digit left; a row of one value has variance 0."""
    x = torch.randn(32, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for offset in (10.0, 1e3, 1e5):
        near = (x + offset).float()
        y, true = F.layer_norm(near), TORCH.layer_norm(near.double(), (300,))
        # the sums that make the mean are off by their unit roundoff, and are `offset` times what is left
        assert_as_near([[[y], [TORCH.layer_norm(near, (300,))], [true]]], int(300 * offset**2))
    assert torch.equal(F.layer_norm(torch.full((2, 77), 3.3)), torch.zeros(2, 77))


def test_norm_weight_gradient_is_summed_in_float_and_rounded_once():
    x = torch.randn(4096, 8).to(torch.bfloat16)
    weight = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    F.rms_norm(x, weight).backward(torch.ones_like(x))
    xhat = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)
    # bfloat16 has 8 bits: a sum kept in it stops growing at 256 ones
    torch.testing.assert_close(weight.grad.double(), xhat.sum(0), rtol=2**-8, atol=0.5)


@pytest.mark.parametrize("name", ALL)
def test_a_second_derivative_is_right_or_an_error(name):
    """Also for a gradient penalty, where the incoming gradient is a constant."""
    f = ALL[name][0]
    xs = inputs(name, torch.float64)
    dx = torch.autograd.grad(f(*xs).sum(), xs, create_graph=True)
    penalty = sum(d.pow(2).sum() for d in dx) + xs[0].sum()
    if name in MASKS:  # piecewise linear: the second derivative is 0, and the mask that is saved says nothing of x
        assert torch.equal(torch.autograd.grad(penalty, xs[0])[0], torch.ones_like(xs[0]))
    else:
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(penalty, xs[0])
    dy = torch.randn(6, 37, dtype=torch.float64, requires_grad=True)
    dx = torch.autograd.grad(f(*xs), xs, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(sum(d.sum() for d in dx), dy)


@pytest.mark.parametrize("name", {**SMOOTH, **SQUARES, **GATED, **NORMS})
def test_an_input_modified_after_the_forward_is_an_error(name):
    xs = [x * 1 for x in inputs(name, torch.float32)]
    y = ALL[name][0](*xs)
    with torch.no_grad():
        xs[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_does_not_care_what_becomes_of_its_input(name):
    (x,) = inputs(name, torch.float32)
    (expected,) = gradients(MASKS[name][0], [x], torch.ones(6, 37))
    z = x * 1
    y = MASKS[name][0](z)
    with torch.no_grad():
        z.fill_(NAN)
        y.fill_(NAN)
    assert torch.equal(torch.autograd.grad(y, x, torch.ones(6, 37))[0], expected)


@pytest.mark.parametrize("name", ALL)
def test_retain_graph_and_no_grad(name):
    xs = inputs(name, torch.float32)
    y = ALL[name][0](*xs)
    one = torch.autograd.grad(y.sum(), xs, retain_graph=True)
    two = torch.autograd.grad(y.sum(), xs)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with torch.no_grad():
        assert not ALL[name][0](*xs).requires_grad
    with torch.inference_mode():
        assert torch.equal(ALL[name][0](*xs), y)


@pytest.mark.parametrize("name", ALL)
def test_under_autocast_the_dtype_stays(name):
    xs = inputs(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ALL[name][0](*xs)
        half = ALL[name][0](*(x.bfloat16() for x in xs))
    assert y.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert torch.equal(y, ALL[name][0](*xs))


@pytest.mark.parametrize("name", {**MASKS, **SMOOTH, **SQUARES})
def test_torch_func(name):
    f = ALL[name][0]
    (x,) = (x.detach() for x in inputs(name, torch.float32))
    (dx,) = gradients(lambda x: f(x).pow(2), [x], torch.ones_like(x))
    loss = lambda x: f(x).pow(2).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(x), dx)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), dx)
    assert torch.equal(torch.func.vmap(f)(x), f(x))
    assert torch.equal(torch.func.vmap(f, 1, 1)(x), f(x))
    assert torch.equal(torch.func.vmap(f)(x[:, 0]), f(x[:, 0]))  # each example is one value
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda x: f(x).pow(2)))(x[:, 0]), dx[:, 0])
    if name in SMOOTH | SQUARES:
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x)


@pytest.mark.parametrize("name", {**GATED, **NORMS})
def test_torch_func_is_refused_by_the_fused(name):
    xs = inputs(name, torch.float32)
    f = lambda x: ALL[name][0](x, *(x.detach() for x in xs[1:])).sum()  # noqa: E731
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(NotImplementedError, match=r"the transforms of torch.func are not supported; use .* under them"):
            transform(f)(xs[0].detach())


def test_torch_func_is_refused_by_coded_derivatives():
    with pytest.raises(NotImplementedError, match=r"silu: the transforms .* not supported; use torch.nn.functional.silu"):
        torch.func.vmap(lambda x: F.silu(x, bits=2))(torch.randn(3, 4))


@pytest.mark.parametrize("name", ALL)
def test_forward_mode_is_refused(name):
    """In a word that names PyTorch's function; constants beside a dual tensor are none."""
    xs = [x.detach() for x in inputs(name, torch.float32)]
    for i, x in enumerate(xs):
        with (
            forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match="has a tangent, and forward mode is not"),
        ):
            ALL[name][0](*xs[:i], forward_ad.make_dual(x, x), *xs[i + 1 :])
    f = lambda x: ALL[name][0](x, *xs[1:])  # noqa: E731
    for run in (lambda: torch.func.jvp(f, (xs[0],), (xs[0],)), lambda: torch.func.hessian(lambda x: f(x).sum())(xs[0][:1])):
        with pytest.raises(NotImplementedError, match="forward mode is not supported; use"):
            run()
    with forward_ad.dual_level():
        assert torch.equal(ALL[name][0](*xs), ALL[name][0](*xs))


# ---- memory formats ------------------------------------------------------------------------------------------------------

FORMATS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "one channel": lambda x: x[:, :1].contiguous(memory_format=torch.channels_last).transpose(2, 3),
    "a slice": lambda x: x.to(memory_format=torch.channels_last)[:, :2],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}


def steps(x):
    return [(size, step) for size, step in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", {**MASKS, **SMOOTH, **SQUARES})
def test_strides_of_dense_inputs_are_kept(name, form):
    ours, torchs = ALL[name]
    x = FORMATS[form](torch.randn(2, 3, 4, 5))
    dense = form not in ("a slice", "expanded")
    dy = torch.randn(x.shape)
    for ys in (dy, torch.empty_like(x).copy_(dy)):
        mine, stock, flat = x.detach().requires_grad_(), x.detach().requires_grad_(), x.detach().contiguous().requires_grad_()
        y, want, plain = ours(mine), torchs(stock), ours(flat)
        assert y.shape == x.shape and torch.equal(y, plain)
        got, _ = (torch.autograd.grad(v, w, ys)[0] for v, w in ((y, mine), (want, stock)))
        assert torch.equal(got, torch.autograd.grad(plain, flat, ys)[0])
        if dense:
            assert steps(y) == steps(want) == steps(got) == steps(x)


@pytest.mark.parametrize("name", {**MASKS, **SMOOTH, **SQUARES})
def test_channels_last_is_not_copied_and_saves_what_rows_save(name):
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    assert saved_bytes(ALL[name][0], [x]) == (x.numel() // 8 if name in MASKS else x.numel() * 4)
    y = ALL[name][0](x)
    y.mul_(2)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, 2 * torch.autograd.grad(ALL[name][1](x).sum(), x)[0])


# ---- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_compiles_whole(name):
    xs = inputs(name, torch.float32)
    dy = torch.randn(6, 37)
    f = ALL[name][0]
    torch.compiler.reset()
    compiled = torch.compile(lambda *xs: f(*(x * 2 for x in xs)) + 1, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, xs, dy), gradients(lambda *xs: f(*(x * 2 for x in xs)) + 1, xs, dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MASKS)
def test_compiled_graphs_keep_the_mask(name):
    (x,) = inputs(name, torch.float32, (8, 64))
    torch.compiler.reset()
    compiled = torch.compile(MASKS[name][0], fullgraph=True, backend="aot_eager")
    assert saved_bytes(compiled, [x]) == 8 * 64 // 8


def test_inductor():
    xs = inputs("gated_silu", torch.float32)
    dy = torch.randn(6, 37)
    f = lambda gate, up: F.relu(F.rms_norm(F.swiglu(gate * 2, up)))  # noqa: E731
    torch.compiler.reset()
    for a, b in zip(gradients(torch.compile(f, fullgraph=True), xs, dy), gradients(f, xs, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---- errors ------------------------------------------------------------------------------------------------------------

X = torch.randn(2, 3)
WRONG = [
    (lambda: F.relu([1.0]), TypeError, "relu: x is a list; pass a torch.Tensor"),
    (lambda: F.silu(X.long()), TypeError, r"silu: x has dtype torch.int64.*x.to\(torch.float32\)"),
    (lambda: F.relu(X.to_sparse()), TypeError, r"x has layout torch.sparse_coo; pass x.to_dense\(\)"),
    (lambda: F.gelu(X, "erf"), ValueError, "approximate is 'erf'; choose 'none' or 'tanh'"),
    (lambda: F.gated(X, X, "mish"), ValueError, "gated: act is 'mish'; choose from silu"),
    (lambda: F.swiglu(X, X.double()), TypeError, "up has dtype torch.float64 but gate has torch.float32"),
    (lambda: F.swiglu(X, X[:, :2]), ValueError, "nothing is broadcast"),
    (lambda: F.rms_norm(X, torch.ones(4)), ValueError, r"pass a weight of shape \[3\]"),
    (lambda: F.rms_norm(X, eps=-1e-6), ValueError, "eps is -1e-06"),
    (lambda: F.rms_norm(X, eps=NAN), ValueError, "eps is nan"),
    (lambda: F.rms_norm(X, torch.ones(3).int()), TypeError, "weight has dtype torch.int32"),
    (lambda: F.rms_norm(torch.tensor(1.0)), ValueError, "no dimension"),
    (lambda: F.layer_norm(X, torch.ones(4)), ValueError, r"pass a weight of shape \[3\]"),
    (lambda: F.layer_norm(X, None, torch.ones(3, 1)), ValueError, r"pass a bias of shape \[3\]"),
    (lambda: F.layer_norm(X, eps=NAN), ValueError, "layer_norm: eps is nan"),
    (lambda: F.layer_norm(X, None, [0.0]), TypeError, "layer_norm: bias is a list"),
    (lambda: F.layer_norm(torch.tensor(1.0)), ValueError, "no dimension"),
]


@pytest.mark.parametrize(("wrong", "error", "text"), WRONG)
def test_errors_say_what_to_do(wrong, error, text):
    with pytest.raises(error, match=text):
        wrong()


PUBLIC = {
    **{name: getattr(F, name) for name in F.__all__},
    **{name: getattr(nn, name) for name in nn.__all__},
    "linear_cross_entropy": linear_cross_entropy,
}
GIVEN = {"act": "silu", "cols": 3, "weight": torch.randn(5, 3), "labels": torch.tensor([1, 2])}  # all others are X
SCALARS = {
    (name, parameter.name): parameter.annotation
    for name, function in PUBLIC.items()
    for parameter in inspect.signature(function).parameters.values()
    if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    and parameter.annotation not in ("Tensor", "Tensor | None", "bool", "Codes | None")
}


@pytest.mark.parametrize("value", ["x", [3, 4], None, X], ids=["str", "list", "None", "tensor"])
@pytest.mark.parametrize(("name", "argument"), SCALARS)
def test_scalars_of_a_wrong_type_are_named(name, argument, value):
    if value is None and ("None" in SCALARS[name, argument] or argument == "num_items"):
        return
    given = {
        parameter.name: GIVEN.get(parameter.name, X)
        for parameter in inspect.signature(PUBLIC[name]).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    with pytest.raises((TypeError, ValueError)) as raised:
        PUBLIC[name](**given | {argument: value})
    assert f"{argument} is {value!r}" in str(raised.value), raised.value


def test_numbers_of_numpy_and_tensors_of_one_element_are_numbers():
    for number in (np.float32(0.25), torch.tensor(0.25), torch.tensor([0.25])):
        assert torch.equal(F.leaky_relu(X, number), F.leaky_relu(X, 0.25))
        assert torch.equal(F.rms_norm(X, eps=number), F.rms_norm(X, eps=0.25))
        assert nn.Dropout(number).p == 0.25


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_vmap_over_dropout_is_refused(randomness):
    with pytest.raises(NotImplementedError, match=r"torch.func.vmap is not supported; use .*dropout"):
        torch.func.vmap(lambda x: F.dropout(x, 0.5), randomness=randomness)(X)
    assert torch.equal(torch.func.vmap(lambda x: F.dropout(x, 0.0), randomness=randomness)(X), X)
    assert torch.func.grad(lambda x: F.dropout(x, 0.5).sum())(X).unique().tolist() in ([0, 2], [0], [2])


@pytest.mark.parametrize("name", ALL)
def test_a_device_without_kernels_is_an_error_with_the_remedy(name):
    with torch._subclasses.FakeTensorMode():
        xs = [torch.empty(x.shape, device="xpu:0") for x in inputs(name, torch.float32)]
        with pytest.raises(NotImplementedError, match=r"on device 'xpu:0'.*\.to\('cpu'\)"):
            ALL[name][0](*xs)


@pytest.mark.parametrize("name", ALL)
def test_shapes_on_cuda_are_those_of_the_cpu(name):
    with torch._subclasses.FakeTensorMode():
        y = ALL[name][0](*(torch.empty(x.shape, device="cuda:3") for x in inputs(name, torch.float32)))
        assert y.shape == (6, 37) and y.device == torch.device("cuda:3")


@pytest.mark.parametrize("name", ALL)
def test_meta_tensors_and_parameters(name):
    xs = inputs(name, torch.bfloat16)
    y = ALL[name][0](*(x.to("meta") for x in xs))
    assert y.shape == (6, 37) and y.dtype == torch.bfloat16 and y.device.type == "meta"
    parameters = [torch.nn.Parameter(x.detach()) for x in xs]
    assert torch.equal(ALL[name][0](*parameters), ALL[name][0](*xs))


def test_another_subclass_is_the_dispatcher_s_affair():
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(3, 4).as_subclass(Tagged)
    assert isinstance(F.relu(x), torch.Tensor) and torch.equal(F.relu(x).as_subclass(torch.Tensor), torch.relu(x))


# ---- dropout ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_is_that_of_the_format_and_its_gradient_drops_the_same(dtype, p):
    x = torch.randn(7, 37).to(dtype).requires_grad_()
    dy = torch.randn(7, 37).to(dtype)
    torch.manual_seed(5)
    y = F.dropout(x, p)
    torch.manual_seed(5)
    keep = torch.from_numpy(reference.dropout_keep(7, 37, p, F.draw_seed(), 0))
    assert keep.any() and not keep.all()
    (dx,) = torch.autograd.grad(y, x, dy)
    wide = torch.promote_types(dtype, torch.float32)
    scale = torch.tensor(1 / (1 - p), dtype=wide)
    for got, given in ((y, x.detach()), (dx, dy)):
        assert torch.equal(got, torch.where(keep, given.to(wide) * scale, torch.zeros((), dtype=wide)).to(dtype))


def test_dropout_keeps_nothing_and_its_output_is_made_again():
    x, w = torch.randn(40, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        F.dropout(x)
    assert not kept

    def step():
        torch.manual_seed(3)
        y = F.dropout(x.exp())  # which exp saves
        output = weakref.ref(y.untyped_storage())
        z = y @ w
        del y
        alive = output() is not None
        return alive, torch.autograd.grad(z.square().sum(), (x, w))

    alive, plain = step()
    assert alive
    with Stash("exact"):
        alive, stashed = step()
    assert not alive
    assert all(torch.equal(a, b) for a, b in zip(stashed, plain, strict=True))


def test_dropout_draws_anew_and_a_checkpoint_draws_the_same():
    x = torch.randn(50, 50, requires_grad=True)
    torch.manual_seed(1)
    first, second = F.dropout(x), F.dropout(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    again = torch.utils.checkpoint.checkpoint(F.dropout, x, use_reentrant=False)
    assert torch.equal(again, first)
    dy = torch.randn(50, 50)
    assert torch.equal(torch.autograd.grad(again, x, dy)[0], torch.autograd.grad(first, x, dy)[0])


def test_dropout_keeps_a_share_of_one_minus_p():
    y = F.dropout(torch.ones(1000, 1000), 0.3)
    share = (y != 0).double().mean().item()
    assert abs(share - 0.7) < 5 * math.sqrt(0.3 * 0.7 / 1e6)
    assert abs(y.double().mean().item() - 1) < 5 * math.sqrt(0.3 / 0.7 / 1e6)


def test_dropout_outside_training_is_x():
    x = torch.randn(3, 4)
    assert F.dropout(x, 0.5, training=False) is x and F.dropout(x, 0.0) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan, 2])
def test_dropout_refuses_what_is_no_probability_below_1(p):
    with pytest.raises(ValueError, match=r"p is .*; pass a probability in \[0, 1\)"):
        F.dropout(torch.ones(3), p)


def _halves(x):
    gate, up = x.chunk(2, -1)
    return TORCH.silu(gate) * up


IN_PLACE = {
    **{name: (pair, 1) for name, pair in {**MASKS, **SMOOTH, **SQUARES}.items()},
    **{name: (pair, 2) for name, pair in GATED.items()},
    "halves": ((lambda x: F.gated_halves(x, "silu"), _halves), 1),
    "no_dropout": ((lambda x: F.dropout(x, 0.0), lambda x: TORCH.dropout(x, 0.0)), 1),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("shape", [(3, 4, 8), (1, 8)], ids=str)
def test_outputs_can_be_edited_in_place(name, shape):
    (ours, stock), inputs = IN_PLACE[name]
    assert_trains_as(stock, ours, *[shape] * inputs)


@pytest.mark.parametrize("name", NORMS)
def test_outputs_of_norms_can_be_edited_in_place(name):
    ours, stock = NORMS[name]
    assert_trains_as(stock, ours, (3, 4, 8), *[(8,)] * (2 if name == "layer" else 1))


def test_the_output_of_dropout_can_be_edited_in_place():
    for edited in (False, True):
        torch.manual_seed(0)
        x = torch.ones(64, requires_grad=True)
        y = F.dropout(x, 0.5)
        kept = (y != 0).float()
        if edited:
            y.mul_(3)
        y.sum().backward()
        assert torch.equal(x.grad, (3 if edited else 1) * 2 * kept)
