"""Random programs: what a model may do to its tensors between forward and backward, under the stash.

A program is a list of steps on a growing list of values: norms, MLPs, Linears, dropout, activations, casts, views, edits in
place, checkpoints, Functions that write into what they saved; then backward passes. Each runs three times:

stock    PyTorch's own modules: steps that it refuses in the forward are left out of the program
truth    our ops, with hooks that clone what is saved and no checkpoint: the gradient of what was computed, edited later or not
ours     our ops under a Stash, or a model after apply_unswag_surgery

Ours may never differ from the truth ("wrong"). It may raise only where PyTorch does, or would if all that the program made
were differentiated, or is itself wrong without a word, as checkpoints are ("refused" if not). UNSWAG_PROGRAMS says how many,
UNSWAG_SEED which.
"""

import contextlib
import copy
import functools
import io
import os
import random
import threading
import warnings
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unswag.torch import apply_unswag_surgery, functional
from unswag.torch.checkpoint import StashedCheckpoint
from unswag.torch.stash import Stash
from unswag.torch.stash.rectified import rectified, squared

PROGRAMS = int(os.environ.get("UNSWAG_PROGRAMS", "2000"))
SEED = int(os.environ.get("UNSWAG_SEED", "0"))
ROWS, WIDTH = 4, 16


# ---- what programs are made of --------------------------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(WIDTH) + 0.5), 1e-6

    def forward(self, x):
        dtype = x.dtype
        wide = x if dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(dtype)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 24, bias=False), nn.Linear(WIDTH, 24, bias=False)
        self.down, self.act = nn.Linear(24, WIDTH, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.fc1, self.act, self.drop, self.fc2 = nn.Linear(WIDTH, 24), act, nn.Dropout(0.3), nn.Linear(24, WIDTH)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Zoo(nn.Module):
    """The parts, and the program as its forward."""

    def __init__(self):
        super().__init__()
        self.rms, self.layer, self.gated = Norm(), nn.LayerNorm(WIDTH), Gated()
        self.mlp, self.rectifying = Plain(nn.GELU()), Plain(nn.ReLU())
        self.silu, self.gelu, self.relu, self.relu_ = nn.SiLU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.4)
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.linears[2].requires_grad_(False)

    def forward(self, run):
        return run(self)

    def relu2(self, x):
        return torch.relu(x).square()

    def stock_dropout(self, x):
        return F.dropout(x, 0.4)

    def product(self, a, b):
        return F.silu(a) * b

    def linear(self, x, which):
        linear = self.linears[which % 3]
        return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


def bare(zoo):
    """The parts of `zoo` by our functions, for use under a Stash."""
    return SimpleNamespace(
        rms=lambda x: functional.rms_norm(x, zoo.rms.weight, out_dtype=torch.promote_types(x.dtype, zoo.rms.weight.dtype)),
        layer=lambda x: functional.layer_norm(x, zoo.layer.weight, zoo.layer.bias),
        gated=lambda x: zoo.gated.down(functional.swiglu(zoo.gated.gate(x), zoo.gated.up(x))),
        mlp=lambda x: zoo.mlp.fc2(functional.dropout(functional.gelu(zoo.mlp.fc1(x)), 0.3)),
        rectifying=lambda x: zoo.rectifying.fc2(functional.dropout(rectified(F.relu, zoo.rectifying.fc1(x)), 0.3)),
        silu=functional.silu,
        gelu=lambda x: functional.gelu(x, "tanh"),
        relu=lambda x: rectified(F.relu, x),
        relu_=lambda x: rectified(F.relu_, x),
        relu2=squared,
        dropout=lambda x: functional.dropout(x, 0.4),
        stock_dropout=zoo.stock_dropout,
        product=lambda a, b: functional.swiglu(a, b) if a.shape == b.shape and a.dtype == b.dtype else zoo.product(a, b),
        linear=zoo.linear,
    )  # fmt: skip


