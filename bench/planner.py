"""How near `unswag.plan` is: the peak that it predicts beside the peak that one training step takes, on the CPU.

Two measures. "process": what the kernel counts (VmHWM) above the loaded idle model, in the second of two steps, with
MALLOC_MMAP_THRESHOLD_=65536; weights are in neither side of the ratio. "live": storages really alive, counted by weak references
in the same step (a run of its own, because counting takes memory). The ratio is measured / predicted.

Models are random and small, of the shapes of Llama, Qwen 2 and GPT-2, and SmolLM2-135M; bf16, batch 1, AdamW. The constants of
`unswag.torch.scratch` were fitted on 1,536 tokens, a length of no case here. Results are kept as they come.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from examples.resident import forget_peak, resident

from bench.kept import Kept
from bench.smollm2 import ROOT, say, table, write

MIB = 2**20
MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
                  num_key_value_heads=2, vocab_size=16384),
    "qwen2": dict(model_type="qwen2", hidden_size=384, intermediate_size=1152, num_hidden_layers=7, num_attention_heads=6,
                  num_key_value_heads=2, vocab_size=32000, tie_word_embeddings=True),
    "gpt2": dict(model_type="gpt2", n_embd=448, n_layer=6, n_head=7, vocab_size=20000, n_positions=16384, resid_pdrop=0.0,
                 embd_pdrop=0.0, attn_pdrop=0.0),
}  # fmt: skip
WAYS: dict[str, tuple[bool, dict[str, Any]]] = {  # name: checkpointing, arguments of the surgery
    "keep": (False, {}),
    "int8": (False, {"policy": "int8"}),
    "checkpoint": (True, {}),
    "checkpoint int8": (True, {"policy": "int8"}),
}
FITTED = 1536
LORA = 16


def cases() -> list[dict[str, Any]]:
    """model, training, way, tokens of each."""
    rows = [
        dict(model=model, training=training, way=way, tokens=tokens)
        for tokens, model, training, way in itertools.product((1024, 3000), MODELS, ("full", "lora"), WAYS)
    ]
    rows += [dict(model="smollm2", training=t, way="checkpoint", tokens=1024) for t in ("full", "lora")]
    rows += [dict(model="llama", training=t, way="checkpoint", tokens=6000) for t in ("full", "lora")]
    rows += [dict(model="qwen2", training="lora", way="checkpoint int8", tokens=8192)]
    rows += [dict(model="llama", training="lora", way="checkpoint", tokens=16384)]
    return rows


def model_of(name: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if name == "smollm2":
        from examples.smollm2 import directory

        return AutoModelForCausalLM.from_pretrained(directory(), dtype=torch.bfloat16, attn_implementation="sdpa")
    config = dict(MODELS[name])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config), dtype=torch.bfloat16, attn_implementation="sdpa"
    )


def with_training(model: Any, training: str) -> Any:
    if training == "full":
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=LORA, target_modules="all-linear", task_type="CAUSAL_LM"))


def measure(model: Any, way: str, tokens: int, live: bool) -> dict[str, int]:
    """Two steps of `model`, the second measured. Runs in a process that ends afterwards."""
    import gc

    import torch
    from unswag import apply_unswag_surgery
    from unswag.torch.timeline import Timeline

    checkpointing, arguments = WAYS[way]
    model.config.use_cache = False
    model.train()
    apply_unswag_surgery(model, verify=False, verbose=False, **arguments)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
    gc.collect()
    idle = resident("VmRSS")

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    if live:
        states = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        with Timeline(model, [ids, *(t for state in optimizer.state.values() for t in state.values())]) as line:
            step()
        change = [0] * (len(line.instants) + 1)
        for thing in line.things:
            change[thing.born] += thing.bytes
            if thing.died is not None:
                change[thing.died] -= thing.bytes
        return {"live_bytes": max(itertools.accumulate(change)) + states}
    between = resident("VmRSS")
    forget_peak()
    step()
    return {"idle_bytes": idle, "between_steps_bytes": between, "process_bytes": resident("VmHWM") - idle}


def serve() -> None:
    """Reads cases, one a line, of one model and training; forks a process for each, and prints what it measured."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    first = json.loads(sys.argv[2])
    model = with_training(model_of(first["model"]), first["training"])
    import unswag.torch.surgery  # noqa: F401
    import unswag.torch.timeline  # noqa: F401

    for line in sys.stdin:
        case = json.loads(line)
        read, written = os.pipe()
        if (child := os.fork()) == 0:
            found = measure(model, case["way"], case["tokens"], case["live"])
            os.write(written, json.dumps(found).encode())
            os._exit(0)
        os.close(written)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        if os.waitpid(child, 0)[1] or not text:
            raise SystemExit(f"the process of {case} failed")
        print(text, flush=True)


def measured(rows: list[dict[str, Any]], live: bool) -> list[dict[str, Any]]:
    """What each case took; a process per model and training, and in it one per case."""
    kept = Kept("planner", of="measured 1")
    found: dict[str, dict[str, Any]] = {}
    for (_, model, training), group in itertools.groupby(rows, key=lambda row: (row["tokens"], row["model"], row["training"])):
        todo = [row for row in group if (settings := {**row, "live": live}) and kept.get(settings) is None]
        if not todo:
            continue
        path = os.pathsep.join((str(ROOT / "python"), str(ROOT)))
        environment = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "bench.planner", "--serve", json.dumps({"model": model, "training": training})]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        ) as process:
            assert process.stdin and process.stdout
            for row in todo:
                say("live" if live else "process", row)
                print(json.dumps({**row, "live": live}), file=process.stdin, flush=True)
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"{row} failed; what it said stands above")
                kept.put({**row, "live": live}, json.loads(line))
    for row in rows:
        found[json.dumps(row)] = kept.get({**row, "live": live})
    return [found[json.dumps(row)] for row in rows]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve()
    else:
        fit = [dict(model=m, training=t, way=w, tokens=FITTED) for m in MODELS for t in ("full", "lora") for w in WAYS]
        rows = fit if sys.argv[1:] == ["fit"] else cases()
        for row, got in zip(rows, measured(rows, live=False)):
            print(row, {k: round(v / MIB, 1) for k, v in got.items()})
