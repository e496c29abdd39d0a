"""Tiny random models of many architectures in float64, dropouts on, and one training step of theirs."""

from __future__ import annotations

import torch
from families import SIZES, redraw

H, FF, VOCAB = 32, 80, 128
TEXT = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LM = SIZES | dict(hidden_size=H, intermediate_size=FF, head_dim=8)
MOE = LM | dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
T5 = TEXT | dict(d_model=H, d_kv=8, d_ff=FF, num_layers=2, num_heads=4, decoder_start_token_id=0)
VISION = dict(hidden_size=H, intermediate_size=FF, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8)
WHISPER = TEXT | dict(
    d_model=H, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=FF,
    decoder_ffn_dim=FF, num_mel_bins=8, max_source_positions=20, max_target_positions=40, decoder_start_token_id=1, dropout=0.1,
)  # fmt: skip

# name: (auto class, model type, settings)
ALL = {
    "gpt2": ("CausalLM", "gpt2", LM),
    "gpt_neox": ("CausalLM", "gpt_neox", LM),
    "falcon": ("CausalLM", "falcon", TEXT | dict(hidden_size=H, num_hidden_layers=2, num_attention_heads=4)),
    "phi": ("CausalLM", "phi", LM),
    "starcoder2": ("CausalLM", "starcoder2", LM),
    "bloom": ("CausalLM", "bloom", LM),
    "opt": ("CausalLM", "opt", LM | dict(ffn_dim=FF, word_embed_proj_dim=H, activation_function="gelu")),
    "phi3": ("CausalLM", "phi3", LM),
    "glm": ("CausalLM", "glm", LM),
    "glm4": ("CausalLM", "glm4", LM),
    "granitemoeshared": ("CausalLM", "granitemoeshared", LM | dict(shared_intermediate_size=24)),
    "falcon_h1": ("CausalLM", "falcon_h1", LM | dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)),
    "mixtral": ("CausalLM", "mixtral", LM | dict(num_local_experts=4, router_jitter_noise=0.1)),
    "qwen2_moe": ("CausalLM", "qwen2_moe", MOE | dict(shared_expert_intermediate_size=24)),
    "qwen3_moe": ("CausalLM", "qwen3_moe", MOE),
    "gpt_oss": ("CausalLM", "gpt_oss", MOE | dict(num_local_experts=4)),
    "bert": ("MaskedLM", "bert", LM),
    "roberta": ("MaskedLM", "roberta", LM),
    "modernbert": ("MaskedLM", "modernbert", LM | dict(mlp_dropout=0.1, cls_token_id=1, sep_token_id=2)),
    "t5": ("Seq2SeqLM", "t5", T5 | dict(feed_forward_proj="gelu")),
    "t5_gated": ("Seq2SeqLM", "t5", T5 | dict(feed_forward_proj="gated-gelu")),
    "whisper": ("SpeechSeq2Seq", "whisper", WHISPER),
    "vit": ("ImageClassification", "vit", VISION | dict(hidden_dropout_prob=0.1)),
    "clip_text": ("", "clip_text_model", LM),  # quick_gelu
    "clip_vision": ("", "clip_vision_model", VISION),
}


def build(name: str, dtype: torch.dtype = torch.float64, **settings):
    import transformers

    auto, kind, own = ALL[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**own, **settings})
    model = getattr(transformers, f"AutoModelFor{auto}" if auto else "AutoModel").from_config(config, dtype=dtype)
    return redraw(model.to(dtype))


def batch(name: str, dtype: torch.dtype = torch.float64):
    """What the model takes, in a fixed draw."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB, (2, 11), generator=generator)
    if name in ("vit", "clip_vision"):
        pixels = torch.randn(2, 3, 16, 16, generator=generator).to(dtype)
        return {"pixel_values": pixels} | ({"labels": torch.tensor([0, 1])} if name == "vit" else {})
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=generator).to(dtype), "labels": ids}
    if name == "clip_text":
        return {"input_ids": ids}
    return {"input_ids": ids, "labels": ids}


def step(model, inputs):
    """(loss, gradients by name) of one training step, with the same draws of torch's generator each time."""
    torch.manual_seed(7)
    model.zero_grad(set_to_none=True)
    outputs = model(**inputs)
    loss = outputs.loss if "labels" in inputs else outputs[0].sin().sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours, stock, tolerance):
    """Loss and every gradient within `tolerance`; a gradient that is zero but for rounding (of the bias of keys) within it of
    the largest one."""
    assert ours[1].keys() == stock[1].keys()
    assert abs(ours[0] - stock[0]) <= tolerance * abs(stock[0])
    largest = max(g.double().norm() for g in stock[1].values())
    for name, g in stock[1].items():
        apart = (ours[1][name].double() - g.double()).norm()
        assert apart <= tolerance * max(g.double().norm(), 1e-3 * largest), f"{name}: {apart / g.double().norm():.1e}"
