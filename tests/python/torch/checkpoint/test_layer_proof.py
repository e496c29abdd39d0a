"""What a sweep must not miss: whatever sees a tile where it expects the whole is found, before the sweep or in its backward."""

import pytest
import torch
from families import step
from sweeping import assert_close, batch, checkpointed, plan, swept, with_lora
from torch import nn
from torch.nn import functional as F

from unswag import apply_unswag_surgery
from unswag.torch.checkpoint import Sweep

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unswag. .* is not swept:UserWarning"),
]
DATA = batch(70, 1)


def layers(model):
    return model.model.layers


def replace_mlps(model, made):
    """Each MLP gets `made(mlp)` around it."""
    for layer in layers(model):
        layer.mlp = made(layer.mlp)
    return model


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Counts(Around):
    def __init__(self, inner):
        super().__init__(inner)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        with torch.no_grad():
            self.seen.add_(1)
        return super().forward(x)


class Leaves(Around):
    def forward(self, x):
        self.last = x.float().pow(2).mean()
        return super().forward(x)


class Steps(Around):
    steps = 0

    def forward(self, x):
        self.steps += 1
        return super().forward(x)


class CentresLongRows(Around):
    def forward(self, x):
        y = super().forward(x)
        return y - y.mean(1, keepdim=True) if x.shape[1] > 128 else y


class AuxiliaryLoss(torch.autograd.Function):
    """Adds the gradient of a loss, whatever the gradient of y is."""

    @staticmethod
    def forward(ctx, y, loss):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return dy, torch.ones((), dtype=dy.dtype)


class Balances(Around):
    def __init__(self, inner):
        super().__init__(inner)
        self.router = nn.Linear(inner.gate_proj.in_features, 4, bias=False)

    def forward(self, x):
        chosen = self.router(x).softmax(-1)
        load = F.one_hot(chosen.argmax(-1), 4).to(x.dtype).mean(1)
        loss = 1e-5 * (load * chosen.mean(1)).sum(1).mean()
        return AuxiliaryLoss.apply(super().forward(x) * chosen.amax(-1, keepdim=True), loss)


def trained_elsewhere(model):
    vector = nn.Parameter(torch.linspace(-1, 1, model.config.hidden_size, dtype=model.dtype))

    class Adds(Around):
        def forward(self, x):
            return super().forward(x) + vector

    return replace_mlps(model, Adds), vector


@pytest.mark.parametrize("part", [Counts, Leaves, Steps, CentresLongRows, Balances])
def test_a_layer_with_such_a_part_is_left(part):
    """Its result is stock's, in all that the part does."""
    data = batch(200, 1)
    torch.manual_seed(1)
    stock = replace_mlps(checkpointed(), part).to(torch.float64)
    torch.manual_seed(1)
    ours = replace_mlps(checkpointed(), part).to(torch.float64)
    swept(ours, 60)
    assert_close(step(ours, data), step(stock, data))
    assert not plan(ours).swept
    assert len(plan(ours).left) == 1
    if part is Counts:
        assert layers(ours)[0].mlp.seen == layers(stock)[0].mlp.seen


def test_what_is_trained_outside_gets_its_gradient():
    stock, wanted = trained_elsewhere(checkpointed())
    ours, vector = trained_elsewhere(checkpointed())
    swept(ours)
    assert_close(step(ours, DATA), step(stock, DATA))
    torch.testing.assert_close(vector.grad, wanted.grad)
    assert "no parameter of it" in str(plan(ours).left)


def shift(module, args, y):
    return y + y.flip(1)


@pytest.mark.parametrize("when", ["before", "after", "later"])
def test_a_hook_inside_a_layer_sees_the_whole(when):
    stock, ours = checkpointed(), checkpointed()
    layers(stock)[0].mlp.register_forward_hook(shift)
    if when == "before":
        layers(ours)[0].mlp.register_forward_hook(shift)
    swept(ours)
    if when == "later":
        step(ours, DATA)
        ours.zero_grad()
    if when != "before":
        layers(ours)[0].mlp.register_forward_hook(shift)
    plan(ours).swept.clear()
    assert_close(step(ours, DATA), step(stock, DATA))
    assert len(plan(ours).swept) == 1, "the other layer is swept"
    assert "a hook on its mlp" in str(plan(ours).left)


def test_a_hook_on_a_parameter_sees_the_whole_gradient():
    seen = {}
    for name, model in (("stock", checkpointed()), ("ours", checkpointed())):
        if name == "ours":
            swept(model)
        seen[name] = []
        layers(model)[0].mlp.down_proj.weight.register_hook(lambda g, to=seen[name]: to.append(g.norm()) or g / g.norm())
        seen[f"{name} step"] = step(model, DATA)
    assert len(seen["ours"]) == len(seen["stock"]) == 1
    assert_close(seen["ours step"], seen["stock step"])


