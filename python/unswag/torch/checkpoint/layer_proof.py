"""Whether a layer may be swept: a few tokens through a copy of it, in tiles and as a whole, with all gradients.

The comparison shows that nothing but attention carries anything from one token to another, that the attention is called as
`tile_attention` expects, and that what the layer returns consists of hidden states. What it cannot show it refuses to assume:
the facts under which it was made (classes, methods, settings, as in `patterns.proof`) are checked before each use.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unswag.torch import stash
from unswag.torch.attention import Piece, Spans
from unswag.torch.checkpoint.tile_attention import Unswept
from unswag.torch.checkpoint.visit import Autocast, Call, SweptLayer, Visit
from unswag.torch.patterns.attention import View
from unswag.torch.patterns.pattern import METHODS, Candidate, foreign_forward, replace_view, stock_class
from unswag.torch.patterns.probing import sealed, whole_twin
from unswag.torch.patterns.proof import Proof

TOKENS, TILE, KEY_BLOCK = 64, 24, 16  # of the comparison; none divides the next
WINDOW, CUT = 20, 29  # of a mask of more than one piece: the window, and where its second sequence begins
MOST_WIDENED = 1 << 27  # elements of a layer that is compared in float32 whatever its own dtype
ERROR, ERROR_16_BITS = 2e-5, 3e-2  # ‖swept - whole‖ / ‖whole‖ (layers in float64 have float32 inside); a lost tile makes 0.1
SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func")  # settings of a layer that a trainer changes


@dataclass(frozen=True)
class Verdict:
    """What a comparison found for a layer and a kind of call: the `reason` not to sweep, or None, and the facts it needs."""

    reason: str | None
    proofs: tuple[tuple[str, type[nn.Module], Proof], ...] = ()

    @classmethod
    def of(cls, call: Call) -> Verdict:
        """Compares. Changes nothing of the layer, of its gradients, buffers and hooks, nor of the random state."""
        layer = call.layer
        if reason := _cannot_be_compared(layer):
            return cls(reason)
        autocast = Autocast(call.x.device)
        found: list[str | None] = []
        thread = threading.Thread(
            target=lambda: found.append(_compared(call, autocast))
        )  # without the caller's hooks and modes
        thread.start()
        thread.join()
        if not found or found[0] is not None:
            return cls(found[0] if found else "the comparison of its tiles with the whole was interrupted")
        named = layer.named_modules()
        return cls(None, tuple((name, stock_class(m), Proof(Candidate(name, m), reads=SWITCHES)) for name, m in named))

    def check(self, layer: nn.Module) -> None:
        """Raises Unswept if the layer may not be swept."""
        if self.reason is not None:
            raise Unswept(self.reason)
        modules = dict(layer.named_modules())
        if len(modules) != len(self.proofs):
            raise Unswept("it got or lost a module since it was proven; apply the surgery again")
        for name, proven, proof in self.proofs:
            module = modules.get(name)
            if module is None or stock_class(module) is not proven:
                what: str | None = f"it was a {proven.__name__}"
            else:
                what = proof.changed(module) or _foreign(module)
            if what is not None:
                raise Unswept(f"its {name or 'code'} is not as it was proven ({what}); apply the surgery again")


def _foreign(module: nn.Module) -> str | None:
    other = foreign_forward(module) if "forward" in vars(module) else None
    return None if other is None else f"the forward of a {type(module).__name__} was replaced by {other}"


def _compared(call: Call, autocast: Autocast) -> str | None:
    try:
        if call.x.is_cuda:
            torch.cuda.set_device(call.x.device)
        with sealed():
            return _differs(call, autocast)
    except Unswept as reason:
        return str(reason)
    except Exception as error:  # of a stranger's code, on inputs that it did not expect
        return f"the comparison of its tiles with the whole raises {type(error).__name__}: {error}"


def _cannot_be_compared(layer: nn.Module) -> str | None:
    if other := next(filter(None, map(_foreign, layer.modules())), None):
        return other
    if any(type(p).__name__ == "DTensor" for p in layer.parameters()):
        return "its parameters are sharded while it runs"
    if any(hasattr(module, "unshard") for module in layer.modules() if module is not layer):
        return "a part of it is sharded on its own, and would be gathered once per tile"
    return None


def _differs(call: Call, autocast: Autocast) -> str | None:
    """How the layer in tiles differs from the whole, or None."""
    errors: list[Exception] = []
    plain = [p for p in call.layer.parameters() if p.is_floating_point()]
    wide = call.x.is_cpu and sum(p.numel() for p in plain) <= MOST_WIDENED and call.x.dtype != torch.float64
    for dtype in (torch.float32, call.x.dtype) if wide else (call.x.dtype,):
        try:
            twin = _twin(call.layer, dtype if wide and dtype == torch.float32 else None)
        except ValueError as error:
            return str(error)
        probe = _probe_call(call, twin, dtype)
        with contextlib.nullcontext() if dtype == torch.float32 and wide else autocast.entered():
            state = torch.get_rng_state()
            try:
                whole = _whole(probe)
            except Unswept:
                raise
            except Exception as error:  # it does not take this dtype, perhaps
                errors.append(error)
                continue
            if not torch.equal(state, torch.get_rng_state()):  # in tiles it would draw otherwise
                twin.eval()
                whole = _whole(probe)
            swept = _swept(probe)
        return _compare(swept, whole, dtype)
    raise errors[0]


def _twin(layer: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy that shares weights at most, and only to read; in `dtype`, if one is given. What is trained and has but one value,
    as a LoRA's second matrix before the first step, is drawn anew."""
    parameters: dict[int, Tensor] = {}
    for p in layer.parameters():
        if type(p) is not nn.Parameter or not stash.is_plain(p):
            continue  # a packed weight is read by its own class only
        value = p.detach() if dtype is None or not p.is_floating_point() else p.detach().to(dtype)
        if p.requires_grad and p.numel() > 1 and bool((p.detach() == p.detach().flatten()[0]).all()):
            drawn = torch.randn(p.shape, device=p.device) / max(1, p.shape[-1]) ** 0.5
            value = (value + drawn.to(value.dtype)).detach()
        parameters[id(p)] = nn.Parameter(value, p.requires_grad)
    twin, stands_for = whole_twin(layer, parameters)
    for module in layer.modules():
        view = module.__dict__.get(METHODS, {}).get("config")
        if isinstance(view, View) and id(module) in stands_for:
            made = stands_for[id(module)]
            replace_view(made, "config", copy.deepcopy(view, {id(view.config): vars(made)["config"]}))
    return twin


