"""The interface of patterns, and how they replace methods and attributes of a module so that these can be restored."""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace as fx_trace

from unswag import _core
from unswag.torch import ops, stash

if TYPE_CHECKING:
    from unswag.torch.patterns.proof import Proof

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
RECORD = "_unswag"  # module.__dict__[RECORD]: {attribute: Replaced}
METHODS = "_unswag_methods"  # module.__dict__[METHODS]: {name: function(self, …)}
STOCK = "_unswag_stock"  # of a class that surgery made: the class that it replaces
ABSENT = ...  # survives deepcopy and pickle as itself


@dataclass
class Replaced:
    """A replaced attribute: `before` is the original value, ABSENT if there was none; `ours` is the replacement."""

    before: Any
    ours: Any


@dataclass
class Candidate:
    """A place where a pattern may apply.

    name     dotted name of the module in the model, "" for the model itself
    module   the module whose forward (or other attribute) would be replaced
    parts    what `find` and `probe` found out, for `apply`. Its content is up to the pattern, but parts["covers"] names the
             children that the replacement no longer calls; later patterns skip these and the module itself
    options  of `apply_unswag_surgery`: "attention", "loss", "dropout"
    said     the warnings that this surgery has given; each is given once
    """

    name: str
    module: nn.Module
    parts: dict[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    said: set[tuple[str, str]] = field(default_factory=set)


class Pattern(Protocol):
    """A kind of module that UnSwag can run with less memory. One file each, listed in `patterns.ALL`.

    name     one word, the same in reports and in the options of `apply_unswag_surgery`
    saves    one line for docs/supported.md: what is kept, and what stock keeps
    role     the role of its tensors in a policy (`unswag.policy.ROLES`), or None
    """

    name: str
    saves: str

    @property
    def role(self) -> str | None: ...

    def find(self, model: nn.Module) -> Iterable[Candidate]:
        """The places in `model` with the right structure. Changes nothing."""

    def probe(self, candidate: Candidate) -> str | None:
        """None if the replacement computes what the module computes, else the reason not to replace it. Changes
        nothing but `candidate.parts`: the model's gradients, buffers and hooks and the random state stay the same."""

    def apply(self, candidate: Candidate) -> None:
        """Puts the replacement in place, only by `replace`, `replace_method` and the like, so that `restore` can undo it."""


# ---- replacing on the instance ----------------------------------------------------------------------------------------------
#
# A function in an instance's __dict__ does not know which module is called: shallow copies (copy.copy, the replicas of
# nn.DataParallel) would run it with the weights of the original. So a module with a replaced method also gets a new class, as
# parametrizations and FSDP2 do it: a subclass of its class with the same name, below called operated, whose methods look up the
# replacement on the instance. The original class is not modified, and an instance without a replacement runs its own method.


def replace(module: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute on the instance, and records in the module what was there. A second replacement of the same attribute
    keeps the first record. For methods use `replace_method`: `value` is shared by shallow copies of the module."""
    record = module.__dict__.setdefault(RECORD, {})
    record[name] = Replaced(record[name].before if name in record else vars(module).get(name, ABSENT), value)
    vars(module)[name] = value


def replace_method(module: nn.Module, name: str, function: Callable[..., Any], proof: Proof | None = None) -> None:
    """Replaces the method `name` by `function(self, …)` on this instance; `self` is the module that is called, which may be
    a copy. A method that was set on the instance is recorded. The original runs when `stock` is called, when `proof` no longer
    holds, and in calls that are not ordinary (`ordinary_call`)."""
    if proof is not None:
        function = _while_it_holds(name, function, proof)
    record = module.__dict__.setdefault(RECORD, {})
    if name not in record:
        record[name] = Replaced(vars(module).pop(name, ABSENT), ABSENT)
    module.__dict__.setdefault(METHODS, {})[name] = function
    _become(module, name, _method)


def replace_forward(module: nn.Module, forward: Callable[..., Any], proof: Proof | None = None) -> None:
    """`replace_method` for the forward."""
    replace_method(module, "forward", forward, proof)


def replace_unary_forward(module: nn.Module, forward: Callable[[Any, torch.Tensor], Any], proof: Proof) -> None:
    """`replace_forward` for a forward of one argument, however the caller names it: `forward(self, x)`."""
    replace_method(module, "forward", _while_it_holds("forward", forward, proof, unary=True))


def ordinary_call(*args: Any, **kwargs: Any) -> bool:
    """Whether a call with these arguments is one of plain autograd. It is not under a transform of torch.func (grad, vmap,
    jvp, …), in forward mode, while torch.export, torch.jit, torch.fx or make_fx trace the model, or on the meta device: there
    modules run their own forward."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    first = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(first, torch.Tensor) and first.is_meta:
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return not (torch._C._is_tracing() or fx_trace._is_fx_tracing_flag or _dispatch_mode(PROXY) is not None)


_dispatch_mode, PROXY = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY


def _while_it_holds(name: str, function: Callable[..., Any], proof: Proof, unary: bool = False) -> Callable[..., Any]:
    PROOFS[id(proof)] = proof
    key = id(proof)

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._unswag_holds(key) if torch.compiler.is_compiling() else proof.holds(self):
            return function(self, *args, **kwargs)
        return stock_method(name, self, *args, **kwargs)

    def checked_unary(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._unswag_holds(key) if torch.compiler.is_compiling() else proof.holds(self):
            (x,) = (*args, *kwargs.values())
            return function(self, x)
        return stock_method(name, self, *args, **kwargs)

    return checked_unary if unary else checked


PROOFS: weakref.WeakValueDictionary[int, Proof] = weakref.WeakValueDictionary()  # of the methods in use, by id


def _unswag_holds(self: nn.Module, key: int) -> bool:
    """torch.compile evaluates this once, when it traces a method, and takes the result as a constant."""
    return PROOFS[key].holds(self)


_unswag_holds._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, without its import


def wrap_method(module: nn.Module, name: str, around: Callable[..., Any]) -> None:
    """Wraps the current method, replaced or not, in `around(inner, self, …)`; `inner(self, …)` calls that method."""
    inner = module.__dict__.get(METHODS, {}).get(name) or functools.partial(stock_method, name)
    replace_method(module, name, functools.partial(around, inner))


def replace_view(module: nn.Module, name: str, seen: Callable[[nn.Module, Any], Any]) -> None:
    """Reading the attribute or property `name` of this instance gives `seen(self, value)`; the stored value is not
    changed."""
    module.__dict__.setdefault(RECORD, {})
    module.__dict__.setdefault(METHODS, {})[name] = seen
    _become(module, name, _attribute)


def stock(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls the forward that `module` had before the surgery: its class's, or one that was set on the instance."""
    return stock_method("forward", module, *args, **kwargs)


def stock_method(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """As `stock`, for any method."""
    was = module.__dict__.get(RECORD, {}).get(name)
    if was is not None and was.before is not ABSENT:
        return was.before(*args, **kwargs)
    return getattr(stock_class(module), name)(module, *args, **kwargs)


def stock_class(module: nn.Module | type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before the surgery; its own class if surgery did not change it."""
    cls = module if isinstance(module, type) else type(module)
    return getattr(cls, STOCK, cls)


def cannot_operate(module: nn.Module) -> str | None:
    """The reason why methods of `module` cannot be replaced, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a compiled TorchScript module"
    try:
        operated = _operated_class(stock_class(module))
        object.__new__(stock_class(module)).__class__ = operated
    except Exception as error:  # a class that cannot be subclassed, or with a fixed layout
        return f"its class cannot be subclassed ({type(error).__name__}: {error})"
    if nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized, and its parametrization relies on its class"
    return None


def restore(module: nn.Module) -> bool:
    """Restores everything that was replaced on `module`. What other code has set since is kept. True if there was anything to
    restore."""
    record, methods = module.__dict__.pop(RECORD, {}), module.__dict__.pop(METHODS, {})
    for name, was in reversed(record.items()):
        if name in methods:
            if _is_own_method(module, name):
                del vars(module)[name]
            if was.before is not ABSENT:
                vars(module).setdefault(name, was.before)
        elif vars(module).get(name, was.ours) == was.ours:
            if was.before is ABSENT:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = was.before
    if STOCK in vars(type(module)):  # else it was subclassed since; without a record its methods are the original ones
        module.__class__ = stock_class(module)
    return bool(record or methods)


def wrapped(module: nn.Module) -> bool:
    """Whether other code has wrapped our forward since (accelerate does, for mixed precision). The wrapper calls ours, so
    neither can be removed without the other."""
    ours = "forward" in module.__dict__.get(METHODS, {})
    return ours and "forward" in vars(module) and not _is_own_method(module, "forward")


def _is_own_method(module: nn.Module, name: str) -> bool:
    """Whether the instance holds its class's own method, which is what wrappers leave when they are removed."""
    held = vars(module).get(name)
    return isinstance(held, types.MethodType) and held.__self__ is module and held.__func__ is getattr(type(module), name)


def state(module: nn.Module) -> dict[str, Any]:
    """What surgery has put on `module`. After `restore`, `bring_back` puts it there again."""
    record = module.__dict__.get(RECORD, {})
    names = (RECORD, METHODS, *(name for name, was in record.items() if was.ours is not ABSENT))
    return {name: vars(module)[name] for name in names if name in vars(module)}


def bring_back(module: nn.Module, state: dict[str, Any]) -> None:
    """Undoes `restore`."""
    for name, value in state.items():
        if name == METHODS:
            for method, function in value.items():
                if method in state[RECORD]:
                    replace_method(module, method, function)
                else:
                    replace_view(module, method, function)
        elif name != RECORD:
            replace(module, name, value)


def replaced(module: nn.Module, name: str = "forward") -> bool:
    """Whether UnSwag has replaced this method or attribute of this module."""
    return name in module.__dict__.get(RECORD, {})


def _become(module: nn.Module, name: str, member: Callable[[type[nn.Module], str], Any]) -> None:
    operated = _operated_class(stock_class(module))
    if name not in vars(operated):
        setattr(operated, name, member(operated, name))
    if not isinstance(module, operated):
        module.__class__ = operated


def _operated_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `stock` whose instances may have replaced methods; only one, as long as it has instances."""
    made = next((cls for cls in stock.__subclasses__() if vars(cls).get(STOCK) is stock), None)
    if made is None:
        about = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
        metaclass: Any = type(stock)
        ours = {STOCK: stock, "__reduce_ex__": _reduce, "_unswag_holds": _unswag_holds}
        made = metaclass(stock.__name__, (stock,), ours | about)
    return made


def _method(operated: type[nn.Module], name: str) -> Callable[..., Any]:
    """A method that runs the instance's replacement, if it has one."""
    plain = getattr(operated, name)

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(args) is not tuple:
            raise TypeError(
                "unswag: torch.fx.symbolic_trace cannot trace a patched module, because it reads the names of the arguments "
                "from the code of forward; trace the model before the surgery, or after remove_unswag_surgery(model)"
            )
        ours = self.__dict__.get(METHODS)
        if ours is None or name not in ours:
            return plain(self, *args, **kwargs)
        if not ordinary_call(*args, **kwargs):
            return stock_method(name, self, *args, **kwargs)
        return ours[name](self, *args, **kwargs)

    # not functools.wraps: accelerate follows __wrapped__ to its end and would skip this method
    method.__name__, method.__qualname__, method.__doc__ = name, plain.__qualname__, plain.__doc__
    method.__module__ = plain.__module__
    method.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]  # HF Trainer reads it to choose columns
    return method


def _attribute(operated: type[nn.Module], name: str) -> property:
    """An attribute or property that is read through the instance's `replace_view`, if it has one."""

    def value(self: nn.Module) -> Any:
        if name not in self.__dict__:
            raise AttributeError(name)
        return self.__dict__[name]

    def set_(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        del self.__dict__[name]

    found = inspect.getattr_static(operated, name, None)
    plain = found if isinstance(found, property) else property(value, set_, delete)
    read: Any = plain.fget

    def get(self: nn.Module) -> Any:
        seen = self.__dict__.get(METHODS, {}).get(name)
        return read(self) if seen is None else seen(self, read(self))

    return property(get, plain.fset, plain.fdel)


# A copy of an operated module is operated; a pickle has the original class and can be loaded without UnSwag. Both call
# __reduce_ex__. (Not __deepcopy__: modules that wrap ours and look up missing attributes on it, as PEFT's do, would find it.)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    plain = stock_class(self)
    if STOCK not in vars(type(self)):  # it was subclassed since
        return plain.__reduce_ex__(self, protocol)
    if plain.__reduce_ex__ is not object.__reduce_ex__ or plain.__reduce__ is not object.__reduce__:
        return _as_stock(self).__reduce_ex__(protocol)
    return _Make(type(self)), (plain, object, None), _State(self)


def _as_stock(module: nn.Module) -> nn.Module:
    """A shallow copy without what surgery put there."""
    plain = stock_class(module)
    made = plain.__new__(plain)
    vars(made).update(vars(module))
    restore(made)
    return made


class _Make:
    """Makes an empty operated module for a copy; when pickled, one of the original class."""

    def __init__(self, operated: type[nn.Module]) -> None:
        self.operated = operated

    def __call__(self, plain: type[nn.Module], *_: Any) -> nn.Module:
        made = plain.__new__(plain)
        made.__class__ = self.operated
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return functools.partial, (copyreg._reconstructor,)  # type: ignore[attr-defined]


class _State(dict[str, Any]):
    """The state of an operated module; when pickled, its state without the surgery."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(stock_class(module).__getstate__(module))
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        stock = _as_stock(self.module)
        return dict, (), None, None, iter(type(stock).__getstate__(stock).items())


def foreign_forward(module: nn.Module) -> str | None:
    """The name of other code that has replaced this module's forward, or None: on the instance, or on its class by another
    package (Liger-Kernel and Unsloth do both)."""
    if replaced(module):
        return None
    on_instance = module.__dict__.get("forward")
    if on_instance is not None:
        return maker(on_instance)
    cls = stock_class(module)
    homes = {home.partition(".")[0] for home in (cls.__module__, cls.forward.__module__)}
    return next(iter(homes & {"liger_kernel", "unsloth", "unsloth_zoo"}), None)


def maker(forward: Callable[..., Any]) -> str:
    """The module of the function behind a forward, else the name of its type."""
    function = getattr(forward, "__func__", getattr(forward, "func", forward))
    return getattr(function, "__module__", None) or type(forward).__name__


def is_plain(tensor: torch.Tensor | None) -> bool:
    """As `stash.is_plain`; True for None."""
    return tensor is None or stash.is_plain(tensor)


def ops_take(x: Any) -> bool:
    """Whether the ops accept `x`, which may be anything that an unknown forward passes on."""
    return isinstance(x, torch.Tensor) and stash.is_plain(x) and x.layout is torch.strided and x.dtype in ops.DTYPES


def floating_parameter(module: nn.Module, otherwise: torch.Tensor | None = None) -> torch.Tensor:
    """The first floating parameter of `module`, whose dtype and device stand for the rest; without one `otherwise`, or an
    empty tensor."""
    found = next((p for p in module.parameters() if p.is_floating_point()), otherwise)
    return torch.empty(0) if found is None else found


def reason_to_leave(module: nn.Module, *tensors: torch.Tensor | None) -> str | None:
    """The reason why no pattern may replace this module's forward, or None: other code has replaced it, or the ops cannot run
    on these tensors."""
    if other := foreign_forward(module):
        return f"its forward was already replaced by {other}"
    return no_kernel(*tensors)


def no_kernel(*tensors: torch.Tensor | None) -> str | None:
    """The reason why the ops cannot run on these tensors (their device, and what this build has for it), or None."""
    for tensor in tensors:
        if tensor is None or tensor.is_cpu:
            continue
        if not tensor.is_cuda:
            return f"it is on {tensor.device}, where this build has no kernels; move the model to the cpu first"
        if problem := _core.cuda_problem(tensor.device.index):
            return f"it is on {tensor.device}: {problem}"
    return None
