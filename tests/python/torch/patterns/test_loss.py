"""Lazy logits in real model families: same loss and gradients as stock, logits only when somebody looks."""

import copy
import os
import warnings
from contextlib import contextmanager

import matrix
import pytest
import torch
from alone import Alone, released
from bench.small import small_config, small_model
from odd_weights import halved
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainingArguments,
)
from transformers.loss import loss_utils

from unswag.torch.lazy_logits import LazyLogits, inside_forward
from unswag.torch.loss import keep_logits
from unswag.torch.patterns.loss import Loss, materialised
from unswag.torch.patterns.probing import sealed

pytestmark = pytest.mark.native

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama padded vocabulary": {"vocab_size": 128},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0},
    "qwen3": {},
    "mistral": {},
    "phi3": {},
    "qwen2_moe": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "phi": {"resid_pdrop": 0},  # a head with a bias
    "mamba": {"state_size": 4},
}


def make(family="llama", dtype=torch.float32, **changes):
    config = AutoConfig.for_model(family.split()[0], **(TINY | FAMILIES.get(family, {}) | changes))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def patch(model):
    """Applies the pattern; returns the reasons of what it left."""
    return [*Alone(Loss()).operate(model).values()]


def batch(seed=0, rows=2, length=17):
    tokens = torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[0, :5] = -100
    return {"input_ids": tokens, "labels": labels}


def step(model, **inputs):
    """(outputs, gradients by name) of one forward and backward."""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, want, tolerance=1e-6):
    assert got.keys() == want.keys()
    largest = max(g.norm() for g in want.values())
    for name, g in want.items():  # a gradient that is zero but for rounding has no digits of its own
        assert (got[name] - g).norm() <= tolerance * max(g.norm(), 1e-3 * largest), name


@contextmanager
def lazy(model, **inputs):
    """The lazy logits of a forward that has labels and has not ended."""
    with warnings.catch_warnings(), inside_forward(model, labels=True):
        warnings.simplefilter("ignore")
        logits = model(**{k: v for k, v in (inputs or batch()).items() if k != "labels"}).logits
        assert isinstance(logits, LazyLogits)
        yield logits


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="unswag")
        yield


def examples():
    halves = (torch.bfloat16, torch.float16)  # of float64 the loss is float64; stock casts the logits to float32
    return {"Llama's": matrix.Example(make, lambda _: batch(), "lm_head", casts=halves)}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_stock(family):
    model = make(family)
    kwargs = batch() | {"num_items_in_batch": torch.tensor(23)}
    stock, want = step(model, **kwargs)
    assert patch(model) == []
    with no_warnings():
        ours, got = step(model, **kwargs)
    assert isinstance(ours.logits, LazyLogits) and not materialised(model)
    assert abs(ours.loss - stock.loss) < 2e-6
    assert_close(got, want)
    with pytest.warns(UserWarning, match="made in full"):
        assert torch.equal(ours.logits, stock.logits)
    assert ours.logits.shape == stock.logits.shape and ours.logits.dtype == stock.logits.dtype


OWN_LOSS = {  # they call F.cross_entropy on rows of logits themselves
    "bert": AutoModelForMaskedLM,
    "roberta": AutoModelForMaskedLM,
    "modernbert": AutoModelForMaskedLM,
    "bart": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
}


@pytest.mark.parametrize("family", OWN_LOSS)
def test_models_that_make_the_loss_themselves(family):
    model = small_model(small_config(family), OWN_LOSS[family])
    stock, want = step(model, **batch())
    assert patch(model) == []
    with no_warnings():
        ours, got = step(model, **batch())
    assert not materialised(model)
    assert ours.loss.dtype == stock.loss.dtype and abs(ours.loss - stock.loss) < 2e-6
    assert_close(got, want, 1e-5)  # biases of keys have no gradient but for rounding


