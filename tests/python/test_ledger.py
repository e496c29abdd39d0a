import json

import pytest

from unswag.ledger import Ledger, Row, role_of


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


@pytest.mark.parametrize("modules", [0, 1, 40])
def test_the_picture_is_drawn(tmp_path, modules):
    names = [f"block_{chr(97 + i % 26)}{i // 26 * 'x'}.mlp" for i in range(modules)]
    rows = [Row(name, "mlp", (4,), "float32", 32.0, "device", 1 << i % 24) for i, name in enumerate(names)]
    path = tmp_path / "ledger.png"
    Ledger(rows, tokens=4).plot(path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") >= 1000


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
