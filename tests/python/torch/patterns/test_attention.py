"""Padded, packed and windowed batches give stock's results, and no layer keeps a mask."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import subprocess
import sys
import threading
import warnings

import families
import matrix
import pytest
import torch
from alone import Alone, released
from families import assert_close, ids, packed, padded, plain, step
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import unswag
from unswag.torch.patterns import attention
from unswag.torch.patterns.attention import Attention, leave_caches_out

TOLERANCE = 2e-6  # fp32, other orders of summation


def patched(model):
    assert Alone(Attention()).operate(model) == {}
    return model


def ours_runs(model, batch=None):
    """Whether a padded batch keeps no tokens x tokens, as it does under stock."""
    return not squares(saved_storages(model, batch or padded())[0], 40)


def saved_storages(model, batch):
    """{storage: tensor} of all that autograd keeps, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch).loss
    return list(kept.values()), loss


def squares(tensors, length):
    """Those that are tokens x tokens."""
    return [t for t in tensors if t.ndim >= 2 and t.shape[-1] == length and t.shape[-2] == length]


SPARSE = dict(
    num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=8, v_head_dim=8, index_topk=8,
    index_n_heads=4, index_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
    moe_intermediate_size=48,
)  # fmt: skip
BATCHES = {"plain": plain, "padded": padded, "packed": packed}


def examples():
    return {
        name: matrix.Example(lambda: families.build("llama"), lambda _, batch=batch: batch(), "")
        for name, batch in {"padded": padded, "packed": packed}.items()
    }


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2"])
def test_loss_and_gradients_equal_stock(family, batch):
    model = families.build(family)
    stock = step(model, batch())
    assert_close(step(patched(model), batch()), stock, TOLERANCE)


@pytest.mark.parametrize("batch", [padded, packed])
def test_bf16_equals_stock_up_to_its_rounding(batch):
    model = families.build("llama", torch.bfloat16)
    stock = step(model, batch())
    assert_close(step(patched(model), batch()), stock, 2e-2)


@pytest.mark.parametrize("batch", [padded, packed])
def test_autocast_equals_stock_up_to_its_rounding(batch):
    model = families.build("llama")
    with torch.autocast("cpu", torch.bfloat16):
        stock = step(model, batch())
        ours = step(patched(model), batch())
    assert_close(ours, stock, 2e-2)


def test_no_mask_is_kept_and_none_is_built():
    model = families.build("llama")
    for batch, length in ((padded(), 40), (packed(), 40)):
        assert squares(saved_storages(model, batch)[0], length), "stock keeps masks: the test can fail"
        assert not squares(saved_storages(patched(model), batch)[0], length)
        released(model)


@pytest.mark.parametrize("batch", [padded, packed])
def test_a_window_shorter_than_the_sequence_uses_one_boolean_mask(batch):
    model = families.build("mistral", sliding_window=8, num_hidden_layers=4)
    stock = step(model, batch())
    kept, _ = saved_storages(patched(model), batch())
    masks = squares(kept, 40)
    assert [m.dtype for m in masks] == [torch.bool]
    assert_close(step(model, batch()), stock, TOLERANCE)


def test_a_window_under_autocast():
    model = families.build("mistral", sliding_window=8)
    with torch.autocast("cpu", torch.bfloat16):
        stock = step(model, plain())
        ours = step(patched(model), plain())
    assert_close(ours, stock, 2e-2)


