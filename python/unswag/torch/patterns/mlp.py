"""What the patterns of MLPs and of their activations share: the known activations, the parts of an MLP, and their probes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unswag.torch.derivatives import Codes
from unswag.torch.patterns.pattern import Candidate, floating_parameter, reason_to_leave, replace, replace_unary_forward, stock
from unswag.torch.patterns.probing import (
    AUTOCAST,
    MODES,
    NO_GRAD,
    PLAIN,
    Drawn,
    Writes,
    differs_in_use,
    distance,
    has_hooks,
    kind,
    own_forward,
    takes,
    twin,
    unusual,
    usual,
    value_and_gradients,
)
from unswag.torch.patterns.proof import Proof, lengths, mentioned

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
KEEP_INPUT = tuple(act for act in ACTIVATIONS if act not in ("relu", "relu2"))  # these need a bit: `patterns.relu`
GRID = 12.0  # pre-activations of the probes span -GRID…GRID; gelu and gelu_tanh are 5e-4 apart there, and 8e-8 near 0
SAME = 1e-9  # a hundredth of a rounding in float32; some spell sqrt(2 / pi) with eight digits and are 1e-10 off
ROWS = 8
MOST = 1 << 25  # elements of a pre-activation with many rows
CODES = "_unswag_codes"  # module.__dict__[CODES]: the codebook of its activation, under a policy that codes derivatives
CASTS = frozenset(("dtype", "to", "type", "type_as", "float", "half", "double", "bfloat16"))  # who says one of these may cast
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (((), 1), ((), 7), ((1,), 16), ((64,), 24), ((2, 3), 16), ((2, 1, 3), 8), ((2, 3, 4), 5), ((2, 1, 2, 3), 4))
SCALES = (1e-3, 1.0, 10.0, 1e2, 1e3, 3e4, 1e30)  # of a sweep over x


# ---- activations ------------------------------------------------------------------------------------------------------------


def same_activation(act: Any, known: Callable[[Tensor], Tensor]) -> bool:
    return activation_distance(act, known) <= SAME


def activation_distance(act: Any, known: Callable[[Tensor], Tensor]) -> float:
    """How far `act`, a module or a function, is from `known`, in values and derivatives on a grid in fp64; inf for what is no
    function of one fp64 tensor on the CPU."""
    grid = torch.linspace(-GRID, GRID, 4801, dtype=torch.float64).requires_grad_()
    try:
        call = functools.partial(own_forward, twin(act)) if isinstance(act, nn.Module) else act
        theirs = value_and_gradients(lambda: call(grid.clone()), [grid])
    except Exception:
        return float("inf")
    return max(distance(a, b) for a, b in zip(value_and_gradients(lambda: known(grid), [grid]), theirs, strict=True))


def differs_elsewhere(
    module: nn.Module, ours: Callable[[nn.Module, Tensor], Tensor], like: Tensor, dtype: torch.dtype, mode: str = PLAIN
) -> str | None:
    """How `ours` differs from the module in other shapes, modes and numbers, and for many rows; or None."""

    def draw(*shape: int) -> Tensor:  # not where y is next to nothing: of a single number, its rounding would be the result
        return 3 * torch.randn(*shape, device=like.device).clamp(-2 / 3, 2)

    def differs(inputs: list[Tensor], *modes: str) -> str | None:
        return differs_in_use(twin(module), ours, inputs, dtype, modes)

    shapes = [draw(*shape, cols) for shape, cols in WIDTHS] + [draw(24, 5).T, draw(1)[0]]
    if mode == AUTOCAST:
        return differs(shapes, mode)
    most = torch.finfo(dtype)
    sweeps = [torch.linspace(-scale, scale, 385, dtype=torch.float64).clamp(-most.max, most.max) for scale in SCALES]
    odd = [torch.tensor([[v, 1.0]]) for v in (0.0, -0.0, float("nan"), float("inf"), -float("inf"))]
    small = [torch.tensor([v], dtype=torch.float64) for v in (most.tiny, -most.tiny)]
    reason = differs(shapes, PLAIN) or differs([x.to(like.device) for x in (*sweeps, *odd, *small)], PLAIN)
    if reason is None and dtype in (like.dtype, torch.float32):
        named = [draw(*shape) for n in lengths(module) for shape in ((n, 2), (2, n))]
        reason = differs(shapes, *(mode for mode in MODES if mode not in (PLAIN, AUTOCAST))) or differs(named, PLAIN, NO_GRAD)
    return reason


def codes_of(module: nn.Module) -> Codes | None:
    """What `replace(module, CODES, Codes())` put there."""
    return vars(module).get(CODES)


# ---- the parts of an MLP ----------------------------------------------------------------------------------------------------


class AnyWiring(Protocol):
    """Calls the children of a module as modules: y = on_y(down(on_h(h))), with h from x by its own rule."""

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the Linears; the pre-activation comes from the first, the result from the last."""

    @property
    def held(self) -> str | None:
        """The attribute that holds the activation."""

    @property
    def on_h(self) -> str | None: ...

    @property
    def on_y(self) -> str | None: ...

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor: ...


