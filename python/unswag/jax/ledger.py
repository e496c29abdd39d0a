"""What a function keeps between its forward and its backward, read from its jaxpr: nothing is computed."""

from __future__ import annotations

import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from unswag.jax.how import integer
from unswag.ledger import CompilerMemory, Ledger, Row, role_of

__all__ = ["audit", "compiler_memory"]

MOST_SHAPES = 8  # of a batch: more arrays than that are weights


def audit(
    function: Callable[..., Any],
    /,
    *args: Any,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    tokens: int = 0,
    compiled: jax.stages.Compiled | None = None,
    **kwargs: Any,
) -> Ledger:
    """The residuals that the forward of `function(*args, **kwargs)` hands to its backward, as a ledger.

    args      arrays or `jax.ShapeDtypeStruct`s, in pytrees; what is no array is passed on unchanged
    argnums   the arguments that are differentiated, as in `jax.grad`: their floating arrays. What is trained decides what is
              kept, so freeze here what is frozen in training
    has_aux   the function returns (value, auxiliary), as in `jax.grad`
    tokens    of the batch, for `bytes_per_token`
    compiled  a compiled program, e.g. `step.lower(...).compile()`, whose own figures stand beside: `compiler_memory`

    A row says where (`module`, `source`: the innermost function and line outside of JAX, Flax, Equinox, Optax and UnSwag), what
    (`name`: by `checkpoint_name`, else the function of a library, e.g. `relu`, or the operation that made it) and how much.
    Arguments, constants and what was listed before are rows of the tier "shared" and of 0 bytes, also behind a reshape; an
    array of one repeated number, which a compiler recomputes, is a "recipe".

    This is what forward and backward exchange when they are two programs. Inside one `jit` the compiler may keep less or
    something else instead, e.g. float32 in place of bool: give `compiled` to see its account.

    ValueError if nothing is differentiated; TypeError for a `function` that cannot be called.
    """
    if not callable(function):
        raise TypeError(f"audit: function is a {type(function).__name__}; pass a function and its arguments")
    wanted = tuple(argnums) if isinstance(argnums, Sequence) else (argnums,)
    if not all(isinstance(i, Integral) for i in wanted):
        raise TypeError(f"audit: argnums is {argnums!r}; pass the positions of arguments, as to jax.grad")
    tokens = integer("audit", "tokens", tokens, "pass the number of tokens of the batch")
    if not all(0 <= i < len(args) for i in wanted):
        raise ValueError(f"audit: argnums is {argnums}, but {len(args)} arguments were given by place; choose among these")
    with_paths, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    paths, leaves = [path for path, _ in with_paths], [leaf for _, leaf in with_paths]
    traced = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    trained = [
        is_array and path[0].idx == 0 and path[1].idx in wanted and jnp.issubdtype(leaf.dtype, jnp.inexact)
        for path, leaf, is_array in zip(paths, leaves, traced, strict=True)
    ]
    if not any(trained):
        raise ValueError(f"audit: argnums is {argnums}, where no floating array is; name the arguments that are differentiated")

    def residuals(*arrays: Any) -> list[Any]:
        given = _merged(traced, arrays, leaves)

        def differentiated(*weights: Any) -> Any:
            args, kwargs = jax.tree.unflatten(tree, _merged(trained, weights, given))
            return function(*args, **kwargs)

        weights = [leaf for leaf, is_weight in zip(given, trained, strict=True) if is_weight]
        pulled: Any = jax.vjp(differentiated, *weights, has_aux=True) if has_aux else jax.vjp(differentiated, *weights)
        return jax.tree.leaves(pulled[1])

    names = _parameters(function, len(args))
    labels = [_label(names, path) for path in paths]
    closed = jax.make_jaxpr(residuals)(*(leaf for leaf, is_array in zip(leaves, traced, strict=True) if is_array))
    name = getattr(function, "__name__", type(function).__name__)
    rows = _rows(closed, name, [label for label, is_array in zip(labels, traced, strict=True) if is_array])
    others = [is_array and not is_weight for is_array, is_weight in zip(traced, trained, strict=True)]
    return Ledger(
        rows,
        tokens=tokens,
        compiler=None if compiled is None else compiler_memory(compiled),
        model=name,
        batch=_shapes(labels, leaves, others) if sum(others) <= MOST_SHAPES else {},
    )


