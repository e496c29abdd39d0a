"""The demo's tables and picture, from its table.json.

python -m examples.demo.report bench/results/demo.json    # docs/demo.png, and the table in docs/results.md
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.demo import ways
from examples.demo.ways import ROOT, Way

MIB = 2**20
COLORS = {"stock": "#8a8f98", "unswag": "#d9480f"}
TRAINING = {"lora": "LoRA", "full": "full training"}


def write(found: dict[str, Any], out: Path) -> None:
    """table.txt and picture.png of what table.json holds; the tables are printed too."""
    from rich.console import Console

    with open(out / "table.txt", "w", encoding="utf-8") as f:
        for console in (Console(), Console(file=f, width=100)):
            for part in found["parts"]:
                console.print(*tables(found, part), sep="\n")
                if part["runs"]:
                    console.print(answers(found, part), markup=False, highlight=False)
            console.print(note(found), markup=False, highlight=False)
    part = out / ".picture.png"
    picture(found, part)
    os.replace(part, out / "picture.png")


def note(found: dict[str, Any]) -> str:
    where = found["conditions"]
    return (
        f"{found['model']}, batch 1, {found['dtype']}, {where['cpu']}, {threads(where)}, torch {where['torch']}, "
        f"transformers {where['transformers']}. Memory is the peak resident memory of the process during forward and backward, "
        "minus that of the idle model, with MALLOC_MMAP_THRESHOLD_=65536 on every side."
    )


def threads(where: dict[str, Any]) -> str:
    return f"{where['threads']} thread{'s' * (where['threads'] > 1)}"


def title(memory: dict[str, Any]) -> str:
    return Way(**memory["way"]).title


def tables(found: dict[str, Any], part: dict[str, Any]) -> Iterator[Any]:
    """One for memory, one for training."""
    from rich.table import Table

    memory = part["memory"]
    grid = Table(title=f"{TRAINING[part['training']]}: peak memory of one step above the idle model, MiB")
    for name in ("context", *map(title, memory)):
        grid.add_column(name, justify="right")
    for tokens in found["lengths"]:
        grid.add_row(f"{tokens:,}", *(f"{one['peaks_above_idle_bytes'][str(tokens)] / MIB:,.0f}" for one in memory))
    grid.add_section()
    grid.add_row("saved, bytes per token", *(f"{one['saved_bytes_per_token']:,.0f}" for one in memory))
    grid.add_row("idle model, MiB", *(f"{one['idle_bytes'] / MIB:,.0f}" for one in memory))
    grid.add_row(f"longest context in {found['budget_bytes'] // MIB} MiB", *(f"{one['longest']:,}" for one in memory))
    yield grid

    if not part["runs"]:
        return
    stock, ours = part["runs"]
    steps = len(stock["losses"]) // found["epochs"]  # of an epoch
    amount = f"{found['epochs']} epochs of {steps} rows of {found['row_tokens']} tokens"
    grid = Table(title=f"{TRAINING[part['training']]} with checkpointing: {amount}", min_width=60)
    for column in ("", "stock", "UnSwag"):
        grid.add_column(column, justify="right" if column else "left")
    for words, losses in (("mean loss, first epoch", slice(0, steps)), ("mean loss, last epoch", slice(-steps, None))):
        grid.add_row(words, *(f"{sum(run['losses'][losses]) / steps:.4f}" for run in (stock, ours)))
    grid.add_row("largest difference of a loss", "", f"{largest_difference(part):.1e}")
    grid.add_row("seconds per step", *(f"{run['seconds_per_step']:.2f}" for run in (stock, ours)))
    yield grid


def largest_difference(part: dict[str, Any]) -> float:
    stock, ours = part["runs"]
    return max(abs(a - b) for a, b in zip(stock["losses"], ours["losses"], strict=True))


def answers(found: dict[str, Any], part: dict[str, Any]) -> str:
    """The question, and what the model trained with UnSwag says before and after."""
    _, ours = part["runs"]
    return f"\nasked    {found['question']}\nbefore   {ours['before']}\nafter    {ours['after']}\n"


def picture(found: dict[str, Any], path: Path) -> None:
    """A row for each kind of training: peak memory against context, and memory over one step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4 * len(found["parts"])), layout="constrained")
    axes = figure.subplots(len(found["parts"]), 2, squeeze=False)
    budget = found["budget_bytes"] / MIB
    for (peaks, step), part in zip(axes, found["parts"], strict=True):
        for one in part["memory"]:
            way = Way(**one["way"])
            style = {"color": COLORS[way.side], "linestyle": "--" if way.checkpointing else "-"}
            tried = sorted((int(tokens), nbytes / MIB) for tokens, nbytes in one["tried_bytes"].items())
            label = f"{way.title}: {one['longest']:,} tokens"
            peaks.plot(*zip(*tried, strict=True), marker="o", markersize=3.5, label=label, **style)
            step.plot(*zip(*((at, nbytes / MIB) for at, nbytes in one["curve"]), strict=True), linewidth=1.2, **style)
        peaks.axhline(budget, color="black", linewidth=0.8, linestyle=":")
        top = max(nbytes for one in part["memory"] for nbytes in one["tried_bytes"].values()) / MIB
        peaks.set(xlabel="context, tokens", ylabel="MiB above the idle model", xlim=(0, None), ylim=(0, 1.45 * top))
        peaks.set_title(f"{found['model']}, {TRAINING[part['training']]}: peak of one step", loc="left", fontsize=10)
        peaks.legend(
            loc="upper right",
            title=f"longest context in {budget:,.0f} MiB (dotted)",
            frameon=False,
            fontsize=8,
            title_fontsize=8,
        )
        step.set(xlabel="forward and backward, share of the time", ylabel="MiB above the idle model", ylim=(0, None))
        step.set_title(f"memory over one step of {found['curve_tokens']:,} tokens", loc="left", fontsize=10)
        for one in (peaks, step):
            one.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(note(found).partition(". Memory")[0], fontsize=7, color="#666666")
    figure.savefig(path, dpi=110, format="png")


