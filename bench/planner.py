"""How near `unswag.plan` is: the peak that it predicts beside the peak that one training step takes, on the CPU.

Measured is what the kernel counts (VmHWM) above the loaded idle model, in the second of two steps, with
MALLOC_MMAP_THRESHOLD_=65536; weights are in neither side of the ratio, which is measured / predicted. The
interpreter and its libraries as loaded are in the idle model; what libraries take with the first steps is predicted, too.

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
    "checkpoint disk": (True, {"store": "disk"}),
}
PLANNED = {  # the planner's names of them
    "keep": "keep", "int8": "keep in int8", "checkpoint": "checkpointing", "checkpoint int8": "checkpointing in int8",
    "checkpoint disk": "checkpoints on disk",
}  # fmt: skip
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
    import unswag.torch.surgery
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


def predicted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the planner says of each case, without data: bytes above the weights, and the instant."""
    from unswag.torch.blueprint import blueprint
    from unswag.torch.plan import Case
    from unswag.torch.ways import WAYS as ALL
    from unswag.torch.ways import prepared

    found: dict[str, dict[str, Any]] = {}
    order = sorted(
        rows, key=lambda row: (row["model"], row["training"], str(WAYS[row["way"]][1].get("policy")), row["way"], row["tokens"])
    )
    for (name, training), group in itertools.groupby(order, key=lambda row: (row["model"], row["training"])):
        case = Case(
            blueprint(model_of(name), LORA if training == "lora" else None), 1, "cpu", "adamw", dict.fromkeys(["device"])
        )
        before, made = None, {}
        for row in group:
            way = next(way for way in ALL if way.name == PLANNED[row["way"]])
            prepared(case.blueprint.model, way, before)
            before = way
            forecasts = made.setdefault(way.name, Forecasts(case.blueprint, way))
            peak, instant = case.at(forecasts.of(row["tokens"]), row["tokens"])
            libraries = case.always(way) - case.weights - case.states
            found[json.dumps(row)] = {
                "predicted_bytes": peak - case.weights, "of_it_libraries_bytes": libraries, "instant": instant
            }  # fmt: skip
            say("predicted", row, f"{(peak - case.weights) / MIB:,.1f} MiB")
    return [found[json.dumps(row)] for row in rows]


class Forecasts:
    """Of one way: the one that `unswag.plan` makes for a context, made once where several contexts have the same."""

    def __init__(self, blueprint: Any, way: Any):
        self.blueprint, self.way, self.made = blueprint, way, {}

    def of(self, tokens: int) -> Any:
        from unswag.torch.forecast import Forecast, first_length

        first = min(tokens, first_length(self.blueprint, 1, "cpu"))
        if first not in self.made:
            self.made[first] = Forecast(self.blueprint, self.way, 1, "cpu", first)
        return self.made[first]


def summary(ratios: list[float]) -> dict[str, Any]:
    return {
        "cases": len(ratios), "min": min(ratios), "median": statistics.median(ratios), "max": max(ratios),
        "above_1": sum(r > 1 for r in ratios), "above_1.02": sum(r > 1.02 for r in ratios),
        "below_0.90": sum(r < 0.9 for r in ratios),
    }  # fmt: skip


def main() -> None:
    import warnings

    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="print what the constants of unswag.torch.scratch are fitted to")
    parser.add_argument("--measured-only", action="store_true", help="only cases that were measured before")
    args = parser.parse_args()
    rows = cases()
    if args.fit:
        rows = [dict(model=m, training=t, way=w, tokens=FITTED) for m in MODELS for t in ("full", "lora") for w in WAYS]
    if args.measured_only:
        kept = Kept("planner", of="measured 1")
        rows = [row for row in rows if kept.get({**row, "live": False}) is not None]
    got = measured(rows, live=False)
    said = predicted(rows)
    results = [
        {**row, **m, **p, "ratio": round(m["process_bytes"] / p["predicted_bytes"], 4)}
        for row, m, p in zip(rows, got, said, strict=True)
    ]
    groups = {"all": [r["ratio"] for r in results]}
    for key in ("model", "training", "way", "tokens"):
        for r in results:
            groups.setdefault(f"{key} {r[key]}", []).append(r["ratio"])
    summaries = {name: summary(ratios) for name, ratios in groups.items()}
    if not args.fit:
        write("planner", {"measure": "VmHWM of the second step above the idle model, by what is predicted above the weights",
                          "summary": summaries, "cases": results})  # fmt: skip
    table(
        "Measured / predicted, process memory above the weights",
        ("cases of", "n", "min", "median", "max", "above 1", "above 1.02"),
        [
            (name, s["cases"], f"{s['min']:.3f}", f"{s['median']:.3f}", f"{s['max']:.3f}", s["above_1"], s["above_1.02"])
            for name, s in summaries.items()
        ],
    )


if __name__ == "__main__":
    serve() if sys.argv[1:2] == ["--serve"] else main()
