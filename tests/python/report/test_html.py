"""Tables as HTML: the same cells, nothing of them markup."""

from __future__ import annotations

from xml.etree import ElementTree

from rich.table import Table

from unswag.report import html


def test_every_cell_is_there_and_escaped():
    table = Table("name", title="<title>")
    table.add_column("bytes", justify="right")
    table.add_row("a < b & c", "1,000")
    table.add_section()
    table.add_row("total", "1")
    found = ElementTree.fromstring(html.table(table))
    cells = [cell.text for cell in found.iter() if cell.tag in ("th", "td")]
    assert cells == ["name", "bytes", "a < b & c", "1,000", "total", "1"]
    assert found.find("caption").text == "<title>"
    assert [cell.get("style") for cell in found.iter("th")] == ["text-align:left", "text-align:right"]
    assert ["border-bottom" in row.get("style", "") for row in found.find("tbody")] == [True, False]
    assert ElementTree.fromstring(html.table(Table("name"))).find("caption") is None
