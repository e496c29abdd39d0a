"""The functions of `unswag.torch.functional` as modules. x has n elements of b bytes each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unswag.torch import functional

__all__ = [
    "GEGLU", "GELU", "Dropout", "LayerNorm", "LeakyReLU", "QuickGELU", "RMSNorm", "ReGLU", "ReLU", "ReLU2", "ReLU6", "SiLU",
    "SwiGLU",
]  # fmt: skip


class ReLU(torch.nn.Module):
    """`functional.relu`. Saved: one bit per element, n / 8 bytes."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x)


class LeakyReLU(torch.nn.Module):
    """`functional.leaky_relu`. Saved: one bit per element, n / 8 bytes."""

    def __init__(self, negative_slope: float = 0.01) -> None:
        super().__init__()
        self.negative_slope = functional.number("LeakyReLU", "negative_slope", negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        return functional.leaky_relu(x, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class ReLU6(torch.nn.Module):
    """`functional.relu6`. Saved: one bit per element, n / 8 bytes."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu6(x)


class SiLU(torch.nn.Module):
    """`functional.silu`. Saved: x, n b bytes."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x)


class GELU(torch.nn.Module):
    """`functional.gelu`. Saved: x, n b bytes."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        functional.gelu_name("GELU", approximate)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(x, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class QuickGELU(torch.nn.Module):
    """`functional.quick_gelu`. Saved: x, n b bytes."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.quick_gelu(x)


class ReLU2(torch.nn.Module):
    """`functional.relu2`. Saved: x, n b bytes."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu2(x)


class SwiGLU(torch.nn.Module):
    """silu(gate) * up of two tensors of one shape and dtype. Saved: gate and up, 2 n b bytes."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.swiglu(gate, up)


class GEGLU(torch.nn.Module):
    """gelu(gate) * up of two tensors of one shape and dtype. Saved: gate and up, 2 n b bytes."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        functional.gelu_name("GEGLU", approximate)
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.geglu(gate, up, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class ReGLU(torch.nn.Module):
    """relu(gate) * up of two tensors of one shape and dtype. Saved: gate and up, 2 n b bytes."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.reglu(gate, up)


class Dropout(torch.nn.Module):
    """`functional.dropout` while training, else x. Saved: a seed, no tensor."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = functional.probability("Dropout", p)

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _cols(op: str, cols: Any) -> int:
    functional.check_integer(op, "cols", cols, 0, "pass the size of the last dimension, which is normalised")
    return int(cols)


class RMSNorm(torch.nn.Module):
    """`functional.rms_norm` over the last dimension of size `cols`. Saved: x and 4 bytes per row.

    The weight is initialised to 1 - weight_offset. elementwise_affine=False: no weight.
    """

    weight: torch.nn.Parameter | None

    def __init__(
        self,
        cols: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        *,
        weight_offset: float = 0.0,
        cast_before_weight: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.cols, self.eps = _cols("RMSNorm", cols), functional.epsilon("RMSNorm", eps)
        self.weight_offset = functional.number("RMSNorm", "weight_offset", weight_offset)
        self.cast_before_weight = cast_before_weight
        weight = torch.nn.Parameter(torch.empty(cols, **factory)) if elementwise_affine else None
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.cols,):
            raise ValueError(f"RMSNorm: x has shape {list(x.shape)}; its last dimension must be {self.cols}")
        return functional.rms_norm(
            x, self.weight, self.eps, weight_offset=self.weight_offset, cast_before_weight=self.cast_before_weight
        )

    def extra_repr(self) -> str:
        return f"{self.cols}, eps={self.eps}, weight_offset={self.weight_offset}, cast_before_weight={self.cast_before_weight}"


class LayerNorm(torch.nn.Module):
    """`functional.layer_norm` over the last dimension of size `cols`. Saved: x and 8 bytes per row.

    elementwise_affine=False: neither weight nor bias; bias=False: no bias.
    """

    weight: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None

    def __init__(
        self, cols: int, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True, **factory: Any
    ) -> None:
        super().__init__()
        self.cols, self.eps = _cols("LayerNorm", cols), functional.epsilon("LayerNorm", eps)
        for name, there in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            self.register_parameter(name, torch.nn.Parameter(torch.empty(cols, **factory)) if there else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.cols,):
            raise ValueError(f"LayerNorm: x has shape {list(x.shape)}; its last dimension must be {self.cols}")
        return functional.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.cols}, eps={self.eps}, elementwise_affine={self.weight is not None}, bias={self.bias is not None}"
