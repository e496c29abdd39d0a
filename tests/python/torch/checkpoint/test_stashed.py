"""Checkpointed layers recompute under a stash: same gradients, recipes used, checkpointing still on."""

import contextlib
import copy
import functools
import gc
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.utils.checkpoint
from small_models import assert_same, batch, gradients, made, step, tiny_llama, with_recipes, with_stash
from torch import nn

from unswag.torch import checkpoint, stash
from unswag.torch.audit import LiveStorages
from unswag.torch.stash import Stash, hooks, thread

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
KINDS = pytest.mark.parametrize("reentrant", [False, True])


@pytest.fixture(autouse=True)
def no_help_from_gc():
    torch.set_num_threads(1)
    hooks.warned.clear()
    made.clear()
    gc.disable()
    yield
    gc.enable()
    assert thread.idle()
    assert stash.top_hooks() is None


def checkpointed(model, reentrant=False, **settings):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant, **settings})
    return model


def ours(layers=2, reentrant=False, **settings):
    return checkpointed(with_stash(with_recipes(tiny_llama(layers, **settings)), checkpoint.prepare), reentrant)


def count_calls(model):
    calls = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@KINDS
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_equal_plain_checkpointing_bit_for_bit(reentrant, autocast):
    data, model = batch(48), ours(2, reentrant)
    calls = count_calls(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain_loss, plain = step(checkpointed(with_recipes(tiny_llama()), reentrant), data)
        assert not made
        loss, found = step(model, data)
    assert torch.equal(loss, plain_loss)
    assert_same(found, plain)
    assert len(calls) == 2 * 2  # every layer ran twice: checkpointing is on (B7)
    assert made.count("norm") == 5 and made.count("gated") == 2  # in the recompute too, each once


@KINDS
def test_only_the_inputs_of_layers_are_kept(reentrant):
    """B1: during a checkpoint's first forward nothing may be remembered."""
    data, layers = batch(64), 6
    hidden = 64 * 64 * 4
    live_bytes = {}
    models = {"plain": checkpointed(with_recipes(tiny_llama(layers)), reentrant), "ours": ours(layers, reentrant)}
    for name, model in models.items():
        with LiveStorages(model, data) as live:
            loss = model(**data).loss
            live_bytes[name] = live.bytes()
            del loss
            assert live.bytes() == 0
    assert live_bytes["plain"] - live_bytes["ours"] == hidden  # the last norm's output
    assert layers * hidden < live_bytes["ours"] < (layers + 1) * hidden + 64 * (97 + 2 * 16 + 8) * 4 + 1000


@KINDS
def test_recomputed_layers_keep_less_and_give_it_back(reentrant):
    data, layers, peaks, curves = batch(64), 4, {}, {}
    models = {"plain": checkpointed(with_recipes(tiny_llama(layers)), reentrant), "ours": ours(layers, reentrant)}
    for name, model in models.items():
        with LiveStorages(model, data) as live:
            curve = curves[name] = []
            for layer in model.model.layers:
                layer.input_layernorm.weight.register_post_accumulate_grad_hook(
                    lambda _, live=live, curve=curve: curve.append(live.bytes())
                )
            loss = model(**data).loss
            loss.backward()
            peaks[name] = live.peak()
            del loss
            assert live.bytes() == 0
    assert peaks["ours"] < peaks["plain"]
    assert all(a <= b for a, b in zip(curves["ours"], curves["plain"], strict=True))
    assert sorted(curves["ours"], reverse=True) == curves["ours"]


def test_dropout_is_the_same_in_the_recompute():
    results = []
    for model in (checkpointed(with_recipes(tiny_llama(attention_dropout=0.3))), ours(attention_dropout=0.3)):
        torch.manual_seed(7)
        results.append(step(model, batch(32))[1])
    assert_same(*results)


def test_backward_from_another_thread():
    model, data = ours(), batch(32)
    loss = model(**data).loss
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_same(gradients(model), step(checkpointed(with_recipes(tiny_llama())), data)[1])
    assert made.count("norm") == 5


def test_several_backward_passes():
    """Two graphs at once, and one of them twice."""
    found = []
    for model in (ours(), checkpointed(with_recipes(tiny_llama()))):
        losses = [model(**batch(32, seed=seed)).loss for seed in (1, 2)]
        losses[1].backward(retain_graph=True)
        losses[0].backward()
        losses[1].backward()
        found.append(gradients(model))
    assert_same(*found)


def test_a_layer_that_saves_other_tensors_in_the_recompute_is_still_found_out():
    model, data = ours(), batch(16)
    loss = model(**data).loss
    del model.model.layers[0].mlp.forward  # the stock forward saves one tensor more
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="have different metadata"):
        loss.backward()


