"""LayerNorm: y = (x - mean) rstd weight + bias, torch's own and whatever computes the same."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unswag.torch.functional import layer_norm
from unswag.torch.patterns.norms import (
    ELEMENTS,
    FEW,
    FLOATS,
    SCALES,
    Case,
    Dtypes,
    differs_elsewhere,
    run,
    unproven,
    unreadable,
    vectors_of,
    width_of,
)
from unswag.torch.patterns.pattern import (
    Candidate,
    floating_parameter,
    is_plain,
    reason_to_leave,
    replace_unary_forward,
    stock,
)
from unswag.torch.patterns.probing import Writes, ignores_the_mean, kind, own_forward, twin
from unswag.torch.patterns.proof import Proof

EPS = (1e-5, 1e-6, 1e-12)  # tried where no attribute holds it: those in use


@dataclass(frozen=True)
class Variant:
    """One of the LayerNorms in use. `weight`, `bias` and `eps` name attributes, read at each call; eps may be a number."""

    weight: str | None
    bias: str | None
    eps: str | float
    promotes: bool  # y has the dtype of x * weight, or else that of x
    widens: bool  # under autocast y is float32, as torch's own LayerNorm on CUDA
    proven: frozenset[Dtypes]

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        weight, bias = self.vectors(module)
        out = torch.promote_types(x.dtype, weight.dtype) if self.promotes and weight is not None else x.dtype
        if self.widens and torch.is_autocast_enabled(x.device.type):
            out = torch.promote_types(x.dtype, torch.float32)
        eps = getattr(module, self.eps) if isinstance(self.eps, str) else self.eps
        return layer_norm(x, weight, bias, eps, out_dtype=out)

    def vectors(self, module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        weight, bias = (getattr(module, name) if name else None for name in (self.weight, self.bias))
        return weight, bias

    def dtypes(self, module: nn.Module, x: Tensor) -> Dtypes | None:
        """Those of a call; None where it is not for us: another shape, sharded or another subclass, vectors of two dtypes."""
        vectors = [v for v in self.vectors(module) if v is not None]
        if not all(map(is_plain, (x, *vectors))):
            return None
        cols = x.shape[-1:]
        if tuple(getattr(module, "normalized_shape", cols)) != cols or any(v.shape != cols for v in vectors):
            return None
        dtypes = {v.dtype for v in vectors} or {x.dtype}
        return (x.dtype, dtypes.pop(), torch.is_autocast_enabled(x.device.type)) if len(dtypes) == 1 else None


class LayerNormCase(Case):
    """PyTorch's own LayerNorm computes x rstd - mean rstd, and adds up dw and db in x's dtype: 682 rows of bf16 are 3 % off."""

    neighbours: ClassVar[dict[torch.dtype, float]] = {torch.bfloat16: 1e-3, torch.float16: 4e-3}
    of_sums: ClassVar[tuple[float, float]] = (1e-5, 0.1)


class LayerNorm:
    name = "layer_norm"
    role = "residual"
    saves = "x, which the residual stream keeps anyway, and 8 bytes per row; stock keeps y too, for the Linear that reads it"

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        like = floating_parameter(model)
        proven: dict[Hashable, Variant] = {}  # by kind, as long as the candidates live
        for name, module in model.named_modules():
            settings = [k for k, v in vars(module).items() if isinstance(v, float) and 0 < v <= 1e-2]
            if not (settings or hasattr(module, "normalized_shape")) or (vectors := vectors_of(module, 2)) is None:
                continue
            if isinstance(module, nn.LayerNorm) or ignores_the_mean(module, like):
                parts = {"vectors": list(vectors), "eps": settings or list(EPS), "proven": proven}
                yield Candidate(name, module, parts | {"like": next(iter(vectors.values()), like)})

    def probe(self, candidate: Candidate) -> str | None:
        module, parts = candidate.module, candidate.parts
        vectors, like = parts["vectors"], parts["like"]
        if reason := reason_to_leave(module, like):
            return reason
        shape = getattr(module, "normalized_shape", (0,))
        if len(shape) != 1:
            return f"it normalises over {len(shape)} dimensions {list(shape)}, and the kernels only over the last"
        if odd := next((v for v in vectors if getattr(module, v).ndim != 1), None):
            return f"its {odd} has shape {list(getattr(module, odd).shape)}, and the kernels take one number per column"
        if reason := unreadable(module, vectors):
            return reason
        same = kind(module)
        known: Variant | None = parts["proven"].get(same)
        try:
            if known is not None and not any(c.differs(known) for c in cases_of(module, vectors, like, FEW)):
                parts["variant"] = known
                return None
            cases = list(cases_of(module, vectors, like, ELEMENTS))
            dtypes = frozenset((c.x.dtype, next(c.twin.parameters(recurse=False), c.x).dtype, c.autocast) for c in cases)
        except Writes as error:
            return str(error)
        except Exception as error:  # it is not what it looked like
            return f"not a LayerNorm: its forward raises {type(error).__name__}: {error}"
        nearest = (-1, "")
        for eps, (weight, bias), promotes, widens in itertools.product(
            parts["eps"], _roles(vectors), (False, True) if vectors else (False,), (False, True)
        ):
            variant = Variant(weight, bias, eps, promotes, widens, dtypes)
            failed = next(((i, why) for i, case in enumerate(cases) if (why := case.differs(variant))), None)
            if failed is None:
                reason = differs_elsewhere(module, vectors, like, lambda dtypes: variant if dtypes in variant.proven else None)  # noqa: B023
                if reason is None:
                    parts["variant"] = parts["proven"][same] = variant
                return reason
            nearest = max(nearest, failed, key=lambda f: f[0])
        return f"not one of the known LayerNorms: {nearest[1]}"

    def apply(self, candidate: Candidate) -> None:
        variant: Variant = candidate.parts["variant"]
        proof = Proof(
            candidate, reads=("normalized_shape", variant.eps) if isinstance(variant.eps, str) else ("normalized_shape",)
        )

        def forward(self: nn.Module, x: Tensor) -> Any:
            dtypes = variant.dtypes(self, x)
            if dtypes in variant.proven:
                return variant(self, x)
            if dtypes is not None:
                proof.say(self, unproven(dtypes))
            return stock(self, x)

        replace_unary_forward(candidate.module, forward, proof)


def _roles(vectors: list[str]) -> list[tuple[str | None, str | None]]:
    """Who may be (weight, bias)."""
    if len(vectors) == 2:
        return [(vectors[0], vectors[1]), (vectors[1], vectors[0])]
    return [(vectors[0], None), (None, vectors[0])] if vectors else [(None, None)]


def cases_of(module: nn.Module, vectors: list[str], like: Tensor, elements: int) -> Iterator[LayerNormCase]:
    cols = width_of(module, vectors, like)
    rows = max(2, elements // cols)
    own = like.dtype
    generator = torch.Generator(like.device).manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=like.device, generator=generator)

    kinds = [(own, own, False), (torch.float32, torch.float32, False), (own, own, True)]
    kinds += [(x, w, autocast) for x in FLOATS for w in (x, torch.float32) for autocast in (False, True)]
    for i, (x_dtype, dtype, autocast) in enumerate(dict.fromkeys(kinds)):
        for training, scale in zip((True, False), SCALES, strict=True):
            copy = twin(module, **{v: nn.Parameter(draw(cols).to(dtype)) for v in vectors})
            x = scale * (0.5 + draw(*((2, 1, rows // 2) if i else (rows,)), cols))  # a mean that shows, and other dimensions
            copy.training = training
            try:
                theirs = run(copy, x.to(x_dtype), autocast, own_forward)
            except RuntimeError:
                if i < 2:
                    raise
                break  # dtypes that the module does not take together
            yield LayerNormCase(copy, x.to(x_dtype), autocast, theirs)
