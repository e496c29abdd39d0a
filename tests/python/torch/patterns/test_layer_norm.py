"""LayerNorm is found whatever it is called, the variant that fits is chosen, and what is no LayerNorm is left."""

from __future__ import annotations

import copy
import weakref

import families
import matrix
import pytest
import torch
from alone import Alone
from families import distance
from odd_weights import halved
from torch import nn
from torch.nn import functional as F

import unswag
from unswag.torch.patterns import layer_norm
from unswag.torch.patterns.layer_norm import LayerNorm
from unswag.torch.patterns.pattern import replaced
from unswag.torch.patterns.rms_norm import RmsNorm
from unswag.torch.stash import Stash

alone = Alone(LayerNorm())
pytestmark = pytest.mark.native

COLS = 96


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    monkeypatch.setattr(layer_norm, "ELEMENTS", 1 << 14)


class Written(nn.Module):  # as models write it, with names of their own; rounded once
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(COLS))  # before gamma
        self.gamma = nn.Parameter(torch.ones(COLS))
        self.variance_epsilon = 1e-5

    def normalised(self, hidden_states):
        x = hidden_states.float()
        mean = x.mean(-1, keepdim=True)
        return (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, hidden_states):
        return (self.gamma.float() * self.normalised(hidden_states) + self.beta.float()).to(hidden_states.dtype)


class Cohere(nn.Module):  # no bias
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(COLS))
        self.eps = 1e-6

    def forward(self, x):
        wide = x.float() - x.float().mean(-1, keepdim=True)
        return (self.weight.float() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Olmo(nn.Module):  # neither weight nor bias, and eps in the code alone
    def __init__(self):
        super().__init__()
        self.normalized_shape = (COLS,)

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, None, None, eps=1e-6).to(x.dtype)


class InFloat(nn.LayerNorm):  # casts first, as fairseq's and timm's do
    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).type_as(x)


# (weight, bias, eps) of the variant that fits
KNOWN = {
    "torch": (lambda: nn.LayerNorm(COLS), ("weight", "bias", "eps")),
    "torch, eps": (lambda: nn.LayerNorm(COLS, eps=1e-12), ("weight", "bias", "eps")),
    "no bias": (lambda: nn.LayerNorm(COLS, bias=False), ("weight", None, "eps")),
    "not affine": (lambda: nn.LayerNorm(COLS, elementwise_affine=False), (None, None, "eps")),
    "written": (Written, ("gamma", "beta", "variance_epsilon")),
    "cohere": (Cohere, ("weight", None, "eps")),
    "olmo": (Olmo, (None, None, 1e-6)),
    "in float": (lambda: InFloat(COLS), ("weight", "bias", "eps")),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def examples():
    kinds = {"torch's": lambda: nn.LayerNorm(matrix.WIDTH), "without bias": lambda: nn.LayerNorm(matrix.WIDTH, bias=False)}
    return {name: matrix.between(make) for name, make in kinds.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KNOWN)
def test_the_variant_that_fits_is_chosen_and_equals_stock_in_value_and_gradient(name, dtype):
    build, names = KNOWN[name]
    found = alone.candidate(build(), dtype)
    module = found.module
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(COLS))
    x = (torch.randn(3, 5, COLS) + 1).to(dtype).requires_grad_()
    dy = torch.randn(x.shape).to(dtype)

    def run():
        y = module(x)
        return y, *torch.autograd.grad(y, [x, *module.parameters()], dy)

    stock = run()
    assert alone.probe(found) is None
    v = found.parts["variant"]
    assert (v.weight, v.bias, v.eps, v.promotes, v.widens) == (*names, False, False)
    alone.apply(found)
    assert replaced(module)
    tolerance = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for ours, theirs in zip(run(), stock, strict=True):
        assert ours.dtype == theirs.dtype
        assert distance(ours, theirs) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_y_has_the_dtype_of_stock(dtype):
    module = nn.LayerNorm(COLS)
    x = torch.randn(4, COLS).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        stock = module(x)
        ours = alone.patched(module)(x)
    assert ours.dtype == stock.dtype and distance(ours, stock) <= 4 * torch.finfo(dtype).eps
    assert (
        ours.grad_fn is not None and "LayerNorm" in type(ours.grad_fn).__name__ and "Native" not in type(ours.grad_fn).__name__
    )


