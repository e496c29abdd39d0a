import json
from dataclasses import replace

import pytest

from unswag.ledger import CompilerMemory, Ledger, Row, role_of


def ledger():
    rows = [Row(f"model.layers.{i}.mlp", "mlp", (8, 16), "bfloat16", 16.0, "device", 256) for i in range(12)]
    rows += [Row(f"model.layers.{i}.mlp", "mlp", (8, 16), "bfloat16", 0.0, "recipe", 0) for i in range(12)]
    rows += [Row(f"model.layers.{i}.self_attn.q_proj", "attention", (8, 4), "float32", 32.0, "device", 128) for i in range(12)]
    return Ledger([*rows, Row("", "other", (3,), "int64", 64.0, "device", 24)], tokens=8, alive=4700, loss_buffers=77)


def test_sums():
    assert ledger().total == 12 * 256 + 12 * 128 + 24
    assert ledger().bytes_per_token == ledger().total / 8
    assert Ledger().total == 0


def test_layers_are_added_up():
    groups = ledger().groups()
    assert [(g.module, g.role, g.kept, g.free, g.bytes) for g in groups] == [
        ("model.layers.*.mlp", "mlp", 12, 12, 12 * 256),
        ("model.layers.*.self_attn.q_proj", "attention", 12, 0, 12 * 128),
        ("", "other", 1, 0, 24),
    ]


def test_the_table_says_it_all():
    text = str(ledger())
    for words in ("model.layers.*.mlp", "3,072", "579", "66.3 %", "counted independently", "4,700", "loss buffers", "77"):
        assert words in text, words
    assert "weight copies" not in text
    assert "nan" not in str(Ledger())


def test_json_has_rows_and_sums():
    found = json.loads(ledger().to_json())
    assert found["total"] == ledger().total and found["tokens"] == 8 and found["alive"] == 4700
    assert found["rows"][0] == {
        "module": "model.layers.0.mlp", "role": "mlp", "shape": [8, 16], "dtype": "bfloat16",
        "bits": 16.0, "tier": "device", "bytes": 256, "name": "", "source": "",
    }  # fmt: skip
    assert json.loads(Ledger().to_json())["bytes_per_token"] is None


def test_its_repr_is_a_page_at_most():
    names = [f"block_{chr(97 + i % 26)}{i // 26 * 'x'}.mlp" for i in range(2000)]
    rows = [Row(name, "mlp", (4,), "float32", 32.0, "device", 16) for name in names]
    many = Ledger(rows, tokens=4, alive=1, peak=2, loss_buffers=3, weight_copies=4, compiler=CompilerMemory(1, 2, 3, 4, None))
    for shown in (many, many.compare(many)):
        assert repr(shown) == str(shown) and len(repr(shown).splitlines()) <= 45 and "others" in repr(shown)
    assert f"{2000 * 16:,}" in repr(many)


def test_the_title_names_model_and_batch():
    assert ledger().title() == Ledger().title() == ""
    named = replace(ledger(), model="LlamaForCausalLM", batch={"input_ids": (1, 8), "labels": (1, 8)})
    assert named.title() == "LlamaForCausalLM: input_ids 1×8, labels 1×8"
    assert named.title() in str(named) and named.title() in str(named.compare(ledger()))


def test_loss_buffers_have_a_place():
    places = ledger().places()
    assert list(places) == [
        ("model.layers.*.mlp", "mlp"),
        ("model.layers.*.self_attn.q_proj", "attention"),
        ("(the loss)", "loss buffers"),
        ("(the model itself)", "other"),
    ]
    assert sum(places.values()) == ledger().total + 77


def test_two_are_compared_by_their_places():
    other = replace(ledger(), rows=ledger().rows[24:], loss_buffers=4000)
    compared = ledger().compare(other, ("stock", "ours"))
    assert compared.parts() == [
        ("(the loss)", "loss buffers", 77, 4000),
        ("model.layers.*.mlp", "mlp", 12 * 256, 0),
        ("model.layers.*.self_attn.q_proj", "attention", 12 * 128, 12 * 128),
        ("(the model itself)", "other", 24, 24),
    ]
    assert ledger().compare(other).names == ("before", "after") and (compared.one, compared.other) == (ledger(), other)


def test_a_notebook_shows_a_table():
    for shown in (ledger(), ledger().compare(ledger())):
        assert shown._repr_html_().startswith("<table>") and "model.layers.*.mlp" in shown._repr_html_()


@pytest.mark.parametrize(
    "module, role",
    [
        ("model.layers.3.mlp.gate_proj", "mlp"),
        ("transformer.h.3.mlp.c_fc", "mlp"),
        ("model.layers.3.self_attn", "attention"),
        ("model.layers.3.input_layernorm", "residual"),
        ("transformer.h.3.ln_1", "residual"),
        ("model.norm", "residual"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.default", "lora"),
        ("lm_head", "logits"),
        ("model.layers.3", "other"),
        ("", "other"),
    ],
)
def test_roles_from_names(module, role):
    assert role_of(module) == role
