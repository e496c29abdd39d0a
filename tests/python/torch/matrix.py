"""Examples of every pattern, for the tests that hold for all of them (patterns/test_all.py)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from unswag.torch import apply_unswag_surgery, patterns
from unswag.torch.surgery import SurgeryReport

WIDTH = 64


@dataclass(frozen=True)
class Example:
    """A model in which a pattern finds a place. The test module of a pattern lists its own in a function `examples()`.

    build    makes the model, in training mode; the draws of torch's generator are the same each time
    inputs   makes the arguments of its forward by name, floating ones in the given dtype
    where    the name of the module that the report names
    dtype    of the floating inputs
    apart    how far outputs and gradients may be from stock's, relative to their norm; 0: the same bits
    casts    dtypes that the model may be cast to after its surgery, in which its results are stock's
    options  of `apply_unswag_surgery`
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    where: str
    dtype: torch.dtype = torch.float32
    apart: float = 1e-5
    casts: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float64)
    options: Mapping[str, str] = field(default_factory=dict)

    def batch(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The inputs, the same each time; those with a gradient are leaves."""
        torch.manual_seed(3)
        made = self.inputs(dtype or self.dtype)
        return {k: v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in made.items()}


def between(make: Callable[[], nn.Module], apart: float = 1e-5, **options: str) -> Example:
    """`make()` between two Linears; the second keeps its input, so what need not be kept shows."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), make(), nn.Linear(WIDTH, WIDTH)).train()

    return Example(build, lambda dtype: {"input": torch.randn(6, WIDTH).to(dtype)}, "1", apart=apart, options=options)


def examples_of(pattern: patterns.Pattern) -> dict[str, Example]:
    """What `examples()` of tests/python/torch/patterns/test_<name>.py gives, {} where there is none."""
    name = f"tests.python.torch.patterns.test_{pattern.name}"
    module = importlib.import_module(name) if importlib.util.find_spec(name) else None
    found: dict[str, Example] = getattr(module, "examples", dict)()
    return found


def operate(model: nn.Module, pattern: patterns.Pattern, example: Example) -> SurgeryReport:
    """Surgery that knows this pattern alone."""
    everything = patterns.ALL
    patterns.ALL = (pattern,)
    try:
        return apply_unswag_surgery(model, **example.options)
    finally:
        patterns.ALL = everything
