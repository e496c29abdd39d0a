"""apply_unswag_surgery on whole models: right results, nothing half-done, everything put back."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import sys
import types
import warnings

import families
import pytest
import torch
from families import assert_close, ids, packed, padded, plain, step
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import unswag
from unswag import _core
from unswag.torch import patterns
from unswag.torch.checkpoint import StashedCheckpoint
from unswag.torch.patterns.pattern import Candidate, replace_forward, replaced
from unswag.torch.stash import hooks as stash_hooks

FP32 = 5e-6  # the same mathematics, other roundings and orders of summation
BATCHES = {"plain": plain, "padded": padded, "packed": packed}
PATCHES = {  # family: how many of each pattern two layers have
    "llama": dict(rms_norm=5, gated_mlp=2, attention=1),
    "gemma2": dict(rms_norm=9, gated_mlp=2),  # its attention has a soft cap
    "qwen2": dict(rms_norm=5, gated_mlp=2, attention=1),
    "qwen3": dict(rms_norm=9, gated_mlp=2, attention=1),
    "mistral": dict(rms_norm=5, gated_mlp=2, attention=1),
    "bitnet": dict(rms_norm=9, relu=2, attention=1),  # its MLPs have a norm inside
    "lfm2": dict(rms_norm=9, gated_mlp=2, attention=1),  # calls F.silu, no activation attribute
    "gpt2": dict(activation=2, attention=1, layer_norm=5),
}


def operate(model, **options):
    return unswag.apply_unswag_surgery(model, **{"loss": "stock", **options})


def counts(report):
    names = [pattern for _, pattern in report.patched]
    return {name: names.count(name) for name in names}


def state(model):
    """Everything that surgery could change: each module's attributes, and the settings of each config, by identity."""
    seen = {}
    for name, module in model.named_modules():
        seen[name] = {k: v for k, v in vars(module).items() if not isinstance(v, (dict, set))}
        for k, v in vars(module).items():
            if isinstance(v, dict):
                seen[name, k] = dict(v)
    config = getattr(model, "config", None)
    seen["config"] = dict(vars(config)) if config is not None else {}
    return seen


def assert_untouched(model, before):
    after = state(model)
    assert after.keys() == before.keys()
    for where, attributes in before.items():
        assert after[where].keys() == attributes.keys(), where
        for name, value in attributes.items():
            assert after[where][name] is value, (where, name)


@pytest.mark.parametrize(("loss", "patches", "near"), [("stock", {}, FP32), ("chunked", {"loss": 1}, 2 * FP32)])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_loss_and_gradients_equal_stock_and_remove_restores_every_attribute(family, loss, patches, near):
    model = families.build(family)
    stock = {name: step(model, batch()) for name, batch in BATCHES.items()}
    model.zero_grad(set_to_none=True)
    before = state(model)
    report = operate(model, loss=loss)
    assert counts(report) == PATCHES[family] | patches | {"stash": 1}
    for name, batch in BATCHES.items():
        assert_close(step(model, batch()), stock[name], near)
        assert len(stock[name][1]) == len(list(model.parameters()))
    assert not report.logits_made
    model.zero_grad(set_to_none=True)
    for _ in range(2):
        unswag.remove_unswag_surgery(model)
        assert_untouched(model, before)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_bf16_is_as_near_to_fp64_as_stock(family):
    """Against the same model in fp64: our gradients are no further away than stock's, 1.25 times at the worst."""
    model = families.build(family, torch.bfloat16)
    truth = step(copy.deepcopy(model).double(), plain())[1]
    stock = step(model, plain())[1]
    operate(model)
    ours = step(model, plain())[1]
    for name, true in truth.items():
        if true.norm() > 1e-12:
            limit = 1.25 * families.distance(stock[name], true) + 1e-3
            assert ours[name].dtype == torch.bfloat16 and families.distance(ours[name], true) <= limit, name


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_autocast_over_fp32_weights(family):
    model = families.build(family)
    with torch.autocast("cpu", torch.bfloat16):
        stock = step(model, plain())
        operate(model)
        ours = step(model, plain())
    assert_close(ours, stock, 3e-2)
    assert all(g.dtype == torch.float32 for g in ours[1].values())


