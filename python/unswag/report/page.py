"""A report for a browser: one file with everything in it, which opens without a network.

The template is `templates/report.html`. Data goes into it as JSON; nothing of it becomes markup.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unswag import extras

if TYPE_CHECKING:
    from unswag.ledger import Ledger
    from unswag.plans import Plan

__all__ = ["COLOURS", "save"]

COLOURS = {  # of roles; the same as in pictures (report/plots.py)
    "attention": "#4477aa", "mlp": "#ee6677", "residual": "#228833", "checkpoint": "#a8962c", "lora": "#aa3377",
    "logits": "#3a9fbf", "loss buffers": "#222255", "gradient": "#555566", "other": "#888888",
}  # fmt: skip


def save(path: str | Path, sides: Mapping[str, Ledger], plan: Plan | None = None, step: dict[str, Any] | None = None) -> None:
    """Writes the report of one ledger, or of two beside each other, by their names.

    plan  a chart of context against memory is drawn of its options
    step  `unswag.torch.planned_step.Step.drawn()`: a curve of what is alive, instant by instant, with a slider

    ModuleNotFoundError without jinja2; OSError if the file cannot be written.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        extras.missing("a report as HTML", error, "torch")
    ledgers = list(sides.values())
    data = {"sides": [_side(name, ledger) for name, ledger in sides.items()], "colours": COLOURS, "step": step,
            "contexts": None if plan is None else _contexts(plan)}  # fmt: skip
    environment = jinja2.Environment(autoescape=True)
    template = environment.from_string(Path(__file__).with_name("templates").joinpath("report.html").read_text("utf-8"))
    # "</script>" in a name would end the element that holds the data
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    import markupsafe

    page = template.render(
        title=" and ".join(dict.fromkeys(ledger.model or "a function" for ledger in ledgers)) or "UnSwag",
        subtitle=ledgers[0].title() if ledgers else "",
        data=markupsafe.Markup(text),
    )
    Path(path).write_text(page, "utf-8")


def _side(name: str, ledger: Ledger) -> dict[str, Any]:
    rows = [[r.module, r.role, "×".join(map(str, r.shape)), r.dtype, r.tier, r.bytes] for r in ledger.rows]
    return {
        "name": name, "total": ledger.total, "rows": rows, "peak": ledger.peak, "loss_buffers": ledger.loss_buffers,
        "per_token": ledger.bytes_per_token if ledger.tokens else None,
    }  # fmt: skip


def _contexts(plan: Plan) -> dict[str, Any]:
    dashes = ["", "8 4", "2 3", "12 3 2 3", "4 8", "1 6"]
    lines = [
        {"name": option.name, "ours": option.ours, "line": option.line, "dash": dashes[i % len(dashes)]}
        for i, option in enumerate(plan.options)
    ]
    longest = max((option.longest for option in plan.options), default=0)
    return {"lines": lines, "most": max(1, round(1.1 * longest)), "limit": plan.limits["device"] or 0}
