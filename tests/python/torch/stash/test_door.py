"""The door: same gradients as without a stash, less kept, freed as autograd frees, and no check lost."""

import copy
import io
import itertools
import weakref

import pytest
import torch
from small_models import assert_same, batch, gradients, made, rms_norm, step, tiny_llama, with_recipes, with_stash
from tests.python.torch.stash.small_programs import (
    HEADS,
    NO_STASH,
    PythonDoor,
    W,
    X,
    assert_equal_with_and_without,
    block,
    bytes_kept,
    doubled,
    dropped,
    leaf,
)
from torch.nn import functional as F

from unswag.torch import apply_unswag_surgery, stash
from unswag.torch.audit import LiveStorages
from unswag.torch.stash import Stash, thread
from unswag.torch.stash import door as door_module


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


def test_one_storage_is_kept_once_whoever_asks():
    def function(x):
        y = x * 1
        return (y.view(16, 8).sin() + y.t().contiguous().view(16, 8) * 0 + y.flatten().view(16, 8).cos()).sum()

    assert bytes_kept(Stash, function, X) == bytes_kept(NO_STASH, function, X)
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

    assert bytes_kept(Stash, function, X) == bytes_kept(NO_STASH, function, X) == 0
    with Stash() as door:
        y = doubled(X * 5, saves=False)
        assert door.entries().outputs == 1
        del y
        door.door(leaf(1) * 1)
        assert door.entries().outputs == 0


def test_after_the_forward_an_output_that_lives_on_keeps_no_inputs():
    with LiveStorages(inputs=X) as live:
        with Stash() as door:
            y = doubled(X * 5, saves=False)
        assert live.bytes() == y.nbytes
        assert not any(door.entries())


def test_nothing_is_remembered_of_what_needs_no_gradient():
    with Stash() as door:
        doubled(X.detach())
        assert not door.entries().outputs
        with torch.no_grad():
            doubled(X)
        assert not door.entries().outputs


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


def test_inplace_activations_work():
    def function(x, head):
        return F.linear(F.relu(F.linear(x, head), inplace=True), head).sum()

    assert_equal_with_and_without(function, X, HEADS[0])


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
    assert stash.top_hooks() is None
    assert_same(step(model, data)[1], step(with_recipes(tiny_llama()), data)[1])


def test_without_gradients_it_is_not_there():
    model, plain = with_stash(with_recipes(tiny_llama())).eval(), tiny_llama().eval()
    ids = batch(12)["input_ids"]
    for context in (torch.no_grad, torch.inference_mode):
        with context(), Stash() as door:
            assert Stash.current() is None
            assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)
            assert not any(door.entries())
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


def test_entries_counts_what_the_registries_know():
    x = leaf(64, 64) * 1
    with Stash("int8") as door:
        y = dropped(x)  # its input is saved by nobody
        stash.plays("mlp", x)
        held = door.door(y), door.door(X)
        assert door.entries() == stash.Entries(outputs=1, marks=1, pending=1, awaited=1, leases=len(held))
    assert not any(door.entries())


# ---- the core's door (bindings/stash.cpp) does what Stash.door does


def saved_in_many_ways(head):
    """Names and tensors as ops save them, of a graph that is made under the stash in use; what a name's tensor is a view of, or
    was made from, comes before it."""
    x = leaf(8, 16) * 1
    y = rms_norm(x, W, 1e-6)
    z = doubled(x)  # its input is saved by nobody
    changed = doubled(x)
    changed += 1
    copy_ = head.to(torch.bfloat16)
    wide = y.to(torch.float64)
    yield from {
        "parameter": W, "view of a parameter": head.t(), "part of a parameter": head[:3], "copy of a parameter": copy_,
        "view of a copy of a parameter": copy_.t(), "reference": x, "again": x, "view": x.view(16, 8), "part": x[2:5],
        "output": y, "view of an output": y.view(16, 8), "part of an output": y[2:5], "transposed output": y.t(),
        "output, as integers": y.detach().view(torch.int32), "cast of an output": wide, "view of a cast": wide.view(-1),
        "pending output": z, "changed output": changed, "nothing": x[:0], "number": x.sum(), "integers": torch.arange(4),
        "leaf": leaf(3), "detached": x.detach(), "negative": torch.complex(x.detach(), -x.detach()).conj().imag,
        "sparse": torch.eye(3).to_sparse(), "buffer": torch.nn.Buffer(torch.ones(2)), "inferred": head.detach() * 2,
    }.items()  # fmt: skip


