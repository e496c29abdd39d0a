"""Pictures in one style, of ledgers and of whatever else is measured.

figure, (left, right) = plots.panels(1, 2)
left.plot(steps, losses, color=plots.STOCK, label="stock")
plots.save(figure, "picture.png")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import matplotlib
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"a picture needs the module {error.name!r}, which is not installed: pip install matplotlib", name=error.name
    ) from error

if TYPE_CHECKING:
    from unswag.ledger import Ledger

__all__ = ["COLOURS", "OURS", "STOCK", "STYLE", "of_ledgers", "panels", "save", "unit"]

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}
STOCK, OURS = "#8a8f98", "#d9480f"  # the colours of the two sides wherever they stand beside each other
COLOURS = {  # of a ledger's roles, in the order of the bars
    "attention": "#4477aa",
    "mlp": "#ee6677",
    "residual": "#228833",
    "checkpoint": "#ccbb44",
    "lora": "#aa3377",
    "logits": "#66ccee",
    "loss buffers": "#222255",
    "other": "#999999",
}
MOST_BARS, OTHERS = 14, "others"


def panels(rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes, one or an array of them, in the style of the house. `size` in inches; options of
    `Figure.subplots`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size or (5.5 * columns, 3.8 * rows))
        return figure, figure.subplots(rows, columns, **options)


def save(figure: Figure, path: str | Path) -> None:
    """Writes the figure; the ending of the path names the format."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path)


def unit(nbytes: float) -> tuple[int, str]:
    """(divisor, name) of the largest binary unit that leaves at least 1: (1048576, "MiB") for 3,000,000."""
    units = ((30, "GiB"), (20, "MiB"), (10, "KiB"))
    return next(((1 << shift, name) for shift, name in units if nbytes >= 1 << shift), (1, "bytes"))


def of_ledgers(sides: Mapping[str, Ledger], path: str | Path) -> None:
    """One panel for each ledger, in one scale and with the same groups of modules in all: bars coloured by role, the loss's
    buffers among them; above it the model, the batch and the total."""
    bars = _bars([ledger.places() for ledger in sides.values()])
    found = [{name: _roles(ledger.places(), name, bars) for name in bars} for ledger in sides.values()]
    totals = [ledger.total + ledger.loss_buffers for ledger in sides.values()]
    longest = max((sum(roles.values()) for side in found for roles in side.values()), default=0)
    scale, words = unit(max(totals))

    size = (9 if len(sides) == 1 else 14, 2.2 + 0.42 * max(len(bars), 1))
    figure, axes = panels(1, len(sides), size, sharex=True, sharey=True, squeeze=False)
    drawn: dict[str, Any] = {}
    for panel, (side, ledger), of_side, total in zip(axes[0], sides.items(), found, totals, strict=True):
        left = [0.0] * len(bars)
        for role, colour in COLOURS.items():
            widths = [of_side[name].get(role, 0) / scale for name in bars]
            container = panel.barh(bars, widths, left=left, color=colour)
            if any(widths):
                drawn[role] = container
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for name, end in zip(bars, left, strict=True):
            panel.annotate(f" {end:,.1f}", (end, name), va="center")
        per_token = f"{total / ledger.tokens:,.0f} bytes per token" if ledger.tokens else ""
        panel.set_title(", ".join(part for part in (side, f"{total / scale:,.1f} {words}", per_token) if part), loc="left")
        panel.set_xlabel(f"saved for backward, {words}")
    axes[0][0].invert_yaxis()
    axes[0][0].set_xlim(0, 1.12 * longest / scale or 1)
    figure.suptitle(next(iter(sides.values())).title() or "Saved for backward", x=0.01, ha="left", fontsize="large")
    if roles := [role for role in COLOURS if role in drawn]:
        handles = [drawn[role] for role in roles]
        figure.legend(handles, roles, loc="outside lower center", ncols=len(roles), frameon=False)
    save(figure, path)


def _bars(sides: list[dict[tuple[str, str], int]]) -> list[str]:
    """The groups of modules that keep the most in any of the ledgers; if there are more, the last bar is for all the others."""
    sums = [{module: sum(b for (of, _), b in places.items() if of == module) for module, _ in places} for places in sides]
    most = {module: max(of.get(module, 0) for of in sums) for side in sums for module in side}
    ordered = sorted((module for module, nbytes in most.items() if nbytes), key=lambda module: -most[module])
    return ordered if len(ordered) <= MOST_BARS else [*ordered[: MOST_BARS - 1], OTHERS]


def _roles(places: dict[tuple[str, str], int], bar: str, bars: list[str]) -> dict[str, int]:
    """What a bar stands for: bytes by role."""
    found: dict[str, int] = {}
    for (module, role), nbytes in places.items():
        if module == bar or (bar == OTHERS and module not in bars):
            role = role if role in COLOURS else "other"
            found[role] = found.get(role, 0) + nbytes
    return found
