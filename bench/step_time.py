"""Seconds per step (forward and backward, no optimizer) of SmolLM2-135M: stock, stock with our loss alone, ours.

The sides take turns in one process, each round in another order, after one round that does not count; best of 5 rounds. Default
malloc. The goals are ratios to stock; the ratio to stock with our loss says what the rest costs or saves. Each round is kept as
it comes; a run that was killed does the rounds that are missing, after another that does not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

from bench.kept import Kept
from bench.smollm2 import Job, Prepared, commit, fresh, patched, say, table, write

ROWS = {  # name: (job, highest ratio to stock)
    "full": (Job(tokens=4096), 0.95),
    "checkpointing": (Job(tokens=4096, checkpointing=True), 1.0),
    "lora": (Job(training="lora", tokens=2048), 0.95),
}
SIDES = ["stock", "our loss", "ours"]


def settings(job: Job, threads: int, round_: int) -> dict:
    return {"job": job, "threads": threads, "round": round_}


def measure(job_: dict, rounds: list[int], threads: int) -> dict:
    """Seconds of each side in each of `rounds`, kept one by one. Runs in a process of its own; returns what was patched."""
    import torch

    from bench import bf16_matmul

    job, kept = Job(**job_), Kept("step_time")
    torch.set_num_threads(threads)
    products = bf16_matmul.enable() if job.dtype == "bf16" else "fp32"
    runs = {side: Prepared(dataclasses.replace(job, side=side)) for side in SIDES}
    about = {"patched": patched(runs["ours"].report), "products": products}
    for round_ in [None, *rounds]:
        turn = (round_ or 0) % len(SIDES)
        seconds = {}
        for side in SIDES[turn:] + SIDES[:turn]:
            start = time.perf_counter()
            runs[side].step()
            seconds[side] = time.perf_counter() - start
            runs[side].zero_grad()
        name = "warm-up" if round_ is None else f"round {round_ + 1}"
        say(f"{name}: " + ", ".join(f"{side} {s:.1f} s" for side, s in seconds.items()))
        if round_ is not None:
            kept.put(settings(job, threads, round_), {**about, "seconds": seconds, "commit": commit()})
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which rows (default: all)")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of the weights (default bf16)")
    parser.add_argument("--tokens", type=int, help="(default 4096, LoRA 2048; the goals are for those)")
    parser.add_argument("--rounds", type=int, default=5, help="the best counts (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="(default 2)")
    args = parser.parse_args()

    results, lines, kept = {}, [], Kept("step_time")
    for row in args.rows:
        job, goal = ROWS[row]
        job = dataclasses.replace(job, dtype=args.dtype, tokens=args.tokens or job.tokens)
        say(f"{row}: {job}")
        rounds = [kept.get(settings(job, args.threads, i)) for i in range(args.rounds)]
        if missing := [i for i, done in enumerate(rounds) if done is None]:
            fresh(measure, job, missing, args.threads)
            rounds = [kept.get(settings(job, args.threads, i)) for i in range(args.rounds)]
        if None in rounds:
            raise SystemExit("the sources changed during the run, which therefore says nothing: run it again")
        best = {side: min(r["seconds"][side] for r in rounds) for side in SIDES}
        paired = statistics.median(r["seconds"]["ours"] / r["seconds"]["stock"] for r in rounds)
        results[row] = {
            "job": dataclasses.asdict(job), "goal": goal, "rounds": rounds, "best_seconds": best,
            "ratio_to_stock": best["ours"] / best["stock"], "ratio_to_our_loss": best["ours"] / best["our loss"],
            "median_of_paired_ratios": paired,
        }  # fmt: skip
        lines.append((
            row, *(f"{best[side]:.2f}" for side in SIDES), f"{best['ours'] / best['stock']:.3f}", f"<= {goal}",
            f"{paired:.3f}", f"{best['ours'] / best['our loss']:.3f}",
        ))  # fmt: skip
    name = "step_time" if args.dtype == "bf16" else f"step_time_{args.dtype}"
    write(name, {"dtype": args.dtype, "rounds": args.rounds, "threads": args.threads, "rows": results})
    header = ("row", *(f"{side} s" for side in SIDES), "ours / stock", "goal", "median of pairs", "ours / our loss")
    table(f"SmolLM2-135M, {args.dtype}, seconds per step, best of {args.rounds}", header, lines)


if __name__ == "__main__":
    main()
