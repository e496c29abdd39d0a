"""Names of the residuals of our functions, and `jax.checkpoint` policies that save, offload or recompute them.

Every residual carries its name through `jax.ad_checkpoint.checkpoint_name`:

    unswag_mask   one-bit masks of the ReLU family
    unswag_code   derivative codes of silu and gelu
    unswag_input  inputs that a backward reads (x, z, gate, up)
    unswag_stat   a number or two per row: rstd; largest logit and sum of exponentials

    jax.checkpoint(block, policy=unswag.jax.save("unswag_mask", "unswag_stat"))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

__all__ = ["NAMES", "offload", "recompute", "save"]

MASK = "unswag_mask"
CODE = "unswag_code"
INPUT = "unswag_input"
STAT = "unswag_stat"

NAMES = (MASK, CODE, INPUT, STAT)


def _checked(function: str, names: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"{function}: no residual is called {unknown[0]!r}; choose among {', '.join(NAMES)}")
    return names or NAMES


def save(*names: str) -> Callable[..., Any]:
    """Policy: residuals of these names (all of ours without one) are saved; everything else is recomputed."""
    return jax.checkpoint_policies.save_only_these_names(*_checked("save", names))


def offload(*names: str, source: str = "device", destination: str = "pinned_host") -> Callable[..., Any]:
    """Policy: residuals of these names (all of ours without one) are moved to `destination` until the backward needs
    them; everything else is recomputed. For accelerators whose runtime has that kind of memory."""
    for name, kind in (("source", source), ("destination", destination)):
        if not isinstance(kind, str):
            raise TypeError(f"offload: {name} is {kind!r}; pass a kind of memory, e.g. 'device' or 'pinned_host'")
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(_checked("offload", names)),
        offload_src=source,
        offload_dst=destination,
    )


def recompute(*names: str) -> Callable[..., Any]:
    """Policy: residuals of these names (all of ours without one) are recomputed; our other residuals are saved, and
    nothing else.

    `jax.checkpoint_policies.save_anything_except_these_names` does not work for this: each named value was a value without a
    name before, and that would be saved instead.
    """
    again = _checked("recompute", names)
    return jax.checkpoint_policies.save_only_these_names(*(name for name in NAMES if name not in again))
