"""Saved bytes per token, and the peak outside the loss, of one step of SmolLM2-135M (batch 1, SDPA).

saved   unique storages alive after the forward, without parameters, buffers, `.grad`, inputs, autocast's weight copies and the
        loss's own gradient buffers (dhidden and one dW: a column of their own); counted by weak references (bench/live.py),
        not by the ledger
peak    the highest such sum at any moment outside the loss
ledger  what `unswag.audit` says about the same forward

The third of three steps in a fresh process, worst of 3 runs.
"""

from __future__ import annotations

import argparse
import dataclasses

from bench.smollm2 import Job, Prepared, fresh, patched, say, table, write

ROWS = {  # name: (job, stock as written in the goals, the most that ours may keep), bytes per token
    "checkpointing": (Job(checkpointing=True), 235_796, 38_000),
    "full": (Job(), 940_092, 350_000),
    "lora": (Job(training="lora"), 1_317_552, 365_000),
    "autocast": (Job(dtype="fp32", autocast=True), 1_114_300, 430_000),
}
SIDES = ["stock", "our loss", "ours"]


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
    result = {
        "saved_bytes_per_token": saved / run.job.tokens,
        "loss_buffers_bytes": loss_buffers,
        "peak_bytes": live.peak,
        "backward_curve_bytes": live.backward_curve,
        "patched": patched(run.report),
        "products": products,
    }
    if run.job.side != "stock":
        import unswag

        with torch.autocast("cpu", torch.bfloat16, enabled=run.job.autocast):
            ledger = unswag.audit(run.model, **run.batch)
        result |= {"ledger_bytes_per_token": ledger.bytes_per_token, "ledger_loss_buffers_bytes": ledger.loss_buffers}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which rows (default: all)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="which sides (default: all)")
    parser.add_argument("--tokens", type=int, default=1024, help="(default 1024; the goals are for 1024)")
    parser.add_argument("--runs", type=int, default=3, help="fresh processes per figure; the worst counts (default 3)")
    parser.add_argument("--steps", type=int, default=3, help="steps per process; the last counts (default 3)")
    args = parser.parse_args()

    results = {}
    for row in args.rows:
        job, published, goal = ROWS[row]
        sides = {}
        for side in args.sides:
            one = dataclasses.replace(job, side=side, tokens=args.tokens)
            runs = []
            for i in range(args.runs):
                say(f"{row}: {one}, run {i + 1} of {args.runs}")
                runs.append(fresh(measure, one, args.steps))
            worst = max(runs, key=lambda r: r["saved_bytes_per_token"])
            sides[side] = {**worst, "peak_bytes": max(r["peak_bytes"] for r in runs)}
        results[row] = {"job": dataclasses.asdict(job), "stock_published": published, "goal": goal, "sides": sides}
    write("memory", {"tokens": args.tokens, "runs": args.runs, "steps": args.steps, "rows": results})

    lines = []
    for row, result in results.items():
        for side, r in result["sides"].items():
            ledger = r.get("ledger_bytes_per_token")
            lines.append((
                row, side, f"{r['saved_bytes_per_token']:,.0f}", "-" if ledger is None else f"{ledger:,.0f}",
                f"{r['loss_buffers_bytes'] / 2**20:,.0f}", f"{r['peak_bytes'] / 2**20:,.0f}",
                f"{result['stock_published']:,}" if side == "stock" else f"<= {result['goal']:,}" if side == "ours" else "",
                " ".join(f"{k} {v}" for k, v in r["patched"].items()),
            ))  # fmt: skip
    header = ("row", "side", "saved B/token", "ledger", "loss buffers MiB", "peak MiB", "goal", "modules patched")
    table(f"SmolLM2-135M, {args.tokens} tokens", header, lines)


if __name__ == "__main__":
    main()
