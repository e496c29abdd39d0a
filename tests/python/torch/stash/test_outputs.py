"""Remembered outputs: recomputed instead of kept, where no program that PyTorch accepts can tell."""

import pytest
import torch
from small_models import gated, made, norm_again, rms_norm
from tests.python.torch.stash.small_programs import (
    HEADS,
    NO_STASH,
    Doubled,
    Doubling,
    PythonDoor,
    W,
    X,
    assert_equal_with_and_without,
    block,
    bytes_kept,
    doubled,
    dropped,
    leaf,
    twice,
)
from torch.nn import functional as F

from unswag.torch import stash
from unswag.torch.stash import Stash, outputs, remember
from unswag.torch.stash import door as door_module
from unswag.torch.stash.outputs import output_of
from unswag.torch.stash.rectified import rectified


def test_what_has_a_recipe_is_not_kept():
    hidden = 8 * 16 * 4
    assert bytes_kept(NO_STASH, block, X, W, *HEADS) - bytes_kept(Stash, block, X, W, *HEADS) == hidden
    assert_equal_with_and_without(block, X, W, *HEADS)


def test_under_autocast_no_cast_of_what_has_a_recipe_is_kept():
    """Each Linear casts the norm's output for itself: three copies."""
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = bytes_kept(NO_STASH, block, X, W, *HEADS), bytes_kept(Stash, block, X, W, *HEADS)
        assert plain - ours == 3 * 8 * 16 * 2
        made.clear()
        assert_equal_with_and_without(block, X, W, *HEADS)
    assert made == ["norm"]


def test_a_cast_behind_a_view_is_made_again_too():
    x, head = leaf(2, 4, 16), HEADS[0]

    def function(x, w, head):
        y = rms_norm(x, w, 1e-6)
        return (y.view(8, 16)[:, 0:].to(torch.bfloat16) @ head.to(torch.bfloat16)).float().sum()

    assert bytes_kept(Stash, function, x, W, head) < bytes_kept(NO_STASH, function, x, W, head)
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
    assert bytes_kept(Stash, function, X) < bytes_kept(NO_STASH, function, X)


def test_recipes_of_recipes():
    """The product of a norm's output with itself, cast: inputs of a recipe may have recipes."""

    def function(x, w, head):
        return F.linear(doubled(doubled(rms_norm(x, w, 1e-6), saves=False), saves=False), head).sin().sum()

    assert bytes_kept(NO_STASH, function, X, W, HEADS[0]) - bytes_kept(Stash, function, X, W, HEADS[0]) == 8 * 16 * 4
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
    assert isinstance(handle, stash.Recomputed)
    assert torch.equal(stash.unpack(handle), view(y))
    assert stash.unpack(handle).stride() == view(y).stride()


def test_a_view_that_reaches_outside_the_output_is_kept_as_it_is():
    whole = torch.randn(6, 4, requires_grad=True) * 1
    part = whole[2:4]
    with Stash() as door:
        other = leaf(2, 4) * 1
        held = door.door(other)
        remember(part, twice, other)  # a lie that must not be used for `whole`
        assert isinstance(door.door(part), stash.Recomputed)
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


@pytest.mark.parametrize("autocast", [False, True])
def test_a_reader_in_another_cuda_stream_keeps_the_tensor(autocast, monkeypatch):
    """Streams are stood in for by names: what is made again in one stream and read in another would be a race."""
    now = ["first"]
    for module in (door_module, outputs):
        monkeypatch.setattr(module, "stream_of", lambda t: now[0])
    forgotten = {"first": 1, "second": 0}
    for reader, again in forgotten.items():
        now[0] = "first"
        made.clear()
        with PythonDoor(), torch.autocast("cpu", enabled=autocast):
            y = rms_norm(X, W, 1e-6)
            now[0] = reader
            loss = F.linear(y, HEADS[0]).sum()
        now[0] = "first"
        loss.backward()
        assert made.count("norm") == again
    HEADS[0].grad = X.grad = W.grad = None


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

    assert bytes_kept(Stash, function, X, HEADS[0]) == X.nbytes
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
        assert bytes_kept(Stash, lambda x, head: function(x, head, saves), x, HEADS[0]) == x.nbytes  # noqa: B023
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


def test_gated_products_are_made_again():
    gate, up, head = leaf(8, 16), leaf(8, 16, seed=4), HEADS[0]

    def function(gate, up, head):
        return F.linear(gated(gate, up), head).sum()

    assert bytes_kept(NO_STASH, function, gate, up, head) - bytes_kept(Stash, function, gate, up, head) == 8 * 16 * 4
    assert_equal_with_and_without(function, gate, up, head)


def test_remember_without_a_stash_does_nothing():
    y = Doubled.apply(X, True)
    remember(y, norm_again, X)
    assert output_of(y.grad_fn) is None
