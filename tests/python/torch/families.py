"""Tiny random language models of several families, as transformers builds them, and one training step of theirs."""

from __future__ import annotations

import torch

SIZES = dict(
    vocab_size=128, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
NO_DROPOUT = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
FAMILIES = ("llama", "gemma2", "qwen2", "qwen3", "mistral", "bitnet", "lfm2", "gpt2")


def build(family: str = "llama", dtype=torch.float32, **settings):
    """A model with random weights that are all drawn: no norm weight is one, no LoRA is zero. In training mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if family == "gpt2":
        settings = NO_DROPOUT | settings
    config = AutoConfig.for_model(family, **{**SIZES, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return redraw(model)


def redraw(model):
    """Adds noise to every parameter, so that no weight is all ones or zeros and hides a wrong gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_((0.05 * torch.randn(p.shape, generator=generator)).to(p.dtype))
    return model.train()


def ids(rows: int = 2, length: int = 40, seed: int = 2):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain():
    return {"input_ids": ids(), "labels": ids()}


def padded():
    """One row padded on the right, one on the left; labels on the padding too, as careless callers give them."""
    mask = torch.ones_like(ids())
    mask[0, 30:] = 0
    mask[1, :7] = 0
    return plain() | {"attention_mask": mask}


def packed(lengths=(13, 20, 7)):
    """One row with several sequences, told apart by their positions alone."""
    one = ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": one, "labels": one, "position_ids": positions, "use_cache": False}


def step(model, batch):
    """(loss, gradients by name) of one fresh training step."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(ours, stock):
    """‖ours - stock‖ / ‖stock‖."""
    return ((ours.double() - stock.double()).norm() / stock.double().norm().clamp_min(1e-30)).item()


def assert_close(ours, stock, tolerance):
    """Loss and every gradient within `tolerance`, and the same parameters have one."""
    assert ours[1].keys() == stock[1].keys()
    assert abs(ours[0] - stock[0]) <= tolerance * abs(stock[0])
    apart = {name: distance(ours[1][name], stock[1][name]) for name in stock[1]}
    worst = max(apart, key=apart.__getitem__)
    assert apart[worst] <= tolerance, f"{worst}: {apart[worst]:.1e}"
