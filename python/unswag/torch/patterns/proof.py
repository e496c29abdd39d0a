"""The facts under which a probe proved a replacement, and the check that they still hold.

A probe compares a replacement with the forward that a module has at the surgery. Afterwards user code may patch its class, set
`GELU.approximate`, put another forward on an activation, or hook a child that the replacement does not call. So the surgery
records what the forward can read, and each call checks that none of it has changed; otherwise the module's own forward runs.

The facts must be equal in every copy of the module: functions and classes are compared by identity, scalars and containers of
them by value. Tensors and modules are not compared, because the replacement reads them at each call.
"""

from __future__ import annotations

import functools
import itertools
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from unswag import _core
from unswag.torch.patterns.pattern import HOOKS, Candidate, maker, stock_class

SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.layout, torch.memory_format)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
MEMBERS = (*FUNCTIONS, type, property, staticmethod, classmethod, functools.cached_property)
TABLES = ("_parameters", "_buffers", "_modules")
MOST = 64  # most functions that are followed from one forward
GLOBAL_HOOKS = tuple(
    f"_global_{hooks}" for hooks in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
)
OTHER = object()  # what is not compared
ROWS = 2049
FEW, MANY, MOST_LENGTHS = 8, 1 << 14, 8  # numbers in a forward that may be lengths: above FEW, to MANY; how many
LARGE = 256  # entries: of a larger container only their number is compared


class Proof:
    """The facts under which a replacement of a method of `candidate.module` was proven.

    reads   names of settings that the replacement reads at each call, as the module itself does; they may change
    unseen  names of children that the module calls and the replacement does not. Their facts are compared too. If they have
            hooks, or torch has global ones, which would not run, or if their names in the class or in __dict__ hide them, the
            module's own forward runs
    methods names of the methods that are replaced
    """

    def __init__(
        self,
        candidate: Candidate,
        *,
        reads: Iterable[str] = (),
        unseen: Iterable[str] = (),
        methods: Iterable[str] = ("forward",),
    ) -> None:
        self._name, self._said = candidate.name, candidate.said
        self._facts = _Facts(candidate.module, tuple(methods), frozenset(reads), unseen)
        self._unseen = [
            (name, _Whole(child)) for name in unseen if isinstance(child := getattr(candidate.module, name), nn.Module)
        ]

    def holds(self, module: nn.Module) -> bool:
        """Whether nothing has changed; a change is reported once, in a warning."""
        if self._facts.hold(module):
            children: dict[str, Any] = module.__dict__["_modules"]
            for name, whole in self._unseen:
                if not whole.holds(children.get(name)):
                    break
            else:
                if not (self._unseen and torch_module._has_any_global_hook()):
                    return True
        what = self.changed(module)
        if what is not None:
            self.say(module, what)
        return what is None

    def changed(self, module: nn.Module) -> str | None:
        """What has changed, or None."""
        what = None if self._facts.hold(module) else self._facts.changed(module)
        for name, whole in self._unseen:
            what = what or whole.changed(module._modules.get(name), name)
        return what or (others_global_hooks() if self._unseen else None)

    def say(self, module: nn.Module, what: str) -> None:
        """A warning, once for each kind of module and change."""
        if torch.compiler.is_compiling():
            return
        kind = stock_class(module).__name__
        if (kind, what) not in self._said:
            self._said.add((kind, what))
            where = f"{self._name} ({kind})" if self._name else f"the model ({kind})"
            warnings.warn(
                f"unswag: {where} runs its own forward, without the saving: {what}. Surgery has not verified this case; "
                "call apply_unswag_surgery again to patch the model as it is now",
                stacklevel=4,
            )