class Function(torch.autograd.Function):
    """x² saving x ("x"), x twice ("xx"), or e^(x / 10) saving itself ("y"); a backward that `writes` does so into the first."""

    snapshots = False

    @staticmethod
    def forward(ctx, x, kept, writes):
        ctx.kept, ctx.writes, ctx.apart = kept, writes, Function.snapshots
        y = x * x
        if kept == "y":
            y = torch.exp(0.1 * x)
            ctx.save_for_backward(y)
        else:
            ctx.save_for_backward(*[x] * len(kept))
        return y

    @staticmethod
    def backward(ctx, g):
        first, *rest = ctx.saved_tensors
        if ctx.kept == "y":
            return (first.mul_(0.1).mul_(g) if ctx.writes else 0.1 * first * g), None, None
        if not ctx.writes:
            return 2 * first * g, None, None
        first.mul_(2)
        for x in rest:  # which is the first, written to
            first = (x * 2 if ctx.apart else x) * 1
        return first * g, None, None


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        raise KeyError("in the middle")


def fails(x):
    with contextlib.suppress(KeyError):
        Fails.apply(x.exp())
    return x * 1


class Step(NamedTuple):
    name: str
    a: int = 0
    b: int = 0
    body: tuple = ()


UNARY = {
    "rms": lambda kit, x, b: kit.rms(x),
    "layer": lambda kit, x, b: kit.layer(x),
    "gated": lambda kit, x, b: kit.gated(x),
    "mlp": lambda kit, x, b: kit.mlp(x),
    "rectifying": lambda kit, x, b: kit.rectifying(x),
    "silu": lambda kit, x, b: kit.silu(x),
    "gelu": lambda kit, x, b: kit.gelu(x),
    "relu": lambda kit, x, b: kit.relu(x),
    "relu_": lambda kit, x, b: kit.relu_(x),
    "relu2": lambda kit, x, b: kit.relu2(x),
    "dropout": lambda kit, x, b: kit.dropout(x),
    "stock_dropout": lambda kit, x, b: kit.stock_dropout(x),
    "linear": lambda kit, x, b: kit.linear(x, b),
    "sin": lambda kit, x, b: x.sin(),
    "exp": lambda kit, x, b: (x * 0.1).exp(),
    "sigmoid": lambda kit, x, b: x.sigmoid(),
    "scaled": lambda kit, x, b: x * (1 + b % 3),
    "detach": lambda kit, x, b: x.detach(),
    "item": lambda kit, x, b: x * float(x.square().mean().detach().clamp(0.5, 2)),
    "fails": lambda kit, x, b: fails(x),
    "function": lambda kit, x, b: Function.apply(x, ("x", "y", "xx")[b % 3], False),
    "writes": lambda kit, x, b: Function.apply(x, ("x", "y", "xx")[b % 3], True),
    "cast": lambda kit, x, b: x.to((torch.float32, torch.bfloat16, torch.float64)[b % 3]),
    "copied": lambda kit, x, b: x.to(x.dtype, copy=True),
    "clone": lambda kit, x, b: x.clone(),
    "slice": lambda kit, x, b: x[b % 2 :],
    "columns": lambda kit, x, b: x[..., :: 1 + b % 2],
    "transpose": lambda kit, x, b: x.transpose(0, -1),
    "flat": lambda kit, x, b: x.reshape(-1),
    "rows": lambda kit, x, b: x.reshape(-1, WIDTH),
    "expand": lambda kit, x, b: x.unsqueeze(0).expand(2, *x.shape),
    "half": lambda kit, x, b: x[: len(x) // 2],
    "pass": lambda kit, x, b: x,
    # in place
    "mul_": lambda kit, x, b: x.mul_(1.5),
    "clamp_": lambda kit, x, b: x.clamp_(-1, 1),
    "zero_row_": lambda kit, x, b: x[b % max(len(x), 1)].zero_(),
    "copy_": lambda kit, x, b: x[:1].copy_(x[-1:].detach()),
    "data_": lambda kit, x, b: x.detach().add_(0.5),
    "torch.relu_": lambda kit, x, b: torch.relu_(x),
}  # fmt: skip
BINARY = {
    "add": lambda kit, x, y: x + y,
    "times": lambda kit, x, y: x * y,
    "product": lambda kit, x, y: kit.product(x, y),
    "add_": lambda kit, x, y: x.add_(y),
    "times_": lambda kit, x, y: x.mul_(y),
    "cat": lambda kit, x, y: torch.cat([x, y]),
    "matmul": lambda kit, x, y: x @ y.transpose(-1, -2),
}
COMMON = ("rms", "layer", "gated", "mlp", "linear", "linear", "dropout", "dropout", "relu", "silu", "add", "add_", "mul_")
EDITS = ("mul_", "clamp_", "zero_row_", "copy_", "data_", "add_")
CHECKPOINTS = ("checkpoint", "reentrant", "stashed", "stashed_reentrant")
AFTER = ("backward", "backward", "retained", "retained", "grad", "thread", "edit")


class Program(NamedTuple):
    flavour: str  # "stash", "stock" or "redrawn": a bare stash, or surgery with that dropout
    dtype: torch.dtype
    autocast: bool
    steps: tuple
    after: tuple

    def __str__(self):
        lines = [f"{self.flavour} {self.dtype}{' autocast' if self.autocast else ''}", *map(str, self.steps), "then"]
        return "\n    ".join([*lines, *map(str, self.after)])


def draw_steps(r, n, depth=0):
    steps = []
    for _ in range(n):
        pick = r.random()
        a, b = r.randrange(12) if r.random() < 0.5 else 0, r.randrange(12)
        if pick < 0.5:
            steps.append(Step(r.choice(COMMON), a, b))
        elif pick < 0.92 or depth:
            steps.append(Step(r.choice([*UNARY, *BINARY]), a, b))
        elif pick < 0.98:
            steps.append(Step(r.choice(CHECKPOINTS), a, b, tuple(draw_steps(r, r.randint(1, 5), depth + 1))))
        else:
            steps.append(Step("forget", a, b))
    return steps


def draw(seed):
    r = random.Random(seed)
    flavour = r.choice(("stash", "stash", "stock", "redrawn"))
    dtype, autocast = r.choice(((torch.float64, False), (torch.float64, False), (torch.float32, False), (torch.float32, True)))
    after = [Step(r.choice(AFTER), r.randrange(12), r.randrange(12)) for _ in range(r.randint(0, 2))]
    steps = tuple(draw_steps(r, r.randint(2, 12)))
    if names(steps) & {"reentrant", "stashed_reentrant"}:  # PyTorch gives no partial gradients through those
        after = [step for step in after if step.name != "grad"]
    return Program(flavour, dtype, autocast, steps, (*after, Step("backward", 0)))


# ---- how they run -----------------------------------------------------------------------------------------------------------


def step_on(kit, values, step, how):
    """What a step makes. `a` counts from the value made last."""
    x = values[-1 - step.a % len(values)]
    if step.name in UNARY:
        return UNARY[step.name](kit, x, step.b)
    if step.name in BINARY:
        return BINARY[step.name](kit, x, values[-1 - step.b % len(values)])

    def body(x):
        inner = [x]
        for s in step.body:
            inner.append(step_on(kit, inner, s, how))
        return inner[-1]

    return how(step.name, body, x)


def plainly(name, body, x):
    """What a checkpoint computes: a reentrant one nothing to be differentiated where its input needs no gradient."""
    with torch.set_grad_enabled("reentrant" not in name or x.requires_grad):
        return body(x * 1 if "reentrant" in name else x)


def checkpointed(name, body, x, ours=False):
    function = functools.partial(checkpoint, use_reentrant="reentrant" in name)
    if ours and "stashed" in name:
        function = StashedCheckpoint(function)
    return function(lambda x: body(x * 1), x) if "reentrant" in name else function(body, x)


class Outcome(NamedTuple):
    error: str | None
    found: dict
    left_out: tuple = ()  # steps that the forward refused


def run(program, zoo, kit, around, how, *, tolerant=False, everything=False):
    """Gradients after each backward pass, or the error. `tolerant` leaves out what the forward refuses; `everything` forgets
    nothing for good and differentiates all that was made, at the end."""
    torch.manual_seed(7)
    leaf = torch.randn(ROWS, WIDTH, dtype=program.dtype).requires_grad_()
    data = torch.randn(ROWS, WIDTH, dtype=program.dtype)
    zoo.zero_grad(set_to_none=True)
    values, forgotten, left_out, found = [data, leaf], [], [], {}

    def forward(parts):
        with torch.autocast("cpu", torch.bfloat16, enabled=program.autocast):
            for i, step in enumerate(program.steps):
                if step.name == "forget":
                    if len(values) > 3:
                        one = values.pop(-2)
                        forgotten.extend([one] * everything)
                    continue
                try:
                    values.append(step_on(parts, values, step, how))
                except (RuntimeError, TypeError, ValueError, IndexError):
                    if not tolerant:
                        raise
                    left_out.append(i)

    def loss_of(these):
        terms = [v for v in these if v.requires_grad]
        return sum(((0.5 + torch.rand(v.shape, generator=torch.Generator().manual_seed(3))) * v.double()).sum() for v in terms)

    def note(i):
        named = [("leaf", leaf), *zoo.named_parameters()]
        found.update({(i, name): p.grad.clone() for name, p in named if p.grad is not None})

    try:
        around(forward)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return Outcome(f"forward: {type(error).__name__}: {error}", {})
    made = [v for v in values[2:] if v.requires_grad] or [leaf * 1]
    try:
        losses = [loss_of(made[-1:]), loss_of(made[-1:] + made[:1]), loss_of(made + forgotten)]
    except RuntimeError as error:  # a view that cannot be used any more
        return Outcome(f"loss: {error}", {}, tuple(left_out))
    # the values themselves are gone, unless there is something left to do with them
    if not any(step.name == "edit" for step in program.after):
        values.clear()
        made.clear()
    after = program.after
    if everything:
        after = (*(s for s in after if s.name == "edit"), Step("backward", 2))
    try:
        for i, step in enumerate(after):
            loss = losses[step.a % 3]
            last = i == len(after) - 1
            if step.name == "edit":
                with torch.no_grad():
                    UNARY[EDITS[step.b % 5]](kit, made[step.a % len(made)], step.b)
                continue
            if step.name == "grad":
                wanted = [leaf, *(p for p in zoo.parameters() if p.requires_grad)][step.b % 3 :: 3]
                grads = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
                found.update({(i, j): g for j, g in enumerate(grads) if g is not None})
                continue
            backward = functools.partial(loss.backward, retain_graph=not last)
            in_thread(backward) if step.name == "thread" else backward()
            note(i)
    except RuntimeError as error:
        return Outcome(f"backward: {error}", found)
    return Outcome(None, found, tuple(left_out))


@contextlib.contextmanager
def checked():
    """Keeps what is saved, as PyTorch does; a stash steps aside for it."""

    def unpack(packed):
        alias, version = packed
        if alias._version != version:
            raise RuntimeError("modified")
        return alias

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.detach(), t._version), unpack):
        yield


