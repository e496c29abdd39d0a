"""Packed experts of a mixture: down(act(gate) * up) for all experts at once, gate and up the halves of one product."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from unswag.torch.derivatives import Codes
from unswag.torch.experts import grouped
from unswag.torch.functional import gated_halves
from unswag.torch.patterns.mlp import ACTIVATIONS, CODES, GRID, SAME, codes_of
from unswag.torch.patterns.pattern import (
    Candidate,
    is_plain,
    reason_to_leave,
    replace,
    replace_forward,
    replace_method,
    stock,
)
from unswag.torch.patterns.probing import (
    MODES,
    NO_GRAD,
    PLAIN,
    Writes,
    differs_in_use,
    distance,
    own_forward,
    twin,
    unusual,
    value_and_gradients,
)
from unswag.torch.patterns.proof import Proof, lengths

GATE = "_apply_gate"  # transformers' name for act(gate) * up of its packed experts; grouped_mm and batched_mm call it
WEIGHTS = ("gate_up_proj", "down_proj")  # [experts, 2 n, hidden] and [experts, hidden, n]
MORE = ("has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")  # what `grouped` does not do
WIDTH = 32  # of the experts of a probe


class Experts:
    name = "experts"
    role = "mlp"
    saves = "gate and up of each token and expert; stock keeps act(gate), the product, the input and the result for each too"

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        for name, module in model.named_modules():
            if callable(getattr(module, GATE, None)) and all(
                getattr(module._parameters.get(k), "ndim", 0) == 3 for k in WEIGHTS
            ):
                yield Candidate(name, module)

    def probe(self, candidate: Candidate) -> str | None:
        module: Any = candidate.module
        if GATE in vars(module):
            return f"its {GATE} was already replaced on the instance"
        if reason := reason_to_leave(module, module.down_proj):
            return reason
        reasons = []
        for gate_first, act in itertools.product((True, False), ACTIVATIONS):
            reason = _gate_differs(module, act, gate_first)
            if reason is None:
                break
            reasons.append(reason)
        else:
            return f"its gate is not act(gate) * up of two halves: {reasons[0]}"
        if not _calls_gate(module):
            return (
                f"its experts run one by one (experts_implementation={_implementation(module)!r}; 'grouped_mm' can be patched)"
            )
        whole = _implementation(module) == "grouped_mm" and _differs(module, act, gate_first) is None
        covers = ("act_fn",) if hasattr(module, "act_fn") else ()
        candidate.parts |= {"act": act, "gate_first": gate_first, "whole": whole, "covers": covers}
        return None

    def apply(self, candidate: Candidate) -> None:
        act, gate_first = candidate.parts["act"], candidate.parts["gate_first"]

        def apply_gate(self: nn.Module, gate_up: Tensor) -> Tensor:
            return gated_halves(gate_up, act, gate_first, codes_of(self))

        theirs = _registered()

        def forward(self: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
            if kwargs or len(args) != 3 or not _ordinary(self, *args) or _registered() is not theirs:
                result: Tensor = stock(self, *args, **kwargs)
                return result
            return grouped(*args, self.gate_up_proj, self.down_proj, act, gate_first, codes_of(self))

        methods = (GATE, "forward") if candidate.parts["whole"] else (GATE,)
        proof = Proof(candidate, reads=("config", "num_experts", *MORE), unseen=candidate.parts["covers"], methods=methods)
        replace_method(candidate.module, GATE, apply_gate, proof)
        replace(candidate.module, CODES, Codes())
        if candidate.parts["whole"]:
            replace_forward(candidate.module, forward, proof)


def _registered() -> Any:
    """What transformers calls for experts by "grouped_mm"; anybody may register another one."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS.get("grouped_mm")


def _implementation(module: Any) -> Any:
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


