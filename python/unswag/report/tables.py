"""Tables for a terminal."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.table import Table

if TYPE_CHECKING:
    from unswag.ledger import Comparison, Ledger

__all__ = ["MOST_ROWS", "of_comparison", "of_ledger", "text"]

MOST_ROWS = 24  # of groups: a table is a page at most
WIDTH = 120


def text(shown: RenderableType, width: int = WIDTH) -> str:
    """What a terminal of so many columns shows, without colours."""
    console = Console(width=width, no_color=True, force_terminal=False, markup=False, file=io.StringIO())
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]


def of_ledger(ledger: Ledger) -> Table:
    """The largest groups of a ledger and its sums."""
    title = "Saved for backward" + (f": {ledger.title()}" if ledger.title() else "")
    table = Table(title=title, title_justify="left")
    words = ["module", "role", *(word for word in ("name", "source") if any(getattr(row, word) for row in ledger.rows))]
    for column in words:
        table.add_column(column, overflow="fold")
    for column in ("kept", "recomputed or shared", "bytes", "bytes/token", "share"):
        table.add_column(column, justify="right")
    groups = ledger.groups()
    shown = groups if len(groups) <= MOST_ROWS else groups[: MOST_ROWS - 1]
    for group in shown:
        place = [group.label, *(getattr(group, word) for word in words[1:])]
        table.add_row(*place, f"{group.kept:,}", f"{group.free:,}", *_figures(ledger, group.bytes))
    if rest := groups[len(shown) :]:
        kept, free, nbytes = (sum(getattr(group, figure) for group in rest) for figure in ("kept", "free", "bytes"))
        row = [f"{len(rest)} others", *[""] * (len(words) - 1), f"{kept:,}", f"{free:,}", *_figures(ledger, nbytes)]
        table.add_row(*row)
    table.add_section()
    empty = [""] * (len(words) + 1)
    table.add_row("total", *empty, *_figures(ledger, ledger.total))
    if ledger.alive is not None:
        table.add_row("counted independently", *empty, *_figures(ledger, ledger.alive))
    if ledger.peak is not None:
        table.add_row("highest, forward and backward", *empty, *_figures(ledger, ledger.peak))
    for name, extra in (("not in it: loss buffers", ledger.loss_buffers), ("not in it: weight copies", ledger.weight_copies)):
        if extra:
            table.add_row(name, *empty, *_figures(ledger, extra)[:2], "")
    for name, nbytes in asdict(ledger.compiler).items() if ledger.compiler is not None else ():
        figures = ("unknown", "") if nbytes is None else _figures(ledger, nbytes)[:2]
        table.add_row(f"the compiler: {name}", *empty, *figures, "")
    return table


def of_comparison(comparison: Comparison) -> Table:
    """The largest groups of two ledgers and their sums, side by side."""
    one, other, (first, second) = comparison.one, comparison.other, comparison.names
    table = Table(title="Saved for backward, bytes" + (f": {one.title()}" if one.title() else ""), title_justify="left")
    for column in ("module", "role"):
        table.add_column(column, overflow="fold")
    for column in (first, second, f"{second} / {first}"):
        table.add_column(column, justify="right")
    parts = comparison.parts()
    shown = parts if len(parts) <= MOST_ROWS else parts[: MOST_ROWS - 1]
    for module, role, a, b in shown:
        table.add_row(module, role, *_pair(a, b))
    if rest := parts[len(shown) :]:
        table.add_row(f"{len(rest)} others", "", *_pair(sum(part[2] for part in rest), sum(part[3] for part in rest)))
    table.add_section()
    table.add_row("total, loss buffers included", "", *_pair(one.total + one.loss_buffers, other.total + other.loss_buffers))
    if one.tokens and other.tokens:
        a, b = (round((ledger.total + ledger.loss_buffers) / ledger.tokens) for ledger in (one, other))
        table.add_row("per token", "", *_pair(a, b))
    return table


def _pair(a: int, b: int) -> tuple[str, str, str]:
    return f"{a:,}", f"{b:,}", f"{b / a:.2f}" if a else "–"


def _figures(ledger: Ledger, nbytes: int) -> tuple[str, str, str]:
    """Bytes, per token, and the share of the total."""
    per_token = f"{nbytes / ledger.tokens:,.0f}" if ledger.tokens else "–"
    share = f"{100 * nbytes / ledger.total:.1f} %" if ledger.total else "–"
    return f"{nbytes:,}", per_token, share
