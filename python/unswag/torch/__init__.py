"""UnSwag for PyTorch: functions, modules, ops, the stash, surgery and the audit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from unswag import extras

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    extras.missing("unswag.torch", error, "torch")

from unswag.torch import functional, nn, ops
from unswag.torch.audit import audit  # not lazily: the module of this name would hide the function
from unswag.torch.functional import *  # noqa: F403
from unswag.torch.stash import Stash

if TYPE_CHECKING:
    from unswag.torch.surgery import SurgeryReport, apply_unswag_surgery, remove_unswag_surgery

_HOME = dict.fromkeys(("SurgeryReport", "apply_unswag_surgery", "remove_unswag_surgery"), "unswag.torch.surgery")

__all__ = ["Stash", "SurgeryReport", "apply_unswag_surgery", "audit", "nn", "ops", "remove_unswag_surgery"]
__all__ += functional.__all__


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'unswag.torch' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
