"""What holds for every pattern: it is found, computes what stock computes, keeps less, and is put back without a trace.
Whatever happens to a module after surgery (copies, pickles, casts, hooks, patches, transforms), it computes what stock does.

A pattern is in this matrix once it is in `patterns.ALL`: its own test module has to give examples (`matrix.Example`).
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from matrix import Example, examples_of, operate
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from unswag.torch import audit, patterns, remove_unswag_surgery
from unswag.torch.patterns.pattern import METHODS, replaced, stock_class

EXAMPLES = {
    (pattern.name, name): (pattern, example) for pattern in patterns.ALL for name, example in examples_of(pattern).items()
}
ids = ", ".join
ONE_INPUT = [key for key, (_, example) in EXAMPLES.items() if len(example.inputs(example.dtype)) == 1]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("unswag.torch.operation.say", lambda *_: None)


def built(example: Example) -> nn.Module:
    torch.manual_seed(0)
    return example.build()


def pair(key):
    """A stock model and an operated one of the same weights, and their example."""
    pattern, example = EXAMPLES[key]
    stock, ours = built(example), built(example)
    report = operate(ours, pattern, example)
    assert (example.where, pattern.name) in report.patched, report.skipped
    return stock, ours, example


@functools.cache
def made_once(key):
    return pair(key)


def copies(key):
    """As `pair`; what a warning says once, another test may have heard."""
    stock, ours, example = made_once(key)
    return copy.deepcopy(stock), copy.deepcopy(ours), example


def outcome(model, batch, source=None):
    """The output, or a model's loss, and the gradients, by name, of `source`'s parameters; or what is raised."""
    batch = {k: v.detach().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    leaves = dict((source or model).named_parameters()) | {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(4)  # of dropouts
    try:
        made = model(**batch)
        y = made if isinstance(made, torch.Tensor) else made.loss
        (y.double() * torch.linspace(0.5, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
    except Exception as error:
        return type(error)
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_same(ours, theirs, apart):
    if isinstance(theirs, type):
        assert ours is theirs
        return
    assert not isinstance(ours, type) and ours.keys() == theirs.keys()
    largest = max(t.double().norm() for name, t in theirs.items() if name != "y")
    for name, want in theirs.items():
        have = ours[name]
        assert have.dtype == want.dtype and have.shape == want.shape, name
        if apart == 0:
            assert torch.equal(have, want), name
        else:
            limit = apart * max(want.double().norm(), 0.1 * largest)
            assert (have.double() - want.double()).norm() <= limit, (name, (have.double() - want.double()).norm(), limit)


def quietly(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


every = pytest.mark.parametrize("key", EXAMPLES, ids=ids)
every_with_one_input = pytest.mark.parametrize("key", ONE_INPUT, ids=ids)


# ---- the list ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", patterns.ALL, ids=lambda pattern: pattern.name)
def test_a_pattern_is_a_file_of_its_name_that_says_what_it_is(pattern):
    file = Path(inspect.getfile(type(pattern)))
    assert file.stem == pattern.name and type(pattern).__name__.lower() == pattern.name.replace("_", "")
    assert inspect.getdoc(inspect.getmodule(type(pattern))) and pattern.saves
    assert examples_of(pattern), f"tests/python/torch/patterns/test_{pattern.name}.py needs a function examples()"


def test_names_are_not_given_twice():
    names = [pattern.name for pattern in patterns.ALL]
    assert len(set(names)) == len(names)


def test_no_pattern_imports_another_and_none_a_private_name():
    """What two patterns share stands in pattern, proof, probing, mlp or norms."""
    folder = Path(inspect.getfile(patterns)).parent
    siblings = {f"unswag.torch.patterns.{pattern.name}" for pattern in patterns.ALL}
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and file.name != "__init__.py" and (node.module or "").startswith("unswag"):
                names = {alias.name for alias in node.names}
                assert node.module not in siblings and not {f"{node.module}.{name}" for name in names} & siblings, file.name
                assert not [name for name in names if name.startswith("_") and name != "_core"], file.name


# ---- found, equal, smaller, restored ----------------------------------------------------------------------------------------


@every
def test_results_are_stocks_and_less_is_kept(key):
    stock, ours, example = pair(key)
    batch = example.batch()
    assert_same(outcome(ours, batch), outcome(stock, batch), example.apart)
    kept, before = (audit(copy.deepcopy(model), **batch).alive for model in (ours, stock))
    assert kept < before


def snapshot(model):
    """Class and attributes of every module, and what its tables hold."""
    return [
        (name, type(m), dict(vars(m)), [dict(table) for table in (m._modules, m._parameters, m._buffers)])
        for name, m in model.named_modules()
    ]


@every
def test_removed_everything_is_as_it_was(key):
    pattern, example = EXAMPLES[key]
    model, batch = built(example), example.batch()
    before, want = snapshot(model), outcome(model, batch)
    operate(model, pattern, example)
    assert [vars(m) for m in model.modules()] != [held for _, _, held, _ in before]
    outcome(model, batch)
    remove_unswag_surgery(model)
    for (name, cls, held, tables), (_, now, holds, has) in zip(before, snapshot(model), strict=True):
        assert now is cls and holds.keys() == held.keys(), name
        assert all(holds[k] is v for k, v in held.items() if not isinstance(v, bool)), name
        assert all(a.keys() == b.keys() and all(b[k] is v for k, v in a.items()) for a, b in zip(tables, has, strict=True)), (
            name
        )
    assert_same(outcome(model, batch), want, 0)


# ---- copies -----------------------------------------------------------------------------------------------------------------


def replica(model, factor=2.0):
    """As torch.nn.parallel.replicate makes it, on the same device and with weights of its own."""
    modules = list(model.modules())
    place = {module: i for i, module in enumerate(modules)}
    made = [module._replicate_for_data_parallel() for module in modules]
    for i, module in enumerate(modules):
        for k, child in module._modules.items():
            setattr(made[i], k, None if child is None else made[place[child]])
        for k, p in module._parameters.items():
            if p is None:
                made[i]._parameters[k] = None
            else:
                setattr(made[i], k, p * factor)
        for k, b in module._buffers.items():
            setattr(made[i], k, b if b is None else b.clone())
    return made[0]


def shallow(module, seen=None):
    """copy.copy of every module, with weights of its own."""
    seen = {} if seen is None else seen
    if module in seen:
        return seen[module]
    seen[module] = made = copy.copy(module)
    made._modules = {k: None if child is None else shallow(child, seen) for k, child in module._modules.items()}
    made._parameters = {
        k: p if p is None else nn.Parameter(p.detach() * 3, p.requires_grad) for k, p in module._parameters.items()
    }
    made._buffers = {k: b if b is None else b.clone() for k, b in module._buffers.items()}
    return made


def deep(module):
    made = copy.deepcopy(module)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(2)
    return made


@every
@pytest.mark.parametrize("copied", [shallow, deep, replica])
def test_a_copy_computes_with_its_own_weights_and_stays_operated(key, copied):
    stock, ours, example = copies(key)
    batch = example.batch()
    with warnings.catch_warnings():
        # the weights of a replica are no parameters, so that PEFT's own forward runs, and says so
        warnings.simplefilter("ignore" if (key[0], copied) == ("lora", replica) else "error")
        have, want = (outcome(copied(model), batch, *([model] if copied is replica else [])) for model in (ours, stock))
        assert not isinstance(want, type)
        assert_same(have, want, example.apart)
        assert [METHODS in vars(m) for m in copied(ours).modules()] == [METHODS in vars(m) for m in ours.modules()]
        assert_same(outcome(ours, batch), outcome(stock, batch), example.apart)


@every
def test_a_pickle_is_stock(key):
    stock, ours, example = copies(key)
    data = quietly(lambda: pickle.dumps(ours))
    assert b"unswag" not in data
    torch.save(ours, file := io.BytesIO())
    file.seek(0)
    for made in (pickle.loads(data), torch.load(file, weights_only=False)):
        assert not any(replaced(m) or METHODS in vars(m) for m in made.modules())
        assert [type(m) for m in made.modules()] == [type(m) for m in stock.modules()]
        batch = example.batch()
        assert_same(outcome(made, batch), outcome(stock, batch), 0)


# ---- changes ----------------------------------------------------------------------------------------------------------------


def tripled(made):
    """Of an output, or of a model's loss."""
    if isinstance(made, torch.Tensor):
        return 3 * made
    made.loss = 3 * made.loss
    return made


