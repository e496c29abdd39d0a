"""Helpers of the probes: isolated copies of modules, and the comparison of values and gradients."""

from __future__ import annotations

import collections
import copy
import inspect
import itertools
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unswag.torch.patterns.pattern import HOOKS, METHODS, RECORD, stock_class


@contextmanager
def sealed() -> Iterator[None]:
    """The context in which probes run: gradients on, autocast off, no warnings. Restores the random state."""
    cuda = torch.cuda.is_initialized()
    devices = list(range(torch.cuda.device_count())) if cuda else []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        # Not torch.manual_seed: it would also seed CUDA if that is initialised later, which cannot be undone here.
        torch.default_generator.manual_seed(0)
        if cuda:
            torch.cuda.manual_seed_all(0)
        yield


def twin(module: nn.Module, **replaced: Any) -> nn.Module:
    """A copy of `module` in which the named children and parameters are replaced. It shares nothing that a forward could write
    to: tensors, containers, plain objects and the other children are copies too. It has no hooks, and its forward is that of
    the class. ValueError for a parametrized module: reading it may change it."""
    return _twin(module, replaced, {}, LARGE)


def whole_twin(module: nn.Module, parameters: dict[int, Tensor]) -> tuple[nn.Module, dict[int, Any]]:
    """As `twin`, with all that is in `module`, whatever its size; `parameters` says by the identity of a parameter what takes
    its place. Also returns what stands for which object of the module, by its identity."""
    seen: dict[int, Any] = dict(parameters)
    return _twin(module, {}, seen, None), seen


LARGE = 1 << 22  # elements: a module with more is not run by a probe, only referred to, and stays shared


def _twin(module: nn.Module, replaced: dict[str, Any], seen: dict[int, Any], most: int | None) -> nn.Module:
    if nn.utils.parametrize.is_parametrized(module):
        raise ValueError(f"a {type(module).__name__} is parametrized: reading its parameters may change its state")
    cls = stock_class(module)
    made = cls.__new__(cls)
    seen[id(module)] = made
    for base in reversed(_own_classes(module)):  # also what the class holds for all its instances
        shared = {k: v for k, v in vars(base).items() if type(v) in (list, dict, set) and not k.startswith("__")}
        made.__dict__.update({k: _unshared(v, seen, most) for k, v in shared.items()})
    left_out = (RECORD, METHODS, "forward", "_parameters", "_buffers", "_modules", *HOOKS)
    made.__dict__.update({k: _unshared(v, seen, most) for k, v in module.__dict__.items() if k not in left_out})
    made.__dict__.update({hooks: OrderedDict() for hooks in HOOKS})
    made._buffers = {k: _unshared(b, seen, most) for k, b in module._buffers.items()}
    made._parameters = {k: replaced[k] if k in replaced else _unshared(p, seen, most) for k, p in module._parameters.items()}
    made._modules = {k: replaced[k] if k in replaced else _unshared(m, seen, most) for k, m in module._modules.items()}
    return made


def _unshared(value: Any, seen: dict[int, Any], most: int | None, depth: int = 4) -> Any:
    """What a twin gets for `value`: a copy, or for an unknown type the value itself."""
    if id(value) in seen:
        return seen[id(value)]
    made = value
    if isinstance(value, nn.Module):
        if most is None or sum(p.numel() for p in value.parameters()) <= most:
            made = _twin(value, {}, seen, most)
    elif type(value) is nn.Parameter:
        made = nn.Parameter(value.detach().clone(), value.requires_grad)
    elif type(value) is Tensor:
        made = value.detach().clone().requires_grad_(value.requires_grad)
    elif depth == 0:
        return value
    elif isinstance(value, dict):
        seen[id(value)] = made = copy.copy(value)
        made.update({k: _unshared(v, seen, most, depth - 1) for k, v in value.items()})
    elif isinstance(value, (list, collections.deque)):
        seen[id(value)] = made = copy.copy(value)
        made.clear()
        made.extend(_unshared(v, seen, most, depth - 1) for v in value)
    elif type(value) is tuple:
        made = tuple(_unshared(v, seen, most, depth - 1) for v in value)
    elif isinstance(value, (set, bytearray, itertools.count)):
        made = copy.copy(value)
    elif _is_plain_object(value):
        seen[id(value)] = made = copy.copy(value)
        vars(made).update({k: _unshared(v, seen, most, depth - 1) for k, v in vars(value).items()})
    seen[id(value)] = made
    return made


