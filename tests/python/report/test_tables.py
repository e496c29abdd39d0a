"""Tables of ledgers: each figure is there, once."""

from __future__ import annotations

from rich.table import Table

from unswag.ledger import CompilerMemory, Ledger, Row
from unswag.report import tables


def ledger(groups: int = 2, **about) -> Ledger:
    names = [f"part_{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(groups)]
    rows = [Row(name, "mlp", (4,), "float32", 32.0, "device", 1000 + i) for i, name in enumerate(names)]
    return Ledger([*rows, Row("", "other", (4,), "float32", 0.0, "recipe", 0)], tokens=10, **about)


def lines(table: Table) -> list[list[str]]:
    """The cells of each line of the text."""
    shown = tables.text(table).splitlines()
    return [[cell.strip() for cell in line.strip("│┃").split("│")] for line in shown if "│" in line]


def test_groups_and_sums_of_a_ledger():
    assert lines(tables.of_ledger(ledger(alive=2100, peak=3000, loss_buffers=50, weight_copies=60))) == [
        ["part_ab", "mlp", "1", "0", "1,001", "100", "50.0 %"],
        ["part_aa", "mlp", "1", "0", "1,000", "100", "50.0 %"],
        ["(the model itself)", "other", "0", "1", "0", "0", "0.0 %"],
        ["total", "", "", "", "2,001", "200", "100.0 %"],
        ["counted independently", "", "", "", "2,100", "210", "104.9 %"],
        ["of it in no row (results, checkpoints)", "", "", "", "99", "10", ""],
        ["highest, forward and backward", "", "", "", "3,000", "300", "149.9 %"],
        ["not in it: loss buffers", "", "", "", "50", "5", ""],
        ["not in it: weight copies", "", "", "", "60", "6", ""],
    ]


def test_what_is_not_known_is_a_dash():
    shown = tables.text(tables.of_ledger(Ledger(compiler=CompilerMemory(1, 2, 3, 4, None))))
    assert "–" in shown and "nan" not in shown and "the compiler: peak" in shown and "unknown" in shown


def test_small_groups_are_one_line():
    found = lines(tables.of_ledger(ledger(60)))
    assert len(found) == tables.MOST_ROWS + 1  # and the total
    last = found[tables.MOST_ROWS - 1]
    shown = sum(1000 + 59 - i for i in range(tables.MOST_ROWS - 1))
    assert last[:5] == ["38 others", "", "37", "1", f"{ledger(60).total - shown:,}"]


def test_two_side_by_side():
    other = ledger(1, loss_buffers=500)
    assert lines(tables.of_comparison(ledger().compare(other, ("stock", "ours")))) == [
        ["part_ab", "mlp", "1,001", "0", "0.00"],
        ["part_aa", "mlp", "1,000", "1,000", "1.00"],
        ["(the loss)", "loss buffers", "0", "500", "–"],
        ["total, loss buffers included", "", "2,001", "1,500", "0.75"],
        ["per token", "", "200", "150", "0.75"],
    ]
    found = lines(tables.of_comparison(ledger(60).compare(ledger(59))))
    assert found[tables.MOST_ROWS - 1][0] == "37 others" and len(found) == tables.MOST_ROWS + 2


def test_names_are_no_markup():
    strange = Ledger([Row("block.[red]x", "mlp", (4,), "float32", 32.0, "device", 16)])
    assert "block.[red]x" in tables.text(tables.of_ledger(strange))
