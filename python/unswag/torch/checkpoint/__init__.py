"""Gradient checkpointing after surgery: how checkpointed layers are recomputed.

stashed         the layer is recomputed as a whole, under a stash of its own (`prepare`, `release`)
sweep           the layer is recomputed and differentiated in one pass over tiles of tokens, the last tile first (`Sweep`)
tile_attention  the attention of such a tile: blocks of keys, merged by their log-sum-exp
layer_proof     whether a layer may be swept: a comparison with the layer as a whole
"""

from __future__ import annotations

from unswag.torch.checkpoint.stashed import ATTRIBUTE, StashedCheckpoint, delegation_works, prepare, release
from unswag.torch.checkpoint.sweep import Sweep

__all__ = ["ATTRIBUTE", "StashedCheckpoint", "Sweep", "delegation_works", "prepare", "release"]
