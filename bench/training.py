"""Does a lossy policy train as well? 300 steps of LoRA fine-tuning of SmolLM2-135M per policy and seed, beside stock.

python -m bench.training [--policies int8 int4 2bit] [--seeds 0 1 2] [--steps 300] [--tokens 64]

r = 16 on all linears, fp32, AdamW, learning rate 2e-4, one piece of the standard library's docstrings a step. A seed draws the
adapters and the order of the pieces, the same for every side. At the end the loss on pieces that were not trained on. The
yardstick is what seeds alone do to stock: a policy is as good when its mean over the seeds lies inside stock's smallest and
largest. Each run has a process of its own and is kept when it is done; one that was killed starts again.
"""

from __future__ import annotations

import argparse
import statistics

from bench.kept import Kept
from bench.smollm2 import RESULTS, Job, Prepared, commit, fresh, say, table, text, write

HELD_OUT = 16  # pieces
LEARNING_RATE = 2e-4


def measure(policy: str, seed: int, steps: int, tokens: int) -> dict:
    """Losses of one run; `policy` may be "stock". Runs in a process of its own."""
    import torch

    run = Prepared(Job(side="stock", training="lora", dtype="fp32", tokens=tokens))
    generator = torch.Generator().manual_seed(seed)
    for name, p in run.model.named_parameters():
        if "lora_A" in name:
            p.data.normal_(std=p.shape[1] ** -0.5, generator=generator)
        elif "lora_B" in name:
            p.data.zero_()
    if policy != "stock":
        from unswag import apply_unswag_surgery

        apply_unswag_surgery(run.model, policy=policy)
    pieces = text(tokens * (steps + HELD_OUT)).view(-1, tokens)
    unseen, pieces = pieces[:HELD_OUT], pieces[HELD_OUT:]
    order = torch.randperm(steps, generator=generator)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    losses = []
    for step, piece in enumerate(order.tolist()):
        run.batch = {"input_ids": pieces[piece][None], "labels": pieces[piece][None]}
        losses.append(run.step())
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            say(f"{policy}, seed {seed}: step {step + 1} of {steps}, loss {losses[-1]:.4f}")
    run.model.eval()
    with torch.no_grad():
        held_out = statistics.fmean(run.model(input_ids=p[None], labels=p[None]).loss.item() for p in unseen)
    return {"losses": losses, "held_out": held_out, "threads": torch.get_num_threads(), "commit": commit()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="*", default=["exact", "int8", "int4", "2bit"], help="(default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--steps", type=int, default=300, help="(default 300)")
    parser.add_argument("--tokens", type=int, default=64, help="of a step (default 64)")
    args = parser.parse_args()

    # What stock does depends on nothing of ours.
    kept = {"stock": Kept("training", of="stock")}
    runs: dict[str, list[dict]] = {}
    for policy in ("stock", *args.policies):
        here = kept.setdefault(policy, Kept("training"))
        for seed in args.seeds:
            settings = [policy, seed, args.steps, args.tokens]
            result = here.get(settings)
            if result is None:
                result = fresh(measure, *settings)
                here.put(settings, result)
            runs.setdefault(policy, []).append(result)

    stock = [run["held_out"] for run in runs["stock"]]
    lines, summary = [], {}
    for policy, of in runs.items():
        held_out = [run["held_out"] for run in of]
        last = [statistics.fmean(run["losses"][-50:]) for run in of]
        apart = [a - b for a, b in zip(held_out, stock, strict=True)]
        mean = statistics.fmean(held_out)
        inside = min(stock) <= mean <= max(stock)
        summary[policy] = {
            "held_out": held_out, "last_50_steps": last, "mean": mean, "against_stock_same_seed": apart,
            "inside_the_spread_of_stock": inside,
        }  # fmt: skip
        lines.append((
            policy, " ".join(f"{x:.4f}" for x in held_out), f"{mean:.4f}", " ".join(f"{x:+.4f}" for x in apart),
            "yes" if inside else "no",
        ))  # fmt: skip
    settings = {"seeds": args.seeds, "steps": args.steps, "tokens": args.tokens, "lr": LEARNING_RATE, "training": "lora r=16"}
    write("training", {**settings, "summary": summary, "runs": runs})
    plot(runs)
    header = ("side", "loss on unseen text, per seed", "mean", "against stock, same seed", "inside stock's spread")
    table("SmolLM2-135M, LoRA, fp32", header, lines)


def plot(runs: dict[str, list[dict]]) -> None:
    """bench/results/training.png: the loss of each side, mean over the seeds and the last 25 steps, and stock's spread."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    window = np.ones(25) / 25
    for side, of in runs.items():
        smooth = np.array([np.convolve(run["losses"], window, "valid") for run in of])
        steps = np.arange(25, 25 + smooth.shape[1])
        label = side if len(of) == len(runs["stock"]) else f"{side}, the first {len(of)} of the seeds"
        axes.plot(steps, smooth.mean(0), label=label, lw=2 if side == "stock" else 1.2)
        if side == "stock":
            axes.fill_between(steps, smooth.min(0), smooth.max(0), alpha=0.2, label="stock, smallest to largest seed")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, mean of 25 steps")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "training.png", dpi=130)


if __name__ == "__main__":
    main()
