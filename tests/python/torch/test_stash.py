"""The stash: same gradients as without it, less kept, freed as autograd frees, and no check lost."""

import contextlib
import copy
import gc
import io
import itertools
import threading
import warnings
import weakref

import pytest
import torch
from small_models import (
    assert_same,
    batch,
    gated,
    gradients,
    made,
    norm_again,
    rms_norm,
    step,
    tiny_llama,
    weight,
    with_recipes,
    with_stash,
)  # fmt: skip
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unswag.torch import functional, stash
from unswag.torch.audit import LiveStorages
from unswag.torch.rectified import rectified, squared
from unswag.torch.stash import Stash, remember

NO_STASH = contextlib.nullcontext


@pytest.fixture(autouse=True)
def no_help_from_gc():
    """Nothing here may wait for the garbage collector, and no test may leave a door open."""
    torch.set_num_threads(1)
    stash._warned.clear()
    made.clear()
    for t in (X, W, *HEADS):
        t.grad = None
    gc.disable()
    yield
    gc.enable()
    assert not stash._thread.frames
    assert stash._top_hooks() is None


def leaf(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def block(x, w, *heads):
    """A norm that several Linears read: the plainest use of a recipe."""
    y = rms_norm(x, w, 1e-6)
    return sum(F.linear(y, head).sin().sum() for head in heads)


X, W = leaf(8, 16), weight(16)
HEADS = [weight(16, 16, seed=seed) for seed in (1, 2, 3)]


def grads(door, function, *leaves, backwards=1):
    with door():
        loss = function(*leaves)
    for _ in range(backwards - 1):
        loss.backward(retain_graph=True)
    loss.backward()
    found = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    return found


def assert_equal_with_and_without(function, *leaves, backwards=1):
    for ours, plain in zip(
        grads(Stash, function, *leaves, backwards=backwards),
        grads(NO_STASH, function, *leaves, backwards=backwards),
        strict=True,
    ):
        assert torch.equal(ours, plain)


def kept(door, function, *leaves):
    """Bytes alive after the forward; what the graph keeps, when only a scalar comes back."""
    weights = nn.ParameterList(t for t in leaves if isinstance(t, nn.Parameter))
    with LiveStorages(weights, leaves) as live:
        with door():
            loss = function(*leaves)
        assert loss.numel() == 1
        return live.bytes() - loss.nbytes


def twice(x):
    made.append("twice")
    return x * 2


class Doubled(torch.autograd.Function):
    """x * 2, saving x (as norms and activations do) or nothing (as dropout does)."""

    @staticmethod
    def forward(ctx, x, saves):
        if saves:
            ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2, None


def doubled(x, saves=True):
    y = Doubled.apply(x, saves)
    remember(y, twice, x)
    return y


# Same gradients, less kept


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_equal_those_without_it_bit_for_bit(autocast):
    data = batch(48)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain_loss, plain = step(with_recipes(tiny_llama()), data)
        assert not made
        loss, ours = step(with_stash(with_recipes(tiny_llama())), data)
    assert torch.equal(loss, plain_loss)
    assert_same(ours, plain)
    assert made.count("norm") == 5 and made.count("gated") == 2  # each once for all its readers (B2)


def test_an_unpatched_model_computes_the_same_under_it():
    (loss, ours), (plain_loss, plain) = step(with_stash(tiny_llama()), batch(48)), step(tiny_llama(), batch(48))
    assert torch.equal(loss, plain_loss)
    assert_same(ours, plain)


def test_what_has_a_recipe_is_not_kept():
    hidden = 8 * 16 * 4
    assert kept(NO_STASH, block, X, W, *HEADS) - kept(Stash, block, X, W, *HEADS) == hidden
    assert_equal_with_and_without(block, X, W, *HEADS)


def test_under_autocast_no_cast_of_what_has_a_recipe_is_kept():
    """Each Linear casts the norm's output for itself: three copies."""
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = kept(NO_STASH, block, X, W, *HEADS), kept(Stash, block, X, W, *HEADS)
        assert plain - ours == 3 * 8 * 16 * 2
        made.clear()
        assert_equal_with_and_without(block, X, W, *HEADS)
    assert made == ["norm"]


def test_a_cast_behind_a_view_is_made_again_too():
    x, head = leaf(2, 4, 16), HEADS[0]

    def function(x, w, head):
        y = rms_norm(x, w, 1e-6)
        return (y.view(8, 16)[:, 0:].to(torch.bfloat16) @ head.to(torch.bfloat16)).float().sum()

    assert kept(Stash, function, x, W, head) < kept(NO_STASH, function, x, W, head)
    assert_equal_with_and_without(function, x, W, head)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: y.view(8, 16)[4:].to(torch.bfloat16),  # a part
        lambda y: y.to(torch.bfloat16)[3:],  # a part of a cast
        lambda y: y.as_strided((8, 16), (1, 8)).to(torch.bfloat16),  # as many elements, another order
        lambda y: y.view(16, 8).t().to(torch.bfloat16),
        lambda y: y.transpose(-1, -2).to(torch.bfloat16),  # another order
        lambda y: y.to(torch.bfloat16).mul_(3),  # modified after the cast
        lambda y: modified_in_secret(y.to(torch.bfloat16)),
        lambda y: modified_in_secret(y.to(torch.bfloat16)[1:]),
        lambda y: y.mul(3).to(torch.bfloat16),  # not a cast of the output
    ],
)
def test_a_cast_of_something_else_is_not_mistaken_for_it(spoil):
    def function(x, w):
        y = rms_norm(x, w, 1e-6)  # alive while z is saved, or its recipe would be gone
        z = spoil(y)
        return (z * z).float().sum()

    assert_equal_with_and_without(function, X, W)


