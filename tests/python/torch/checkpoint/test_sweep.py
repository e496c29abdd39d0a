"""Swept layers: gradients of stock in every setting, what is refused and how, and how much memory they take."""

import copy
import gc
import pickle
import threading
import warnings

import pytest
import torch
from families import build, distance, step
from sweeping import TILE, assert_close, batch, checkpointed, plan, swept, with_lora
from torch import nn
from torch.nn import functional as F

from unswag import remove_unswag_surgery
from unswag.policy import Policy
from unswag.torch import stash
from unswag.torch.audit import LiveStorages
from unswag.torch.checkpoint import sweep as sweeps
from unswag.torch.checkpoint import visit as visits
from unswag.torch.checkpoint.tile_attention import KEY_BLOCK, LayerAttention
from unswag.torch.operation import STORES, SWEEP
from unswag.torch.stash import thread

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unswag. .* is not swept:UserWarning"),
]
REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


@pytest.fixture(autouse=True)
def _clean():
    torch.manual_seed(0)
    yield
    assert thread.idle()
    assert stash.top_hooks() is None


def packed(*lengths):
    return batch(sum(lengths), 1) | {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


def compare(model, data, sweep=TILE, layers=2, tolerance=2e-6):
    """Stock against the swept model; layers in float64 round to float32 inside, hence the tolerance."""
    stock = step(model, data)
    swept(model, sweep)
    ours = step(model, data)
    assert len(plan(model).swept) == layers, plan(model).left
    assert_close(ours, stock, tolerance)
    return ours


# ---- gradients --------------------------------------------------------------------------------------------------------------


@REENTRANT
@pytest.mark.parametrize("tokens", [33, 64, 70])
def test_gradients_equal_stocks(tokens, reentrant):
    compare(checkpointed(reentrant=reentrant), batch(tokens))


@pytest.mark.parametrize("tile", [1, 3, 19])
def test_tiles_of_any_size(tile):
    compare(checkpointed(), batch(20, 1), tile)


@pytest.mark.parametrize("tokens", [2, 5, TILE])
def test_one_tile_is_checkpointed_as_a_whole(tokens):
    model = checkpointed()
    stock = step(model, batch(tokens))
    swept(model)
    assert_close(step(model, batch(tokens)), stock)
    assert not plan(model).swept
    assert not plan(model).left


FAMILIES = {
    "qwen2": {},  # biases
    "qwen3": {},  # norms of queries and keys
    "phi3": {},  # one product for q, k, v
    "gpt2": {},  # absolute positions, LayerNorm, Conv1D
    "gpt_neox": {},  # attention and MLP in parallel
    "olmo2": {},  # norms after
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    compare(checkpointed(family, **FAMILIES[family]), batch(50))


def mixtral(**settings):
    return checkpointed("mixtral", torch.float32, num_local_experts=4, **settings)


def test_experts():
    compare(mixtral(), batch(50), tolerance=2e-5)


@pytest.mark.parametrize("where", ["config", "call"])
def test_router_logits_are_those_of_whole_layers(where):
    model = mixtral(**{"output_router_logits": True} if where == "config" else {})
    data = batch(50) | ({"output_router_logits": True} if where == "call" else {})
    stock = model(**data)
    swept(model)
    ours = model(**data)
    assert [t.shape for t in ours.router_logits] == [t.shape for t in stock.router_logits]
    torch.testing.assert_close(ours.aux_loss, stock.aux_loss)
    assert not plan(model).swept
    assert len(plan(model).notes) == 1


def test_hidden_states_may_be_asked_for():
    model, data = checkpointed(), batch()
    stock = model(**data, output_hidden_states=True)
    swept(model)
    ours = model(**data, output_hidden_states=True)
    for a, b in zip(ours.hidden_states, stock.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    assert len(plan(model).swept) == 2


@pytest.mark.parametrize("window", [1, 9, 40])
def test_windows(window):
    compare(checkpointed("mistral", sliding_window=window), batch())


def test_layers_with_and_without_a_window():
    kinds = ["sliding_attention", "full_attention"]
    model = checkpointed("gemma3_text", sliding_window=9, layer_types=kinds)
    compare(model, batch())


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 9}], ids=["", "window"])
def test_packed_rows(settings):
    data = packed(13, 40, 17)
    model = checkpointed("mistral", **settings)
    ours = compare(model, data)
    apart = step(model, {name: t for name, t in data.items() if name != "position_ids"})
    assert distance(apart[0], ours[0]) > 1e-3  # that the sequences are kept apart can be seen


