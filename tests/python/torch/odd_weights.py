"""A weight that is no plain tensor, in one process: what a shard or a packed weight is to who reads its memory."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

PRODUCTS = (F.linear, torch.mul, torch.Tensor.mul, torch.Tensor.__mul__)


class Halved(torch.Tensor):
    """Its memory holds half of what it stands for; products know that, nobody else does."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            return func(*(2 * a.as_subclass(torch.Tensor) if type(a) is Halved else a for a in args), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def halved(weight, trained=True):
    """A parameter that stands for `weight`."""
    return nn.Parameter((weight.detach() / 2).as_subclass(Halved), requires_grad=trained)
