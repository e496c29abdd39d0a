"""unswag.torch.nn: the modules are their functions."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.python.activations import ACTIVATIONS, MASKS

from unswag.torch import functional as F
from unswag.torch import nn

pytestmark = pytest.mark.native

UNARY = [
    (nn.ReLU(), F.relu, torch.nn.ReLU()),
    (nn.LeakyReLU(0.2), lambda x: F.leaky_relu(x, 0.2), torch.nn.LeakyReLU(0.2)),
    (nn.ReLU6(), F.relu6, torch.nn.ReLU6()),
    (nn.SiLU(), F.silu, torch.nn.SiLU()),
    (nn.GELU(), F.gelu, torch.nn.GELU()),
    (nn.GELU("tanh"), lambda x: F.gelu(x, "tanh"), torch.nn.GELU("tanh")),
]
GATES = [
    (nn.SwiGLU(), F.swiglu, torch.nn.functional.silu),
    (nn.GEGLU(), F.geglu, torch.nn.functional.gelu),
    (nn.GEGLU("tanh"), lambda g, u: F.geglu(g, u, "tanh"), lambda g: torch.nn.functional.gelu(g, approximate="tanh")),
    (nn.ReGLU(), F.reglu, torch.relu),
]


@pytest.mark.parametrize(("module", "function", "torchs"), UNARY)
def test_unary(module, function, torchs):
    x = torch.randn(4, 9, requires_grad=True)
    assert torch.equal(module(x), function(x))
    torch.testing.assert_close(module(x), torchs(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(module(x).sum(), x), torch.autograd.grad(torchs(x).sum(), x))
    assert repr(module) == repr(torchs)
    assert not module.state_dict()


@pytest.mark.parametrize("name", MASKS | ACTIVATIONS)
def test_every_activation_has_a_module(name):
    row, x = (MASKS | ACTIVATIONS)[name], torch.randn(4, 9)
    assert torch.equal(row.module(nn)(x), row.ours(F, x)) and type(row.module(nn)).__name__ in nn.__all__


@pytest.mark.parametrize(("module", "function", "act"), GATES)
def test_gates(module, function, act):
    gate, up = torch.randn(2, 4, 9)
    assert torch.equal(module(gate, up), function(gate, up))
    torch.testing.assert_close(module(gate, up), act(gate) * up, rtol=1e-6, atol=1e-6)


def test_rms_norm_is_torch_s():
    ours, torchs = nn.RMSNorm(16, eps=1e-5), torch.nn.RMSNorm(16, eps=1e-5)
    with torch.no_grad():
        torchs.weight.normal_()
    ours.load_state_dict(torchs.state_dict())  # the same keys
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(ours(x), torchs(x), rtol=1e-6, atol=1e-6)


def test_rms_norm_of_transformers():
    """To the bit in bfloat16 nearly everywhere: another order of summation moves rstd by one unit."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    x = torch.randn(200, 64).to(torch.bfloat16)
    for theirs, ours in (
        (llama.LlamaRMSNorm(64, 1e-6), nn.RMSNorm(64, 1e-6)),
        (gemma.GemmaRMSNorm(64, 1e-6), nn.RMSNorm(64, 1e-6, weight_offset=1.0, cast_before_weight=False)),
    ):
        with torch.no_grad():
            theirs.weight.normal_()
        theirs, ours = theirs.to(torch.bfloat16), ours.to(torch.bfloat16)
        ours.load_state_dict(theirs.state_dict())
        a, b = ours(x), theirs(x)
        assert a.dtype == b.dtype and (a != b).float().mean() <= 1e-3


@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_rms_norm_starts_with_factor_one(weight_offset):
    norm = nn.RMSNorm(8, weight_offset=weight_offset)
    assert torch.equal(norm.weight, torch.full((8,), 1 - weight_offset))
    x = torch.randn(2, 8)
    torch.testing.assert_close(norm(x), nn.RMSNorm(8, elementwise_affine=False)(x))


def test_rms_norm_without_weight_and_with_factory_arguments():
    norm = nn.RMSNorm(8, elementwise_affine=False)
    assert norm.weight is None and not list(norm.parameters())
    assert torch.equal(norm(torch.ones(2, 8)), F.rms_norm(torch.ones(2, 8)))
    assert nn.RMSNorm(8, dtype=torch.bfloat16, device="meta").weight.dtype == torch.bfloat16


def test_rms_norm_copies_and_frozen_weight():
    norm = copy.deepcopy(nn.RMSNorm(8))
    norm.weight.requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None and x.grad is not None


def test_rms_norm_errors_and_repr():
    norm = nn.RMSNorm(8, eps=1e-5, weight_offset=1.0)
    with pytest.raises(ValueError, match="its last dimension must be 8"):
        norm(torch.randn(2, 7))
    with pytest.raises(ValueError, match="must be 8"):
        nn.RMSNorm(8, elementwise_affine=False)(torch.tensor(1.0))
    assert repr(norm) == "RMSNorm(8, eps=1e-05, weight_offset=1.0, cast_before_weight=True)"


def test_dropout():
    module, x = nn.Dropout(0.4), torch.randn(6, 7)
    torch.manual_seed(2)
    y = module(x)
    torch.manual_seed(2)
    assert torch.equal(y, F.dropout(x, 0.4)) and not torch.equal(y, x)
    assert module.eval()(x) is x
    assert repr(module) == "Dropout(p=0.4)"
    with pytest.raises(ValueError, match="p is 1"):
        nn.Dropout(1)


def test_layer_norm_is_torch_s():
    for options in ({}, {"bias": False}, {"elementwise_affine": False}):
        ours, torchs = nn.LayerNorm(16, eps=1e-3, **options), torch.nn.LayerNorm(16, eps=1e-3, **options)
        with torch.no_grad():
            for p in torchs.parameters():
                p.normal_()
        ours.load_state_dict(torchs.state_dict())  # the same keys
        x = torch.randn(3, 5, 16)
        torch.testing.assert_close(ours(x), torchs(x), rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            ours.reset_parameters(), torchs.reset_parameters()
        torch.testing.assert_close(ours(x), torchs(x), rtol=1e-6, atol=1e-6)


def test_layer_norm_errors_factory_and_repr():
    with pytest.raises(ValueError, match="its last dimension must be 8"):
        nn.LayerNorm(8, elementwise_affine=False)(torch.randn(2, 7))
    assert nn.LayerNorm(8, dtype=torch.bfloat16, device="meta").bias.dtype == torch.bfloat16
    assert repr(nn.LayerNorm(8, bias=False)) == "LayerNorm(8, eps=1e-05, elementwise_affine=True, bias=False)"


@pytest.mark.parametrize(("module", "function"), [(nn.QuickGELU(), F.quick_gelu), (nn.ReLU2(), F.relu2)])
def test_modules_that_torch_has_not(module, function):
    x = torch.randn(4, 9)
    assert torch.equal(module(x), function(x)) and repr(module) == f"{type(module).__name__}()" and not module.state_dict()