def test_padding():
    data = batch()
    mask = torch.ones_like(data["input_ids"])
    mask[0, 60:] = 0
    mask[1, :37] = 0  # a tile without any token
    compare(checkpointed(), data | {"attention_mask": mask, "labels": data["labels"].masked_fill(mask == 0, -100)})


@REENTRANT
def test_lora_with_frozen_embeddings(reentrant):
    """x of the first layer does not require a gradient."""
    model = with_lora(checkpointed(reentrant=reentrant))
    ours = compare(model, batch())
    assert {"lora_A", "lora_B"} == {name.split(".")[-3] for name in ours[1]}


def test_autocast():
    model = checkpointed(dtype=torch.float32)
    results = []
    for surgery in (False, True):
        if surgery:
            swept(model)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(model, batch()))
    truth = step(checkpointed(), batch())
    stock, ours = (max(distance(r[1][name], truth[1][name]) for name in truth[1]) for r in results)
    assert len(plan(model).swept) == 2
    assert ours <= 1.25 * stock


def test_sixteen_bits_are_as_good_as_stocks():
    truth = step(checkpointed(), batch())
    model = checkpointed(dtype=torch.bfloat16)
    rounded = step(copy.deepcopy(model).to(torch.float64), batch())
    stock = step(model, batch())
    swept(model)
    ours = step(model, batch())
    assert len(plan(model).swept) == 2
    for name in truth[1]:
        assert distance(ours[1][name], rounded[1][name]) <= 1.25 * distance(stock[1][name], rounded[1][name]) + 1e-3


def test_float32_is_as_near_to_float64_as_stock():
    def run(model, data):
        """PyTorch's float32 cross-entropy is further from the truth than the layers are, so the loss is in float64."""
        model.zero_grad()
        labels = data["labels"][:, 1:].flatten()
        logits = model(input_ids=data["input_ids"], use_cache=False).logits[:, :-1].double()
        F.cross_entropy(logits.flatten(0, 1), labels).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    truth, model, data = run(checkpointed(), batch()), checkpointed(dtype=torch.float32), batch()
    stock = run(model, data)
    swept(model)
    ours = run(model, data)
    assert len(plan(model).swept) == 2
    worst = [max(distance(g[name], truth[name]) for name in truth) for g in (ours, stock)]
    assert worst[0] <= 1.1 * worst[1]


@REENTRANT
def test_dropout_draws_alike_in_the_recompute(reentrant):
    """The gradient is that of the loss with its draws: a directional derivative in float64."""
    model = with_lora(checkpointed(reentrant=reentrant), lora_dropout=0.3)
    swept(model)

    def loss():  # in float64, which that of transformers is not
        torch.manual_seed(5)
        logits = model(input_ids=batch()["input_ids"], use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch()["labels"][:, 1:].flatten())

    loss().backward()
    assert len(plan(model).swept) == 2
    state = torch.get_rng_state()
    loss()
    assert torch.equal(torch.get_rng_state(), state)  # the backward draws nothing
    generator = torch.Generator().manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]
    slope = sum((p.grad * d).sum() for p, d in zip(trained, steps, strict=True)).item()
    values = []
    for side in (1e-4, -2e-4):
        with torch.no_grad():
            for p, d in zip(trained, steps, strict=True):
                p.add_(d, alpha=side)
        values.append(loss().item())
    assert (values[0] - values[1]) / 2e-4 == pytest.approx(slope, rel=1e-3)


