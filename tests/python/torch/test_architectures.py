"""Surgery is exact on every architecture (bench/architectures.py), and the judge of that sees what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from bench import architectures
from bench.architectures import Exact, Step, Worker, cases, examine, relative, step
from bench.small import small_config, small_model

from unswag.torch.patterns import attention

FEW = (  # an attention with groups, soft caps, states, latent keys, experts, convolutions; old decoders; other heads
    "qwen3", "gemma2", "falcon_mamba", "deepseek_v3", "mixtral", "lfm2", "gpt2", "opt", "phi3", "bert, masked LM",
    "vit, image classification", "t5, seq2seq LM", "resnet, image classification",
)  # fmt: skip


def _holds(name: str) -> None:
    result = examine(name)
    assert result["verdict"] in ("exact", "untouched", "not built"), result["reason"]


@pytest.mark.parametrize("name", FEW)
def test_surgery_is_exact(name):
    result = examine(name)
    assert result["verdict"] == "exact", result["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in cases() if name not in FEW])
def test_surgery_is_exact_everywhere(name):
    _holds(name)


# ---- the judge


def test_wrong_results_are_wrong(monkeypatch):
    """Under another name for its attention, DeepSeek's sparse one attends to all keys."""
    monkeypatch.setattr(attention, "asks_for_sdpa", lambda home: None)
    result = examine("deepseek_v32")
    assert result["verdict"] == "wrong"
    assert "logits" in result["reason"]


class Rounds(nn.Module):
    """Like the norms of transformers: computes in float32 whatever it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x):
        made = torch.ones(2) / 3  # in the default dtype
        return Loss((self.weight * (x.to(torch.float32) + made).softmax(-1, dtype=torch.float32)).float().sum())


class Loss:
    def __init__(self, loss):
        self.loss = loss


def test_the_reference_rounds_nowhere():
    x = torch.tensor([0.1, 0.7], dtype=torch.float64)
    with Exact():
        found = step(Rounds().double(), {"x": x})
    want = (x + torch.ones(2, dtype=torch.float64) / 3).softmax(-1)
    assert found.loss.dtype == torch.float64 and torch.get_default_dtype() == torch.float32
    assert torch.equal(found.gradients["weight"], want)


def test_a_small_error_of_one_gradient_is_too_far():
    exact = Step(torch.tensor(1.0, dtype=torch.float64), {n: torch.ones(5, dtype=torch.float64) for n in "ab"})
    ours = Step(torch.tensor(1.0), {"a": torch.ones(5), "b": torch.ones(5) * (1 + 2**-18)})
    apart = architectures.Scale(exact).apart(ours, exact)
    error = relative([apart, apart])
    assert error["b"] == pytest.approx(2**-18) and error["a"] == 0
    sides = {"stock": dict.fromkeys(error, 0.0), "stock loss": dict.fromkeys(error, 0.0), "chunked loss": error}
    (problem,) = architectures._too_far(sides | {"stock loss, from stock": error})
    assert problem.startswith("chunked loss: b is 3.8e-06 from fp64")
    nan = Step(torch.tensor(1.0), {"a": torch.ones(5), "b": torch.full((5,), float("nan"))})
    assert relative([architectures.Scale(exact).apart(nan, exact)])["b"] == float("inf")


def test_a_case_that_takes_too_long_is_wrong(monkeypatch):
    monkeypatch.setattr(architectures, "LIMIT", 0.01)
    worker = Worker()
    result = worker.examine("llama")
    assert result["verdict"] == "wrong" and result["reason"] == "more than 0.01 s"
    assert worker.process is None


# ---- small configs


def test_a_small_config_keeps_a_layer_of_each_kind():
    config = small_config("qwen3_next")
    assert config.layer_types == ["linear_attention", "full_attention"] and config.num_hidden_layers == 2
    assert (config.hidden_size, config.vocab_size, config.num_experts) == (64, 128, 4)
    assert small_config("qwen3_5_moe_text").layer_types == ["linear_attention", "full_attention"]
    assert small_config("axk1").mlp_layer_types == ["dense", "sparse"]
    assert small_config("deepseek_v3").first_k_dense_replace == 1


def test_a_small_model_hides_nothing():
    model = small_model(small_config("llama"))
    assert model.training and all(p.std() > 0.05 for p in model.parameters())
    assert not any(isinstance(m, nn.Dropout) and m.p for m in model.modules())
