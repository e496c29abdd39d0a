"""unswag plan: a table or JSON; exit code 0 where it fits, 1 where not, 2 for an error in one line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from unswag import cli

CONFIG = dict(model_type="llama", hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, vocab_size=500)  # fmt: skip


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["plan", *arguments])


def test_it_fits_or_not(config):
    fits = run(config, "--memory", "1GiB", "--json")
    found = json.loads(fits.stdout)
    assert fits.exit_code == 0 and found["fits"] and found["device"] == "cuda" and found["context"] > 0
    tight = run(config, "--memory", "1MiB", "--context", "4096")
    assert tight.exit_code == 1 and "does not fit" in tight.stdout


def test_a_gpu_by_its_name(config):
    assert json.loads(run(config, "--gpu", "T4", "--context", "512", "--json").stdout)["limits"]["device"] == 15_095 << 20
    assert run(config, "--gpu", "abacus").exit_code == 2


@pytest.mark.parametrize("arguments", [("/no/such/folder",), (".", "--memory", "much"), ("x", "--nonsense")])
def test_errors_are_one_line(arguments):
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
