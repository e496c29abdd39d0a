"""One run of the demo, in a process of its own: python -m examples.demo.train RUN_AS_JSON ROWS RESULT."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import threading
import time
from pathlib import Path

LEARNING_RATE = {"lora": 5e-4, "full": 2e-5}


@dataclasses.dataclass(frozen=True)
class Run:
    side: str  # stock | unswag
    training: str  # lora (r = 16 on all linears) | full
    checkpointing: bool
    rows: int
    tokens: int  # of a row, which is a step
    epochs: int

    @property
    def way(self) -> str:
        return ("LoRA" if self.training == "lora" else "full training") + (", checkpointing" if self.checkpointing else "")

    @property
    def title(self) -> str:
        return f"{self.way}: {self.side}"

    @property
    def name(self) -> str:
        return f"{self.training}{'-checkpointing' if self.checkpointing else ''}-{self.side}"


class Memory(threading.Thread):
    """Resident memory of this process over time, every tenth of a second, and its peak as the kernel counts it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.idle = self.resident("VmRSS")
        self.samples: list[tuple[float, int]] = []  # (seconds, bytes)
        self._ended = threading.Event()

    def run(self) -> None:
        start = time.monotonic()
        while not self._ended.wait(0.1):
            self.samples.append((round(time.monotonic() - start, 2), self.resident("VmRSS")))

    def end(self) -> int:
        """Stops; the peak since the process began, in bytes."""
        self._ended.set()
        self.join()
        return self.resident("VmHWM")

    @staticmethod
    def resident(field: str) -> int:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field + ":"))

    @staticmethod
    def forget_peak() -> None:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")


def load(run: Run):
    """SmolLM2 as its user would load it; for UnSwag, the founding usage: surgery, then checkpointing."""
    import torch
    from bench.smollm2 import directory
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory(), dtype=torch.float32)
    model.config.use_cache = False  # packed rows need it
    if run.training == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    if run.side == "unswag":
        from unswag import apply_unswag_surgery

        apply_unswag_surgery(model)
    if run.checkpointing:
        model.gradient_checkpointing_enable()
    return model


def main() -> None:
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)  # gradient_checkpointing_enable has a new name
    import transformers
    from torch.utils.data import Subset
    from transformers import Trainer, TrainingArguments, set_seed

    from unswag import audit
    from unswag.data import PackedDataset

    class Recording(Trainer):
        """Notes the loss of every step, unrounded, and when it ended."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.losses: list[float] = []
            self.ends: list[float] = []

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.losses.append(loss.item())
            self.ends.append(time.monotonic())
            return loss

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    run, rows, result = Run(**json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    model, data = load(run), PackedDataset.load(rows)
    set_seed(0)  # the same rows in the same order, whatever loading drew
    ledger = audit(model.train(), **data.collator([data[0]]))
    arguments = TrainingArguments(
        output_dir=str(result.with_suffix("")), num_train_epochs=run.epochs, per_device_train_batch_size=1, use_cpu=True,
        learning_rate=LEARNING_RATE[run.training], warmup_steps=3, lr_scheduler_type="constant_with_warmup", logging_steps=4,
        save_strategy="no", report_to=[], dataloader_pin_memory=False,
    )  # fmt: skip
    few = Subset(data, range(min(run.rows, len(data))))
    trainer = Recording(model, arguments, train_dataset=few, data_collator=data.collator)
    gc.collect()
    Memory.forget_peak()
    memory = Memory()
    memory.start()
    start = time.monotonic()
    trainer.train()
    peak = memory.end()
    ends = trainer.ends
    written = {
        **dataclasses.asdict(run),
        "way": run.way,
        "idle_bytes": memory.idle,
        "peak_bytes": peak,
        "saved_bytes_per_token": ledger.alive / ledger.tokens,
        "ledger_bytes_per_token": ledger.bytes_per_token,
        "seconds_per_step": (ends[-1] - ends[0]) / (len(ends) - 1),
        "losses": trainer.losses,
        "step_ends": [round(end - start, 2) for end in ends],
        "memory": memory.samples,
    }
    part = result.with_suffix(".part")
    part.write_text(json.dumps(written))
    os.replace(part, result)


if __name__ == "__main__":
    main()