DROPPING = {"llama": dict(attention_dropout=0.3), "gpt2": dict(attn_pdrop=0.3, resid_pdrop=0.1)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("family", DROPPING)
def test_dropout_draws_what_stock_draws_and_keeps_no_squares(family, batch, checkpointing):
    """On the CPU: forward and backward of ours take as many draws from torch's generator as stock's, and the same."""
    model = families.build(family, **DROPPING[family])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def drawn(seed):
        torch.manual_seed(seed)
        return step(model, batch()), torch.get_rng_state()

    stock, state = drawn(5)
    other, _ = drawn(6)
    assert abs(other[0] - stock[0]) > 100 * TOLERANCE  # the seed matters: the test can fail
    if not checkpointing:
        assert len([t for t in squares(saved_storages(model, batch())[0], 40) if t.numel() > 2 * 40 * 40]) >= 4
    patched(model)
    ours, after = drawn(5)
    assert_close(ours, stock, TOLERANCE)
    assert torch.equal(after, state)
    assert all(t.dtype == torch.bool for t in squares(saved_storages(model, batch())[0], 40))


def test_two_forwards_with_dropout_before_their_backwards():
    """Each draws again what it drew, whatever was drawn since."""
    model = families.build("llama", attention_dropout=0.3)

    def both():
        torch.manual_seed(5)
        model.zero_grad()
        losses = [model(**batch()).loss for batch in (padded, plain)]
        torch.rand(7)
        sum(losses).backward()
        return losses[0].detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    stock = both()
    patched(model)
    assert_close(both(), stock, TOLERANCE)


def test_packed_equals_separate():
    """Each sequence of a pack alone, the losses weighted by their labels: the same loss and gradients."""
    model = patched(families.build("llama"))
    lengths = (13, 20, 7)
    one = packed(lengths)
    labels = one["labels"].clone()
    starts = [0, 13, 33]
    labels[0, starts] = -100  # the first token of a sequence is not predicted from the one before
    together = step(model, one | {"labels": labels})
    model.zero_grad(set_to_none=True)
    total = 0.0
    for start, n in zip(starts, lengths, strict=True):
        part = one["input_ids"][:, start : start + n]
        loss = model(input_ids=part, labels=part).loss * (n - 1) / (sum(lengths) - 3)
        loss.backward()
        total += loss.detach()
    assert_close((total, {n: p.grad for n, p in model.named_parameters()}), together, TOLERANCE)


def test_padded_equals_unpadded():
    model = patched(families.build("llama"))
    batch = padded()
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][1, 7] = -100
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    logits = model(**batch).logits
    for row, real in ((0, slice(0, 30)), (1, slice(7, 40))):
        alone = model(input_ids=batch["input_ids"][row : row + 1, real]).logits
        torch.testing.assert_close(logits[row : row + 1, real], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("batch", [padded, packed])
def test_under_checkpointing(batch, reentrant):
    model = families.build("llama")
    stock = step(model, batch())
    patched(model).gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_close(step(model, batch()), stock, TOLERANCE)


def test_evaluation_and_generation_equal_stock():
    model = families.build("llama").eval()
    batch = {k: padded()[k] for k in ("input_ids", "attention_mask")}

    def run():
        with torch.no_grad():
            return model(**batch).logits, model.generate(**batch, max_new_tokens=5, do_sample=False)

    stock = run()
    for ours, theirs in zip((patched(model), run())[1], stock, strict=True):
        assert torch.equal(ours, theirs)


def test_gaps_in_the_padding():
    model = families.build("llama")
    batch = padded()
    batch["attention_mask"][0, 5] = 0
    stock = step(model, batch)
    assert_close(step(patched(model), batch), stock, TOLERANCE)


def test_a_row_of_padding_alone_gives_finite_gradients():
    model = patched(families.build("llama"))
    batch = padded()
    batch["attention_mask"][1] = 0
    loss, gradients = step(model, batch)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values())


def test_soft_cap_is_left_with_a_word():
    ((_, reason),) = Alone(Attention()).tried(families.build("gemma2"))
    assert "soft cap (50)" in reason


def test_code_that_asks_for_sdpa_by_name_is_left():
    """DeepSeek's sparse attention folds the keys it chose into the mask under the names "eager" and "sdpa" alone."""
    model = families.build("deepseek_v32", **SPARSE)
    ((_, reason),) = Alone(Attention()).tried(model)
    assert "DeepseekV32Attention.forward" in reason and "sdpa" in reason
    stock = step(model, plain())
    unswag.apply_unswag_surgery(model, loss="stock")
    assert_close(step(model, plain()), stock, TOLERANCE)