def test_it_saves():
    model = families.build("llama", torch.bfloat16)
    before = unswag.audit(model, **plain()).alive
    report = operate(model)
    after = unswag.audit(model, **plain()).alive
    assert after < 0.75 * before
    assert report.bytes_per_token[1] < 0.75 * report.bytes_per_token[0]


def test_it_saves_in_the_base_model_alone_too():
    """As TRL calls it: the loss is made of the base model's hidden states, past the model's own forward."""
    model = families.build("llama")
    stock = unswag.audit(model.model, input_ids=ids()).alive
    operate(model)
    ledger = unswag.audit(model.model, input_ids=ids())
    assert ledger.alive < 0.65 * stock and any(row.tier == "recipe" for row in ledger.rows)


def test_packed_outputs_are_not_kept_twice():
    """The pieces of a packed batch are kept, what joins them is made again."""
    model = families.build("llama")
    operate(model)
    one = {"input_ids": ids(1, 40), "labels": ids(1, 40), "use_cache": False}
    whole = unswag.audit(model, **one).alive
    pack = unswag.audit(model, **packed()).alive
    assert pack <= whole + 40 * 8  # position ids


# ---- with others -----------------------------------------------------------------------------------------------------


def forward_calls(model, batch):
    """How often each MLP is called in one training step. (Before its forward: a recompute may stop early within it.)"""
    calls = []
    hooks = [m.register_forward_pre_hook(lambda m, *_: calls.append(m)) for n, m in model.named_modules() if n.endswith("mlp")]
    result = step(model, batch)
    for hook in hooks:
        hook.remove()
    return len(calls) / len(hooks), result


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointing_before_or_after(when, reentrant):
    model = families.build("llama")
    stock = step(model, plain())

    def enable():
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()

    if when == "before":
        enable()
    operate(model)
    if when == "after":
        enable()
    for batch in (plain(), plain()):
        calls, ours = forward_calls(model, batch)
        assert calls == 2
        assert_close(ours, stock, FP32)
    functions = {type(layer._gradient_checkpointing_func) for layer in model.model.layers}
    assert functions == {StashedCheckpoint}  # the recompute runs under the stash
    unswag.remove_unswag_surgery(model)
    assert all(type(layer._gradient_checkpointing_func) is not StashedCheckpoint for layer in model.model.layers)


@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_peft(when):
    from peft import LoraConfig, get_peft_model

    def build():
        return families.build("llama")

    def adapt(model):
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        torch.manual_seed(3)
        return families.redraw(get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")))

    stock = step(adapt(build()), plain())
    assert any("lora_A" in name for name in stock[1])
    model = build()
    if when in ("before", "both"):
        operate(model)
    model = adapt(model)
    if when in ("after", "both"):
        report = operate(model)
        assert counts(report)["rms_norm"] == 5 and counts(report)["gated_mlp"] == 2
    assert_close(step(model, plain()), stock, FP32)
    assert unswag.audit(model, **plain()).alive < 0.9 * unswag.audit(adapt(build()), **plain()).alive
    unswag.remove_unswag_surgery(model)
    assert not any(replaced(m) for m in model.modules())


def test_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row, "unused": 1} for row in ids(6, 16)]

    def train(model):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, activation_checkpointing=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    stock = train(families.build("llama"))
    model = families.build("llama")
    operate(model)
    ours = train(model)
    assert len(ours) == 3 and ours == pytest.approx(stock, rel=1e-4) and ours[2] < ours[0]


