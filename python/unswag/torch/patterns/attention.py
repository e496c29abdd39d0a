"""Attention: memory linear in the sequence, for padded and packed batches too.

Transformers' SDPA path gives every layer of a padded or packed batch a mask of tokens x tokens, and each keeps a copy in its
own dtype. Here such a batch is taken as a list of spans, each a plain SDPA call without a mask; what spans cannot say
(windows, custom masks) uses one boolean mask for the whole batch, and its attention is computed again in the backward. So is
attention with dropout on the CPU, where SDPA would keep tokens x tokens several times, with the draws of the forward.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from unswag.torch import stash
from unswag.torch.autograd import once_differentiable
from unswag.torch.patterns.pattern import Candidate, cannot_operate, replace_view, stock_class, wrap_method

NAME = "unswag"  # in transformers' registries of attention functions and masks
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
            return f"{now} is linear in memory already"
        if now not in ("sdpa", "eager"):
            return f"its attention is {now!r}, which UnSwag does not know"
        models = [m for m in candidate.parts["holders"] if hasattr(m, "set_attn_implementation")]
        parts = (part for m in models for part in m.modules())
        softcap = next((p.attn_logit_softcapping for p in parts if getattr(p, "attn_logit_softcapping", None)), None)
        # of a nested config a larger model may build the masks, under the name that it reads there; flash-attn wants its own
        wanted = "flash_attention_2" if _flash_attention_runs(module) and not candidate.parts["nested"] else NAME
        if softcap and wanted == NAME:
            return f"its scores have a soft cap ({softcap:g}), which scaled_dot_product_attention cannot compute"
        if not all(m._can_set_attn_implementation() and m._supports_sdpa for m in models):
            return "its code does not take another attention function"
        if wanted == NAME and (where := next((w for m in models for w in map(asks_for_sdpa, homes(m)) if w), None)):
            return f'its code ({where}) asks whether the attention is called "sdpa", and does something else under another name'
        if now == "eager":  # which somebody asked for: transformers takes "sdpa" wherever a model has it
            return (
                "it was loaded as 'eager', which alone gives attentions (the weights) to callers and hooks; where nobody needs "
                "them, call set_attn_implementation('sdpa') before the surgery"
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
#
# Transformers chooses attention functions and masks by a name in a config, and a config belongs to everybody: other models are
# built from it, it is pickled and saved. So nothing is written there. Instead the functions that choose, and they alone, find
# another name when they read `self.config`: the same config, by reference, seen as an object of a class derived from its own.
# Masks and attention agree whoever of the two does not read it so: each takes what stock's counterpart makes or wants.


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


def register() -> None:
    """Makes "unswag" known to transformers as an attention function and its masks. Changes no model."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


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
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    half = like.dtype in (torch.float16, torch.bfloat16)
    return (
        half
        and like.is_cuda
        and getattr(module, "_supports_flash_attn", False)
        and importlib.util.find_spec("flash_attn") is not None
    )


# ---- caches -----------------------------------------------------------------------------------------------------------------
def leave_caches_out(model: nn.Module) -> None:
    """Makes the models of transformers in `model` compute packed rows without a cache: transformers tells their sequences apart
    only then, while it makes one by default."""
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
            "unswag: use_cache=True, and position_ids start again at 0 within a row: packed rows are computed without a cache "
            "(past_key_values is None), because with one their sequences would see each other",
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


# ---- masks ------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Piece:
    """Queries [q0, q1) of a row attend to its keys [k0, k1): to all of them, or (causal) to those up to their own place."""

    row: int
    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool


class Spans:
    """A mask of tokens x tokens said in pieces, for all layers. A query in no piece attends to nothing: its output is zero.
    Code that wants a tensor (a slice, a method, an operator of torch) gets the boolean one, made when first asked for."""

    def __init__(self, pieces: Sequence[Piece], batch: int, length: int, make: Callable[[], Tensor]) -> None:
        self.pieces, self.batch, self.length = pieces, batch, length
        self._make = make
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        if self._tensor is None:
            self._tensor = self._make()
        return self._tensor

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, cls.tensor, (args, kwargs or {}))
        return function(*args, **kwargs)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | Spans | None:
    """Transformers' mask for "unswag": None where SDPA's causal flag says it all, `Spans` for padded and packed batches
    while training, else the boolean mask of "sdpa" ([batch, 1, q_length, kv_length])."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = mask_function or causal_mask_function

    def stock() -> Tensor | None:
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, function, attention_mask, **kwargs)

    training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    square = isinstance(q_offset, int) and q_offset == kv_offset == 0 and q_length == kv_length
    terms = _terms(function) if training and square else None
    if terms is None or (terms.packed is None and (attention_mask is None or bool(attention_mask.all()))):
        return stock()
    if is_fake(terms.packed):  # surgery's dry run of one sequence, whose positions have no values to say so
        return None if terms.causal and terms.window is None else stock()
    pieces = _pieces(terms, attention_mask, batch_size, q_length)
    return stock() if pieces is None else Spans(pieces, batch_size, q_length, stock)  # type: ignore[arg-type]


@dataclass
class Terms:
    """What a mask function of transformers is the intersection of, apart from padding."""

    causal: bool = False
    window: int | None = None
    packed: Tensor | None = None  # [batch, length], the number of each token's sequence


def _terms(function: Any) -> Terms | None:
    """Reads a mask function of transformers.masking_utils. None if any part of it is not known here."""
    terms = Terms()
    todo = [function]
    while todo:
        part = todo.pop()
        if getattr(part, "__module__", None) != "transformers.masking_utils":
            return None
        inside = inspect.getclosurevars(part).nonlocals
        match part.__qualname__.split(".")[0]:
            case "and_masks":
                todo += inside["mask_functions"]
            case "causal_mask_function":
                terms.causal = True
            case "bidirectional_mask_function":
                pass
            case "sliding_window_overlay" | "sliding_window_bidirectional_overlay":
                terms.window = min(inside["sliding_window"], terms.window or inside["sliding_window"])
            case "packed_sequence_mask_function":
                terms.packed = inside["packed_sequence_mask"]
            case "remap_positions_for_packed_sequence":  # within a sequence, positions differ as places do
                todo.append(inside["mask_function"])
            case _:
                return None
    return terms


def _pieces(terms: Terms, real: Tensor | None, batch: int, length: int) -> list[Piece] | None:
    """The mask in pieces; None where it cannot be: a window shorter than a sequence, or padding between its tokens."""
    ids = torch.zeros(batch, length, dtype=torch.long, device="cpu") if terms.packed is None else terms.packed.cpu()
    kept = torch.ones(batch, length, dtype=torch.bool, device="cpu") if real is None else real.bool().cpu()
    pieces = []
    for row in range(batch):
        cuts = (torch.diff(ids[row]) != 0).nonzero().flatten().add(1).tolist()
        for start, stop in pairwise([0, *cuts, length]):
            if terms.window is not None and stop - start > terms.window:
                return None
            tokens = kept[row, start:stop].nonzero().flatten()
            if not len(tokens):
                continue
            first, last = start + int(tokens[0]), start + int(tokens[-1]) + 1
            if last - first != len(tokens):
                return None
            if not terms.causal:
                pieces.append(Piece(row, start, stop, first, last, causal=False))
                continue
            pieces.append(Piece(row, first, last, first, last, causal=True))
            if last < stop:  # the padding behind a sequence sees all of it, as in stock
                pieces.append(Piece(row, last, stop, first, last, causal=False))
    return pieces


# ---- attention --------------------------------------------------------------------------------------------------------------
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Spans | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function "unswag". query [batch, heads, length, dim]; key and value may have fewer heads.
    Returns [batch, length, heads, dim] and no weights.

    Saved: without a mask and with `Spans` what SDPA saves (q, k, v, output, lse); with a boolean mask q, k, v and the one mask
    (the attention is computed again in the backward, because SDPA would keep its own copy of the mask in q's dtype). With
    dropout on the CPU q, k, v, the mask if there is one, and the state of the generator: 5 KB per layer."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    stash.plays("attention", query, key, value)
    causal = attention_mask is None and query.shape[2] > 1
    if (attention_mask is None or isinstance(attention_mask, Spans)) and not takes_groups(query, key, value, dropout, causal):
        key, value = (for_all_heads(t, query.shape[1]) for t in (key, value))
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
    draws = dropout > 0 and query.is_cpu
    if isinstance(attention_mask, Spans):
        size = (attention_mask.batch, attention_mask.length)
        if not special and not draws and all((t.shape[0], t.shape[2]) == size for t in (query, key, value)):
            return _attend(query, key, value, attention_mask.pieces, dropout, scaling), None
        attention_mask = attention_mask.tensor()

    def stock(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)[0]

    recompute = (
        torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)) and not torch.compiler.is_compiling()
    )
    masked = attention_mask is not None and attention_mask.dtype == torch.bool
    known = masked or attention_mask is None
    if not known or special or not recompute or not (draws or (masked and not dropout)):
        return stock(query, key, value, attention_mask), None
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    return AttentionAgain.apply(query, key, value, attention_mask, torch.get_rng_state() if draws else None, stock), None


def takes_groups(query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool) -> bool:
    """Whether SDPA has a kernel of linear memory for keys and values of fewer heads. On CUDA its memory-efficient one takes no
    groups, so where flash attention does not run (sm_75, float32) it would build tokens x tokens."""
    if query.shape[1] == key.shape[1] or not query.is_cuda or torch.compiler.is_compiling():
        return True
    from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

    call = SDPAParams(query, key, value, None, dropout, causal, True)
    return can_use_flash_attention(call) or can_use_cudnn_attention(call)


def for_all_heads(t: Tensor, heads: int) -> Tensor:
    """t [batch, groups, length, dim], each group repeated for its heads; made again for the backward, and not kept."""
    repeated = repeat(t, times=heads // t.shape[1])
    stash.remember(repeated, repeat, t, times=heads // t.shape[1])
    return repeated


def repeat(t: Tensor, times: int) -> Tensor:
    return t.transpose(1, 2).repeat_interleave(times, dim=2).transpose(1, 2)  # tokens outermost, as `_split` cuts them


def _attend(
    query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece], dropout: float, scaling: float | None
) -> Tensor:
    batch, heads, length, _ = query.shape
    spans = [
        (p, (p.row * length + p.q0, p.row * length + p.q1), (p.row * length + p.k0, p.row * length + p.k1)) for p in pieces
    ]
    q = _split(query, [s for _, s, _ in spans])
    k = _split(key, [s for *_, s in spans])
    v = _split(value, [s for *_, s in spans])
    done = {
        at: F.scaled_dot_product_attention(
            q[at], k[to], v[to], dropout_p=dropout, is_causal=piece.causal, scale=scaling, enable_gqa=heads != key.shape[1]
        )
        for piece, at, to in spans
    }
    nothing = query.new_zeros(()).to(next(iter(done.values())).dtype) if done else query.new_zeros(())
    parts = [done[at][0].transpose(0, 1) if at in done else nothing.expand(at[1] - at[0], heads, value.shape[-1]) for at in q]
    joined = join(*parts)
    stash.remember(joined, join, *parts)
    return joined.view(batch, length, heads, -1)


def join(*parts: Tensor) -> Tensor:
    """[tokens, heads, dim] of all, in order."""
    return torch.cat(parts)


def _split(t: Tensor, spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
    """t [batch, heads, length, dim] cut along batch x length, in order: each of `spans` and what lies between, as
    [1, heads, span, dim]. One cut, so that the backward is one concatenation."""
    tokens = t.transpose(1, 2).flatten(0, 1)
    cuts = list(pairwise(sorted({0, len(tokens), *(edge for span in spans for edge in span)})))
    parts = tokens.split([stop - start for start, stop in cuts])
    return {cut: part.transpose(0, 1).unsqueeze(0) for cut, part in zip(cuts, parts, strict=True)}


class AttentionAgain(torch.autograd.Function):
    """y = attend(q, k, v, mask), computed again in the backward. Saved: q, k, v, the mask, which all layers share, and, if
    attend draws, the state of the CPU's generator before: it is put in place for as long as the backward draws again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        random: Tensor | None,
        attend: Callable[..., Any],
    ) -> Tensor:
        ctx.attend = attend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, mask, random)
        y: Tensor = attend(query, key, value, mask)
        return y.detach()  # it may be a view, which nobody could edit in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mask, random = ctx.saved_tensors
        needed = [i for i in range(3) if ctx.needs_input_grad[i]]
        leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        with torch.enable_grad(), torch.random.fork_rng(devices=(), enabled=random is not None):
            if random is not None:
                torch.default_generator.set_state(random)
            y = ctx.attend(*leaves, mask)
        gradients: list[Tensor | None] = [None] * 6
        for i, gradient in zip(needed, torch.autograd.grad(y, [leaves[i] for i in needed], dy), strict=True):
            gradients[i] = gradient
        return tuple(gradients)