def test_which_code_asks_for_sdpa():
    from transformers.models.falcon import modeling_falcon
    from transformers.models.llama import modeling_llama

    assert attention.asks_for_sdpa(modeling_falcon.__name__) == "FalconAttention.forward"
    assert attention.asks_for_sdpa(modeling_llama.__name__) is None
    assert attention.asks_for_sdpa("no.such.module") is None


def test_models_without_transformers_have_no_candidates():
    assert not list(Attention().find(nn.Sequential(nn.Linear(3, 3))))


def test_a_linear_implementation_is_left():
    model = families.build("llama")
    model.config._attn_implementation = "flex_attention"
    (found,) = Attention().find(model)
    assert "already needs memory linear in the sequence" in Attention().probe(found)


# ---- the choice, in no shared object ----------------------------------------------------------------------------------------


def test_the_config_is_stocks_wherever_somebody_looks(tmp_path):
    """Also from a hook, in the midst of the forward."""
    model = families.build("llama")
    config, stock = model.config, vars(model.config).copy()
    unswag.apply_unswag_surgery(model)
    looked = []

    def look(*_):
        holders = [m for m in model.modules() if "config" in vars(m)]
        assert len(holders) > 4 and all(m.config is config for m in holders)
        assert config._attn_implementation == "sdpa" and vars(config) == stock
        model.config.save_pretrained(tmp_path)
        assert "unswag" not in (tmp_path / "config.json").read_text() + model.config.to_json_string()
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            assert type(pickle.loads(pickle.dumps(model.config, protocol))) is type(config)
        assert type(copy.deepcopy(model.config)) is type(config)
        assert type(type(model)(model.config).config) is type(config)
        looked.append(True)

    for module in (model.model.layers[0], model.model.layers[0].self_attn, model.model.embed_tokens, model.model):
        module.register_forward_hook(look)
    look()
    assert ours_runs(model) and len(looked) == 5
    unswag.remove_unswag_surgery(model)
    look()
    assert not ours_runs(model)


def test_a_model_that_reads_its_config_elsewhere_finds_stocks():
    from transformers import LlamaForCausalLM

    class Mine(LlamaForCausalLM):
        __module__ = "elsewhere"  # this file has what `asks_for_sdpa` looks for

        def forward(self, *args, **kwargs):
            self.seen = self.config
            return super().forward(*args, **kwargs)

        def teacher(self):
            return LlamaForCausalLM(self.config)

    model = families.redraw(Mine(families.build("llama").config))
    unswag.apply_unswag_surgery(model)
    assert ours_runs(model) and model.seen is model.config and type(model.teacher().config) is type(model.config)


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_another_model_of_the_config_is_what_it_was(way):
    """A teacher made from the student's config, run on its own, in a hook of the student's and in another thread."""
    student = families.build("llama", attn_implementation=way)
    teacher = families.redraw(type(student)(student.config)).eval()
    ask = dict(padded(), output_attentions=True) if way == "eager" else padded()
    answers = []

    def answer(*_):
        with torch.no_grad():
            answers.append(teacher(**ask))

    answer()
    stock = step(student, padded())
    unswag.apply_unswag_surgery(student)
    answer()
    student.model.layers[0].register_forward_hook(answer)
    assert_close(step(student, padded()), stock, TOLERANCE * 3)
    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()
    assert len(answers) == 4
    for other in answers[1:]:
        assert torch.equal(other.logits, answers[0].logits)
        assert all(map(torch.equal, other.attentions or (), answers[0].attentions or ()))


def test_two_models_of_one_config_in_one():
    """Both read it: both are operated, with cross-attention too. Neither takes use_cache from who calls them."""
    from transformers import BertConfig, BertLMHeadModel, BertModel

    config = BertConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, is_decoder=True,
        add_cross_attention=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = BertModel(config), BertLMHeadModel(config)

        def forward(self, input_ids, labels, attention_mask):
            hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
            return self.decoder(
                input_ids, labels=labels, attention_mask=attention_mask, encoder_hidden_states=hidden,
                encoder_attention_mask=attention_mask,
            )  # fmt: skip

    torch.manual_seed(0)
    model = families.redraw(Both())
    loss, gradients = step(model, padded())
    unswag.apply_unswag_surgery(model)
    assert model.encoder.config is model.decoder.config is config and ours_runs(model)
    ours = step(model, padded())
    large = {name: g for name, g in gradients.items() if ".key.bias" not in name}  # theirs are zero but for rounding
    assert_close((ours[0], {name: ours[1][name] for name in large}), (loss, large), 1e-5)


