"""ReLU under the stash: gradients bit for bit torch's, and the smallest of mask, bitmap + non-zeros, output and recipe kept."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unswag.torch import audit, ops
from unswag.torch import checkpoint as stashed
from unswag.torch.audit import LiveStorages
from unswag.torch.stash import Stash, remember
from unswag.torch.stash.rectified import MASK, NONZEROS, OUTPUT, RECIPE, rectified, rows, squared

DTYPES = (torch.float32, torch.bfloat16)
SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45, -1e-45, 1.0])


def same_bits(a, b):
    bits = [t.detach().flatten().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def with_density(density, *shape, dtype=torch.float32, seed=0):
    """Numbers of which that part is above zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(*shape, generator=generator) - (1 - density)
    return x.to(dtype)


class Mlp(nn.Module):
    """fc2(act(x)): what is kept beside x is what the activation and fc2 keep."""

    def __init__(self, act, trained=True, dtype=torch.float32, stashed=True, hidden=512):
        super().__init__()
        torch.manual_seed(0)
        self.fc2 = nn.Linear(hidden, 8).to(dtype).requires_grad_(trained)
        self.act, self.stashed = (lambda x: act(x)), stashed

    def forward(self, x):
        with Stash(model=self) if self.stashed else contextlib.nullcontext():
            return self.fc2(self.act(x * 1)).float().square().sum()


def step(model, x, **backward):
    """(loss, dx, gradients) and the bytes kept by the forward, the loss and its square's operand aside."""
    x = x.clone().requires_grad_()
    with LiveStorages(model, [x]) as live:
        loss = model(x)
        kept = live.bytes()
    loss.backward(**backward)
    if backward:
        loss.backward()
    grads = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return [loss.detach(), *grads], kept


def beside(model, x):
    """What a model without an activation keeps of its own: the loss, the output, the input of fc2."""
    plain = copy.copy(model)
    plain.act = lambda x: x
    return step(plain, x)[1] - (x.nbytes if any(p.requires_grad for p in model.parameters()) else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "act", [F.relu, torch.relu, lambda x: F.relu(x, inplace=True), nn.ReLU()], ids=["F", "torch", "in place", "nn"]
)
def test_the_smallest_form_is_kept_and_gradients_are_bit_identical(act, trained, density, dtype):
    x = with_density(density, 4, 65, 512, dtype=dtype)
    x[0, 0, :8] = SPECIAL.to(dtype)[torch.tensor([2, 3, 4, 5, 6, 7, 7, 7])]  # no NaN: the loss would be one number, NaN
    kept = Counter()
    model, stock = Mlp(lambda x: rectified(act, x, kept), trained, dtype), Mlp(act, trained, dtype, stashed=False)
    (ours, held), (theirs, before) = step(model, x), step(stock, x)
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
    other = beside(stock, x)
    held, before = held - other, before - other
    assert before == x.nbytes
    bits = 8 * x.element_size()
    part = (F.relu(x) != 0).float().mean().item()
    if not trained:
        assert held == x.numel() // 8 and +kept == {MASK: 1}
    elif 1 + part * bits < bits:
        assert held <= (1 + (part + 0.001) * bits) * x.numel() / 8 + 1000 and +kept == {NONZEROS: 1}
        assert density != 0.1 or held <= 0.2 * before
    else:
        assert held == x.nbytes and +kept == {OUTPUT: 1}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reader", [torch.neg, torch.sin, torch.exp])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (31,), (8, 33), (2, 3, 5, 7)], ids=str)
def test_special_numbers_in_x_and_dy_keep_their_bits(shape, reader, dtype):
    generator = torch.Generator().manual_seed(1)
    n = torch.Size(shape).numel()
    pick = torch.randint(8, (2, n), generator=generator)
    x, dy = (SPECIAL[p].reshape(shape).to(dtype) for p in pick)

    def run(relu, door):
        leaf = x.clone().requires_grad_()
        with door:
            y = relu(leaf)
            z = reader(y)
        return y.detach(), *torch.autograd.grad(z, leaf, dy)

    ours = run(lambda x: rectified(torch.relu, x), Stash())
    assert all(same_bits(a, b) for a, b in zip(ours, run(torch.relu, contextlib.nullcontext()), strict=True))