@KINDS
def test_after_an_exception_in_the_recompute_the_next_step_is_right(reentrant):
    model, data = ours(2, reentrant), batch(16)
    loss = model(**data).loss

    def fail(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    hook.remove()
    assert stash.top_hooks() is None and thread.idle()
    assert_same(step(model, data)[1], step(checkpointed(with_recipes(tiny_llama()), reentrant), data)[1])


# Wiring


def test_prepared_again_each_forward_and_only_once():
    model = with_recipes(tiny_llama())
    assert checkpoint.prepare(model) == []  # nothing to do: checkpointing is off
    checkpointed(model)
    plain = model.model.layers[0]._gradient_checkpointing_func
    for _ in range(2):
        assert checkpoint.prepare(model) == []
        wrapped = model.model.layers[0]._gradient_checkpointing_func
        assert isinstance(wrapped, checkpoint.StashedCheckpoint) and wrapped.plain is plain
    checkpointed(model)  # as a trainer does after surgery
    assert checkpoint.prepare(model) == []
    assert isinstance(model.model.layers[0]._gradient_checkpointing_func, checkpoint.StashedCheckpoint)
    checkpoint.release(model)
    assert model.model.layers[0]._gradient_checkpointing_func is not plain
    assert not any(isinstance(vars(m).get(checkpoint.ATTRIBUTE), checkpoint.StashedCheckpoint) for m in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pickled_model_checkpoints_as_plain_torch_where_unswag_is_absent(reentrant, tmp_path):
    layer = nn.Linear(4, 4)
    layer._gradient_checkpointing_func = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
    checkpoint.prepare(layer)
    for saved in (pickle.dumps(layer), pickle.dumps(layer._gradient_checkpointing_func)):
        assert b"unswag" not in saved
    torch.save(layer, tmp_path / "layer.pt")
    code = (
        "import sys; sys.modules['unswag'] = None\nimport torch\n"
        f"layer = torch.load({str(tmp_path / 'layer.pt')!r}, weights_only=False)\n"
        "x = torch.ones(2, 4, requires_grad=True)\n"
        "layer._gradient_checkpointing_func(layer.forward, x).sum().backward()\n"
        "assert x.grad is not None and layer.weight.grad is not None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_checkpoints_its_own_layers(copied):
    model = checkpointed(tiny_llama())
    assert checkpoint.prepare(model) == []
    layer = model.model.layers[0]
    other = copied(layer)
    plain = layer._gradient_checkpointing_func.plain
    for _ in range(2):
        assert checkpoint.prepare(other) == []
        again = other._gradient_checkpointing_func
        assert isinstance(again, checkpoint.StashedCheckpoint)
        assert (again.plain.func, again.plain.keywords) == (plain.func, plain.keywords)
    checkpoint.release(other)
    assert isinstance(layer._gradient_checkpointing_func, checkpoint.StashedCheckpoint)
    assert not isinstance(other._gradient_checkpointing_func, checkpoint.StashedCheckpoint)


def user_contexts():
    return torch.autograd.graph.save_on_cpu(), torch.autograd.graph.save_on_cpu()


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"context_fn": user_contexts}, "a context_fn of its own"),
        ({"debug": True}, "debug=True"),
    ],
)
def test_what_cannot_be_wrapped_is_left_with_a_word(settings, reason):
    model = checkpointed(with_recipes(tiny_llama()), **settings)
    notes = checkpoint.prepare(model)
    assert len(notes) == 1 and reason in notes[0]
    assert isinstance(model.model.layers[0]._gradient_checkpointing_func, functools.partial)


