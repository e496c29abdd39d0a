"""The common modeling and training tests of transformers' sdist, on small models of its families. Run by bench.peers.

The sdist has tests/test_*_common.py and tests/test_*_mixin.py, not the tests/models/ that say what they run on; the testers
here do, with the sizes of transformers' own CausalLMModelTester. For the two modules that test_modeling_common imports and the
sdist lacks (exporters/, generation/) an empty class stands in.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import unittest
from typing import Any

import torch
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

PACKAGE = "transformers_tests"
STAND_INS = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def _common() -> tuple[type, ...]:
    """The mixins of the sdist; its folder tests/ is a package under another name than ours."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [os.environ["UNSWAG_PEERS_TESTS"]]
    sys.modules[PACKAGE] = package
    for path, name in STAND_INS.items():
        folder = f"{PACKAGE}.{path.partition('.')[0]}"
        sys.modules[folder] = types.ModuleType(folder)
        module = types.ModuleType(f"{PACKAGE}.{path}")
        setattr(module, name, type(name, (), {}))
        sys.modules[module.__name__] = module
    modeling = importlib.import_module(f"{PACKAGE}.test_modeling_common")
    training = importlib.import_module(f"{PACKAGE}.test_training_mixin")
    return modeling.ModelTesterMixin, modeling.GenerationTesterMixin, training.TrainingTesterMixin


HEADS = (
    auto.MODEL_MAPPING,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    auto.MODEL_FOR_MASKED_LM_MAPPING,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING,
)

LLAMA = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
OLDER = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
HEAD_DIM = LLAMA | dict(head_dim=8)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> model type, its settings
    "llama": ("llama", LLAMA),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", HEAD_DIM),
    "gemma2": ("gemma2", HEAD_DIM),
    "gemma3": ("gemma3_text", HEAD_DIM | dict(layer_types=["sliding_attention", "full_attention"])),
    "mistral": ("mistral", HEAD_DIM),
    "mixtral": ("mixtral", HEAD_DIM | dict(num_local_experts=4, num_experts_per_tok=2)),
    "phi3": ("phi3", LLAMA),
    "gpt2": (
        "gpt2",
        dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=512, pad_token_id=98, bos_token_id=98, eos_token_id=98),
    ),
    "gpt_neox": ("gpt_neox", OLDER),
    "bert": ("bert", OLDER),
    "opt": (
        "opt",
        dict(
            vocab_size=99, hidden_size=32, word_embed_proj_dim=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        ),
    ),
    "t5": (
        "t5",
        dict(
            vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        ),
    ),
}  # fmt: skip


class Tester:
    """What the mixins ask a tester of a family for."""

    is_training = True
    batch_size, seq_length = 13, 7
    num_choices = 4

    def __init__(self, family: str) -> None:
        self._type, self._settings = FAMILIES[family]
        config = self.get_config()
        self.encoder_seq_length = self.decoder_seq_length = self.seq_length
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, getattr(config, name))
        self.causal_lm_class = next(cls for cls in classes(family) if "LM" in cls.__name__ or "Conditional" in cls.__name__)

    def get_config(self) -> Any:
        return CONFIG_MAPPING[self._type](**self._settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        config = self.get_config()
        ids = torch.randint(3, 97, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids).tril()
        inputs = {"input_ids": ids, "attention_mask": mask}
        if config.is_encoder_decoder:
            ids[:, -1] = config.eos_token_id  # T5 classifies a sequence by its last one
            inputs |= {"decoder_input_ids": ids.roll(1, 0), "decoder_attention_mask": torch.ones_like(ids)}
        return config, inputs


def classes(family: str) -> tuple[type, ...]:
    """The family's models, one of each head."""
    config = CONFIG_MAPPING[FAMILIES[family][0]]
    heads = [head for head in HEADS if family != "t5" or head is not auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING]  # no decoder
    found = [mapping[config] for mapping in heads if config in mapping]
    return tuple(dict.fromkeys(c for each in found for c in (each if isinstance(each, (tuple, list)) else (each,))))


def _test_class(family: str) -> type:
    encoder_decoder = FAMILIES[family][0] == "t5"
    attributes = {
        "setUp": lambda self: setattr(self, "model_tester", Tester(family)),
        "model_tester": None,
        "all_model_classes": classes(family),
        "is_encoder_decoder": encoder_decoder,
        "test_all_params_have_gradient": family != "mixtral",  # an expert that no token chose has none
        "__module__": __name__,
    }
    return type(family, (*_MIXINS, unittest.TestCase), attributes)


_MIXINS = _common()
for _family in FAMILIES:
    globals()[_family] = _test_class(_family)
