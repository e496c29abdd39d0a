"""PEFT's LoRA beside a Linear: base(x) + scaling B(A(dropout(x))), whatever the base is (plain, 4-bit, sharded)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from unswag import _core
from unswag.torch.draws import draw_seed
from unswag.torch.lora import Adapter, add_lora, add_plain_lora, is_plain_lora
from unswag.torch.patterns.pattern import (
    HOOKS,
    Candidate,
    floating_parameter,
    is_plain,
    no_kernel,
    reason_to_leave,
    replace,
    replace_forward,
    stock,
    stock_class,
)
from unswag.torch.patterns.probing import Drawn, Writes, distance, has_hooks, own_forward, twin, ulps, value_and_gradients
from unswag.torch.patterns.proof import GLOBAL_HOOKS, Proof, others_global_hooks

ROWS = 32  # of each probe
# The probes run at this shape: wiring and rounding show at any size, and 210 probes at the sizes of a model take a minute.
STAND_IN = nn.Linear(24, 20, bias=False, device="meta")
ADAPTERS = ("lora_A", "lora_B", "lora_dropout")  # containers by name of the adapter
STATE = ("scaling", "active_adapters", "disable_adapters", "merged", "in_features", "out_features")
# What PEFT's methods write when adapters are added, chosen, merged or taken away: read at each call
READS = (
    "scaling", "_active_adapter", "_disable_adapters", "merged_adapters", "cast_input_dtype_enabled", "lora_variant",
    "use_dora", "use_rslora", "lora_bias", "lora_alpha", "r", "kwargs", "_caches",
)  # fmt: skip
F64 = (torch.float64, torch.float64)
# (dtype of x, dtype of the adapters), autocast, training: what a module that is cast later may be given
LATER = [((torch.bfloat16, torch.float32), False, True), ((torch.bfloat16, torch.bfloat16), False, True)]
SETTINGS = ("scaling", "lora_variant", "use_dora")  # dicts by name of the adapter
KNOWN = "_unswag_known"  # module.__dict__[KNOWN]
# Of the parts of an adapter
FORWARDS: dict[type[nn.Module], Any] = {
    cls: cls.forward for cls in (nn.Linear, nn.Dropout, nn.Identity)
}  # of the parts of an adapter


class Lora:
    name = "lora"
    role = None
    saves = (
        "x in its own dtype, once for all that read it, and r numbers per row; with dropout the random state, or a seed; PEFT "
        "keeps a float32 cast of x per Linear"
    )

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        for name, module in model.named_modules():
            children = dict(module.named_children())
            if "base_layer" in children and all(isinstance(children.get(k), nn.ModuleDict) for k in ADAPTERS):
                yield Candidate(name, module)

    def probe(self, candidate: Candidate) -> str | None:
        module: Any = candidate.module
        if reason := reason_to_leave(module):
            return reason
        if missing := [k for k in STATE if not hasattr(module, k)]:
            return f"it is not a LoRA layer of a PEFT version that UnSwag knows: it has no {', '.join(missing)}"
        reasons = {name: _unlike(module, name) for name in module.lora_A}
        plain = [name for name, reason in reasons.items() if reason is None]
        if not plain:
            return next(iter(reasons.values()), "it has no adapter beside a Linear")
        if reason := no_kernel(module.lora_A[plain[0]].weight):
            return reason
        how = How(redrawn=candidate.options.get("dropout") == "redrawn")
        for round_products in (False, True):
            how = how._replace(round_products=round_products)
            reason = _differs(module, plain, how)
            if reason is None:
                candidate.parts["how"] = how._replace(autocast_casts=_casts_under_autocast(module, plain))
                return None
        return f"its forward is not base(x) + scaling B(A(dropout(x))): {reason}"

    def apply(self, candidate: Candidate) -> None:
        how: How = candidate.parts["how"]
        proof = Proof(candidate, reads=READS)

        def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            known: Known = self.__dict__[KNOWN]
            if not (args or kwargs or torch.compiler.is_compiling()) and (adapter := known.adapter(self, x)) is not None:
                y = self.base_layer(x)
                sum_ = add_plain_lora(y, x, *adapter)
                return _add(self, y, x, how) if sum_ is None else sum_
            if args or kwargs or not is_ordinary(self, x, proof):  # e.g. adapter_names: another adapter for each row
                return stock(self, x, *args, **kwargs)
            known.look(self)
            return _add(self, self.base_layer(x), x, how)

        replace(candidate.module, KNOWN, Known())
        replace_forward(candidate.module, forward, proof)


class Known:
    """What `is_ordinary` found of a module in its last call, and the facts that it relied on: as long as they hold, it need not
    look again. Of a module with one adapter, without dropout and bias, in a version of PEFT whose settings lie where they are
    looked for. A copy of the module begins with nothing known."""

    def __init__(self) -> None:
        self._found: tuple[_core.Facts, list[str], tuple[Tensor, Tensor, float]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Known:
        return Known()

    def adapter(self, module: Any, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """(A, B, scaling), where `is_ordinary` would say yes and x is one for `add_plain_lora`; else None."""
        if self._found is None:
            return None
        facts, names, adapter = self._found
        if not facts.hold(module.__dict__, type(module)) or module.disable_adapters or module.merged:
            return None
        return adapter if module.active_adapters == names and is_plain_lora(x, *adapter[:2]) else None

    def look(self, module: Any) -> None:
        """Remembers what an ordinary module is like now."""
        self._found = None
        own, names = module.__dict__, list(module.active_adapters)
        if len(names) != 1 or names[0] not in module.lora_A._modules:
            return
        a, b, dropout = (part[names[0]] for part in _parts_of(module))
        settings = [own.get(name) for name in SETTINGS]
        if b.bias is not None or _drops(dropout):
            return
        if own.get("cast_input_dtype_enabled") is not True or any(type(setting) is not dict for setting in settings):
            return
        if torch_module._has_any_global_hook():
            return
        (name,), tables = names, own["_modules"]
        facts: list[tuple[str, Any, Any, Any]] = [
            ("entry", None, "_modules", tables),
            ("entry", None, "cast_input_dtype_enabled", True),
            *(("entry", None, kind, setting) for kind, setting in zip(SETTINGS, settings, strict=True)),
            *(_entry(setting, name) for setting in settings),
        ]
        for kind in GLOBAL_HOOKS:
            hooks = vars(torch_module)[kind]
            facts += [("entry", vars(torch_module), kind, hooks), ("size", hooks, None, 0)]
        for kind, part in zip(ADAPTERS, (a, b, dropout), strict=True):
            container, inside, cls = tables[kind], vars(part), stock_class(part)
            facts += [
                ("unknown", (), kind, None),
                ("entry", tables, kind, container),
                ("entry", vars(container), "_modules", container._modules),
                ("entry", container._modules, name, part),
                ("type", part, None, type(part)),
                ("attribute", cls, "forward", FORWARDS[cls]),
                *(_entry(inside, attribute) for attribute in ("forward", "weight", "bias", "p", "inplace", "training", *HOOKS)),
                *(("size", inside[hooks], None, 0) for hooks in HOOKS),
                _entry(inside, "_parameters"),
                *(_entry(inside["_parameters"], weight) for weight in ("weight", "bias")),
                *(("type", w, None, type(w)) for w in inside["_parameters"].values() if w is not None),
            ]
        self._found = _core.Facts(facts), names, (a.weight, b.weight, module.scaling[name])


def _entry(held: dict[str, Any], name: str) -> tuple[str, Any, Any, Any]:
    """The fact that `held` has this entry, or none of that name."""
    return ("entry", held, name, held[name]) if name in held else ("missing", held, name, None)


WEIGHTS = (nn.Parameter, FakeTensor)


class How(NamedTuple):
    """What a module's own forward does, as its probe has seen.

    round_products  each product is rounded to the dtype of the base's result before it is added
    autocast_casts  x is cast to the dtype of the adapters under autocast, too; PEFT's layers beside bitsandbytes do not
    redrawn         dropout draws from a seed, and not what nn.Dropout would
    """

    round_products: bool = False
    autocast_casts: bool = True
    redrawn: bool = False


def _forward(module: Any, x: Tensor, how: How) -> Tensor:
    return _add(module, module.base_layer(x), x, how)


def _add(module: Any, y: Tensor, x: Tensor, how: How) -> Tensor:
    """What the module's own forward makes of the result of its base."""
    adapters = []
    lora_a, lora_b, dropouts = _parts_of(module)
    for name in module.active_adapters:
        if name in lora_a:
            a, b, dropout = lora_a[name], lora_b[name], dropouts[name]
            p = _drops(dropout)
            seed = draw_seed() if p and how.redrawn else None
            adapters.append(Adapter(a.weight, b.weight, b.bias, module.scaling[name], p, seed))
    cast_x = how.autocast_casts or not torch.is_autocast_enabled(x.device.type)
    return add_lora(y, x, adapters, round_products=how.round_products, cast_x=cast_x)