def compiler_memory(compiled: jax.stages.Compiled) -> CompilerMemory:
    """What the compiler set apart for a program, from its `memory_analysis()`: bytes on one device. NotImplementedError where
    the platform has none."""
    found = compiled.memory_analysis()
    if found is None:
        raise NotImplementedError("compiler_memory: this platform's compiler gives no memory analysis")
    return CompilerMemory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        peak=getattr(found, "peak_memory_in_bytes", None) or None,
    )


def _merged(chosen: list[bool], values: Iterable[Any], others: list[Any]) -> list[Any]:
    """`others`, with the values in the chosen places."""
    following = iter(values)
    return [next(following) if is_chosen else other for is_chosen, other in zip(chosen, others, strict=True)]


def _shapes(labels: list[str], leaves: list[Any], chosen: list[bool]) -> dict[str, tuple[int, ...]]:
    return {label: tuple(leaf.shape) for label, leaf, one in zip(labels, leaves, chosen, strict=True) if one}


# ---- rows ---------------------------------------------------------------------------------------------------------------


class _Origin(NamedTuple):
    """Where a variable's storage comes from.

    root  what tells storages apart: the variable behind names and reshapes, with the calls around it
    eqn   the equation to be shown, None for an argument or a constant
    name  the residual's name, or what made it
    """

    root: tuple[Any, ...]
    eqn: JaxprEqn | None
    name: str


UNSWAG = str(Path(__file__).parents[1]) + "/"

# The same elements in the same order.
_SAME = {"name", "reshape", "squeeze", "expand_dims", "optimization_barrier", "copy", "copy_p"}


def _rows(closed: ClosedJaxpr, function: str, labels: list[str]) -> list[Row]:
    jaxpr = closed.jaxpr
    places = dict(zip(jaxpr.invars, labels, strict=True)) | dict.fromkeys(jaxpr.constvars, "a constant")
    libraries = _libraries()
    origins = _Origins(libraries)
    seen: set[tuple[Any, ...]] = set()
    rows = []
    for var in jaxpr.outvars:
        if isinstance(var, Literal):
            continue
        origin = origins.of(jaxpr, var)
        tier = "shared" if origin.root[0] in places or origin.root in seen else "recipe" if _is_splat(origin.eqn) else "device"
        seen.add(origin.root)
        if origin.eqn is None:
            module, source = places[origin.root[0]], ""
            role = role_of(module.lower())
        else:
            module, source, inside, ours = _place(origin.eqn, libraries)
            module = module or function
            role = role_of(f"{origin.eqn.source_info.name_stack}.{module}.{inside}".lower().replace("/", "."))
            if ours and not origin.name.startswith("unswag_"):
                origin = origin._replace(name=ours)
        kept = var.aval.dtype.itemsize if tier == "device" else 0
        rows.append(
            Row(
                module=module,
                role=role,
                shape=tuple(var.aval.shape),
                dtype=str(var.aval.dtype),
                bits=8.0 * kept,
                tier=tier,
                bytes=var.aval.size * kept,
                name=origin.name,
                source=source,
            )
        )
    return rows


def _is_splat(eqn: JaxprEqn | None) -> bool:
    """Whether an equation repeats one number."""
    return eqn is not None and eqn.primitive.name == "broadcast_in_dim" and isinstance(eqn.invars[0], Literal)


