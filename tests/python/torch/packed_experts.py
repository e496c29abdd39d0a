"""Packed experts as transformers' decorator makes them, what they take, and one step."""

from __future__ import annotations

import types

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations import use_experts_implementation

H, WIDTH, EXPERTS = 32, 24, 5


class Loop(nn.Module):
    """One expert after the other."""

    def __init__(self, config, act=None):
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, H) / H**0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, H, WIDTH) / WIDTH**0.5)
        self.act_fn = act or nn.SiLU()

    def forward(self, hidden, index, weights):
        y = torch.zeros_like(hidden)
        for e in range(EXPERTS):
            row, place = torch.where(index == e)
            gate, up = F.linear(hidden[row], self.gate_up_proj[e]).chunk(2, dim=-1)
            out = F.linear(self.act_fn(gate) * up, self.down_proj[e]) * weights[row, place, None]
            y = y.index_add(0, row, out.to(y.dtype))
        return y


@use_experts_implementation
class Packed(Loop):
    """As transformers writes its experts."""


def build(base=None, implementation="grouped_mm", dtype=torch.float32, act=None, **settings):
    """Experts as transformers' decorator makes them; `base` may bring an `_apply_gate`."""
    cls = Packed
    if base is not None or settings:
        cls = use_experts_implementation(type("Packed", (*filter(None, [base]), Loop), {}), **settings)
    return cls(types.SimpleNamespace(_experts_implementation=implementation), act).to(dtype)


def inputs(tokens=11, k=3, dtype=torch.float32, weight_dtype=None, seed=1):
    """Expert 4 gets no token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=generator).to(dtype).requires_grad_()
    index = (
        torch.stack([torch.randperm(4, generator=generator)[:k] for _ in range(tokens)]) if tokens else torch.empty(0, k).long()
    )
    weights = torch.rand(tokens, k, generator=generator).to(weight_dtype or dtype).requires_grad_()
    return hidden, index, weights


def step(module, hidden, index, weights, run=None):
    """y = run(hidden, index, weights), by default the module's own, and the gradients of inputs and parameters."""
    y = (run or module)(hidden, index, weights)
    return [y.detach(), *torch.autograd.grad(y.float().sin().sum(), [hidden, weights, *module.parameters()])]
