"""Registers an op where it is defined: schema, kernel and fake kernel together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unswag import _core

LIBRARY = torch.library.Library("unswag", "DEF")


class Op(NamedTuple):
    """The parts of a registered op."""

    overload: torch._ops.OpOverload
    kernel: Callable[..., Any]
    outputs: Callable[..., Any]


_core.eager.is_eager()  # the core looks PyTorch up here, where one thread imports, and not when the first op is called

OPS: dict[str, Op] = {}  # every op by its name, in the order of definition


def op(schema: str, outputs: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated kernel as `torch.ops.unswag.<name>`, for the CPU and CUDA; its name becomes a function that calls
    the op.

    schema   what follows the name: "(Tensor x) -> Tensor"
    outputs  checks the arguments and makes the empty outputs. It is the shape rule, and so the fake kernel too.

    PyTorch's dispatcher takes longer than the kernels of a short sequence. In eager mode, where nobody else would see the call,
    the function passes it by: with the core's version of the kernel (bindings/eager.cpp) if there is one and the tensors are
    ordinary, else with the kernel itself. Otherwise it calls the overload, which spares the overload resolution of each call.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        name = kernel.__name__
        LIBRARY.define(name + schema)
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(name, kernel, device)
        torch.library.register_fake(f"unswag::{name}", outputs, lib=LIBRARY)
        overload: torch._ops.OpOverload = getattr(torch.ops.unswag, name).default
        doc = f"{name}{schema}\n\n{inspect.cleandoc(kernel.__doc__ or '')}"
        overload.__doc__ = doc
        OPS[name] = Op(overload, kernel, outputs)
        call = _function(overload, kernel, getattr(_core.eager, name, None))
        call.__name__, call.__qualname__, call.__module__, call.__doc__ = name, name, kernel.__module__, doc
        return call

    return register


def _function(
    overload: torch._ops.OpOverload, kernel: Callable[..., Any], eager: Callable[..., Any] | None
) -> Callable[..., Any]:
    def by_core(*args: Any, **constants: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return overload(*args, **constants)
        done = eager(*args, **constants)  # type: ignore[misc]
        return overload(*args, **constants) if done is NotImplemented else done

    def by_kernel(*args: Any, **constants: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or not _core.eager.are_plain(*args):
            return overload(*args, **constants)
        return kernel(*args, **constants)

    return by_kernel if eager is None else by_core


# ---- vmap: the mapped dimension becomes one more leading dimension ------------------------------------------------------


def leading(x: Tensor, dim: int | None, size: int) -> Tensor:
    """x with its mapped dimension first; expanded where it is not mapped."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def vmap(op: Callable[..., Any], rule: Callable[..., Any]) -> None:
    """Registers `rule` as the vmap rule of an op."""
    torch.library.register_vmap(f"unswag::{op.__name__}", rule, lib=LIBRARY)


def vmap_elementwise(op: Callable[..., Any], inputs: int) -> None:
    """Registers the vmap rule of an elementwise op whose first `inputs` arguments are tensors."""

    def rule(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
        tensors = [leading(x, dim, info.batch_size) for x, dim in zip(args[:inputs], dims[:inputs], strict=True)]
        out = op(*tensors, *args[inputs:])
        return out, tuple(0 for _ in out) if isinstance(out, tuple) else 0

    vmap(op, rule)