def modified_in_secret(z):
    with torch.no_grad():
        z.mul_(3)
    return z


def test_a_cast_after_a_change_that_autograd_does_not_see_is_not_made_again():
    def function(x, w):
        y = modified_in_secret(rms_norm(x, w, 1e-6))
        z = y.to(torch.bfloat16)
        return (z * z).float().sum()

    assert_equal_with_and_without(function, X, W)


class SinCos(torch.autograd.Function):
    """Two outputs of one node."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, dsin, dcos):
        (x,) = ctx.saved_tensors
        return dsin * x.cos() - dcos * x.sin()


@pytest.mark.parametrize("remembered", [0, 1])
def test_a_cast_of_another_output_of_the_same_node_is_not_mistaken_for_it(remembered):
    def function(x):
        outputs = SinCos.apply(x)
        remember(outputs[remembered], (torch.sin, torch.cos)[remembered], x)
        y, z = (t.to(torch.bfloat16) for t in outputs)
        return (y * y * y + z * z).float().sum()

    assert_equal_with_and_without(function, X)
    assert kept(Stash, function, X) < kept(NO_STASH, function, X)


def test_recipes_of_recipes():
    """The product of a norm's output with itself, cast: inputs of a recipe may have recipes."""

    def function(x, w, head):
        return F.linear(doubled(doubled(rms_norm(x, w, 1e-6), saves=False), saves=False), head).sin().sum()

    assert kept(NO_STASH, function, X, W, HEADS[0]) - kept(Stash, function, X, W, HEADS[0]) == 8 * 16 * 4
    made.clear()
    assert_equal_with_and_without(function, X, W, HEADS[0])
    assert made == ["norm", "twice", "twice"]


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y,
        lambda y: y[2:5],
        lambda y: y.t(),
        lambda y: y.view(4, 2, 16).transpose(0, 2),
        lambda y: y[:, ::3],
        lambda y: y.unsqueeze(0).expand(3, 8, 16),
        lambda y: y.detach().requires_grad_(),
        lambda y: y[:0],
        lambda y: y.flatten()[7],
    ],
)
def test_views_of_what_has_a_recipe(view):
    def function(x, w):
        y = rms_norm(x, w, 1e-6)
        z = view(y)
        return (z.sin() * z).sum() + y.sum()

    assert_equal_with_and_without(function, X, W)
    with Stash():
        y = rms_norm(X, W, 1e-6)
        handle = Stash.current().door(view(y))
    assert isinstance(handle, stash._Again)
    assert torch.equal(stash.unpack(handle), view(y))
    assert stash.unpack(handle).stride() == view(y).stride()


def test_a_view_that_reaches_outside_the_output_is_kept_as_it_is():
    whole = torch.randn(6, 4, requires_grad=True) * 1
    part = whole[2:4]
    with Stash() as door:
        other = leaf(2, 4) * 1
        held = door.door(other)
        remember(part, twice, other)  # a lie that must not be used for `whole`
        assert isinstance(door.door(part), stash._Again)
        assert torch.equal(stash.unpack(door.door(whole)), whole)
        assert torch.equal(stash.unpack(door.door(part.view(torch.int32))), part.view(torch.int32))
        del held


def test_outputs_with_holes_have_no_recipe():
    whole = torch.randn(6, 8, requires_grad=True) * 1
    holes = whole[:, ::2]
    with Stash() as door:
        remember(holes, twice, leaf(6, 4))
        for t in (holes, whole, whole[0]):
            assert torch.equal(stash.unpack(door.door(t)), t)


def test_a_transposed_output_is_made_again_with_its_strides():
    def transposed(x):
        return (x * 2).t().contiguous().t()

    x = leaf(3, 5)
    with Stash() as door:
        y = transposed(x)
        remember(y, twice, x)
        again = stash.unpack(door.door(y))
    assert torch.equal(again, y) and again.stride() == y.stride() != (x * 2).stride()