def test_a_hook_on_every_module_sees_the_whole():
    shapes = []
    model = checkpointed()
    swept(model)
    hook = nn.modules.module.register_module_forward_hook(lambda m, _, y: shapes.append(getattr(y, "shape", None)))
    try:
        step(model, DATA)
    finally:
        hook.remove()
    assert not plan(model).swept
    assert {shape[1] for shape in shapes if shape is not None and len(shape) == 3 and shape[0] == 1} == {70}


@pytest.mark.parametrize("what", ["registered", "functional"])
@pytest.mark.parametrize("warm", [False, True])
def test_another_attention_is_used(monkeypatch, what, warm):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stock, ours = checkpointed(), checkpointed()
    swept(ours)
    if warm:
        step(ours, DATA)
        ours.zero_grad()
        assert len(plan(ours).swept) == 2
    plan(ours).swept.clear()
    sdpa, functional = ALL_ATTENTION_FUNCTIONS["sdpa"], F.scaled_dot_product_attention
    if what == "registered":
        monkeypatch.setitem(
            ALL_ATTENTION_FUNCTIONS._global_mapping,
            "sdpa",
            lambda *a, **k: tuple(t if t is None else 2 * t for t in sdpa(*a, **k)),
        )
    else:
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: 2 * functional(*a, **k))
    assert_close(step(ours, DATA), step(stock, DATA))
    assert not plan(ours).swept


def change_mode(model):
    model.eval()


def change_setting(model):
    layers(model)[0].self_attn.scaling = 3.0


def add_hook(model):
    layers(model)[0].mlp.register_forward_hook(shift)


def add_gradient_hook(model):
    layers(model)[0].mlp.down_proj.weight.register_hook(lambda g: 2 * g)


@pytest.mark.parametrize("change", [change_mode, change_setting, add_hook, add_gradient_hook])
def test_a_change_between_forward_and_backward_is_an_error(change):
    model = checkpointed()
    swept(model)
    loss = model(**DATA).loss
    assert len(plan(model).swept) == 2
    change(model)
    with pytest.raises(RuntimeError, match="do not change the model between the two, or use sweep=False"):
        loss.backward()


def test_arguments_of_the_batch_are_no_obstacle():
    """HF Trainer hands the number of items to the layers, TRL the bounds of packed sequences."""
    stock, ours = checkpointed(), checkpointed()
    swept(ours)
    for items in (torch.tensor(69), torch.tensor(60), 50):
        data = DATA | {"num_items_in_batch": items}
        assert_close(step(ours, data), step(stock, data))
        for model in (stock, ours):
            model.zero_grad()
    assert len(plan(ours).swept) == 2
    assert all(len(known) <= 2 for known in plan(ours).verdicts.values()), "a comparison for each number of items"


def test_that_dropout_draws_by_tiles_is_said():
    model = with_lora(checkpointed(), lora_dropout=0.2)
    report = swept(model)
    step(model, DATA)
    assert any("draw their dropout tile by tile" in note for note in report.notes)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"tile": -3}, ValueError),
        ({"tile": 0}, ValueError),
        ({"tile": "a"}, TypeError),
        ({"tile": 2.5}, TypeError),
        ({"tile": 7, "key_block": -1}, ValueError),
        ({"tile": 7, "key_block": None}, TypeError),
        ({"keep_attention": "disk"}, TypeError),
    ],
)
def test_settings_are_examined(arguments, error):
    name = list(arguments)[-1]
    with pytest.raises(error, match=f"Sweep: {name} is"):
        Sweep(**arguments)


@pytest.mark.parametrize("part", [CentresLongRows])
def test_plain_surgery_looks_at_long_rows_of_tokens_too(part):
    """An MLP that is one of the usual form up to 128 tokens."""

    def made(model):
        for layer in layers(model):
            cls = type(layer.mlp)
            layer.mlp.__class__ = type("Mlp", (cls,), {"forward": long_rows(cls.forward)})
        return model

    def long_rows(plain):
        def forward(self, x):
            y = plain(self, x)
            return y - y.mean(1, keepdim=True) if x.shape[1] > 128 else y

        return forward

    stock, ours = made(checkpointed()), made(checkpointed())
    apply_unswag_surgery(ours, verbose=False, loss="stock")
    assert_close(step(ours, batch(200, 1)), step(stock, batch(200, 1)))
