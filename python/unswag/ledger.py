"""The ledger: what was kept for the backward pass, row by row, to the byte. Framework-neutral."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One tensor saved for backward.

    module  dotted name of the module that ran when it was saved ("" for the model itself); in JAX the function, or the path
            of an argument
    role    mlp, residual, attention, checkpoint, logits, …
    shape   of the saved tensor;  dtype  its name without the framework: "bfloat16"
    bits    kept per element: 16.0 for a bfloat16 kept as it is, 0.0 when it is made again or shared with another row
    tier    where it is: "device", or how it costs nothing: "recipe" (made again), "shared" (same storage as another row)
    bytes   kept for this row; a storage is counted once, at its full size, however many tensors see it
    name    in JAX: of the residual (`unswag_mask`), or of the operation that made it;  source  in JAX: file and line
    """

    module: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    bits: float
    tier: str
    bytes: int
    name: str = ""
    source: str = ""


@dataclass(frozen=True)
class CompilerMemory:
    """Bytes that a compiler set apart for one program: its own figures, nothing was run.

    arguments, outputs, temporaries; aliased  bytes of outputs that lie in (donated) arguments
    peak  the most that is alive at any moment, the arguments too; None where the compiler does not say
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    peak: int | None


@dataclass
class Ledger:
    """The rows, and beside them what was counted without the door.

    tokens        tokens of the batch, for `bytes_per_token`
    alive         bytes of the storages really alive after the forward (counted by weak references), if counted
    peak          the highest that `alive` was at any moment of forward and backward outside the loss, if counted
    loss_buffers  bytes of the loss's own gradient buffers, not in `total` and not in `alive`
    weight_copies bytes of autocast's copies of weights, not in `total` and not in `alive`
    compiler      what the compiler set apart for the program that was given beside, if one was
    """

    rows: list[Row] = field(default_factory=list)
    tokens: int = 0
    alive: int | None = None
    peak: int | None = None
    loss_buffers: int = 0
    weight_copies: int = 0
    compiler: CompilerMemory | None = None

    @property
    def total(self) -> int:
        """Bytes kept by all rows."""
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_per_token(self) -> float:
        """`total` by the tokens of the batch."""
        return self.total / self.tokens if self.tokens else float("nan")

    def groups(self) -> list[Group]:
        """The rows added up over layers and tensors alike (`model.layers.*.mlp`), largest first."""
        groups: dict[tuple[str, str, str, str], Group] = {}
        for row in self.rows:
            key = (_pattern(row.module), row.role, row.name, row.source)
            group = groups.setdefault(key, Group(*key))
            group.kept += row.tier not in FREE_TIERS
            group.free += row.tier in FREE_TIERS
            group.bytes += row.bytes
        return sorted(groups.values(), key=lambda group: -group.bytes)

    def table(self) -> Table:
        """The groups and the sums, for a terminal."""
        from rich.table import Table

        table = Table(title="Saved for backward", title_justify="left")
        words = ["module", "role", *(word for word in ("name", "source") if any(getattr(row, word) for row in self.rows))]
        for column in words:
            table.add_column(column)
        for column in ("kept", "made again or shared", "bytes", "bytes/token", "share"):
            table.add_column(column, justify="right")
        for group in self.groups():
            place = [getattr(group, word) for word in words]
            table.add_row(*place, f"{group.kept:,}", f"{group.free:,}", *self._figures(group.bytes))
        table.add_section()
        empty = [""] * (len(words) + 1)
        table.add_row("total", *empty, *self._figures(self.total))
        if self.alive is not None:
            table.add_row("counted independently", *empty, *self._figures(self.alive))
        if self.peak is not None:
            table.add_row("highest, forward and backward", *empty, *self._figures(self.peak))
        for name, extra in (("not in it: loss buffers", self.loss_buffers), ("not in it: weight copies", self.weight_copies)):
            if extra:
                table.add_row(name, *empty, *self._figures(extra)[:2], "")
        for name, nbytes in asdict(self.compiler).items() if self.compiler is not None else ():
            table.add_row(
                f"the compiler: {name}", *empty, *(("unknown", "") if nbytes is None else self._figures(nbytes)[:2]), ""
            )
        return table

    def _figures(self, nbytes: int) -> tuple[str, str, str]:
        per_token = f"{nbytes / self.tokens:,.0f}" if self.tokens else "–"
        share = f"{100 * nbytes / self.total:.1f} %" if self.total else "–"
        return f"{nbytes:,}", per_token, share

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, no_color=True, record=False, file=io.StringIO())
        console.print(self.table())
        return console.file.getvalue()  # type: ignore[attr-defined]

    def plot(self, path: str | Path) -> None:
        """Writes a picture (PNG, or what the ending says): bytes by group of modules, coloured by role."""
        from matplotlib.figure import Figure

        bars: dict[str, dict[str, int]] = {}
        for group in self.groups():
            name = group.module or "(model)"
            parts = bars.setdefault(name, {})
            parts[group.role] = parts.get(group.role, 0) + group.bytes
        names = [name for name, roles in bars.items() if sum(roles.values())]
        shown, rest = names[:MOST_BARS], names[MOST_BARS:]
        if rest:
            others: dict[str, int] = {}
            for name in rest:
                for role, nbytes in bars.pop(name).items():
                    others[role] = others.get(role, 0) + nbytes
            bars[f"{len(rest)} others"] = others
            shown.append(f"{len(rest)} others")
        roles = [role for role in COLOURS if any(role in bars[name] for name in shown)]
        scale, unit = _unit(max((sum(bars[name].values()) for name in shown), default=0))

        figure = Figure(figsize=(10, 1.6 + 0.42 * max(len(shown), 1)), layout="constrained")
        axes = figure.add_subplot()
        left = [0.0] * len(shown)
        for role in roles:
            widths = [bars[name].get(role, 0) / scale for name in shown]
            axes.barh(shown, widths, left=left, label=role, color=COLOURS[role])
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for name, end in zip(shown, left, strict=True):
            axes.annotate(f" {end:,.1f}", (end, name), va="center")
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlabel(f"saved for backward, {unit}")
        per_token = f", {self.bytes_per_token:,.0f} bytes per token" if self.tokens else ""
        axes.set_title(f"{self.total / scale:,.1f} {unit}{per_token}", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        if roles:
            axes.legend(title="role", frameon=False, loc="lower right")
        figure.savefig(path, dpi=150)

    def to_json(self) -> str:
        """Rows and sums as JSON."""
        sums = {"total": self.total, "bytes_per_token": self.bytes_per_token if self.tokens else None}
        return json.dumps(asdict(self) | sums, indent=1)


@dataclass
class Group:
    """Rows of like modules, one role, name and source: how many tensors are kept, how many cost nothing, and the bytes."""

    module: str
    role: str
    name: str = ""
    source: str = ""
    kept: int = 0
    free: int = 0
    bytes: int = 0


FREE_TIERS = ("recipe", "shared")
MOST_BARS = 14
COLOURS = {
    "attention": "#4477aa",
    "mlp": "#ee6677",
    "residual": "#228833",
    "checkpoint": "#ccbb44",
    "lora": "#aa3377",
    "logits": "#66ccee",
    "other": "#999999",
}

_ROLES = (
    ("lora", r"lora_"),
    ("residual", r"norm|(^|[._])ln(_|\d|\.|$)"),
    ("attention", r"attn|attention|[qkvo]_proj|qkv"),
    ("mlp", r"mlp|ffn|feed_?forward|(gate|up|down)_proj|(^|\.)fc\d|experts?(\.|$)"),
    ("logits", r"lm_head|embed_out|score$|classifier"),
)


def role_of(module: str) -> str:
    """The role of what a module saves, read from its name; "other" where the name says nothing. For display."""
    return next((role for role, pattern in _ROLES if re.search(pattern, module)), "other")


def _pattern(module: str) -> str:
    """`model.layers.*.mlp` for `model.layers.7.mlp`."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module)