class _Facts:
    """What the named methods of a module can read: from its class, its instance, and the globals of their functions."""

    def __init__(
        self,
        module: nn.Module,
        methods: tuple[str, ...],
        reads: frozenset[str] = frozenset(),
        unseen: Iterable[str] = (),
    ) -> None:
        cls, own = stock_class(module), vars(module)
        seen = _follow(module, methods)
        helpers = [name for name in seen.members if name not in methods]
        fixed = [_Names(attrgetter, holder, names) for holder, names in seen.defined]
        self._fixed = [*fixed, *(_Names(itemgetter, mapping, names) for mapping, names in seen.globals)]
        self._helpers = _Names(attrgetter, type(module), helpers)
        settings = [k for k in own if k in seen.words and k not in (*reads, *TABLES, *HOOKS, "training")]
        plain = [k for k in settings if _is_plain(own[k])]
        self._settings = _Names(itemgetter, own, plain)
        others = [(k, frozen(own[k], seen.words)) for k in settings if k not in plain]
        self._words, self._named = seen.words, seen.named
        self._others = [(k, v) for k, v in others if v is not OTHER]
        shared = [(held, _within(held.value(), seen.named)) for held in seen.held]
        self._shared = [(held, v) for held, v in shared if v is not OTHER]
        # Not "forward": one that is set on the instance runs instead of ours, and may call it.
        self._shadows = tuple(k for k in seen.members if k not in own and k != "forward")
        self._nones = [(table, k) for table in TABLES for k, v in own[table].items() if v is None]
        known = {*own, *seen.members, *itertools.chain.from_iterable(own[table] for table in TABLES)}
        self._absent = tuple(k for k in seen.constants if k not in known and not hasattr(cls, k))
        # Python finds an attribute in the class and in __dict__ before it looks among the children. A replacement that does not
        # read the attribute would not see that.
        self._hideable = tuple(k for k in unseen if k not in own and not hasattr(cls, k))
        lists = [held for held, _ in self._shared if type(v := held.value()) is list and all(map(_is_plain, v))]
        self._open = [(held, v) for held, v in self._shared if held not in lists]
        kinds = {itemgetter: "item", attrgetter: "attribute"}
        self._quick = _core.Facts([
            *((kinds[names.by], names.holder, *e) for names in self._fixed for e in names.entries()),
            *(("item", None, *e) for e in self._settings.entries()),
            *(("attribute", None, *e) for e in self._helpers.entries()),
            *(("missing", None, k, None) for k in self._shadows),
            *(("unset", table, k, None) for table, k in self._nones),
            *(("unknown", TABLES, k, None) for k in self._absent),
            *(("unknown", (), k, None) for k in self._hideable),
            *((kinds[held.by], held.holder, held.name, list(held.value())) for held in lists),
        ])  # fmt: skip

    def hold(self, module: nn.Module) -> bool:
        """Whether `changed` would find nothing."""
        own = module.__dict__
        if not self._quick.hold(own, type(module)):
            return False
        try:
            for k, v in self._others:
                if frozen(own[k], self._words) != v:
                    return False
            for held, v in self._open:
                if _within(held.value(), self._named) != v:
                    return False
        except Exception:  # it no longer exists, or cannot be compared
            return False
        return True

    def changed(self, module: nn.Module) -> str | None:
        own = module.__dict__
        for names in self._fixed:
            for what in names.differing(names.holder):
                return f"{_title(names.holder)}{what} was replaced"
        for what in self._helpers.differing(type(module)):
            return f"{_title(type(module))}{what} was replaced"
        for what in self._settings.differing(own):
            return f"its {what} changed"
        for what, v in self._others:
            if frozen(own.get(what), self._words) != v:
                return f"its {what} changed"
        for held, v in self._shared:
            try:
                differs = bool(_within(held.value(), self._named) != v)
            except Exception:
                differs = True
            if differs:
                return f"{held.what} changed"
        got = [k for table, k in self._nones if own[table].get(k) is not None or k in own]
        hidden = [k for k in self._hideable if k in own or hasattr(type(module), k)]
        for what in (*(k for k in self._shadows if k in own), *got, *self._appeared(module), *hidden):
            return f"it got its own {what}"
        return None

    def _appeared(self, module: nn.Module) -> list[str]:
        cls, own = type(module), module.__dict__
        return [k for k in self._absent if k in own or hasattr(cls, k) or any(k in own[table] for table in TABLES)]


def _title(holder: Any) -> str:
    return f"{holder.__name__}." if isinstance(holder, type) else f"{holder.get('__name__', 'global')}."


class _Whole:
    """A module, with its children, that the replaced method calls and the replacement does not."""

    def __init__(self, module: nn.Module) -> None:
        named = [k for table in TABLES for k, v in vars(module)[table].items() if v is not None]
        self._cls, self._facts = type(module), _Facts(module, ("forward",), unseen=named)
        self._children = [(name, _Whole(child)) for name, child in module._modules.items() if child is not None]

    def holds(self, module: nn.Module | None) -> bool:
        if type(module) is not self._cls:
            return False
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
        if "forward" in own or not self._facts.hold(module):
            return False
        return not self._children or all(whole.holds(own["_modules"].get(name)) for name, whole in self._children)

    def changed(self, module: nn.Module | None, name: str) -> str | None:
        if module is None or type(module) is not self._cls:
            return f"its {name} was replaced"
        if any(getattr(module, hooks) for hooks in HOOKS):
            return f"its {name} got hooks"
        if "forward" in vars(module):
            return f"its {name}'s forward was replaced"
        if what := self._facts.changed(module):
            return f"in its {name}, {what}"
        parts = (whole.changed(module._modules.get(k), f"{name}.{k}") for k, whole in self._children)
        return next((what for what in parts if what), None)


