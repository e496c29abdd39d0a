"""Seconds per step (forward and backward, no optimizer) of SmolLM2-135M: stock, stock with our loss alone, ours.

The sides take turns in one process, each round in another order, after one round that does not count; best of 5 rounds. Default
malloc. The goals are ratios to stock; the ratio to stock with our loss says what the rest costs or saves.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

from bench.smollm2 import Job, Prepared, fresh, patched, say, table, write

ROWS = {  # name: (job, highest ratio to stock)
    "full": (Job(tokens=4096), 0.95),
    "checkpointing": (Job(tokens=4096, checkpointing=True), 1.0),
    "lora": (Job(training="lora", tokens=2048), 0.95),
}
SIDES = ["stock", "our loss", "ours"]


def measure(job: dict, rounds: int, threads: int) -> dict:
    """Seconds of each side in each round. Runs in a process of its own."""
    import torch

    from bench import bf16_matmul

    torch.set_num_threads(threads)
    products = bf16_matmul.enable() if job["dtype"] == "bf16" else "fp32"
    runs = {side: Prepared(dataclasses.replace(Job(**job), side=side)) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for round_ in range(rounds + 1):
        for side in SIDES[round_ % 3 :] + SIDES[: round_ % 3]:
            start = time.perf_counter()
            runs[side].step()
            seconds[side].append(time.perf_counter() - start)
            runs[side].zero_grad()
        say(f"round {round_} of {rounds}: " + ", ".join(f"{side} {seconds[side][-1]:.1f} s" for side in SIDES))
    return {
        "seconds": {side: s[1:] for side, s in seconds.items()},
        "threads": threads,
        "patched": patched(runs["ours"].report),
        "products": products,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which rows (default: all)")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of the weights (default bf16)")
    parser.add_argument("--tokens", type=int, help="(default 4096, LoRA 2048; the goals are for those)")
    parser.add_argument("--rounds", type=int, default=5, help="the best counts (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="(default 2)")
    args = parser.parse_args()

    results, lines = {}, []
    for row in args.rows:
        job, goal = ROWS[row]
        job = dataclasses.replace(job, dtype=args.dtype, tokens=args.tokens or job.tokens)
        say(f"{row}: {job}")
        result = fresh(measure, job, args.rounds, args.threads)
        best = {side: min(s) for side, s in result["seconds"].items()}
        paired = statistics.median(o / s for o, s in zip(result["seconds"]["ours"], result["seconds"]["stock"], strict=True))
        results[row] = {
            "job": dataclasses.asdict(job), "goal": goal, **result, "best_seconds": best,
            "ratio_to_stock": best["ours"] / best["stock"], "ratio_to_our_loss": best["ours"] / best["our loss"],
            "median_of_paired_ratios": paired,
        }  # fmt: skip
        lines.append((
            row, *(f"{best[side]:.2f}" for side in SIDES), f"{best['ours'] / best['stock']:.3f}", f"<= {goal}",
            f"{paired:.3f}", f"{best['ours'] / best['our loss']:.3f}",
        ))  # fmt: skip
    name = "step_time" if args.dtype == "bf16" else f"step_time_{args.dtype}"
    write(name, {"dtype": args.dtype, "rounds": args.rounds, "rows": results})
    header = ("row", *(f"{side} s" for side in SIDES), "ours / stock", "goal", "median of pairs", "ours / our loss")
    table(f"SmolLM2-135M, {args.dtype}, seconds per step, best of {args.rounds}", header, lines)


if __name__ == "__main__":
    main()
