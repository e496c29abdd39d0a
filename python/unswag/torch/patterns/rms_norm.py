"""RMSNorm: y = x rstd (offset + weight), whatever it is called."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unswag.torch.functional import rms_norm
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
    reason_to_leave,
    replace_unary_forward,
    stock,
)
from unswag.torch.patterns.probing import Writes, ignores_the_mean, kind, own_forward, twin
from unswag.torch.patterns.proof import Proof
from unswag.torch.stash import PLAIN

MUST = 2  # of the combinations of dtypes in `cases_of`: the others are those that a cast may lead to, and need no variant


@dataclass(frozen=True)
class Variant:
    """One of the RMSNorms in use. `weight` and `eps` are names of attributes, read at each call."""

    weight: str | None
    eps: str
    weight_offset: float
    cast_before_weight: bool  # Llama rounds x rstd to x's dtype before the product, Gemma after it
    promotes: bool  # y has the dtype of x * weight, or else that of x

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        return self.of(module, x, getattr(module, self.weight) if self.weight else None)

    def of(self, module: nn.Module, x: Tensor, weight: Tensor | None) -> Tensor:
        eps = getattr(module, self.eps)
        if eps is None:  # torch.nn.RMSNorm: that of the dtype it computes in
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        return rms_norm(
            x,
            weight,
            eps,
            weight_offset=self.weight_offset,
            cast_before_weight=self.cast_before_weight,
            out_dtype=x.dtype if weight is None or not self.promotes else torch.promote_types(x.dtype, weight.dtype),
        )


class RmsNorm:
    name = "rms_norm"
    role = "residual"
    saves = "x, which the residual stream keeps anyway, and 4 bytes per row; stock keeps a float32 copy of x, and x rstd"

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        like = floating_parameter(model)
        proven: dict[Hashable, dict[Dtypes, Variant]] = {}  # by kind, as long as the candidates live
        for name, module in model.named_modules():
            eps = [k for k, v in vars(module).items() if (isinstance(v, float) and 0 < v <= 1e-2) or (v is None and "eps" in k)]
            if not eps or (vectors := vectors_of(module, 1)) is None:
                continue
            weight, own = next(iter(vectors.items()), (None, like))
            if (weight is None or own.ndim == 1) and not ignores_the_mean(module, own):
                yield Candidate(name, module, {"weight": weight, "eps": eps, "like": own, "proven": proven})

    def probe(self, candidate: Candidate) -> str | None:
        module, weight, like = candidate.module, candidate.parts["weight"], candidate.parts["like"]
        vectors = [weight] if weight else []
        if reason := reason_to_leave(module, like) or unreadable(module, vectors):
            return reason
        same = kind(module)
        known: dict[Dtypes, Variant] | None = candidate.parts["proven"].get(same)
        by_dtypes: dict[Dtypes, list[Case]] = {}
        try:
            if known is not None and not any(
                dtypes not in known or c.differs(known[dtypes]) for dtypes, c in cases_of(module, weight, like, FEW, MUST)
            ):
                candidate.parts["variants"] = known
                return None
            for dtypes, case in cases_of(module, weight, like, ELEMENTS):
                by_dtypes.setdefault(dtypes, []).append(case)
        except Writes as error:
            return str(error)
        except Exception as error:  # it is not what it looked like
            return f"not an RMSNorm: its forward raises {type(error).__name__}: {error}"
        nearest = (-1, "")
        for eps, offset in itertools.product(candidate.parts["eps"], (0.0, 1.0) if weight else (0.0,)):
            variants: dict[Dtypes, Variant] = {}
            for i, (dtypes, cases) in enumerate(by_dtypes.items()):
                casts = itertools.product((True, False), (True, False) if weight else (False,))
                tries = dict.fromkeys((*variants.values(), *(Variant(weight, eps, offset, *how) for how in casts)))
                failed = []
                for variant in tries:
                    why = next((why for case in cases if (why := case.differs(variant))), None)
                    if why is None:
                        variants[dtypes] = variant
                        break
                    failed.append(why)
                if dtypes not in variants and i < MUST:
                    nearest = max(nearest, (i, failed[0]), key=lambda f: f[0])
                    break
            else:
                reason = differs_elsewhere(module, vectors, like, variants.get)
                if reason is None:
                    candidate.parts["variants"] = candidate.parts["proven"][same] = variants
                return reason
        return f"not one of the known RMSNorms: {nearest[1]}"

    def apply(self, candidate: Candidate) -> None:
        variants: dict[Dtypes, Variant] = candidate.parts["variants"]
        weight, eps = candidate.parts["weight"], next(iter(variants.values())).eps
        proof = Proof(candidate, reads=(eps,))

        def forward(self: nn.Module, x: Tensor) -> Any:
            w = getattr(self, weight) if weight else None
            if type(x) not in PLAIN or (w is not None and (type(w) not in PLAIN or w.shape != x.shape[-1:])):  # sharded since
                return stock(self, x)
            dtypes = (x.dtype, x.dtype if w is None else w.dtype, torch.is_autocast_enabled(x.device.type))
            variant = variants.get(dtypes)
            if variant is None:
                proof.say(self, unproven(dtypes))
                return stock(self, x)
            return variant.of(self, x, w)

        replace_unary_forward(candidate.module, forward, proof)


def cases_of(
    module: nn.Module, weight: str | None, like: Tensor, elements: int, first: int | None = None
) -> Iterator[tuple[Dtypes, Case]]:
    cols = width_of(module, [weight] if weight else [], like)
    rows = max(2, elements // cols)
    own = like.dtype
    generator = torch.Generator(like.device).manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=like.device, generator=generator)

    single = (torch.float32, torch.float32, False)
    others = itertools.product((own, *FLOATS), (own, *FLOATS), (False, True))
    combinations = dict.fromkeys((single, (own, own, False), (own, own, True), *others))
    if not weight:
        combinations = {(x, x, autocast): None for x, _, autocast in combinations}
    for i, (x_dtype, w_dtype, autocast) in enumerate(itertools.islice(combinations, first)):
        for training, scale in zip((True, False), SCALES, strict=True):
            drawn = {weight: nn.Parameter(draw(cols).to(w_dtype))} if weight else {}
            copy, x = twin(module, **drawn), (scale * draw(rows, cols)).to(x_dtype)
            copy.training = training
            try:
                theirs = run(copy, x, autocast, own_forward)
            except RuntimeError:
                if i < MUST:
                    raise
                break  # dtypes that the module does not take together
            yield (x_dtype, w_dtype, autocast), Case(copy, x, autocast, theirs)