def test_torch_compile_of_the_whole_model_steps_aside():
    model = families.build("llama")
    stock = step(model, plain())
    operate(model)
    model.zero_grad(set_to_none=True)
    compiled = torch.compile(model, backend="aot_eager")
    stash_hooks.warned.clear()  # what an earlier test was told
    with pytest.warns(UserWarning, match="steps aside"):
        loss = compiled(**plain()).loss
    loss.backward()
    ours = (loss.detach(), {name: p.grad for name, p in model.named_parameters()})
    assert_close(ours, stock, FP32)


def test_modules_that_others_patched_are_left():
    model = families.build("llama")
    mlp, norm = model.model.layers[0].mlp, model.model.layers[1].input_layernorm
    mlp.forward = types.MethodType(type(mlp).forward, mlp)
    norm.forward = types.MethodType(type(norm).forward, norm)
    theirs = (mlp.forward, norm.forward)
    report = operate(model)
    assert {name for name, why in report.skipped if "already replaced" in why} == {
        "model.layers.0.mlp",
        "model.layers.1.input_layernorm",
    }
    assert counts(report)["gated_mlp"] == 1 and counts(report)["rms_norm"] == 4
    assert (vars(mlp)["forward"], vars(norm)["forward"]) == theirs


def test_a_forward_on_the_instance_of_the_model_still_runs():
    """accelerate wraps the model's forward for mixed precision, before or after us."""
    model = families.build("llama")
    calls = []
    stock = type(model).forward

    def wrapped(self, *args, **kwargs):
        calls.append(1)
        return stock(self, *args, **kwargs)

    model.forward = types.MethodType(wrapped, model)
    mine = model.forward
    operate(model)
    calls.clear()  # of the dry runs
    step(model, plain())
    assert calls == [1]
    unswag.remove_unswag_surgery(model)
    assert vars(model)["forward"] is mine


# ---- nothing half-done -----------------------------------------------------------------------------------------------


def test_classes_and_state_dict_do_not_change(tmp_path):
    model = families.build("llama")
    forwards = {type(m): type(m).forward for m in model.modules()}
    keys = list(model.state_dict())
    operate(model)
    assert all(kind.forward is forward for kind, forward in forwards.items())
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa" and not any("_unswag" in vars(m) for m in again.modules())
    for name, p in again.named_parameters():
        assert torch.equal(p, model.get_parameter(name))


def test_random_state_gradients_hooks_and_modes_are_untouched():
    model = families.build("llama")
    model.eval()
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(64)
    called = []
    for module in model.modules():
        module.register_forward_hook(lambda m, *_: called.append(m))
    modes = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    values = [(p.clone(), p.requires_grad, p.grad, p._version) for p in model.parameters()]
    random = torch.get_rng_state()
    operate(model)
    assert torch.equal(torch.get_rng_state(), random) and not called
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == modes
    for p, (value, requires_grad, grad, version) in zip(model.parameters(), values, strict=True):
        assert torch.equal(p, value) and p.requires_grad == requires_grad and p.grad is grad and p._version == version


def test_twice_is_once():
    model = families.build("llama")
    stock = step(model, plain())
    first = operate(model)
    second = operate(model)
    assert second.patched == first.patched and second.skipped == first.skipped
    assert_close(step(model, plain()), stock, FP32)
    unswag.remove_unswag_surgery(model)
    assert not any("_unswag" in vars(m) for m in model.modules())


def test_a_second_call_takes_the_new_arguments():
    model = families.build("llama")
    operate(model)
    report = operate(model, attention="stock")
    assert "attention" not in counts(report) and model.config._attn_implementation == "sdpa"


def test_two_models_one_patched():
    ours, other = families.build("llama"), families.build("llama")
    before = state(other)
    operate(ours)
    assert_untouched(other, before)
    assert_close(step(ours, plain()), step(other, plain()), FP32)