def test_a_model_for_images_and_text():
    """Each part by its own config, which the whole one holds; packed rows reach the part that has a cache."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**families.SIZES), image_token_index=5,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    model = families.redraw(LlavaForConditionalGeneration(config))
    prompt = ids(2, 40).masked_fill(ids(2, 40) == 5, 6)
    prompt[:, 8:12] = 5
    images = {"input_ids": prompt, "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    batch = images | {"labels": prompt, "attention_mask": padded()["attention_mask"]}
    rows = images | {"position_ids": packs()["position_ids"]}
    stock = step(model, batch)
    with torch.no_grad():
        apart = model.eval()(**rows, use_cache=False).logits
    unswag.apply_unswag_surgery(model.train())
    assert model.config is config and config.text_config is model.model.language_model.config
    assert {c._attn_implementation for c in (config, config.text_config, config.vision_config)} == {"sdpa"}
    assert ours_runs(model, batch)
    ours = step(model, batch)
    small = [name for name, g in stock[1].items() if g.norm() < 1e-5]  # zero but for rounding
    for _, gradients in (stock, ours):
        for name in small:
            del gradients[name]
    assert_close(ours, stock, 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**rows).logits, apart, atol=2e-5, rtol=1e-4)


def test_an_attention_chosen_later_wins_and_can_be_taken_back():
    model, stock = (families.build("llama") for _ in range(2))
    unswag.apply_unswag_surgery(model)
    for m in (model, stock):
        m.set_attn_implementation("eager")
    ours, theirs = (m(**padded(), output_attentions=True) for m in (model, stock))
    assert len(ours.attentions) == 2
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert not ours_runs(model)
    model.set_attn_implementation("sdpa")
    assert ours_runs(model)
    model.set_attn_implementation("eager")
    unswag.remove_unswag_surgery(model)
    assert model.config._attn_implementation == "eager" and len(model(**padded(), output_attentions=True).attentions) == 2


def test_an_attention_registered_later_wins():
    """Under the name that the model reads, as a function and as its mask."""
    model, stock = (families.build("llama") for _ in range(2))
    unswag.apply_unswag_surgery(model)
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        called = []

        def other(*args, function=registry["sdpa"], called=called, **kwargs):
            called.append(function)
            return function(*args, **kwargs)

        was = registry["sdpa"]
        registry["sdpa"] = other
        try:
            model(**padded())
            ours, called[:] = len(called), []
            stock(**padded())
            assert ours == len(called) > 0
        finally:
            registry["sdpa"] = was
    assert ours_runs(model)


def test_copies_choose_for_themselves():
    model = families.build("llama")
    unswag.apply_unswag_surgery(model)
    deep, shallow, replica = copy.deepcopy(model), copy.copy(model), model._replicate_for_data_parallel()
    assert shallow.config is replica.config is model.config and deep.config is not model.config
    assert vars(deep.model.layers[0].self_attn)["config"] is deep.config and ours_runs(deep) and ours_runs(shallow)
    deep.set_attn_implementation("eager")
    assert not ours_runs(deep) and ours_runs(model)
    unswag.remove_unswag_surgery(deep)
    assert ours_runs(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_is_recomputed_as_it_was_computed_in_any_thread(reentrant):
    model = families.build("llama")
    stock = step(model, packed())
    unswag.apply_unswag_surgery(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.zero_grad(set_to_none=True)
    loss = model(**packed()).loss
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert_close((loss.detach(), gradients), stock, 3 * TOLERANCE)


def test_a_compiled_model_runs_without_a_word():
    """In one graph padded, and packed if use_cache says so; in more where the positions have to be looked at: packed rows see
    that they are, others keep their cache."""
    model = families.build("llama").eval()
    mask = {k: padded()[k] for k in ("input_ids", "attention_mask")}
    plain = {"input_ids": ids(2, 40), "position_ids": torch.arange(40)[None]}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        stock = [model(**batch, use_cache=False).logits for batch in (mask, packs(), packs(), plain)]
        leave_caches_out(patched(model))
        whole, compiled = (torch.compile(model, backend="eager", fullgraph=f) for f in (True, False))
        ours = [whole(**mask), whole(**packs(), use_cache=False), compiled(**packs()), compiled(**plain)]
        for output, logits in zip(ours, stock, strict=True):
            torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-4)
        assert ours[2].past_key_values is None and ours[3].past_key_values is not None


OTHER = """
import pickle, sys, torch
sys.modules["unswag"] = None
for data in pickle.load(sys.stdin.buffer):
    found = pickle.loads(data)
    if not isinstance(found, torch.nn.Module):
        from transformers import AutoModelForCausalLM
        found = AutoModelForCausalLM.from_config(found)
    ids = torch.arange(5)[None]
    found(input_ids=ids, labels=ids).loss.backward()
    print("right", type(found).__name__)
