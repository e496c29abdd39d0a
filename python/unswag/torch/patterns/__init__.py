"""Patterns: shapes of modules that run with less memory. Recognised by structure, proven by probe, never by name.

A new pattern is one file here, one line in `ALL`, one test and one row of docs/supported.md.
"""

from unswag.torch.patterns.attention import Attention
from unswag.torch.patterns.gated_mlp import GatedMlp
from unswag.torch.patterns.layer_norm import LayerNorm
from unswag.torch.patterns.lora import Lora
from unswag.torch.patterns.loss import Loss
from unswag.torch.patterns.norm import Norm
from unswag.torch.patterns.pattern import Candidate, Pattern, replace, replace_forward, replaced, restore

ALL: tuple[Pattern, ...] = (
    Norm(),
    LayerNorm(),
    GatedMlp(),
    Lora(),
    Attention(),
    Loss(),
)  # in the order in which they are tried

__all__ = ["ALL", "Candidate", "Pattern", "replace", "replace_forward", "replaced", "restore"]