def test_accumulation_and_autograd_grad():
    model, data = checkpointed(), batch()
    stock = step(model, data)
    swept(model)
    model.zero_grad()
    for _ in range(2):
        model(**data).loss.backward()
    doubled = {name: p.grad / 2 for name, p in model.named_parameters()}
    assert_close((stock[0], doubled), stock)
    weights = dict(model.named_parameters())
    found = torch.autograd.grad(model(**data).loss, list(weights.values()))
    assert_close((stock[0], dict(zip(weights, found, strict=True))), stock)
    one = "model.layers.0.mlp.up_proj.weight"
    (alone,) = torch.autograd.grad(model(**data).loss, weights[one])
    assert distance(alone, stock[1][one]) < 2e-6


def test_hooks_of_parameters_run_once():
    model = checkpointed()
    swept(model)
    calls = []
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        model.get_parameter(name).register_post_accumulate_grad_hook(lambda p: calls.append(p))
    step(model, batch())
    assert len(calls) == 2


def test_a_second_backward():
    model, data = checkpointed(), batch()
    stock = step(model, data)
    swept(model)
    model.zero_grad()
    loss = model(**data).loss
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert_close((stock[0], {name: p.grad for name, p in model.named_parameters()}), stock)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_second_derivatives_are_an_error():
    model = checkpointed()
    swept(model)
    loss = model(**batch()).loss
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_a_weight_that_changed_before_the_backward_is_an_error():
    model = checkpointed()
    swept(model)
    loss = model(**batch()).loss
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_backward_from_another_thread():
    model = checkpointed()
    stock = step(model, batch())
    swept(model)
    model.zero_grad()
    loss = model(**batch()).loss
    other = threading.Thread(target=loss.backward)
    other.start()
    other.join()
    assert_close((loss.detach(), {name: p.grad for name, p in model.named_parameters()}), stock)


# ---- whose gradient is overwritten ------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def forward(self, x):
        return self.weight * x


def visited(x):
    """y = 3 x by `SweptLayer`."""
    layer = Layer()
    call = visits.Call(layer, Layer.forward, "x", x, x.shape[1], {})
    return visits.SweptLayer.apply(x, visits.Visit(call, 3, KEY_BLOCK, None, None, [layer.weight]), layer.weight)


HELD = {
    "alone": lambda y, held: (y * 2).sum(),
    "a hook": lambda y, held: (y.register_hook(held.append), (y * 2).sum())[1],
    "a hook, an alias": lambda y, held: (y.register_hook(lambda g: held.append(g.detach())), (y * 2).sum())[1],
    "expanded": lambda y, held: 2 * y.sum(),
    "transposed": lambda y, held: (y.transpose(0, 1).contiguous() * 2).sum(),
}


@pytest.mark.parametrize("case", HELD)
def test_a_gradient_that_somebody_holds_is_not_overwritten(case):
    x, held, seen = torch.ones(2, 8, 4, dtype=torch.float64, requires_grad=True), [], []
    y = visited(x)
    y.register_hook(lambda g: seen.append(g.data_ptr()))
    x.register_hook(lambda g: seen.append(g.data_ptr()))
    HELD[case](y, held).backward()
    assert torch.equal(x.grad, torch.full_like(x, 6))
    assert all(torch.equal(g, torch.full_like(g, 2)) for g in held)
    assert (seen[0] == seen[-1]) == (case == "alone")