def test_one_storage_is_kept_once_whoever_asks():
    def function(x):
        y = x * 1
        return (y.view(16, 8).sin() + y.t().contiguous().view(16, 8) * 0 + y.flatten().view(16, 8).cos()).sum()

    assert kept(Stash, function, X) == kept(NO_STASH, function, X)
    assert_equal_with_and_without(function, X)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.empty(0, 16) + x[:0],
        lambda x: torch.view_as_complex(x.view(8, 8, 2)),
        lambda x: torch.view_as_complex(x.view(8, 8, 2)).conj(),
        lambda x: torch._neg_view(x),
        lambda x: x.to_sparse(),
        lambda x: x.double(),
    ],
)
def test_unusual_tensors_pass(make):
    def function(x):
        y = make(x)
        return (y * y).abs().sum() if not y.is_sparse else torch.sparse.sum(y * y)

    assert_equal_with_and_without(function, X)


# Identity and lifetime


def test_a_recipe_never_answers_for_a_later_tensor_at_the_same_address():
    """B3: data pointers, ids and storage addresses are used again at once."""

    def function(x, head):
        total = 0
        for i in range(50):
            y = doubled(x)
            del y
            z = x * (3 + i)  # very likely where y was
            total = total + F.linear(z, head).sin().sum()
        return total

    assert_equal_with_and_without(function, X, HEADS[0])


def test_the_registry_does_not_keep_the_inputs_of_a_recipe_nobody_asked_for():
    """B1: an output that is not saved (frozen Linear) leaves nothing behind, and does so at once."""
    head = HEADS[0].detach()

    def function(x):
        y = doubled(x * 5, saves=False)
        z = F.linear(y, head)
        del y
        return z.sum()

    assert kept(Stash, function, X) == kept(NO_STASH, function, X) == 0
    with Stash() as door:
        y = doubled(X * 5, saves=False)
        assert len(door._outputs) == 1
        del y
        door.door(leaf(1) * 1)
        assert len(door._outputs) == 0


def test_after_the_forward_an_output_that_lives_on_keeps_no_inputs():
    with LiveStorages(inputs=X) as live:
        with Stash() as door:
            y = doubled(X * 5, saves=False)
        assert live.bytes() == y.nbytes
        assert not door._outputs and not door._holds and not door._pending


def test_nothing_is_remembered_of_what_needs_no_gradient():
    with Stash() as door:
        doubled(X.detach())
        assert not door._outputs
        with torch.no_grad():
            doubled(X)
        assert not door._outputs


@pytest.mark.parametrize("op", [torch.exp, torch.sigmoid, torch.tanh, lambda x: x.softmax(-1), F.relu])
def test_an_op_that_saves_its_own_output_leaks_nothing(op):
    """B4: a hook that returns the tensor itself makes it own itself, for good."""
    with LiveStorages(inputs=X) as live:
        for _ in range(3):
            with Stash():
                y = op(X * 1).sum()
            del y
        assert live.bytes() == 0


def test_graphs_are_freed_without_the_garbage_collector():
    with LiveStorages(inputs=(X, W, HEADS)) as live:
        with Stash() as door:
            loss = block(X, W, *HEADS) + doubled(doubled(X)).sin().sum()
        alive = weakref.ref(door)
        del door
        loss.backward(retain_graph=True)
        del loss
        for t in (X, W, *HEADS):
            t.grad = None
        assert live.bytes() == 0
    assert alive() is None


def test_live_bytes_fall_layer_by_layer_as_without_it():
    data, curves, layers = batch(64), {}, 4
    hidden = 64 * 64 * 4
    models = {"plain": tiny_llama(layers), "ours": with_stash(with_recipes(tiny_llama(layers)))}
    for name, model in models.items():
        curve = curves[name] = []
        with LiveStorages(model, data) as live:
            for layer in model.model.layers:
                layer.input_layernorm.weight.register_post_accumulate_grad_hook(
                    lambda _, live=live, curve=curve: curve.append(live.bytes())
                )
            loss = model(**data).loss
            curve.append(live.bytes())
            loss.backward()
            del loss
            assert live.bytes() == 0
    per_layer = {name: [a - b for a, b in itertools.pairwise(curve[1:])] for name, curve in curves.items()}
    assert all(fall > 7 * hidden for fall in per_layer["ours"])
    assert all(min(falls) > 0.95 * max(falls) for falls in per_layer.values())  # every layer gives back the same
    assert all(ours < plain for ours, plain in zip(curves["ours"], curves["plain"], strict=True))
    assert curves["ours"][-1] <= curves["plain"][-1]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_reader_in_another_cuda_stream_keeps_the_tensor(autocast, monkeypatch):
    """Streams are stood in for by names: what is made again in one stream and read in another would be a race."""
    now = ["first"]
    monkeypatch.setattr(stash, "_stream", lambda t: now[0])
    forgotten = {"first": 1, "second": 0}
    for reader, again in forgotten.items():
        now[0] = "first"
        made.clear()
        with Stash(), torch.autocast("cpu", enabled=autocast):
            y = rms_norm(X, W, 1e-6)
            now[0] = reader
            loss = F.linear(y, HEADS[0]).sum()
        now[0] = "first"
        loss.backward()
        assert made.count("norm") == again
    HEADS[0].grad = X.grad = W.grad = None


