"""The derivative of an activation as a code of 1 to 4 bits (docs/format.md sections 5 and 7), which is kept instead of the
activation's input under a lossy policy, or when the caller asks for it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from unswag import codebooks
from unswag.codebooks import Codebook
from unswag.policy import TWO_BITS, Policy
from unswag.torch import ops
from unswag.torch.draws import draw_seed
from unswag.torch.stash import Stash

DITHER = "dither2"
_SAMPLE = 1 << 15  # elements that a codebook is calibrated on
_OF_ONE_ACTIVATION = {"resilu2": ("silu", "quick_gelu"), "regelu2": ("gelu", "gelu_tanh")}


class Code(Protocol):
    """How a derivative is encoded and decoded."""

    def forward(self, x: Tensor, act: str) -> tuple[Tensor, Tensor]:
        """(act(x), the codes of act'(x), packed)."""

    def backward(self, dy: Tensor, packed: Tensor, act: str) -> Tensor:
        """dy times the derivative that the codes stand for."""


@dataclasses.dataclass(frozen=True)
class Levels:
    """Codes by a codebook."""

    book: Codebook

    def forward(self, x: Tensor, act: str) -> tuple[Tensor, Tensor]:
        y, packed = ops.code_forward(x, act, list(self.book.bounds), self.book.bits, self.book.of == "derivative", True)
        return y, packed

    def backward(self, dy: Tensor, packed: Tensor, act: str) -> Tensor:
        dx: Tensor = ops.code_backward(dy, packed, list(self.book.levels), self.book.bits)
        return dx


@dataclasses.dataclass(frozen=True)
class Dithered:
    """Codes with subtractive dither, which is drawn again in the backward: unbiased for every x."""

    bits: int
    seed: int

    def forward(self, x: Tensor, act: str) -> tuple[Tensor, Tensor]:
        y, packed = ops.dither_forward(x, act, self.bits, self.seed, 0, True)
        return y, packed

    def backward(self, dy: Tensor, packed: Tensor, act: str) -> Tensor:
        dx: Tensor = ops.dither_backward(dy, packed, act, self.bits, self.seed, 0)
        return dx


def code(act: str, bits: int | None, codebook: str | Codebook | None) -> Code:
    """The code for the arguments of `silu(x, bits=…, codebook=…)`. ValueError lists the choices."""
    if isinstance(codebook, Codebook):
        if bits not in (None, codebook.bits):
            raise ValueError(f"{act}: bits is {bits} but the codebook has {codebook.bits}; leave bits out")
        return Levels(codebook)
    if codebook == DITHER:
        if bits not in (None, 2):
            raise ValueError(f"{act}: bits is {bits} but codebook {DITHER!r} has 2; leave bits out")
        return Dithered(2, draw_seed())
    if bits is None:
        raise ValueError(f"{act}: codebook is {codebook!r} but bits is None, which keeps x exactly; name the bits too")
    return Levels(codebooks.codebook(act, bits, codebook))


class Codes:
    """The codebook of one activation of a model under the policy "2bit". Made in the first forward, then unchanged."""

    def __init__(self) -> None:
        self.made: tuple[Policy, str, Levels] | None = None

    def code(self, policy: Policy, act: str, x: Tensor, up: Tensor | None) -> Code:
        if policy.codebook == DITHER:
            return Dithered(2, draw_seed())
        if is_fake(x):  # surgery's dry run: no values to measure
            return Levels(codebooks.codebook(act, 2))
        if self.made is None or self.made[:2] != (policy, act):
            self.made = (policy, act, Levels(_book(policy, act, x, up)))
        return self.made[2]


def current(codes: Codes | None, act: str, x: Tensor, up: Tensor | None = None) -> Code | None:
    """The code by which the policy in use keeps act'(x), None where it keeps x.

    codes  the codebook of this place in the model; None for a codebook that is used only once
    up     in a gated unit, what act(x) is multiplied with
    """
    if torch.compiler.is_compiling():
        return None
    stash = Stash.current()
    if stash is None or stash.policy.mlp != TWO_BITS or act not in codebooks.SMOOTH or x.is_meta or not x.numel():
        return None
    return (codes or Codes()).code(stash.policy, act, x, up)


def _book(policy: Policy, act: str, x: Tensor, up: Tensor | None) -> Codebook:
    name = policy.codebook
    only = _OF_ONE_ACTIVATION.get(name)
    if only is not None and act not in only:
        raise ValueError(f"policy: codebook {name!r} is for {only[0]}, but the model has {act}; choose 'mm1'")
    if name not in codebooks.METHODS:
        return codebooks.codebook(act, 2, name)
    if policy.scale is not None:
        return codebooks.fit(act, 2, policy.scale, name)
    # An error e of the derivative becomes dh up e in the gradient of the gate, so its square is weighted by up^2.
    weight = None if up is None else _sample(up) ** 2
    return codebooks.calibrated(act, 2, name, _sample(x), weight)


def _sample(x: Tensor) -> Any:
    """At most _SAMPLE elements, always at the same positions."""
    flat = x.detach().reshape(-1)
    return flat[:: max(1, math.ceil(flat.numel() / _SAMPLE))].float().cpu().numpy()