def finish(module: nn.Module, wiring: AnyWiring, h: Tensor) -> Tensor:
    for name in (wiring.on_h, wiring.linears[-1], wiring.on_y):
        if name:
            h = getattr(module, name)(h)
    return h


@dataclass(frozen=True)
class Others:
    """What a module has beside its Linears."""

    held: str | None  # the attribute of the activation
    known: list[str]  # what that may be; all, where it is no attribute
    dropouts: list[str]

    def places(self) -> list[tuple[str | None, str | None]]:
        """The (on_h, on_y) to try."""
        names = (None, *self.dropouts)
        return [(on_h, on_y) for on_h in reversed(names) for on_y in names]


def others_of(module: nn.Module, linears: Sequence[str]) -> Others | str:
    """The parts of an MLP with these Linears, or the reason why it is none."""
    if reason := reason_to_leave(module, next(module.parameters(), None)):
        return reason
    others = {k: m for k, m in module.named_children() if k not in linears}
    others |= {k: v for k, v in vars(module).items() if callable(v) and not k.startswith("_")}
    dropouts = [k for k, m in others.items() if type(m) is nn.Dropout]
    acts = [k for k in others if k not in dropouts]
    own = [k for k, _ in itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))]
    if own or len(acts) > 1 or len(dropouts) > 2:
        return f"it has more parts than its Linears, an activation and dropouts: {', '.join((*others, *own))}"
    known: list[str] = list(ACTIVATIONS)
    for name in acts:
        if isinstance(others[name], nn.Module) and (has_hooks(others[name]) or "forward" in vars(others[name])):
            return f"its activation {name} has hooks or a replaced forward, which would not run"
        known = [k for k, f in ACTIVATIONS.items() if same_activation(others[name], f)]
        if not known:
            return f"its activation {name} is not one of {', '.join(ACTIVATIONS)}"
    return Others(next(iter(acts), None), known, dropouts)


def choose(candidate: Candidate, wirings: Iterable[AnyWiring], others: Others, formula: str) -> str | None:
    """Gives the candidate the first wiring that computes what its module computes; else says why the nearest does not."""
    nearest = (-1, "")
    proven, same = candidate.parts["proven"], kind(candidate.module)
    for wiring in wirings:
        if (failed := _differs(candidate.module, wiring)) is None:
            if (same, wiring) not in proven:
                proven[same, wiring] = _elsewhere(candidate.module, wiring)
            if reason := proven[same, wiring]:
                return f"its forward is not {formula} for all inputs: {reason}"
            candidate.parts |= {"wiring": wiring, "covers": (others.held,) if others.held else ()}
            return None
        nearest = max(nearest, failed, key=lambda f: f[0])
    return f"its forward is not {formula}: {nearest[1]}"


def install(candidate: Candidate) -> None:
    wiring: AnyWiring = candidate.parts["wiring"]
    proof = Proof(candidate, unseen=(wiring.held,) if wiring.held else ())
    casts = _may_cast(candidate.module)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if casts and (odd := _mixed(self, wiring, x)):
            proof.say(self, odd)
            result: Tensor = stock(self, x)
            return result
        return wiring(self, x)

    replace(candidate.module, CODES, Codes())
    replace_unary_forward(candidate.module, forward, proof)


def _dtype(linear: nn.Module) -> torch.dtype | None:
    """Of its weight, which nobody reads: that of an adapter comes behind it."""
    return next((p.dtype for p in linear.parameters() if p.is_floating_point()), None)


def _may_cast(*modules: nn.Module) -> bool:
    words = [mentioned(module) for module in modules]
    return any(word in said for said in words for word in CASTS)


def _mixed(module: nn.Module, wiring: AnyWiring, x: Tensor) -> str | None:
    """Where the dtypes are not all one, a forward that may cast between its Linears is its own affair."""
    linears = [getattr(module, name) for name in wiring.linears]
    if not all(isinstance(linear, nn.Module) for linear in linears):
        return "its forward may cast, and one of its Linears is no module"
    dtypes = {dtype for linear in linears if (dtype := _dtype(linear)) is not None}
    if not torch.is_autocast_enabled(x.device.type):
        dtypes.add(x.dtype)
    return f"its forward may cast, and its dtypes differ ({', '.join(sorted(map(str, dtypes)))})" if len(dtypes) > 1 else None