def test_minus_zero_is_kept_as_a_non_zero_and_stops_the_gradient():
    x = torch.tensor([-0.0, 2.0] + [-1.0] * 62).requires_grad_()
    with Stash():
        y = rectified(torch.relu, x)
        z = y.reciprocal()  # -inf, not inf; its backward reads its own result
        w = y * torch.ones(64, requires_grad=True)  # keeps y
    assert z[0] == -float("inf")
    (dx,) = torch.autograd.grad(w.sum(), x)
    assert dx.tolist() == [0.0, 1.0] + [0.0] * 62


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "gaps", "view of a Linear"])
@pytest.mark.parametrize("inplace", [False, True])
def test_any_layout(layout, inplace):
    base = torch.randn(4, 6, 5, 7)
    weight = torch.randn(3, 6, 1, 1, requires_grad=True)

    def run(relu, door):
        leaf = base.clone().requires_grad_()
        x = leaf * 1
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "transposed":
            x = x.transpose(0, 3).contiguous().transpose(0, 3)
        elif layout == "gaps":
            x = torch.cat([x, x], dim=1)[:, ::2]
        else:
            x = F.linear(x, torch.eye(7), torch.zeros(7))
        with door:
            y = relu(x)
            z = F.conv2d(y, weight)
        return y.detach().clone(), y.stride(), *torch.autograd.grad(z.square().sum(), [leaf, weight])

    def relu(x):
        return F.relu(x, inplace=inplace)

    ours, stock = run(lambda x: rectified(relu, x), Stash()), run(relu, contextlib.nullcontext())
    assert ours[1] == stock[1]
    assert all(same_bits(a, b) for a, b in zip(ours[::2], stock[::2], strict=True))
    assert same_bits(ours[3], stock[3])


@pytest.mark.parametrize("trained", [True, False])
def test_two_backward_passes(trained):
    x = with_density(0.3, 8, 512)
    ours = step(Mlp(lambda x: rectified(F.relu, x), trained), x, retain_graph=True)[0]
    stock = step(Mlp(F.relu, trained, stashed=False), x, retain_graph=True)[0]
    assert all(same_bits(a, b) for a, b in zip(ours, stock, strict=True))


def test_everything_is_freed_with_the_graph():
    model, x = Mlp(lambda x: rectified(F.relu, x)), with_density(0.3, 8, 512).requires_grad_()
    with LiveStorages(model, [x]) as live:
        loss = model(x)
        loss.backward()
        x.grad = None
        model.zero_grad()
        assert live.bytes() == loss.nbytes
        loss = model(x)
        del loss
        assert live.bytes() == 0


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_the_output_changed_in_place_afterwards_is_never_wrong(density):
    """Stock raises when somebody had kept it; here the gradient is that of what was computed, or the same error."""
    x, weight = with_density(density, 8, 512).requires_grad_(), torch.randn(512, requires_grad=True)

    def before(relu):  # changed before anybody else keeps it
        y = relu(x * 1)
        y += 1
        return (y * weight).sum()

    def after(relu):  # changed after somebody kept it
        y = relu(x * 1)
        z = (y * weight).sum()
        y += 1
        return z

    with Stash():
        loss = before(lambda x: rectified(F.relu, x))
    dx, dw = torch.autograd.grad(loss, [x, weight])
    assert torch.equal(dw, (F.relu(x) + 1).sum(0)) and torch.equal(dx, (x > 0) * weight)
    with Stash():
        loss = after(lambda x: rectified(F.relu, x))
    if density == 1.0:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        dx, dw = torch.autograd.grad(loss, [x, weight])
        assert torch.equal(dw, F.relu(x).sum(0)) and torch.equal(dx, (x > 0) * weight)