def _probe_call(call: Call, twin: nn.Module, dtype: torch.dtype) -> Call:
    """The call with few tokens, random hidden states, and a mask of the same kind."""
    tokens = min(TOKENS, call.tokens)
    arguments = {}
    for name, value in call.arguments.items():
        if isinstance(value, Spans):
            arguments[name] = _spans(len(call.x), tokens, value.window is not None, call.x.device)
        else:
            arguments[name] = _to(call._cut(name, value, 0, tokens), dtype, call.x.dtype)
    x = torch.randn(len(call.x), tokens, call.x.shape[2], device=call.x.device).to(dtype).requires_grad_()
    return replace(call, layer=twin, x=x, tokens=tokens, arguments=arguments)


def _to(value: Any, dtype: torch.dtype, was: torch.dtype) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_to(part, dtype, was) for part in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype == was else value


def _spans(batch: int, tokens: int, window: bool, device: torch.device) -> Spans:
    """Two sequences in each row, or one with a window."""
    cuts = [0, tokens] if window or tokens <= CUT else [0, CUT, tokens]
    pieces = [Piece(row, a, b, a, b, causal=True) for row in range(batch) for a, b in itertools.pairwise(cuts)]
    length = min(WINDOW, tokens) if window else tokens

    def make() -> Tensor:
        at = torch.arange(tokens, device=device)
        sequence = torch.bucketize(at, torch.tensor(cuts[1:], device=device), right=True)
        apart = at[:, None] - at
        seen = (apart >= 0) & (apart < length) & (sequence[:, None] == sequence)
        return seen.expand(batch, 1, tokens, tokens)

    return Spans(pieces, batch, tokens, make, length if window else None)


def _gradients(call: Call, y: Tensor) -> list[Tensor]:
    leaves = [call.x, *(p for p in call.layer.parameters() if p.requires_grad)]
    generator = torch.Generator(y.device).manual_seed(1)
    dy = torch.randn(y.shape, device=y.device, generator=generator).to(y.dtype)
    found = torch.autograd.grad((y * dy).sum(), leaves, allow_unused=True, materialize_grads=True)
    return [y.detach(), *found]


def _whole(call: Call) -> list[Tensor]:
    y = call.forward(call.layer, **{call.hidden: call.x}, **call.arguments)
    if isinstance(y, tuple):
        if any(part is not None for part in y[1:]):
            raise Unswept("it returns more than its hidden states")
        y = y[0]
    if not isinstance(y, Tensor):
        raise Unswept("it does not return hidden states [batch, tokens, hidden]")
    return _gradients(call, y)


def _swept(call: Call) -> list[Tensor]:
    tile = min(TILE, max(1, call.tokens * TILE // TOKENS))
    parameters = [p for p in call.layer.parameters() if p.requires_grad]
    visit = Visit(call, tile, KEY_BLOCK, False, None, parameters)
    y: Tensor = SweptLayer.apply(call.x, visit, *parameters)
    return _gradients(call, y)


def _compare(swept: list[Tensor], whole: list[Tensor], dtype: torch.dtype) -> str | None:
    allowed = ERROR if dtype.itemsize >= 4 else ERROR_16_BITS
    gradients = [w.double().norm() for w in whole[1:]]
    least = 1e-3 * max(gradients)
    for i, (ours, theirs) in enumerate(zip(swept, whole, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return "in tiles it returns another shape or dtype"
        apart = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(least if i else 1e-30)
        if not apart <= allowed:
            what = "output is not that" if i == 0 else "gradients are not those"
            return f"in tiles its {what} of the whole: something beside its attention looks at other tokens, or draws"
    return None
