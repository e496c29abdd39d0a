"""The ledger: what was kept for the backward pass, row by row, to the byte. Framework-neutral.

Rows and sums are here; tables, pictures and HTML of them are made by `unswag.report`, which is imported when it is used.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from unswag.policy import STORE_TIERS

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One tensor saved for backward.

    module  dotted name of the module that ran when it was saved ("" for the model itself); in JAX the function, or the path
            of an argument
    role    mlp, residual, attention, checkpoint, logits, …
    shape   of the saved tensor;  dtype  its name without the framework: "bfloat16"
    bits    kept per element: 16.0 for a bfloat16 kept by reference, 0.0 when it is recomputed or shared with another row
    tier    where it is: "device", "host" or "disk" (in a store), or how it costs nothing: "recipe" (recomputed), "shared" (same
            storage as another row)
    bytes   kept for this row in that tier; a storage is counted once, at its full size, however many tensors see it
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


@dataclass(repr=False)
class Ledger:
    """The rows, and the figures that were counted independently of them. Shown as a table of at most a page; in a notebook as
    HTML.

    tokens         tokens of the batch, for `bytes_per_token`; 0 where they are not known
    alive          bytes of the storages really alive after the forward (counted by weak references), if counted
    peak           the highest that `alive` was at any moment of forward and backward outside the loss, if counted
    loss_buffers   bytes of the loss's own gradient buffers, not in `total` and not in `alive`
    weight_copies  bytes of autocast's copies of weights, not in `total` and not in `alive`
    compiler       what the compiler set apart for the program that was given beside, if one was
    model          name of the model's class, or of the function;  batch  the shape of each tensor of the batch, by its name
    """

    rows: list[Row] = field(default_factory=list)
    tokens: int = 0
    alive: int | None = None
    peak: int | None = None
    loss_buffers: int = 0
    weight_copies: int = 0
    compiler: CompilerMemory | None = None
    model: str = ""
    batch: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes kept on the device by all rows, each storage once."""
        return sum(row.bytes for row in self.rows if row.tier not in STORE_TIERS)

    @property
    def host(self) -> int:
        """Bytes in a store in host memory."""
        return sum(row.bytes for row in self.rows if row.tier == "host")

    @property
    def disk(self) -> int:
        """Bytes in a store on a disk."""
        return sum(row.bytes for row in self.rows if row.tier == "disk")

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
            group.bytes += 0 if row.tier in STORE_TIERS else row.bytes
            group.stored += row.bytes if row.tier in STORE_TIERS else 0
        return sorted(groups.values(), key=lambda group: (-group.bytes, -group.stored))

    def places(self) -> dict[tuple[str, str], int]:
        """Bytes by (group of modules, role), the loss's buffers among them, the largest first."""
        found: dict[tuple[str, str], int] = {}
        for group in self.groups():
            key = (group.label, group.role)
            found[key] = found.get(key, 0) + group.bytes
        if self.loss_buffers:
            found["(the loss)", LOSS_BUFFERS] = self.loss_buffers
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def title(self) -> str:
        """The model and the shapes of its batch, in a line; "" where neither is known."""
        shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in self.batch.items())
        return ": ".join(part for part in (self.model, shapes) if part)

    def table(self) -> Table:
        """The largest groups and the sums, for a terminal."""
        from unswag.report import tables

        return tables.of_ledger(self)

    def plot(self, path: str | Path) -> None:
        """Writes a picture (PNG, or the format that the file name's ending names): bytes by group of modules, coloured by role,
        and the loss's buffers. ModuleNotFoundError without matplotlib."""
        from unswag.report import plots

        plots.of_ledgers({"": self}, path)

    def compare(self, other: Ledger, names: tuple[str, str] = ("before", "after")) -> Comparison:
        """This ledger beside another, e.g. of the same model and batch after the surgery: a table, `plot(path)`, HTML."""
        return Comparison(self, other, names)

    def to_json(self) -> str:
        """Rows and sums as JSON."""
        sums = {
            "total": self.total,
            "host": self.host,
            "disk": self.disk,
            "bytes_per_token": self.bytes_per_token if self.tokens else None,
        }
        return json.dumps(asdict(self) | sums, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """What `to_json` wrote. ValueError for anything else."""
        try:
            read = json.loads(text)
            rows = [Row(**{**row, "shape": tuple(row["shape"])}) for row in read.pop("rows")]
            compiler = read.pop("compiler")
            batch = {name: tuple(shape) for name, shape in read.pop("batch").items()}
            known = {name: value for name, value in read.items() if name in cls.__dataclass_fields__}
            return cls(rows=rows, compiler=None if compiler is None else CompilerMemory(**compiler), batch=batch, **known)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no audit that Ledger.to_json wrote ({type(error).__name__}: {error})") from error

    def save_html(self, path: str | Path) -> None:
        """Writes a report for a browser, one file that needs no network: where the memory goes, by module, role and tensor.
        ModuleNotFoundError without jinja2."""
        from unswag.report import page

        page.save(path, {"": self})

    def __str__(self) -> str:
        from unswag.report import tables

        return tables.text(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from unswag.report import html

        return html.table(self.table())


@dataclass(repr=False)
class Comparison:
    """Two ledgers side by side, with the names that `Ledger.compare` was given. Shown as a table; in a notebook as HTML."""

    one: Ledger
    other: Ledger
    names: tuple[str, str] = ("before", "after")

    def save_html(self, path: str | Path) -> None:
        """Writes a report of both for a browser, as `Ledger.save_html` does."""
        from unswag.report import page

        page.save(path, dict(zip(self.names, (self.one, self.other), strict=True)))

    def parts(self) -> list[tuple[str, str, int, int]]:
        """(module, role, bytes of the one, bytes of the other) of each group of modules, the largest first."""
        found: dict[tuple[str, str], list[int]] = {}
        for side, ledger in enumerate((self.one, self.other)):
            for (module, role), nbytes in ledger.places().items():
                found.setdefault((module, role), [0, 0])[side] += nbytes
        return sorted(((*key, a, b) for key, (a, b) in found.items() if a or b), key=lambda part: -max(part[2:]))

    def table(self) -> Table:
        """The largest groups and the sums of both, and what the other keeps of the one, for a terminal."""
        from unswag.report import tables

        return tables.of_comparison(self)

    def plot(self, path: str | Path) -> None:
        """Writes a picture of both, in one scale. ModuleNotFoundError without matplotlib."""
        from unswag.report import plots

        plots.of_ledgers(dict(zip(self.names, (self.one, self.other), strict=True)), path)

    def __str__(self) -> str:
        from unswag.report import tables

        return tables.text(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from unswag.report import html

        return html.table(self.table())


@dataclass
class Group:
    """Rows of like modules, one role, name and source: how many tensors are kept, how many cost nothing, the bytes on the
    device, and those in a store."""

    module: str
    role: str
    name: str = ""
    source: str = ""
    kept: int = 0
    free: int = 0
    bytes: int = 0
    stored: int = 0

    @property
    def label(self) -> str:
        """The module's name, in words where it has none."""
        return self.module or ("(the logits)" if self.role == "logits" else "(the model itself)")


FREE_TIERS = ("recipe", "shared")
LOSS_BUFFERS = "loss buffers"  # a role in pictures and comparisons: what stands apart in a ledger

_BY_NAME = (
    ("lora", r"lora_"),
    ("residual", r"norm|(^|[._])ln(_|\d|\.|$)"),
    ("attention", r"attn|attention|[qkvo]_proj|qkv"),
    ("mlp", r"mlp|ffn|feed_?forward|(gate|up|down)_proj|(^|\.)fc\d|experts?(\.|$)"),
    ("logits", r"lm_head|embed_out|score$|classifier"),
)


def role_of(module: str) -> str:
    """The role of what a module saves, read from its name; "other" where the name says nothing. For display."""
    return next((role for role, pattern in _BY_NAME if re.search(pattern, module)), "other")


def _pattern(module: str) -> str:
    """`model.layers.*.mlp` for `model.layers.7.mlp`."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module)
