"""The ways to keep less that the planner chooses among: how a model is prepared for each, and what a step costs.

A way is a line of `WAYS`. A new one needs its arguments of `apply_unswag_surgery`, its choice per role, and its cost; what it
takes on the device follows from running the prepared model without data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn

from unswag.torch.dry_run import checkpoints
from unswag.torch.operation import operate, take_back

__all__ = ["STOCK", "WAYS", "Way", "checkpoint_layers", "prepared"]

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Way:
    """One way to train.

    name       for tables
    choices    per role, or "layers": keep, recompute, a codec, a memory or sweep
    surgery    arguments of `apply_unswag_surgery`; None: the stock model
    recompute  whether layers are checkpointed
    work       time of a step beside the products of forward, backward and recompute, as a share of checkpointing's
               (codecs, copies; bench/results)
    lossy      whether gradients differ from those of "exact"
    tier       where the inputs of checkpointed layers go: "host" (page-locked with CUDA), "disk", or "" for the device. A step
               without data is run without the store, and what it would keep counted there
    """

    name: str
    choices: Mapping[str, str]
    surgery: Mapping[str, Any] | None = field(default_factory=dict)
    recompute: bool = False
    work: float = 0.0
    lossy: bool = False
    tier: str = ""

    def cost(self, trains_weights: bool) -> float:
        """Time of a step relative to plain checkpointing, by counting products: a forward is 1, a backward 2, or 1 where
        weights are frozen; a recompute is another forward."""
        backward = 2 if trains_weights else 1
        return (1 + backward + self.recompute) / (2 + backward) + self.work


STOCK = (
    Way("stock", {"layers": "keep"}, None),
    Way("stock, checkpointing", {"layers": "recompute"}, None, recompute=True),
)
WAYS = (
    Way("keep", {"layers": "keep", "mlp": "exact", "residual": "exact"}),
    Way("keep in int8", {"layers": "keep", "mlp": "int8", "residual": "int8"}, {"policy": "int8"}, work=0.05, lossy=True),
    Way("keep in int4", {"layers": "keep", "mlp": "int4", "residual": "int8"}, {"policy": "int4"}, work=0.05, lossy=True),
    Way("checkpointing", {"layers": "recompute", "checkpoint": "exact"}, recompute=True),
    Way(
        "checkpoints in host memory", {"layers": "recompute", "checkpoint": "host"}, {"store": "host"}, True, 0.05, tier="host"
    ),
    Way("checkpoints on disk", {"layers": "recompute", "checkpoint": "disk"}, {"store": "disk"}, True, 0.1, tier="disk"),
    Way("checkpointing in int8", {"layers": "recompute", "checkpoint": "int8"}, {"policy": "int8"}, True, 0.03, True),
)


def checkpoint_layers(model: Any, on: bool) -> None:
    """Switches the model's gradient checkpointing on, not reentrant, or off, as transformers does it."""
    if not on:
        if checkpoints(model):
            model.gradient_checkpointing_disable()
        return
    enable = getattr(model, "activation_checkpointing_enable", None)
    settings = {"use_reentrant": False}
    if enable is not None:
        enable(settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def prepared(model: nn.Module, way: Way, before: Way | None) -> None:
    """Makes `model`, which was prepared for `before`, ready for `way`."""
    if before is None or _without_store(before) != _without_store(way):
        take_back(model)
        checkpoint_layers(model, False)
        if way.surgery is not None:
            operate(model, verify=False, verbose=False, **(_without_store(way) or {}))
    checkpoint_layers(model, way.recompute)


def _without_store(way: Way) -> dict[str, Any] | None:
    return None if way.surgery is None else {name: value for name, value in way.surgery.items() if name != "store"}
