"""Inside shard_map: makes the arguments of a function vary over the same mesh axes."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array, lax

__all__ = ["alike"]


def _axes(x: Array) -> frozenset[Any]:
    kind: Any = jax.typeof(x) if hasattr(jax, "typeof") else None  # before JAX 0.6 arrays had no such type
    axes: Any = getattr(kind, "vma", None) or getattr(getattr(kind, "mat", None), "varying", frozenset())
    return axes


def _cast(x: Array, axes: tuple[Any, ...]) -> Array:
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axes, to="varying")
    return lax.pvary(x, axes)  # type: ignore[attr-defined]  # before JAX 0.8


def alike(*arrays: Array | None) -> tuple[Any, ...]:
    """The arrays, each cast to vary over every mesh axis that one of them varies over.

    A custom_vjp may not return a cotangent that varies over an axis where its argument (a replicated weight) does not. The
    transpose of the cast is the sum over devices that such a cotangent needs.
    """
    axes = frozenset[Any]().union(*(_axes(x) for x in arrays if x is not None))
    return tuple(x if x is None or not (more := axes - _axes(x)) else _cast(x, tuple(sorted(more))) for x in arrays)
