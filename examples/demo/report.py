"""The demo's table (terminal, text, JSON) and picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MIB = 2**20
COLORS = {"stock": "#8a8f98", "unswag": "#d9480f"}


def write(out: Path, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """table.json, table.txt and picture.png in `out`; the table is printed too."""
    from rich.console import Console

    lines = [line(stock, ours) for stock, ours in zip(results[::2], results[1::2], strict=True)]
    summary = json.dumps({**settings, "ways": lines}, indent=1) + "\n"
    replace(out / "table.json", lambda path: path.write_text(summary))
    note = "MALLOC_MMAP_THRESHOLD_=65536 on both sides; figures and losses of each step: see the .json files"
    Console().print(*tables(settings, lines), note, sep="\n")
    with open(out / "table.txt", "w", encoding="utf-8") as f:
        Console(file=f, width=100).print(*tables(settings, lines), note, sep="\n")
    replace(out / "picture.png", lambda path: picture(path, results))


def replace(path: Path, make) -> None:
    """Makes the file beside `path` and moves it there: whole, or not at all."""
    part = path.with_name("." + path.name)
    make(part)
    os.replace(part, path)


def line(stock: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """One way of training: the figures of both sides."""

    def side(r: dict[str, Any]) -> dict[str, float]:
        few = len(r["losses"]) // r["epochs"]  # a step's loss depends on its text: means over all of it
        return {
            "peak_mib": r["peak_bytes"] / MIB,
            "peak_above_idle_mib": (r["peak_bytes"] - r["idle_bytes"]) / MIB,
            "saved_bytes_per_token": r["saved_bytes_per_token"],
            "seconds_per_step": r["seconds_per_step"],
            "loss_at_start": sum(r["losses"][:few]) / few,
            "loss_at_end": sum(r["losses"][-few:]) / few,
        }

    return {
        "way": stock["way"],
        "stock": side(stock),
        "unswag": side(ours),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(stock["losses"], ours["losses"], strict=True)),
    }


def tables(settings: dict[str, Any], lines: list[dict[str, Any]]):
    """One for each way of training."""
    from rich.table import Table

    for one in lines:
        title = "{way}: {epochs} epochs of {rows} rows of {tokens} tokens, {dtype}".format(way=one["way"], **settings)
        grid = Table(title=title, min_width=60)
        for side in ("", "stock", "unswag"):
            grid.add_column(side, justify="right" if side else "left")
        stock, ours = one["stock"], one["unswag"]
        for words, name, form in (
            ("peak of the process, MiB", "peak_mib", ",.0f"),
            ("... above the idle model", "peak_above_idle_mib", ",.0f"),
            ("saved for backward, bytes per token", "saved_bytes_per_token", ",.0f"),
            ("seconds per step", "seconds_per_step", ".2f"),
            ("loss, first epoch", "loss_at_start", ".4f"),
            ("loss, last epoch", "loss_at_end", ".4f"),
        ):
            grid.add_row(words, format(stock[name], form), format(ours[name], form))
        grid.add_row("largest difference of the losses", "", f"{one['largest_loss_difference']:.1e}")
        yield grid


def picture(path: Path, results: list[dict[str, Any]]) -> None:
    """A row for each way of training: memory over time, and the loss of each step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ways = list(zip(results[::2], results[1::2], strict=True))
    figure, axes = plt.subplots(len(ways), 2, figsize=(11, 3.6 * len(ways)), squeeze=False, layout="constrained")
    for (memory, loss), pair in zip(axes, ways, strict=True):
        for r in pair:
            seconds, resident = zip(*r["memory"], strict=True)
            memory.plot(seconds, [b / MIB for b in resident], color=COLORS[r["side"]], label=r["side"], linewidth=1)
            memory.axhline(r["peak_bytes"] / MIB, color=COLORS[r["side"]], linestyle=":", linewidth=1)
            width = 3 if r["side"] == "stock" else 1  # ours lies on stock's
            loss.plot(range(1, len(r["losses"]) + 1), r["losses"], color=COLORS[r["side"]], label=r["side"], linewidth=width)
        memory.set(title=f"{pair[0]['way']}: memory of the process", xlabel="seconds", ylabel="MiB", ylim=(0, None))
        loss.set(title=f"{pair[0]['way']}: loss", xlabel="step")
        memory.legend(loc="lower right")
        loss.legend()
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
