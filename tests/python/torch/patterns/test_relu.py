"""Modules and held functions that are torch's relu, or its square, are found; in whole models gradients keep their bits."""

from __future__ import annotations

import copy

import matrix
import pytest
import torch
from alone import Alone
from modules import Held
from torch import nn
from torch.nn import functional as F

from unswag.torch import apply_unswag_surgery, audit, remove_unswag_surgery
from unswag.torch.patterns import relu
from unswag.torch.patterns.relu import Relu
from unswag.torch.stash import Stash

alone = Alone(Relu())
DTYPES = (torch.float32, torch.bfloat16)


class Called(nn.Module):
    def forward(self, hidden_states):
        return torch.relu(hidden_states)


class Squared(nn.Module):
    def forward(self, x):
        return torch.square(F.relu(x))


class Product(nn.Module):  # its gradient r dy + r dy rounds subnormals otherwise than 2 r dy
    def forward(self, x):
        y = torch.relu(x)
        return y * y


class Shifted(nn.Module):
    def forward(self, x):
        return F.relu(x - 0.5)


class Leaky(nn.Module):  # relu, and something else
    def forward(self, x):
        return F.relu(x) - 0.01 * F.relu(-x)


class Cubed(nn.Module):
    def forward(self, x):
        return F.relu(x) ** 3


class Casting(nn.Module):
    def forward(self, x):
        return F.relu(x.float()).to(x.dtype)


class EvalOnly(nn.Module):
    def forward(self, x):
        return F.relu(x) if self.training else x


def candidates(*modules):
    return list(Relu().find(nn.Sequential(*modules)))


SPELLINGS = [
    ("_relu", nn.ReLU()),
    ("_relu", nn.ReLU(inplace=True)),
    ("_relu", Called()),
    ("_squared", Squared()),
]


def examples():
    kinds = {"module": nn.ReLU, "held": lambda: Held(F.relu), "squared": Squared}
    return {name: matrix.between(make, apart=0) for name, make in kinds.items()}


@pytest.mark.parametrize(("call", "module"), SPELLINGS, ids=["module", "in place", "function", "square"])
def test_relu_and_its_square_are_found_in_any_spelling(call, module):
    (found,) = candidates(nn.GELU(), module, nn.Linear(2, 2))
    assert alone.probe(found) is None and found.parts["call"].__name__ == call


@pytest.mark.parametrize("make", [Leaky, Cubed, EvalOnly, Casting, Product])
def test_what_is_more_is_left_with_the_reason(make):
    (found,) = candidates(make())
    assert "neither relu" in alone.probe(found)


def test_activations_of_other_names_are_no_candidates():
    assert not candidates(nn.GELU(), nn.SiLU(), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.Identity(), nn.Dropout())


def test_a_relu_of_something_else_is_kept_by_its_own_output():
    """Shifted is relu for what it keeps, and not for what its output could be made from."""
    (found,) = candidates(Shifted())
    assert alone.probe(found) is None
    x, w = torch.randn(8, 64, requires_grad=True), torch.randn(64, requires_grad=True)

    def run(f):
        with Stash():
            z = x * 3
            s = z.sin()  # holds z
            loss = (f(z) * w + s).sum()
        return torch.autograd.grad(loss, [x, w])

    stock = run(found.module)
    alone.apply(found)
    assert all(torch.equal(a, b) for a, b in zip(run(found.module), stock, strict=True))
    assert +vars(found.module)[relu.KEPT] == {"bitmap + non-zeros": 1}


def in_place():  # on a Linear's output, which is a view of what it made: left as it is
    return nn.ReLU(inplace=True)


class Mlp(nn.Module):
    def __init__(self, act, hidden=256):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(32, hidden), act, nn.Linear(hidden, 32)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(x)))


class Net(nn.Module):
    def __init__(self, make=nn.ReLU, sparse=True, dtype=torch.float32, trained=True):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Mlp(make()) for _ in range(2))
        with torch.no_grad():
            for layer in self.layers:
                layer.fc1.bias.fill_(-1.0 if sparse else 3.0)
                layer.fc2.requires_grad_(trained)
        self.to(dtype)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()


