"""Functions for JAX, Flax and Equinox that keep the smallest exact form of what their backward needs.

They work under jit, grad, vmap, scan, remat, shard_map and automatic sharding, on every platform that XLA supports.
"""

from __future__ import annotations

from unswag import extras

try:
    import jax  # noqa: F401
except ModuleNotFoundError as error:
    extras.missing("unswag.jax", error, "jax")

from unswag.jax import blocks
from unswag.jax.activations import gelu, silu
from unswag.jax.dropout import dropout
from unswag.jax.gated import geglu, reglu, swiglu
from unswag.jax.ledger import audit, compiler_memory
from unswag.jax.masks import leaky_relu, relu, relu2, relu6, unswag_relu
from unswag.jax.names import offload, recompute, save
from unswag.jax.norms import layer_norm, rms_norm

__all__ = [
    "audit",
    "blocks",
    "compiler_memory",
    "dropout",
    "geglu",
    "gelu",
    "layer_norm",
    "leaky_relu",
    "offload",
    "recompute",
    "reglu",
    "relu",
    "relu2",
    "relu6",
    "rms_norm",
    "save",
    "silu",
    "swiglu",
    "unswag_relu",
]
