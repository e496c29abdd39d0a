"""Fine-tunes SmolLM2-135M-Instruct on the docstrings of this Python, stock and with UnSwag's surgery, and compares.

Each run is a process of its own (examples/demo/train.py): LoRA with gradient checkpointing, fp32, Hugging Face's Trainer; a few
rows of text, several times over, so that the mean losses of the epochs can be compared. With --all also full training, and both
without checkpointing. Written to demo-out/: the data as .jsonl, prepared rows, one .json per run, table.json, table.txt and
picture.png.

    python -m examples.demo [--all]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.docstrings import documented
from bench.smollm2 import ROOT, directory, machine, tokenizer
from examples.demo import report
from examples.demo.train import Run

SIGNATURE = 300  # characters at most: a few constructors take more than they explain


def write_pairs(path: Path) -> int:
    """The docstrings as instruction data, one JSON object a line; how many."""
    pairs = [
        {"instruction": f"What does `{item.signature}` of Python's standard library do?", "output": item.text}
        for item in documented()
        if len(item.signature) <= SIGNATURE
    ]
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return len(pairs)


def prepare(out: Path, tokens: int) -> Path:
    """Instruction data, tokenized with the model's chat template, prompts masked, packed into rows of `tokens`."""
    from unswag import prepare_data

    pairs, rows = out / "docstrings.jsonl", out / "rows"
    print(f"{write_pairs(pairs):,} pairs of question and docstring written to {pairs}")
    data = prepare_data(pairs, tokenizer(), max_length=tokens)
    shutil.rmtree(rows, ignore_errors=True)
    data.save(rows)
    return rows


def train(run: Run, rows: Path, out: Path) -> dict[str, Any]:
    """`run` in a process of its own."""
    print(f"\n--- {run.title}", flush=True)
    path = out / f"{run.name}.json"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        # Freed tensors go back to the system at once, so that the peak is the program's and not malloc's
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-m", "examples.demo.train", json.dumps(run.__dict__), str(rows), str(path)]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise SystemExit(f"the run failed: {run.title}; what it said stands above")
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also full training, and both without checkpointing")
    parser.add_argument("--rows", type=int, default=8, help="of text, each of them one step (default 8)")
    parser.add_argument("--tokens", type=int, default=512, help="of a row (default 512)")
    parser.add_argument("--epochs", type=int, default=3, help="how often each run goes through the rows (default 3)")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out", help="folder for everything (default demo-out)")
    args = parser.parse_args()

    start = time.monotonic()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    directory()  # the model's files are there before any run is timed
    rows = prepare(out, args.tokens)
    ways = [("lora", True)] + [("lora", False), ("full", True), ("full", False)] * args.all
    results = []
    for training, checkpointing in ways:
        for side in ("stock", "unswag"):
            results.append(train(Run(side, training, checkpointing, args.rows, args.tokens, args.epochs), rows, out))
    settings = {
        "machine": machine(), "rows": args.rows, "tokens": args.tokens, "epochs": args.epochs, "dtype": "float32",
    }  # fmt: skip
    report.write(out, settings, results)
    print(f"table.json, table.txt and picture.png are in {out}; {(time.monotonic() - start) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