def test_deepcopy_runs_on_its_own_weights():
    model = families.build("llama")
    operate(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    reference = families.build("llama")
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(0.5)
    assert_close(step(twin, plain()), step(reference, plain()), FP32)
    assert all(p.grad is None for p in model.parameters())
    unswag.remove_unswag_surgery(twin)
    assert not any(replaced(m) for m in twin.modules()) and replaced(model)


class Broken:
    """A pattern that fails at its second module."""

    name, saves = "broken", ""

    def __init__(self, where):
        self.where, self.calls = where, 0

    def find(self, model):
        return [Candidate(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]

    def fail(self, where):
        self.calls += where == self.where
        if self.calls == 2:
            raise KeyboardInterrupt

    def probe(self, candidate):
        self.fail("probe")

    def apply(self, candidate):
        self.fail("apply")
        replace_forward(candidate.module, lambda self, x: x)


@pytest.mark.parametrize("where", ["probe", "apply"])
@pytest.mark.parametrize("patched", [False, True])
def test_an_exception_leaves_the_model_as_it_was(where, patched, monkeypatch):
    model = families.build("llama")
    clean = state(model)
    if patched:
        first = operate(model)
    stock = step(model, plain())
    model.zero_grad(set_to_none=True)
    monkeypatch.setattr(patterns, "ALL", (*patterns.ALL, Broken(where)))
    with pytest.raises(KeyboardInterrupt):
        operate(model)
    assert_close(step(model, plain()), stock, FP32)
    if patched:
        # attention patches a config; the base model, model.model, has a stash of its own
        assert sum(replaced(m) for m in model.modules()) == len(first.patched)
    else:
        model.zero_grad(set_to_none=True)
        assert_untouched(model, clean)
    unswag.remove_unswag_surgery(model)
    model.zero_grad(set_to_none=True)
    assert_untouched(model, clean)


def test_a_model_without_known_patterns_is_untouched(capsys):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2))
    before = state(model)
    report = unswag.apply_unswag_surgery(model)
    assert report.patched == [] and report.skipped == []
    assert_untouched(model, before)
    assert "no known pattern in Sequential; the model is untouched" in " ".join(capsys.readouterr().err.split())
    assert "no known pattern" in str(report) and report._repr_html_().startswith("<p>UnSwag: no known")


@pytest.mark.parametrize("part", ["", "model.norm", "lm_head"])
def test_a_model_on_meta_is_refused_as_a_whole(part):
    model = families.build("llama")
    model.get_submodule(part).to("meta")
    before = state(model)
    with pytest.raises(ValueError, match=r"weight is on the meta device.*materialise the model first"):
        operate(model)
    assert_untouched(model, before)


