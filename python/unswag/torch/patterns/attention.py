"""Attention: memory linear in the sequence, for padded and packed batches too (`unswag.torch.attention` computes it).

Transformers chooses attention functions and masks by a name in a config, and a config is shared: other models are built from
it, it is pickled and saved. So nothing is written there. Instead the functions that choose, and they alone, find another name
when they read `self.config`: the same config, by reference, seen as an object of a class derived from its own. It does not
matter which of them read the other name: our attention takes stock's masks, and our masks become what stock's attention wants.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from unswag.torch.attention import NAME, register
from unswag.torch.patterns.pattern import (
    Candidate,
    cannot_operate,
    floating_parameter,
    replace_view,
    stock_class,
    wrap_method,
)

UNNAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
LINEAR = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


class Attention:
    name = "attention"
    role = "attention"
    saves = "q, k, v, the output and lse; stock adds tokens x tokens for padded and packed batches, and for dropout on CPUs"

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        seen: list[Any] = []
        classes: set[Any] = {stock_class(module) for module in model.modules()}
        if not any(map(attends, classes)):
            return
        for name, module in model.named_modules():
            config = getattr(module, "config", None)
            if hasattr(module, "set_attn_implementation") and not any(config is other for other in seen):
                seen.append(config)
                configs = {id(vars(m).get("config")): vars(m).get("config") for m in model.modules()}.values()
                parts = {
                    "holders": [m for m in model.modules() if vars(m).get("config") is config],
                    "nested": any(part is config for whole in configs for part in getattr(whole, "__dict__", {}).values()),
                }
                yield Candidate(name, module, parts)

    def probe(self, candidate: Candidate) -> str | None:
        module: Any = candidate.module
        now = module.config._attn_implementation
        if now in LINEAR:
            return f"{now} already needs memory linear in the sequence"
        if now not in ("sdpa", "eager"):
            return f"its attention implementation is {now!r}, which UnSwag does not support"
        models = [m for m in candidate.parts["holders"] if hasattr(m, "set_attn_implementation")]
        parts = (part for m in models for part in m.modules())
        softcap = next((p.attn_logit_softcapping for p in parts if getattr(p, "attn_logit_softcapping", None)), None)
        # of a nested config a larger model may build the masks, under the name that it reads there; flash-attn wants its own
        wanted = "flash_attention_2" if _flash_attention_runs(module) and not candidate.parts["nested"] else NAME
        if softcap and wanted == NAME:
            return f"its scores have a soft cap ({softcap:g}), which scaled_dot_product_attention does not support"
        if not all(m._can_set_attn_implementation() and m._supports_sdpa for m in models):
            return "its code does not take its attention function from transformers' registry, so it cannot be replaced"
        if wanted == NAME and (where := next((w for m in models for w in map(asks_for_sdpa, homes(m)) if w), None)):
            return f'its code ({where}) behaves differently when its attention implementation is not called "sdpa"'
        if now == "eager":  # which somebody asked for: transformers takes "sdpa" wherever a model has it
            return (
                "it was loaded with attn_implementation='eager', the only one that returns attention weights; if you do not "
                "need them, call model.set_attn_implementation('sdpa') before the surgery"
            )
        candidate.parts["implementation"] = wanted
        return None

    def apply(self, candidate: Candidate) -> None:
        register()
        view = View(candidate.module.config, candidate.parts["implementation"])
        for module in candidate.parts["holders"]:
            if view.places_in(stock_class(module)) and cannot_operate(module) is None:
                replace_view(module, "config", view)


ATTENDS = re.compile(r"softmax|scaled_dot_product|ATTENTION_FUNCTIONS|flash_attn|flex_attention|baddbmm")


@functools.cache
def attends(cls: Any) -> bool:
    """Whether the code of a class computes attention, or may: a network of convolutions has none to be replaced or left."""
    if issubclass(cls, (nn.MultiheadAttention, nn.Softmax)):
        return True
    own = (c for c in cls.__mro__ if c.__module__.partition(".")[0] not in ("torch", "builtins"))
    members = (member for c in own if c.__module__ != "transformers.modeling_utils" for member in vars(c).values())
    parts = (part for function in filter(None, map(_function_of, members)) for part in _with_inner(function.__code__))
    return any(ATTENDS.search(name) for part in parts for name in part.co_names)


# ---- the choice -------------------------------------------------------------------------------------------------------------


class View:
    """What `module.config` is on an operated model, for `replace_view`: where the attention is chosen, the same config with the
    attention called `wanted`; anywhere else, and once somebody has chosen or registered another one, the config itself."""

    def __init__(self, config: Any, wanted: str) -> None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.config, self.wanted, self.named = config, wanted, config._attn_implementation
        self.registries = ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
        self.means = self._meaning()
        self.places: dict[type, frozenset[types.CodeType]] = {}
        self.seen = _renamed(config, wanted)

    def places_in(self, cls: type[nn.Module]) -> frozenset[types.CodeType]:
        if cls not in self.places:
            self.places[cls] = choosing_code(cls)
        return self.places[cls]

    def __call__(self, module: nn.Module, config: Any) -> Any:
        chooses = torch.compiler.is_compiling() or sys._getframe(2).f_code in self.places.get(stock_class(module), ())
        if chooses and config is self.config and config._attn_implementation == self.named and self._meaning() == self.means:
            return self.seen
        return config

    def _meaning(self) -> list[Any]:
        """What transformers has registered under the name of the config's attention, as anybody may do anew."""
        return [registry.get(self.named) for registry in self.registries]

    def __deepcopy__(self, memo: dict[int, Any]) -> View:
        made = copy.copy(self)
        made.config = copy.deepcopy(self.config, memo)
        made.seen = _renamed(made.config, self.wanted)
        return made