def in_thread(function):
    errors = []

    def target():
        try:
            function()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def snapshots():
    """Whatever is saved is what it was then, for each reader."""
    Function.snapshots = True
    try:
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone):
            yield
    finally:
        Function.snapshots = False


@functools.cache
def zoos(dtype):
    """Stock, and operated on with stock and redrawn dropout; the same weights."""
    torch.manual_seed(1)
    stock = Zoo().to(dtype).train()
    operated = {}
    for dropout in ("stock", "redrawn"):
        operated[dropout] = copy.deepcopy(stock)
        with contextlib.redirect_stdout(io.StringIO()):
            report = apply_unswag_surgery(operated[dropout], dropout=dropout)
        assert {"rms_norm", "gated_mlp", "relu", "stash"} <= {pattern for _, pattern in report.patched}, report
    return stock, operated


def same(ours, truth, tolerance):
    return ours.keys() == truth.keys() and all(
        torch.allclose(
            g, truth[k], rtol=0, atol=tolerance * (1e-3 + float(truth[k].abs().nan_to_num(0, 0, 0).max())), equal_nan=True
        )
        for k, g in ours.items()
        if g.numel()
    )


def names(steps):
    return {s.name for step in steps for s in (step, *step.body)}


def verdict(program):
    """None, or what is wrong with ours; and the program without the steps that PyTorch refuses in the forward."""
    stock, operated = zoos(program.dtype)
    zoo = stock if program.flavour == "stash" else operated[program.flavour]
    kit = bare(zoo) if program.flavour == "stash" else zoo
    for parts in (stock,) if kit is zoo else (stock, kit):  # our functions take one dtype each
        dry = run(program, stock, stock, lambda f: f(parts), checkpointed, tolerant=True)  # noqa: B023
        program = program._replace(steps=tuple(s for i, s in enumerate(program.steps) if i not in dry.left_out))

    def within(context, kit=kit):
        def around(f):
            with context():
                kit(f) if kit is zoo else f(kit)

        return around

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the stash says once that it steps aside for the hooks of the truth
        stash, door = (contextlib.nullcontext, checked) if kit is zoo else (Stash, contextlib.nullcontext)
        ours = run(program, zoo, kit, within(stash), functools.partial(checkpointed, ours=True))
        if ours.error is None:
            low = program.autocast or "cast" in names(program.steps)
            tolerance = 0.05 if low else 1e-9 if program.dtype == torch.float64 else 1e-4
            truth = run(program, zoo, kit, within(snapshots), plainly)
            assert truth.error is None, truth.error
            if same(ours.found, truth.found, tolerance):
                return None, program
            unchecked = names(program.steps) & {*CHECKPOINTS} - {"stashed"}
            if unchecked and (stock_says(program, stock) == "wrong" or run(program, zoo, kit, within(door), plainly).error):
                return None, program  # inside its own checkpoints PyTorch checks nothing of what it or our ops save
            return "wrong", program
        if any(stock_says(program, stock, everything) for everything in (False, True)):
            return None, program
        if any(run(program, zoo, kit, within(door), checkpointed, everything=e).error for e in (False, True)):
            return None, program  # our ops refuse it without a stash: they save x where stock saves a cast of it
    return f"refused: {ours.error}", program


