"""What a lossy policy does to the gradient: one fp32 step of SmolLM2-135M on real text, against the same step under `exact`.

python -m bench.fidelity [--tokens 768]

error   ‖g - exact‖ / ‖exact‖ over all parameters (total), of each parameter, and of the parameters of each layer
cosine  of the angle between g and exact, over all parameters

Whole policies, then each role alone, then codes of the derivative alone: those keep act(gate) and up exactly, so that only the
codebook shows. A side that draws (stochastic rounding, dither) is run three times; the median counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
from typing import Any

from bench.smollm2 import RESULTS, Job, Prepared, fresh, say, table, write

# The goals of the issue that asked for these policies.
GOALS = {"int8": 0.010, "int4": 0.12, "codes: mm1, calibrated": 0.16}


def sides() -> dict[str, tuple[Any, bool]]:
    """Name -> (policy, codes alone)."""
    from unswag.policy import Policy

    whole = {name: Policy.named(name) for name in ("int8", "int4", "2bit")}
    whole["int4, stochastic"] = dataclasses.replace(whole["int4"], rounding="stochastic")
    whole["int8, stochastic"] = dataclasses.replace(whole["int8"], rounding="stochastic")
    whole["int8 and attention int8"] = dataclasses.replace(whole["int8"], attention="int8")
    for role in ("residual", "mlp", "attention"):
        for codec in ("int8", "int4", "int2", "e4m3") if role == "mlp" else ("int8", "int4"):
            whole[f"{role} {codec}"] = Policy(**{role: codec})
    books = {"mm1, calibrated": Policy(mlp="2bit"), "mm2, calibrated": Policy(mlp="2bit", codebook="mm2")}
    books |= {"optimal, calibrated": Policy(mlp="2bit", codebook="optimal")}
    books |= {f"{name}, scale 1": Policy(mlp="2bit", codebook=name, scale=1.0) for name in ("mm1", "mm2", "optimal")}
    books |= {name: Policy(mlp="2bit", codebook=name) for name in ("fewbit", "resilu2", "dither2", "seed")}
    return {name: (policy, False) for name, policy in whole.items()} | {
        f"codes: {name}": (policy, True) for name, policy in books.items()
    }


def draws(policy: Any) -> bool:
    return policy.rounding == "stochastic" or (policy.mlp == "2bit" and policy.codebook == "dither2")


def measure(tokens: int) -> dict:
    """All sides, one after the other, in one process of its own."""
    import torch

    from unswag import apply_unswag_surgery
    from unswag.torch.stash import codecs

    run = Prepared(Job(side="stock", dtype="fp32", tokens=tokens))

    def gradient(policy: Any) -> dict[str, torch.Tensor]:
        apply_unswag_surgery(run.model, policy=policy, verify=False)
        run.zero_grad()
        run.step()
        return {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}

    exact = gradient("exact")
    norms = {name: g.double().norm().item() for name, g in exact.items()}
    total = sum(n**2 for n in norms.values()) ** 0.5
    results: dict[str, Any] = {}
    fewest = codecs.FEWEST
    for name, (policy, codes_alone) in sides().items():
        codecs.FEWEST = 1 << 62 if codes_alone else fewest  # no tensor is large enough for a block codec
        times = []
        for draw in range(3 if draws(policy) else 1):
            torch.manual_seed(draw)
            g = gradient(policy)
            assert g.keys() == exact.keys()
            apart = {n: (g[n].double() - exact[n].double()).norm().item() for n in exact}
            dot = sum((g[n].double() * exact[n].double()).sum().item() for n in exact)
            norm = sum(t.double().norm().item() ** 2 for t in g.values()) ** 0.5
            layers: dict[str, list[float]] = {}
            for n, difference in apart.items():
                layer = re.search(r"layers\.(\d+)\.", n)
                of = layers.setdefault(layer[1] if layer else n, [0.0, 0.0])
                of[0] += difference**2
                of[1] += norms[n] ** 2
            times.append({
                "error": sum(a**2 for a in apart.values()) ** 0.5 / total,
                "cosine": dot / (norm * total),
                "median_of_parameters": statistics.median(apart[n] / norms[n] for n in exact),
                "worst_of_parameters": max(apart[n] / norms[n] for n in exact),
                "layers": {layer: (a / b) ** 0.5 for layer, (a, b) in layers.items()},
            })  # fmt: skip
        times.sort(key=lambda r: r["error"])
        results[name] = {"policy": str(policy), "runs": len(times), **times[len(times) // 2]}
        say(f"{name}: {results[name]['error']:.4f}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=768, help="(default 768)")
    args = parser.parse_args()
    results = fresh(measure, args.tokens)
    write("fidelity", {"tokens": args.tokens, "goals": GOALS, "sides": results})
    plot(results)
    lines = [
        (name, f"{r['error']:.4f}", f"{r['cosine']:.5f}", f"{r['median_of_parameters']:.4f}", f"{r['worst_of_parameters']:.3f}",
         GOALS.get(name, ""))
        for name, r in results.items()
    ]  # fmt: skip
    header = ("side", "error", "cosine", "median of parameters", "worst", "goal")
    table(f"SmolLM2-135M, fp32, {args.tokens} tokens: gradient against exact", header, lines)


def plot(results: dict[str, Any]) -> None:
    """bench/results/fidelity.png: the error of the whole gradient per side, and of each layer for the three policies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    bars, lines = figure.subplots(1, 2)
    names = sorted(results, key=lambda name: results[name]["error"])
    bars.barh(names, [results[name]["error"] for name in names], color="#4477aa")
    bars.set_xscale("log")
    bars.set_xlabel("relative error of the whole gradient")
    for name in ("int8", "int4", "2bit"):
        layers = {int(k): v for k, v in results[name]["layers"].items() if k.isdigit()}
        lines.plot(sorted(layers), [layers[k] for k in sorted(layers)], label=name)
    lines.set_yscale("log")
    lines.set_xlabel("layer")
    lines.set_ylabel("relative error of the layer's gradient")
    lines.legend(frameon=False)
    for axes in (bars, lines):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "fidelity.png", dpi=110)


if __name__ == "__main__":
    main()
