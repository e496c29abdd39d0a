"""The ways of training that the demo compares, and what its processes share."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Way:
    """side: "stock" or "unswag"; training: "lora" (r = 16 on every Linear) or "full"; checkpointing: of each layer."""

    side: str
    training: str = "lora"
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return f"{self.training}-{self.side}{'-checkpointing' if self.checkpointing else ''}"

    @property
    def title(self) -> str:
        return ("UnSwag" if self.side == "unswag" else "stock") + (" with checkpointing" if self.checkpointing else "")

    def load(self):
        """SmolLM2-135M in float32 and in training mode, as a user would load it."""
        import torch
        from examples.smollm2 import directory
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(directory(), dtype=torch.float32)
        model.config.use_cache = False  # training needs no cache, and packed rows must not have one
        if self.training == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        if self.side == "unswag":
            from unswag import apply_unswag_surgery

            apply_unswag_surgery(model, verbose=False)
        if self.checkpointing:
            model.gradient_checkpointing_enable()
        return model.train()


def quiet() -> None:
    """Switches off what transformers, PEFT and bitsandbytes say that has nothing to do with the demo."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # that optional kernels for 4-bit weights are missing
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers renames gradient_checkpointing_enable
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def in_process(module: str, result: Path, *arguments: Any) -> dict[str, Any]:
    """What `python -m examples.demo.<module> <arguments as JSON> <result>` writes to the file `result`.

    A process of its own, so that its peak memory is its own. Raises SystemExit if it fails.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # freed tensors go back to the system, so the peak is not malloc's
    }
    command = [sys.executable, "-m", f"examples.demo.{module}", json.dumps(arguments, default=dataclasses.asdict), str(result)]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise SystemExit(f"examples.demo.{module} failed; its error is printed above")
    return json.loads(result.read_text())


def arguments() -> tuple[list[Any], Path]:
    """Of a process started by `in_process`: its arguments and the file for its result."""
    return json.loads(sys.argv[1]), Path(sys.argv[2])


def write(path: Path, text: str) -> None:
    """Writes the file, complete or not at all."""
    part = path.with_name(f".{path.name}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