@pytest.mark.parametrize("family", ["llama", "llama tied", "gemma2", "phi"])
def test_gradients_against_float64(family):
    """The truth is float64 with a float64 loss: Hugging Face casts the logits to float32 even then."""
    model = make(family)
    inputs = batch(rows=4, length=33)
    reference = copy.deepcopy(model).double()
    out = reference(input_ids=inputs["input_ids"])
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    loss.backward()
    truth = {name: p.grad for name, p in reference.named_parameters()}
    stock, theirs = step(model, **inputs)
    patch(model)
    ours, mine = step(model, **inputs)
    assert abs(ours.loss.double() - loss) <= abs(stock.loss.double() - loss) + 1e-6
    for name, want in truth.items():
        scale = want.norm()
        assert (mine[name] - want).norm() <= 1.25 * (theirs[name] - want).norm() + 1e-6 * scale, name


def test_float64_model_gets_a_float64_loss():
    model = make(dtype=torch.float64)
    inputs = batch()
    logits = model(input_ids=inputs["input_ids"]).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    patch(model)
    loss = model(**inputs).loss
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("part", ["head", "body", "bias"])
def test_frozen_parts(part):
    model = make("phi")
    for name, p in model.named_parameters():
        p.requires_grad_({"head": "lm_head" not in name, "body": "lm_head" in name, "bias": name != "lm_head.bias"}[part])
    _, want = step(model, **batch())
    patch(model)
    _, got = step(model, **batch())
    assert_close(got, want)


def test_shift_labels_and_ignore_index():
    model = make()
    inputs = batch()
    shifted = torch.randint(0, 99, inputs["labels"].shape)
    shifted[:, 3] = 7
    kwargs = inputs | {"shift_labels": shifted, "ignore_index": 7}
    stock, want = step(model, **kwargs)
    patch(model)
    with no_warnings():
        ours, got = step(model, **kwargs)
    assert abs(ours.loss - stock.loss) < 2e-6
    assert_close(got, want)


def test_all_labels_ignored():
    model = make()
    patch(model)
    inputs = batch()
    inputs["labels"].fill_(-100)
    assert model(**inputs).loss.isnan()
    out, gradients = step(model, **inputs, num_items_in_batch=5)
    assert out.loss == 0 and not any(g.any() for g in gradients.values())


def test_gradient_accumulation_over_an_uneven_window():
    model = make()
    inputs = batch(rows=5)
    items = (inputs["labels"][:, 1:] != -100).sum()
    _, want = step(model, **inputs, num_items_in_batch=items)
    patch(model)
    model.zero_grad()
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        model(**{k: v[rows] for k, v in inputs.items()}, num_items_in_batch=items).loss.backward()
    assert_close({n: p.grad for n, p in model.named_parameters()}, want, 2e-6)


@pytest.mark.parametrize(
    "place", ["mapping", "fixed_cross_entropy", "F.cross_entropy", "F.linear", "loss_type", "loss_function"]
)
def test_a_loss_that_somebody_replaces_later_is_theirs(place, monkeypatch):
    """Where transformers or PyTorch look it up. What is replaced triples what it gives, so that it cannot be overlooked."""
    model = make()
    stock = copy.deepcopy(model)
    assert patch(model) == []

    def tripled(function):
        return lambda *args, **kwargs: 3 * function(*args, **kwargs)

    before, _ = step(stock, **batch())
    if place == "mapping":
        monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", tripled(loss_utils.ForCausalLMLoss))
    elif place == "fixed_cross_entropy":
        monkeypatch.setattr(loss_utils, "fixed_cross_entropy", tripled(loss_utils.fixed_cross_entropy))
    elif place.startswith("F."):
        monkeypatch.setattr(F, place[2:], tripled(getattr(F, place[2:])))
    for m in (stock, model):
        if place == "loss_type":
            m.loss_type = "ForMaskedLM"
        elif place == "loss_function":
            m.loss_function = tripled(loss_utils.ForCausalLMLoss)
    (want, theirs), (got, ours) = step(stock, **batch()), step(model, **batch())
    assert abs(want.loss - before.loss) > 1e-3 and abs(got.loss - want.loss) < 1e-5
    assert_close(ours, theirs, 1e-5)
    monkeypatch.undo()
    if place not in ("loss_type", "loss_function"):
        with no_warnings():
            assert abs(step(model, **batch())[0].loss - before.loss) < 2e-6


