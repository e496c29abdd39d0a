"""Which implementation and which layout a call uses; and what is wrong with an argument, in words."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from unswag.jax import xla

IMPLEMENTATIONS = ("xla",)


class How(NamedTuple):
    """Settled before differentiation; hashable."""

    implementation: str
    layout: str


def floating(op: str, name: str, x: ArrayLike) -> Array:
    """x as a jax array, or TypeError."""
    if isinstance(x, (str, bytes)) or (not isinstance(x, (Array, float)) and not hasattr(x, "dtype")):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}; pass a jax array, e.g. jnp.asarray({name})")
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{op}: {name} has dtype {array.dtype}; pass a floating array, e.g. {name}.astype(jnp.float32)")
    return array


def one_of(op: str, name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}; choose {' or '.join(map(repr, choices))}")
    return value


def choose(op: str, x: Array, implementation: str | None, layout: str | None) -> How:
    """`None` is the best for the platform that is the default when the call is traced, and for the shape.

    layout: rows256 on a TPU for at least 256 rows, else rows. The choice changes where bits lie, never a result.
    """
    implementation = one_of(op, "implementation", implementation, (None, *IMPLEMENTATIONS)) or "xla"
    layout = one_of(op, "layout", layout, (None, *xla.LAYOUTS))
    if layout is None:
        tall = x.ndim >= 2 and x.shape[-2] >= xla.GROUP
        layout = "rows256" if tall and jax.default_backend() == "tpu" else "rows"
    return How(implementation, layout)