def stock_says(program, stock, everything=False):
    """None where PyTorch is right; "wrong" where it is so without a word, checking nothing in checkpoints; or its error."""
    plain = run(program, stock, stock, lambda f: f(stock), checkpointed, everything=everything)

    def under_snapshots(f):
        with snapshots():
            f(stock)

    right = run(program, stock, stock, under_snapshots, plainly, everything=everything)
    if plain.error is None and (not same(plain.found, right.found, 1e-3) or modified_inside(program, stock)):
        return "wrong"
    return plain.error


def modified_inside(program, stock):
    """Whether PyTorch refuses the program where nothing is checkpointed."""
    return run(program, stock, stock, lambda f: f(stock), plainly, everything=True).error is not None


def shrink(program):
    """A program with the same verdict from which nothing can be taken."""
    what = verdict(program)[0].partition(":")[0]

    def still(candidate):
        found = verdict(candidate)[0]
        return found is not None and found.partition(":")[0] == what

    changed = True
    while changed:
        changed = False
        for field in ("steps", "after"):
            steps = getattr(program, field)
            for i, step in reversed(list(enumerate(steps))):
                options = [steps[:i] + steps[i + 1 :]] if field == "steps" or i < len(steps) - 1 else []
                if field == "steps" and step.name != "pass":
                    options.append((*steps[:i], Step("pass"), *steps[i + 1 :]))
                options += [steps[:i] + step.body + steps[i + 1 :]] if step.body else []
                options += [
                    (*steps[:i], step._replace(body=step.body[:j] + step.body[j + 1 :]), *steps[i + 1 :])
                    for j in range(len(step.body))
                ]
                for option in options:
                    candidate = program._replace(**{field: option})
                    if still(candidate):
                        program, changed = candidate, True
                        break
                if changed:
                    break
            if changed:
                break
    return verdict(program)[1]


CHUNKS = 8


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_programs(chunk):
    torch.set_num_threads(1)
    for i in range(chunk, PROGRAMS, CHUNKS):
        found, _ = verdict(program := draw(SEED + i))
        if found is not None:
            small = shrink(program)
            pytest.fail(f"program {SEED + i}: {found}\nshrunk: {verdict(small)[0]}\n{small}", pytrace=False)
