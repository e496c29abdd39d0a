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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unswag.torch import stash
from unswag.torch.attention import Piece, Spans
from unswag.torch.checkpoint.tile_attention import Unswept
from unswag.torch.checkpoint.visit import SCALARS, Autocast, Call, SweptLayer, Visit
from unswag.torch.patterns.attention import View
from unswag.torch.patterns.pattern import HOOKS, METHODS, Candidate, foreign_forward, replace_view, stock_class
from unswag.torch.patterns.probing import sealed, whole_twin
from unswag.torch.patterns.proof import Proof, lengths, others_global_hooks

TOKENS, TILE, KEY_BLOCK = 64, 24, 16  # of the comparison; none divides the next
WINDOW, CUT = 20, 29  # of a mask of more than one piece: the window, and where its second sequence begins
MOST_WIDENED = 1 << 27  # elements of a layer that is compared in float32 whatever its own dtype
ERROR, ERROR_16_BITS = 2e-5, 3e-2  # ‖swept - whole‖ / ‖whole‖ (layers in float64 have float32 inside); a lost tile makes 0.1
MOST_TOKENS = 1025  # of a second comparison, where the code of a layer names numbers that may be lengths
SMALL, SMALL_16 = 1e-6, 1e-2  # of dy; a loss over a million tokens makes it so small
RECORDER = "transformers.utils.output_capturing"
SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func")  # settings of a layer that a trainer changes


@dataclass(frozen=True)
class Verdict:
    """What a comparison found for a layer and a kind of call: the `reason` not to sweep, or None, and the facts it needs."""

    reason: str | None
    proofs: tuple[tuple[str, type[nn.Module], Proof], ...] = ()
    calls: int = 0  # of its attention
    draws: bool = False  # random numbers

    @classmethod
    def of(cls, call: Call) -> Verdict:
        """Compares. Changes nothing of the layer, of its gradients, buffers and hooks, nor of the random state."""
        layer = call.layer
        if reason := _cannot_be_compared(layer):
            return cls(reason)
        autocast = Autocast(call.x.device)
        found: list[_Found | str] = []
        # in a thread, without the caller's hooks and modes
        thread = threading.Thread(target=lambda: found.append(_compared(call, autocast)))
        thread.start()
        thread.join()
        seen = found[0] if found else "the comparison of its tiles with the whole was interrupted"
        if isinstance(seen, str):
            return cls(seen)
        named = layer.named_modules()
        proofs = tuple((name, stock_class(m), Proof(Candidate(name, m), reads=SWITCHES)) for name, m in named)
        return cls(None, proofs, seen.calls, seen.draws)

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
        if reason := _looks_inside(layer):
            raise Unswept(reason)


def _looks_inside(layer: nn.Module) -> str | None:
    """What would see tiles instead of the whole, or would be seen by nobody: the reason not to sweep, or None."""
    for name, module in layer.named_modules():
        for hook in (hook for hooks in HOOKS if module is not layer for hook in vars(module)[hooks].values()):
            if getattr(hook, "__module__", None) != RECORDER:  # which acts only where `visit.Call.of` refuses
                return f"a hook on its {name} ({getattr(hook, '__qualname__', type(hook).__name__)}) would see each tile"
    if (reason := others_global_hooks()) is not None:
        return f"{reason}, and it would see each tile"
    for name, p in layer.named_parameters():
        if p._backward_hooks:
            return f"a hook on the gradient of its {name} would see that of each tile"
    if F.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention:
        return "torch.nn.functional.scaled_dot_product_attention was replaced"
    return None


def _foreign(module: nn.Module) -> str | None:
    other = foreign_forward(module) if "forward" in vars(module) else None
    return None if other is None else f"the forward of a {type(module).__name__} was replaced by {other}"


class _Found(NamedTuple):
    calls: int
    draws: bool


def _compared(call: Call, autocast: Autocast) -> _Found | str:
    try:
        if call.x.is_cuda:
            torch.cuda.set_device(call.x.device)
        with sealed():
            found = _same(call, autocast, min(TOKENS, call.tokens))
            if (longer := _longer(call)) is not None:
                _same(call, autocast, longer)
            return found
    except Unswept as reason:
        return str(reason)
    except Exception as error:  # of a stranger's code, on inputs that it did not expect
        return f"the comparison of its tiles with the whole raises {type(error).__name__}: {error}"


def _cannot_be_compared(layer: nn.Module) -> str | None:
    if other := next(filter(None, map(_foreign, layer.modules())), None):
        return other
    if any(type(p).__name__ == "DTensor" for p in layer.parameters()):
        return "its parameters are sharded while it runs"
    if any(hasattr(module, "unshard") for module in layer.modules()):
        return "it is sharded (fully_shard)"
    return _looks_inside(layer)


def _longer(call: Call) -> int | None:
    """A number of tokens above those at which the code of the layer seems to take another path, if it names such numbers."""
    named = {n for module in call.layer.modules() for n in lengths(module) if TOKENS < n <= MOST_TOKENS}
    return min(max(named), call.tokens) if named else None