class Raises(nn.Module):
    """Nothing of it can be looked at."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        raise KeyError("no forward")

    @property
    def in_features(self):
        raise RuntimeError("no features")


def test_what_a_find_or_a_probe_raises_is_a_reason():
    model = nn.Sequential(nn.Linear(8, 64), Raises(), nn.LayerNorm(64), nn.GELU())
    report = operate(model)
    assert ("1", "rms_norm: not an RMSNorm: its forward raises KeyError: 'no forward'") in report.skipped
    model.append(nn.Sequential(Raises()))
    report = operate(model)
    assert ("", "gated_mlp: the search for it raises RuntimeError: no features") in report.skipped
    assert {"layer_norm", "activation"} <= set(counts(report))


def test_a_model_on_a_cuda_device_that_has_no_kernels_is_left_with_the_core_s_reason():
    problem = _core.cuda_problem(99)  # no such device, or no CUDA kernels at all
    model = families.build("llama")
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, device="cuda:99")))
    report = operate(model, attention="stock")
    assert report.patched == [] and "forward" not in vars(model) and len(report.skipped) == 9
    assert problem and all(f"it is on cuda:99: {problem}" in why for _, why in report.skipped)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(policy="int3"), ValueError, r"policy='int3'.*'exact'"),
        (dict(attention="flash"), ValueError, r"attention='flash'; choose 'auto' or 'stock'"),
        (dict(loss="cce"), ValueError, r"loss='cce'; choose 'chunked' or 'stock'"),
    ],
)
def test_unknown_options(arguments, error, words):
    model = families.build("llama")
    with pytest.raises(error, match=words):
        unswag.apply_unswag_surgery(model, **arguments)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("operation", [unswag.apply_unswag_surgery, unswag.remove_unswag_surgery])
def test_no_module(operation):
    with pytest.raises(TypeError, match=r"model is a str; pass the torch.nn.Module"):
        operation("SmolLM2")


def test_verify_false_trusts_modules_of_the_same_kind(monkeypatch):
    probes = []
    original = patterns.rms_norm.RmsNorm.probe
    monkeypatch.setattr(patterns.rms_norm.RmsNorm, "probe", lambda self, c: (probes.append(c.name), original(self, c))[1])
    model = families.build("qwen3")
    model.model.layers[1].post_attention_layernorm.variance_epsilon = 1e-5
    full = operate(model)
    assert len(probes) == 9
    probes.clear()
    quick = operate(model, verify=False)
    assert len(probes) == 3  # 64 wide, 16 wide, and the one with another eps
    assert quick.patched == full.patched


# ---- the report ------------------------------------------------------------------------------------------------------


def test_it_prints_what_it_patched_what_it_left_and_why(capsys):
    report = operate(families.build("bitnet"))
    printed = capsys.readouterr()
    said = " ".join(printed.err.replace("│", " ").split())
    assert printed.out == "" and "BitNetForCausalLM" in said and "rms_norm" in said and "left: gated_mlp: it has more" in said
    before, after = report.bytes_per_token
    assert f"bytes per token: {before:,.0f} before, {after:,.0f} after ({before / after:.1f} x less)" in said
    assert "(input_ids 1×64, labels 1×64), without gradient checkpointing (to see its figures, switch it on" in said
    assert "left: gated_mlp: it has more" in str(report) and "BitNetForCausalLM" in report._repr_html_()
    assert "bytes per token" in report._repr_html_() and "\n" not in repr(report) and "BitNetForCausalLM" in repr(report)


def tiny():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def test_verbose_false_prints_nothing_and_reports(capfd):
    report = unswag.apply_unswag_surgery(tiny(), verbose=False)
    said = capfd.readouterr()
    assert said.out == said.err == "" and counts(report) == {"activation": 1, "stash": 1}


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("initialised", [False, True])
def test_one_rank_speaks_for_all(monkeypatch, capsys, rank, initialised):
    monkeypatch.setenv("RANK", "3" if initialised else rank)
    if initialised:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: int(rank))
    unswag.apply_unswag_surgery(tiny())
    assert ("UnSwag surgery" in capsys.readouterr().err) == (rank == "0")


def test_figures_that_are_not_known_are_said_with_the_reason(capsys):
    report = unswag.apply_unswag_surgery(tiny())
    assert report.bytes_per_token == (None, None) and "no model of transformers" in report.unknown
    said = " ".join(capsys.readouterr().err.split())
    assert f"What a training step keeps is not known: {report.unknown}. Measure it with unswag.audit(model, **batch)" in said


def test_a_network_of_convolutions_has_no_attention_to_be_left():
    """And its figures are those of an image."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config).train()
    image = {"pixel_values": torch.randn(1, 3, 224, 224), "labels": torch.tensor([1])}
    before = unswag.audit(model, **image).alive
    report = unswag.apply_unswag_surgery(model)
    assert set(counts(report)) == {"batch_norm", "relu", "stash"} and report.skipped == []
    assert report.after.alive < 0.75 * report.before.alive and report.bytes_per_token == (None, None)
    assert report.before.alive == pytest.approx(before, rel=1e-3)
    assert report.after.alive == pytest.approx(unswag.audit(model, **image).alive, rel=0.02)  # the number of zeros settles it
    said = " ".join(str(report).split())
    assert f"bytes per example: {report.before.alive:,} before" in said and "(pixel_values 1×3×224×224, labels 1)." in said


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_that_is_on_is_counted(reentrant, lora):
    model = families.build("llama")
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")).train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    one = {"input_ids": ids(1, 64), "labels": ids(1, 64), "use_cache": False}
    before = unswag.audit(model, **one).alive / 64
    report = operate(model, verify=False)
    after = unswag.audit(model, **one).alive / 64
    # without values transformers cannot see that positions are those of one sequence, and makes a mask, 64 bytes for each token
    assert report.bytes_per_token == (pytest.approx(before, abs=80), pytest.approx(after, rel=1e-3))
    assert report.checkpointing and "with gradient checkpointing." in " ".join(str(report).split())


