"""Error of every parameter's gradient in one fp32 step of SmolLM2-135M on real text, against a true fp64 reference.

error          ‖g - g64‖ / ‖g64‖ of each parameter; the reference is fp64 in norms and loss too (bench/exact.py)
against stock  ‖g - stock‖ / ‖stock‖

sides     stock                  as it is
          our loss               stock with the chunked loss alone
          ours                   everything
          norms and MLP          these alone, with stock's loss and attention
controls  torch's norms          nothing of ours: stock with F.rms_norm in the place of LlamaRMSNorm: the same bits
          norms and MLP in fp64  nothing of ours: both in fp64 from fp32 numbers, forward and backward, rounded once

No side can be nearer to stock than stock's roundings are small; the controls say how near that is.
"""

from __future__ import annotations

import argparse
import statistics
import types

from bench.exact import Exact
from bench.smollm2 import Job, Prepared, fresh, patched, say, table, write

GOALS = {"worst": 5e-5, "median": 1e-5, "norms and MLP, against stock": 5e-6}


def operate(model, side: str):
    """The surgery's report for sides that bench.smollm2 does not know, or None for a control."""
    from torch.nn import functional as F

    def norm_torch(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    def norm_fp64(self, x):
        return F.rms_norm(x.double(), self.weight.shape, self.weight.double(), self.variance_epsilon).to(x.dtype)

    def mlp_fp64(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj((F.silu(gate.double()) * up.double()).to(x.dtype))

    if side == "norms and MLP":
        from unswag import apply_unswag_surgery

        return apply_unswag_surgery(model, attention="stock", loss="stock")
    forwards = {
        "torch's norms": {"LlamaRMSNorm": norm_torch},
        "norms and MLP in fp64": {"LlamaRMSNorm": norm_fp64, "LlamaMLP": mlp_fp64},
    }[side]
    for module in model.modules():
        if forward := forwards.get(type(module).__name__):
            module.forward = types.MethodType(forward, module)
    return None


KNOWN = ("stock", "our loss", "ours")  # to bench.smollm2
SIDES = (*KNOWN, "norms and MLP", "torch's norms", "norms and MLP in fp64")


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
        run = Prepared(Job(side=side if side in KNOWN else "stock", training=training, dtype="fp32", tokens=tokens))
        if side not in KNOWN:
            run.report = operate(run.model, side)
        run.model.load_state_dict(weights)
        loss = run.step()
        grads = gradients(run)
        stock = grads if side == "stock" else stock
        error, apart = errors(grads, exact), errors(grads, stock)
        results[side] = {
            "loss_error": loss - exact_loss,
            "worst": max(error.values()),
            "median": statistics.median(error.values()),
            "errors": error,
            "worst_against_stock": max(apart.values()),
            "median_against_stock": statistics.median(apart.values()),
            "against_stock": apart,
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
            f"{r['median_against_stock']:.1e}", f"{r['loss_error']:+.1e}",
            " ".join(f"{k} {v}" for k, v in r["patched"].items()),
        ))  # fmt: skip
    header = (
        "side", "worst error", "median", "nearer than stock", "worst against stock", "median against stock", "loss error",
        "modules patched",
    )  # fmt: skip
    table(f"SmolLM2-135M, {args.training}, fp32, {args.tokens} tokens, against fp64", header, lines)


if __name__ == "__main__":
    main()