BEGIN, END = "<!-- demo: begin, written by python -m examples.demo.report -->\n", "<!-- demo: end -->"


def markdown(found: dict[str, Any]) -> str:
    """What docs/results.md shows between its two marks."""
    lines = []
    for part in found["parts"]:
        memory = part["memory"]
        rows: list[tuple[Any, ...]] = [("context, tokens", *map(title, memory)), ("---:",) * (len(memory) + 1)]
        for tokens in found["lengths"]:
            peaks = (one["peaks_above_idle_bytes"][str(tokens)] / MIB for one in memory)
            rows.append((f"{tokens:,}", *(f"{peak:,.0f} MiB" for peak in peaks)))
        budget = f"longest in {found['budget_bytes'] // MIB} MiB"
        rows.append((budget, *(f"**{one['longest']:,} tokens**" for one in memory)))
        rows.append(("kept, bytes per token", *(f"{one['saved_bytes_per_token']:,.0f}" for one in memory)))
        rows.append(("idle model", *(f"{one['idle_bytes'] / MIB:,.0f} MiB" for one in memory)))
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines.append("")
        if not part["runs"]:
            continue
        _, ours = part["runs"]
        steps, epochs = len(ours["losses"]), found["epochs"]
        few, tokens = steps // epochs, found["row_tokens"]
        first, last = (sum(ours["losses"][few_of]) / few for few_of in (slice(0, few), slice(-few, None)))
        lines += [
            f"Fine-tuning for {steps} steps ({epochs} epochs of {few} rows of {tokens} tokens, with checkpointing): the",
            f"mean loss of an epoch falls from {first:.3f} to {last:.3f}, and no loss differs from stock's by more than",
            f"{largest_difference(part):.1e}.",
            "",
        ]
    where = found["conditions"]
    lines.append(
        f"{where['cpu']}, {threads(where)}, torch {where['torch']}, "
        f"transformers {where['transformers']}, peft {where['peft']}, {where['date']}, commit {where['commit']}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    picture(found, ROOT / "docs" / "demo.png")
    page = ROOT / "docs" / "results.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    ways.write(page, before + BEGIN + markdown(found) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