def _is_plain_object(value: Any) -> bool:
    """Whether it is an object of a class written in Python that does not customise how it is copied."""
    cls = type(value)
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and not callable(value)
        and not isinstance(value, (type, types.ModuleType))
        and cls.__reduce_ex__ is object.__reduce_ex__
        and cls.__reduce__ is object.__reduce__
        and not hasattr(cls, "__slots__")
        and not hasattr(cls, "__copy__")
    )


OTHER = object()


class Writes(Exception):
    """A forward writes to its module, which a replacement would not."""


def own_forward(module: nn.Module, *args: Any, method: str = "forward") -> Any:
    """The result of a twin's own forward. Raises Writes if it changes the twin or its class; the class is restored."""
    before, classes = _state(module), [(cls, dict(vars(cls))) for cls in _own_classes(module)]
    try:
        return getattr(stock_class(module), method)(module, *args)
    finally:
        changed = {name for name, _ in before.items() ^ _state(module).items()}
        for cls, had in classes:
            for name in {k for k, v in vars(cls).items() if had.get(k, OTHER) is not v} | (had.keys() - vars(cls).keys()):
                changed.add(name)
                setattr(cls, name, had[name]) if name in had else delattr(cls, name)
        if changed:
            raise Writes(f"its {method} writes to its {', '.join(sorted(changed))}, which the replacement would not")


def _own_classes(module: nn.Module) -> list[type]:
    """The classes whose attributes a forward may use as its module's own. Those of torch have none."""
    mro = stock_class(module).__mro__
    return [cls for cls in mro if cls not in nn.Module.__mro__ and not cls.__module__.startswith(("torch.", "builtins"))]


def _state(module: nn.Module, prefix: str = "") -> dict[str, Hashable]:
    """What a forward could change in a module and its children, by name; equal as long as nothing changes."""
    state: dict[str, Hashable] = {}
    for k, v in vars(module).items():
        if k == "_modules":
            for name, child in v.items():
                state |= {} if child is None else _state(child, f"{prefix}{name}.")
        elif k in ("_parameters", "_buffers"):
            state |= {prefix + name: _mark(value) for name, value in v.items()}
        elif k not in HOOKS:
            state[prefix + k] = _mark(v)
    return state


def _mark(value: Any, depth: int = 4) -> Hashable:
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, (int, float, str, bool, type(None))):
        return type(value), value
    if depth == 0:
        return id(value)
    if isinstance(value, dict):
        return id(value), tuple((_mark(k, 1), _mark(v, depth - 1)) for k, v in value.items())
    if isinstance(value, (list, tuple, collections.deque)):
        return id(value), tuple(_mark(v, depth - 1) for v in value)
    if isinstance(value, (set, frozenset)):
        return id(value), frozenset(_mark(v, 1) for v in value)
    if isinstance(value, (bytearray, itertools.count)):
        return id(value), repr(value)
    if _is_plain_object(value):
        return id(value), tuple((k, _mark(v, depth - 1)) for k, v in vars(value).items())
    return id(value)


def kind(module: nn.Module) -> Hashable:
    """Equal for modules that run the same code with the same settings on tensors of the same shapes: everything but the values
    of parameters and buffers. What cannot be compared by value (a function, a config) is compared by identity, so
    compare kinds only while the modules exist and do not change."""
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    return (
        tuple((name, type(m), _settings(m)) for name, m in module.named_modules()),
        tuple((name, type(t), t.shape, t.dtype, t.device) for name, t in tensors),
    )