class Unbiased(Written):  # divides by n - 1
    def normalised(self, x):
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + self.variance_epsilon)


class EpsOutside(Written):
    def normalised(self, x):
        deviation = x.var(-1, keepdim=True, unbiased=False).sqrt()
        return (x - x.mean(-1, keepdim=True)) / (deviation + self.variance_epsilon)


class OtherEps(Written):
    def normalised(self, x):
        return F.layer_norm(x, (COLS,), eps=3e-5)


class OnePlus(Written):  # as Nemotron
    def forward(self, x):
        return F.layer_norm(x, (COLS,), self.gamma + 1, self.beta, self.variance_epsilon)


class Detached(Written):  # right value, wrong gradient for us to give
    def normalised(self, x):
        rstd = torch.rsqrt(x.float().var(-1, keepdim=True, unbiased=False) + self.variance_epsilon).detach()
        return (x.float() - x.float().mean(-1, keepdim=True)) * rstd


class RoundedFirst(Written):  # xhat is rounded before the weight, as DeBERTa does: equal in float32 alone
    def forward(self, x):
        return self.gamma * self.normalised(x).to(x.dtype) + self.beta


class Scaled(Written):
    def forward(self, x):
        return super().forward(x) * 1.0001


@pytest.mark.parametrize("kind", [Unbiased, EpsOutside, OtherEps, OnePlus, Detached, RoundedFirst, Scaled])
def test_what_is_no_layer_norm_is_left(kind):
    found = alone.candidate(kind())
    reason = alone.probe(found)
    assert reason and ("not one of the known LayerNorms" in reason or "not a LayerNorm: its forward raises" in reason)
    assert "variant" not in found.parts


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_other_shapes_are_left():
    assert "its forward raises" in alone.probe(alone.candidate(ChannelsFirst(COLS)))
    assert "its forward raises" in alone.probe(alone.candidate(nn.GroupNorm(1, COLS)))
    reason = alone.probe(alone.candidate(nn.LayerNorm((4, COLS))))
    assert "over 2 dimensions [4, 96], and the kernels only over the last" in reason


def test_each_norm_is_the_candidate_of_one_pattern():
    norms = nn.Sequential(nn.LayerNorm(COLS), nn.LayerNorm(COLS, bias=False), nn.RMSNorm(COLS, eps=1e-6), Cohere(), Olmo())
    others = nn.ModuleList([nn.BatchNorm1d(COLS), nn.Linear(3, 3), nn.Dropout(0.1), nn.GELU()])
    model = nn.Sequential(norms, others)
    assert [c.name for c in alone.found(model)] == ["0.0", "0.1", "0.3", "0.4"]
    assert [c.name for c in Alone(RmsNorm()).found(model)] == ["0.2"]


def test_what_was_not_proven_is_stocks_affair():
    module = alone.patched(nn.LayerNorm(COLS))
    x = torch.randn(3, COLS)
    assert "LayerNorm" in type(module(x).grad_fn).__name__
    with pytest.raises(RuntimeError, match=r"mixed dtype|expected"):  # of stock: it takes no float32 weights beside float64
        module(x.double())
    bare = alone.patched(nn.LayerNorm(COLS, elementwise_affine=False))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        bare(torch.randn(3, COLS + 1))
    module.double()
    torch.testing.assert_close(module(x.double()), F.layer_norm(x.double(), (COLS,)))


def test_weights_and_eps_are_read_at_each_call_and_x_may_be_named():
    module = alone.patched(nn.LayerNorm(COLS))
    x = 1e-2 * torch.randn(2, COLS)
    module.eps = 1e-2
    module.weight, module.bias = nn.Parameter(torch.full((COLS,), 3.0)), None
    torch.testing.assert_close(module(input=x), nn.LayerNorm.forward(module, x))
    with pytest.raises(ValueError, match="too many values"):
        module(x, x)


def test_a_weight_that_is_edited_in_place_is_an_error():
    module = alone.patched(nn.LayerNorm(COLS))
    for stash in (False, True):
        x = torch.randn(3, COLS, requires_grad=True)
        with Stash("exact", model=module) if stash else torch.enable_grad():
            y = module(x).square()
        with torch.no_grad():
            module.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["torch", "no bias", "not affine"])
