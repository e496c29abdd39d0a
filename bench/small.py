"""Any architecture of transformers, small: its default config with every size cut down, a layer of each kind, weights drawn.

    config = small_config("qwen3_next")              # hidden size 64, 4 heads of 16, vocabulary 128
    model = small_model(config)                      # with its language-model head, float32, training, no dropout

A config class is asked for its defaults; attributes are known by name, lists with one entry per layer keep one layer of each
kind. What a type needs beside that stands in `EXCEPTIONS`.
"""

from __future__ import annotations

import re
from typing import Any

import torch

VOCAB = 128
TOKENS = 96  # ids of text are below; special ids lie above

LAYERS = "num_hidden_layers|n_layers?|num_layers"

# Attributes by their whole names; the first expression that matches counts. Values are set only where the default is an int.
SIZES: list[tuple[str, int]] = [
    # widths
    (r"(d_model|n_embd|emb_dim|embedding_dim|dim|embed_dim|hidden_dim)", 64),
    (r"(.*_)?hidden_size(_global)?|.*embedding_size|word_embed_proj_dim|lru_width|.*_embed_dim|out_hidden_size", 64),
    (r"adapter_(in|out)_dim|adapter_input_size|projector_(in|out)put_dim|vision_output_dim|classifier_proj_size", 64),
    (r"prompt_mid_dim", 24),
    (r"(moe_|shared_|expert_)+(intermediate|ffn_hidden)_size|shared_experts?_intermediate_size", 48),
    (r".*intermediate_size(_mlp)?|(en|de)coder_ffn_dim|ffn_dim|ffn_hidden_size|d_ff|dim_ff|dff|n_inner|d_inner", 96),
    (r"mlp_dim|feed_forward_size", 96),
    (r"output_channels|ext_pw_out_channel|depthwise_separable_out_channel|nemo_conv_channels", 16),
    # layers
    (rf"{LAYERS}|(en|de)coder_layers|depth|num_blocks|num_(en|de)coder_layers", 2),
    (r"conf_num_hidden_layers|num_global_layers|num_layers_per_stack", 1),
    # heads
    (r".*num_key_value_heads|num_kv_heads|num_query_groups|n_head_kv|linear_num_key_heads|num_global_key_value_heads", 2),
    (r".*attention_heads|n_heads?|num_heads|encoder_attention_heads|linear_num(_value)?_heads|index_n_heads|n_mamba_heads", 4),
    (r"qk_nope_head_dim|v_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 24),
    (r"(.*_)?head_dim|d_kv|d_head|dim_head|kv_channels|attention_head_size", 16),
    (r"(kv|o)_lora_rank|hc_lowrank|adapter_rank|laurel_rank|gated_norm_rank", 16),
    (r"q_lora_rank", 24),
    # experts
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|n_activated_experts", 2),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|zero_expert_num", 4),
    (r"topk_group", 1),
    (r"n_group|num_expert_group|n_groups|mamba_n_groups|o_groups", 2),
    # states of recurrent layers
    (r"(mamba_d|ssm)_state(_size)?|state_size", 8),
    (r".*chunk_size|(mamba_)?chunk_size|block_size", 8),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_headdim", 16),
    (r"(mamba_)?dt_rank|time_step_rank|mamba_dt_rank", 8),
    # tables
    (r".*vocab_size(_per_layer_input)?|pronunciation_vocab_size|shape_vocab_size|codebook_size", VOCAB),
    (r".*max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_(source|target)_positions", 64),
    (r"context_length", 64),
    (r".*(sliding|attention)_window(_size|_len)?|window_size|local_attention(_window_len)?|attention_window_size", 16),
    (r"index_topk|index_topk_blocks", 8),
    (r"image_size", 32),
    (r"patch_size", 8),
    (r"num_mel_bins", 16),
    # special ids: see `_special`
]

