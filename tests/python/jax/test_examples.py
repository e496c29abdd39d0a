"""The examples and what README and docs show: they run, and say what they are said to say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from values import bits, kept, normal

import unswag
import unswag.jax as ours

ROOT = Path(__file__).parents[3]


def snippets(path: str, words: str) -> list[str]:
    """The Python blocks of a page that contain these words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)
    found = [block for block in blocks if words in block]
    assert found, f"{path} shows no {words}"
    return found


def test_the_founding_usage_runs_as_written():
    (snippet,) = snippets("README.md", "def train_step")
    founding = """import jax
from unswag import unswag_relu

@jax.jit
def train_step(w, x):
    gate = jax.numpy.dot(x, w)
    return unswag_relu(gate)
"""
    assert [line for line in snippet.splitlines() if line] == [line for line in founding.splitlines() if line]
    names: dict = {}
    exec(snippet, names)
    w, x = normal((64, 32), jnp.float32), normal((16, 64), jnp.float32, 1)
    assert (bits(names["train_step"](w, x)) == bits(jax.jit(lambda w, x: jax.nn.relu(jnp.dot(x, w)))(w, x))).all()

    def loss(w, x, step):
        return jnp.sum(step(w, x) * jnp.arange(32.0))

    ours = jax.grad(loss)(w, x, names["train_step"])
    assert (bits(ours) == bits(jax.grad(loss)(w, x, jax.jit(lambda w, x: jax.nn.relu(jnp.dot(x, w)))))).all()
    assert ("uint32", (16, 1)) in kept(names["train_step"], w, x)


@pytest.mark.parametrize("framework", ["from flax import nnx", "flax.linen", "equinox"])
def test_the_snippets_of_the_docs_run(framework):
    for snippet in snippets("docs/jax.md", framework):
        names: dict = {}
        exec(compile(snippet, "docs/jax.md", "exec"), names)
        ledger = names["ledger"]
        assert "unswag_mask" in [row.name for row in ledger.rows]
        assert np.isfinite(np.asarray(names["value"])) and names["gradients"] is not None


def test_the_table_of_the_results_page_is_what_the_audit_prints():
    def block(act):
        return lambda gate, up, down, x: x + act(x @ gate, x @ up) @ down

    def single(act):
        return block(lambda gate, up: act(up))

    pairs = {
        "relu": (single(jax.nn.relu), single(ours.relu)),
        "silu": (single(jax.nn.silu), single(ours.silu)),
        "gelu": (single(jax.nn.gelu), single(ours.gelu)),
        "swiglu": (block(lambda gate, up: jax.nn.silu(gate) * up), block(ours.swiglu)),
        "geglu": (block(lambda gate, up: jax.nn.gelu(gate) * up), block(ours.geglu)),
    }
    shapes = [(512, 14336), (512, 14336), (14336, 512), (4, 512)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    text = (ROOT / "docs" / "results.md").read_text()
    for name, functions in pairs.items():
        frozen, trained = (
            [unswag.audit(f, *arrays, argnums=nums, tokens=4) for f in functions] for nums in ((0, 1, 3), (0, 1, 2, 3))
        )
        plain, less, plain_too, less_too = (f"{ledger.bytes_per_token:,.0f}" for ledger in (*frozen, *trained))
        assert f"| `{name}` | {plain} | **{less}** | {plain_too} | **{less_too}** |" in text, name


def checked(out: Path, found: dict, steps: int) -> None:
    assert found["steps"] == found["equal_losses"] == steps and found["equal_parameters"]
    stock, ours = found["losses"]["jax.nn.relu"], found["losses"]["unswag_relu"]
    assert stock == ours and len(set(stock)) == steps
    for both in found["kept_bytes"].values():
        assert both["unswag_relu"] < both["jax.nn.relu"]
    assert json.loads((out / "result.json").read_text())["losses"] == found["losses"]
    assert (out / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_the_language_model(tmp_path, capsys):
    from examples.jax_lm.__main__ import main

    rows, tokens, layers, width = 4, 32, 2, 32
    found = main(f"--steps 30 --rows {rows} --tokens {tokens} --layers {layers} --width {width} --out {tmp_path}".split())
    checked(tmp_path, found, 30)
    losses = found["losses"]["unswag_relu"]
    assert losses[-1] < losses[0] - 1
    # bool to bit, for each of the hidden elements of the MLPs
    for both in found["kept_bytes"].values():
        assert both["jax.nn.relu"] - both["unswag_relu"] == rows * tokens * layers * 4 * width * 7 // 8
    printed = capsys.readouterr().out
    assert "step   30 of 30" in printed and "30 of 30" in printed and "unswag_mask" in printed


def test_the_digits(tmp_path):
    from examples.jax_digits.__main__ import main

    found = main(f"--steps 3 --rows 4 --channels 32 --out {tmp_path}".split())
    checked(tmp_path, found, 3)
    pixels = 4 * (64 * 32 * 3 + 16 * 64 * 2)  # elements of the five ReLUs
    assert (
        found["kept_bytes"]["all trained"]["jax.nn.relu"] - found["kept_bytes"]["all trained"]["unswag_relu"] == pixels * 7 // 8
    )
    assert 0 < found["right"] < 1


def test_the_relu_of_the_top_level_is_that_of_the_front_end():
    assert unswag.unswag_relu is ours.unswag_relu is ours.relu