@pytest.mark.parametrize(
    "items", [7, torch.tensor(7), torch.tensor([7]), torch.tensor([3, 4])], ids=["int", "0-d", "one", "two"]
)
def test_num_items_in_batch_of_any_shape(items):
    model = make()
    want = model(**batch(), num_items_in_batch=items).loss
    assert patch(model) == []
    torch.testing.assert_close(model(**batch(), num_items_in_batch=items).loss, want, atol=2e-6, rtol=1e-6)


def test_labels_of_a_dtype_that_stock_refuses_are_refused():
    model, narrow = make(), batch()["labels"].int()
    assert patch(model) == []
    with pytest.raises(RuntimeError, match=r"expected target dtype|expected scalar type Long"):
        model(input_ids=batch()["input_ids"], labels=narrow)


def test_label_out_of_range_names_batch_and_position():
    model = make()
    patch(model)
    inputs = batch()
    inputs["labels"][1, 6] = 99
    with pytest.raises(ValueError, match=r"labels\[1, 6\] is 99, outside \[0, 99\)"):
        model(**inputs)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_autocast(family):
    model = make(family)
    inputs = batch()

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(**inputs)
        model.zero_grad()
        out.loss.backward()
        return out, {n: p.grad.clone() for n, p in model.named_parameters()}

    stock, want = run()
    patch(model)
    with no_warnings():
        ours, got = run()
    assert ours.loss.dtype == torch.float32 and abs(ours.loss - stock.loss) < 0.02
    assert_close(got, want, 0.03)
    with pytest.warns(UserWarning):
        assert torch.equal(ours.logits, stock.logits)  # outside autocast, as inside


def test_bfloat16_model():
    model = make(dtype=torch.bfloat16)
    stock, want = step(model, **batch())
    patch(model)
    ours, got = step(model, **batch())
    assert abs(ours.loss - stock.loss) < 1e-5
    assert_close(got, want, 0.02)


# ---- when the logits are real ---------------------------------------------------------------------------------------------


def test_plain_logits_where_no_training_step_runs():
    model = make()
    patch(model)
    inputs = batch()
    real = lambda: type(model(**inputs).logits) is torch.Tensor  # noqa: E731
    with torch.no_grad():
        assert real()
    with keep_logits():
        assert real()
    model.eval()
    assert real()
    assert model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False).shape[1] == 20
    model.train().requires_grad_(False)
    assert real()
    model.requires_grad_(True)
    assert not real()