def test_on_the_cpu_there_are_no_streams():
    assert stash._stream(X) is None


# Made once, and at most two kept


def test_made_once_per_backward():
    with Stash():
        loss = block(X, W, *HEADS)
    loss.backward(retain_graph=True)
    assert made == ["norm"]
    loss.backward(retain_graph=True)
    assert made == ["norm", "norm"]
    loss.backward()
    assert made == ["norm"] * 3
    for t in (X, W, *HEADS):
        t.grad = None
    assert_equal_with_and_without(block, X, W, *HEADS, backwards=3)


def test_a_partial_backward_keeps_one_made_tensor_until_the_graph_goes():
    with LiveStorages(inputs=(X, W, HEADS)) as live:
        with Stash():
            y = rms_norm(X, W, 1e-6)
            a, b = F.linear(y, HEADS[0]).sum(), F.linear(y, HEADS[1]).sum()
            del y
        before = live.bytes()
        torch.autograd.grad(a, HEADS[0])
        assert live.bytes() - before <= X.nbytes
        del a
        torch.autograd.grad(b, HEADS[1])
        assert made == ["norm"]  # b used what a had left
        del b
        assert live.bytes() == 0


def test_a_made_tensor_goes_when_nobody_is_left_to_read_it():
    with LiveStorages(inputs=(X, W, HEADS)) as live:
        with Stash():
            y = rms_norm(X, W, 1e-6)
            a, b = F.linear(y, HEADS[0]).sum(), F.linear(y, HEADS[1]).sum()
            del y
        before = live.bytes()
        torch.autograd.grad(a, HEADS[0], retain_graph=True)
        assert live.bytes() - before == X.nbytes
        del b
        assert live.bytes() - before <= 0


def test_no_more_than_two_made_tensors_are_kept():
    n = 6
    with LiveStorages(inputs=(X, HEADS)) as live:
        with Stash():
            ys = [doubled(X) for _ in range(n)]
            firsts = [F.linear(y, HEADS[0]).sum() for y in ys]
            seconds = [F.linear(y, HEADS[1]).sum() for y in ys]
            del ys
        before = live.bytes()
        for first in firsts:
            torch.autograd.grad(first, HEADS[0], retain_graph=True)
        assert live.bytes() - before == 2 * X.nbytes
        for second in seconds:
            torch.autograd.grad(second, HEADS[1], retain_graph=True)
        assert len(made) == 2 * n  # all but the last two were made again, and those too once they were pushed out
        firsts.clear(), seconds.clear()
        del first, second
        assert live.bytes() == 0


def test_a_recipe_that_makes_something_else_is_an_error():
    def halved(x):
        return x[:4] * 2

    with Stash():
        y = Doubled.apply(X, True)
        remember(y, halved, X)
        loss = F.linear(y, HEADS[0]).sum()
    with pytest.raises(RuntimeError, match=r"recipe halved made torch.float32 \[4, 16\].*output was torch.float32 \[8, 16\]"):
        loss.backward()


# Modified in place


def modified(shape):
    what = rf"modified by an inplace operation: \[torch.FloatTensor \[{shape}\]\]"
    return pytest.raises(RuntimeError, match=what + ".*is at version 1; expected version 0")


def test_an_optimizer_step_between_forward_and_backward_is_an_error():
    """B5: a hook that passes parameters through loses PyTorch's check."""
    model = with_stash(with_recipes(tiny_llama()))
    loss = model(**batch(8)).loss
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"by an inplace operation.*the parameter '.*weight'.*at version \d+; expected"):
        loss.backward()


def test_a_weight_modified_after_a_recipe_used_it_is_an_error():
    """B5: silently, dW would be three times too large."""
    w = weight(16, seed=5)
    with Stash():
        y = rms_norm(X.detach(), w, 1e-6)
        loss = F.linear(y, HEADS[0]).sum()
    with torch.no_grad():
        w.mul_(3)
    with modified("16"):
        loss.backward()


@pytest.mark.parametrize("through", [lambda z: z, lambda z: z[1:], lambda z: z.detach()])
def test_an_activation_modified_after_it_was_saved_is_an_error(through):
    with Stash():
        z = X * 1
        loss = z.sin().sum()
    with torch.no_grad():
        through(z).mul_(2)
    with modified("8, 16"):
        loss.backward()


def test_an_input_of_a_recipe_modified_after_it_was_saved_is_an_error():
    with Stash():
        x = X * 1
        loss = F.linear(doubled(x), HEADS[0]).sum()
    with torch.no_grad():
        x.add_(1)
    with modified("8, 16"):
        loss.backward()