def _settings(module: nn.Module) -> Hashable:
    return tuple((k, setting(v)) for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules"))


def setting(value: Any) -> Hashable:
    """`value`, to be compared as in `kind`."""
    if isinstance(value, dict):
        return tuple((k, setting(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(setting, value))
    if isinstance(value, (set, frozenset)):
        return frozenset(map(setting, value))
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
        return type(value), value
    return id(value)


# ---- a stand-in for Linears -------------------------------------------------------------------------------------------------


class Drawn(nn.Module):
    """Stands in for a Linear of any kind (LoRA, 4-bit, sharded) in a probe: y[j] = x[index[j]] scale[j] + shift[j]. It has
    the shapes of the Linear it stands for, or a part of them, and costs next to nothing at any size. Only the dtype of its
    weight can be read."""

    def __init__(self, linear: Any, shifts: float, dtype: torch.dtype, device: torch.device, part: int = 1) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features // part, linear.out_features // part
        n = self.out_features
        self.index = torch.randint(self.in_features, (n,), device=device)
        self.scale = nn.Parameter(torch.randn(n, device=device).to(dtype))
        self.shift = nn.Parameter(
            (shifts * torch.linspace(-1, 1, n, device=device)[torch.randperm(n, device=device)]).to(dtype)
        )

    @property
    def weight(self) -> Tensor:
        return self.scale.detach().as_subclass(Unread)

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.scale
        shift: Tensor = self.shift
        if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, scale.dtype):
            x, scale, shift = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, scale, shift))
        if x.dtype != scale.dtype:
            raise TypeError(f"a Linear of {scale.dtype} got {x.dtype}")
        return x[..., self.index] * scale + shift


