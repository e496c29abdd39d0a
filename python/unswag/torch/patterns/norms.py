"""What the patterns of norms share: the modules that may be one, the inputs of a probe, and the comparison with a variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unswag.torch.patterns.pattern import is_plain
from unswag.torch.patterns.probing import (
    AUTOCAST,
    MODES,
    NO_GRAD,
    PLAIN,
    differs_in_use,
    distance,
    takes,
    takes_one_argument,
    twin,
    ulps,
    unusual,
    usual,
    value_and_gradients,
)
from unswag.torch.patterns.proof import lengths

ELEMENTS = 1 << 16  # of each probe: enough to see a rate of 1e-4
FEW = 1 << 12  # where a module of the same kind was probed before
SCALES = (1.0, 1e-3)  # of x; at 1e-3 the place and the value of eps show
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# How often a 16-bit y may be the neighbour of the module's own. Another order of summation moves rstd by 1e-7, which
# crosses a rounding boundary in 1e-7 / 2^-8 (bf16) or 1e-7 / 2^-11 (fp16) of the elements; another order of casts, in 26 %.
NEIGHBOURS = {torch.bfloat16: 1e-4, torch.float16: 1e-3}


Dtypes = tuple[torch.dtype, torch.dtype, bool]  # of x; of the weights (of x if there are none); under autocast
MOST = 1 << 22  # elements of an input with many rows


def vectors_of(module: nn.Module, most: int) -> dict[str, nn.Parameter] | None:
    """The parameters of a module that may be a norm, by name: at most `most`, floating, with no child, no buffer, and one
    argument of its forward. None for any other module."""
    vectors = dict(module.named_parameters(recurse=False))
    alone = not module._modules and not module._buffers and len(vectors) <= most
    alone = alone and all(p.is_floating_point() for p in vectors.values())
    return vectors if alone and takes_one_argument(module) else None


def width_of(module: Any, vectors: Sequence[str], like: Tensor) -> int:
    """The number of columns that the module takes, or one to try it with where it takes any."""
    width: int = like.numel() if vectors else getattr(module, "normalized_shape", (256,))[-1]  # torch's takes no other width
    return width


def unreadable(module: nn.Module, vectors: Sequence[str]) -> str | None:
    """The reason why the ops cannot read these parameters, or None."""
    kinds = {name: type(getattr(module, name)).__name__ for name in vectors if not is_plain(getattr(module, name))}
    return next((f"its {name} is a {kind}, which only the module itself can read" for name, kind in kinds.items()), None)


def unproven(dtypes: Dtypes) -> str:
    x, weight, autocast = dtypes
    return (
        f"x is {x} and the weight {weight}{' under autocast' if autocast else ''}, for which no known formula was found equal"
    )


@dataclass(frozen=True)
class Case:
    """An input for a twin of the module with a random weight, and what the module's own forward makes of it."""

    neighbours: ClassVar[dict[torch.dtype, float]] = NEIGHBOURS
    of_sums: ClassVar[tuple[float, float]] = (1e-6, 0.0)  # how far dw may be: of a float32 x, of a 16-bit x at the least

    twin: nn.Module
    x: Tensor
    autocast: bool
    theirs: list[Tensor]  # y, dx, and the gradients of its vectors

    def differs(self, variant: Callable[[nn.Module, Tensor], Tensor]) -> str | None:
        """How `variant` differs from the module, or None."""
        y, *gradients = run(self.twin, self.x, self.autocast, variant)
        words = f"with {self.x.dtype} x of scale {self.x.std():.0e}" + (" under autocast" if self.autocast else "")
        if y.dtype != self.theirs[0].dtype:
            return f"y is {self.theirs[0].dtype} {words}, not {y.dtype}"
        if y.dtype in NEIGHBOURS:
            apart = ulps(y, self.theirs[0])
            # x rstd one ulp off may be two ulp of the product; a sum that cancels has no ulp to speak of
            apart[(y - self.theirs[0]).abs() <= 1e-6 * y.float().square().mean().sqrt()] = 0
            if (off := int((apart > 0).sum())) > max(1, self.neighbours[y.dtype] * y.numel()) or apart.max() > 2:
                return f"{words}, {off / y.numel():.1%} of y differ, by up to {apart.max()} ulp"
        # x rstd rounded to 16 bits inside a float32 y: neighbours in 1e-5 of the elements are 2e-5, another order of casts 1e-3
        elif (error := distance(y, self.theirs[0])) > (1e-4 if self.x.dtype in NEIGHBOURS else 1e-6):
            return f"y differs by {error:.1e} {words}"
        for what, ours, theirs in zip(("dx", "dw", "db"), gradients, self.theirs[1:], strict=False):
            halves = [torch.finfo(t.dtype).eps for t in (self.x, y, ours) if t.dtype in NEIGHBOURS]
            single, half = (1e-6, 0.0) if what == "dx" else self.of_sums
            tolerance = max(half, 4 * max(halves)) if halves else single
            if (error := distance(ours, theirs)) > tolerance:
                return f"{what} differs by {error:.1e} {words}"
        return None


def differs_elsewhere(
    module: nn.Module,
    vectors: Sequence[str],
    like: Tensor,
    chosen: Callable[[Dtypes], Callable[[nn.Module, Tensor], Tensor] | None],
) -> str | None:
    """How the variants that were chosen differ from the module where the cases have not looked (other shapes, modes and
    numbers, many rows), or None."""
    cols = width_of(module, vectors, like)
    generator = torch.Generator(like.device).manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=like.device, generator=generator)

    def copy(cols: int, dtype: torch.dtype) -> nn.Module:
        made = twin(module, **{v: nn.Parameter(draw(cols).to(dtype)) for v in vectors})
        if "normalized_shape" in vars(made):
            made.normalized_shape = (cols,)  # type: ignore[assignment]
        return made

    for dtype, autocast in dict.fromkeys(((torch.float32, False), (like.dtype, False), (like.dtype, True))):
        if (ours := chosen((dtype, dtype, autocast))) is None:
            continue
        modes = (AUTOCAST,) if autocast else [mode for mode in MODES if mode != AUTOCAST]
        reason = differs_in_use(copy(cols, dtype), ours, usual(draw, cols), dtype, modes)
        if reason is None:
            reason = differs_in_use(copy(cols, dtype), ours, unusual(draw, cols, dtype), dtype, modes[:1])
        if reason is None and dtype is torch.float32 and not autocast:
            few = min(cols, 8)  # the width is that of the weight, unless its code knows another
            few = few if takes(copy(few, dtype), draw(2, few)) else cols
            rows = [n for n in lengths(module) if n * few <= MOST]
            many = (draw(*shape, few) for n in rows for shape in ((n,), (1, n)))
            reason = differs_in_use(copy(few, dtype), ours, many, dtype, (PLAIN, NO_GRAD))
        if reason is not None:
            return reason
    return None


def run(module: nn.Module, x: Tensor, autocast: bool, forward: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        return value_and_gradients(lambda: forward(module, x), [x, *module.parameters(recurse=False)])
