"""Tiers: a tensor that plays a role is stored once, for all who save it; the same gradients, without the device's memory."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from small_models import assert_same, batch, step, tiny_llama
from torch import nn

import unswag
from unswag import Policy
from unswag.torch import functional, stash
from unswag.torch.audit import LiveStorages
from unswag.torch.operation import STORES
from unswag.torch.stash import Stash, handles
from unswag.torch.store import Stores, Ticket

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]
KINDS = pytest.mark.parametrize("reentrant", [False, True])
TIERS = pytest.mark.parametrize("tier", ["host", "disk"])


@pytest.fixture(autouse=True)
def no_help_from_gc():
    gc.disable()
    yield
    gc.enable()


def checkpointed(layers=3, reentrant=False, dtype=torch.float32, adapt=None, **options):
    """A tiny Llama with checkpointing, after surgery with these options."""
    model = tiny_llama(layers, dtype=dtype)
    if adapt is not None:
        model = adapt(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    unswag.apply_unswag_surgery(model, verbose=False, **options)
    return model


def kept(model):
    return vars(model)[STORES].stats()


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model.train()


# ---- the same step ----------------------------------------------------------------------------------------------------------


@KINDS
@TIERS
@pytest.mark.parametrize("adapt", [None, lora], ids=["full", "lora"])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_are_bit_equal(tier, reentrant, adapt, autocast):
    data = batch(48, 2)
    found = []
    for options in ({}, {"store": tier}):
        model = checkpointed(reentrant=reentrant, adapt=adapt, **options)
        for _ in range(2):
            torch.manual_seed(5)  # of dropout
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found.append(step(model, data))
    assert kept(model)[f"{tier}_peak"] >= 3 * 2 * 48 * 64 * (2 if autocast and adapt is None else 4) // (2 if autocast else 1)
    assert kept(model)[tier] == 0, "all tickets died with the graph"
    for loss, gradients in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert_same(gradients, found[0][1])


@KINDS
def test_frozen_embeddings_without_a_hook(reentrant):
    """PEFT without enable_input_require_grads: the first layer's input needs no gradient."""

    def adapt(model):
        model.model.embed_tokens.requires_grad_(False)
        return model

    data, found = batch(48), []
    for options in ({}, {"store": "disk"}):
        model = checkpointed(reentrant=reentrant, adapt=adapt, **options)
        found.append(step(model, data))
    assert torch.equal(found[0][0], found[1][0])
    assert_same(found[1][1], found[0][1])


def test_the_device_keeps_one_hidden_state_less_for_each_layer():
    data = batch(64)
    plain, stored = (unswag.audit(checkpointed(6, **options), **data) for options in ({}, {"store": "disk"}))
    hidden = 64 * 64 * 4
    assert plain.alive - stored.alive == 6 * hidden and plain.total - stored.total == 6 * hidden
    assert stored.disk == 6 * hidden and stored.host == 0 and plain.disk == 0
    rows = [row for row in stored.rows if row.tier == "disk"]
    assert [row.role for row in rows] == 6 * ["checkpoint"] and {row.bits for row in rows} == {32.0}
    assert "on disk" in str(stored) and "on disk" in str(plain.compare(stored))


@TIERS
def test_retain_graph_backward_twice_and_two_graphs(tier):
    data, other = batch(48), batch(48, seed=7)
    model, plain = checkpointed(store=tier), checkpointed()
    expected = step(plain, data)[1]
    loss = model(**data).loss
    second = model(**other).loss
    loss.backward(retain_graph=True)
    assert_same({n: p.grad for n, p in model.named_parameters()}, expected)
    model.zero_grad()
    loss.backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, expected)
    model.zero_grad()
    second.backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, step(plain, other)[1])
    del loss, second
    assert kept(model)[tier] == 0


def test_backward_in_another_thread():
    model, plain = checkpointed(store="disk"), checkpointed()
    loss = model(**batch(48)).loss
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_same({n: p.grad for n, p in model.named_parameters()}, step(plain, batch(48))[1])


@KINDS
def test_a_codec_in_a_tier_gives_what_the_codec_gives(reentrant):
    data, found = batch(64), []
    for tiers in ({}, {"checkpoint": "disk"}):
        model = checkpointed(reentrant=reentrant, policy=Policy(checkpoint="int8", tiers=tiers))
        found.append(step(model, data))
    assert torch.equal(found[0][0], found[1][0])
    assert_same(found[1][1], found[0][1])
    stored = unswag.audit(model, **data)
    assert stored.disk == 3 * 64 * 64 * 8.5 / 8 and {row.bits for row in stored.rows if row.tier == "disk"} == {8.5}