def test_the_input_is_free_where_it_has_a_recipe_or_is_held():
    kept, made = Counter(), []
    x, w = nn.Parameter(torch.randn(64, 64)), torch.randn(64, 64, requires_grad=True)

    def again(x):
        made.append(x)
        return x * 2

    def doubled(door):
        with LiveStorages(None, [x, w]) as live, door:
            z = x * 2  # keeps nothing
            remember(z, again, x)
            y = rectified(F.relu, z, kept)
            loss = (y @ w).sum()
            del z, y
            return loss, live.bytes()

    ours, held = doubled(Stash())
    assert held == ours.nbytes and +kept == {RECIPE: 1}
    got = torch.autograd.grad(ours, [x, w])
    assert len(made) == 1  # w's gradient and ReLU's share it
    stock, _ = doubled(contextlib.nullcontext())
    assert all(same_bits(a, b) for a, b in zip(got, torch.autograd.grad(stock, [x, w]), strict=True))

    def beside_sin(relu, door):
        with door:
            z = x * 3
            s = z.sin()  # holds z
            loss = (relu(z) @ w + s).sum()
        return torch.autograd.grad(loss, [x, w])

    kept.clear()
    ours = beside_sin(lambda x: rectified(F.relu, x, kept), Stash())
    assert +kept == {RECIPE: 1}
    stock = beside_sin(F.relu, contextlib.nullcontext())
    assert all(same_bits(a, b) for a, b in zip(ours, stock, strict=True))


def test_in_place_on_what_is_held_is_the_error_it_was():
    x = torch.randn(8, requires_grad=True)
    with Stash():
        z = x * 3
        s = z.sin()
        y = rectified(F.relu_, z)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y + s).sum().backward()


def test_an_input_without_gradient_is_packed_for_the_next_layer():
    kept = Counter()
    x, w = with_density(0.1, 64, 512), torch.randn(512, 8, requires_grad=True)
    with LiveStorages(None, [x, w]) as live, Stash():
        y = rectified(F.relu, x, kept)
        loss = (y @ w).sum()
        del y
        assert live.bytes() - loss.nbytes <= 0.2 * x.nbytes and +kept == {NONZEROS: 1}
    (dw,) = torch.autograd.grad(loss, w)
    assert torch.equal(dw, torch.autograd.grad((F.relu(x) @ w).sum(), w)[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_checkpointed_layers(reentrant, trained):
    kept = Counter()

    class Layers(nn.Module):
        def __init__(self, act, door):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), act, nn.Linear(64, 64)) for _ in range(3))
            for layer in self.layers:
                layer[2].requires_grad_(trained)
            self.gradient_checkpointing, self._gradient_checkpointing_func = True, _checkpoint(reentrant)
            self.door = door
            if door is not contextlib.nullcontext:
                stashed.prepare(self)

        def forward(self, x):
            with self.door():
                for layer in self.layers:
                    x = self._gradient_checkpointing_func(layer.__call__, x)
                return x.square().sum()

    class Act(nn.Module):
        def forward(self, x):
            return rectified(F.relu, x, kept)

    x = torch.randn(4, 9, 64)
    ours, stock = step(Layers(Act(), Stash), x)[0], step(Layers(nn.ReLU(), contextlib.nullcontext), x)[0]
    assert all(same_bits(a, b) for a, b in zip(ours, stock, strict=True))
    assert (+kept).keys() == ({NONZEROS} if trained else {MASK})  # in the recompute


def _checkpoint(reentrant):
    import functools

    return functools.partial(checkpoint, use_reentrant=reentrant)


def test_one_module_called_twice():
    act, kept = nn.ReLU(), Counter()

    def run(relu, door):
        torch.manual_seed(0)
        x, w = torch.randn(16, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
        with door:
            loss = (relu(relu(x @ w) @ w.detach()).sum(0) @ w).sum()
        return torch.autograd.grad(loss, [x, w])

    ours = run(lambda x: rectified(act, x, kept), Stash())
    assert all(same_bits(a, b) for a, b in zip(ours, run(act, contextlib.nullcontext()), strict=True))
    assert +kept == {MASK: 2}


def test_a_second_derivative_is_torchs():
    def run(relu, door):
        x, w = with_density(0.5, 4, 16).requires_grad_(), torch.linspace(-1, 1, 16).requires_grad_()
        with door:
            y = relu(x * w)
            loss = (y * w).square().sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, w])

    ours = run(lambda x: rectified(F.relu, x), Stash())
    assert all(torch.equal(a, b) for a, b in zip(ours, run(F.relu, contextlib.nullcontext()), strict=True))