def _renamed(config: Any, wanted: str) -> Any:
    stock: Any = type(config)
    seen: Any = object.__new__(_renamed_class(stock, wanted))
    seen.__dict__ = config.__dict__
    return seen


@functools.cache
def _renamed_class(stock: Any, wanted: str) -> type:
    about = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    name = property(lambda self: wanted, lambda self, value: stock._attn_implementation.fset(self, value))
    return type(stock.__name__, (stock,), about | {"_attn_implementation": name})


CHOOSING = re.compile(r"attn_implementation$|^create_\w*mask|^ALL_(MASK_)?ATTENTION_FUNCTIONS$|^is_flash_attention_requested$")


def choosing_code(cls: type[nn.Module]) -> frozenset[types.CodeType]:
    """The code in a class that chooses attention functions or masks. What PreTrainedModel has sets and checks the name."""
    found: list[types.CodeType] = []
    for c in cls.__mro__:
        if c.__module__.partition(".")[0] in ("torch", "builtins") or c.__module__ == "transformers.modeling_utils":
            continue
        for function in filter(None, map(_function_of, vars(c).values())):
            parts = list(_with_inner(function.__code__))
            if function.__name__ != "__init__" and any(CHOOSING.search(name) for part in parts for name in part.co_names):
                found += parts
    if found:
        from transformers.integrations.flash_attention import flash_attention_forward

        found.append(flash_attention_forward.__code__)  # reads the name from the module that calls it
    return frozenset(found)


def _function_of(member: Any) -> types.FunctionType | None:
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    member = inspect.unwrap(member) if isinstance(member, types.FunctionType) else None
    return member if isinstance(member, types.FunctionType) else None


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _with_inner(inner)


def homes(model: nn.Module) -> dict[str, None]:
    """The Python modules of its classes, those of torch and the general ones of transformers aside."""
    names = dict.fromkeys(cls.__module__ for m in model.modules() for cls in type(m).__mro__)
    apart = ("torch", "builtins", "transformers")
    return {n: None for n in names if n.partition(".")[0] not in apart or n.startswith("transformers.models.")}


@functools.cache
def asks_for_sdpa(home: str) -> str | None:
    """The function in that Python module that knows both "sdpa" and the attribute with the implementation's name, or None. It
    compares them: sparse attention, for one, folds its choice of keys into the mask for "eager" and "sdpa" only."""
    found = list(vars(sys.modules[home]).values()) if home in sys.modules else []
    classes = [c for c in found if inspect.isclass(c) and c.__module__ == home]
    for member in (*found, *(m for c in classes for m in vars(c).values())):
        function = _function_of(member)
        if function is not None and function.__module__ == home and any(map(_knows_both, _with_inner(function.__code__))):
            return function.__qualname__
    return None


def _knows_both(code: types.CodeType) -> bool:
    words = [w for c in code.co_consts for w in (c if isinstance(c, (tuple, frozenset)) else (c,))]
    names = (*code.co_names, *code.co_varnames, *code.co_freevars)
    return "sdpa" in words and any(n.endswith("attn_implementation") for n in names)


def _flash_attention_runs(module: nn.Module) -> bool:
    like = floating_parameter(module)
    half = like.dtype in (torch.float16, torch.bfloat16)
    return (
        half
        and like.is_cuda
        and getattr(module, "_supports_flash_attn", False)
        and importlib.util.find_spec("flash_attn") is not None
    )


# ---- caches -----------------------------------------------------------------------------------------------------------------
def leave_caches_out(model: nn.Module) -> None:
    """Makes the models of transformers in `model` compute packed rows without a cache. Transformers tells the sequences of a
    row apart only without one, and makes one by default."""
    for module in model.modules():
        if hasattr(type(module), "set_attn_implementation") and cannot_operate(module) is None:
            parameters = inspect.signature(module.forward).parameters
            by_name = {p.kind for p in parameters.values()}.isdisjoint(UNNAMED)
            if "use_cache" in parameters and by_name:
                wrap_method(module, "forward", functools.partial(_without_cache, list(parameters)))


def _without_cache(names: list[str], inner: Callable[..., Any], self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    given = dict(zip(names, args, strict=False)) | kwargs
    use_cache, positions = given.get("use_cache"), given.get("position_ids")
    alone = given.get("past_key_values") is None and given.get("attention_mask") is None
    if use_cache is False or positions is None or not alone or not _start_again(positions):
        return inner(self, *args, **kwargs)
    if use_cache:
        warnings.warn(
            "unswag: use_cache=True is ignored for packed rows (position_ids restart at 0 within a row), because with a cache "
            "their sequences would attend to each other; past_key_values is None",
            stacklevel=3,
        )
    return inner(self, **given | {"use_cache": False})


def _start_again(positions: Tensor) -> bool:
    """Whether positions [batch, length] are those of packed rows."""
    if positions.ndim == 3 and len(positions) == 4:  # those of text, then time, height and width of images
        positions = positions[0]
    if positions.ndim > 2 or is_fake(positions):
        return False
    return bool((positions[..., 1:] == 0).any())
