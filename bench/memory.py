"""Saved bytes per token, and the peak outside the loss, of one step of SmolLM2-135M (batch 1, SDPA).

saved   unique storages alive after the forward, without parameters, buffers, `.grad`, inputs, autocast's weight copies and the
        loss's own gradient buffers (dhidden and one dW: a column of their own); counted by weak references (bench/live.py),
        not by the ledger
peak    the highest such sum at any moment outside the loss
ledger  what `unswag.audit` says about the same forward

The third of three steps in a fresh process, worst of 3 runs. Results are kept as they come; a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math

from bench.kept import add_runs, runs_of, runs_of_sides
from bench.smollm2 import Job, Prepared, patched, table, write

ROWS = {  # name: (job, stock as written in the goals, the most that ours may keep), bytes per token
    "checkpointing": (Job(checkpointing=True), 235_796, 38_000),
    "full": (Job(), 940_092, 350_000),
    "lora": (Job(training="lora"), 1_317_552, 365_000),
    "autocast": (Job(dtype="fp32", autocast=True), 1_114_300, 430_000),
}
SIDES = ["stock", "our loss", "ours"]
PEAK = 0.9  # the most that ours may reach with checkpointing, of stock with checkpointing and our loss alone
LEDGER = 0.02  # the farthest that the ledger may be from the count
EVEN = 0.05  # the farthest that the curve of the backward may be from stock's, each as a part of its start


def measure(job: dict, steps: int) -> dict:
    """Bytes in the last of `steps` steps. Runs in a process of its own."""
    import torch

    from bench import bf16_matmul
    from bench.live import LiveStorages

    products = bf16_matmul.enable()
    run = Prepared(Job(**job))
    for _ in range(steps - 1):
        run.step()
        run.zero_grad()
    with LiveStorages(run.model, list(run.batch.values())) as live:
        loss = live.forward(run.forward)
        saved, loss_buffers = live.bytes, live.loss_buffers
        loss.backward()
    run.zero_grad()
    import unswag

    with torch.autocast("cpu", torch.bfloat16, enabled=run.job.autocast):
        ledger = unswag.audit(run.model, **run.batch)
    return {
        "saved_bytes_per_token": saved / run.job.tokens,
        "loss_buffers_bytes": loss_buffers,
        "peak_bytes": live.peak,
        "backward_curve_bytes": live.backward_curve,
        "ledger_bytes_per_token": ledger.bytes_per_token,
        "ledger_loss_buffers_bytes": ledger.loss_buffers,
        "patched": patched(run.report),
        "products": products,
    }


def worst(runs: list[dict]) -> dict:
    """Of several runs, the one that keeps the most, with the highest peak of all and what each said."""
    most = max(runs, key=lambda r: r["saved_bytes_per_token"])
    each = [{key: r[key] for key in ("commit", "saved_bytes_per_token", "ledger_bytes_per_token", "peak_bytes")} for r in runs]
    return {**most, "peak_bytes": max(r["peak_bytes"] for r in runs), "runs": each}


def apart(curve: list[int], stock: list[int]) -> float:
    """How far two curves are from each other anywhere, each as a part of its own start; inf if not of the same layers."""
    if len(curve) != len(stock):
        return math.inf
    return max(abs(a / curve[0] - b / stock[0]) for a, b in zip(curve, stock, strict=True))


def checks(sides: dict[str, dict], goal: int) -> dict[str, dict]:
    """What a row must show: name -> value, limit, reached; only what can be said with the sides at hand."""
    found = {}

    def check(name: str, value: float, limit: float) -> None:
        found[name] = {"value": round(value, 4), "limit": limit, "reached": value <= limit}

    for side, r in sides.items():
        check(f"{side}: ledger against count", abs(r["ledger_bytes_per_token"] / r["saved_bytes_per_token"] - 1), LEDGER)
        rises = sum(b >= a for a, b in itertools.pairwise(r["backward_curve_bytes"]))
        check(f"{side}: layers in the backward after which no less is alive", rises, 0)
        if side != "stock" and "stock" in sides:
            curves = r["backward_curve_bytes"], sides["stock"]["backward_curve_bytes"]
            check(f"{side}: backward curve against stock's", apart(*curves), EVEN)
    if "ours" in sides:
        check("ours: saved bytes per token", sides["ours"]["saved_bytes_per_token"], goal)
        if "our loss" in sides:
            ratio = sides["ours"]["peak_bytes"] / sides["our loss"]["peak_bytes"]
            check("ours: peak against stock with our loss", ratio, PEAK)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which rows (default: all)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="which sides (default: all)")
    parser.add_argument("--tokens", type=int, default=1024, help="(default 1024; the goals are for 1024)")
    add_runs(parser)
    parser.add_argument("--steps", type=int, default=3, help="steps per process; the last counts (default 3)")
    args = parser.parse_args()
    runs = runs_of(args)

    results = {}
    for row in args.rows:
        job, published, goal = ROWS[row]
        job = dataclasses.replace(job, tokens=args.tokens)
        found = runs_of_sides("memory", measure, job, args.sides, runs, args.steps)
        sides = {side: worst(of) for side, of in found.items()}
        results[row] = {
            "job": dataclasses.asdict(job), "stock_published": published, "goal": goal,
            "checks": checks(sides, goal), "sides": sides,
        }  # fmt: skip
    counts = {side: runs(side) for side in args.sides}
    write("memory", {"tokens": args.tokens, "runs": counts, "steps": args.steps, "rows": results})

    lines = [
        (
            row, side, f"{r['saved_bytes_per_token']:,.0f}", f"{r['ledger_bytes_per_token']:,.0f}",
            f"{r['loss_buffers_bytes'] / 2**20:,.0f}", f"{r['peak_bytes'] / 2**20:,.0f}",
            f"{result['stock_published']:,}" if side == "stock" else f"<= {result['goal']:,}" if side == "ours" else "",
            " ".join(f"{k} {v}" for k, v in r["patched"].items()),
        )
        for row, result in results.items()
        for side, r in result["sides"].items()
    ]  # fmt: skip
    header = ("row", "side", "saved B/token", "ledger", "loss buffers MiB", "peak MiB", "goal", "modules patched")
    table(f"SmolLM2-135M, {args.tokens} tokens", header, lines)
    lines = [
        (row, name, f"{c['value']:,.4g}" if c["value"] < 1000 else f"{c['value']:,.0f}", f"<= {c['limit']:,}", c["reached"])
        for row, result in results.items()
        for name, c in result["checks"].items()
    ]
    table("Checks", ("row", "what", "value", "limit", "reached"), lines)


if __name__ == "__main__":
    main()