def test_what_is_no_relu_is_left_alone():
    kept, x = Counter(), torch.randn(8, 64, requires_grad=True)
    for act in (F.gelu, F.silu, lambda x: F.relu(x) + 1, lambda x: F.relu(F.relu(x)), lambda x: x, F.relu6, torch.exp):
        with Stash():
            y = rectified(act, x, kept)
            loss = y.square().sum()
        assert torch.equal(torch.autograd.grad(loss, x)[0], torch.autograd.grad(act(x).square().sum(), x)[0])
    assert not +kept


def test_without_a_stash_gradients_or_eagerness_it_is_just_called():
    kept, x = Counter(), torch.randn(8, 64, requires_grad=True)
    rectified(F.relu, x, kept).sum().backward()
    with Stash(), torch.no_grad():
        rectified(F.relu, x, kept)
    with Stash(), torch.inference_mode():
        rectified(F.relu, x, kept)
    with torch.no_grad(), Stash():
        rectified(F.relu, x, kept)
    grad = torch.func.grad(lambda x: rectified(F.relu, x, kept).sum())(x.detach())
    assert torch.equal(grad, (x > 0).float())
    with Stash():
        assert torch.equal(torch.func.vmap(lambda x: rectified(F.relu, x, kept))(x.detach()), F.relu(x))
    assert not +kept


def test_autocast():
    def run(relu, door):
        torch.manual_seed(0)
        fc1, fc2, x = nn.Linear(64, 512), nn.Linear(512, 64), torch.randn(16, 64)
        with door, torch.autocast("cpu", torch.bfloat16):
            loss = fc2(relu(fc1(x))).float().square().sum()
        loss.backward()
        return [p.grad for p in (*fc1.parameters(), *fc2.parameters())]

    kept = Counter()
    ours = run(lambda x: rectified(F.relu, x, kept), Stash())
    assert all(same_bits(a, b) for a, b in zip(ours, run(F.relu, contextlib.nullcontext()), strict=True))
    assert +kept == {NONZEROS: 1}


@pytest.mark.parametrize("trained", [True, False])
def test_the_square_is_made_again(trained):
    x = with_density(0.1, 64, 512, dtype=torch.bfloat16)
    kept = Counter()
    ours, held = step(model := Mlp(lambda x: squared(x, kept), trained, torch.bfloat16), x)
    stock, before = step(Mlp(lambda x: torch.square(F.relu(x)), trained, torch.bfloat16, stashed=False), x)
    assert all(same_bits(a, b) for a, b in zip(ours, stock, strict=True))
    assert +kept == {NONZEROS: 1}
    other = beside(model, x)
    assert before - other == (2 if trained else 1) * x.nbytes and held - other <= 0.2 * x.nbytes


@pytest.mark.parametrize(("trained", "density", "bits"), [(True, 0.1, (4, 4.4)), (True, 1.0, (32, 32)), (False, 0.1, (1, 1))])
def test_the_ledger_says_in_how_many_bits_and_counts_what_is_alive(trained, density, bits):
    x = with_density(density, 64, 512).requires_grad_()
    ledger = audit(Mlp(lambda x: rectified(F.relu, x), trained), x=x)
    assert ledger.alive - 4 <= ledger.total <= ledger.alive
    (row,) = [row for row in ledger.rows if row.shape == (64, 512) and row.bytes]
    assert row.tier == "device" and bits[0] <= row.bits <= bits[1] and row.bytes == row.bits * x.numel() / 8


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 4096, 4097, 32 * 127, 32 * 131, 64 * 131])
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_signs_and_non_zeros_of_any_number_of_elements_are_packed_without_gaps(dtype, n):
    y = SPECIAL[torch.arange(n) % 8].to(dtype)
    shape = rows(n)
    assert shape[0] * shape[1] == n
    packed = ops.signs_encode(y.view(shape))
    assert packed.numel() == 4 * ((n + 31) // 32)
    assert torch.equal(ops.signs_decode(packed, shape, dtype).view(n), (~(y <= 0)).to(dtype))
    assert same_bits(ops.nonzero_decode(*ops.nonzero_encode(y.view(shape)), shape).view(n), y)


def test_offsets_are_few():
    assert rows(64 * 56 * 56) == [49, 4096] and rows(2048 * 768) == [384, 4096] and rows(32 * 131) == [1, 32 * 131]