"""


def test_pickles_open_where_unswag_is_not():
    from peft import LoraConfig, get_peft_model

    model, other = families.build("llama"), families.build("llama")
    adapted = get_peft_model(other, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    for m in (model, adapted):
        unswag.apply_unswag_surgery(m)
    data = [pickle.dumps(it, protocol) for protocol in (2, 5) for it in (model, model.config, model.model.config, adapted)]
    assert not any(b"unswag" in d for d in data)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", OTHER], input=pickle.dumps(data), capture_output=True)
    assert done.stdout.count(b"right") == len(data), done.stderr.decode()[-2000:]


# ---- models loaded as eager -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_loaded_as_eager_gives_its_attentions(checkpointing):
    """To callers, to a loss on them, to hooks, and if the config asks for them later."""
    stock = families.build("llama", attn_implementation="eager")
    model = copy.deepcopy(stock)
    report = unswag.apply_unswag_surgery(model)
    (reason,) = [why for _, why in report.skipped if why.startswith("attention")]
    assert "eager" in reason and "attention weights" in reason and "set_attn_implementation('sdpa')" in reason
    kept = {stock: [], model: []}
    for m in (stock, model):
        if checkpointing:
            m.gradient_checkpointing_enable({"use_reentrant": False})
        m.model.layers[1].self_attn.register_forward_hook(lambda _, __, output, m=m: kept[m].append(output[1]))
        m.config.output_attentions = True
        output = m(**padded())
        assert m(**packed(), output_attentions=True).attentions[0].shape == (1, 4, 40, 40)
        (output.loss + sum(a.pow(2).mean() for a in output.attentions)).backward()
    assert len(kept[model]) == (3 if checkpointing else 2)
    torch.testing.assert_close(kept[model], kept[stock], atol=1e-6, rtol=1e-5)
    for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert families.distance(p.grad, q.grad) < 1e-5, name


# ---- packed rows in every mode ----------------------------------------------------------------------------------------------


def packs():
    """Two packed rows of other lengths, sequences of one token among them. Without labels and use_cache."""
    positions = [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((13, 20, 7), (1, 1, 38))]
    return {"input_ids": ids(2, 40), "position_ids": torch.stack(positions)}


MODES = {
    "train": (True, contextlib.nullcontext), "train, no_grad": (True, torch.no_grad), "eval": (False, contextlib.nullcontext),
    "no_grad": (False, torch.no_grad), "inference_mode": (False, torch.inference_mode),
}  # fmt: skip
PACKED_FAMILIES = {
    "llama": {}, "window": dict(family="mistral", sliding_window=9), "soft cap": dict(family="gemma2"),
    "gpt2": dict(family="gpt2"), "eager": dict(attn_implementation="eager"), "bf16": dict(dtype=torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKED_FAMILIES)
def test_sequences_of_packed_rows_do_not_see_each_other_in_any_mode(kind):
    """With and without labels, whatever use_cache says, of the model and of its base model."""
    model = families.build(**PACKED_FAMILIES[kind])
    tolerance = dict(atol=0.1, rtol=0.1) if kind == "bf16" else dict(atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        stock = model(**packs(), labels=ids(2, 40), use_cache=False)
        hidden = model.base_model(**packs(), use_cache=False).last_hidden_state
        seeing = model.eval()(**packs()).logits
    assert (seeing - stock.logits).abs().max() > 0.2  # stock's default: the test can fail
    unswag.apply_unswag_surgery(model, loss="stock")
    for train, mode in MODES.values():
        model.train(train)
        for given in ({}, {"use_cache": None}, {"use_cache": False}, {"use_cache": True}):
            told = pytest.warns(UserWarning, match="use_cache=True") if given.get("use_cache") else contextlib.nullcontext()
            with mode(), told:
                torch.testing.assert_close(model(**packs(), **given).logits, stock.logits, **tolerance)
                loss = model(**packs(), labels=ids(2, 40), **given).loss
                torch.testing.assert_close(loss, stock.loss, atol=1e-2 if kind == "bf16" else 1e-5, rtol=1e-5)
                base = model.base_model(**packs(), **given)
                torch.testing.assert_close(base.last_hidden_state, hidden, **tolerance)
                assert base.past_key_values is None
    positions = packs()
    with torch.no_grad():
        names = list(inspect.signature(model.base_model.forward).parameters)
        by_place = [positions.get(name) for name in names[: names.index("position_ids") + 1]]
        torch.testing.assert_close(model.base_model(*by_place).last_hidden_state, hidden, **tolerance)


@pytest.mark.parametrize("reentrant", [False, True])
def test_packed_rows_of_a_checkpointed_model_without_labels(reentrant):
    """A loss of one's own; the model's cache would be taken away only after its mask is made."""
    model = families.build("llama")

    def grown(**given):
        model.zero_grad(set_to_none=True)
        loss = model.base_model(**packs(), **given).last_hidden_state.pow(2).mean()
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    stock = grown(use_cache=False)
    unswag.apply_unswag_surgery(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_close(grown(), stock, 1e-5)


def test_packed_rows_of_a_peft_model():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(families.build("llama"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        stock = model(**packs(), use_cache=False).logits
        unswag.apply_unswag_surgery(model)
        torch.testing.assert_close(model(**packs()).logits, stock, atol=2e-5, rtol=1e-4)


def test_who_has_no_packed_rows_keeps_the_cache_and_what_it_makes():
    """Positions that do not start again, a mask, a cache of one's own; and generation, which brings all three."""
    model = families.build("llama").eval()
    cases = {
        "positions": {"position_ids": torch.arange(3, 43)[None]},
        "a gap": {"position_ids": torch.cat([torch.arange(30), torch.arange(50, 60)])[None]},
        "mask": {"position_ids": packs()["position_ids"], "attention_mask": torch.ones(2, 40, dtype=torch.long)},
        "asked for": {"use_cache": True},
    }
    prompts = [{"input_ids": ids(2, 9)}, {k: padded()[k] for k in ("input_ids", "attention_mask")}]

    def run():
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            logits = []
            for case in cases.values():
                output = model(input_ids=ids(2, 40), **case)
                again = model(input_ids=ids(2, 1), past_key_values=output.past_key_values, position_ids=torch.tensor([[0]]))
                logits += [output.logits, again.logits]
            made = [
                model.generate(**p, use_cache=cache, max_new_tokens=5, do_sample=False)
                for p in prompts
                for cache in (True, False)
            ]
        return logits, made

    stock = run()
    unswag.apply_unswag_surgery(model)
    ours = run()
    torch.testing.assert_close(ours[0], stock[0], atol=2e-5, rtol=1e-4)
    assert all(map(torch.equal, ours[1], stock[1]))
