"""Shows what UnSwag saves, on a real model and real text: SmolLM2-135M, LoRA (r = 16 on every Linear), float32, on the CPU.

1. Memory: the peak of one training step above the idle model at several context lengths, stock and with UnSwag, each without
   and with checkpointing; and the longest context that a fixed amount of memory holds.
2. Training: the same fine-tuning on docstrings of Python's standard library, stock and with UnSwag, by the Trainer of Hugging
   Face: the losses side by side, and the answer to a question before and after.

Every measurement has a process of its own. Written to demo-out/: the data (.jsonl), the prepared rows, table.json, table.txt
and picture.png.

    python -m examples.demo [--all]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from examples.demo import report
from examples.demo.ways import ROOT, Way, in_process, quiet, write
from examples.docstrings import documented, question, write_pairs
from examples.smollm2 import directory, tokenizer

LENGTHS = (256, 512, 1024, 2048)  # tokens
CURVE = 1024  # tokens: of the step whose memory is drawn over time
BUDGET = 512 << 20  # bytes above the idle model
MODULE = "heapq"  # whose docstrings are learnt
ASKED = "heapq.heappush"


def prepare(out: Path, tokens: int) -> tuple[Path, str]:
    """The training rows of at most `tokens` tokens, and the question about one of them."""
    from unswag import prepare_data

    items = [item for item in documented() if item.name.startswith(f"{MODULE}.")]
    pairs, rows = out / "docstrings.jsonl", out / "rows"
    write_pairs(pairs, items)
    data = prepare_data(pairs, tokenizer(), max_length=tokens, verbose=False)
    shutil.rmtree(rows, ignore_errors=True)
    data.save(rows)
    return rows, question(next(item for item in items if item.name == ASKED))


def conditions() -> dict[str, Any]:
    """What the figures depend on."""
    import peft
    import torch
    import transformers

    import unswag

    named = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    git = ["git", "describe", "--always"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout if shutil.which("git") else ""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": named[1] if named else "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "unswag": unswag.__version__,
        "commit": commit.strip() or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="full training as well as LoRA")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="context lengths (default 256 512 1024 2048)")
    parser.add_argument("--tokens", type=int, default=256, help="of a row of training data (default 256)")
    parser.add_argument("--epochs", type=int, default=6, help="of training (default 6; 0: memory only)")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out", help="folder for everything (default demo-out)")
    args = parser.parse_args()

    start = time.monotonic()

    def say(words: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {words}", flush=True)

    quiet()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    directory()
    rows, asked = prepare(out, args.tokens)
    curve = CURVE if CURVE in args.lengths else max(args.lengths)
    parts = []
    for training in ("lora", "full") if args.all else ("lora",):
        memory = []
        for checkpointing in (False, True):
            for side in ("stock", "unswag"):
                way = Way(side, training, checkpointing)
                say(f"memory of a step, {report.TRAINING[training]}: {way.title}")
                memory.append(in_process("memory", out / f"{way.name}-memory.json", way, args.lengths, curve, BUDGET))
        runs = []
        for side in ("stock", "unswag") if args.epochs else ():
            way = Way(side, training, True)
            say(f"{args.epochs} epochs of {report.TRAINING[training]}: {way.title}")
            runs.append(in_process("train", out / f"{way.name}-train.json", way, str(rows), args.epochs, asked))
        parts.append({"training": training, "memory": memory, "runs": runs})
    found = {
        "conditions": conditions(),
        "model": "SmolLM2-135M",
        "dtype": "float32",
        "lengths": args.lengths,
        "curve_tokens": curve,
        "budget_bytes": BUDGET,
        "row_tokens": args.tokens,
        "epochs": args.epochs,
        "question": asked,
        "parts": parts,
    }
    write(out / "table.json", json.dumps(found) + "\n")
    report.write(found, out)
    say(f"finished; table.json, table.txt and picture.png are in {out}")


if __name__ == "__main__":
    main()