@pytest.mark.parametrize("role", ["mlp", "residual", "attention"])
def test_any_role_in_a_tier_is_bit_equal(role):
    data = batch(48)
    found = []
    for tiers in ({}, {role: "host"}):
        model = tiny_llama(3)
        unswag.apply_unswag_surgery(model, Policy(tiers=tiers), verbose=False)
        found.append((step(model, data), unswag.audit(model, **data)))
    (plain, before), (ours, after) = found
    assert torch.equal(ours[0], plain[0])
    assert_same(ours[1], plain[1])
    assert after.host > 0 and after.alive == before.alive - after.host


def test_what_a_failed_forward_stored_is_dropped():
    model = checkpointed(store="host")
    hook = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch(48))
    assert kept(model)["host"] == 0 < kept(model)["host_peak"]
    hook.remove()
    assert_same(step(model, batch(48))[1], step(checkpointed(), batch(48))[1])


def test_a_block_that_does_not_come_back_stops_the_backward(monkeypatch):
    model = checkpointed(store="disk")
    loss = model(**batch(48)).loss

    def broken(self):
        raise RuntimeError("Store: block 3 in the disk store is damaged")

    monkeypatch.setattr(Ticket, "get", broken)
    with pytest.raises(RuntimeError, match="is damaged"):
        loss.backward()
    assert all(p.grad is None for layer in model.model.layers for p in layer.parameters())
    monkeypatch.undo()
    del loss
    assert kept(model)["disk"] == 0
    assert_same(step(model, batch(48))[1], step(checkpointed(), batch(48))[1])