def test_signature_and_columns_are_those_of_the_model():
    model = families.build("llama")
    stock = inspect.signature(model.forward)
    operate(model)
    assert inspect.signature(model.forward) == stock
    assert model.forward.__doc__ == type(model).forward.__doc__ and not hasattr(model.forward, "__wrapped__")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_the_cache_is_stocks(training, labels):
    """A second segment that goes on from the cache of the first; positions that skip and never start again."""
    model = families.build("llama").train(training)
    first, second = ids().chunk(2, -1)
    skipping = torch.cat([torch.arange(7), torch.arange(20, 20 + ids().shape[1] - 7)])[None].expand_as(ids())

    def run():
        def call(tokens, **more):
            return model(input_ids=tokens, **({"labels": tokens.contiguous()} if labels else {}), **more)

        out = call(first)
        out = [
            *out.values(),
            *call(second, past_key_values=out.past_key_values).values(),
            *call(ids(), position_ids=skipping).values(),
        ]
        return [x.detach() * 1 for x in out if isinstance(x, torch.Tensor)], len(out)

    stock = run()
    operate(model)
    ours = run()
    assert ours[1] == stock[1]
    torch.testing.assert_close(ours[0], stock[0], atol=2e-5, rtol=1e-4)


def test_a_compiled_training_step_is_one_graph_and_stocks():
    model = families.build("llama")
    stock = step(model, plain())
    operate(model)
    model.compile(backend="eager", fullgraph=True)
    assert_close(step(model, plain()), stock, FP32)


def test_a_pack_is_seen_without_saying_use_cache():
    model = families.build("llama")
    stock = step(model, packed())
    batch = packed()
    del batch["use_cache"]
    operate(model)
    assert_close(step(model, batch), stock, FP32)


def test_evaluation_and_generation():
    model = families.build("llama").eval()

    def run():
        with torch.no_grad():
            return model(**plain()).logits, model.generate(ids(), max_new_tokens=4, do_sample=False)

    stock = run()
    operate(model)
    ours = run()
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[1], stock[1])


def test_pickle_of_the_whole_model():
    model = families.build("llama")
    operate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_close(step(again, plain()), step(model, plain()), FP32)


# ---- the loss in chunks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_chunked_loss_with_checkpoints_and_lora(reentrant):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = families.redraw(get_peft_model(families.build("llama"), lora))
    stock = step(model, padded())
    operate(model, loss="chunked")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_close(step(model, padded()), stock, 2 * FP32)


def test_the_chunked_loss_survives_deepcopy_and_pickle():
    model = families.build("llama")
    stock = step(model, plain())
    operate(model, loss="chunked")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_close(step(again, plain()), stock, 2 * FP32)
        operate(again, loss="chunked")
        assert_close(step(again, plain()), stock, 2 * FP32)
        unswag.remove_unswag_surgery(again)
        assert not any("_unswag" in vars(m) for m in again.modules())
        assert_close(step(again, plain()), stock, FP32)