def test_under_the_stash_y_is_not_kept_and_gradients_have_the_same_bits(name, frozen):
    model = nn.Sequential(alone.patched(KNOWN[name][0]()), nn.Linear(COLS, 7))
    for p in model[0].parameters():
        p.requires_grad_(not frozen)
    x = torch.randn(5, COLS, requires_grad=True)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step():
        y = model[0](x)
        storage = weakref.ref(y.untyped_storage())
        z = model[1](y)
        del y
        return storage() is not None, torch.autograd.grad(z.square().sum(), wanted)

    alive, plain = step()
    assert alive
    with Stash("exact", model=model):
        alive, stashed = step()
    assert not alive
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(stashed, plain, strict=True))


def test_a_forward_replaced_by_others_is_left():
    module = nn.LayerNorm(COLS)
    module.forward = lambda x: x
    assert "already replaced" in alone.probe(alone.candidate(module))
    liger = type("LigerLayerNorm", (nn.LayerNorm,), {"__module__": "liger_kernel.transformers.layer_norm"})
    assert "liger_kernel" in alone.probe(alone.candidate(liger(COLS)))


def test_the_probe_touches_nothing():
    module = nn.LayerNorm(COLS)
    called = []
    module.register_forward_hook(lambda *_: called.append("forward"))
    module.weight.requires_grad_(False)
    found = alone.candidate(module)
    before = (torch.get_rng_state(), dict(vars(module)), copy.deepcopy(module.state_dict()))
    assert alone.probe(found) is None
    assert torch.equal(torch.get_rng_state(), before[0])
    assert vars(module) == before[1] and not called
    assert module.weight.grad is None and not module.weight.requires_grad
    assert all(torch.equal(module.state_dict()[k], v) for k, v in before[2].items())


def test_no_kernels_for_the_device():
    assert "meta, where this build has no kernels" in alone.probe(alone.candidate(nn.LayerNorm(COLS, device="meta")))


def test_a_weight_that_only_the_module_can_read_is_left_and_read_by_the_module_later():
    module = nn.LayerNorm(COLS)
    module.bias = halved(torch.randn(COLS))
    assert alone.probe(alone.candidate(module)) == "its bias is a Halved, which only the module itself can read"
    module = alone.patched(Cohere())  # whose products know what such a weight stands for
    weight, x = torch.randn(COLS), torch.randn(3, COLS)
    module.weight = nn.Parameter(weight)
    want = module(x)
    module.weight = halved(weight)
    torch.testing.assert_close(module(x), want)


# ---- whole models -----------------------------------------------------------------------------------------------------------


def kept_by(report, *parts):
    return sum(row.bytes for row in report.rows if any(part in row.module for part in parts))


def test_gpt2_keeps_x_once_and_no_y():
    """Stock keeps the y of all five norms for the Linear that reads it; ours keeps x, mean and rstd, as stock does."""
    model, batch = families.build("gpt2"), families.plain()
    stock, before = families.step(model, batch), unswag.audit(model, **batch)
    report = unswag.apply_unswag_surgery(model, loss="stock")
    assert [pattern for _, pattern in report.patched].count("layer_norm") == 5
    after = unswag.audit(model, **batch)
    families.assert_close(families.step(model, batch), stock, 5e-6)
    y = batch["input_ids"].numel() * 64 * 4
    assert kept_by(before, "c_attn", "c_fc", "lm_head") == 5 * y
    assert kept_by(after, "c_attn", "c_fc", "lm_head") == 0
    assert kept_by(before, "ln_") == kept_by(after, "ln_") == 5 * (y + 8 * batch["input_ids"].numel())
    assert after.alive <= before.alive - 5 * y


@pytest.mark.parametrize("autocast", [False, True])
def test_bert_equals_stock(autocast):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = families.redraw(BertForSequenceClassification(config))
    batch = {"input_ids": families.ids(), "labels": torch.tensor([0, 1])}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stock = families.step(model, batch)
        report = unswag.apply_unswag_surgery(model, loss="stock")
        assert [pattern for _, pattern in report.patched].count("layer_norm") == 5
        ours = families.step(model, batch)
    for found in (ours, stock):  # a key's bias shifts all scores of a query alike: its gradient is rounding and nothing else
        for name in [n for n in found[1] if n.endswith("key.bias")]:
            del found[1][name]
    families.assert_close(ours, stock, 5e-2 if autocast else 5e-6)
