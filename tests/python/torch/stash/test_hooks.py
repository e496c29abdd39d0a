"""Where other saved-tensor hooks are in place, or none can be, the stash steps aside."""

import warnings

import pytest
import torch
from small_models import assert_same, batch, gradients, made, step, tiny_llama, weight, with_recipes, with_stash
from tests.python.torch.stash.small_programs import (
    HEADS,
    NO_STASH,
    W,
    X,
    assert_equal_with_and_without,
    block,
    doubled,
    grads,
    twice,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unswag.torch import functional
from unswag.torch.audit import LiveStorages
from unswag.torch.stash import Stash, hooks, remember


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
            assert Stash.current() is None and not door.entries().outputs
        assert Stash.current() is door
        loss = F.linear(y, HEADS[0]).sum()
    loss.backward()
    assert not made


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
    (words,) = [str(w.message) for w in said if "torch.compile" in str(w.message)]
    assert "a store and a sweep (store=..., sweep=...) do nothing" in words
    assert not made


def test_without_the_private_functions_of_torch_it_steps_aside(monkeypatch):
    monkeypatch.setattr(hooks, "torch_top_hooks", None)
    with pytest.warns(UserWarning, match="does not say which saved-tensor hooks"):
        assert_equal_with_and_without(block, X, W, *HEADS)
    assert not made


def test_where_hooks_are_forbidden_it_steps_aside():
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_equal_with_and_without(block, X, W, *HEADS)
    assert not made
