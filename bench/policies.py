"""What each policy keeps and costs: bytes per token that are alive after the forward, and seconds per step, of SmolLM2-135M.

bytes    as bench.memory: bf16, 1,024 tokens, SDPA, the second of two steps in a fresh process, counted by weak references to
         storages; the ledger's figure beside it
seconds  forward and backward in bf16, the policies by turns in one process, best of the rounds; the goals are ratios to exact.
         Each round is kept as it comes
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

from bench import memory
from bench.kept import Kept
from bench.smollm2 import Job, Prepared, commit, fresh, say, table, write

POLICIES = ["exact", "int8", "int4", "2bit"]
BYTES = {"int8": 235_000, "int4": 190_000, "2bit": 170_000}  # full training, at most
SECONDS = {"int8": 1.05, "int4": 1.10}  # of exact, at most
ROWS = {
    "full": Job(side="ours"),
    "checkpointing": Job(side="ours", checkpointing=True),
}


def settings(tokens: int, round_: int) -> dict:
    return {"tokens": tokens, "round": round_}


def take_turns(tokens: int, rounds: list[int]) -> dict:
    """Seconds of each policy in each of `rounds`, kept one by one. Runs in a process of its own."""
    from bench import bf16_matmul

    products, kept = bf16_matmul.enable(), Kept("policies")
    runs = {policy: Prepared(Job(side="ours", tokens=tokens, policy=policy)) for policy in POLICIES}
    for round_ in [None, *rounds]:
        turn = (round_ or 0) % len(POLICIES)
        seconds = {}
        for policy in POLICIES[turn:] + POLICIES[:turn]:
            start = time.perf_counter()
            runs[policy].step()
            seconds[policy] = time.perf_counter() - start
            runs[policy].zero_grad()
        name = "warm-up" if round_ is None else f"round {round_ + 1}"
        say(f"{name}: " + ", ".join(f"{policy} {s:.2f} s" for policy, s in seconds.items()))
        if round_ is not None:
            kept.put(settings(tokens, round_), {"seconds": seconds, "products": products, "commit": commit()})
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="of the steps that are timed (default 1024)")
    parser.add_argument("--rounds", type=int, default=4, help="(default 4)")
    args = parser.parse_args()

    kept, kept_bytes = Kept("policies"), {}
    for row, job in ROWS.items():
        kept_bytes[row] = {}
        for policy in POLICIES:
            one = dataclasses.replace(job, policy=policy)
            result = kept.get(one)
            if result is None:
                say(one)
                result = {**fresh(memory.measure, one, 2), "commit": commit()}
                kept.put(one, result)
            kept_bytes[row][policy] = {
                key: result[key]
                for key in ("saved_bytes_per_token", "ledger_bytes_per_token", "peak_bytes", "patched", "commit")
            }

    rounds = [kept.get(settings(args.tokens, i)) for i in range(args.rounds)]
    if missing := [i for i, done in enumerate(rounds) if done is None]:
        fresh(take_turns, args.tokens, missing)
        rounds = [kept.get(settings(args.tokens, i)) for i in range(args.rounds)]
    best = {policy: min(r["seconds"][policy] for r in rounds) for policy in POLICIES}
    paired = {p: statistics.median(r["seconds"][p] / r["seconds"]["exact"] for r in rounds) for p in POLICIES}
    write("policies", {
        "bytes": kept_bytes, "goals": {"bytes": BYTES, "seconds": SECONDS},
        "seconds": {"tokens": args.tokens, "rounds": rounds, "best": best, "median_of_paired_ratios": paired},
    })  # fmt: skip
    lines = [
        (
            policy, *(f"{kept_bytes[row][policy]['saved_bytes_per_token']:,.0f}" for row in ROWS), BYTES.get(policy, ""),
            f"{best[policy]:.2f}", f"{best[policy] / best['exact']:.3f}", f"{paired[policy]:.3f}", SECONDS.get(policy, ""),
        )
        for policy in POLICIES
    ]  # fmt: skip
    header = ("policy", *(f"B/token, {row}" for row in ROWS), "goal, full", "s", "of exact", "median of pairs", "goal")
    table("SmolLM2-135M, bf16", header, lines)


if __name__ == "__main__":
    main()