def test_an_output_modified_before_it_is_saved_is_kept_as_it_is():
    def function(x, head):
        y = doubled(x)
        y.mul_(5)
        return F.linear(y, head).sin().sum()

    assert_equal_with_and_without(function, X, HEADS[0])
    assert not made


def test_an_output_modified_after_it_is_saved_still_gives_the_right_gradient():
    """Plain PyTorch must refuse; a recipe does not mind."""

    def function(x, head, spoil):
        y = doubled(x)
        loss = F.linear(y, head).sin().sum()
        if spoil:
            with torch.no_grad():
                y.mul_(5)
        return loss

    with Stash():
        loss = function(X, HEADS[0], True)
    ours = torch.autograd.grad(loss, (X, HEADS[0]))
    plain = torch.autograd.grad(function(X, HEADS[0], False), (X, HEADS[0]))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_an_alias_with_a_version_counter_of_its_own_is_not_trusted():
    def function(x, head):
        y = doubled(x)
        y.mul_(3)  # so y is at version 1 and y.data at version 0
        z = doubled(x)
        alias = z.data
        alias.mul_(3)  # the other way round
        return F.linear(y.data, head).sin().sum() + F.linear(alias, head).sin().sum() + 0 * x.sum()

    assert_equal_with_and_without(function, X, HEADS[0])
    assert not made


class Doubling(torch.autograd.Function):
    """x², of which the backward writes into what it saved: PyTorch accepts that where nobody reads it afterwards."""

    @staticmethod
    def forward(ctx, x, times):
        ctx.save_for_backward(*[x] * times)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        x, *others = ctx.saved_tensors
        x.mul_(2)
        return (others[-1] if others else x) * dy, None


def small_norm(x, w):
    return functional.rms_norm(x, w)


READERS = {
    "itself": lambda y: y,
    "view": lambda y: y[1:],
    "transposed": lambda y: y.t(),
    "cast": lambda y: y.to(torch.float64),
    "copy": lambda y: y.to(y.dtype, copy=True),
    "recipe of it": lambda y: functional.silu(y),
    "relu of it": lambda y: rectified(F.relu, y),
    "square of a relu": lambda y: squared(y),
    "dropout": lambda y: functional.dropout(y, 0.5),
}


@pytest.mark.parametrize("through", READERS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("times", [1, 2])
def test_who_writes_into_a_made_tensor_spoils_it_for_nobody_else(through, first, times):
    """One that others were to be handed too: they get a fresh one. A Function that saves one tensor twice sees one, as ever."""

    def function(x, w, head, door):
        torch.manual_seed(3)
        y = small_norm(x, w)
        z = READERS[through](y)
        writes = [lambda: Doubling.apply(z if door is Stash else z.clone(), times).sum()]
        reads = [
            lambda: (y @ head).sum(),
            lambda: (z @ head.to(z.dtype)).sum() if z.shape[-1] == 16 else (z.t() @ head).sum(),
        ]
        terms = writes + reads if first else reads + writes
        return sum(term() for term in terms)

    for backwards in (1, 2):
        ours = grads(Stash, lambda x, w, head: function(x, w, head, Stash), X, W, HEADS[0], backwards=backwards)
        if backwards == 1:
            right = grads(NO_STASH, lambda x, w, head: function(x, w, head, None), X, W, HEADS[0])
        for a, b in zip(ours, right, strict=True):
            torch.testing.assert_close(a, backwards * b)


def test_who_writes_into_a_decoded_tensor_spoils_it_for_nobody_else():
    x, head = leaf(64, 64), leaf(64, 64, seed=1)

    def run(writes):
        with Stash("int8"):
            y = x * 1
            stash.plays("mlp", y)
            loss = (y @ head).sum() + (Doubling.apply(y, 1).sum() if writes else (y * y).sum())
        return torch.autograd.grad(loss, (x, head))

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b)


def test_a_made_tensor_has_a_version_in_inference_mode_too():
    with Stash():
        loss = block(X, W, *HEADS)
    with torch.inference_mode():
        loss.backward()
    ours = [t.grad.clone() for t in (X, W, *HEADS)]
    for t in (X, W, *HEADS):
        t.grad = None
    for a, b in zip(ours, grads(NO_STASH, block, X, W, *HEADS), strict=True):
        assert torch.equal(a, b)


# An input that nobody saves may be changed


def dropped(x):
    return functional.dropout(x, 0.5)


def rows_of(x):
    y = x[[0, 0, 1, 1, 2, 2, 3, 3]]
    remember(y, rows_again, x)
    return y


def rows_again(x):
    return x[[0, 0, 1, 1, 2, 2, 3, 3]]