CASES = tuple(
    itertools.product((torch.float64, None, *DTYPES), (True, False))
)  # of the probe: dtypes, None for the own; training


class Bent(nn.Module):
    """Stands in for a dropout in a probe: commutes with positive factors, as a dropout does, and else with nothing that it
    meets in an MLP, so its place shows."""

    def __init__(self, bend: float) -> None:
        super().__init__()
        self.bend = bend

    def forward(self, x: Tensor) -> Tensor:
        return x - self.bend * x.abs()


def is_linear(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _differs(module: nn.Module, wiring: AnyWiring) -> tuple[int, str] | None:
    """In which case and how `wiring` differs from the module's own forward, or None: with drawn Linears and pre-activations
    all over the grid, training and not; in fp64, in the module's own dtypes, and in all that a forward may ask for."""
    others = [m for name, m in module.named_children() if name not in wiring.linears]
    for case, (narrow, training) in enumerate(CASES if _may_cast(module, *others) else CASES[:4]):
        copy, dtypes = _stand_in(module, wiring, narrow)
        called = list[str]()
        for name in wiring.linears:
            getattr(copy, name).register_forward_pre_hook(lambda *_, name=name: called.append(name))  # noqa: B023
        copy.training = training
        leaves = list(copy.parameters())
        first = getattr(module, wiring.linears[0])
        x = torch.randn(ROWS, first.in_features, device=floating_parameter(module).device).to(dtypes[0]).requires_grad_()
        try:
            theirs = value_and_gradients(lambda: own_forward(copy, x), [x, *leaves])  # noqa: B023
        except Writes as error:
            return len(CASES), str(error)
        except Exception as error:
            return case, f"it does not call its Linears as modules ({type(error).__name__}: {error})"
        try:
            ours = value_and_gradients(lambda: wiring(copy, x), [x, *leaves])  # noqa: B023
        except TypeError as error:
            return case, f"it casts between its Linears ({error})"
        worst = max(distance(a, b) for a, b in zip(ours, theirs, strict=True))
        if worst > max(SAME, *(8 * torch.finfo(dtype).eps for dtype in dtypes)):
            return case, f"results differ by {worst:.1e} in {dtypes[0]}"
        half = len(called) // 2
        if called[:half] != called[half:]:
            return case, "it calls its Linears in another order"
    return None


def _stand_in(
    module: nn.Module, wiring: AnyWiring, dtype: torch.dtype | None, part: int = 1
) -> tuple[nn.Module, list[torch.dtype]]:
    """A twin with drawn Linears, of one part of their widths, and their dtypes: `dtype`, or without it their own."""
    like = floating_parameter(module)
    children: dict[str, nn.Module] = {
        k: Bent(1 / (i + 3)) if type(m) is nn.Dropout else twin(m)
        for i, (k, m) in enumerate(module.named_children())
        if k not in wiring.linears
    }
    dtypes = []
    for name in wiring.linears:
        linear = getattr(module, name)
        dtypes.append(dtype or _dtype(linear) or like.dtype)
        children[name] = Drawn(linear, GRID if name == wiring.linears[0] else 1.0, dtypes[-1], like.device, part)
    return twin(module, **children), dtypes


def _elsewhere(module: nn.Module, wiring: AnyWiring) -> str | None:
    """How `wiring` differs from the module's own forward in other shapes, modes and numbers, and for many rows; or None."""
    copy, dtypes = _stand_in(module, wiring, None)
    width = getattr(copy, wiring.linears[0]).in_features

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=floating_parameter(module).device)

    reason = differs_in_use(copy, wiring, usual(draw, width), dtypes[0], MODES)
    odd = unusual(draw, width, torch.float16)[:-2]  # at infinities ours gives limits, and theirs NaN in part
    single, _ = _stand_in(module, wiring, torch.float32)  # float16 would overflow, and differ in what is barely finite
    reason = reason or differs_in_use(single, wiring, odd, torch.float32)
    if reason is None:
        common = math.gcd(*(n for name in wiring.linears for n in _sizes(getattr(module, name))))
        part = common // math.gcd(common, 8)
        narrow, _ = _stand_in(module, wiring, torch.float32, part)
        if not takes(narrow, draw(2, width // part)):  # it knows its widths
            narrow = single
        widths = [n for name in wiring.linears for n in _sizes(getattr(narrow, name))]
        first = getattr(narrow, wiring.linears[0]).in_features
        rows = [n for n in lengths(module) if n * max(widths) <= MOST]
        many = [draw(*shape, first) for n in rows for shape in ((n,), (1, n))]
        reason = differs_in_use(narrow, wiring, many, torch.float32, (PLAIN, NO_GRAD))
    return reason


def _sizes(linear: Any) -> tuple[int, int]:
    return linear.in_features, linear.out_features
