"""Silu and gelu are found in every spelling, as modules and as functions, keep their input alone, and change nothing else."""

from __future__ import annotations

import copy
import functools
import pickle

import architectures
import matrix
import pytest
import torch
from alone import Alone
from families import distance
from modules import Held, Quick
from torch import nn
from torch.nn import functional as F

from unswag.torch import apply_unswag_surgery, audit, remove_unswag_surgery
from unswag.torch.derivatives import Codes
from unswag.torch.patterns.activation import Activation, HeldActivation

alone = Alone(Activation())
H, HIDDEN = 13, 29


class OwnGelu(nn.Module):  # Bloom: an autograd function of its own, constants of eight digits
    def forward(self, x):
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def of_transformers(name):
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def of_bloom():
    from transformers.models.bloom.modeling_bloom import BloomGelu

    return BloomGelu()


SPELLINGS = {
    "silu": [nn.SiLU, lambda: of_transformers("silu"), lambda: of_transformers("swish")],
    "gelu": [nn.GELU, lambda: of_transformers("gelu"), lambda: of_transformers("gelu_python")],
    "gelu_tanh": [lambda: nn.GELU("tanh"), of_bloom, OwnGelu]
    + [
        functools.partial(of_transformers, f"gelu_{kind}")
        for kind in ("new", "fast", "accurate", "pytorch_tanh", "python_tanh")
    ],
    "quick_gelu": [lambda: of_transformers("quick_gelu")],
}
CASES = [(act, make) for act, makes in SPELLINGS.items() for make in makes]


class Mlp(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(H, HIDDEN), nn.Linear(HIDDEN, H), act

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def results(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])]


def examples():
    kinds = {
        "torch's": nn.GELU,
        "of Python": Quick,
        "held": lambda: Held(F.gelu),
        "held, partial": lambda: Held(functools.partial(F.gelu, approximate="tanh")),
    }
    return {name: matrix.between(make) for name, make in kinds.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("act", "make"), CASES)
def test_every_spelling_is_found_and_the_results_equal(act, make, dtype):
    model = Mlp(make()).to(dtype)
    ((found, reason),) = alone.tried(model)
    assert (found.name, found.parts["act"], reason) == ("act", act, None)
    x = (3 * torch.randn(2, 5, H)).to(dtype)
    stock = results(model, x)
    alone.apply(found)
    tolerance = max(8 * torch.finfo(dtype).eps, 1e-9)
    for ours, theirs in zip(results(model, x), stock, strict=True):
        assert ours.dtype == theirs.dtype and distance(ours, theirs) <= tolerance


@pytest.mark.parametrize("function", [F.gelu, F.silu, functools.partial(F.gelu, approximate="tanh")])
def test_a_function_that_a_module_holds_is_replaced_there(function):
    model = Mlp(function)
    ((found, reason),) = alone.tried(model)
    assert (found.name, reason) == ("", None)
    x = torch.randn(2, H)
    stock = results(model, x)
    alone.apply(found)
    assert isinstance(model.act, HeldActivation)
    for ours, theirs in zip(results(model, x), stock, strict=True):
        assert distance(ours, theirs) <= 1e-6
    assert results(pickle.loads(pickle.dumps(model)), x)[0].shape == (2, H)
    remove_unswag_surgery(model)
    assert model.act is function


def test_a_function_called_with_more_is_the_stock_one():
    y = torch.randn(3)
    assert HeldActivation(F.silu, "silu", Codes())(y, inplace=True) is y
    assert torch.equal(HeldActivation(F.gelu, "gelu", Codes())(y, approximate="tanh"), F.gelu(y, approximate="tanh"))


class Near(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.04472 * x**3)))


class TrainingOnly(nn.Module):
    def forward(self, x):
        return F.silu(x) if self.training else F.gelu(x)


class Wide(nn.Module):  # silu, but its result is float32
    def forward(self, x):
        return F.silu(x.to(torch.promote_types(x.dtype, torch.float32)))


LEFT = {
    Near: "close to gelu_tanh, but not equal",
    TrainingOnly: "but not equal",
    Wide: "differ",
    nn.Hardswish: "close to silu, but not equal",
    nn.Mish: "but not equal",
    (lambda: nn.SiLU(inplace=True)): "in place",
}


@pytest.mark.parametrize(("make", "why"), LEFT.items())
def test_what_is_nearly_one_of_ours_is_left_with_the_reason(make, why):
    ((found, reason),) = alone.tried(Mlp(make()).bfloat16())
    assert found.name == "act" and why in reason