def test_offloaded_checkpoints_are_left_with_a_word():
    model = with_recipes(tiny_llama())
    model.activation_checkpointing_enable(offload=True)
    notes = checkpoint.prepare(model)
    assert len(notes) == 1 and "offload=True" in notes[0]
    assert not isinstance(model.model.layers[0]._gradient_checkpointing_func, checkpoint.StashedCheckpoint)


def no_contexts():
    return contextlib.nullcontext(), contextlib.nullcontext()


def test_what_was_left_still_works_under_the_stash():
    model = with_stash(with_recipes(tiny_llama()), checkpoint.prepare)
    found = step(checkpointed(model, context_fn=no_contexts), batch(16))[1]
    assert made == ["norm"]  # the last norm is in no layer
    assert_same(found, step(checkpointed(with_recipes(tiny_llama())), batch(16))[1])


def test_checkpoint_debugging_switched_on_for_a_while():
    model, given = checkpointed(with_recipes(tiny_llama())), []
    wrapped = checkpoint.StashedCheckpoint(lambda function, *args, **kwargs: given.append(kwargs))
    with torch.utils.checkpoint.set_checkpoint_debug_enabled(True), Stash():
        assert "debug=True" in checkpoint.prepare(model)[0]
        wrapped(None, use_reentrant=False)
    assert given == [{"use_reentrant": False}]
    assert checkpoint.prepare(model) == []
    assert isinstance(model.model.layers[0]._gradient_checkpointing_func, checkpoint.StashedCheckpoint)


def test_a_checkpoint_that_cannot_be_wrapped_is_used_as_it_is(monkeypatch):
    """As with a torch whose private hooks have changed."""
    checkpoint.delegation_works.cache_clear()
    monkeypatch.setattr(hooks, "torch_top_hooks", None)
    try:
        model = checkpointed(with_recipes(tiny_llama()))
        notes = checkpoint.prepare(model)
        assert len(notes) == 1 and "cannot be wrapped" in notes[0]
    finally:
        checkpoint.delegation_works.cache_clear()
    monkeypatch.undo()
    assert checkpoint.delegation_works()


def test_the_self_test_touches_nothing_of_the_caller():
    checkpoint.delegation_works.cache_clear()
    seen = []
    state = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t.detach(), lambda t: t), torch.no_grad():
        assert checkpoint.delegation_works()
    assert not seen and torch.equal(state, torch.get_rng_state())


@KINDS
def test_a_checkpoint_around_a_checkpointed_model(reentrant):
    data, models = batch(32), (ours(2, reentrant), checkpointed(with_recipes(tiny_llama()), reentrant))
    for model in models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.utils.checkpoint.checkpoint(lambda ids, m=model: m(input_ids=ids, labels=ids).loss, data["input_ids"],
                                              use_reentrant=False).backward()  # fmt: skip
    assert_same(*map(gradients, models))


def test_a_copied_model_checkpoints_too():
    model, data = ours(), batch(32)
    expected = step(model, data)[1]
    twin = copy.deepcopy(model)
    made.clear()
    assert_same(step(twin, data)[1], expected)
    assert made.count("norm") == 5


def test_evaluation_and_generation_are_plain():
    model, plain, ids = ours(), tiny_llama(), batch(12)["input_ids"]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.eval().generate(ids, **settings), plain.eval().generate(ids, **settings))
    with torch.no_grad():
        assert torch.allclose(model.train()(ids).logits, plain(ids).logits, atol=1e-5)
    assert not made


def test_modules_that_come_later_are_prepared_too():
    """The modules of a model are walked anew after one of them got a child, in a list of its own or not."""
    model, function = (
        nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])),
        functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False),
    )

    def later() -> nn.Module:
        layer = nn.Linear(2, 2)
        vars(layer)[checkpoint.ATTRIBUTE] = function
        return layer

    checkpoint.prepare(model)
    first, second, third = later(), later(), later()
    model[0].append(first)
    model.add_module("second", second)
    checkpoint.prepare(model)
    model[0][0] = third
    nn.ModuleList(model[0])  # a list that a forward makes: no child of the model's own
    checkpoint.prepare(model)
    assert all(isinstance(vars(m)[checkpoint.ATTRIBUTE], checkpoint.StashedCheckpoint) for m in (first, second, third))