def _parts_of(module: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A, B and dropout of each adapter, by its name."""
    return module.lora_A._modules, module.lora_B._modules, module.lora_dropout._modules


def _drops(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def is_ordinary(module: Any, x: Tensor, proof: Proof) -> bool:
    """Whether this call is one that `_forward` computes: adapters neither disabled nor merged, the active ones plain. Else
    PEFT's own forward runs, as it does under torch.compile, and with dropout in a CUDA graph, where every replay would draw
    what the capture drew. `proof` says once what of an adapter is not plain."""
    if torch.compiler.is_compiling() or module.disable_adapters or module.merged or not is_plain(x):
        return False
    parts = _parts_of(module)[0]
    names = [name for name in module.active_adapters if name in parts]
    if x.is_cuda and any(_drops(module.lora_dropout[name]) for name in names) and torch.cuda.is_current_stream_capturing():
        return False
    dtypes = {parts[name].weight.dtype for name in names}
    if len(dtypes) > 1 or (not getattr(module, "cast_input_dtype_enabled", True) and dtypes != {x.dtype}):
        return False
    for name in names:
        if (reason := _unlike(module, name)) is not None:
            proof.say(module, reason)
            return False
    if (reason := others_global_hooks()) is not None:
        proof.say(module, reason)
    return reason is None


def _unlike(module: Any, name: str) -> str | None:
    """The reason why this adapter is not the plain one, or None."""
    lora_a, lora_b, dropouts = _parts_of(module)
    a, b, dropout = lora_a.get(name), lora_b.get(name), dropouts.get(name)
    variant = getattr(module, "lora_variant", {}).get(name)
    if variant is not None:
        return f"its adapter {name!r} is a variant of LoRA, {type(variant).__name__}"
    if getattr(module, "use_dora", {}).get(name):
        return f"its adapter {name!r} is a variant of LoRA, DoRA"
    if type(a) is not nn.Linear or type(b) is not nn.Linear or a.bias is not None:
        return f"its adapter {name!r} is not a pair of Linears of which the first has no bias"
    if stock_class(dropout) not in (nn.Identity, nn.Dropout) or not getattr(dropout, "p", 0.0) < 1:
        return f"its adapter {name!r} has a dropout that is not an nn.Dropout with p < 1"
    if getattr(dropout, "inplace", False):
        return f"its adapter {name!r} has a dropout that writes to x (inplace=True)"
    for part in (a, b, dropout):
        if has_hooks(part):
            return f"its adapter {name!r} has hooks, which would not run"
        cls = stock_class(part)
        if "forward" in vars(part) or cls.forward is not FORWARDS[cls]:
            return f"its adapter {name!r} has a part with a replaced forward, which would not run"
    if type(a.weight) not in WEIGHTS or type(b.weight) not in WEIGHTS:
        return f"its adapter {name!r} has weights of type {type(a.weight).__name__}, which only their own module can use"
    if a.weight.dtype != b.weight.dtype or not a.weight.dtype.is_floating_point:
        return f"its adapter {name!r} has weights of dtypes {a.weight.dtype} and {b.weight.dtype}"
    if not isinstance(module.scaling.get(name), (int, float)):
        return f"its adapter {name!r} has a scaling that is not a number"
    return None


class _Seen(nn.Module):
    """Stands in for a dropout in a probe: lets through what it is given, and says it."""

    def __init__(self, say: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.say = say

    def forward(self, x: Tensor) -> Tensor:
        self.say(x.detach())
        return x


def _differs(module: Any, names: list[str], how: How) -> str | None:
    """How `_forward` differs from the module's own, or None: all plain adapters active, their weights drawn anew (a fresh B is
    zero, and then everything is equal), beside a stand-in for the base; in fp64, in the module's dtypes, under autocast, and in
    the dtypes that it may get later."""
    own = _dtypes(module, names)
    pairs = dict.fromkeys([F64, own])
    for dtypes, autocast, training in [*itertools.product(pairs, [False], [True, False]), (own, True, True), *LATER]:
        theirs, seen, x, leaves = _small(module, names, dtypes, training)
        plain = nn.ModuleDict({name: nn.Identity() for name in names})
        ours: Any = twin(theirs, **(theirs._modules | {"lora_dropout": plain}))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            try:
                want = value_and_gradients(lambda: own_forward(theirs, x), leaves)  # noqa: B023
            except Writes as error:
                return str(error)
            except Exception as error:
                return f"it raises {type(error).__name__}: {error}"
            have = value_and_gradients(lambda: _forward(ours, x, how), leaves)  # noqa: B023
        x_dtype, dtype = dtypes
        words = f"with {x_dtype} x and {dtype} adapters" + (" under autocast" if autocast else "")
        given = x.detach().to(dtype).double()
        if len(seen) != len(names) or not all(torch.equal(s.double(), given) for s in seen):
            return f"its dropout is not applied to x {words}"
        worst = max(distance(a, b) for a, b in zip(have, want, strict=True))
        narrow = max((x_dtype, dtype, want[0].dtype), key=lambda d: torch.finfo(d).eps)
        eps = torch.finfo(torch.bfloat16).eps if autocast else torch.finfo(narrow).eps
        if worst > (1e-10 if narrow == torch.float64 else 8 * eps):
            return f"results differ by {worst:.1e} {words}"
        # Another place of the rounding shows in a fifth of a 16-bit y, another order of summation in next to none
        if want[0].dtype.itemsize == 2 and (rate := (ulps(have[0], want[0]) > 0).double().mean().item()) > 0.02:
            return f"{rate:.0%} of y differ {words}"
    return None


def _casts_under_autocast(module: Any, names: list[str]) -> bool:
    """Whether the dropouts get x in the dtype of the adapters under autocast."""
    theirs, seen, x, _ = _small(module, names, (torch.bfloat16, torch.float32), True)
    with torch.autocast(x.device.type, torch.bfloat16):
        own_forward(theirs, x)
    return seen[0].dtype == torch.float32


def _dtypes(module: Any, names: list[str]) -> tuple[torch.dtype, torch.dtype]:
    """Of the base, and so of x, and of the adapters."""
    a = module.lora_A[names[0]].weight
    return floating_parameter(module.base_layer, a).dtype, a.dtype


def _small(
    module: Any, names: list[str], dtypes: tuple[torch.dtype, torch.dtype], training: bool
) -> tuple[Any, list[Tensor], Tensor, list[Tensor]]:
    """A twin with all the named adapters active and small weights, the list of what its dropouts get, an input, and all that
    has a gradient."""
    x_dtype, dtype = dtypes
    device = floating_parameter(module.base_layer, module.lora_A[names[0]].weight).device
    base = Drawn(STAND_IN, 1.0, x_dtype, device)
    pairs = {name: _drawn(module.lora_B[name], dtype, device) for name in names}
    seen: list[Tensor] = []
    small = twin(
        module,
        base_layer=base,
        lora_A=nn.ModuleDict({name: a for name, (a, _) in pairs.items()}),
        lora_B=nn.ModuleDict({name: b for name, (_, b) in pairs.items()}),
        lora_dropout=nn.ModuleDict({name: _Seen(seen.append) for name in names}),
    )
    small.__dict__.update(_active_adapter=names, _disable_adapters=False, merged_adapters=[], training=training)
    x = torch.randn(ROWS, STAND_IN.in_features, device=device).to(x_dtype).requires_grad_()
    leaves = [x, *base.parameters(), *(p for pair in pairs.values() for part in pair for p in part.parameters())]
    return small, seen, x, leaves


def _drawn(b: nn.Linear, dtype: torch.dtype, device: torch.device) -> tuple[nn.Linear, nn.Linear]:
    """A and B of an adapter like the one with this B, with weights of their own, of unit gain."""
    r = 8
    pair = (
        nn.Linear(STAND_IN.in_features, r, False, device, dtype),
        nn.Linear(r, STAND_IN.out_features, b.bias is not None, device, dtype),
    )
    with torch.no_grad():
        for linear in pair:
            for p in linear.parameters():
                p.normal_(std=linear.in_features**-0.5)
    return pair
