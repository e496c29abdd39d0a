"""Error of every parameter's gradient in one fp32 step of SmolLM2-135M on real text, against a true fp64 reference.

error   ‖g - g64‖ / ‖g64‖ of each parameter, stock and ours side by side; the reference is fp64 in norms and loss too
        (bench/exact.py)
patched ‖g - stock‖ / ‖stock‖ with norms and MLP patched and stock's own loss
"""

from __future__ import annotations

import argparse
import statistics

from bench.exact import Exact
from bench.smollm2 import Job, Prepared, fresh, patched, say, table, write

SIDES = ["stock", "our loss", "ours", "stock loss"]
GOALS = {"worst": 5e-5, "median": 1e-5, "patched alone": 5e-6}


def measure(training: str, tokens: int) -> dict:
    """All sides in one process of its own; the reference's gradients take 1 GiB."""
    import torch

    def gradients(run: Prepared) -> dict[str, torch.Tensor]:
        return {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}

    def errors(have: dict, want: dict) -> dict[str, float]:
        assert have.keys() == want.keys()
        return {name: ((have[name].double() - want[name].double()).norm() / want[name].double().norm()).item() for name in want}

    say("fp64 reference")
    reference = Exact(Job(training=training, tokens=tokens))
    weights = Prepared(Job(training=training, dtype="fp32", tokens=tokens)).model.state_dict()
    reference.model.load_state_dict(weights)  # random draws differ by dtype
    exact_loss = reference.step()
    exact, stock, results = gradients(reference), None, {}
    del reference.model
    for side in SIDES:
        say(side)
        run = Prepared(Job(side=side, training=training, dtype="fp32", tokens=tokens))
        run.model.load_state_dict(weights)
        loss = run.step()
        grads = gradients(run)
        stock = grads if side == "stock" else stock
        error = errors(grads, exact)
        results[side] = {
            "loss_error": loss - exact_loss,
            "worst": max(error.values()),
            "median": statistics.median(error.values()),
            "errors": error,
            "worst_against_stock": max(errors(grads, stock).values()),
            "patched": patched(run.report),
        }
    return {"loss_fp64": exact_loss, "parameters": len(exact), "sides": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", choices=["full", "lora"], default="full")
    parser.add_argument("--tokens", type=int, default=512, help="(default 512)")
    args = parser.parse_args()

    result = fresh(measure, args.training, args.tokens)
    name = "gradients" if args.training == "full" else "gradients_lora"
    write(name, {"training": args.training, "tokens": args.tokens, "goals": GOALS, **result})

    stock = result["sides"]["stock"]["errors"]
    lines = []
    for side, r in result["sides"].items():
        better = sum(r["errors"][p] < stock[p] for p in stock)
        lines.append((
            side, f"{r['worst']:.1e}", f"{r['median']:.1e}", f"{better} of {len(stock)}", f"{r['worst_against_stock']:.1e}",
            f"{r['loss_error']:+.1e}", " ".join(f"{k} {v}" for k, v in r["patched"].items()),
        ))  # fmt: skip
    header = ("side", "worst error", "median", "nearer than stock", "worst against stock", "loss error", "modules patched")
    table(f"SmolLM2-135M, {args.training}, fp32, {args.tokens} tokens, against fp64", header, lines)


if __name__ == "__main__":
    main()
