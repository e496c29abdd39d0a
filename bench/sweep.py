"""The reverse sweep (`sweep=` of the surgery): what a layer needs while it is recomputed and differentiated, and a step.

layer  one decoder layer of TinyLlama's shape (hidden 2,048, 32 heads, 4 for keys, 5,632), bf16, weights frozen, under gradient
       checkpointing: the most that is alive in forward and backward beside weights and the input, in hidden states (tokens x
       2,048 x 2 bytes). Counted by weak references to storages; at lengths above `--real` on tensors without data, by the same
       code. `--time` also runs it there, several times, stock and swept in turns
model  SmolLM2-135M with LoRA r = 16, bf16, checkpointing: the most that the process takes in one step above the idle model, as
       the kernel counts it (VmHWM), in a fresh process with MALLOC_MMAP_THRESHOLD_=65536; the third of three steps

python -m bench.sweep layer [--tokens N …] [--time]
python -m bench.sweep model [--tokens N …]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from typing import Any

import torch
from examples.resident import forget_peak, resident
from torch import Tensor

from bench.smollm2 import RESULTS, Job, Prepared, fresh, say, table, write

MIB = 2**20
SIDES = {"stock": None, "without sweep": False, "swept": True}
TINYLLAMA = dict(
    hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4, num_hidden_layers=1, vocab_size=32
)


# ---- one layer --------------------------------------------------------------------------------------------------------------


class Gradient(torch.autograd.Function):
    """A loss whose gradient is drawn in the backward, so that nobody else holds it, as between two layers."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = y.shape, y.dtype
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.full(ctx.shape, 1e-3, dtype=ctx.dtype)


def layer_of(side: str, tile: int | bool) -> torch.nn.Module:
    """A model of one layer, ready for `pass_through`."""
    from transformers import LlamaConfig, LlamaModel

    from unswag import apply_unswag_surgery

    torch.manual_seed(0)
    config = LlamaConfig(**TINYLLAMA, max_position_embeddings=1 << 20, attn_implementation="sdpa", use_cache=False)
    model = LlamaModel(config).to(torch.bfloat16).train().requires_grad_(False)
    model.norm = torch.nn.Identity()  # only the layer counts
    model.activation_checkpointing_enable()
    if SIDES[side] is not None:
        apply_unswag_surgery(model, sweep=tile if SIDES[side] else False, verbose=False)
    return model


def pass_through(model: torch.nn.Module, x: Tensor) -> None:
    """Forward and backward; x gets a gradient."""
    y = model(inputs_embeds=x).last_hidden_state
    loss = Gradient.apply(y)
    del y
    loss.backward()


