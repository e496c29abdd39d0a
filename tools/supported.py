"""Prints docs/supported.md from the lists in the code and the results of bench.architectures (a test compares them):
python tools/supported.py > docs/supported.md"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from pathlib import Path
from typing import Any

from unswag import _core
from unswag.torch import patterns

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results" / "architectures.json"


def text() -> str:
    rows = [
        "# What is supported",
        "",
        "Made by `python tools/supported.py` from the lists in the code and from bench/results/architectures.json.",
        "",
        "## Model patterns",
        "",
        "Recognised by structure, proven by a probe, tried in this order. What is left is in the report, with the reason.",
        "",
        "| pattern | what it recognises | what it saves |",
        "|---|---|---|",
    ]
    for pattern in patterns.ALL:
        module = inspect.getmodule(type(pattern))
        what = (inspect.getdoc(module) or "").split("\n")[0]
        rows.append(f"| `{pattern.name}` | {_cell(what)} | {_cell(pattern.saves)} |")
    rows += [
        "",
        "## Functions",
        "",
        f"- one-bit masks: {_names(_core.masks)}",
        f"- activations, alone and in gated units: {_names(_core.activations)}",
        f"- dtypes: {_names(_core.dtypes)}; of the CPU's rows only the portable one has float64",
        "",
        "## Devices",
        "",
        f"- CPU, rows of kernels chosen at run time: {_names(_core.backend_names())}",
        "- CUDA devices with sm_75, sm_80, sm_90 or newer, where the build has `unswag::cuda` (`unswag doctor`): every "
        "function above, by the same formulas; compiled, and run by host threads in place of a GPU, not on a GPU yet",
        "- TPU: `unswag.jax`, by XLA and Pallas; what its compiler says is in docs/tpu.md, nothing was run",
        "- elsewhere, or without those kernels: an error that says so, and surgery leaves the module alone",
    ]
    return "\n".join((*rows, *_architectures(json.loads(RESULTS.read_text())))) + "\n"


def _architectures(results: dict[str, Any]) -> list[str]:
    cases, machine = results["cases"], results["machine"]
    counts = Counter(case["verdict"] for case in cases)
    causal = [case for case in cases if "," not in case["name"]]
    rows = [
        "",
        "## Architectures",
        "",
        f"Every type that `AutoModelForCausalLM` of transformers {machine['transformers']} has, and families with other heads, "
        "built small with random weights in float32 and trained for a step: stock, in float64, and after surgery `exact` "
        "(`make architectures`; what is compared stands in bench/architectures.py). "
        f"{', '.join(f'{n} {verdict}' for verdict, n in counts.items())}; "
        f"the MLP is patched in {sum(bool(case.get('mlp')) for case in causal)} of {len(causal)} types of causal models.",
        "",
        "Saved bytes are those of the small model, per token (of images and sounds, per label), stock → UnSwag; long sequences "
        "and large vocabularies save more. The numbers beside patterns are modules.",
        "",
        "| type | MLP, activations | what else was patched | saved bytes | left, and why |",
        "|---|---|---|---|---|",
    ]
    for case in cases:
        if case["verdict"] == "not built":
            rows.append(f"| {case['name']} | | | | not built: {_cell(case['reason'])} |")
            continue
        mlp = [f"`{name}` {n}" for name, n in case["mlp"].items()]
        rest = [f"`{name}` {n}" for name, n in case["patched"].items() if name not in (*case["mlp"], "stash")]
        left = [f"{reason} ({n})" for reason, n in case["skipped"].items()]
        left += [f"no pattern for `{name}` ({n})" for name, n in case["left"].items()]
        before, after = case["bytes_per_token"]
        cells = (case["name"], ", ".join(mlp) or "–", ", ".join(rest), f"{before:,} → {after:,}", _cell("; ".join(left)))
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _names(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


if __name__ == "__main__":
    print(text(), end="")