def step(model, x):
    model.zero_grad()
    loss = model(x=x)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("make", [nn.ReLU, Called, Squared, lambda: F.relu, in_place])
def test_a_model_keeps_less_and_its_gradients_their_bits(make, sparse, trained, dtype):
    x = torch.randn(4, 33, 32).to(dtype)
    stock, ours = (Net(make, sparse, dtype, trained) for _ in range(2))
    before, want = audit(stock, x=x), step(stock, x)
    report = apply_unswag_surgery(ours)
    assert [name for name, pattern in report.patched if pattern == "relu"]
    after = audit(ours, x=x)
    assert all(torch.equal(a, b) for a, b in zip(step(ours, x), want, strict=True))
    assert after.total <= after.alive <= after.total + 4
    hidden = 2 * 4 * 33 * 256 * x.element_size()  # bytes of the outputs of both ReLUs, and of nothing else of that size
    if make is nn.ReLU:  # the rest is the same before and after
        saved = before.alive - after.alive
        if not trained:
            assert saved == hidden - 2 * 4 * 33 * 256 // 8
        elif sparse:
            assert hidden - saved <= 0.2 * hidden
    assert after.alive <= before.alive
    assert report.relus_kept or make is in_place
    remove_unswag_surgery(ours)
    assert audit(ours, x=x).alive == before.alive


def test_the_report_says_what_was_kept():
    report = apply_unswag_surgery(model := Net())
    assert not report.relus_kept and "outputs of ReLU" not in text(report)
    step(model, torch.randn(2, 5, 32))
    assert report.relus_kept == {"bitmap + non-zeros": 2}
    assert "kept in training as: bitmap + non-zeros 2" in text(report)
    model.layers[0].fc2.requires_grad_(False)
    step(model, torch.randn(2, 5, 32))
    assert report.relus_kept == {"bitmap + non-zeros": 3, "mask": 1}


def text(report):
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    console.print(report)
    return console.file.getvalue()


def test_copies_count_for_themselves():
    report = apply_unswag_surgery(model := Net(lambda: F.relu))
    copied = copy.deepcopy(model)
    step(copied, torch.randn(2, 5, 32))
    assert not report.relus_kept
    assert sum(relu.kept_as(copied)[0].values()) == 1


def test_evaluation_is_as_before():
    model, x = Net().eval(), torch.randn(2, 5, 32)
    want = model(x)
    apply_unswag_surgery(model)
    with torch.no_grad():
        assert torch.equal(model(x), want)
    with torch.inference_mode():
        assert torch.equal(model(x), want)


def test_compiled():
    model, x = Net(), torch.randn(2, 5, 32)
    want = step(model, x)
    apply_unswag_surgery(model)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    compiled(x=x).backward()
    for p, q in zip([p.grad for p in model.parameters()], want[1:], strict=True):
        torch.testing.assert_close(p, q)


def test_one_relu_in_many_places_and_sequential():
    torch.manual_seed(0)
    act = nn.ReLU(inplace=True)
    stock = nn.Sequential(nn.Linear(32, 64), act, nn.Linear(64, 64), act, nn.Linear(64, 32), nn.Flatten())
    ours, x = copy.deepcopy(stock), torch.randn(5, 32)
    apply_unswag_surgery(ours)
    for model in (stock, ours):
        model(x).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), stock.parameters(), strict=True))
    assert sum(relu.kept_as(ours)[0].values()) == 2


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_functions_held_by_torchs_own_layers(layer):
    torch.manual_seed(0)
    stock = layer(32, 4, 64, dropout=0.0, batch_first=True)
    ours, x = copy.deepcopy(stock), torch.randn(2, 7, 32)
    report = apply_unswag_surgery(ours)
    memory = () if layer is nn.TransformerEncoderLayer else (x,)
    for model in (stock, ours):
        model(x, *memory).square().sum().backward()
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):  # LayerNorm is ours too, and rounds otherwise
        torch.testing.assert_close(p.grad, q.grad)
    assert report.relus_kept == {"bitmap + non-zeros": 1}
    remove_unswag_surgery(ours)
    assert ours.activation is F.relu
