"""Packed experts keep gate and up alone, and route, weigh and train as transformers' own function does."""

from __future__ import annotations

import copy
import types
import warnings

import architectures
import matrix
import pytest
import torch
from alone import Alone
from families import distance
from packed_experts import EXPERTS, WIDTH, H, build, inputs, step
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from unswag.torch import apply_unswag_surgery, audit, remove_unswag_surgery
from unswag.torch.patterns import experts
from unswag.torch.patterns.experts import Experts
from unswag.torch.patterns.pattern import stock_class

alone = Alone(Experts())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = build()

    def forward(self, x, index, weights):
        return self.experts(x, index, weights)


def examples():
    def batch(dtype):
        return dict(zip(("x", "index", "weights"), inputs(dtype=dtype), strict=True))

    return {"of four": matrix.Example(Model, batch, "experts")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("act", [nn.SiLU, nn.GELU, nn.ReLU])
def test_results_equal(implementation, dtype, act):
    module = build(implementation=implementation, dtype=dtype, act=act())
    found = alone.candidate(module)
    assert alone.probe(found) is None and found.parts["whole"] == (implementation == "grouped_mm")
    data = inputs(dtype=dtype)
    stock = step(module, *data)
    alone.apply(found)
    for ours, theirs in zip(step(module, *data), stock, strict=True):
        assert ours.dtype == theirs.dtype and distance(ours, theirs) <= 16 * torch.finfo(dtype).eps


def test_experts_registered_later_are_what_runs():
    module, data = build(), inputs()
    found = alone.candidate(module)
    assert alone.probe(found) is None and found.parts["whole"]
    alone.apply(found)
    called, grouped_mm = [], ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def other(*args, **kwargs):
        called.append(args)
        return grouped_mm(*args, **kwargs)

    module(*data)
    assert not called
    ALL_EXPERTS_FUNCTIONS["grouped_mm"] = other
    try:
        module(*data)
    finally:
        ALL_EXPERTS_FUNCTIONS["grouped_mm"] = grouped_mm
    assert called


class Clamped(nn.Module):  # GPT-OSS
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=7.0)) * up


class Interleaved(nn.Module):
    def _apply_gate(self, gate_up):
        return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: build(Clamped), "its gate is not"),
        (lambda: build(Interleaved), "its gate is not"),
        (lambda: build(act=nn.Tanh()), "its gate is not"),
        (lambda: build(implementation="eager"), "one by one"),
    ],
)
def test_other_gates_and_loops_are_left_with_the_reason(make, why):
    assert why in alone.probe(alone.candidate(make()))


def test_with_more_parts_only_the_gate_is_ours():
    module = build(has_post_expert_norm=True)
    module.post_expert_norm = nn.LayerNorm(H)
    found = alone.candidate(module)
    assert alone.probe(found) is None and not found.parts["whole"]
    data = inputs()
    stock = step(module, *data)
    alone.apply(found)
    assert "forward" not in vars(module)
    for ours, theirs in zip(step(module, *data), stock, strict=True):
        assert distance(ours, theirs) <= 2e-6


def test_another_implementation_chosen_later_is_the_one_that_runs(monkeypatch):
    module, data = build(), inputs()
    found = alone.candidate(module)
    assert alone.probe(found) is None
    alone.apply(found)
    runs = []
    monkeypatch.setattr(experts, "grouped", lambda *args: runs.append(1) or data[0])
    module(*data)
    module.config._experts_implementation = "batched_mm"
    module(*data)
    module.config._experts_implementation, module._is_expert_parallel = "grouped_mm", True
    module(*data)
    assert len(runs) == 1


def test_gate_and_up_are_kept_and_indices():
    module = build(dtype=torch.bfloat16)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = module

        def forward(self, x, index, weights):
            return self.experts(x.exp(), index, weights)  # which exp saves

    model = Model()
    apply_unswag_surgery(model)
    x, index, weights = inputs(64, 3, torch.bfloat16)
    # order, token (int64) and the weight of each of the 3 * 64; the ends of the experts
    small = 3 * 64 * (8 + 8 + 2) + EXPERTS * 4
    assert audit(model, x=x, index=index, weights=weights).total == x.nbytes + 3 * 64 * 2 * WIDTH * 2 + small


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "granitemoeshared"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_architectures_train_as_stock(name, implementation):
    """float64 with transformers' loop, float32 with its grouped product, which takes no float64."""
    dtype = torch.float64 if implementation == "eager" else torch.float32
    model = architectures.build(name, dtype, experts_implementation=implementation)
    batch = architectures.batch(name, dtype)
    stock = architectures.step(model, batch)
    report = apply_unswag_surgery(model, loss="stock")
    patched = [pattern for _, pattern in report.patched]
    assert patched.count("experts" if implementation == "grouped_mm" else "activation") == 2
    assert implementation == "grouped_mm" or any("one by one" in why for _, why in report.skipped)
    assert all(p.grad is not None for p in model.parameters())
    architectures.assert_equal(architectures.step(model, batch), stock, 5e-6)
    remove_unswag_surgery(model)
    architectures.assert_equal(architectures.step(model, batch), stock, 1e-12)


def halves(self, gate_up):
    return gate_up.chunk(2, dim=-1)[0]


def product(self, x, index, weights):
    return x * weights.sum() * self.gate_up_proj.sum() * self.down_proj.sum()


CHANGES = {
    "activation's forward": lambda m, _: setattr(m.act_fn, "forward", torch.tanh),
    "activation": lambda m, _: setattr(m, "act_fn", nn.Tanh()),
    "activation's hook": lambda m, _: m.act_fn.register_forward_hook(lambda module, args, y: 2 * y),
    "gate on the instance": lambda m, _: setattr(m, "_apply_gate", types.MethodType(halves, m)),
    "gate of the class": lambda m, patch: patch.setattr(stock_class(m), "_apply_gate", halves),
    "forward of the class": lambda m, patch: patch.setattr(stock_class(m), "forward", product),
    "implementation": lambda m, _: setattr(m.config, "_experts_implementation", "eager"),
    "weights": lambda m, _: m.down_proj.data.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_after_the_surgery_is_what_runs(change, monkeypatch):
    found = alone.candidate(build())
    stock = copy.deepcopy(found.module)
    assert alone.probe(found) is None and found.parts["whole"]
    alone.apply(found)
    for module in (stock, found.module):
        CHANGES[change](module, monkeypatch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = step(found.module, *inputs())
        step(found.module, *inputs())
    assert len(said) == (change not in ("implementation", "weights")), [str(w.message) for w in said]
    for a, b in zip(ours, step(stock, *inputs()), strict=True):
        assert distance(a, b) < 1e-5


def test_torch_func_works_as_stock():
    stock = build()
    ours = alone.patched(copy.deepcopy(stock))
    hidden, index, weights = (t.detach() for t in inputs())
    grads = [torch.func.grad(lambda x, m=m: m(x, index, weights).sin().sum())(hidden) for m in (stock, ours)]
    assert distance(*grads) < 1e-6
