"""Lossy policies in a model: what is kept, what the ledger says of it, and how far gradients are from exact ones."""

import dataclasses

import pytest
import torch
from small_models import batch, gradients, tiny_llama
from torch.nn import functional as F

from unswag import Policy, apply_unswag_surgery, audit
from unswag.torch import functional
from unswag.torch.stash import Stash, codecs

pytestmark = pytest.mark.native

TOKENS = 96
LOSSY = ("int8", "int4", "2bit")
FARTHEST = {"int8": 0.02, "int4": 0.2, "2bit": 0.6}  # of a random model, whose gates are narrow


def model(policy="exact", **kwargs):
    llama = tiny_llama(**kwargs)
    llama.report = apply_unswag_surgery(llama, policy=policy, verbose=False)
    return llama


def step(llama, retain=False, seed=0):
    llama.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = llama(**batch(TOKENS)).loss
    loss.backward(retain_graph=retain)
    return loss, {name: g.clone() for name, g in gradients(llama).items()}


def apart(ours, exact):
    assert ours.keys() == exact.keys()
    square = sum((ours[n] - exact[n]).double().square().sum().item() for n in exact)
    return (square / sum(exact[n].double().square().sum().item() for n in exact)) ** 0.5


@pytest.mark.parametrize("policy", LOSSY)
def test_the_loss_is_exact_and_gradients_are_near(policy):
    exact_loss, exact = step(model())
    loss, ours = step(model(policy))
    assert torch.equal(loss, exact_loss)
    assert 0 < apart(ours, exact) < FARTHEST[policy]


def test_more_bits_are_nearer():
    exact = step(model())[1]
    errors = [apart(step(model(policy))[1], exact) for policy in LOSSY]
    assert errors == sorted(errors) and errors[0] < errors[1] / 4


@pytest.mark.parametrize("policy", LOSSY)
def test_the_ledger_says_what_is_alive(policy):
    exact = audit(model(), **batch(TOKENS))
    ledger = audit(model(policy), **batch(TOKENS))
    assert ledger.total == ledger.alive - 4  # the loss itself
    assert ledger.total < 0.75 * exact.total
    roles = {row.role for row in ledger.rows if row.tier == "device" and row.bits < 16}
    assert {"mlp", "residual"} <= roles


def test_what_is_kept_of_each_role():
    """Of each layer gate and up in int4 blocks of 16, both norms' inputs in int8 blocks of 32, each once."""
    rows = audit(model(Policy(mlp="int4", residual="int8")), **batch(TOKENS)).rows
    mlp = [r for r in rows if r.role == "mlp" and r.tier == "device"]
    assert [r.bytes for r in mlp] == [
        TOKENS * 11 * 10 + TOKENS * 2
    ] * 4  # 176 numbers are 11 blocks of 10 bytes: 110, padded to 112
    residual = [r for r in rows if r.role == "residual" and r.tier == "device" and r.bits < 16]
    assert [r.bytes for r in residual] == [TOKENS * 2 * 34] * 5


def test_two_bits_keep_codes_and_values():
    rows = audit(model("2bit"), **batch(TOKENS)).rows
    codes = [r for r in rows if r.dtype == "uint8" and r.tier == "device"]
    assert [r.bytes for r in codes] == [TOKENS * 44] * 2  # 176 codes of two bits
    assert len([r for r in rows if r.tier == "recipe" and r.shape[-1] == 176]) == 2  # the products, for their next Linear
    values = [r for r in rows if r.role == "mlp" and r.tier == "device" and r.bits < 16 and r.dtype != "uint8"]
    assert [r.bytes for r in values] == [TOKENS * 56] * 4  # 3 blocks of 18 bytes, padded


def test_attention_inputs_are_kept_when_asked_for():
    exact, ours = audit(model(), **batch(TOKENS)), audit(model(Policy(attention="int8")), **batch(TOKENS))
    coded = [r for r in ours.rows if r.role == "attention" and r.tier == "device" and 8 < r.bits < 32]
    assert len(coded) == 2 * 3 and ours.total == ours.alive - 4 < exact.total
    assert 0 < apart(step(model(Policy(attention="int8")))[1], step(model())[1]) < 0.02


def test_exact_encodes_nothing(monkeypatch):
    monkeypatch.setattr(codecs, "encode", None)
    step(model())


