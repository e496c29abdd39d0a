"""Dropout with a seed in place of a mask. Only on request, by `dropout="redrawn"`: it does not draw what PyTorch draws."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from unswag.torch.functional import dropout
from unswag.torch.patterns.pattern import Candidate, floating_parameter, ops_take, reason_to_leave, replace_forward, stock
from unswag.torch.patterns.proof import Proof


class Dropout:
    name = "dropout"
    role = None
    saves = "a seed; the next Linear's input is recomputed too; stock keeps a mask, 8 bits per element, and the output"

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        like = floating_parameter(model)
        for name, module in model.named_modules():
            if type(module) is nn.Dropout and module.p > 0:
                yield Candidate(name, module, {"like": like})

    def probe(self, candidate: Candidate) -> str | None:
        module = candidate.module
        if reason := reason_to_leave(module, candidate.parts["like"]):
            return reason
        if module.inplace:
            return "it works in place (inplace=True)"
        return None

    def apply(self, candidate: Candidate) -> None:
        def forward(self: nn.Dropout, input: Tensor) -> Tensor:
            if not (self.training and 0 < self.p < 1 and ops_take(input)) or not _draws(input):
                result: Tensor = stock(self, input)
                return result
            return dropout(input, self.p)

        replace_forward(candidate.module, forward, Proof(candidate, reads=("p",)))


def _draws(x: Tensor) -> bool:
    """Whether a seed can be drawn here: not where every run would have that of the first."""
    if torch.compiler.is_compiling():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
