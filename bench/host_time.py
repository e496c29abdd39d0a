"""Host time of a training step: what the CPU spends on Python, autograd and the stash where arithmetic is nothing.

The figure is what a GPU with short sequences waits for. A Llama of 30 layers with hidden size 64 and 16 tokens, plain, with
gradient checkpointing and with LoRA; and SmolLM2-135M at 128 tokens. One thread. The sides take turns step by step in one
process, so that a pair has seen the same machine, and CPU time counts, not wall time. The ratio is the median over the pairs.

Sides: stock; "hooks", stock under saved-tensor hooks that return the tensor they get (the floor of anything that uses hooks);
ours. Doors are the tensors that a step hands to saved-tensor hooks. `door_costs` times one door by what it makes of its tensor.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
import timeit
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from bench.smollm2 import Job, Prepared, operate, say, table, write

TINY = {"layers": 30, "hidden": 64, "tokens": 16}
CASES = {  # name: highest ratio to stock
    "plain": 1.25,
    "checkpointing": 1.15,
    "lora": 1.0,
    "smollm2": 1.02,
}
SIDES = ["stock", "hooks", "ours"]
PER_LAYER = 30  # SmolLM2-135M has 30 layers, and so has the tiny model


def tiny(case: str, side: str) -> Callable[[], Any]:
    """A step of the tiny Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=TINY["hidden"], intermediate_size=2 * TINY["hidden"], num_hidden_layers=TINY["layers"],
        num_attention_heads=4, num_key_value_heads=2, vocab_size=256, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).train()
    if case == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    operate(model, "ours" if side == "ours" else "stock")
    if case == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 256, (1, TINY["tokens"]))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def real(side: str) -> Callable[[], Any]:
    """A step of SmolLM2-135M, full training in bf16."""
    run = Prepared(Job(side="ours" if side == "ours" else "stock", tokens=128))

    def step() -> None:
        run.step()
        run.zero_grad()

    return step


@contextlib.contextmanager
def around(side: str) -> Iterator[None]:
    import torch

    if side == "hooks":
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            yield
    else:
        yield


def doors(step: Callable[[], Any]) -> int:
    """How many tensors a step saves. Where other hooks are in place a stash leaves them alone, so these see all."""
    import torch

    seen = 0

    def pack(t: Any) -> Any:
        nonlocal seen
        seen += 1
        return t

    with warnings.catch_warnings(action="ignore"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return seen


def measure(case: str, pairs: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    if case == "smollm2":
        from bench import bf16_matmul

        bf16_matmul.enable()
    steps = {side: real(side) if case == "smollm2" else tiny(case, side) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(-2, pairs):
        for side in SIDES[turn % 3 :] + SIDES[: turn % 3]:
            with around(side):
                start = time.process_time()
                steps[side]()
                if turn >= 0:
                    seconds[side].append(time.process_time() - start)
    ratio = {s: statistics.median(a / b for a, b in zip(seconds[s], seconds["stock"], strict=True)) for s in SIDES[1:]}
    return {
        "ms": {side: 1e3 * statistics.median(times) for side, times in seconds.items()},
        "ms_per_layer": {side: 1e3 * statistics.median(times) / PER_LAYER for side, times in seconds.items()},
        "ratio": ratio,
        "pairs": pairs,
        "most": CASES[case],
    }


def door_costs(number: int = 2000) -> dict[str, float]:
    """Microseconds to pack and to unpack one tensor, by what the door makes of it."""
    import torch

    from unswag.torch import functional, stash

    weight = torch.nn.Parameter(torch.ones(64))
    costs = {}
    x = torch.randn(16, 64, requires_grad=True) * 1
    for case in ("parameter", "reference", "recipe"):
        with stash.Stash():
            pack, unpack = stash.top_hooks()
            y = functional.rms_norm(x, weight)
            t = {"parameter": weight, "reference": x, "recipe": y}[case]
            handle = pack(t)
            costs[f"{case}, pack"] = 1e6 * min(timeit.repeat(functools.partial(pack, t), number=number, repeat=7)) / number
            if case != "recipe":  # there it is the op that is recomputed
                call = functools.partial(unpack, handle)
                costs[f"{case}, unpack"] = 1e6 * min(timeit.repeat(call, number=number, repeat=7)) / number
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which (default: all)")
    parser.add_argument("--pairs", type=int, default=60, help="steps of each side (default 60; SmolLM2 a quarter of it)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    results: dict[str, Any] = {"doors_us": door_costs()}
    say(", ".join(f"{name} {us:.2f} us" for name, us in results["doors_us"].items()))
    cases = {}
    for case in args.cases:
        cases[case] = measure(case, args.pairs if case != "smollm2" else max(1, args.pairs // 4))
        if case != "smollm2":
            cases[case]["doors_per_layer"] = doors(tiny(case, "ours")) / PER_LAYER
        say(case, cases[case]["ratio"])
    table(
        "Host time of a step, one thread",
        ("case", "stock, ms", "hooks", "ours", "at most", "ours, ms per layer"),
        [
            (case, f"{r['ms']['stock']:.1f}", f"{r['ratio']['hooks']:.3f}", f"{r['ratio']['ours']:.3f}", r["most"],
             f"{r['ms_per_layer']['ours']:.3f}")
            for case, r in cases.items()
        ],
    )  # fmt: skip
    if not args.no_write:
        write("host_time", {**results, "cases": cases, "tiny": TINY})


if __name__ == "__main__":
    main()