def test_the_report_counts_logits_that_were_made_after_all():
    model = families.build("llama")
    report = operate(model, loss="chunked")
    model(**plain())
    assert not report.logits_made and "made in full" not in shown(report)
    with pytest.warns(UserWarning, match="made in full"):
        for _ in range(2):
            model(**plain()).logits.argmax(-1)
    assert report.logits_made == {"argmax": 2}
    assert "2 the logits made in full in training, by argmax 2" in shown(report)
    copied = copy.deepcopy(model)
    copied(**plain()).logits.argmax(-1)
    assert report.logits_made == {"argmax": 2}


# ---- what is left ----------------------------------------------------------------------------------------------------


def shown(report):
    console = Console(width=200, file=io.StringIO())
    console.print(report)
    return " ".join(console.file.getvalue().replace("│", " ").split())


def two_contexts():
    return contextlib.nullcontext(), contextlib.nullcontext()


def checkpoint_in_a_way_of_its_own(model):
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": two_contexts})


@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointing_that_is_left_is_in_the_report(when):
    model = families.build("llama")
    stock = step(model, plain())
    if when == "before":
        checkpoint_in_a_way_of_its_own(model)
        report = operate(model)
    else:
        report = operate(model)
        assert report.notes == [] and "checkpointing is left" not in shown(report)
        checkpoint_in_a_way_of_its_own(model)
        with pytest.warns(UserWarning, match="checkpointing is not changed"):
            step(model, plain())
    assert len(report.notes) == 1 and "it has a context_fn of its own" in report.notes[0]
    assert "left: checkpointing is not changed" in shown(report)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="unswag")
        assert_close(step(model, plain()), stock, FP32)  # said once
    assert len(report.notes) == 1


@pytest.mark.parametrize("where", ["", "model.layers.1.mlp"])
@pytest.mark.parametrize("again", [unswag.apply_unswag_surgery, unswag.remove_unswag_surgery])
def test_a_wrapper_put_over_ours_is_not_taken_away(where, again):
    model = families.build("llama")
    operate(model)
    module = model.get_submodule(where)
    mine = module.forward
    theirs = types.MethodType(lambda self, *args, **kwargs: mine(*args, **kwargs), module)
    module.forward = theirs
    before = state(model)
    with pytest.raises(RuntimeError, match=rf"{where or 'model'}.*forward was wrapped by .*test_surgery.*unwrap_model"):
        again(model)
    assert_untouched(model, before)
    module.forward = mine
    unswag.remove_unswag_surgery(model)
    assert not any(replaced(m) for m in model.modules())


def test_an_attention_chosen_after_the_surgery_stays():
    model = families.build("llama")
    operate(model)
    model.set_attn_implementation("eager")
    unswag.remove_unswag_surgery(model)
    assert model.config._attn_implementation == "eager"


def test_verify_false_trusts_no_module_that_others_patched():
    model = families.build("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(type(mlp).forward, mlp)
    theirs = mlp.forward
    report = operate(model, verify=False)
    assert counts(report)["gated_mlp"] == 1 and vars(mlp)["forward"] is theirs


def test_a_dry_run_that_cannot_be_done_says_why_and_nothing_else(capfd):
    """Shapes alone do not say which token goes to which expert: no bytes, and none of torch's tracebacks."""
    report = unswag.apply_unswag_surgery(families.build("mixtral", num_local_experts=4), verify=False)
    said = capfd.readouterr()
    assert report.bytes_per_token == (None, None) and said.out == "" and "Traceback" not in said.err
    assert "a run without data fails with" in report.unknown and "a run without data fails with" in " ".join(said.err.split())


@pytest.mark.parametrize("error", [BrokenPipeError, OSError])
def test_a_report_that_cannot_be_printed_is_returned(monkeypatch, error):
    class Full(io.StringIO):
        def write(self, text):
            raise error("nobody reads this")

    monkeypatch.setattr(sys, "stderr", Full())
    assert operate(families.build("llama")).patched
