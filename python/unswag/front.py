"""Public functions that serve both frameworks: what they are given says which one is meant, and only that one is imported."""

from __future__ import annotations

import sys
from typing import Any

from unswag import extras
from unswag.ledger import Ledger
from unswag.plans import Plan

__all__ = ["audit", "plan"]


def audit(model: Any, /, *args: Any, **kwargs: Any) -> Ledger:
    """What a model keeps for its backward pass: `unswag.torch.audit(model, **batch)` for a torch.nn.Module, else
    `unswag.jax.audit(function, *args, **kwargs)` for a function. Imports only the framework in question.

    TypeError for what is neither; ModuleNotFoundError for a function if JAX is not installed.
    """
    torch = sys.modules.get("torch")  # a module of torch exists only where torch was imported
    if torch is not None and isinstance(model, torch.nn.Module):
        from unswag.torch.audit import audit as of_module

        if args:
            raise TypeError("audit: a torch module takes its batch by name, e.g. input_ids=..., labels=...")
        return of_module(model, **kwargs)
    if not callable(model):
        raise TypeError(f"audit: got a {type(model).__name__}; pass a torch.nn.Module, or a function of JAX and its arguments")
    try:
        from unswag.jax.ledger import audit as of_function
    except ModuleNotFoundError as error:
        extras.missing("unswag.audit of a function", error, "jax")
    return of_function(model, *args, **kwargs)


def plan(model: Any, memory: str | int = "16GiB", context: int | None = None, **options: Any) -> Plan:
    """How to train a model of PyTorch in a given memory: `unswag.torch.plan.plan`, which says what it takes.

    ModuleNotFoundError if PyTorch or transformers are not installed.
    """
    try:
        from unswag.torch.plan import plan as of_model
    except ModuleNotFoundError as error:
        extras.missing("unswag.plan", error, "torch")
    return of_model(model, memory, context, **options)
