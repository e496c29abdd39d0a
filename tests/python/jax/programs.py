"""What the tests of this folder share: functions run forward and backward as one program, and what stands in a program."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile; the passes over the program are the same


def both_ways(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """(dy, arguments) → y and the cotangent of every argument, one jitted program."""

    @partial(jax.jit, compiler_options=QUICK)
    def run(dy: Any, *args: Any) -> tuple[Any, ...]:
        y, pull = jax.vjp(function, *args)
        return (y, *pull(dy))

    return run


def forward_backward(function: Callable[..., Any], args: Sequence[Any], dy: Any) -> tuple[Any, ...]:
    return both_ways(function)(dy, *args)


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    return jax.jit(function, compiler_options=QUICK).lower(*args).compile()


def traced(function: Callable[..., Any], *args: Any) -> str:
    """The program that the compiler is given, without what nobody asked for."""
    return jax.jit(function).lower(*args).as_text()


def devices(count: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[:count]), ("data",))


def four_devices() -> Mesh:
    return devices(4)


def collectives(program: Any) -> Counter[str]:
    """How often each collective stands in the compiled program; those of a loop count once."""
    names = r"all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter|collective-broadcast"
    return Counter(re.findall(rf" ({names})(?:-start)?\(", program.as_text()))
