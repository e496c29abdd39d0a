"""Tests of others on operated models: what counts as a difference, and which models are operated."""

import pytest
import torch
from bench.peers.__main__ import compare, expected
from bench.peers.plugin import Surgeon
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from unswag.torch.patterns.pattern import replaced


def line(test, outcome, **more):
    return {"test": f"llama::{test}", "outcome": outcome, "seconds": 1.0, **more}


def test_a_difference_is_what_passes_on_stock_alone():
    outcomes = {"a": ("passed", "passed"), "b": ("passed", "failed"), "c": ("failed", "failed"), "d": ("passed", "skipped")}
    sides = {
        "stock": [line(t, before, reason="stock's") for t, (before, _) in outcomes.items()],
        "operated": [line(t, after, reason="ours", operated=2, left={"meta": 1}) for t, (_, after) in outcomes.items()],
    }
    known = [{"families": ["llama"], "tests": ["d"], "reason": "it may"}]
    result = compare("llama", sides, known)
    assert [(d["test"], d["operated"], d["expected"]) for d in result["differences"]] == [
        ("b", "failed", None),
        ("d", "skipped", "it may"),
    ]
    assert result["stock_fails"] == {"c": "stock's"}
    assert result["models"] == {"operated": 8, "left as stock": {"meta": 4}}
    assert compare("opt", sides, known)["differences"][1]["expected"] is None  # of another family


def test_a_test_that_did_not_run_on_operated_models_is_a_difference():
    result = compare("llama", {"stock": [line("a", "passed")], "operated": []}, [])
    assert [d["operated"] for d in result["differences"]] == ["not run"]


def test_each_expected_difference_has_its_reason():
    assert all(e["reason"] and e["tests"] and e["families"] for e in expected())


@pytest.fixture
def surgeon(monkeypatch):
    """Its wrappers are taken off again."""
    classes = [PreTrainedModel]
    for cls in classes:
        classes.extend(cls.__subclasses__())
    for cls in classes:
        if "__init__" in vars(cls):
            monkeypatch.setattr(cls, "__init__", vars(cls)["__init__"])
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", vars(PreTrainedModel)["from_pretrained"])
    made = Surgeon()
    made.wrap_constructors()
    return made


def config():
    return LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def is_operated(model):
    return replaced(model.model.norm)


def test_what_is_built_or_loaded_is_operated_once(surgeon, tmp_path):
    model = LlamaForCausalLM(config())
    assert surgeon.operated == 1 and is_operated(model)
    model.save_pretrained(tmp_path)
    assert is_operated(LlamaForCausalLM.from_pretrained(tmp_path)) and surgeon.operated == 2
    loaded, _ = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert is_operated(loaded) and surgeon.operated == 3 and not surgeon.left


def test_models_without_data_stay_stock(surgeon):
    with torch.device("meta"):
        assert not is_operated(LlamaForCausalLM(config()))
    assert surgeon.operated == 0 and surgeon.left == {"on the meta device": 1}


def test_a_constructor_that_raises_leaves_no_trace(surgeon):
    class Broken(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Broken(config())
    assert surgeon.operated == 0
    LlamaForCausalLM(config())
    assert surgeon.operated == 1
