"""Gradient checkpointing under the stash: what a checkpointed layer recomputes passes the door too."""

from __future__ import annotations

from torch import nn

from unswag.policy import Policy


def prepare(model: nn.Module, policy: str | Policy = "exact") -> list[str]:
    """Makes the model's checkpointed layers recompute under a stash. Call it before each forward; idempotent.

    Returns what was left as it is and why, one sentence each, for the report.
    """
    return []


def release(model: nn.Module) -> None:
    """Undoes `prepare`."""