def _same(call: Call, autocast: Autocast, tokens: int) -> _Found:
    """Compares the layer in tiles with the whole, for so many tokens. Raises Unswept if it may not be swept."""
    errors: list[Exception] = []
    plain = [p for p in call.layer.parameters() if p.is_floating_point()]
    wide = call.x.is_cpu and sum(p.numel() for p in plain) <= MOST_WIDENED and call.x.dtype != torch.float64
    for dtype in (torch.float32, call.x.dtype) if wide else (call.x.dtype,):
        try:
            twin = _twin(call.layer, dtype if wide and dtype == torch.float32 else None)
        except ValueError as error:
            raise Unswept(str(error)) from None
        probe = _probe_call(call, twin, dtype, tokens)
        with contextlib.nullcontext() if dtype == torch.float32 and wide else autocast.entered():
            state = torch.get_rng_state()
            try:
                whole = _whole(probe)
            except Unswept:
                raise
            except Exception as error:  # it does not take this dtype, perhaps
                errors.append(error)
                continue
            draws = not torch.equal(state, torch.get_rng_state())
            if draws:  # in tiles it would draw otherwise
                twin.eval()
                whole = _whole(probe)
            before = _kept_by(twin)
            swept, calls = _swept(probe)
            if left := _changed(before, _kept_by(twin)):
                raise Unswept(f"a forward leaves something in its {left}, which would be that of the last tile")
        _compare(swept, whole, dtype)
        return _Found(calls, draws)
    raise errors[0]


Contents = dict[tuple[str, str], tuple[Any, Any]]


def _kept_by(twin: nn.Module) -> Contents:
    """What its modules hold beside parameters, parts and what UnSwag puts there: (value, version or copy)."""
    found: Contents = {}
    for name, module in twin.named_modules():
        for key, value in [*vars(module).items(), *module.named_buffers(recurse=False)]:
            ours = key.startswith("_unswag") or type(value).__module__.partition(".")[0] == "unswag"
            if ours or key in ("_parameters", "_modules", "_buffers", *HOOKS):
                continue
            if isinstance(value, Tensor):
                found[name, key] = value, value._version
            elif isinstance(value, (list, dict, set)):
                found[name, key] = value, (len(value), [id(v) for v in (value.values() if isinstance(value, dict) else value)])
            else:
                found[name, key] = value, None
    return found


def _changed(before: Contents, after: Contents) -> str | None:
    """What is there now and was not, or is another object or version, or another number."""
    for place, (value, version) in after.items():
        old, old_version = before.get(place, (None, -1))
        same = value is old or (isinstance(value, SCALARS) and type(value) is type(old) and value == old)
        if not same or version != old_version:
            return ".".join(filter(None, place))
    return None


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


def _probe_call(call: Call, twin: nn.Module, dtype: torch.dtype, tokens: int) -> Call:
    """The call with few tokens, random hidden states, and a mask of the same kind."""
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
    """y, and the gradients of x and the parameters for a small dy: what a layer adds to a gradient whatever dy is, as auxiliary
    losses inside Functions do, shows then."""
    leaves = [call.x, *(p for p in call.layer.parameters() if p.requires_grad)]
    generator = torch.Generator(y.device).manual_seed(1)
    dy = (
        torch.randn(y.shape, device=y.device, generator=generator)
        .mul_(SMALL_16 if y.dtype == torch.float16 else SMALL)
        .to(y.dtype)
    )
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
    trained = {id(call.x), *map(id, call.layer.parameters())}
    if any(id(leaf) not in trained for leaf in _leaves(y)):
        raise Unswept("something is trained in it that is no parameter of it")
    return _gradients(call, y)


def _leaves(y: Tensor) -> Iterator[Tensor]:
    """Tensors whose gradients a backward pass from y adds up."""
    todo, seen = [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        todo += [following for following, _ in node.next_functions]


def _swept(call: Call) -> tuple[list[Tensor], int]:
    """As `_whole`, in tiles; and how often the attention was called in each."""
    tile = min(TILE, max(1, call.tokens * TILE // TOKENS))
    parameters = [p for p in call.layer.parameters() if p.requires_grad]
    visit = Visit(call, tile, KEY_BLOCK, False, None, parameters)
    y: Tensor = SweptLayer.apply(call.x, visit, *parameters)
    calls = visit.calls
    return _gradients(call, y), calls


def _compare(swept: list[Tensor], whole: list[Tensor], dtype: torch.dtype) -> None:
    allowed = ERROR if dtype.itemsize >= 4 else ERROR_16_BITS
    gradients = [w.double().norm() for w in whole[1:]]
    least = 1e-3 * max(gradients)
    for i, (ours, theirs) in enumerate(zip(swept, whole, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise Unswept("in tiles it returns another shape or dtype")
        apart = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(least if i else 1e-30)
        if not apart <= allowed:
            what = "output is not that" if i == 0 else "gradients are not those"
            raise Unswept(f"in tiles its {what} of the whole: something beside its attention looks at other tokens, or draws")
