"""Prints docs/supported.md from the lists in the code: python tools/supported.py > docs/supported.md (a test compares them)."""

from __future__ import annotations

import inspect

from unswag import _core
from unswag.torch import patterns


def text() -> str:
    rows = [
        "# What is supported",
        "",
        "Made by `python tools/supported.py` from the lists in the code.",
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
    return "\n".join(rows) + "\n"


def _names(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


if __name__ == "__main__":
    print(text(), end="")
