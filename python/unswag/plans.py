"""A plan: how to train in a given memory, what it takes, and why. Framework-neutral; `unswag.torch.plan` makes it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from unswag import sizes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["MEMORIES", "Alive", "Option", "Plan"]

MEMORIES = ("device", "pinned", "host", "disk")


@dataclass(frozen=True)
class Alive:
    """A tensor (or several alike) that is alive at the peak: whose, in which role, and how large."""

    module: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Option:
    """One way to train: `longest` context that fits, `peak` bytes by memory at the plan's context, time of a step relative to
    plain checkpointing. `ours`: with UnSwag; stock ways stand there for comparison. `line`: bytes on the device at length 0 and
    per token, from the plan's context on."""

    name: str
    ours: bool
    lossy: bool
    longest: int
    peak: dict[str, int]
    step_cost: float
    line: tuple[float, float]


@dataclass(repr=False)
class Plan:
    """How to train `model` in the memory that there is.

    context    tokens of each sequence;  batch  sequences
    peak       bytes by memory, "device", "pinned", "host" (pageable) and "disk". On a CPU the device is the process, weights
               included. On CUDA the device's is what PyTorch allocates; `reserved` is what its allocator and the context take,
               which is what has to fit
    instant    when the peak on the device is reached;  alive  what is alive there, largest first, weights not among it
    choices    per role, and for the layers as a whole: keep, recompute, a codec, a memory, or sweep
    reason     why this way
    step_cost  time of a step relative to plain checkpointing: by counting products, and measured shares of codecs and copies
    fits       whether it fits in `limits`, bytes by memory
    weights, states   bytes of weights and of optimizer states, both in peak["device"]
    options    every way that was looked at;  way  the name of the chosen one
    """

    model: str
    device: str
    context: int
    batch: int
    peak: dict[str, int]
    reserved: int
    instant: str
    alive: list[Alive]
    choices: dict[str, str]
    reason: str
    step_cost: float
    fits: bool
    limits: dict[str, int | None]
    weights: int
    states: int
    way: str
    training: str
    options: list[Option] = field(default_factory=list)
    surgery: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """What `to_json` wrote."""
        read = json.loads(text)
        read["alive"] = [Alive(**{**row, "shape": tuple(row["shape"])}) for row in read["alive"]]
        read["options"] = [Option(**{**row, "line": tuple(row["line"])}) for row in read["options"]]
        return cls(**read)

    def title(self) -> str:
        """What is planned, in a line."""
        memory = sizes.show(self.limits["device"] or 0)
        return f"{self.model}, {self.training}, batch {self.batch}, {memory} on {self.device} (predicted)"

    def table(self) -> Table:
        """For a terminal."""
        from unswag.report import tables

        return tables.of_plan(self)

    def __str__(self) -> str:
        from unswag.report import tables

        return tables.text(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from unswag.report import html

        return html.table(self.table())
