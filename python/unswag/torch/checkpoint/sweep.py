"""The reverse sweep: a checkpointed decoder layer, recomputed and differentiated in one pass over tiles of tokens.

In a causal layer a token depends on the others only through the keys and values of the tokens before it. So the layer's own
forward runs on one tile after the other, only its attention is ours (`tile_attention`). The backward goes from the last tile to
the first: recompute the tile, differentiate it, add to dK and dV of the tiles before it. What a layer needs beside weights is
then a gradient of the size of its input, K, V, dK and dV, and what one tile needs, instead of everything that the layer makes.

A call of a layer is swept if a comparison with the layer as a whole has shown that it may be (`layer_proof`), and if all that
it is given can be cut into tiles (`visit`). Else it is checkpointed as without (`stashed`), and the reason is said once.

What is kept until the backward: the layer's input, through the stash of the model's forward, or tile by tile in a store; with
`keep_attention` also the attention's output, lse, K and V, which saves computing these again.

Sources: SeCO, StreamBP (sweeps in tiles, with other means of putting them into a model); Chen 2016 (checkpointing).
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from unswag.torch.checkpoint.layer_proof import Verdict
from unswag.torch.checkpoint.tile_attention import KEY_BLOCK, Unswept
from unswag.torch.checkpoint.visit import Call, SweptLayer, Visit
from unswag.torch.stash import Stash

TILE = {"cpu": 1024, "cuda": 4096}  # tokens, by device: large enough for full-speed products, small against a long sequence
DRAWS = "swept layers draw their dropout tile by tile: other numbers than stock's for the same seed, of the same distribution"


class Sweep:
    """How the checkpointed layers of a model are swept, and what is known about them.

    tile            tokens per tile; None: `TILE`, by the device
    keep_attention  whether the attention's output, lse, keys and values are kept too, 1 to 2 hidden states per layer, which
                    saves computing them again; None: where inputs of layers are kept in a store, and in that store
    key_block       keys of one call in the backward of the attention
    """

    def __init__(self, tile: int | None = None, keep_attention: bool | None = None, key_block: int = KEY_BLOCK) -> None:
        for argument, value in (("tile", tile), ("key_block", key_block)):
            if type(value) is not int if value is not None else argument != "tile":
                raise TypeError(f"Sweep: {argument} is {value!r}; pass a positive number of tokens")
            if value is not None and value < 1:
                raise ValueError(f"Sweep: {argument} is {value}; pass a positive number of tokens")
        if keep_attention not in (None, True, False):
            raise TypeError(f"Sweep: keep_attention is {keep_attention!r}; pass True, False or None")
        self.tile, self.keep_attention, self.key_block = tile, keep_attention, key_block
        self.verdicts: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Verdict]] = weakref.WeakKeyDictionary()
        self.swept: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.left: Counter[str] = Counter()  # calls that were not swept, by their reason
        self.notes: list[str] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Sweep:
        return Sweep(self.tile, self.keep_attention, self.key_block)

    def __reduce__(self) -> tuple[Any, ...]:
        return Sweep, (self.tile, self.keep_attention, self.key_block)

    def leave(self, layer: nn.Module, reason: str) -> None:
        """Says, once for each class and reason, that a layer is checkpointed as a whole."""
        note = f"{type(layer).__name__} is not swept but checkpointed as a whole: {reason}"
        self.left[note] += 1
        if note not in self.notes:
            self.notes.append(note)
            warnings.warn(f"unswag: {note}", stacklevel=4)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """What a checkpoint function returns for `function(*args)`, or NotImplemented if the layer is not swept."""
        if torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled():
            return NotImplemented
        if (
            not isinstance(function, functools.partial)
            or len(function.args) != 1
            or not isinstance(function.args[0], nn.Module)
        ):
            return NotImplemented  # transformers gives the forward of a layer as partial(forward, layer, **kwargs)
        layer = function.args[0]
        try:
            call = Call.of(function, layer, args)
            tile = self.tile or TILE.get(call.x.device.type, TILE["cpu"])
            if call.tokens <= tile:  # one tile is the layer as a whole
                return NotImplemented
            known = self.verdicts.setdefault(layer, {})
            key = call.signature()
            if key not in known:
                if is_fake(call.x):
                    return NotImplemented
                known[key] = Verdict.of(call)
            verdict = known[key]
            verdict.check(layer)
            parameters = [p for p in layer.parameters() if p.requires_grad]
            if not call.x.requires_grad and not parameters:
                return NotImplemented
            visit = Visit(
                call, tile, self.key_block, self.keep_attention, Stash.current(), parameters, verdict.check, verdict.calls
            )
            y = SweptLayer.apply(call.x, visit, *parameters)
        except Unswept as reason:
            self.leave(layer, str(reason))
            return NotImplemented
        self.swept.add(layer)
        if verdict.draws and DRAWS not in self.notes:
            self.notes.append(DRAWS)
        return visit.returned(y)