def _is_plain(value: Any) -> bool:
    """Whether `==` is enough to compare it with that of a copy."""
    return isinstance(value, (*SCALARS, *FUNCTIONS)) or (isinstance(value, tuple) and all(map(_is_plain, value)))


class _Names:
    """The values of names in a mapping, or of an object's attributes."""

    def __init__(self, by: type[itemgetter[Any]] | type[attrgetter[Any]], holder: Any, names: Iterable[str]) -> None:
        self.by, self.holder = by, holder
        self._values = {name: by(name)(holder) for name in names}

    def entries(self) -> Iterable[tuple[str, Any]]:
        return self._values.items()

    def differing(self, holder: Any) -> Iterator[str]:
        for name, value in self._values.items():
            try:
                differs = bool(self.by(name)(holder) != value)
            except Exception:
                differs = True
            if differs:
                yield name


class _Any(frozenset[str]):
    def __contains__(self, word: object) -> bool:
        return True


ANY = _Any()  # the words of code that is not Python: it may read anything


@dataclass(frozen=True, eq=False)
class Held:
    """A mutable value or the content of a closure: `by(name)(holder)`, and what to call it."""

    by: type[itemgetter[Any]] | type[attrgetter[Any]]
    name: str
    holder: Any
    what: str

    def value(self) -> Any:
        return self.by(self.name)(self.holder)


@dataclass
class _Seen:
    members: dict[str, None]  # names of the class that are mentioned
    defined: list[tuple[type, list[str]]]  # where they are defined
    words: frozenset[str]  # what may be read: ANY, if it cannot be known
    named: frozenset[str]  # what the code names
    constants: dict[str, None]  # strings that may be names
    numbers: set[int]
    globals: list[tuple[dict[str, Any], list[str]]]
    held: list[Held]


def mentioned(module: nn.Module, method: str = "forward") -> frozenset[str]:
    """The names in the code of a method, and in the functions of its module and its own file that it calls."""
    return _follow(module, (method,)).words


def lengths(module: nn.Module) -> list[int]:
    """Numbers of rows at which the forward of `module` may take another path: a large one, those that its code and its settings
    name, and each of these plus one."""
    seen = _follow(module, ("forward",))
    settings = {v for k, v in vars(module).items() if k in seen.words and type(v) is int}
    named = sorted(n for n in seen.numbers | settings if FEW < n <= MANY)
    return sorted({ROWS, *named[-MOST_LENGTHS:], *(n + 1 for n in named[-MOST_LENGTHS:])})


def _follow(module: nn.Module, methods: tuple[str, ...]) -> _Seen:
    """What the methods mention, and the functions of the module and of their own globals that they call."""
    cls, own = stock_class(module), vars(module)
    mro = [c for c in cls.__mro__ if c not in (nn.Module, object)]
    members: dict[str, None] = dict.fromkeys(methods)
    words: set[str] = set()
    constants: dict[str, None] = {}
    globals_: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}
    numbers: set[int] = set()
    held: dict[tuple[int, str], Held] = {}
    seen: set[int] = set()
    opaque = False

    def look(mapping: dict[str, Any], name: str, mentioned: set[str]) -> None:
        value = mapping[name]
        of_torch = mapping.get("__name__", "").partition(".")[0] in ("torch", "unswag")  # ours changes in each step
        if isinstance(value, types.ModuleType):
            for word in sorted(mentioned & vars(value).keys()) if id(value) not in inside else ():
                inside.add(id(value))
                look(vars(value), word, mentioned)
        elif isinstance(value, FUNCTIONS if of_torch else (*FUNCTIONS, *SCALARS)):
            globals_.setdefault(id(mapping), (mapping, {}))[1][name] = None
            todo.append(value)
        elif not of_torch:
            hold(Held(itemgetter, name, mapping, f"the global {name}"))

    def hold(value: Held) -> None:
        held[id(value.holder), value.what] = value

    todo: list[Any] = [vars(c)[name] for c in mro for name in methods if name in vars(c)]
    todo += [own[name] for name in methods if name in own]
    while todo and len(seen) < MOST:
        function = _function(todo.pop())
        if function is None or id(function) in seen:
            continue
        seen.add(id(function))
        if not isinstance(function, types.FunctionType):
            opaque = True
            continue
        if (function.__module__ or "").partition(".")[0] == "torch" and function.__name__ not in methods:
            continue
        mentioned: set[str] = set()
        for code in _codes(function.__code__):
            strings = [c for c in code.co_consts if isinstance(c, str) and c.isidentifier()]
            constants |= dict.fromkeys(strings)
            numbers |= {c for c in code.co_consts if type(c) is int}
            mentioned |= {*code.co_names, *strings}
        words |= mentioned
        inside: set[int] = set()
        for name in sorted(mentioned):
            found = [vars(c)[name] for c in mro if name in vars(c)]
            if found and isinstance(found[0], (*MEMBERS, *SCALARS)):
                members[name] = None
                todo += found
            elif found and not hasattr(type(found[0]), "__get__"):
                hold(Held(attrgetter, name, cls, f"{cls.__name__}.{name}"))
            if (
                callable(mine := own.get(name))
                and _function(mine) is mine
                and not isinstance(mine, (types.FunctionType, nn.Module))
            ):
                todo.append(type(mine).__call__)
            if name in function.__globals__ and not name.startswith("__"):
                look(function.__globals__, name, mentioned)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if _filled(cell) and name != "__class__":
                hold(Held(attrgetter, "cell_contents", cell, f"{name} of a closure"))
                todo += [cell.cell_contents] if callable(cell.cell_contents) else []
        todo.append(getattr(function, "__wrapped__", None))
    defined = [(c, [k for k in members if k in vars(c)]) for c in mro[1:]]
    return _Seen(
        members, [(cls, [k for k in methods if hasattr(cls, k)]), *((c, names) for c, names in defined if names)],
        ANY if opaque else frozenset(words), frozenset(words), constants, numbers,
        [(mapping, list(names)) for mapping, names in globals_.values()], [*held.values()],
    )  # fmt: skip