def _unit(nbytes: float) -> tuple[int, str]:
    return next(
        ((1 << shift, unit) for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if nbytes >= 1 << shift), (1, "bytes")
    )


def audit(model: Any, /, *args: Any, **kwargs: Any) -> Ledger:
    """What a model keeps for its backward pass: `unswag.torch.audit(model, **batch)` for a torch.nn.Module, else
    `unswag.jax.audit(function, *args, **kwargs)` for a function. Imports only the framework in question.

    TypeError for what is neither; ModuleNotFoundError for a function without JAX.
    """
    torch = sys.modules.get("torch")  # whoever has a module of torch has imported it
    if torch is not None and isinstance(model, torch.nn.Module):
        from unswag.torch.audit import audit as of_module

        if args:
            raise TypeError("audit: a torch module takes its batch by name, e.g. input_ids=..., labels=...")
        return of_module(model, **kwargs)
    if not callable(model):
        raise TypeError(f"audit: got a {type(model).__name__}; pass a torch.nn.Module, or a function of JAX and its arguments")
    try:
        from unswag.jax.ledger import audit as of_function
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"unswag.audit of a function needs the module {error.name!r}, which is not installed: pip install 'unswag[jax]'",
            name=error.name,
        ) from error
    return of_function(model, *args, **kwargs)