class Unread(Tensor):
    """A weight of which only the dtype may be read."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function != Tensor.dtype.__get__:  # type: ignore[attr-defined]
            raise TypeError("it reads the weight of a Linear")
        return super().__torch_function__(function, types, args, kwargs or {})


# ---- what a module is -------------------------------------------------------------------------------------------------------


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in HOOKS)


def takes_one_argument(module: nn.Module) -> bool:
    """Whether `module.forward` takes one tensor and nothing else."""
    try:
        parameters = inspect.signature(stock_class(module).forward).parameters.values()
    except (TypeError, ValueError):  # not a Python function
        return False
    return len(parameters) == 2 and all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def ignores_the_mean(module: nn.Module, like: Tensor) -> bool:
    """Whether x + 8 and x give the same y, as for a LayerNorm, with or without weight and bias, and not for an RMSNorm. False
    if this cannot be tested: the forward raises or changes the shape, x is on the meta device, or there is one column."""
    vectors = dict(module.named_parameters(recurse=False))
    cols = next((v.shape[-1] for v in vectors.values() if v.ndim), getattr(module, "normalized_shape", (8,))[-1])
    if like.is_meta or cols < 2:
        return False
    try:
        ones = {name: nn.Parameter(torch.ones_like(v)) for name, v in vectors.items()}
        x = (torch.arange(2 * cols, device=like.device) % 7 - 3).reshape(2, cols)  # small integers: exact in every format
        with torch.no_grad():
            low, high = (own_forward(twin(module, **ones), v.to(like.dtype)) for v in (x, x + 8))
            return low.shape == x.shape and bool((low - high).abs().max() <= 0.03 * low.abs().max())
    except Exception:  # whatever an unknown forward raises on two rows, or a missing device
        return False


def value_and_gradients(f: Callable[[], Tensor], leaves: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """[y, dleaf, …] of y = f() for a random dy, a zero gradient where y does not depend on a leaf. `.grad` is not changed."""
    y = f()
    generator = torch.Generator(y.device).manual_seed(seed)
    dy = torch.randn(y.shape, dtype=torch.float32, device=y.device, generator=generator).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)]


# ---- calls in practice ------------------------------------------------------------------------------------------------------


def takes(module: nn.Module, x: Tensor) -> bool:
    """Whether the own forward of a twin accepts x."""
    try:
        own_forward(module, x)
    except Exception:
        return False
    return True


PLAIN, NO_GRAD, INFERENCE, FROZEN = "", "without gradients", "in inference mode", "where nothing needs a gradient"
AUTOCAST = "under autocast"
MODES = (PLAIN, NO_GRAD, INFERENCE, FROZEN, AUTOCAST)  # in which a module is called
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (5,), (1, 1), (2, 3), (2, 1, 3))  # of x, before its last dimension
LARGE_SCALES = (1e3, 1e4, 1e6)  # of x
LOOSE = 1e-4  # a different path differs by more than rounding


def usual(draw: Callable[..., Tensor], cols: int) -> list[Tensor]:
    """Inputs of all shapes, and one that is not contiguous."""
    return [*(draw(*shape, cols) for shape in SHAPES), draw(cols, 5).T]


def unusual(draw: Callable[..., Tensor], cols: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs with large values, up to the largest of the dtype, with a row of zeros, and with a NaN or an infinity in a row."""
    most = min(torch.finfo(d).max for d in (dtype, torch.float32))
    large = [(scale * draw(4, cols)).clamp(-most, most) for scale in LARGE_SCALES]
    zeros, *odd = (draw(3, cols) for _ in range(4))
    zeros[1] = 0
    for x, value in zip(odd, (float("nan"), float("inf"), -float("inf")), strict=True):
        x[1, cols // 2] = value
    return [*large, zeros, *odd]


def differs_in_use(
    copy: nn.Module,
    ours: Callable[[nn.Module, Tensor], Tensor],
    inputs: Iterable[Tensor],
    dtype: torch.dtype,
    modes: Iterable[str] = (PLAIN,),
    method: str = "forward",
) -> str | None:
    """How `ours` differs from the own forward of a twin, or None: on these inputs in `dtype`, in these modes, in training and
    evaluation. Inputs that its own forward rejects are skipped."""
    for training, mode, x in itertools.product((True, False), modes, inputs):
        x, copy.training = x.to(dtype), training
        leaves = list(copy.parameters())
        where = " ".join(filter(None, (f"for {dtype} x of shape {list(x.shape)}", mode)))
        try:
            theirs = _results(mode, lambda x: own_forward(copy, x, method=method), x, leaves)
        except Writes as error:
            return str(error)
        except Exception:
            continue
        try:
            mine = _results(mode, lambda x: ours(copy, x), x, leaves)
        except Exception as error:
            return f"{where} the replacement raises {type(error).__name__}: {error}"
        worst = _apart(mine, theirs)
        if worst > max(LOOSE, *(32 * torch.finfo(t.dtype).eps for t in (x, *theirs, *leaves))):
            return f"results differ by {worst:.1e} {where}" + f" with values up to {x.abs().max():.0e}" * (x.numel() > 0)
    return None


def _results(mode: str, f: Callable[[Tensor], Tensor], x: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """[y, dx, dleaf, …] of y = f(x) in `mode`; [y] where that has no gradients."""
    if mode in (PLAIN, AUTOCAST):
        leaf = x.detach().requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=mode == AUTOCAST):
            return value_and_gradients(lambda: f(leaf), [leaf, *leaves])
    needed = [leaf for leaf in leaves if leaf.requires_grad and mode == FROZEN]
    try:
        for leaf in needed:
            leaf.requires_grad_(False)
        with torch.set_grad_enabled(mode == FROZEN), torch.inference_mode(mode == INFERENCE):
            return [f(x.clone())]
    finally:
        for leaf in needed:
            leaf.requires_grad_()


def _apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative distance of finite values; infinities must be equal. Where theirs is NaN, ours may be the limit:
    PyTorch's own silu(-inf) and its derivative are NaN. A tensor below a hundredth of the largest, as gelu(-5) may be, counts
    relative to that hundredth, because it may be mere rounding."""
    if any(
        a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a[b.isinf()], b[b.isinf()])
        for a, b in zip(ours, theirs, strict=True)
    ):
        return float("inf")
    finite = [
        (a.masked_fill(~b.isfinite(), 0).double(), b.masked_fill(~b.isfinite(), 0).double())
        for a, b in zip(ours, theirs, strict=True)
    ]
    norms = [b.norm().item() for _, b in finite]
    least = max(0.01 * max(norms), torch.finfo(torch.float32).tiny)
    errors = [(a - b).norm().item() / max(norm, least) for (a, b), norm in zip(finite, norms, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("inf")


def distance(ours: Tensor, theirs: Tensor) -> float:
    """‖ours - theirs‖ / ‖theirs‖ in fp64; inf for another shape or dtype, or where either is not finite."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    ours, theirs = ours.double(), theirs.double()
    error = ((ours - theirs).norm() / theirs.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
    return error if error == error else float("inf")


def ulps(ours: Tensor, theirs: Tensor) -> Tensor:
    """How many 16-bit floats lie between ours and theirs, element by element."""

    def ordered(t: Tensor) -> Tensor:  # sign and magnitude → two's complement, so that neighbours differ by one
        bits = t.contiguous().view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordered(ours) - ordered(theirs)).abs()