@pytest.mark.parametrize("op", [dropped, lambda x: doubled(x, saves=False), lambda x: rows_of(x[:4])])
@pytest.mark.parametrize("when", ["before it is saved", "after it is saved", "after the forward"])
@pytest.mark.parametrize("cast", [False, True])
def test_changing_what_no_op_saves_is_allowed_as_in_pytorch(op, when, cast):
    def function(x, head):
        torch.manual_seed(3)
        x = x * 1
        y = op(x)
        if when == "before it is saved":
            x += 1
        z = F.linear(y.bfloat16() if cast else y, head.bfloat16() if cast else head)
        loss = z.sin().sum()
        if when == "after it is saved":
            x += z[: len(x)]
        loss = loss + (0.1 * x).sum()
        if when == "after the forward":
            with torch.no_grad():
                x.mul_(2)
        return loss

    assert_equal_with_and_without(function, X, HEADS[0])


@pytest.mark.parametrize("cast", [False, True])
def test_what_was_kept_gives_way_once_the_input_is_saved(cast):
    def function(x, head):
        torch.manual_seed(3)
        x = x * 1
        y = dropped(x)
        w = head.bfloat16() if cast else head
        z = y.bfloat16() if cast else y
        loss = (z @ w).sum() + (z[:, ::2] @ w[::2]).sum()
        del y, z
        return loss + x.sin().sum()

    assert kept(Stash, function, X, HEADS[0]) == X.nbytes
    assert_equal_with_and_without(function, X, HEADS[0])


def test_what_was_kept_stays_where_the_input_was_changed_before_it_is_saved():
    def function(x, head):
        torch.manual_seed(3)
        x = x * 1
        y = dropped(x)
        loss = (y @ head).sum()
        x += 1
        return loss + x.sin().sum()

    assert_equal_with_and_without(function, X, HEADS[0])


def test_an_input_smaller_than_the_output_is_copied_until_somebody_saves_it():
    def function(x, head, saves):
        x = x * 1
        y = rows_of(x)
        loss = (y @ head).sum()
        return loss + x.sin().sum() if saves else loss

    x = leaf(4, 16)
    for saves in (False, True):
        assert kept(Stash, lambda x, head: function(x, head, saves), x, HEADS[0]) == x.nbytes  # noqa: B023
        assert_equal_with_and_without(lambda x, head: function(x, head, saves), x, HEADS[0])  # noqa: B023


@pytest.mark.parametrize("op", [dropped, lambda x: rectified(F.relu, x)])
@pytest.mark.parametrize("writer_first", [True, False])
def test_no_recipe_relies_on_what_a_function_may_write_into(op, writer_first):
    """Its backward runs before or after that of the recipe's reader; PyTorch does not mind, because the op saves no input."""

    def function(x, head):
        torch.manual_seed(3)
        x = x * 1
        if writer_first:
            loss = Doubling.apply(x, 1).sum()
        y = (op(x) @ head).sum()
        return y + (loss if writer_first else Doubling.apply(x, 1).sum())

    assert_equal_with_and_without(function, X, HEADS[0])


@pytest.mark.parametrize("make", [lambda x: functional.silu(x), lambda x: functional.silu(x).to(torch.float64)])
def test_what_a_checkpoint_recomputes_from_may_not_be_changed(make):
    """PyTorch says so when it recomputes; what it saves then, nobody checks."""

    def layer(x):
        y = x.sin()
        x.mul_(2)
        return y

    for door in (NO_STASH, Stash):
        with door():
            loss = checkpoint(layer, make(X), use_reentrant=False).sum()
        with pytest.raises(RuntimeError, match=r"8, 16\].*is at version 1; expected version 0"):
            loss.backward()


@pytest.mark.parametrize("norm", [functional.rms_norm, functional.layer_norm])
@pytest.mark.parametrize("door", [Stash, NO_STASH])
def test_a_16_bit_input_of_a_norm_may_be_changed_inside_a_checkpoint(norm, door):
    """Stock norms written in Python save a float32 copy of it; in a checkpoint nobody would notice that ours saves x itself."""
    w = weight(16).bfloat16().detach().requires_grad_()

    def layer(x, change=True):
        x = x.bfloat16() * 1
        y = norm(x, w)
        x = x.mul_(2) if change else x * 2
        return (x + y).sin()  # saves something, so that the recompute comes this far

    with door():
        changed = checkpoint(layer, X, use_reentrant=False).sum()
    right = layer(X, change=False).sum()
    for a, b in zip(torch.autograd.grad(changed, (X, w)), torch.autograd.grad(right, (X, w)), strict=True):
        assert torch.equal(a, b)


def test_inplace_activations_work():
    def function(x, head):
        return F.linear(F.relu(F.linear(x, head), inplace=True), head).sum()

    assert_equal_with_and_without(function, X, HEADS[0])


# Parameters


def test_autocast_copies_of_weights_are_taken_for_weights():
    """B11: the door sees views of bf16 casts; a codec by role would compress the weights."""
    roles = []
    with Stash() as door, torch.autocast("cpu", torch.bfloat16):
        keep = door._keep

        def spy(t, hold, tier):
            roles.append((tuple(t.shape), t.dtype, tier))
            return keep(t, hold, tier)

        door._keep = spy
        F.linear(X, HEADS[0])
        del door._keep
    assert ((16, 16), torch.bfloat16, "parameter") in roles
    assert ((8, 16), torch.bfloat16, "device") in roles