def test_any_other_use_makes_the_logits_and_says_so():
    model = make("gemma2")
    inputs = batch()
    stock = model(**inputs)
    patch(model)
    uses = {
        "log_softmax": lambda z: torch.log_softmax(z, -1),
        "argmax": lambda z: z.argmax(-1),
        "add": lambda z: z + 1,
        "__rsub__": lambda z: 1 - z,
        "__getitem__": lambda z: z[0, 0, 3:7],
        "cat": lambda z: torch.cat([z, z]),
        "view": lambda z: z.view(99, -1),
        "cross_entropy": lambda z: F.cross_entropy(z.view(-1, 99), torch.zeros(34, 99)),  # probabilities
        "where": lambda z: torch.where(torch.tensor(True), z, 0.0),
    }
    for name, use in uses.items():
        with lazy(model) as logits:
            torch.testing.assert_close(use(logits), use(stock.logits))
            assert type(logits) is torch.Tensor
        assert materialised(model)[name] == 1, materialised(model)
        out = model(**inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(use(out.logits), use(stock.logits))
    assert sum(materialised(model).values()) == 2 * len(uses)


def test_chains_that_stay_lazy_are_right():
    model = make()
    inputs = batch()
    plain = model(**inputs).logits
    patch(model)
    chains = [
        lambda z: 3 * torch.tanh(z / 3),
        lambda z: (-3 * (z * 2).tanh()) / 2.0,
        lambda z: torch.mul(z.float(), 0.25).contiguous().to(z.device),
        lambda z: torch.div(z, 4)[:, 2:, :],
        lambda z: z[..., 1:-1, :].to(torch.float64),
        lambda z: z[:, 3:5],
        lambda z: z[..., :50],
        lambda z: z[1:],
        lambda z: z.view(-1, 99),
        lambda z: (z / 2).reshape(torch.Size((34, 99))).float(),
        lambda z: z[:, :-1, :].contiguous().view(-1, 99),
        lambda z: z[..., :50].view(34, 50),
    ]
    for i, chain in enumerate(chains):
        with lazy(model, **inputs) as whole:
            logits, want = chain(whole), chain(plain)
            assert isinstance(logits, LazyLogits) and logits.shape == want.shape and logits.dtype == want.dtype, i
            assert logits.stride() == want.stride() and logits.requires_grad, i
            labels = torch.randint(0, want.shape[-1], want.shape[:-1])
            truth = F.cross_entropy(want.flatten(0, -2), labels.flatten())
            got = logits.cross_entropy(labels)
        torch.testing.assert_close(got.double(), truth.double(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            torch.autograd.grad(got, model.lm_head.weight), torch.autograd.grad(truth, model.lm_head.weight, retain_graph=True)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(logits.clone(), want)


@pytest.mark.parametrize("chain", [lambda z: z.tanh().tanh(), lambda z: z.tanh() * 0], ids=["tanh twice", "times 0"])
def test_chains_that_the_chunks_cannot_do(chain):
    model = make()
    patch(model)
    with lazy(model) as whole:
        logits = chain(whole)
        assert isinstance(logits, LazyLogits) and logits.cross_entropy(batch()["labels"]) is None
        model.loss_function(logits, batch()["labels"], 99)
        assert type(whole) is type(logits) is torch.Tensor


CALLS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "each": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1, "ignore_index": 5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("how", CALLS)
def test_cross_entropy_of_rows_is_stocks(how, autocast, dtype):
    """In value, gradient and dtype; the logits are not made."""
    model = make(dtype=dtype)
    inputs = batch()
    labels = inputs["labels"][:, 1:].flatten()
    labels[-3:] = 5
    labels = labels.where(labels >= 0, CALLS[how].get("ignore_index", -100))

    def run():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), inside_forward(model, labels=True):
            logits = model(input_ids=inputs["input_ids"]).logits[:, :-1, :].contiguous()
            loss = nn.CrossEntropyLoss(**CALLS[how])(logits.view(-1, 99), labels)
        loss.float().sum().backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    stock, want = run()
    patch(model)
    ours, got = run()
    assert not materialised(model)
    rounding = 1e-6 if dtype == torch.float32 and not autocast else 0.03
    torch.testing.assert_close(ours, stock, rtol=rounding, atol=rounding)  # dtype and shape too
    assert_close(got, want, 4 * rounding)


@pytest.mark.parametrize("argument", ["weight", "3-d", "probabilities", "reduce"])
def test_cross_entropy_that_the_chunks_cannot_do(argument):
    model = make()
    inputs = batch()
    rows = lambda logits: logits.view(-1, 99)  # noqa: E731
    labels = torch.arange(34) % 99
    use = {
        "weight": lambda z: F.cross_entropy(rows(z), labels, weight=torch.arange(99.0)),
        "3-d": lambda z: F.cross_entropy(z, torch.arange(2 * 99).view(2, 99) % 17),
        "probabilities": lambda z: F.cross_entropy(rows(z), torch.full((34, 99), 1 / 99)),
        "reduce": lambda z: F.cross_entropy(rows(z), labels, reduce=False),
    }[argument]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = use(model(**inputs).logits)
        patch(model)
        with lazy(model) as logits:
            got = use(logits)
    torch.testing.assert_close(got, want)
    assert materialised(model) == {"cross_entropy": 1}


def test_each_rows_loss_of_a_called_head_needs_its_logits():
    model = make()
    model.lm_head = Halved(model.lm_head)
    patch(model)
    labels = torch.arange(34) % 99
    with lazy(model) as logits:
        F.cross_entropy(logits.view(-1, 99), labels, reduction="none")
    assert materialised(model) == {"cross_entropy": 1}


class Halved(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.out_features = inner, inner.out_features

    def forward(self, x):
        return self.inner(x) / 2


def test_rows_of_stale_logits_are_as_stale():
    model = make()
    patch(model)
    for rows in (lambda z: z.view(-1, 99), lambda z: z[:, :-1].reshape(-1, 99)):
        with pytest.raises(RuntimeError, match="changed in place"), lazy(model) as logits:
            stale = rows(logits)
            with torch.no_grad():
                model.lm_head.weight.add_(1)
            with pytest.raises(RuntimeError, match="changed in place"):
                F.cross_entropy(stale, torch.zeros(stale.shape[0], dtype=torch.long))


def test_a_slice_of_stale_logits_is_as_stale():
    model = make()
    patch(model)
    out = model(**batch())
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.logits[:, 1:].argmax(-1)
    with pytest.raises(RuntimeError, match="changed in place"):
        model.loss_function(out.logits, batch()["labels"], 99)


def test_the_loss_outside_autocast_is_that_of_its_forward():
    model = make()
    patch(model)
    labels = batch()["labels"]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch())
    assert torch.equal(model.loss_function(out.logits, labels, 99), out.loss)


def test_another_ignore_index_and_a_division_by_zero():
    model = make()
    logits = model(**batch()).logits
    labels = batch()["labels"].where(batch()["labels"] != -100, 7)
    want = model.loss_function(logits, labels, 99, ignore_index=7)
    patch(model)
    with lazy(model) as logits, no_warnings():
        torch.testing.assert_close(model.loss_function(logits, labels, 99, ignore_index=7), want)
    with lazy(model) as logits:
        assert (logits / 0).cross_entropy(labels) is None


def test_a_slice_of_classes_keeps_its_bias_and_its_head():
    for family, odd in (("phi", False), ("phi", True)):
        model = make(family)
        with torch.no_grad():
            model.lm_head.bias.normal_()
        if odd:
            model.lm_head = Halved(model.lm_head)
        logits = model(**batch()).logits[..., :50]
        labels = batch()["labels"] % 50
        want = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        patch(model)
        with lazy(model) as logits:
            torch.testing.assert_close(logits[..., :50].cross_entropy(labels), want)


def test_keep_logits_ends():
    model = make()
    patch(model)
    with keep_logits():
        assert type(model(**batch()).logits) is torch.Tensor
    assert isinstance(model(**batch()).logits, LazyLogits)


def test_stale_logits_are_an_error():
    model = make()
    patch(model)
    out, _ = step(model, **batch())
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="output embedding's weights have been changed in place"):
        out.logits.argmax(-1)


def test_logits_read_under_no_grad_keep_their_graph():
    model = make()
    patch(model)
    out = model(**batch())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out.logits.argmax(-1)
    assert out.logits.clone().requires_grad


def test_a_hook_on_the_head_sees_logits():
    model = make()
    patch(model)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model(**batch())
    assert seen == [(2, 17, 99)]
    model.lm_head.register_full_backward_hook(lambda module, dx, dy: seen.append("backward"))
    out, _ = step(model, **batch())
    assert seen[-1] == "backward" and type(out.logits) is torch.Tensor


# ---- on the instance ------------------------------------------------------------------------------------------------------


def test_restore_leaves_nothing_behind():
    model = make()
    before = {id(m): dict(vars(m)) for m in model.modules()}
    patch(model)
    assert isinstance(model(**batch()).logits, LazyLogits)
    released(model)
    assert {id(m): dict(vars(m)) for m in model.modules()} == before
    assert type(model(**batch()).logits) is torch.Tensor


def test_another_model_of_the_class_is_untouched():
    model, other = make(), make()
    patch(model)
    assert type(other(**batch()).logits) is torch.Tensor


def test_deepcopy_uses_its_own_head():
    model = make()
    patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with no_warnings():
        _, got = step(twin, **batch())
    assert model.lm_head.weight.grad is None
    released(twin)
    _, want = step(twin, **batch())
    assert_close(got, want)
    assert isinstance(model(**batch()).logits, LazyLogits)


def test_state_dict_does_not_change(tmp_path):
    model = make("llama tied")
    keys = list(model.state_dict())
    patch(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_models_with_a_loss_of_their_own_are_left():
    model = make()
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    assert patch(model) == ["the model's loss function is <lambda>, not the cross-entropy of a causal or masked language model"]
    assert "_unswag" not in vars(model.lm_head)


def test_a_linear_that_computes_something_else_is_not_taken_for_one():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make()
    head = Doubled(32, 99, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    _, want = step(model, **batch())
    assert patch(model) == []
    _, got = step(model, **batch())
    assert_close(got, want)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_weight_that_is_no_plain_tensor_is_not_read(when, trained):
    """A trained one leaves the head as it is, a frozen one is called in chunks; found at the surgery or set after it."""
    model = make()
    weight = model.lm_head.weight

    def swap():
        model.lm_head.weight = halved(weight, trained)

    swap()
    stock, want = step(model, **batch())
    model.zero_grad()
    if when == "before":
        reasons = patch(model)
        assert reasons == (["its weight is a Halved, which only the head itself can use"] if trained else [])
    else:
        model.lm_head.weight = weight
        assert patch(model) == []
        swap()
    ours, got = step(model, **batch())
    assert isinstance(ours.logits, LazyLogits) == (when == "before" and not trained)
    torch.testing.assert_close(ours.loss, stock.loss)
    assert_close(got, want)


def test_a_parametrized_weight_is_made_for_each_chunk():
    model = make()
    model.lm_head = Halved(nn.utils.parametrizations.weight_norm(model.lm_head))
    stock, want = step(model, **batch())
    assert patch(model) == []
    with pytest.MonkeyPatch.context() as several_chunks, no_warnings():
        several_chunks.setattr("unswag.torch.loss.CHUNK_LOGITS", 5 * 99)
        ours, got = step(model, **batch())
    assert isinstance(ours.logits, LazyLogits) and any("original" in name for name in got)
    torch.testing.assert_close(ours.loss, stock.loss)
    assert_close(got, want)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_weight_that_a_hook_makes(when):
    """Its graph lies outside the head's forward. Of a plain Linear the weight is an input of the loss, as any other tensor."""
    model = make()
    if when == "after":
        assert patch(model) == []
    nn.utils.weight_norm(model.lm_head)
    with keep_logits():
        stock, want = step(model, **batch())
    if when == "before":
        assert len(reasons := patch(model)) == 1 and "computed by a hook" in reasons[0]
    with pytest.MonkeyPatch.context() as several_chunks, no_warnings():
        several_chunks.setattr("unswag.torch.loss.CHUNK_LOGITS", 5 * 99)
        ours, got = step(model, **batch())
    torch.testing.assert_close(ours.loss, stock.loss)
    assert "lm_head.weight_g" in got
    assert_close(got, want)


def test_the_probe_disturbs_nothing():
    model = make()
    state = torch.get_rng_state()
    calls = []
    model.lm_head.register_forward_pre_hook(lambda *a: calls.append(a))
    loss = Loss()
    with sealed():
        assert [loss.probe(candidate) for candidate in loss.find(model)] == [None]
    assert torch.equal(torch.get_rng_state(), state) and not calls
    assert model.training and model.lm_head.training and model.lm_head.weight.grad is None
    assert "_unswag" not in vars(model)


# ---- with others ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["lora", "lora with dropout 0 and bias", "saved"])
def test_peft_head(how):
    from peft import LoraConfig, get_peft_model

    config = {
        "lora": LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
        "lora with dropout 0 and bias": LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.0, bias="lora_only"),
        "saved": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    }[how]
    model = get_peft_model(make("phi" if "bias" in how else "llama"), config).train()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    stock, want = step(model, **batch())
    assert patch(model) == []
    with no_warnings():
        ours, got = step(model, **batch())
    assert isinstance(ours.logits, LazyLogits)
    assert abs(ours.loss - stock.loss) < 2e-6
    assert_close(got, want)


def train(model, folder, smoothing=0.0, **changes):
    rows = [{k: v[0] for k, v in batch(seed=i, rows=1).items()} for i in range(8)]
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3,
        report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True, seed=0,
        label_smoothing_factor=smoothing, **changes,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer


def test_trainer(tmp_path):
    want, _ = train(make(), tmp_path)
    model = make()
    patch(model)
    with no_warnings():
        got, trainer = train(model, tmp_path)
    assert len(got) == 3 and got == pytest.approx(want, abs=1e-5)
    assert not materialised(model)
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (2, 17, 99)


def test_trainer_bf16(tmp_path):
    """accelerate wraps the forward: autocast inside, outputs converted to float32 outside."""
    want, _ = train(make(), tmp_path, bf16=True)
    model = make()
    patch(model)
    with no_warnings():
        got, _ = train(model, tmp_path, bf16=True)
    assert got == pytest.approx(want, abs=2e-2)


def test_trainer_label_smoothing_works_on_real_logits(tmp_path):
    want, _ = train(make(), tmp_path, smoothing=0.1)
    model = make()
    patch(model)
    got, _ = train(model, tmp_path, smoothing=0.1)
    assert got == pytest.approx(want, abs=1e-6)
    assert materialised(model) == {"a forward without labels": 6}


def test_two_threads_of_one_model():
    """DataParallel-like use: nothing of a step is kept on the model."""
    from concurrent.futures import ThreadPoolExecutor

    model = make()
    patch(model)
    want = [model(**batch(seed)).loss.item() for seed in range(4)]
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda seed: model(**batch(seed)).loss.item(), range(4)))
    assert got == want


@pytest.fixture
def one_rank(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(os.name != "posix", reason="gloo with a file store")
@pytest.mark.parametrize("unused", [False, True])
def test_ddp(one_rank, unused):
    model = make()
    _, want = step(model, **batch())
    patch(model)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    model.zero_grad()
    with no_warnings():
        wrapped(**batch()).loss.backward()
    assert_close({n: p.grad for n, p in model.named_parameters()}, want)


@pytest.mark.skipif(os.name != "posix", reason="gloo with a file store")
@pytest.mark.parametrize("own_unit", [False, True])
def test_fsdp(one_rank, own_unit):
    """A head sharded with the root is still whole when the loss runs; a unit of its own is not: real logits."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make()
    _, want = step(model, **batch())
    model.zero_grad()
    patch(model)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if own_unit:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    out = model(**batch())
    assert isinstance(out.logits, LazyLogits) != own_unit
    out.loss.backward()
    assert_close({n: p.grad.full_tensor() for n, p in model.named_parameters()}, want)
    if own_unit:
        released(model)
        assert patch(model) == ["it is an FSDP unit of its own; shard it together with the model's root"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = make()
    _, want = step(model, **batch())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    patch(model)
    with no_warnings():
        _, got = step(model, **batch())
    assert_close(got, want)