def test_of_two_branches_the_first_overwrites_nothing():
    a, b = (torch.ones(2, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ((visited(a) + visited(b)) * 2).sum().backward()
    assert torch.equal(a.grad, torch.full_like(a, 6))
    assert torch.equal(b.grad, torch.full_like(b, 6))


def test_a_gradient_given_by_the_caller_is_not_overwritten():
    x, dy = torch.ones(2, 8, 4, dtype=torch.float64, requires_grad=True), torch.ones(2, 8, 4, dtype=torch.float64)
    visited(x).backward(dy)
    assert torch.equal(dy, torch.ones_like(dy))


def test_where_nothing_is_known_of_holders_nothing_is_overwritten(monkeypatch):
    monkeypatch.setattr(visits, "_sole_holders", lambda: None)
    x, seen = torch.ones(2, 8, 4, dtype=torch.float64, requires_grad=True), []
    y = visited(x)
    y.register_hook(lambda g: seen.append(g.data_ptr()))
    x.register_hook(lambda g: seen.append(g.data_ptr()))
    (y * 2).sum().backward()
    assert seen[0] != seen[1]


# ---- where inputs of layers are kept ----------------------------------------------------------------------------------------


def stored(model, tier="disk"):
    return vars(model)[STORES].stats()[tier]


@REENTRANT
@pytest.mark.parametrize("keep", [None, False, True])
@pytest.mark.parametrize("store", [None, "disk", "host"])
def test_kept_or_not_in_memory_or_a_store(store, keep, reentrant, tmp_path):
    data, model = batch(70), with_lora(checkpointed(reentrant=reentrant))
    stock = step(model, data)
    place = {"store": store} | ({"store_dir": str(tmp_path)} if store == "disk" else {}) if store else {}
    swept(model, sweeps.Sweep(TILE, keep), **place)
    tier = store or "disk"
    before = stored(model, tier)
    for _ in range(2):
        assert_close(step(model, data), stock)
    assert len(plan(model).swept) == 2
    assert stored(model, tier) == before
    loss = model(**data).loss
    hidden = 2 * 70 * 64 * 8
    attention = hidden + 2 * 70 * 4 * 8 + 2 * hidden // 2  # o, lse, and k, v of half as many heads
    blocks = 2 * (hidden + attention * (keep is not False)) if store else 0
    assert blocks <= stored(model, tier) - before <= 1.25 * blocks
    del loss
    gc.collect()
    assert stored(model, tier) == before


def test_a_store_keeps_what_a_second_backward_needs(tmp_path):
    data, model = batch(), checkpointed()
    stock = step(model, data)
    swept(model, store="disk", store_dir=str(tmp_path))
    model.zero_grad()
    loss = model(**data).loss
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert_close((stock[0], {name: p.grad for name, p in model.named_parameters()}), stock)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()
    assert stored(model) == 0


def test_a_codec_of_the_policy_is_used_in_memory_and_in_a_store(tmp_path):
    data, results = batch(64), []
    for place in ({}, {"store": "disk", "store_dir": str(tmp_path)}):
        model = checkpointed(dtype=torch.float32)
        swept(model, sweeps.Sweep(TILE, False), policy=Policy(checkpoint="int8"), **place)
        results.append(step(model, data))
        assert len(plan(model).swept) == 2
    exact = step(checkpointed(dtype=torch.float32), data)
    assert_close(*results, tolerance=1e-5)
    assert 1e-4 < max(distance(results[0][1][name], exact[1][name]) for name in exact[1]) < 0.1


def test_an_exception_in_the_backward_leaves_the_store_empty_and_usable(tmp_path, monkeypatch):
    data, model = batch(), checkpointed()
    stock = step(model, data)
    swept(model, store="disk", store_dir=str(tmp_path))
    step(model, data)

    def broken(*_, **__):
        raise KeyError("broken")

    loss = model(**data).loss
    with monkeypatch.context() as patched, pytest.raises(KeyError):
        patched.setattr(LayerAttention, "attend", broken)
        loss.backward()
    del loss
    gc.collect()
    assert stored(model) == 0
    assert_close(step(model, data), stock)


# ---- memory -----------------------------------------------------------------------------------------------------------------


def test_a_swept_layer_needs_little_and_gives_it_back():
    peaks, after = {}, {}
    for name, sweep in (("stock", 0), ("swept", 64)):
        model = checkpointed(dtype=torch.float32, num_hidden_layers=3)
        swept(model, sweep)
        step(model, batch(1024, 1))  # the comparison
        model.zero_grad()
        with LiveStorages(model, batch(1024, 1)) as live:
            loss = model(**batch(1024, 1)).loss
            before = live.bytes()
            loss.backward()
            peaks[name], after[name] = live.peak() - before, live.bytes()
            del loss
            gc.collect()
            assert live.bytes() == 0
    assert peaks["swept"] < peaks["stock"] / 2
    assert after["swept"] <= after["stock"]


# ---- what is not swept, and how that is said --------------------------------------------------------------------------------


def left(model, data):
    """The reasons that are given; the gradients are stock's."""
    stock = step(model, data)
    swept(model)
    with pytest.warns(UserWarning, match="is not swept"):
        ours = step(model, data)
    assert_close(ours, stock)
    assert not plan(model).swept
    notes = plan(model).notes
    assert len(notes) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, data)  # said once
    return notes[0]


def test_a_layer_that_mixes_tokens_elsewhere_is_left(monkeypatch):
    from transformers.models.llama import modeling_llama

    class Shifting(modeling_llama.LlamaMLP):
        def forward(self, x):
            return super().forward(x + 0.1 * F.pad(x, (0, 0, 1, -1)))

    monkeypatch.setattr(modeling_llama, "LlamaMLP", Shifting)
    assert "looks at other tokens" in left(checkpointed(), batch())


def test_a_layer_whose_attention_has_dropout_is_left():
    model = checkpointed(attention_dropout=0.1)
    swept(model)
    step(model, batch())
    assert not plan(model).swept
    assert ["its attention has dropout (0.1)" in note for note in plan(model).notes] == [True]


def test_an_argument_of_unknown_form_is_left():
    model = checkpointed()

    def given(layer, args, kwargs):
        return args, kwargs | {"bias": torch.zeros(70)}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(given, with_kwargs=True)
    assert "argument bias (Tensor)" in left(model, batch())


def test_a_model_whose_attention_was_left_is_an_error():
    with pytest.raises(ValueError, match="no layer can be swept, because the attention was left"):
        swept(build("bloom", n_head=4))
    with pytest.raises(ValueError, match="attention='stock'"):
        swept(checkpointed(), attention="stock")
    with pytest.raises(ValueError, match="this model has none"):
        swept(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))