@pytest.mark.parametrize("policy", LOSSY)
def test_a_second_backward_gives_the_same(policy):
    llama = model(policy)
    loss, first = step(llama, retain=True)
    llama.zero_grad(set_to_none=True)
    loss.backward()
    assert all(torch.equal(first[n], g) for n, g in gradients(llama).items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_encoded_and_the_recompute_is_exact(reentrant):
    def checkpointed(policy):
        llama = model(policy, layers=3)
        llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            llama.enable_input_require_grads()
        return llama

    exact, ours = checkpointed("exact"), checkpointed("int8")
    kept, kept_exactly = audit(ours, **batch(TOKENS)), audit(exact, **batch(TOKENS))
    assert kept.alive - kept.total == kept_exactly.alive - kept_exactly.total  # cos and sin in a closure, the loss
    assert kept.total < 0.4 * kept_exactly.total
    rows = [r for r in kept.rows if r.role == "checkpoint" and r.tier == "device"]
    assert [r.bytes for r in rows] == [TOKENS * 2 * 34] * 3
    assert 0 < apart(step(ours)[1], step(exact)[1]) < 0.02
    # Only checkpoints are encoded: without them, what the recompute saves would be exact, and so would the gradients.
    assert apart(step(checkpointed(Policy(mlp="int4")))[1], step(exact)[1]) < 1e-6


def test_stochastic_rounding_follows_the_seed_and_is_right_in_the_mean():
    policy = dataclasses.replace(Policy.named("int4"), rounding="stochastic")
    llama, exact = model(policy), step(model())[1]
    first, again, other = step(llama, seed=1)[1], step(llama, seed=1)[1], step(llama, seed=2)[1]
    assert apart(first, again) == 0 < apart(first, other)
    runs = [step(llama, seed=s)[1] for s in range(40)]
    mean = {n: sum(run[n] for run in runs) / len(runs) for n in exact}
    assert apart(mean, exact) < 0.45 * apart(first, exact)  # the part that is left is second order: products of two errors


@pytest.mark.parametrize("book", ["mm2", "optimal", "fewbit", "resilu2", "dither2", "seed"])
def test_codebooks_of_two_bits(book):
    policy = dataclasses.replace(Policy.named("2bit"), codebook=book)
    assert 0 < apart(step(model(policy))[1], step(model())[1]) < 0.8


def test_a_codebook_of_another_activation_is_refused():
    with pytest.raises(ValueError, match="codebook 'regelu2' is for gelu, but the model has silu; choose 'mm1'"):
        step(model(dataclasses.replace(Policy.named("2bit"), codebook="regelu2")))


def test_codebooks_stay_from_batch_to_batch():
    llama = model("2bit")
    step(llama)
    places = [vars(m)[key] for m in llama.modules() for key in vars(m) if isinstance(vars(m)[key], functional.Codes)]
    before = [place.made for place in places]
    assert len(places) == 2 and all(before)
    with torch.no_grad():
        for p in llama.parameters():
            p.mul_(1.5)
    step(llama)
    assert [place.made for place in places] == before
    assert before[0][2].book != before[1][2].book  # each its own


def test_a_policy_that_changes_nothing_is_an_error():
    linear = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="policy 'int8' would change nothing"):
        apply_unswag_surgery(linear, policy="int8")
    assert not any("_unswag" in key for m in linear.modules() for key in vars(m))


@pytest.mark.parametrize("policy", ["exact", *LOSSY])
def test_the_dry_run_counts_packed_forms(policy):
    before, after = model(policy).report.bytes_per_token
    assert after < (0.9 if policy == "exact" else 0.6) * before


def test_the_report_says_that_it_is_lossy_and_by_how_much(capsys):
    apply_unswag_surgery(tiny_llama(), policy="int4")
    printed = " ".join(capsys.readouterr().err.split())
    assert "int4" in printed and "lossy" in printed and "SmolLM2-135M" in printed
    apply_unswag_surgery(tiny_llama(), policy="exact")
    assert "lossy" not in capsys.readouterr().err


def test_derivative_codes_of_a_plain_activation():
    x = torch.randn(64, 128, requires_grad=True)
    with Stash("2bit"):
        loss = functional.silu(x).sum()
    loss.backward()
    levels = x.grad.unique()
    assert 2 <= len(levels) <= 4
    assert (x.grad - torch.autograd.functional.vjp(lambda x: F.silu(x).sum(), x)[1]).norm() < 0.2 * x.grad.norm()