def peak_of_layer(side: str, tokens: int, tile: int | bool, real: int) -> float:
    """Bytes; without data above `real` tokens."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from unswag.torch.audit import LiveStorages

    model = layer_of(side, tile)
    pass_through(model, torch.randn(1, int(tile) + 1, 2048, dtype=torch.bfloat16).requires_grad_())  # its comparison
    fake = FakeTensorMode(allow_non_fake_inputs=True) if tokens > real else contextlib.nullcontext()
    if isinstance(fake, FakeTensorMode):
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                module._parameters[name] = torch.nn.Parameter(fake.from_tensor(p.detach()), requires_grad=False)
    with fake:
        x = torch.randn(1, tokens, 2048, dtype=torch.bfloat16).requires_grad_()
        with LiveStorages(model, x) as live:
            pass_through(model, x)
            return live.peak()


def seconds_of_layer(tokens: int, tile: int | bool, repeats: int) -> dict[str, list[float]]:
    """Of forward and backward, sides in turns."""
    models = {side: layer_of(side, tile) for side in ("stock", "swept")}
    found: dict[str, list[float]] = {side: [] for side in models}
    x = torch.randn(1, tokens, 2048, dtype=torch.bfloat16)
    for model in models.values():
        pass_through(model, x[:, :4097].clone().requires_grad_())
    for _ in range(repeats):
        for side, model in models.items():
            leaf = x.detach().requires_grad_()
            start = time.perf_counter()
            pass_through(model, leaf)
            found[side].append(time.perf_counter() - start)
            say(f"{side}, {tokens} tokens: {found[side][-1]:.1f} s")
            gc.collect()
    return found


def layers(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for tokens in args.tokens or (4096, 8192, 32768):
        for side in args.sides or SIDES:
            peak = fresh(peak_of_layer, side, tokens, args.tile, args.real)
            rows.append({
                "side": side, "tokens": tokens, "tile": args.tile, "data": tokens <= args.real, "peak_bytes": peak,
                "hidden_states": peak / (tokens * 4096),
            })  # fmt: skip
            say(rows[-1])
    found: dict[str, Any] = {"peaks": rows}
    if args.time:
        torch.set_num_threads(args.threads)
        found["seconds"] = [
            {"tokens": tokens, "tile": args.tile, "threads": args.threads, **seconds_of_layer(tokens, args.tile, args.repeats)}
            for tokens in args.tokens
        ]
    table(
        "One layer of TinyLlama's shape: highest beside weights and input, in hidden states",
        ("side", "tokens", "tile", "hidden states"),
        [(r["side"], f"{r['tokens']:,}", r["tile"], f"{r['hidden_states']:.2f}") for r in rows],
    )
    return found


# ---- a model ----------------------------------------------------------------------------------------------------------------

MODEL_SIDES = {  # name: arguments of the surgery
    "stock": None,
    "ours": {},
    "ours, disk": {"store": "disk"},
    "swept": {"sweep": True},
    "swept, disk": {"sweep": True, "store": "disk"},
    "swept, disk, attention computed again": {"sweep": True, "keep_attention": False, "store": "disk"},
}


def prepared(side: str, tokens: int, tile: int, layers: int) -> Any:
    from unswag import apply_unswag_surgery
    from unswag.torch.checkpoint import Sweep

    run = Prepared(Job(training="lora", checkpointing=True, tokens=tokens))
    base = run.model.get_base_model().model
    base.layers = base.layers[:layers]
    options = dict(MODEL_SIDES[side] or {})
    if options.pop("sweep", False):
        options["sweep"] = Sweep(tile, options.pop("keep_attention", None))
    if MODEL_SIDES[side] is not None:
        run.report = apply_unswag_surgery(run.model, verbose=False, **options)
    return run


def peak_of_model(side: str, tokens: int, tile: int, steps: int, layers: int) -> dict[str, Any]:
    """Bytes of the process above the idle model in the last of `steps` steps, and seconds of that step."""
    from bench import bf16_matmul

    products = bf16_matmul.enable()
    run = prepared(side, tokens, tile, layers)
    gc.collect()
    idle = resident("VmRSS")
    for _ in range(steps - 1):
        run.step()
        run.zero_grad()
    gc.collect()
    between = resident("VmRSS")
    forget_peak()
    start = time.perf_counter()
    loss = run.step()
    sweep = vars(run.model).get("_unswag_sweep")
    return {
        "peak_bytes": resident("VmHWM") - idle, "between_steps_bytes": between - idle, "after_bytes": resident("VmRSS") - idle,
        "seconds": time.perf_counter() - start, "loss": loss, "idle_bytes": idle,
        "products": products, "scratch_of_products_bytes": bf16_matmul.scratch_bytes(),
        "layers_swept": 0 if sweep is None else len(sweep.swept), "notes": [] if sweep is None else sweep.notes,
    }  # fmt: skip


def models(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for tokens in args.tokens or (8192,):
        for side in args.sides or MODEL_SIDES:
            environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(args.threads)}
            found = fresh(peak_of_model, side, tokens, args.tile, args.steps, args.layers, environment=environment)
            settings = {
                "tokens": tokens,
                "tile": args.tile,
                "steps": args.steps,
                "layers": args.layers,
                "threads": args.threads,
            }
            rows.append({"side": side, **settings, **found})
            say(rows[-1])
    table(
        "SmolLM2-135M, LoRA r = 16, bf16, checkpointing: highest of one step above the idle model",
        ("side", "tokens", "tile", "layers", "MiB", "layers swept"),
        [
            (r["side"], f"{r['tokens']:,}", r["tile"], r["layers"], f"{r['peak_bytes'] / MIB:,.0f}", r["layers_swept"])
            for r in rows
        ],
    )
    return {"peaks": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["layer", "model"])
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--real", type=int, default=8192, help="longest sequence whose peak is counted with data")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30, help="of SmolLM2's 30")
    parser.add_argument("--sides", nargs="+", choices=MODEL_SIDES)
    args = parser.parse_args()
    path = RESULTS / "sweep.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept = {part: kept[part] for part in ("layer", "model") if part in kept}
    write("sweep", kept | {args.part: layers(args) if args.part == "layer" else models(args)})


if __name__ == "__main__":
    main()
