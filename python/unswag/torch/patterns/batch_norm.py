"""BatchNorm: what follows it need not keep its output, which is recomputed from the input that BatchNorm keeps anyway."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from unswag.torch import stash
from unswag.torch.patterns.pattern import Candidate, reason_to_leave, replace_unary_forward, stock
from unswag.torch.patterns.probing import twin
from unswag.torch.patterns.proof import Proof

HALVES = (torch.bfloat16, torch.float16)  # beside the module's own dtype, for the inputs of the probe
SPACES = ((7, 5, 3), (8, 16, 2))
SIZES = (1, 2, 3)


Recipe = tuple[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None], dict[str, Any]]


class BatchNorm:
    name = "batch_norm"
    role = None
    saves = "x, as stock; where ReLU or another op keeps the output, stock keeps that too, here it is recomputed"

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward:
                yield Candidate(name, module)

    def probe(self, candidate: Candidate) -> str | None:
        return reason_to_leave(candidate.module) or _differs(candidate.module)

    def apply(self, candidate: Candidate) -> None:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            recipe = recipe_of(self, x)
            y: Tensor = stock(self, x)
            if recipe is not None:
                stash.remember(y, batch_norm_again, x, *recipe[0], **recipe[1])
            return y

        reads = ("eps", "momentum", "affine", "track_running_stats", "num_features")
        replace_unary_forward(candidate.module, forward, Proof(candidate, reads=reads))


def batch_norm_again(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    eps: float, running: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """The output of `F.batch_norm` with the statistics mean and var, or without them that of a training step: the same op on
    the same x takes the same statistics. Running statistics are neither read nor updated; only their dtype affects rounding."""
    trains = mean is None
    if trains and running is not None:
        mean, var = (x.new_zeros(x.shape[1], dtype=running) for _ in range(2))
    return F.batch_norm(x, mean, var, weight, bias, trains, 0.0, eps)


def recipe_of(module: Any, x: Tensor) -> Recipe | None:
    """(inputs beside x, constants) for `batch_norm_again` of the call that comes, or None where its bits could be others."""
    weight, bias, mean, var = module.weight, module.bias, module.running_mean, module.running_var
    if not all(t is None or stash.is_plain(t) for t in (x, weight, bias)):
        return None
    if module.training or mean is None or var is None:
        # torch's sums over a channel whose elements do not follow each other depend on the number of threads
        if not x.is_contiguous() or x.dim() < 3 or x.shape[2:].numel() < 2:
            return None
        return (weight, bias, None, None), {"eps": module.eps, "running": None if mean is None else mean.dtype}
    # copies: a training step in between would write to them, without a new version
    return (weight, bias, mean.clone(), var.clone()), {"eps": module.eps, "running": None}


def _differs(module: Any) -> str | None:
    """How `batch_norm_again` differs from the module's own forward, bit by bit, or None: with random weights and statistics,
    training and not, in all dtypes that the module takes."""
    like = next(itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False)), torch.empty(0))
    generator = torch.Generator(like.device).manual_seed(2)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, device=like.device, generator=generator).to(dtype)

    channels, taken = module.num_features, 0
    for training, dtype, size in itertools.product((True, False), dict.fromkeys((like.dtype, *HALVES)), SIZES):
        weights = {k: p if p is None else draw(channels, dtype=p.dtype) for k, p in module._parameters.items()}
        copy = twin(module, **weights)
        copy.training = training
        for k in ("running_mean", "running_var"):
            if getattr(copy, k) is not None:
                setattr(copy, k, draw(channels, dtype=like.dtype).square())
        for space in SPACES:
            x = draw(2, channels, *space[:size], dtype=dtype)
            try:
                recipe = recipe_of(copy, x)
                y = type(module).forward(copy, x)
            except Exception:  # not this dtype, not so many dimensions
                continue
            if recipe is not None and not torch.equal(batch_norm_again(x, *recipe[0], **recipe[1]), y):
                return f"its recomputed output differs in {dtype}"
            taken += recipe is not None
    return None if taken else "its output cannot be recomputed from its input"
