"""Loss over 100 steps of real fine-tuning of SmolLM2-135M: fp32, AdamW, learning rate 2e-5, 512 tokens a step, the same seed.

Stock, ours, and ours with stock's loss kept, each in its own process; then an fp64 run (bench/exact.py), up to the step where
ours is farthest from stock, to see who is nearer to the truth there. The text is the standard library's docstrings: a quarter
as many pieces as steps, so that each is seen four times. Each run is kept when it is done; a run that was killed starts again
with the side it was at.
"""

from __future__ import annotations

import argparse

from bench.exact import Exact
from bench.kept import Kept
from bench.smollm2 import Job, Prepared, commit, fresh, patched, say, table, text, write

SIDES = ["stock", "stock loss", "ours"]
GOALS = {"stock loss against stock": 1e-5, "ours against stock": 1e-4, "fall": 0.1}
REPEATS = 4


def measure(side: str, steps: int, of_steps: int, tokens: int, lr: float) -> dict:
    """The loss of each of `steps` steps; the data is that of a run of `of_steps`. Runs in a process of its own."""
    import torch

    job = Job(side=side, dtype="fp32", tokens=tokens)
    run = Exact(job) if side == "fp64" else Prepared(job)
    pieces = text(tokens * -(-of_steps // REPEATS)).view(-1, tokens)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        ids = pieces[step % len(pieces)][None]
        run.batch = {"input_ids": ids, "labels": ids}
        losses.append(run.step())
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            say(f"{side}: step {step + 1} of {steps}, loss {losses[-1]:.4f}")
    return {"losses": losses, "patched": patched(run.report), "threads": torch.get_num_threads(), "commit": commit()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="(default 100)")
    parser.add_argument("--tokens", type=int, default=512, help="(default 512)")
    parser.add_argument("--lr", type=float, default=2e-5, help="(default 2e-5)")
    args = parser.parse_args()

    kept = Kept("convergence")

    def run(side: str, steps: int) -> dict:
        settings = [side, steps, args.steps, args.tokens, args.lr]
        result = kept.get(settings)
        if result is None:
            result = fresh(measure, *settings)
            kept.put(settings, result)
        return result

    runs = {side: run(side, args.steps) for side in SIDES}
    stock, ours = runs["stock"]["losses"], runs["ours"]["losses"]
    farthest = max(range(args.steps), key=lambda i: abs(ours[i] - stock[i]))
    say(f"ours is farthest from stock at step {farthest + 1}; fp64 up to there")
    runs["fp64"] = run("fp64", farthest + 1)
    exact = runs["fp64"]["losses"][farthest]

    def apart(side: str) -> float:
        return max(abs(a - b) for a, b in zip(runs[side]["losses"], stock, strict=True))

    pieces = -(-args.steps // REPEATS)
    first, last = sum(ours[:pieces]) / pieces, sum(ours[-pieces:]) / pieces  # each over all the text once
    summary = {
        "stock loss against stock": apart("stock loss"),
        "ours against stock": apart("ours"),
        "farthest step": farthest + 1,
        "ours against fp64 there": abs(ours[farthest] - exact),
        "stock against fp64 there": abs(stock[farthest] - exact),
        "fall": 1 - last / first,
    }
    settings = {"steps": args.steps, "tokens": args.tokens, "lr": args.lr, "optimizer": "AdamW"}
    write("convergence", {**settings, "goals": GOALS, "summary": summary, "runs": runs})
    table("SmolLM2-135M, loss", ("", "measured", "goal"), [(k, f"{v:.2g}", GOALS.get(k, "")) for k, v in summary.items()])


if __name__ == "__main__":
    main()
