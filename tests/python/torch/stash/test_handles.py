"""Handles: recomputed once for all readers, freed with the graph, and an error where a tensor was overwritten."""

import threading

import pytest
import torch
from small_models import batch, made, rms_norm, tiny_llama, weight, with_recipes, with_stash
from tests.python.torch.stash.small_programs import (
    HEADS,
    NO_STASH,
    Doubled,
    Doubling,
    W,
    X,
    assert_equal_with_and_without,
    block,
    doubled,
    dropped,
    grads,
    leaf,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unswag.torch import functional, stash
from unswag.torch.audit import LiveStorages
from unswag.torch.stash import Stash, remember
from unswag.torch.stash.rectified import rectified, squared


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


# What a handle costs


def test_the_tier_of_a_handle_says_who_pays_for_the_tensor():
    x, packed = X * 1, leaf(64, 64) * 1
    with Stash("int8") as door:
        stash.plays("mlp", packed)
        first, view, whole = door.door(x), door.door(x[1:]), door.door(W)
        recomputed, decoded = door.door(doubled(x)), door.door(packed)
    assert [(h.tier, h.bytes) for h in (first, view, whole)] == [("device", x.nbytes), ("shared", 0), ("parameter", 0)]
    assert [(h.tier, h.bytes) for h in (recomputed, decoded)] == [("recipe", 0), ("recipe", 0)]
    assert [(h.tier, h.bytes) for h in decoded.recipe.inputs] == [("device", 64 * 2 * 34)]
    first.replace_with(recomputed)
    assert (first.tier, first.bytes) == ("recipe", 0) and torch.equal(first.open(), 2 * x)


def all_of(handles):
    """Handles, the inputs of their recipes, the inputs of these, …, each once."""
    found, left = {}, list(handles)
    while left:
        handle = left.pop()
        handle = getattr(handle, "replacement", None) or handle
        if id(handle) not in found:
            found[id(handle)] = handle
            left += [x for x in handle.recipe.inputs if x is not None] if isinstance(handle, stash.Recomputed) else []
    return found.values()


@pytest.mark.parametrize("policy", ["exact", "int8"])
@pytest.mark.parametrize(
    "act", [lambda x: rectified(F.relu, x), squared, functional.silu, dropped], ids=["relu", "squared", "silu", "dropped"]
)
@pytest.mark.parametrize("trained", [True, False])
def test_handles_count_every_byte_of_a_forward_once(policy, act, trained):
    handles, x, head = [], leaf(64, 64), weight(64, 64).requires_grad_(trained)

    class Watched(Stash):
        def door(self, t, depth=1):
            handles.append(super().door(t, depth + 1))
            return handles[-1]

    with LiveStorages(nn.ParameterList([head]), inputs=x) as live:
        with Watched(policy):
            h = act(x * 1)
            loss = (h @ head).sum()
            del h
        assert sum(handle.bytes for handle in all_of(handles)) == live.bytes() - loss.nbytes
    assert handles or not trained


def test_a_handle_opens_any_number_of_times_in_any_thread():
    with Stash() as door:
        handles = [door.door(t) for t in (X * 1, W, doubled(X))]
    wanted = [X.detach() * 1, W.detach(), X.detach() * 2]
    opened = []
    threads = [threading.Thread(target=lambda h=h: opened.append((h, stash.unpack(h)))) for h in handles * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 12
    for handle, t in opened:
        assert torch.equal(t, wanted[handles.index(handle)]) and not t.requires_grad