# By type: settings that its code needs beside those. "default": what even the default config needs.
_MAMBA_HEADS = dict(mamba_n_heads=8, mamba_d_head=16)
_BOTH = ["linear_attention", "full_attention"]
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1], **_MAMBA_HEADS),
    "blt": dict(encoder_hash_byte_group_vocab=VOCAB),
    "chameleon": dict(vocabulary_map={f"IMGIMG{a}Z": 100 + i for i, a in enumerate("ABCDEFGHIJ")} | {"<image>": 110}),
    "chameleon_vqgan": dict(
        embed_dim=8,
        num_embeddings=10,
        latent_channels=8,
        resolution=8,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
    ),
    "cohere_compass_text": dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    "convnext": dict(patch_size=4, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1]),
    "dbrx": dict(attn_config=dict(rope_theta=1e4, kv_n_heads=2, clip_qkv=8.0)),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "deepseek_v3": dict(first_k_dense_replace=1),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1),
    "dots3_note_text": dict(
        num_key_value_heads=4,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_kv_lora_rank=16,
        swa_q_lora_rank=24,
        swa_qk_nope_head_dim=8,
        swa_v_head_dim=8,
        swa_head_dim=24,
    ),
    "falcon_h1": dict(mamba_d_ssm=128, **_MAMBA_HEADS),
    "flint": dict(mlp_only_layers=[0]),
    "gemma3n_text": dict(num_kv_shared_layers=0, intermediate_size=96),
    "gemma4_text": dict(global_head_dim=32),
    "gemma4_unified_text": dict(global_head_dim=32),
    "granitemoehybrid": dict(layer_types=_BOTH, **_MAMBA_HEADS),
    "hrm_text": dict(num_hidden_layers=2, num_layers_per_stack=None),
    "hunyuan_v1_dense": dict(head_dim=16),
    "hunyuan_v1_moe": dict(head_dim=16),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, num_hidden_layers=4, expert_layer_period=2, expert_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "longcat_flash": dict(num_key_value_heads=4),
    "mamba2": dict(num_heads=8, head_dim=16),
    "ministral": dict(head_dim=16),
    "nemotron": dict(num_key_value_heads=2),
    "qwen4_exp_text": dict(
        indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=16, indexer_compress_ratio=4
    ),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(axial_pos_shape=(4, 6), axial_pos_embds_dim=(16, 48), max_position_embeddings=24),
    "resnet": dict(embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[2, 1, 2, 1], layer_type="basic"),
    "t5": dict(decoder_start_token_id=0),
    "wav2vec2": dict(conv_dim=(16,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, apply_spec_augment=False),
    "xlstm": dict(qk_dim_factor=1.0),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        num_hidden_layers=4,
        attention_hidden_size=128,
        attention_head_dim=32,
    ),
    "zamba2": dict(
        layers_block_type=["linear_attention", "hybrid"], n_mamba_heads=8, attention_hidden_size=128, attention_head_dim=32
    ),
    "zaya": dict(num_experts_per_tok=1),
}


def small_config(model_type: str, **settings: Any) -> Any:
    """The default config of `model_type`, small."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return shrunk(CONFIG_MAPPING[model_type], settings)


def shrunk(cls: type, settings: dict[str, Any]) -> Any:
    """An instance of the config class with small values, `EXCEPTIONS` and then `settings` over them."""
    own = EXCEPTIONS.get(cls.model_type, {})
    default = cls(**{k: v for k, v in own.items() if k in own.get("default", ())})
    changed = {k: v for k, v in own.items() if k != "default"}
    return cls(**{**_small(default), **changed, **settings})


def _small(config: Any) -> dict[str, Any]:
    from transformers import PretrainedConfig

    layers = next((n for k, n in vars(config).items() if _is_int(n) and re.fullmatch(LAYERS, k)), 0)
    lists = {k: list(v) for k, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == layers > 2}
    shown = _one_of_each(lists, layers)
    changed: dict[str, Any] = {}
    specials = iter(range(VOCAB - 1, TOKENS, -1))
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            changed[name] = shrunk(type(value), {})
        elif name in lists:
            changed[name] = [lists[name][i] for i in shown]
        elif isinstance(value, float) and re.search(r"drop|jitter", name):
            changed[name] = 0.0
        elif (special := re.fullmatch(r"(\w+)_(token_id|token_index)", name)) and value is not None:
            which = {"pad": 0, "bos": 1, "eos": 2}.get(special[1])
            changed[name] = next(specials) if which is None else which
        elif _is_int(value) and (small := next((n for pattern, n in SIZES if re.fullmatch(pattern, name)), None)) is not None:
            changed[name] = len(shown) if re.fullmatch(LAYERS, name) else small
    if "kv_lora_rank" in changed:  # keys and values are made for every head
        changed["num_key_value_heads"] = changed["num_attention_heads"]
    return {k: v for k, v in changed.items() if not k.startswith("_")}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of_each(lists: dict[str, list[Any]], layers: int) -> list[int]:
    """Layers that show every combination of what the lists say, in order; at least two."""
    seen: dict[str, int] = {}
    for i in range(layers):
        kinds = [v[i] for v in lists.values() if isinstance(v[i], str)]
        seen.setdefault(repr(kinds), i)
    shown = list(seen.values())
    return shown if len(shown) >= 2 else [0, 1]


def small_model(config: Any, auto: Any = None, seed: int = 0) -> Any:
    """Of the class that `auto` (an AutoModel or a model class, by default AutoModelForCausalLM) has for the config. In training
    mode, float32, all weights drawn: none is one or zero."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    auto = auto or AutoModelForCausalLM
    model = auto.from_config(config) if hasattr(auto, "from_config") else auto(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.float().train()