def patched_class(module, monkeypatch):
    cls = stock_class(module)
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args, **kwargs: tripled(forward(self, *args, **kwargs)))


def own_forward(module, monkeypatch):
    forward = module.forward
    module.forward = lambda *args, **kwargs: tripled(forward(*args, **kwargs))


def swapped_class(module, monkeypatch):
    cls = type(module)

    def forward(self, *args, **kwargs):
        return tripled(cls.forward(self, *args, **kwargs))

    module.__class__ = type("New", (cls,), {"forward": forward})


def hook(module, monkeypatch):
    module.register_forward_hook(lambda module, args, y: tripled(y))


CHANGES = {
    "forward of the class": patched_class, "forward on the instance": own_forward, "class": swapped_class, "hook": hook,
}  # fmt: skip


@every
@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_after_the_surgery_is_what_runs(key, change, monkeypatch):
    stock, ours, example = pair(key)
    batch = example.batch()
    before = outcome(stock, batch)
    if change == "forward of the class":
        patched_class(stock.get_submodule(example.where), monkeypatch)
    else:
        for model in (stock, ours):
            CHANGES[change](model.get_submodule(example.where), monkeypatch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        have = [outcome(ours, batch) for _ in range(2)]
    want = outcome(stock, batch)
    assert not torch.equal(want["y"], before["y"])
    for made in have:
        assert_same(made, want, example.apart)
    assert len([w for w in said if "runs its own forward" in str(w.message)]) <= 1


@every
def test_in_evaluation_and_without_gradients_results_are_stocks(key):
    stock, ours, example = copies(key)
    batch = example.batch()
    for model in (stock, ours):
        model.eval()
    assert_same(outcome(ours, batch), outcome(stock, batch), example.apart)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            made = [model(**batch) for model in (ours, stock)]
        y, want = (m if isinstance(m, torch.Tensor) else m.loss for m in made)
        torch.testing.assert_close(y, want, rtol=example.apart, atol=example.apart)


@every
def test_global_hooks_see_what_they_see_in_stock(key):
    stock, ours, example = pair(key)
    batch, seen = example.batch(), []
    handle = torch_module.register_module_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    try:
        want, theirs = quietly(lambda: outcome(stock, batch)), list(seen)
        seen.clear()
        assert_same(quietly(lambda: outcome(ours, batch)), want, example.apart)
        assert seen == theirs
    finally:
        handle.remove()
    assert_same(outcome(ours, batch), want, example.apart)


@pytest.mark.parametrize(
    ("key", "dtype"), [(key, dtype) for key, (_, example) in EXAMPLES.items() for dtype in example.casts], ids=str
)
def test_another_dtype_after_the_surgery(key, dtype):
    stock, ours, example = copies(key)
    for order in ((dtype,), (torch.float32, dtype), (torch.float32,)):
        for to in order:
            stock.to(to), ours.to(to)
        for batch in (example.batch(order[-1]), example.batch()):
            apart = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(order[-1], 1e-5)
            assert_same(quietly(lambda: outcome(ours, batch)), quietly(lambda: outcome(stock, batch)), apart)  # noqa: B023


# ---- torch.func, forward mode -----------------------------------------------------------------------------------------------


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sin().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "per sample": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sin().sum()))(torch.stack([x, 2 * x])),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sin().sum())(x),
}


@every_with_one_input
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_work_as_stock(key, transform):
    stock, ours, example = copies(key)
    (x,) = example.batch().values()
    x = x[:2].detach()

    def run(model):
        model.eval()  # no draws, no statistics
        parameters = {k: p.detach() for k, p in model.named_parameters()}
        results = [TRANSFORMS[transform](model, x)]
        if transform == "grad":
            loss = lambda p: torch.func.functional_call(model, p, (x,)).sin().sum()  # noqa: E731
            results += torch.func.grad(loss)(parameters).values()
        return results

    for have, want in zip(quietly(lambda: run(ours)), quietly(lambda: run(stock)), strict=True):
        torch.testing.assert_close(have, want)


@every_with_one_input
def test_forward_mode_works_as_stock(key):
    stock, ours, example = copies(key)
    (x,) = example.batch().values()
    dx, tangents = torch.randn_like(x), []
    for model in (stock, ours):
        torch.manual_seed(4)
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x.detach(), dx))).tangent)
    torch.testing.assert_close(*tangents)
