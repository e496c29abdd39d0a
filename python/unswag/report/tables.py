"""Tables for a terminal."""

from __future__ import annotations

import io
import itertools
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.table import Table

from unswag import sizes

if TYPE_CHECKING:
    from unswag.ledger import Comparison, Ledger
    from unswag.plans import Plan
    from unswag.torch.surgery import SurgeryReport

__all__ = ["MOST_ROWS", "of_comparison", "of_ledger", "of_plan", "of_surgery", "text"]

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
        if (beside := ledger.alive - ledger.total) > ledger.alive // 100:
            table.add_row("of it in no row (results, checkpoints)", *empty, *_figures(ledger, beside)[:2], "")
    if ledger.peak is not None:
        table.add_row("highest, forward and backward", *empty, *_figures(ledger, ledger.peak))
    beside_it = {
        "loss buffers": ledger.loss_buffers,
        "weight copies": ledger.weight_copies,
        "in host memory": ledger.host,
        "on disk": ledger.disk,
    }
    for name, extra in ((f"not in it: {what}", nbytes) for what, nbytes in beside_it.items()):
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
    for where, a, b in (("in host memory", one.host, other.host), ("on disk", one.disk, other.disk)):
        if a or b:
            table.add_row(f"not in it: {where}", "", *_pair(a, b))
    if one.tokens and other.tokens:
        a, b = (round((ledger.total + ledger.loss_buffers) / ledger.tokens) for ledger in (one, other))
        table.add_row("per token", "", *_pair(a, b))
    return table


def of_surgery(report: SurgeryReport) -> Table | str:
    """What was patched, what was left and why, and what a step keeps before and after."""
    if not report.patched and not report.skipped:
        return f"UnSwag: no known pattern in {report.model}; the model is untouched"
    table = Table(
        title=f"UnSwag surgery on {report.model}" + ("" if report.patched else ": the model is untouched"),
        caption=_figures_of_surgery(report) if report.patched else None,
        min_width=76,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("modules", justify="right")
    table.add_column("such as", overflow="fold")
    table.add_column("patched as, or left because")
    rest = [("", note) for note in report.notes]
    for style, rows in (("", report.patched), ("dim", [*report.skipped, *rest])):
        for what, group in itertools.groupby(sorted(rows, key=lambda row: row[1]), key=lambda row: row[1]):
            names = [name or "the model" for name, _ in group]
            table.add_row(str(len(names)), names[0], what if style == "" else f"left: {what}", style=style)
    if report.policy != "exact":
        table.add_row("", "", report.policy, style="yellow")
    if made := report.logits_made:
        uses = ", ".join(f"{use} {n}" for use, n in made.most_common())
        table.add_row(str(made.total()), "the logits", f"made in full in training, by {uses}", style="yellow")
    if relus := report.relus_kept:
        ways = ", ".join(f"{way} {n}" for way, n in relus.most_common())
        table.add_row(str(relus.total()), "outputs of ReLU", f"kept in training as: {ways}", style="dim")
    return table


def _figures_of_surgery(report: SurgeryReport) -> str:
    """What a training step keeps before and after the surgery, of which batch and under which conditions."""
    before, after = report.before, report.after
    if before is None or after is None:
        return (
            f"What a training step keeps is not known: {report.unknown}. Measure it with unswag.audit(model, **batch), before "
            "and after the surgery."
        )
    a, b = before.alive or 0, after.alive or 0
    unit, n = ("token", before.tokens) if before.tokens and before.tokens == after.tokens else ("example", 1)
    batch = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in after.batch.items() if name != "use_cache")
    conditions = {
        True: ", with gradient checkpointing",
        False: ", without gradient checkpointing (to see its figures, switch it on before the surgery)",
        None: "",
    }
    less = f" ({a / b:.1f} x less)" if b else ""
    return (
        f"Saved for backward, bytes per {unit}: {a / n:,.0f} before, {b / n:,.0f} after{less}{_stored(after, n)}. Computed "
        f"from shapes alone ({batch}){conditions[report.checkpointing]}."
    )


MOST_ALIVE = 8


def of_plan(plan: Plan) -> Table:
    """What to do, why, what it takes, and the other ways."""
    table = Table(title=f"Plan: {plan.title()}", title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("is", overflow="fold")
    table.add_row("fits" if plan.fits else "does not fit", plan.reason)
    table.add_row("context", f"{plan.context:,} tokens")
    table.add_row("how", ", ".join(f"{role}: {choice}" for role, choice in plan.choices.items()))
    table.add_row("step", f"{plan.step_cost:.2f} x the time of plain checkpointing (counted, not measured)")
    table.add_section()
    taken = f"{sizes.show(plan.peak['device'])} allocated"
    if plan.device == "cuda":
        taken += f", {sizes.show(plan.reserved)} with what the allocator and CUDA hold"
    words = f"{taken}; weights {sizes.show(plan.weights)}, optimizer states {sizes.show(plan.states)}"
    table.add_row(f"peak, {plan.device}", words)
    for memory, name in (("pinned", "page-locked host memory"), ("host", "host memory"), ("disk", "disk")):
        table.add_row(f"peak, {name}", sizes.show(plan.peak[memory]))
    table.add_row("reached in", plan.instant)
    for one in plan.alive[:MOST_ALIVE]:
        shape = "×".join(map(str, one.shape))
        table.add_row("alive there", f"{sizes.show(one.bytes)}  {one.role} of {one.module or 'the model'}, {one.dtype} {shape}")
    table.add_section()
    for option in plan.options:
        mark = ", chosen" if option.name == plan.way else ""
        approximate = " (changes gradients)" if option.lossy else ""
        table.add_row(
            f"{option.name}{mark}",
            f"longest context {option.longest:,}; {sizes.show(option.peak['device'])} at {plan.context:,} tokens; step "
            f"{option.step_cost:.2f} x{approximate}",
        )
    return table


def _stored(ledger: Ledger, n: int) -> str:
    """What a store keeps, per token or example."""
    tiers = (("in host memory", ledger.host), ("on disk", ledger.disk))
    return "".join(f", and {nbytes / n:,.0f} {where}" for where, nbytes in tiers if nbytes)


def _pair(a: int, b: int) -> tuple[str, str, str]:
    return f"{a:,}", f"{b:,}", f"{b / a:.2f}" if a else "–"


def _figures(ledger: Ledger, nbytes: int) -> tuple[str, str, str]:
    """Bytes, per token, and the share of the total."""
    per_token = f"{nbytes / ledger.tokens:,.0f}" if ledger.tokens else "–"
    share = f"{100 * nbytes / ledger.total:.1f} %" if ledger.total else "–"
    return f"{nbytes:,}", per_token, share
