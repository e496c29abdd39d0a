"""Chooses the implementation and the layout of a call, and checks arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from unswag.jax import xla

IMPLEMENTATIONS = ("xla", "ffi")  # of every function; the masks have "pallas" too
FAST = ("float32", "float16", "bfloat16")  # what the C++ core has vector code for


class How(NamedTuple):
    """The choices for one call, made before differentiation; hashable.

    implementation  None: ffi on the CPU and xla elsewhere, resolved when the platform is known
    parts           the number of parts into which `xla.cut` cuts the array to pack
    """

    implementation: str | None
    layout: str
    parts: int = 1

    def elementwise(self, function: Callable[[Array], Array], x: Array) -> Array:
        """function(x), called with x cut into parts. If x has a weak type, as a Python number has, y and the gradient
        have it too, as with jax.nn: they do not promote 16-bit arrays."""

        def whole(x: Array) -> Array:
            return function(xla.cut(x, self.parts, self.layout)).reshape(x.shape)

        return _through_strong(whole, x) if x.weak_type else whole(x)


def _through_strong(function: Callable[[Array], Array], x: Array) -> Array:
    """function(x) for a weakly typed x. function gets a strongly typed x; the transpose of the cast restores the weak type."""
    strong, back = jax.vjp(lambda x: lax.convert_element_type(x, x.dtype), x)
    y: Array = back(function(strong))[0]
    return y


def floating(op: str, name: str, x: ArrayLike) -> Array:
    """x as a jax array, or TypeError."""
    if isinstance(x, (str, bytes)) or (not isinstance(x, (Array, float)) and not hasattr(x, "dtype")):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}; pass a jax array, e.g. jnp.asarray({name})")
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{op}: {name} has dtype {array.dtype}; pass a floating array, e.g. {name}.astype(jnp.float32)")
    return array


def same_dtype(op: str, first: tuple[str, Array], others: dict[str, Array]) -> None:
    """TypeError unless the others have the dtype of the first."""
    name, like = first
    for other, array in others.items():
        if array.dtype != like.dtype:
            raise TypeError(f"{op}: {name} has dtype {like.dtype} and {other} {array.dtype}; pass {other}.astype({like.dtype})")


def number(
    op: str, name: str, value: Any, remedy: str = "pass a Python number", fits: Callable[[Any], bool] = lambda value: True
) -> float:  # fmt: skip
    """value, a Python or NumPy number, as a float. It is a constant of the traced program."""
    if isinstance(value, Array):
        raise TypeError(f"{op}: {name} is an array; pass a Python number")
    if not hasattr(value, "__float__") or np.ndim(value):
        raise TypeError(f"{op}: {name} is {value!r}; {remedy}")
    if not fits(value):
        raise ValueError(f"{op}: {name} is {value!r}; {remedy}")
    return float(value)


def integer(op: str, name: str, value: Any, remedy: str = "pass a Python integer") -> int:
    if not isinstance(value, Integral):
        raise TypeError(f"{op}: {name} is {value!r}; {remedy}")
    return int(value)


def one_of(op: str, name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if isinstance(value, Array | np.ndarray) or value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}; choose {' or '.join(map(repr, choices))}")
    return value


def choose(
    op: str,
    x: Array,
    implementation: str | None,
    layout: str | None,
    *,
    bits: int = 0,
    pallas: bool = False,
    cuts: tuple[int, int] | None = None,
) -> How:
    """Resolves `None` to the best choice for the dtype, the shape and the platform that is the default when the call is traced.

    implementation: on the CPU ffi (bench/results/jax-cpu.json), unless this JAX cannot partition its calls or the dtype is not
    in FAST; elsewhere xla. "ffi" by name also runs on CUDA, if the build has the kernels.
    layout: rows256 for pallas, and on a TPU for at least 256 rows that no sharding cuts within a group; otherwise rows. It
    changes where bits lie, never a result.
    bits: bits packed per element. pallas: whether the function has Pallas kernels. cuts: see `xla.cuts`; None: those of x.
    """
    one_of(op, "implementation", implementation, (None, *IMPLEMENTATIONS, *(["pallas"] if pallas else [])))
    one_of(op, "layout", layout, (None, *xla.LAYOUTS))
    if implementation == "ffi" and layout == "rows256":
        raise ValueError(f"{op}: layout is 'rows256', which implementation 'ffi' does not have; choose 'rows', or 'xla'")
    if implementation == "pallas":
        if layout == "rows":
            raise ValueError(f"{op}: layout is 'rows', which implementation 'pallas' does not have; choose 'rows256', or 'xla'")
        layout = "rows256"
    platform = jax.default_backend()
    cuts = cuts or (xla.cuts(x) if bits else (1, 1))
    if layout is None:
        rows = x.shape[-2] if x.ndim >= 2 else 1  # not an int in a symbolic shape (jax.export)
        tall = isinstance(rows, int) and rows >= xla.GROUP and implementation != "ffi"
        whole = xla.parts(x.shape, cuts, bits, "rows256") == 1
        layout = "rows256" if tall and whole and platform == "tpu" else "rows"
    native = layout == "rows" and platform == "cpu" and x.dtype.name in FAST
    if implementation is None and not (native and _partitions()):
        implementation = "xla"
    parts = 1 if implementation == "pallas" else xla.parts(x.shape, cuts, bits, layout)
    return How(implementation, layout, parts if bits else 1)


def _partitions() -> bool:
    from unswag.jax import ffi  # imported late: it loads the C++ core

    return ffi.PARTITIONS


def differentiated_as(plain: Callable[..., Any], native: Callable[..., Any]) -> Callable[..., Any]:
    """native with the derivative of plain: kernels have no derivative, and a gradient may be differentiated again."""
    function = jax.custom_jvp(lambda *arguments: native(*arguments))
    function.defjvp(lambda primals, tangents: (function(*primals), jax.jvp(plain, primals, tangents)[1]))
    return function


def implement(how: How, native: str, plain: Callable[..., Any], *arguments: Array, **attributes: Any) -> Any:
    """The function of `unswag.jax.ffi` called `native` where ffi is chosen, else plain(*arguments)."""
    if how.implementation in ("xla", "pallas"):
        return plain(*arguments)
    from unswag.jax import ffi

    named = how.implementation == "ffi"
    function = partial(getattr(ffi, native), **attributes, named=named)
    return function(*arguments) if named else lax.platform_dependent(*arguments, cpu=function, default=plain)
