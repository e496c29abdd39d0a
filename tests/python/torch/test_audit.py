"""The audit: rows that are true to the byte, an independent count, and a model left as it was."""

import copy

import architectures
import pytest
import torch
import torch.utils.checkpoint
from small_models import assert_same, batch, gradients, step, tiny_llama, weight, with_recipes, with_stash
from torch import nn
from torch.nn import functional as F

import unswag
from unswag.ledger import Ledger
from unswag.torch import checkpoint, loss_buffers, stash
from unswag.torch.audit import LiveStorages, audit
from unswag.torch.stash import storages, thread

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    yield
    assert thread.idle()


class Mlp(nn.Module):
    """sum(down(relu(up(x)))): keeps the ReLU's output, and nothing else that is not given."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.down(F.relu(self.up(x))).sum()


def test_every_row_of_a_small_network():
    ledger = audit(Mlp(), x=torch.randn(5, 8))
    assert isinstance(ledger, unswag.Ledger) and unswag.audit(Mlp(), x=torch.randn(5, 8)).rows == ledger.rows
    relu, shared = ledger.rows
    assert (relu.module, relu.shape, relu.dtype, relu.tier) == ("", (5, 32), "float32", "device")
    assert (relu.bits, relu.bytes) == (32.0, 640)
    assert (shared.module, shared.role, shared.shape, shared.tier, shared.bytes) == ("down", "other", (5, 32), "shared", 0)
    assert ledger.total == 640 and ledger.alive == 640 + 4  # the loss itself
    assert ledger.tokens == 5 and ledger.bytes_per_token == 128


@pytest.mark.parametrize("patch", [lambda model: model, with_recipes, lambda model: with_stash(with_recipes(model))])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_ledger_agrees_with_the_independent_count(patch, reentrant, autocast):
    model, data = patch(tiny_llama()), batch(256)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        checkpoint.prepare(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ledger = audit(model, **data)
    in_closures = 0 if reentrant is None else 256 * (2 * 16 * 4 + 8)  # cos, sin and positions: keyword arguments of layers
    assert abs(ledger.alive - in_closures - ledger.total) <= 0.002 * ledger.total
    assert ledger.tokens == 256 and ledger.total > 0
    assert (ledger.weight_copies > 0) == autocast


def test_a_patched_model_writes_its_own_ledger():
    data = batch(64)
    plain, ours = audit(with_recipes(tiny_llama()), **data), audit(with_stash(with_recipes(tiny_llama())), **data)
    saved = 64 * (2 * (64 + 64 + 176) + 64) * 4
    assert plain.total - ours.total == plain.alive - ours.alive == saved
    assert not [row for row in plain.rows if row.tier == "recipe"]
    again = [row for row in ours.rows if row.tier == "recipe"]
    assert {row.module for row in again if row.module.endswith("proj")} >= {
        "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj",
    }  # fmt: skip
    assert all(row.bytes == 0 and row.bits == 0 for row in again)
    norm = [row for row in ours.rows if row.module == "model.layers.1.input_layernorm" and row.tier == "device"]
    assert [row.shape for row in norm] == [(1, 64, 64), (1, 64, 1)] and norm[0].role == "residual"


def test_checkpoints_have_a_role_of_their_own():
    model = with_stash(with_recipes(tiny_llama(3)), checkpoint.prepare)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ledger = audit(model, **batch(32))
    rows = [row for row in ledger.rows if row.role == "checkpoint"]
    assert [(row.module, row.shape) for row in rows] == [(f"model.layers.{i}", (1, 32, 64)) for i in range(3)]


def test_what_hides_from_the_door_shows_in_the_independent_count():
    class Hider(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = x + 1  # not save_for_backward
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            return dy * ctx.hidden

    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Linear(8, 8)

        def forward(self, x):
            return Hider.apply(self.own(x)).sum()

    ledger = audit(Hiding(), x=torch.randn(1000, 8))
    assert ledger.total == 0 and ledger.alive == 1000 * 8 * 4 + 4


def test_what_died_before_the_end_of_the_forward_has_no_row():
    class Wasteful(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Linear(8, 8)

        def forward(self, x):
            self.own(x).exp()
            return self.own(x).exp().sum()

    ledger = audit(Wasteful(), x=torch.randn(100, 8))
    assert ledger.total == 100 * 8 * 4 == ledger.alive - 4


def test_buffers_inputs_and_parameters_are_not_counted():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = weight(16)
            self.register_buffer("scale", torch.rand(16))

        def forward(self, x):
            return ((self.w * self.scale).exp() * x).sum()

    ledger = audit(Scaled(), x=torch.randn(3, 16))
    assert ledger.total == 16 * 4  # exp(…)
    assert ledger.alive == 16 * 4 + 4


def test_autocast_copies_of_frozen_weights_are_no_activations():
    model = Mlp()
    model.down.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        ledger = audit(model, x=torch.randn(5, 8))
    assert ledger.weight_copies == (8 * 32 + 32 + 32 * 4 + 4) * 2
    assert ledger.total == sum(row.bytes for row in ledger.rows if row.shape in ((5, 8), (5, 32)))
    assert ledger.alive - ledger.total <= 8


def test_loss_buffers_stand_on_a_line_of_their_own():
    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            dx = torch.ones_like(x)
            loss_buffers.mark_loss_buffer(dx)
            ctx.save_for_backward(dx)
            return x.sum() + 0 * w.sum()

        @staticmethod
        def backward(ctx, dy):
            return dy * ctx.saved_tensors[0], None

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Linear(8, 8)

        def forward(self, x):
            return Loss.apply(self.own(x).exp(), self.own.weight)

    ledger = audit(WithLoss(), x=torch.randn(100, 8))
    assert ledger.loss_buffers == ledger.total == 100 * 8 * 4
    assert ledger.alive == ledger.total + 4
    assert "loss buffers" in str(ledger)


@pytest.mark.parametrize("backward", [False, True])
def test_the_model_is_left_as_it_was(backward):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    class Summed(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return self.body(x).sum()

    model = Summed(model)
    first = model.body[0].weight
    first.grad = torch.ones_like(first)
    gradient, state, before = first.grad, copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ledger = audit(model, x=torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), backward=backward)
    assert (ledger.peak is None) != backward
    assert torch.equal(before, torch.get_rng_state())
    assert first.grad is gradient and torch.equal(gradient, torch.ones_like(first)) and model.body[0].bias.grad is None
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_hooks_are_removed_when_the_model_fails():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x)  # 4 wide, given 5

    model = Failing()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        audit(model, x=torch.randn(5, 5))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert stash.top_hooks() is None


def test_auditing_changes_no_gradient():
    model, data = with_stash(with_recipes(tiny_llama())), batch(32)
    expected = step(with_recipes(tiny_llama()), data)[1]
    audit(model, backward=True, **data)
    assert not gradients(model)
    assert_same(step(model, data)[1], expected)


def test_bad_calls():
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are switched off"):
        audit(Mlp(), x=torch.randn(5, 8))
    with pytest.raises(RuntimeError, match="backward=True needs a loss; pass labels"):
        audit(tiny_llama(1), backward=True, input_ids=batch(8)["input_ids"])


def test_a_model_without_a_loss():
    ledger = audit(tiny_llama(1), input_ids=batch(8)["input_ids"])
    assert ledger.total > 0 and ledger.alive > ledger.total


# The independent counter


def test_live_storages_counts_each_once_and_only_while_it_lives():
    x = torch.randn(10, requires_grad=True)
    with LiveStorages(inputs=(x,)) as live:
        y = x * 2
        views = [y[1:], y.view(2, 5), x[2:]]
        assert live.bytes() == 40
        z = y.clone()
        assert live.bytes() == 80
        del y
        assert live.bytes() == 80  # its views hold it
        views.clear()
        assert live.bytes() == 40
        del z
        assert live.bytes() == 0 and live.peak() == 80


def test_live_storages_does_not_count_what_was_there_before():
    before = torch.randn(100)
    with LiveStorages() as live:
        before.t(), before[3:], before.view(10, 10), before.add_(1), before.detach()
        assert live.bytes() == 0


def test_live_storages_leaves_gradients_out():
    model, data = tiny_llama(1), batch(8)
    with LiveStorages(model, data) as live:
        for _ in range(2):
            model(**data).loss.backward()
            assert live.bytes() == 0


def test_peaks_inside_the_loss_do_not_count():
    with LiveStorages() as live:
        torch.zeros(100)
        with loss_buffers.inside_loss():
            torch.zeros(1000)
        assert live.peak() == 400
        torch.zeros(200)
        assert live.peak() == 800


def test_storages_of_unusual_tensors():
    assert sum(s.nbytes() for s in storages(torch.eye(3).to_sparse())) == 2 * 3 * 8 + 3 * 4
    assert storages(3) == [] and storages(None) == []
    assert len(storages(torch.nn.Parameter(torch.zeros(2)))) == 1


def test_a_tensor_without_a_storage_of_its_own_has_a_row():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = weight(4, 4)

        def forward(self, x):
            return torch.sparse.mm((x * 1).to_sparse(), self.own).sum()

    ledger = audit(Sparse(), x=torch.eye(4))
    assert ledger.total == 2 * 4 * 8 + 4 * 4


def test_the_ledger_is_empty_when_nothing_is_kept():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = weight(4)

        def forward(self):
            return self.own.sum()

    ledger = audit(Sum())
    assert isinstance(ledger, Ledger) and ledger.rows == [] and ledger.tokens == 0 and "–" in str(ledger)


def test_what_is_audited_is_what_runs():
    """Hooks on the parts of a LoRA adapter would make it run as PEFT runs it, with float32 casts of x."""
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    model = peft.get_peft_model(tiny_llama(dtype=torch.bfloat16), peft.LoraConfig(r=4, target_modules="all-linear"))
    unswag.apply_unswag_surgery(model)
    data = batch()
    with LiveStorages(model, list(data.values())) as live:
        loss = model(**data).loss
        saved = live.bytes()
    del loss
    ledger = audit(model, **data)
    assert ledger.total == pytest.approx(saved, rel=0.02)
    assert not [row for row in ledger.rows if row.bytes and "lora_A" in row.module]


def test_images_are_not_tokens():
    """How many patches they become only the model knows; who knows it says so."""
    model = nn.Conv2d(3, 4, 2, stride=2)
    image = torch.randn(2, 3, 8, 8, requires_grad=True)
    assert audit(model, input=image).tokens == 0 and "–" in str(audit(model, input=image))
    assert audit(model, input=image, tokens=32).tokens == 32
    for wrong in (-1, 1.5, "8"):
        with pytest.raises(ValueError, match=r"audit: tokens is .*; pass the number of tokens of the batch"):
            audit(model, input=image, tokens=wrong)


@pytest.mark.parametrize(
    "name, tokens",
    [
        ("vit", 2 * 5),  # 16 x 16 pixels are four patches, and the class token
        ("t5", 2 * (11 + 11)),  # of the encoder and of the decoder
        ("whisper", 2 * (20 + 11)),  # 40 frames are 20 positions of the encoder
        ("bert", 2 * 11),
        ("clip_vision", 2 * 5),
    ],
)
def test_tokens_are_those_that_the_layers_see(name, tokens):
    assert audit(architectures.build(name), **architectures.batch(name)).tokens == tokens


def test_a_network_whose_length_changes_has_no_tokens():
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 2], window_size=4)
    assert audit(SwinForImageClassification(config), pixel_values=torch.randn(2, 3, 32, 32)).tokens == 0


def test_the_ledger_names_model_and_batch():
    ledger = audit(tiny_llama(1), **batch(8))
    assert (ledger.model, ledger.batch) == ("LlamaForCausalLM", {"input_ids": (1, 8), "labels": (1, 8)})
    assert "LlamaForCausalLM: input_ids 1×8, labels 1×8" in str(ledger)


@pytest.mark.parametrize("peft", [False, True])
def test_logits_are_named(peft):
    model = tiny_llama(1)
    if peft:
        library = pytest.importorskip("peft", reason="the adapters are PEFT's")
        model = library.get_peft_model(model, library.LoraConfig(r=4, target_modules=["q_proj"]))
    ledger = audit(model, **batch(8))
    logits = [row for row in ledger.rows if row.role == "logits" and row.shape[-1] == model.config.vocab_size]
    assert sum(row.bytes for row in logits) == 8 * model.config.vocab_size * 4
    assert not [row for row in ledger.rows if row.role != "logits" and row.shape[-1:] == (model.config.vocab_size,)]


def test_a_page_shows_a_model_of_many_layers():
    ledger = audit(tiny_llama(16), **batch(8))
    assert len(ledger.rows) > 300 and len(repr(ledger).splitlines()) <= 45 and ledger._repr_html_().startswith("<table>")


def test_a_batch_without_rows():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    unswag.apply_unswag_surgery(model, verbose=False)
    assert audit(model, input=torch.zeros(0, 8)).total == 0


def test_what_is_alive_in_no_row_is_a_row_of_the_table():
    ledger = Ledger(alive=3000, tokens=10)
    assert "of it in no row" in str(ledger) and "of it in no row" not in str(Ledger(alive=0, tokens=10))


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="audit: weight is on the meta device and has no data; materialise"):
        audit(model, input=torch.zeros(1, 2))
