"""RMSNorm: y = x rstd (offset + weight), whatever it is called."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unswag.torch.functional import rms_norm
from unswag.torch.patterns.pattern import Candidate, foreign_forward, is_plain, no_kernel, replace_forward, stock
from unswag.torch.patterns.probing import (
    AUTOCAST,
    MODES,
    NO_GRAD,
    PLAIN,
    Writes,
    differs_in_use,
    distance,
    ignores_the_mean,
    kind,
    own_forward,
    takes,
    takes_one_argument,
    twin,
    ulps,
    unusual,
    usual,
    value_and_gradients,
)
from unswag.torch.patterns.proof import Proof, lengths

ELEMENTS = 1 << 16  # of each probe: enough to see a rate of 1e-4
FEW = 1 << 12  # where a module of the same kind was probed before
SCALES = (1.0, 1e-3)  # of x; at 1e-3 the place and the value of eps show
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# How often a 16-bit y may be the neighbour of the module's own. Another order of summation moves rstd by 1e-7, which
# crosses a rounding boundary in 1e-7 / 2^-8 (bf16) or 1e-7 / 2^-11 (fp16) of the elements; another order of casts, in 26 %.
NEIGHBOURS = {torch.bfloat16: 1e-4, torch.float16: 1e-3}


Dtypes = tuple[torch.dtype, torch.dtype, bool]  # of x; of the weights (of x if there are none); under autocast


@dataclass(frozen=True)
class Variant:
    """One of the RMSNorms in use. `weight` and `eps` are names of attributes, read at each call."""

    weight: str | None
    eps: str
    weight_offset: float
    cast_before_weight: bool  # Llama rounds x rstd to x's dtype before the product, Gemma after it
    promotes: bool  # y has the dtype of x * weight, or else that of x

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        weight = getattr(module, self.weight) if self.weight else None
        eps = getattr(module, self.eps)
        if eps is None:  # torch.nn.RMSNorm: that of the dtype it computes in
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        return rms_norm(
            x,
            weight,
            eps,
            weight_offset=self.weight_offset,
            cast_before_weight=self.cast_before_weight,
            out_dtype=torch.promote_types(x.dtype, weight.dtype) if self.promotes and weight is not None else x.dtype,
        )


class Norm:
    name = "norm"
    role = "residual"
    saves = "x, which the residual stream keeps anyway, and 4 bytes per row; stock keeps a float32 copy of x, and x rstd"

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        proven: dict[Hashable, dict[Dtypes, Variant]] = {}  # by kind, as long as the candidates live
        for name, module in model.named_modules():
            parameters = list(module.named_parameters(recurse=False))
            weight = parameters[0][0] if parameters else None
            eps = [k for k, v in vars(module).items() if (isinstance(v, float) and 0 < v <= 1e-2) or (v is None and "eps" in k)]
            if (
                eps
                and not module._modules
                and not module._buffers
                and len(parameters) <= 1
                and all(p.ndim == 1 and p.is_floating_point() for _, p in parameters)
                and takes_one_argument(module)
                and not ignores_the_mean(module, parameters[0][1] if parameters else like)
            ):
                like_ = parameters[0][1] if weight else like
                yield Candidate(name, module, {"weight": weight, "eps": eps, "like": like_, "proven": proven})

    def probe(self, candidate: Candidate) -> str | None:
        module, weight = candidate.module, candidate.parts["weight"]
        if other := foreign_forward(module):
            return f"its forward was already replaced by {other}"
        if reason := no_kernel(candidate.parts["like"]):
            return reason
        if weight and not is_plain(candidate.parts["like"]):
            return f"its weight is a {type(candidate.parts['like']).__name__}, which only the module itself can read"
        same = kind(module)
        known: dict[Dtypes, Variant] | None = candidate.parts["proven"].get(same)
        by_dtypes: dict[Dtypes, list[Case]] = {}
        try:
            if known is not None and not any(
                dtypes not in known or c.differs(known[dtypes])
                for dtypes, c in _cases(module, weight, candidate.parts["like"], FEW, MUST)
            ):
                candidate.parts["variants"] = known
                return None
            for dtypes, case in _cases(module, weight, candidate.parts["like"], ELEMENTS):
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
                reason = elsewhere(module, [weight] if weight else [], candidate.parts["like"], variants.get)
                if reason is None:
                    candidate.parts["variants"] = candidate.parts["proven"][same] = variants
                return reason
        return f"not one of the known RMSNorms: {nearest[1]}"

    def apply(self, candidate: Candidate) -> None:
        variants: dict[Dtypes, Variant] = candidate.parts["variants"]
        weight, eps = candidate.parts["weight"], next(iter(variants.values())).eps
        proof = Proof(candidate, reads=(eps,))

        def forward(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Any:
            (x,) = (*args, *kwargs.values())
            w = getattr(self, weight) if weight else None
            if not (is_plain(x) and is_plain(w)) or (w is not None and w.shape != x.shape[-1:]):  # sharded since
                return stock(self, x)
            dtypes = (x.dtype, x.dtype if w is None else w.dtype, torch.is_autocast_enabled(x.device.type))
            variant = variants.get(dtypes)
            if variant is None:
                proof.say(self, unproven(dtypes))
                return stock(self, x)
            return variant(self, x)

        replace_forward(candidate.module, forward, proof)


def unproven(dtypes: Dtypes) -> str:
    x, weight, autocast = dtypes
    return f"x is {x} and the weight {weight}{' under autocast' if autocast else ''}, for which no form of it was proven"


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


MUST = 2  # of the combinations below: the others are those that a cast may lead to, and need not have a variant


def _cases(
    module: nn.Module, weight: str | None, like: Tensor, elements: int, first: int | None = None
) -> Iterator[tuple[Dtypes, Case]]:
    cols = like.numel() if weight else getattr(module, "normalized_shape", (256,))[-1]  # torch's takes no other width
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


MOST = 1 << 22  # elements of an input with many rows


def elsewhere(
    module: nn.Module,
    vectors: Sequence[str],
    like: Tensor,
    chosen: Callable[[Dtypes], Callable[[nn.Module, Tensor], Tensor] | None],
) -> str | None:
    """How the variants that were chosen differ from the module where the cases have not looked (other shapes, modes and
    numbers, many rows), or None."""
    cols = like.numel() if vectors else getattr(module, "normalized_shape", (256,))[-1]
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
            many = (draw(n, few) for n in lengths(module) if n * few <= MOST)
            reason = differs_in_use(copy(few, dtype), ours, many, dtype, (PLAIN, NO_GRAD))
        if reason is not None:
            return reason
    return None


def run(module: nn.Module, x: Tensor, autocast: bool, forward: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        return value_and_gradients(lambda: forward(module, x), [x, *module.parameters(recurse=False)])
