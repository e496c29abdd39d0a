"""Counts of what happened to each line, and the report that shows them."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from unswag.data.arguments import path_of
from unswag.extras import missing

WHERE = 3  # lines that the report names for each reason
NAMES = 20  # columns that it names


@dataclass
class Counts:
    """How many lines were kept, blank or dropped. Always read == kept + blank + sum(dropped.values())."""

    read: int = 0
    kept: int = 0
    blank: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    truncated: int = 0  # kept, cut to max_length
    merged: int = 0  # kept; a token spans the end of the prompt, and has a label
    tokens: int = 0
    trained: int = 0  # tokens that have a label
    noted: Counter[str] = field(default_factory=Counter)  # kept lines, by the part of them that was ignored or changed
    where: dict[str, list[str]] = field(default_factory=dict)  # the first lines of each reason and note, path:line first
    quarantine: list[str] = field(default_factory=list)  # files that were written

    def plain(self) -> dict[str, Any]:
        return vars(self) | {"dropped": dict(self.dropped), "noted": dict(self.noted)}

    def drop(self, kind: str, place: str) -> None:
        self.dropped[kind] += 1
        self._at(kind, place)

    def note(self, what: str, place: str) -> None:
        if what not in self.noted and len(self.noted) >= NAMES:
            what = "other notes"
        self.noted[what] += 1
        self._at(what, place)

    def _at(self, what: str, place: str) -> None:
        places = self.where.setdefault(what, [])
        if len(places) < WHERE:
            places.append(place)


@dataclass(frozen=True)
class Report:
    """Counts and lengths: prints as a table with a histogram; `plot` draws the histogram."""

    counts: Counts
    lengths: np.ndarray
    rows: int
    max_length: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        c = self.counts
        table = Table(title="UnSwag data", show_header=False)
        table.add_column(justify="right")
        table.add_column()
        table.add_row(f"{c.read:,}", "lines read")
        table.add_row(f"{c.kept:,}", "kept")
        for heading, counter in (("dropped", c.dropped), ("noted", c.noted)):
            for what, n in sorted(counter.items()):
                table.add_row(f"{n:,}", Text(f"{heading}: {what}", overflow="fold"))
        for n, what in (
            (c.blank, "blank"),
            (c.truncated, f"cut to {self.max_length} tokens"),
            (c.merged, "with a token that spans the end of the prompt"),
        ):
            if n:
                table.add_row(f"{n:,}", what)
        table.add_row(f"{c.tokens:,}", f"tokens, {c.trained / c.tokens:.0%} of them with a label")
        full = c.tokens / (self.rows * self.max_length)
        table.add_row(f"{self.rows:,}", f"rows of at most {self.max_length} tokens, {full:.1%} full")
        yield table
        for heading, counter in (("dropped", c.dropped), ("noted", c.noted)):
            for what in sorted(counter):
                yield Text(f"{heading}: {what}")
                for place in c.where.get(what, []):
                    yield Text(f"  {place}")
                if counter[what] > len(c.where.get(what, [])) > 0:
                    yield Text(f"  and {counter[what] - len(c.where[what]):,} more")
        for path in c.quarantine:
            yield Text(f"bad lines were written to {path}")
        yield from self._histogram()

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=120).print(self, soft_wrap=True)
        return out.getvalue()

    def _histogram(self) -> Iterator[str]:
        numbers, edges = self._bins()
        yield (
            "tokens per sequence (" + ", ".join(f"{p}%: {np.percentile(self.lengths, p):.0f}" for p in (50, 90, 99, 100)) + ")"
        )
        for n, low, high in zip(numbers, edges[:-1], edges[1:], strict=True):
            bar = "█" * round(50 * n / numbers.max()) or ("▏" if n else "")
            yield f"{low:>7} – {high - 1:<7} {bar} {n:,}"

    def _bins(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = int(self.lengths.min()), int(self.lengths.max()) + 1
        edges = np.unique(np.linspace(low, high, min(13, high - low + 1)).astype(int))
        numbers, _ = np.histogram(self.lengths, edges)
        return numbers, edges

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Saves a histogram of the lengths of the sequences, in tokens, as PNG."""
        target = path_of("plot", "path", path)
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as e:
            missing("plot", e, "torch")

        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.hist(self.lengths, bins=min(60, max(1, int(np.ptp(self.lengths)) + 1)), color="#3b6ea5")
        axes.axvline(self.max_length, color="#b03030", linestyle="--", label=f"max_length {self.max_length}")
        axes.set(
            xlabel="tokens per sequence", ylabel="sequences", title=f"{self.counts.kept:,} sequences in {self.rows:,} rows"
        )
        axes.legend()
        figure.savefig(target, format="png", dpi=150)
