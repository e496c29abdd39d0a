"""What probes share: copies that nothing can leak out of, and the comparison of values and gradients."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unswag.torch.patterns.pattern import METHODS, RECORD, stock_class

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def sealed() -> Iterator[None]:
    """Probes run in here: gradients on, autocast off, no warnings; the random state afterwards is the one before."""
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
        # Not torch.manual_seed: it leaves word to seed a CUDA that starts later, which nothing here could take back.
        torch.default_generator.manual_seed(0)
        if cuda:
            torch.cuda.manual_seed_all(0)
        yield


def twin(module: nn.Module, **replaced: Any) -> nn.Module:
    """A shallow copy of `module` in which the named children and parameters are others. It has no hooks, its buffers
    are copies, and its forward is that of the class."""
    cls = stock_class(module)
    copy = cls.__new__(cls)
    copy.__dict__.update({k: v for k, v in module.__dict__.items() if k not in (RECORD, METHODS, "forward")})
    copy.__dict__.update({hooks: OrderedDict() for hooks in HOOKS})
    copy._buffers = {k: b if b is None else b.clone() for k, b in module._buffers.items()}
    copy._parameters = {k: replaced.get(k, p) for k, p in module._parameters.items()}
    copy._modules = {k: replaced.get(k, m) for k, m in module._modules.items()}
    return copy


def kind(module: nn.Module) -> Hashable:
    """Equal for modules that run the same code with the same settings on tensors of the same shapes: everything but the values
    of parameters and buffers. What cannot be compared by value (a function, a config) is the same object or another kind;
    compare while the modules live, and nobody changes them."""
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


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in HOOKS)


def takes_one_argument(module: nn.Module) -> bool:
    """Whether `module.forward` takes one tensor and nothing else."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return len(parameters) == 2 and all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def ignores_the_mean(module: nn.Module, like: Tensor) -> bool:
    """Whether y of x + 8 is y of x: a LayerNorm, with or without weight and bias, and not an RMSNorm. False where it cannot be
    seen: for a forward that raises, or gives another shape, and where there is nothing to see."""
    vectors = dict(module.named_parameters(recurse=False))
    cols = next((v.shape[-1] for v in vectors.values() if v.ndim), getattr(module, "normalized_shape", (8,))[-1])
    if like.is_meta or cols < 2:
        return False
    try:
        ones = {name: nn.Parameter(torch.ones_like(v)) for name, v in vectors.items()}
        x = (torch.arange(2 * cols, device=like.device) % 7 - 3).reshape(2, cols)  # small integers: exact in every format
        with torch.no_grad():
            low, high = (type(module).forward(twin(module, **ones), v.to(like.dtype)) for v in (x, x + 8))
            return low.shape == x.shape and bool((low - high).abs().max() <= 0.03 * low.abs().max())
    except Exception:  # whatever a stranger's forward does on two rows, or a device that is not there
        return False


def value_and_gradients(f: Callable[[], Tensor], leaves: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """[y, dleaf, …] of y = f() for a random dy, a zero gradient where y does not depend on a leaf. `.grad` stays as it is."""
    y = f()
    generator = torch.Generator(y.device).manual_seed(seed)
    dy = torch.randn(y.shape, dtype=torch.float32, device=y.device, generator=generator).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)]


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
