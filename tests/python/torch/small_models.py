"""Small models for the tests of stash, checkpointing and audit, with recipes written in plain torch."""

from __future__ import annotations

import functools
import types

import torch
from torch import nn
from torch.nn import functional as F

from unswag.torch.stash import Stash, remember

made: list[str] = []  # the recipes that ran, in order


def norm_again(x, rstd, weight, *, dtype):
    made.append("norm")
    return weight * (x.float() * rstd).to(dtype)


def gated_again(gate, up):
    made.append("gated")
    return F.silu(gate) * up


class RmsNorm(torch.autograd.Function):
    """y = x * rstd * w, saving x and one number per row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, rstd, weight)
        ctx.mark_non_differentiable(rstd)
        return weight * (x.float() * rstd).to(x.dtype), rstd

    @staticmethod
    def backward(ctx, dy, _):
        x, rstd, weight = ctx.saved_tensors
        n = x.float() * rstd
        dn = (dy * weight).float()
        dx = rstd * (dn - n * (dn * n).mean(-1, keepdim=True))
        return dx.to(x.dtype), (dy * n).flatten(0, -2).sum(0).to(weight.dtype), None


class Gated(torch.autograd.Function):
    """h = silu(gate) * up, saving gate and up."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        s = gate.sigmoid()
        return dh * up * s * (1 + gate * (1 - s)), dh * gate * s


def rms_norm(x, weight, eps):
    y, rstd = RmsNorm.apply(x, weight, eps)
    remember(y, norm_again, x, rstd, weight, dtype=x.dtype)
    return y


def gated(gate, up):
    h = Gated.apply(gate, up)
    remember(h, gated_again, gate, up)
    return h


def norm_forward(self, x):
    return rms_norm(x, self.weight, self.variance_epsilon)


def mlp_forward(self, x):
    return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


def tiny_llama(layers=2, seed=0, dtype=torch.float32, **settings):
    """A random Llama: 64 wide, 176 hidden, vocabulary 97, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, max_position_embeddings=1024, use_cache=False, attn_implementation="sdpa", **settings,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype).train()


def with_recipes(model):
    """The model with norms and MLPs that save the minimum and remember; no stash yet."""
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = types.MethodType(norm_forward, module)
        elif type(module).__name__ == "LlamaMLP":
            module.forward = types.MethodType(mlp_forward, module)
    return model


def with_stash(model, prepare=None):
    """The model whose forward runs inside a stash, as surgery does it."""
    plain = type(model).forward

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        if prepare is not None:
            prepare(self)
        with Stash(model=self):
            return plain(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    return model


def batch(tokens=32, rows=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 97, (rows, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model, data, *, scale=1.0, retain_graph=False):
    """Loss and gradients of one fresh step."""
    model.zero_grad(set_to_none=True)
    loss = model(**data).loss
    (loss * scale).backward(retain_graph=retain_graph)
    return loss.detach(), gradients(model)


def assert_same(ours, stock):
    assert ours.keys() == stock.keys()
    for name in stock:
        assert torch.equal(ours[name], stock[name]), name


def weight(*shape, seed=0):
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))