def test_views_of_parameters_are_parameters():
    assert stash._is_parameter(HEADS[0].t()) and stash._is_parameter(HEADS[0][2:].view(-1))
    assert not stash._is_parameter(HEADS[0] * 1) and not stash._is_parameter(X)


# Whose door


def test_a_checkpoint_around_the_whole_model_keeps_working():
    """B6: entered under the checkpoint's hooks, ours would switch it off: one forward, everything kept."""
    calls, data = [], batch(48)
    model = with_stash(with_recipes(tiny_llama(4)))
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = with_recipes(tiny_llama(4))

    def run(model):
        return checkpoint(lambda ids: model(input_ids=ids, labels=ids).loss, data["input_ids"], use_reentrant=False)

    with LiveStorages(model, data) as live, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loss = run(model)
        assert live.bytes() < 1000
    assert [str(w.message) for w in said if "steps aside" in str(w.message)] != []
    loss.backward()
    assert len(calls) == 2
    run(plain).backward()
    assert_same(gradients(model), gradients(plain))


def test_an_outer_offloader_still_sees_everything():
    packed = []
    model = with_stash(with_recipes(tiny_llama()))
    with pytest.warns(UserWarning, match="other saved-tensor hooks"):
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t.detach().clone(), lambda t: t)
        with hooks:
            loss = model(**batch(16)).loss
    loss.backward()
    assert len(packed) > 40 and not made
    assert_same(gradients(model), step(with_recipes(tiny_llama()), batch(16))[1])


def test_hooks_inside_it_get_their_turn():
    """Within another's hooks nothing is remembered: what they saved is theirs."""
    with Stash() as door:
        with torch.autograd.graph.save_on_cpu():
            y = doubled(X)
            assert Stash.current() is None and not door._outputs
        assert Stash.current() is door
        loss = F.linear(y, HEADS[0]).sum()
    loss.backward()
    assert not made


def test_nested_stashes_share_the_outer_door():
    def function(x, w, head):
        with Stash():
            y = rms_norm(x, w, 1e-6)
        return F.linear(y, head).sum()

    with Stash() as outer:
        with Stash() as inner:
            assert Stash.current() is outer is not inner
        with outer:
            assert Stash.current() is outer
        assert Stash.current() is outer
    assert kept(Stash, function, X, W, HEADS[0]) < kept(NO_STASH, function, X, W, HEADS[0])
    assert_equal_with_and_without(function, X, W, HEADS[0])


def test_a_backward_inside_the_forward():
    def function(x, w, *heads):
        (inner,) = torch.autograd.grad(block(x, w, *heads), x, create_graph=False)
        return block(x + inner, w, *heads)

    assert_equal_with_and_without(function, X, W, *HEADS)


def test_second_derivatives_of_ops_that_have_them():
    def function(x, head):
        (first,) = torch.autograd.grad(F.linear(x, head).sin().sum(), x, create_graph=True)
        return (first**3).sum()

    assert_equal_with_and_without(function, X, HEADS[0])


def test_two_graphs_alive_and_accumulated():
    model, plain = with_stash(with_recipes(tiny_llama())), with_recipes(tiny_llama())
    for m in (model, plain):
        losses = [m(**batch(24, seed=seed)).loss for seed in (1, 2)]
        losses[1].backward()
        losses[0].backward()
    assert_same(gradients(model), gradients(plain))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_an_exception_nothing_is_left_and_the_next_step_is_right(where):
    model = with_stash(with_recipes(tiny_llama()))
    data = batch(24)

    def fail(*_):
        raise KeyboardInterrupt

    with LiveStorages(model, data) as live:
        if where == "forward":
            hook = model.model.layers[1].mlp.register_forward_hook(fail)
        else:
            hook = model.model.layers[0].mlp.register_full_backward_hook(fail)
        try:
            model(**data).loss.backward()
            raise AssertionError("the hook did not run")
        except KeyboardInterrupt:
            assert where == "backward" or Stash.current() is None
        hook.remove()
        model.zero_grad(set_to_none=True)
        assert live.bytes() == 0
    assert stash._top_hooks() is None
    assert_same(step(model, data)[1], step(with_recipes(tiny_llama()), data)[1])