@pytest.mark.parametrize(
    "make",
    [
        nn.Identity,
        nn.ReLU,
        lambda: of_transformers("relu2"),
        lambda: nn.Dropout(0.1),
        nn.Sigmoid,
        lambda: F.relu,
        lambda: F.softmax,
    ],
)
def test_other_modules_and_functions_are_no_candidates(make):
    assert not alone.tried(Mlp(make()))


def test_a_forward_of_somebody_else_is_left():
    model = Mlp(nn.SiLU())
    model.act.forward = lambda x: x
    ((_, reason),) = alone.tried(model)
    assert "already replaced" in reason


class Chunks(nn.Module):
    """What a module may hand to its activation: strided, empty, a scalar; and not only floats."""

    def __init__(self):
        super().__init__()
        self.act = nn.GELU()

    def forward(self, x):
        return self.act(x)


@pytest.mark.parametrize(
    "x", [torch.randn(7, 6)[:, ::2], torch.randn(5, 0), torch.randn(()), torch.randn(4, 3).T, torch.randn(1)]
)
def test_any_layout(x):
    model = Chunks()
    ((found, _),) = alone.tried(model)
    want = model(x)
    alone.apply(found)
    torch.testing.assert_close(model(x), want)


def test_an_input_that_is_no_plain_tensor_goes_to_the_stock_forward():
    model = Chunks()
    ((found, _),) = alone.tried(model)
    alone.apply(found)
    with pytest.raises(RuntimeError, match="not implemented for 'Int'"):
        model(torch.ones(3, dtype=torch.int32))
    sub = torch.randn(3).as_subclass(type("Sub", (torch.Tensor,), {}))
    assert type(model(sub)).__name__ == "Sub"


def test_hooks_still_run():
    model = Mlp(nn.SiLU())
    seen = []
    model.act.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    ((found, reason),) = alone.tried(model)
    assert reason is None
    alone.apply(found)
    model(torch.randn(2, H))
    assert seen == [(2, HIDDEN)]


def test_the_activation_inside_a_patched_gated_mlp_is_done_with():
    report = apply_unswag_surgery(architectures.build("falcon_h1", torch.float32), loss="stock")
    names = [name for name, pattern in report.patched if pattern == "activation"]
    assert names and all("mamba" in name for name in names)


@pytest.mark.parametrize("make", [lambda: Mlp(of_transformers("gelu_new")), lambda: Mlp(nn.GELU()), lambda: Mlp(F.silu)])
def test_one_number_is_kept_per_element(make):
    """The pre-activation, beside x; the input of fc2 is made again. A copy of the model is patched as the model is."""
    model = make().bfloat16()
    apply_unswag_surgery(model)
    for m in (model, copy.deepcopy(model)):
        x = torch.randn(64, H).bfloat16()
        assert audit(m, x=x).total == 2 * 64 * HIDDEN


PLAIN = ["gpt2", "gpt_neox", "falcon", "phi", "starcoder2", "bloom", "opt", "bert", "roberta", "t5", "whisper", "vit"]
PLAIN += ["clip_text", "clip_vision"]


@pytest.mark.parametrize("name", PLAIN)
def test_architectures_train_as_stock_with_dropout_on(name):
    model, batch = architectures.build(name), architectures.batch(name)
    stock = architectures.step(model, batch)
    report = apply_unswag_surgery(model, loss="stock")
    assert sum(pattern == "activation" for _, pattern in report.patched) >= 2
    assert not any("activation" in reason for _, reason in report.skipped)
    # T5 and Bloom: its norm and its constants are not those of float64
    architectures.assert_equal(architectures.step(model, batch), stock, 1e-6 if name == "t5" else 1e-8)


def test_a_dtype_in_which_it_computes_something_else_is_its_own_affair():
    class Odd(nn.Module):
        def forward(self, x):
            return F.silu(x) if x.dtype != torch.float16 else torch.tanh(x)

    model = nn.Sequential(nn.Linear(8, 8), Odd())
    report = apply_unswag_surgery(model)
    assert ("1", "activation") in report.patched
    x = torch.randn(3, 8)
    torch.testing.assert_close(model[1](x), F.silu(x))
    with pytest.warns(
        UserWarning, match=r"1 \(Odd\) runs its own forward, .*: x is torch.float16, for which its results differ"
    ):
        assert torch.equal(model[1](x.half()), torch.tanh(x.half()))
