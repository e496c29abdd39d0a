"""RMSNorm is found whatever it is called, the variant that fits is chosen, and what is no RMSNorm is left."""

from __future__ import annotations

import warnings

import matrix
import pytest
import torch
from alone import Alone
from families import distance
from modules import Norm, T5Norm
from odd_weights import halved
from torch import nn

from unswag.torch.patterns import rms_norm
from unswag.torch.patterns.pattern import replaced
from unswag.torch.patterns.rms_norm import RmsNorm

alone = Alone(RmsNorm())
COLS = 96


class Llama(nn.Module):  # rounds x rstd to x's dtype, then the product, which promotes
    def __init__(self, cols=COLS, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(cols))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class Gemma(nn.Module):  # 1 + weight, rounded once, y like x
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(COLS))
        self.tiny = 1e-6

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.tiny)
        return (y * (1.0 + self.scale.float())).type_as(x)


class Olmo(nn.Module):  # plain weight, rounded once
    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.ones(COLS))
        self.epsilon = 1e-5

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (self.g * y).to(x.dtype)


class Bare(nn.Module):  # no weight
    def __init__(self):
        super().__init__()
        self.eps = 1e-6

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


# (weight, eps, weight_offset, cast_before_weight, promotes) of the variant that fits
KNOWN = {
    Llama: ("weight", "variance_epsilon", 0.0, True, True),
    Gemma: ("scale", "tiny", 1.0, False, False),
    Olmo: ("g", "epsilon", 0.0, False, False),
    Bare: (None, "eps", 0.0, True, False),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def examples():
    kinds = {
        "Llama's": lambda: Llama(matrix.WIDTH),
        "Gemma's": Norm,
        "T5's": T5Norm,
        "torch's": lambda: nn.RMSNorm(matrix.WIDTH, eps=1e-6),
    }
    return {name: matrix.between(make) for name, make in kinds.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KNOWN)
def test_the_variant_that_fits_is_chosen(kind, dtype):
    found = alone.candidate(kind(), dtype)
    assert alone.probe(found) is None
    variants = found.parts["variants"]
    weight, eps, offset, cast, promotes = KNOWN[kind]
    assert {(v.weight, v.eps, v.weight_offset) for v in variants.values()} == {(weight, eps, offset)}
    assert variants[torch.bfloat16, torch.bfloat16, False].cast_before_weight == cast
    if weight:
        assert variants[torch.bfloat16, torch.float32, False].promotes == promotes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KNOWN)
def test_patched_equals_stock_in_value_and_gradient(kind, dtype):
    found = alone.candidate(kind(), dtype)
    module = found.module
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(COLS))
    x = torch.randn(3, 5, COLS, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def run():
        y = module(x)
        return y, *torch.autograd.grad(y, [x, *module.parameters()], dy)

    stock = run()
    assert alone.probe(found) is None
    alone.apply(found)
    assert replaced(module)
    tolerance = 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for ours, theirs in zip(run(), stock, strict=True):
        assert ours.dtype == theirs.dtype
        assert distance(ours, theirs) <= tolerance


class Mean(Llama):  # LayerNorm without bias
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class EpsOutside(Llama):  # x / (rms + eps)
    def forward(self, x):
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon))


class Clamped(Llama):  # at scale 1, 5e-9 away: seen at scale 1e-3 only
    def __init__(self):
        super().__init__(eps=1e-8)

    def forward(self, x):
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True).clamp_min(self.variance_epsilon))
        return self.weight * (x.float() * rstd).to(x.dtype)


class OtherEps(Llama):  # 1e-5, although its attribute says 1e-6
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Scaled(Llama):
    def forward(self, x):
        return super().forward(x) * 1.0001


class Sum(Llama):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.variance_epsilon))


class Detached(Llama):  # right value, wrong gradient for us to give
    def forward(self, x):
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
        return self.weight * (x.float() * rstd).to(x.dtype)


class DoubleRounded(Llama):  # rounds x² too: equal in fp32, not in bf16
    def forward(self, x):
        x2 = x.pow(2).float().mean(-1, keepdim=True)
        return self.weight * (x.float() * torch.rsqrt(x2 + self.variance_epsilon)).to(x.dtype)


@pytest.mark.parametrize("kind", [EpsOutside, Clamped, OtherEps, Scaled, Sum, Detached])
def test_what_is_no_rms_norm_is_left(kind):
    found = alone.candidate(kind())
    assert "not one of the known RMSNorms" in alone.probe(found)
    assert "variants" not in found.parts


def test_a_dtype_in_which_no_variant_fits_is_left_to_the_module():
    found = alone.candidate(DoubleRounded())
    assert alone.probe(found) is None
    alone.apply(found)
    module = found.module.to(torch.bfloat16)
    x = torch.randn(64, COLS, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="runs its own forward, .*: x is torch.bfloat16"):
        y = module(x)
    assert torch.equal(y, DoubleRounded.forward(module, x))