def test_each_thread_has_its_own_door_and_any_thread_may_go_back():
    losses, failures, all_of_them = {}, [], threading.Barrier(3, timeout=60)

    def forward(name):
        try:
            with Stash() as door:
                all_of_them.wait()
                assert Stash.current() is door
                losses[name] = block(X, W, *HEADS)
                all_of_them.wait()
        except BaseException as error:
            failures.append(error)

    with Stash() as mine:
        threads = [threading.Thread(target=forward, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert Stash.current() is mine and not mine._outputs
    assert not failures
    found = {}
    for n, loss in losses.items():
        thread = threading.Thread(target=lambda n=n, loss=loss: found.update({n: torch.autograd.grad(loss, (X, W))}))
        thread.start()
        thread.join()
    plain = torch.autograd.grad(block(X, W, *HEADS), (X, W))
    assert all(torch.equal(a, b) for n in range(3) for a, b in zip(found[n], plain, strict=True))
    assert made == ["norm"] * 3


# Without gradients, copied, saved, compiled


def test_without_gradients_it_is_not_there():
    model, plain = with_stash(with_recipes(tiny_llama())).eval(), tiny_llama().eval()
    ids = batch(12)["input_ids"]
    for context in (torch.no_grad, torch.inference_mode):
        with context(), Stash() as door:
            assert Stash.current() is None
            assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)
            assert not door._outputs and not door._holds
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))
    assert not made


def test_evaluation_mode_with_gradients():
    model, plain = with_stash(with_recipes(tiny_llama())), with_recipes(tiny_llama())
    assert_same(step(model.eval(), batch(16))[1], step(plain.eval(), batch(16))[1])


def test_copied_and_saved_models():
    model = with_stash(with_recipes(tiny_llama()))
    data = batch(24)
    loss, expected = step(model, data)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    twin_loss, found = step(twin, data)
    assert torch.equal(twin_loss, loss)
    assert_same(found, expected)
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    file.seek(0)
    fresh = with_stash(with_recipes(tiny_llama(seed=3)))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same(step(fresh, data)[1], expected)


def test_frozen_parts_keep_what_autograd_keeps_and_no_more():
    data, bytes_kept = batch(48), {}
    for name, model in {"plain": with_recipes(tiny_llama()), "ours": with_stash(with_recipes(tiny_llama()))}.items():
        model.requires_grad_(False)
        model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
        with LiveStorages(model, data) as live:
            loss = model(**data).loss
            bytes_kept[name] = live.bytes()
        loss.backward()
        bytes_kept[name, "gradient"] = model.model.layers[1].mlp.down_proj.weight.grad
    assert bytes_kept["ours"] <= bytes_kept["plain"]
    assert torch.equal(bytes_kept["ours", "gradient"], bytes_kept["plain", "gradient"])


def test_under_functorch_it_steps_aside_and_says_so_once():
    def function(x):
        with Stash():
            return (x.sin() * x).sum()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first, second = torch.func.grad(function)(X.detach()), torch.func.grad(function)(X.detach())
    assert torch.equal(first, second)
    assert torch.equal(first, *grads(NO_STASH, lambda x: (x.sin() * x).sum(), X))
    assert len([w for w in said if "torch.func" in str(w.message)]) == 1


def test_under_compile_it_steps_aside_and_says_so_once():
    def function(x):
        with Stash():
            y = (x.sin() * x).exp()
            remember(y, twice, x)
            return y.sum()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        ours = grads(NO_STASH, compiled, X) + grads(NO_STASH, compiled, X)
    assert all(torch.allclose(g, *grads(NO_STASH, lambda x: (x.sin() * x).exp().sum(), X)) for g in ours)
    assert len([w for w in said if "torch.compile" in str(w.message)]) == 1
    assert not made


def test_without_the_private_functions_of_torch_it_steps_aside(monkeypatch):
    monkeypatch.setattr(stash, "_top", None)
    with pytest.warns(UserWarning, match="does not say which saved-tensor hooks"):
        assert_equal_with_and_without(block, X, W, *HEADS)
    assert not made


def test_where_hooks_are_forbidden_it_steps_aside():
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_equal_with_and_without(block, X, W, *HEADS)
    assert not made


# The loss's own buffers


def test_loss_buffers_are_known_while_they_live():
    buffer = torch.zeros(4)
    key = buffer.untyped_storage()._cdata
    assert not stash.is_loss_buffer(key)
    stash.mark_loss_buffer(buffer[1:])
    assert stash.is_loss_buffer(key)
    del buffer
    assert not stash.is_loss_buffer(key)
    stash.mark_loss_buffer(torch.zeros(2))
    assert key not in stash._loss_buffers  # forgotten, so that a later storage there is not taken for it


def test_gated_products_are_made_again():
    gate, up, head = leaf(8, 16), leaf(8, 16, seed=4), HEADS[0]

    def function(gate, up, head):
        return F.linear(gated(gate, up), head).sum()

    assert kept(NO_STASH, function, gate, up, head) - kept(Stash, function, gate, up, head) == 8 * 16 * 4
    assert_equal_with_and_without(function, gate, up, head)


def test_remember_without_a_stash_does_nothing():
    y = Doubled.apply(X, True)
    remember(y, norm_again, X)
    assert stash._MARK not in y.grad_fn.metadata
