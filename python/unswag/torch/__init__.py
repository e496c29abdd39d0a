"""UnSwag for PyTorch: functions, modules, ops, the stash, surgery and the audit."""

from __future__ import annotations

from unswag.torch import nn, ops
from unswag.torch.functional import gated, geglu, gelu, leaky_relu, reglu, relu, relu6, rms_norm, silu, swiglu

__all__ = ["gated", "geglu", "gelu", "leaky_relu", "nn", "ops", "reglu", "relu", "relu6", "rms_norm", "silu", "swiglu"]
