"""UnSwag cuts the activation memory of training without changing the result, and shows what is left.

Importing `unswag` imports neither torch nor jax; each public name loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from unswag import extras

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unswag.data import prepare_data
    from unswag.front import audit, plan
    from unswag.jax import unswag_relu
    from unswag.ledger import Ledger
    from unswag.plans import Plan
    from unswag.policy import Policy
    from unswag.torch.max_context import find_max_context
    from unswag.torch.surgery import SurgeryReport, apply_unswag_surgery, remove_unswag_surgery

_HOME = {
    "apply_unswag_surgery": "unswag.torch.surgery",
    "remove_unswag_surgery": "unswag.torch.surgery",
    "SurgeryReport": "unswag.torch.surgery",
    "unswag_relu": "unswag.jax",
    "audit": "unswag.front",
    "plan": "unswag.front",
    "find_max_context": "unswag.torch.max_context",
    "prepare_data": "unswag.data",
    "Ledger": "unswag.ledger",
    "Plan": "unswag.plans",
    "Policy": "unswag.policy",
}

__all__ = [
    "Ledger",
    "Plan",
    "Policy",
    "SurgeryReport",
    "__version__",
    "apply_unswag_surgery",
    "audit",
    "find_max_context",
    "plan",
    "prepare_data",
    "remove_unswag_surgery",
    "unswag_relu",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'unswag' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        extras.missing(f"unswag.{name}", error, "jax" if home.startswith("unswag.jax") else "torch")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