def test_an_input_that_was_overwritten_is_an_error():
    model = checkpointed(store="disk")
    taken = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    loss = model(**batch(48)).loss
    with torch.no_grad():
        taken[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_prefetches_the_one_before(monkeypatch):
    calls = []
    for name in ("get", "prefetch"):
        real = getattr(Ticket, name)
        monkeypatch.setattr(Ticket, name, lambda self, name=name, real=real: (calls.append((name, self)), real(self))[1])
    model = checkpointed(4, store="disk")
    model(**batch(48)).loss.backward()
    tickets = [ticket for name, ticket in calls if name == "get"]
    assert len(set(tickets)) == 4
    expected = [("get", tickets[0])]
    for ticket in tickets[1:]:
        expected += [("prefetch", ticket), ("get", ticket)]
    assert calls == expected


# ---- what is stored once -----------------------------------------------------------------------------------------------------


def test_views_and_several_savers_of_one_storage_are_stored_once():
    stores = Stores()
    x = torch.randn(64, 64, requires_grad=True)
    with Stash(Policy(tiers={"mlp": "host"}), stores=stores):
        y = x * 1.0
        stash.plays("mlp", y)
        loss = (y * y).sum() + (y.t() @ torch.ones(64, 3)).square().sum() + (y.view(-1) ** 3).sum()
    assert stores.stats()["host_peak"] == 64 * 64 * 4
    loss.backward()
    ours, x.grad = x.grad, None
    y = x * 1.0
    ((y * y).sum() + (y.t() @ torch.ones(64, 3)).square().sum() + (y.view(-1) ** 3).sum()).backward()
    assert torch.equal(ours, x.grad)


def test_halves_of_one_tensor_are_stored_without_each_other():
    stores = Stores()
    x = torch.randn(32, 256, requires_grad=True)
    with Stash(Policy(tiers={"mlp": "host"}), stores=stores):
        gate, up = (x * 1.0).chunk(2, -1)
        loss = functional.swiglu(gate, up).square().sum()
    del gate, up
    assert stores.stats()["host"] == 32 * 256 * 4
    loss.backward()
    ours, x.grad = x.grad, None
    gate, up = (x * 1.0).chunk(2, -1)
    functional.swiglu(gate, up).square().sum().backward()
    assert torch.equal(ours, x.grad)


def test_small_tensors_and_parameters_stay():
    with Stash(Policy(tiers={"mlp": "host"})):
        for t in (torch.randn(8, 8), nn.Parameter(torch.randn(64, 64))):
            stash.plays("mlp", t.requires_grad_())
            assert isinstance(Stash.current().door(t), stash.ByReference)


def test_a_stash_without_stores_opens_its_own():
    x = torch.randn(64, 64, requires_grad=True)
    with LiveStorages(inputs=x) as live:
        with Stash(Policy(tiers={"mlp": "disk"})):
            y = functional.silu(x * 1.0)
        assert live.bytes() == y.nbytes
        y.sum().backward()


def test_a_handle_s_tier_and_bytes():
    ticket = Stores().of("host").put(torch.zeros(3000))
    handle = handles.Stored(ticket, None)
    assert (handle.tier, handle.bytes) == ("host", 0) and torch.equal(stash.unpack(handle), torch.zeros(3000))


# ---- surgery ----------------------------------------------------------------------------------------------------------------


def test_the_report_says_what_is_stored():
    model = tiny_llama(2)
    model.gradient_checkpointing_enable()
    report = unswag.apply_unswag_surgery(model, store="disk", verbose=False)
    assert (
        report.after.disk == 2 * 64 * 64 * 4
        and "512 on disk" in " ".join(str(report).split())
        and "'checkpoint': 'disk'" in report.policy
    )
    assert kept(model)["disk_peak"] == 0, "a dry run writes nothing"


def test_without_checkpointing_it_says_so_and_begins_when_that_is_switched_on():
    model = tiny_llama(2)
    report = unswag.apply_unswag_surgery(model, store="host", verbose=False)
    assert any("is for gradient checkpointing, which was off" in note for note in report.notes)
    model.gradient_checkpointing_enable()
    step(model, batch(48))
    assert kept(model)["host_peak"] == 2 * 48 * 64 * 4


def test_a_store_that_would_do_nothing_is_an_error():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(64)

        def forward(self, x):
            return self.norm(x)

    with pytest.raises(
        ValueError, match="the disk store would keep nothing of the role 'checkpoint', because the model has no"
    ):
        unswag.apply_unswag_surgery(Block(), store="disk", verbose=False)
    model = tiny_llama(2)
    with pytest.raises(ValueError, match="store_dir and store_limit do nothing without a store"):
        unswag.apply_unswag_surgery(model, store_limit="1GiB", verbose=False)
    with pytest.raises(ValueError, match="store='ssd'; choose 'host' or 'disk'"):
        unswag.apply_unswag_surgery(model, store="ssd", verbose=False)
    with pytest.raises(RuntimeError, match="/nowhere/at/all"):
        unswag.apply_unswag_surgery(model, store="disk", store_dir="/nowhere/at/all", verbose=False)
    with pytest.raises(ValueError, match=r"store_dir='/tmp', and a host store has no folder; .* or pass store='disk'"):
        unswag.apply_unswag_surgery(model, store="host", store_dir="/tmp", verbose=False)
    with pytest.raises(TypeError, match=r"store_dir=5 is no path; pass the folder's path as a str"):
        unswag.apply_unswag_surgery(model, store="disk", store_dir=5, verbose=False)
    with pytest.raises(ValueError, match=r"store_limit='99999999TiB' is more than a signed 64-bit size holds"):
        unswag.apply_unswag_surgery(model, store="disk", store_limit="99999999TiB", verbose=False)
    assert "forward" not in vars(model) and STORES not in vars(model)


def test_a_copy_opens_its_own_and_a_pickle_has_none():
    model = checkpointed(store="host")
    twin = copy.deepcopy(model)
    step(twin, batch(48))
    assert kept(twin)["host_peak"] > 0 == kept(model)["host_peak"]
    model = tiny_llama(2)
    unswag.apply_unswag_surgery(model, Policy(tiers={"mlp": "host"}), verbose=False)
    assert STORES not in vars(pickle.loads(pickle.dumps(model)))


def test_it_ends_with_the_surgery_or_the_last_graph():
    import weakref

    model = tiny_llama(2)
    unswag.apply_unswag_surgery(model, Policy(tiers={"mlp": "host"}), verbose=False)
    loss = model(**batch(48)).loss
    store = weakref.ref(vars(model)[STORES].of("host"))
    unswag.remove_unswag_surgery(model)
    assert STORES not in vars(model) and store() is not None
    loss.backward()
    del loss
    assert store() is None


def test_the_limit_is_an_error_in_the_forward_and_the_next_step_is_right():
    model = checkpointed(store="host", store_limit=2 * 48 * 64 * 4 + 1000)
    with pytest.raises(RuntimeError, match="raise the limit"):
        model(**batch(48))
    assert kept(model)["host"] == 0
    assert_same(step(model, batch(24))[1], step(checkpointed(), batch(24))[1])
