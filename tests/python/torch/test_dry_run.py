"""The dry run: a ledger from shapes alone, equal to that of a real step, and a reason where there is none."""

from __future__ import annotations

import copy

import architectures
import families
import pytest
import torch
from families import ids
from small_models import batch, tiny_llama
from torch import nn

import unswag
from unswag.torch.dry_run import NoDryRun, checkpoints, dry_run


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("operated", [False, True])
def test_it_counts_what_a_real_step_keeps(family, operated):
    model = families.build(family)
    if operated:
        unswag.apply_unswag_surgery(model, loss="stock", verify=False, verbose=False)
    real = unswag.audit(model, input_ids=ids(1, 64), labels=ids(1, 64), use_cache=False)
    dry = dry_run(model)
    assert dry.alive == pytest.approx(real.alive, rel=1e-3) and dry.total == pytest.approx(real.total, rel=1e-3)
    assert (dry.tokens, dry.model) == (64, real.model) and dry.batch == {"input_ids": (1, 64), "labels": (1, 64)}
    assert {row.role for row in dry.rows} == {row.role for row in real.rows}


def test_twice_the_tokens_keep_twice_as_much():
    model = families.build("llama")
    one, two = dry_run(model, 32), dry_run(model, 64)
    assert two.tokens == 64 and two.total == pytest.approx(2 * one.total, rel=0.01)


@pytest.mark.parametrize(
    "name, batch, tokens",
    [
        ("vit", {"pixel_values": (1, 3, 16, 16), "labels": (1,)}, 5),  # four patches and the class token
        ("clip_vision", {"pixel_values": (1, 3, 16, 16)}, 5),
        ("t5", {"input_ids": (1, 64), "labels": (1, 64)}, 128),
        ("whisper", {"input_features": (1, 8, 40), "labels": (1, 40)}, 60),  # of sound, 20
        ("bert", {"input_ids": (1, 64), "labels": (1, 64)}, 64),
        ("clip_text", {"input_ids": (1, 64)}, 64),
    ],
)
def test_other_inputs_than_text(name, batch, tokens):
    model = architectures.build(name).train()
    dry = dry_run(model)
    assert (dry.batch, dry.tokens) == (batch, tokens)
    real = {name: torch.ones(shape, dtype=torch.long) for name, shape in batch.items()}
    real |= {name: value.double() for name, value in real.items() if name.startswith(("pixel", "input_features"))}
    assert dry.alive == pytest.approx(unswag.audit(model, **real).alive, rel=0.02)


def test_labels_of_a_classifier_of_text():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3))
    assert dry_run(model).batch == {"input_ids": (1, 64), "labels": (1,)}


def test_the_model_is_not_touched_and_hooks_do_not_run():
    model = families.build("llama").eval()
    called, before = [], copy.deepcopy(model.state_dict())
    model.model.norm.register_forward_hook(lambda *_: called.append(1))
    state = torch.get_rng_state()
    dry_run(model)
    assert not called and not model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "model, words",
    [
        (nn.Sequential(nn.Linear(8, 8)), "it is no model of transformers"),
        (type("Empty", (nn.Module,), {"forward": lambda self, input_ids: input_ids})(), "a copy without data cannot be made"),
        (type("Odd", (nn.Module,), {"main_input_name": "smell"})(), "a copy without data cannot be made: StopIteration"),
    ],
)
def test_the_reason_is_said(model, words):
    with pytest.raises(NoDryRun, match=words):
        dry_run(model)


def test_an_error_of_the_forward_is_the_reason():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, input_ids):
            raise KeyError("first line\nsecond")

    with pytest.raises(NoDryRun, match="a run without data fails with KeyError: 'first line"):
        dry_run(Looks())


def test_whether_checkpointing_is_on():
    model = families.build("llama")
    assert checkpoints(model) is False and checkpoints(nn.Linear(2, 2)) is None
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert checkpoints(model) is True


def test_the_report_of_lora_with_dropout_is_what_a_step_keeps():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
    model = peft.get_peft_model(tiny_llama(layers=1), config).train()
    report = unswag.apply_unswag_surgery(model, verbose=False)
    assert report.after.total == unswag.audit(model, use_cache=False, **batch(64)).total