class _Origins:
    """Finds where variables come from; knows the equation of each variable of the jaxprs that it has seen."""

    def __init__(self, libraries: tuple[str, ...]) -> None:
        self._libraries = libraries
        self._makers: dict[int, dict[Any, JaxprEqn]] = {}

    def of(self, jaxpr: Jaxpr, var: Any) -> _Origin:
        maker = self._makers.get(id(jaxpr))
        if maker is None:
            maker = self._makers[id(jaxpr)] = {made: eqn for eqn in jaxpr.eqns for made in eqn.outvars}
        eqn = maker.get(var)
        if eqn is None:
            return _Origin((var,), None, "")
        kind, place = eqn.primitive.name, eqn.outvars.index(var)
        if kind in _SAME:
            before = eqn.invars[place]
            if isinstance(before, Literal):
                return _Origin((var,), eqn, kind)
            found = self.of(jaxpr, before)
            if kind != "name":
                return found
            return _Origin(found.root, found.eqn and eqn, eqn.params["name"])
        inner = _inner(eqn)
        if inner is None or isinstance(inner.outvars[place], Literal):
            return _Origin((var,), eqn, kind)
        found = self.of(inner, inner.outvars[place])
        if found.eqn is None:  # an argument of the call, or a constant of it
            if found.root[0] in inner.invars and kind != "scan":  # a scan stacks them
                argument = eqn.invars[inner.invars.index(found.root[0]) - len(inner.invars)]
                if not isinstance(argument, Literal):
                    outside = self.of(jaxpr, argument)
                    return outside._replace(name=found.name or outside.name)
            return _Origin((var,), eqn, found.name or kind)
        name = found.name
        shown = found.eqn
        if _is_of(inner, self._libraries):  # traced once for all its callers, so its lines may be another caller's
            shown = eqn
            name = name if name.startswith("unswag_") else str(eqn.params.get("name", name))
        return _Origin((id(eqn), *found.root), shown, name)


def _inner(eqn: JaxprEqn) -> Jaxpr | None:
    """The jaxpr of a call or a scan, whose outputs are those of the equation, one by one."""
    found = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params), None)
    inner = getattr(found, "jaxpr", found)
    return inner if inner is not None and len(inner.outvars) == len(eqn.outvars) else None


# ---- places -------------------------------------------------------------------------------------------------------------


def _libraries() -> tuple[str, ...]:
    """Folders whose lines are not the user's."""
    loaded = (sys.modules.get(name) for name in ("jax", "jaxlib", "flax", "equinox", "optax", "unswag"))
    return tuple(str(Path(module.__file__).parent) + "/" for module in loaded if module is not None and module.__file__)


def _is_of(jaxpr: Jaxpr, libraries: tuple[str, ...]) -> bool:
    """Whether the function that was traced stands in a library. JAX says "relu at /…/functions.py:61"."""
    described = getattr(getattr(jaxpr, "debug_info", None), "func_src_info", None) or ""
    return described.rpartition(" at ")[2].startswith(libraries)


def _place(eqn: JaxprEqn, libraries: tuple[str, ...]) -> tuple[str, str, str, str]:
    """(function, file:line), the innermost outside of the libraries, empty if there is none; the functions of Flax, Equinox
    and UnSwag that it called, for the role; and the one of UnSwag's that it called itself, empty if there is none."""
    traceback = eqn.source_info.traceback
    frames: tuple[list[Any], list[int]] = traceback.raw_frames() if traceback is not None else ([], [])
    inside: list[str] = []
    ours = ""
    standard = sysconfig.get_path("stdlib") + "/"
    for code, offset in zip(*frames, strict=True):
        is_standard = code.co_filename.startswith(standard) and "-packages/" not in code.co_filename
        if not is_standard and not code.co_filename.startswith((*libraries, "<frozen")):
            line = list(code.co_positions())[offset // 2][0]  # two bytes an instruction
            name = code.co_qualname.replace("<locals>.", "").removesuffix(".__call__")
            return name, f"{Path(code.co_filename).name}:{line}", ".".join(inside), ours
        if code.co_filename.startswith(libraries[2:]):
            inside.append(code.co_qualname)
        if code.co_filename.startswith(UNSWAG) and code.co_filename != __file__:
            ours = code.co_name
    return "", "", ".".join(inside), ours


def _parameters(function: Callable[..., Any], count: int) -> list[str]:
    """Names for so many arguments given by place."""
    try:
        parameters = [
            p for p in inspect.signature(function).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        parameters = []
    return [parameters[i].name if i < len(parameters) else f"args.{i}" for i in range(count)]


def _label(names: list[str], path: tuple[Any, ...]) -> str:
    """`params.layers.0.kernel` for a leaf of the arguments."""
    keys = [str(next(getattr(key, part) for part in ("key", "idx", "name") if hasattr(key, part))) for key in path[1:]]
    return ".".join([names[int(keys[0])] if path[0].idx == 0 else keys[0], *keys[1:]])
