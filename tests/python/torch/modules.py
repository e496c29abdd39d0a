"""Modules as models write them, one for each way in which a pattern meets its shape."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 64  # of x


def twice(x):
    return 2 * x


class Norm(nn.Module):
    """Gemma's, with its own helper, and a factor that it reads of its class and a function of its file."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(WIDTH)), 1e-6
        self.power, self.steps = 2, [1.0]

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(self.power).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        y = self._norm(x.float()) * (1.0 + self.weight.float())
        return (y * self.factor * self.steps[0] * getattr(self, "scale", 1.0)).type_as(x)


class T5Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(WIDTH)), 1e-6

    def forward(self, x):
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        return self.weight * x


class Gated(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
        self.down, self.act = nn.Linear(24, WIDTH), act or nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class T5Gated(Gated):
    """Casts to the dtype of its last Linear, which some keep in float32."""

    def forward(self, x):
        h = self.act(self.gate(x)) * self.up(x)
        if h.dtype != self.down.weight.dtype:
            h = h.to(self.down.weight.dtype)
        return self.down(h)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.down, self.act = nn.Linear(WIDTH, 48), nn.Linear(24, WIDTH), nn.GELU()

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Held(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.fc, self.act = nn.Linear(WIDTH, WIDTH), act

    def forward(self, x):
        return self.act(self.fc(x)).sin()


class Quick(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = 1.702

    def forward(self, x):
        return x * torch.sigmoid(self.slope * x)