def _function(value: Any) -> Any:
    """The function that runs when `value` is called or read, or None if there is none to follow."""
    for attribute in ("fget", "func", "__func__", "__wrapped__"):
        if not isinstance(value, types.FunctionType) and (inner := getattr(value, attribute, None)) is not None:
            return _function(inner)
    return None if value is None or isinstance(value, (*SCALARS, type, types.BuiltinFunctionType)) else value


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def frozen(value: Any, words: frozenset[str] = frozenset(), depth: int = 3) -> Any:
    """The part of `value` that can be compared between copies, OTHER if there is none: for a container its items, for an object
    its class and those of its attributes that are in `words`."""
    if isinstance(value, (*SCALARS, *FUNCTIONS)):
        return value
    if depth == 0 or isinstance(value, (torch.Tensor, nn.Module)):
        return OTHER
    if isinstance(value, functools.partial):
        return "partial", value.func, *(frozen(v, words, depth - 1) for v in (value.args, value.keywords))
    if isinstance(value, types.MethodType):
        return "method", value.__func__
    if isinstance(value, Mapping):
        return type(value), tuple((frozen(k), frozen(v, words, depth - 1)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(frozen(v, words, depth - 1) for v in value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(frozen(v, words, 0) for v in value)
    held = getattr(value, "__dict__", None)
    if not isinstance(held, dict):
        return OTHER
    return type(value), tuple((k, frozen(v, words, depth - 1)) for k, v in held.items() if k in words)


def seen_as(
    function: Callable[..., Any], held: Callable[[nn.Module, Callable[..., Any]], Any]
) -> Callable[[nn.Module, Any], Any]:
    """For `replace_view`: `held(module, function)` as long as the attribute holds `function`, or a copy of it."""
    known = frozen(function)

    def seen(module: nn.Module, value: Any) -> Any:
        return held(module, value) if value is function or frozen(value) == known else value

    return seen


def _within(value: Any, words: frozenset[str]) -> Any:
    """As `frozen`, for what all copies share: a class is compared by its attributes, a large container by its size."""
    if isinstance(value, (dict, list, tuple, set, frozenset)) and len(value) > LARGE:
        return type(value), len(value)
    if isinstance(value, Mapping) and not isinstance(value, dict):
        return OTHER
    if isinstance(value, type) and value.__module__.partition(".")[0] not in ("torch", "builtins"):
        return value, tuple((k, frozen(v, words, 2)) for k, v in vars(value).items() if k in words)
    return frozen(value, words)


def others_global_hooks() -> str | None:
    """What changed if other code has registered a global module hook, or None. UnSwag's audit needs only modules that run."""
    for hooks in GLOBAL_HOOKS:
        for hook in getattr(torch_module, hooks, {}).values():
            if not maker(hook).startswith("unswag."):
                return "a global module hook was registered"
    return None