def test_layer_norms_are_no_candidates():
    norms = (nn.LayerNorm(COLS), nn.LayerNorm(COLS, bias=False), Mean(), nn.BatchNorm1d(COLS))
    assert not list(RmsNorm().find(nn.Sequential(*norms, nn.Linear(3, 3))))


def test_torch_rms_norm_with_and_without_eps():
    for module in (nn.RMSNorm(COLS, eps=1e-5), nn.RMSNorm(COLS), nn.RMSNorm(COLS, eps=1e-5, elementwise_affine=False)):
        found = alone.candidate(module)
        assert alone.probe(found) is None
        x = torch.randn(4, COLS)
        stock = module(x)
        alone.apply(found)
        torch.testing.assert_close(module(x), stock)


def test_weight_and_eps_are_read_at_each_call_and_x_may_be_named():
    module = Llama()
    found = alone.candidate(module)
    alone.probe(found)
    alone.apply(found)
    x = 1e-3 * torch.randn(2, COLS)
    module.variance_epsilon = 1e-2
    module.weight = nn.Parameter(torch.full((COLS,), 3.0))
    torch.testing.assert_close(module(hidden_states=x), Llama.forward(module, x))
    with pytest.raises(ValueError, match="too many values"):
        module(x, x)


def test_a_forward_replaced_by_others_is_left():
    module = Llama()
    module.forward = lambda x: x
    assert "already replaced" in alone.probe(alone.candidate(module))
    liger = type("LigerRMSNorm", (Llama,), {"__module__": "liger_kernel.transformers.rms_norm"})
    assert "liger_kernel" in alone.probe(alone.candidate(liger()))


def test_the_probe_touches_nothing():
    module = Llama()
    called = []
    module.register_forward_hook(lambda *_: called.append("forward"))
    module.weight.requires_grad_(False)
    found = alone.candidate(module)
    before = (torch.get_rng_state(), dict(vars(module)), module.weight.clone())
    assert alone.probe(found) is None
    assert torch.equal(torch.get_rng_state(), before[0])
    assert vars(module) == before[1] and not called
    assert module.weight.grad is None and not module.weight.requires_grad and torch.equal(module.weight, before[2])


def test_no_kernels_for_the_device():
    module = Llama().to("meta")
    assert "meta, where this build has no kernels" in alone.probe(alone.candidate(module))


def test_a_weight_that_only_the_module_can_read_is_left():
    module = Llama()
    module.weight = halved(torch.randn(COLS))
    assert alone.probe(alone.candidate(module)) == "its weight is a Halved, which only the module itself can read"


def test_a_weight_that_was_sharded_after_the_surgery_is_read_by_the_module():
    found = alone.candidate(Llama())
    assert alone.probe(found) is None
    alone.apply(found)
    module, weight, x = found.module, torch.randn(COLS), torch.randn(3, COLS)
    module.weight = nn.Parameter(weight)
    want = module(x)
    module.weight = halved(weight)
    torch.testing.assert_close(module(x), want)


def test_modules_of_one_kind_are_probed_at_length_once_and_each_for_itself(monkeypatch):
    """The third stands for one that only looks the same: its class computes something else by then."""

    class Scaled(Llama):
        factor = 1

        def forward(self, hidden_states):
            return self.factor * super().forward(hidden_states)

    lengths = []
    original = rms_norm.cases_of

    def cases(module, weight, like, elements, *first):
        lengths.append(elements)
        return original(module, weight, like, elements, *first)

    monkeypatch.setattr(rms_norm, "cases_of", cases)
    reasons = []
    for found in RmsNorm().find(nn.Sequential(Scaled(), Scaled(), Scaled(), Llama(eps=1e-5))):
        Scaled.factor = 2 if len(reasons) == 2 else 1
        reasons.append(alone.probe(found))
    assert lengths == [rms_norm.ELEMENTS, rms_norm.FEW, rms_norm.FEW, rms_norm.ELEMENTS, rms_norm.ELEMENTS]
    assert [reason is None for reason in reasons] == [True, True, False, True]


@pytest.mark.parametrize("order", [(torch.bfloat16,), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("kind", [Llama, Gemma, Olmo, Bare])
def test_the_saving_stays_after_a_cast_in_any_order(kind, order):
    found = alone.candidate(kind())
    assert alone.probe(found) is None
    alone.apply(found)
    for dtype in order:
        found.module.to(dtype)
        for enabled in (False, True):
            with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                warnings.simplefilter("error")
                y = found.module(torch.randn(3, COLS, dtype=dtype, requires_grad=True))
            assert "RmsNorm" in str(y.grad_fn)