def described(make_stash, policy, role):
    """What the pack hook makes of each, and what comes back."""
    rows = {}
    with make_stash(policy) as door, thread.role(role) if role else NO_STASH():
        pack, unpack = stash.top_hooks()
        held = []
        for name, t in saved_in_many_ways(HEADS[0]):
            held.append((name, t, pack(t)))
            handle = held[-1][-1]
            rows[name] = [type(handle).__name__, handle.tier, handle.bytes, getattr(handle, "role", None), *door.entries()]
    for name, t, handle in held:
        again = unpack(handle)
        assert torch.equal(again.to_dense(), t.detach().to_dense()) and not again.requires_grad, name
        rows[name] += [tuple(again.shape), again.dtype, None if again.is_sparse else again.stride()]
    return rows


@pytest.mark.parametrize("policy", ["exact", "int8"])
@pytest.mark.parametrize("role", [None, "checkpoint"])
def test_the_cores_door_makes_the_same_handles(policy, role):
    ours, theirs = described(Stash, policy, role), described(PythonDoor, policy, role)
    assert ours == theirs
    kinds = {(row[0], row[1]) for row in ours.values()}
    assert kinds >= {("ByReference", tier) for tier in ("parameter", "device", "shared")} | {("Recomputed", "recipe")}


def test_the_cores_door_asks_the_other_for_the_loss_alone_in_a_step_of_a_llama(monkeypatch):
    def counted(plain):
        return lambda *args: asked.append(args) or plain(*args)

    model, asked = tiny_llama(), []
    apply_unswag_surgery(model, verbose=False)
    for name, known in (("door", "_DOOR"), ("register", "_REGISTER")):
        monkeypatch.setattr(Stash, name, counted(getattr(Stash, name)))
        monkeypatch.setattr(door_module, known, getattr(Stash, name))
    step(model, batch(48))
    assert len(asked) <= 4


@pytest.mark.parametrize("backwards", [1, 2])
def test_a_recipe_runs_once_for_all_its_readers(backwards):
    """Whoever reads: the result is let go when the last has, and another backward runs the recipe again."""
    made.clear()
    with Stash():
        y = rms_norm(X, W, 1e-6)
        loss = sum(F.linear(y, head).sum() for head in HEADS)
    del y
    for i in range(backwards):
        loss.backward(retain_graph=i + 1 < backwards)
    assert made.count("norm") == backwards
    for t in (X, W, *HEADS):
        t.grad = None


def test_a_result_dies_with_the_handles_that_wait_for_it():
    with Stash() as door:
        y = doubled(X)
        first, second, third = (door.door(y) for _ in range(3))
    result = weakref.ref(stash.unpack(first))
    assert result() is stash.unpack(first)  # read again: it waits for the others
    del second
    assert result() is not None
    del third
    assert result() is None
    assert torch.equal(stash.unpack(first), X.detach() * 2)


def test_of_many_results_two_wait_for_a_reader():
    with Stash() as door:
        outputs = [doubled(X) for _ in range(4)]
        handles = [(door.door(y), door.door(y)) for y in outputs]
        del outputs
    results = [weakref.ref(stash.unpack(first)) for first, _ in handles]
    assert [result() is not None for result in results] == [False, False, True, True]


def test_under_a_profiler_gradients_are_the_same():
    with torch.profiler.profile(), Stash():
        loss = block(X, W, *HEADS)
    loss.backward()
    plain = [t.grad for t in (X, W)]
    for t in (X, W, *HEADS):
        t.grad = None
    block(X, W, *HEADS).backward()
    assert all(torch.equal(t.grad, grad) for t, grad in zip((X, W), plain, strict=True))
    for t in (X, W, *HEADS):
        t.grad = None
