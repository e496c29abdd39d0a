"""SmolLM2 in fp64 from end to end: the yardstick for gradients and losses.

An fp64 model of transformers is not enough: its RMSNorm and its loss cast to fp32. Here neither does. The rotary cos and sin
are the fp32 numbers that every side gets as its input.
"""

from __future__ import annotations

import dataclasses
import types

import torch
from torch.nn import functional as F

from bench.smollm2 import Job, Prepared


class Exact(Prepared):
    """A Job run in fp64, whatever its side and dtype say."""

    def __init__(self, job: Job):
        super().__init__(dataclasses.replace(job, side="stock", dtype="fp64", autocast=False))
        for module in self.model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = types.MethodType(_norm, module)
        self.inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self) -> torch.Tensor:
        ids, labels = self.batch["input_ids"], self.batch["labels"]
        logits = self.inner.lm_head(self.inner.model(input_ids=ids).last_hidden_state)
        return F.cross_entropy(logits[0, :-1], labels[0, 1:])


def _norm(self, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
