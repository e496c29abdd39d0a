"""Patterns: shapes of modules that run with less memory. Recognised by structure, proven by probe, never by name.

A new pattern is one file here, one line in `ALL`, one test and one row of docs/supported.md.
"""

from unswag.torch.patterns.activation import Activation
from unswag.torch.patterns.attention import Attention
from unswag.torch.patterns.batch_norm import BatchNorm
from unswag.torch.patterns.dropout import Dropout
from unswag.torch.patterns.experts import Experts
from unswag.torch.patterns.fused_mlp import FusedMlp
from unswag.torch.patterns.gated_mlp import GatedMlp
from unswag.torch.patterns.layer_norm import LayerNorm
from unswag.torch.patterns.lora import Lora
from unswag.torch.patterns.loss import Loss
from unswag.torch.patterns.pattern import Candidate, Pattern, replace, replace_forward, replaced, restore
from unswag.torch.patterns.plain_mlp import PlainMlp
from unswag.torch.patterns.relu import Relu
from unswag.torch.patterns.rms_norm import RmsNorm

ALL: tuple[Pattern, ...] = (  # in the order in which they are tried
    RmsNorm(),
    LayerNorm(),
    GatedMlp(),
    FusedMlp(),
    Experts(),
    PlainMlp(),
    Relu(),
    Activation(),
    BatchNorm(),
    Lora(),
    Dropout(),
    Attention(),
    Loss(),
)

__all__ = ["ALL", "Candidate", "Pattern", "replace", "replace_forward", "replaced", "restore"]
