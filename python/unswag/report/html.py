"""Tables as HTML, for notebooks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["table", "text"]


def text(words: str) -> str:
    """A paragraph of plain words."""
    return f"<p>{escape(words)}</p>"


def table(shown: Table) -> str:
    """A table of rich as an HTML table: its title, headers, rows, sections and caption; text without markup."""
    sides = ["right" if column.justify == "right" else "left" for column in shown.columns]

    def row(tag: str, cells: list[object], line: bool = False) -> str:
        filled = zip(sides, cells, strict=True)
        inner = "".join(f'<{tag} style="text-align:{side}">{escape(str(cell))}</{tag}>' for side, cell in filled)
        return f'<tr style="border-bottom:1px solid">{inner}</tr>' if line else f"<tr>{inner}</tr>"

    body = zip(*(column.cells for column in shown.columns), strict=True)
    rows = [row("td", list(cells), about.end_section) for cells, about in zip(body, shown.rows, strict=True)]
    title = f'<caption style="text-align:left;white-space:nowrap">{escape(str(shown.title))}</caption>' if shown.title else ""
    note = f"<p>{escape(str(shown.caption))}</p>" if shown.caption else ""
    head = row("th", [column.header for column in shown.columns])
    return f"<table>{title}<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>{note}"
