"""The snippets of the guides run as they are written, on a small model."""

import re
from pathlib import Path

import torch
from tests.python.torch.small_models import batch, tiny_llama

import unswag

DOCS = Path(__file__).parents[3] / "docs"


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_the_functions_of_the_quick_start():
    (snippet,) = [one for one in snippets("quickstart.md") if "unswag.torch.relu" in one]
    names: dict = {}
    exec(compile(snippet, "docs/quickstart.md", "exec"), names)
    torch.testing.assert_close(names["y"], torch.nn.functional.silu(names["x"]))
    assert names["layer"].weight.shape == (1024,)


def test_the_guide_to_longer_sequences():
    model = tiny_llama()
    names: dict = {"model": model, "batch": batch(), "torch": torch, "unswag": unswag}
    if not hasattr(model, "activation_checkpointing_enable"):  # an older transformers
        model.activation_checkpointing_enable = model.gradient_checkpointing_enable
    for snippet in snippets("long-context.md"):
        exec(compile(snippet, "docs/long-context.md", "exec"), names)
    assert names["ledger"].peak > 0
    assert "swept" in str(names["report"])
