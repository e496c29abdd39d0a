"""Registers an op where it is defined: schema, kernel and fake kernel together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIBRARY = torch.library.Library("unswag", "DEF")


class Op(NamedTuple):
    """The parts of a registered op."""

    overload: torch._ops.OpOverload
    kernel: Callable[..., Any]
    outputs: Callable[..., Any]


OPS: dict[str, Op] = {}  # every op by its name, in the order of definition


def op(schema: str, outputs: Callable[..., Any]) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Registers the decorated kernel as `torch.ops.unswag.<name>`, for the CPU and CUDA; its name becomes the op.

    schema   what follows the name: "(Tensor x) -> Tensor"
    outputs  checks the arguments and makes the empty outputs. It is the shape rule, and so the fake kernel too.

    The overload is returned and not the packet: it spares the overload resolution of each call.
    """

    def register(kernel: Callable[..., Any]) -> torch._ops.OpOverload:
        name = kernel.__name__
        LIBRARY.define(name + schema)
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(name, kernel, device)
        torch.library.register_fake(f"unswag::{name}", outputs, lib=LIBRARY)
        overload: torch._ops.OpOverload = getattr(torch.ops.unswag, name).default
        overload.__doc__ = f"{name}{schema}\n\n{inspect.cleandoc(kernel.__doc__ or '')}"
        OPS[name] = Op(overload, kernel, outputs)
        return overload

    return register


# ---- vmap: the mapped dimension becomes one more leading dimension ------------------------------------------------------


def leading(x: Tensor, dim: int | None, size: int) -> Tensor:
    """x with its mapped dimension first; expanded where it is not mapped."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def vmap(overload: torch._ops.OpOverload, rule: Callable[..., Any]) -> None:
    """Registers `rule` as the vmap rule of an op."""
    torch.library.register_vmap(overload._name, rule, lib=LIBRARY)


def vmap_elementwise(overload: torch._ops.OpOverload, inputs: int) -> None:
    """Registers the vmap rule of an elementwise op whose first `inputs` arguments are tensors."""

    def rule(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
        tensors = [leading(x, dim, info.batch_size) for x, dim in zip(args[:inputs], dims[:inputs], strict=True)]
        out = overload(*tensors, *args[inputs:])
        return out, tuple(0 for _ in out) if isinstance(out, tuple) else 0

    vmap(overload, rule)