def _ordinary(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> bool:
    """Whether this call is one that `grouped` computes; else transformers' own function runs."""
    if torch.compiler.is_compiling():
        return False
    if _implementation(module) != "grouped_mm" or any(getattr(module, k, True) for k in MORE):
        return False
    return all(map(is_plain, (hidden, index, weights, module.gate_up_proj, module.down_proj)))


def _gate_differs(module: Any, act: str, gate_first: bool) -> str | None:
    """How act(gate) * up of the halves differs from what the module makes of gate and up, or None."""
    like: Tensor = module.down_proj
    copy, *_ = _small(module)
    for dtype, copy.training in itertools.product(dict.fromkeys((torch.float64, like.dtype)), (True, False)):
        x = (GRID * (2 * torch.rand(64, 32, device=like.device) - 1)).to(dtype).requires_grad_()
        try:
            theirs = value_and_gradients(lambda: own_forward(copy, x, method=GATE), [x])  # noqa: B023
        except Writes as error:
            return str(error)
        except Exception as error:
            return f"it raises {type(error).__name__}: {error}"
        ours = value_and_gradients(lambda: gated_halves(x, act, gate_first), [x])  # noqa: B023
        worst = max(distance(a, b) for a, b in zip(ours, theirs, strict=True))
        if worst > max(SAME, 8 * torch.finfo(dtype).eps):
            return f"results differ by {worst:.1e} in {dtype}"

    def halves(_: nn.Module, x: Tensor) -> Tensor:
        return gated_halves(x, act, gate_first)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=like.device)

    few = [draw(n, 2 * WIDTH) for n in (1, 2, 64)]
    many = [draw(n, 2 * WIDTH) for n in lengths(module)]
    return (
        differs_in_use(copy, halves, few, like.dtype, MODES, GATE)
        or differs_in_use(copy, halves, unusual(draw, 2 * WIDTH, torch.float16), torch.float32, (PLAIN,), GATE)
        or differs_in_use(copy, halves, many, torch.float32, (PLAIN, NO_GRAD), GATE)
    )


def _small(module: Any) -> tuple[Any, list[Tensor], Tensor]:
    """A twin with four small experts, the last without a token; its inputs with gradients (hidden, weights, parameters), and
    the index."""
    like: Tensor = module.down_proj
    n, turned = WIDTH, getattr(module, "is_transposed", False)
    shapes = {"gate_up_proj": (4, n, 2 * n) if turned else (4, 2 * n, n), "down_proj": (4, n, n)}

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, device=like.device) * shape[-1] ** -0.5).to(like.dtype)

    drawn = {k: nn.Parameter(draw(*shape)) for k, shape in shapes.items()}
    copy: Any = twin(module, **drawn)
    copy.__dict__["num_experts"] = 4
    weights = torch.rand(6, 2, device=like.device).to(like.dtype).requires_grad_()
    hidden = (3 * draw(6, n)).requires_grad_()
    return copy, [hidden, weights, *drawn.values()], torch.tensor([[2, 0], [1, 2]] * 3, device=like.device)


def _calls_gate(module: Any) -> bool:
    """Whether the module's forward makes act(gate) * up by `_apply_gate`."""
    copy, (hidden, weights, *_), index = _small(module)
    called: list[Callable[..., Any]] = []

    def apply_gate(gate_up: Tensor) -> Tensor:
        called.append(apply_gate)
        return gate_up.chunk(2, -1)[0]

    copy.__dict__[GATE] = apply_gate
    try:
        own_forward(copy, hidden, index, weights)
    except Writes:
        raise
    except Exception:
        return False
    return bool(called)


def _differs(module: Any, act: str, gate_first: bool) -> str | None:
    """How `grouped` differs from the module's own forward, or None."""
    copy, leaves, index = _small(module)
    hidden, weights, gate_up, down = leaves
    if not _ordinary(copy, hidden, index, weights):
        return "it has more parts"
    worst = 0.0
    for copy.training in (True, False):
        try:
            theirs = value_and_gradients(lambda: own_forward(copy, hidden, index, weights), leaves)
            ours = value_and_gradients(lambda: grouped(hidden, index, weights, gate_up, down, act, gate_first), leaves)
        except Exception as error:
            return f"it raises {type(error).__name__}: {error}"
        worst = max(worst, *(distance(a, b) for a, b in zip(ours, theirs, strict=True)))
    return None if worst <= 16 * torch.finfo(hidden.dtype).eps else f"results differ by {worst:.1e}"