@pytest.mark.parametrize("wrong", [-1, 2.5, "disk", None])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=r"sweep=.*; pass True"):
        swept(checkpointed(), wrong)


def test_what_changed_since_the_proof_is_left():
    model = checkpointed()
    swept(model)
    step(model, batch())
    assert len(plan(model).swept) == 2
    layer = model.model.layers[0]
    layer.mlp.act_fn = nn.ReLU()
    ours = step(model, batch())
    assert [note for note in plan(model).notes if "not as it was proven" in note]
    remove_unswag_surgery(model)
    assert_close(ours, step(model, batch()))


def test_another_attention_chosen_since_is_left():
    model = checkpointed()
    swept(model)
    step(model, batch())
    model.set_attn_implementation("eager")
    ours = step(model, batch())
    remove_unswag_surgery(model)
    assert_close(ours, step(model, batch()))


def test_a_comparison_changes_nothing():
    model = with_lora(checkpointed())
    swept(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    state = torch.get_rng_state()
    loss = model(**batch()).loss
    assert len(plan(model).swept) == 2
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert versions == [p._version for p in model.parameters()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    del loss


def test_removal_copies_and_pickles():
    model = checkpointed()
    stock = step(model, batch())
    swept(model)
    step(model, batch())
    other = copy.deepcopy(model)
    assert_close(step(other, batch()), stock)
    assert len(plan(other).swept) == 2
    assert pickle.loads(pickle.dumps(plan(model))).tile == TILE
    remove_unswag_surgery(model)
    assert SWEEP not in vars(model)
    assert_close(step(model, batch()), stock)


def test_checkpointing_that_is_switched_on_later_or_again():
    model = build(dtype=torch.float64)
    stock = step(model, batch())
    swept(model)
    step(model, batch())
    assert not plan(model).swept
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_close(step(model, batch()), stock)
        assert len(plan(model).swept) == 2
        assert not plan(model).left
