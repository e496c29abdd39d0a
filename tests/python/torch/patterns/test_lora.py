"""LoRA beside a Linear: what PEFT computes, with x kept as it is.

lora_B is drawn anew everywhere: a fresh one is zero, and then every gradient of lora_A is zero too.
"""

import copy
import math
import threading
import types
import warnings

import matrix
import pytest
import torch
import torch.utils.checkpoint
from alone import Alone
from in_place import EDITS, assert_trains_as, train
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora as peft_lora
from tests.python.torch.small_models import batch, step, tiny_llama, with_recipes, with_stash
from torch import nn
from torch.nn import functional as F

import unswag
from unswag.torch.draws import DropoutInput
from unswag.torch.lora import TILE
from unswag.torch.patterns.lora import KNOWN, Lora, is_ordinary
from unswag.torch.patterns.pattern import Candidate, replaced
from unswag.torch.patterns.probing import ulps
from unswag.torch.patterns.proof import Proof

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def peft_linear(base_dtype=F32, dtype=F32, *, inputs=48, outputs=40, bias=True, dropout=0.0, adapters=("default",), **config):
    """PEFT's LoRA beside a Linear, every adapter of weights that matter."""
    torch.manual_seed(0)
    base = nn.Linear(inputs, outputs, bias=bias, dtype=base_dtype).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, **config)
    layer = peft_lora.Linear(base, adapters[0], config, r=4, lora_alpha=6)
    for name in adapters[1:]:
        layer.update_layer(name, 4, 6, config)
    layer.set_adapter(list(adapters))
    draw_b(layer)
    for name in adapters:
        layer.lora_A[name].to(dtype), layer.lora_B[name].to(dtype)
    return layer.train()


def draw_b(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)


def operate(model, dropout="stock"):
    return Alone(Lora(), dropout=dropout).operate(model)


def operated(layer, dropout="stock"):
    ours = copy.deepcopy(layer)
    assert operate(ours, dropout) == {} and replaced(ours)
    return ours


def run(layer, x, dy=None, **context):
    """y, dx and the gradient of every adapter weight."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", **context) if context else torch.enable_grad():
        y = layer(x * 1)  # no leaf: autocast would share one cast of it, as it does for weights
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    layer.zero_grad()
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad} | {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}


def assert_equal(ours, theirs):
    """Same dtypes; fp32 and fp64 to rounding; 16-bit values the same but for a few that lie between two neighbours."""
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        have = ours[name]
        assert (have.dtype, have.shape) == (want.dtype, want.shape), name
        assert want.abs().sum() > 0, name
        if want.dtype in (F16, BF16):
            apart = ulps(have, want)
            assert (apart > 0).double().mean() < 0.02, (name, (apart > 0).double().mean())
            assert apart.max() <= 2, name
        else:
            far = (have - want).double().norm() / want.double().norm()
            assert far <= (1e-14 if want.dtype == F64 else 1e-6), (name, far)


def kept(function):
    """Bytes of the unique storages that `function` saves for backward, parameters apart."""
    storages = {}

    def pack(t):
        if not isinstance(t, nn.Parameter) and not isinstance(t._base, nn.Parameter):
            storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    return sum(storages.values()), y


DTYPES = [(F64, F64), (F32, F32), (BF16, F32), (F16, F32), (BF16, BF16), (F32, BF16)]


def examples():
    def build():
        before, after = nn.Linear(48, 48, dtype=BF16), nn.Linear(40, 8, dtype=BF16)
        return nn.Sequential(before, peft_linear(BF16, F32, dropout=0.1), after).train()

    return {
        "of float32 beside bfloat16": matrix.Example(
            build, lambda dtype: {"input": torch.randn(6, 48).to(dtype)}, "1", dtype=BF16, apart=2e-2
        )
    }


@pytest.mark.parametrize("base_dtype, dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, TILE, 2 * TILE + 3])
def test_equals_peft(base_dtype, dtype, rows):
    layer = peft_linear(base_dtype, dtype)
    x = torch.randn(rows, 48).to(base_dtype)
    assert_equal(run(operated(layer), x), run(layer, x))


@pytest.mark.parametrize("x_dtype", [F32, BF16], ids=str)
def test_equals_peft_under_autocast(x_dtype):
    layer = peft_linear(F32, F32)
    x = torch.randn(3, 50, 48).to(x_dtype)
    bf16 = {"dtype": BF16}
    ours, theirs = run(operated(layer), x, **bf16), run(layer, x, **bf16)
    for name in ("default.weight", "lora_A", "lora_B"):  # computed in bf16, cast to fp32: compare what was computed
        for grads in (ours, theirs):
            grads.update({k: v.to(BF16) for k, v in grads.items() if name in k})
    assert_equal(ours, theirs)
    assert ours["y"].dtype == BF16


@pytest.mark.parametrize("base_dtype, dtype", [(F64, F64), (F32, F32), (BF16, F32)], ids=str)
@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 3, 48), "transposed", "expanded"], ids=str)
def test_shapes(base_dtype, dtype, shape):
    layer = peft_linear(base_dtype, dtype, bias=False)
    ours = operated(layer)
    if shape == "transposed":
        x = torch.randn(48, 6).to(base_dtype).t()
    elif shape == "expanded":
        x = torch.randn(1, 48).to(base_dtype).expand(5, 48)
    else:
        x = torch.randn(shape).to(base_dtype)
    a, b = run(ours, x), run(layer, x)
    if x.numel():
        assert_equal(a, b)
    else:
        assert a["y"].shape == b["y"].shape and all(not a[k].any() for k in a if "lora" in k)


@pytest.mark.parametrize("settings", [
    {"use_rslora": True}, {"lora_bias": True}, {"adapters": ("one", "two")}, {"init_lora_weights": "gaussian"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("base_dtype", [F32, BF16], ids=str)
def test_kinds_of_plain_lora(settings, base_dtype):
    layer = peft_linear(base_dtype, F32, **settings)
    x = torch.randn(33, 48).to(base_dtype)
    ours = run(operated(layer), x)
    assert_equal(ours, run(layer, x))
    assert any("bias" in k for k in ours) == ("lora_bias" in settings)


@pytest.mark.parametrize("config, reason", [
    ({"use_dora": True}, "DoraLinearVariant"),
    ({"velora_config": "default"}, "VeloraLinearVariant"),
    ({"alora_invocation_tokens": [1]}, "ALoraLinearVariant"),
])  # fmt: skip
def test_variants_are_left(config, reason):
    if "velora_config" in config:
        config = {"velora_config": peft_lora.config.VeloraConfig()}
    layer = peft_linear(**config)
    left = operate(layer)
    assert reason in left[""] and not replaced(layer)


def test_other_reasons_to_leave():
    hooked, odd, base_type = peft_linear(), peft_linear(), peft_linear()
    hooked.lora_A["default"].register_forward_hook(lambda *_: None)
    assert "hooks" in operate(hooked)[""]
    odd.lora_dropout["default"] = nn.Dropout1d(0.5)
    assert "dropout" in operate(odd)[""]
    base_type.lora_B["default"].half()
    assert "dtypes" in operate(base_type)[""]


class Scaled(peft_lora.Linear):
    def forward(self, x):
        return super().forward(x) * 1.001


class Misplaced(peft_lora.Linear):
    """Dropout after A, not before."""

    def forward(self, x):
        low = self.lora_dropout["default"](self.lora_A["default"](x.to(self.lora_A["default"].weight.dtype)))
        return self.base_layer(x) + self.lora_B["default"](low).to(x.dtype) * self.scaling["default"]


@pytest.mark.parametrize("kind, reason", [(Scaled, "results differ"), (Misplaced, "dropout")])
def test_another_forward_is_left(kind, reason):
    layer = peft_linear()
    layer.__class__ = kind
    assert reason in operate(layer)[""] and not replaced(layer)


class LikeFourBit(peft_lora.Linear):
    """How PEFT's layer beside a 4-bit base differs: the product is rounded before it is added. bitsandbytes is not run here."""

    def forward(self, x):
        y = self.base_layer(x).clone()
        for name in self.active_adapters:
            a, b, dtype = self.lora_A[name], self.lora_B[name], y.dtype
            y = y + (b(a(self.lora_dropout[name](x.to(a.weight.dtype)))) * self.scaling[name]).to(dtype)
        return y


def test_rounding_of_a_quantised_base_is_found():
    layer = peft_linear(BF16, F32)
    layer.__class__ = LikeFourBit
    x = torch.randn(65, 48).to(BF16)
    assert_equal(run(operated(layer), x), run(layer, x))
    plain = peft_linear(BF16, F32)
    assert not torch.equal(layer(x), plain(x))  # the two really differ


def test_disabled_merged_switched_and_mixed_calls_are_pefts_own():
    layer = peft_linear(adapters=("one", "two"))
    ours, x = operated(layer), torch.randn(6, 48)
    for change in (
        lambda m: m.set_adapter("two"), lambda m: m.enable_adapters(False), lambda m: m.enable_adapters(True),
        lambda m: m.merge(), lambda m: m.unmerge(), lambda m: m.set_adapter("one"),
    ):  # fmt: skip
        change(ours), change(layer)
        torch.testing.assert_close(ours(x), layer(x), rtol=1e-6, atol=1e-6)
    names = ["one", "two", "__base__"] * 2
    with torch.no_grad():
        mixed = ours.eval()(x, adapter_names=names)
        torch.testing.assert_close(mixed, layer.eval()(x, adapter_names=names), rtol=1e-6, atol=1e-6)
        assert torch.equal(mixed[2], ours.base_layer(x)[2]) and not torch.equal(mixed[0], mixed[2])


def test_a_variant_added_later_runs_as_pefts_own():
    layer = peft_linear()
    ours = operated(layer)
    for m in (layer, ours):
        torch.manual_seed(5)
        m.update_layer("dora", 4, 6, LoraConfig(r=4, use_dora=True))
        m.set_adapter(["dora"])
        nn.init.normal_(m.lora_B["dora"].weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(6, 48)
    assert torch.equal(ours(x), layer(x)) and not torch.equal(layer(x), layer.base_layer(x))


def test_probe_changes_nothing():
    layer = peft_linear(dropout=0.1)
    x = torch.randn(4, 48)
    layer(x).sum().backward()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    grads = {k: p.grad.clone() for k, p in layer.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    assert operate(layer) == {}
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert grads and all(torch.equal(p.grad, grads[k]) for k, p in layer.named_parameters() if p.grad is not None)
    assert layer.active_adapters == ["default"] and layer.training


# ---- what is kept


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_keeps_x_and_the_product_of_rank_r(dtype):
    ours, x = operated(peft_linear(dtype, F32)), torch.randn(100, 48).to(dtype).requires_grad_()
    size, _ = kept(lambda: ours(x))
    assert size == x.nbytes + 100 * 4 * 4
    stock, _ = kept(lambda: peft_linear(dtype, F32)(x))
    assert stock == 100 * (48 + 4) * 4


def test_keeps_only_what_gradients_need():
    layer = peft_linear()
    layer.lora_A["default"].weight.requires_grad_(False)
    ours, x = operated(layer), torch.randn(100, 48)
    assert kept(lambda: ours(x))[0] == 100 * 4 * 4
    layer.lora_A["default"].weight.requires_grad_(True)
    layer.lora_B["default"].weight.requires_grad_(False)
    ours = operated(layer)
    assert kept(lambda: ours(x))[0] == x.nbytes


def lora_llama(dtype=BF16, dropout=0.0, **config):
    model = get_peft_model(
        tiny_llama(layers=2, dtype=dtype), LoraConfig(r=6, target_modules="all-linear", lora_dropout=dropout, **config)
    )
    torch.manual_seed(1)
    draw_b(model)
    return model


def ours_llama(stock, prepare=None, dropout="stock"):
    model = copy.deepcopy(stock)
    assert operate(model, dropout) == {}
    with_recipes(model)
    return with_stash(model, prepare)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_model_equals_peft(dtype):
    stock = lora_llama(dtype)
    ours = ours_llama(stock)
    (loss, grads), (stock_loss, stock_grads) = step(ours, batch(rows=2)), step(stock, batch(rows=2))
    assert grads.keys() == stock_grads.keys() and len(grads) == 2 * 7 * 2
    bound = 3e-6 if dtype == F32 else 2e-2  # bf16 activations differ by rounding
    assert abs(loss - stock_loss) <= bound * abs(stock_loss)
    for name, want in stock_grads.items():
        assert grads[name].dtype == want.dtype == F32
        assert (grads[name] - want).norm() <= bound * want.norm(), name


def test_recipes_reach_the_adapters():
    """Norm outputs and products of the MLP are read by adapters alone (the base is frozen): no byte of them is kept."""
    from bench.live import LiveStorages

    tokens, kept_by = 32, {}
    for name, model in {"stock": lora_llama(), "ours": ours_llama(lora_llama())}.items():
        data = batch(tokens)
        with LiveStorages(model, list(data.values())) as live:
            loss = live.forward(lambda: model(**data).loss)  # noqa: B023
            kept_by[name] = sorted(s.rows[0] * s.rows[1] for s in live._followed.values() if not s.alive.expired())
        del loss
    products = kept_by["ours"].count(tokens * 6)
    assert products == 2 * 7
    assert kept_by["ours"].count(tokens * 176) == 2 * 2  # gate and up of two layers, no product
    assert kept_by["stock"].count(tokens * 176) == 2 * 4  # gate, silu(gate), up, and the product in float32


# ---- dropout


def masks(layer, x):
    """The elements that dropout lets through, seen from outside: with A the identity and B too, y - base is dropout(x)."""
    return layer(x) - layer.base_layer(x)


def identity_lora(p, size=16):
    layer = peft_linear(inputs=size, outputs=size, dropout=p)
    layer.update_layer("default", size, size, LoraConfig(r=size, lora_alpha=size, lora_dropout=p))
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(size))
        layer.lora_B["default"].weight.copy_(torch.eye(size))
    return layer.train()


REDRAWN_AND_STOCK = pytest.mark.parametrize("dropout", [pytest.param("redrawn", marks=pytest.mark.native), "stock"])


@REDRAWN_AND_STOCK
@pytest.mark.parametrize("rows", [5, 2 * TILE + 3])
def test_dropout_drops_and_scales(rows, dropout):
    ours = operated(identity_lora(0.25), dropout)
    x = torch.rand(rows, 16) + 0.5
    y = masks(ours, x)
    dropped = y.abs() < 1e-3
    torch.testing.assert_close(y[~dropped], x[~dropped] / 0.75, rtol=1e-3, atol=1e-4)
    n = rows * 16
    assert abs(dropped.double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)
    if rows > TILE:  # every tile draws its own
        assert not torch.equal(dropped[:TILE], dropped[TILE : 2 * TILE])
    ours.eval()
    torch.testing.assert_close(masks(ours, x), x, rtol=1e-4, atol=1e-4)


@REDRAWN_AND_STOCK
def test_dropout_is_the_same_in_the_backward(dropout):
    ours, rows = operated(identity_lora(0.5), dropout), 2 * TILE + 3
    x = (torch.rand(rows, 16) + 0.5).requires_grad_()
    y = ours(x)
    kept_elements = (y - ours.base_layer(x)).abs() > 1e-3
    (dx,) = torch.autograd.grad((y - ours.base_layer(x)).sum(), x, retain_graph=True)
    torch.testing.assert_close(dx, kept_elements * 2.0, rtol=1e-4, atol=1e-4)  # same mask for x ...
    dy = torch.randn(rows, 16)
    (da,) = torch.autograd.grad(y, ours.lora_A["default"].weight, dy)
    torch.testing.assert_close(da, dy.t() @ (x * kept_elements * 2.0), rtol=1e-4, atol=1e-3)  # ... and for the gradient of A


@REDRAWN_AND_STOCK
def test_dropout_follows_torchs_seed(dropout):
    ours, x = operated(identity_lora(0.5), dropout), torch.rand(8, 16) + 0.5

    def draw(seed):
        torch.manual_seed(seed)
        return masks(ours, x), masks(ours, x)

    (a, b), (again, _), (other, _) = draw(1), draw(1), draw(2)
    assert torch.equal(a, again) and not torch.equal(a, b) and not torch.equal(a, other)


@REDRAWN_AND_STOCK
def test_it_draws_on_the_cpu_whatever_the_default_device_is(dropout):
    ours, x = operated(identity_lora(0.5), dropout), torch.rand(8, 16) + 0.5
    torch.manual_seed(1)
    expected = ours(x)
    torch.manual_seed(1)
    with torch.device("meta"):
        assert torch.equal(ours(x), expected)


@REDRAWN_AND_STOCK
def test_no_mask_is_kept(dropout):
    ours, x = operated(peft_linear(BF16, F32, dropout=0.5), dropout), torch.randn(100, 48).to(BF16)
    state = torch.get_rng_state().nbytes if dropout == "stock" else 0
    assert kept(lambda: ours(x))[0] == x.nbytes + 100 * 4 * 4 + state
    ours.lora_A["default"].requires_grad_(False)
    assert kept(lambda: ours(x))[0] == 100 * 4 * 4  # B needs no draws


@REDRAWN_AND_STOCK
@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_in_a_checkpoint(reentrant, dropout):
    """The recompute restores torch's generator, so it draws as the first forward did."""
    stock = lora_llama(F32, dropout=0.3)
    plain, checkpointed = (ours_llama(stock, dropout=dropout) for _ in range(2))
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(7)
    loss, grads = step(plain, batch())
    torch.manual_seed(7)
    again, checkpointed_grads = step(checkpointed, batch())
    torch.manual_seed(8)
    other, _ = step(plain, batch())
    assert loss == again != other
    for name, want in grads.items():
        torch.testing.assert_close(checkpointed_grads[name], want, rtol=1e-5, atol=1e-7)


# ---- dropout="stock": the draws are PyTorch's


def as_seeded(layer, x, seed=7, **context):
    """As `run`, from a seed, and the next random number."""
    torch.manual_seed(seed)
    return run(layer, x, **context) | {"next": torch.rand(3)}


def with_dropouts(base_dtype=F32, dtype=F32, ps=(0.25, 0.0, 0.6), **config):
    """Several active adapters, each with a dropout of its own."""
    names = tuple(f"a{i}" for i in range(len(ps)))
    layer = peft_linear(base_dtype, dtype, adapters=names, **config)
    for name, p in zip(names, ps, strict=True):
        layer.lora_dropout[name] = nn.Dropout(p) if p else nn.Identity()
    return layer.train()


SHAPES = {
    "rows": lambda: torch.randn(9, 48),
    "tiles": lambda: torch.randn(2 * TILE + 3, 48),
    "batch": lambda: torch.randn(2, 5, 48),
    "vector": lambda: torch.randn(48),
    "transposed": lambda: torch.randn(48, 6).t(),
    "length first": lambda: torch.randn(5, 2, 48).transpose(0, 1),
    "strided": lambda: torch.randn(5, 96)[:, ::2],
    "expanded": lambda: torch.randn(1, 48).expand(5, 48),
}


@pytest.mark.parametrize("base_dtype, dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_dropout_draws_what_peft_draws(base_dtype, dtype, shape):
    layer = with_dropouts(base_dtype, dtype)
    torch.manual_seed(3)
    x = SHAPES[shape]().to(base_dtype)
    assert_equal(as_seeded(operated(layer), x), as_seeded(layer, x))


@pytest.mark.parametrize("x_dtype", [F32, BF16], ids=str)
def test_dropout_draws_what_peft_draws_under_autocast(x_dtype):
    layer, x = with_dropouts(), torch.randn(3, 50, 48).to(x_dtype)
    ours, theirs = as_seeded(operated(layer), x, dtype=BF16), as_seeded(layer, x, dtype=BF16)
    assert torch.equal(ours["next"], theirs["next"])
    for name in ("y", "dx"):
        assert (ours[name] - theirs[name]).norm() <= 2**-8 * theirs[name].norm(), name


def test_nothing_is_drawn_where_stock_draws_nothing():
    layer = with_dropouts(ps=(0.5, 0.5))
    ours, x = operated(layer), torch.randn(4, 48)
    for change in (
        lambda m: m.lora_dropout["a0"].eval(), lambda m: setattr(m.lora_dropout["a1"], "p", 0.0), lambda m: m.train(),
        lambda m: setattr(m.lora_dropout["a1"], "p", 0.1), lambda m: m.set_adapter("a1"), lambda m: m.eval(),
    ):  # fmt: skip
        change(ours), change(layer)
        assert_equal(as_seeded(ours, x), as_seeded(layer, x))
        with torch.no_grad():
            assert_equal(*({"y": m(x), "next": torch.rand(2)} for m in (ours, layer) if torch.manual_seed(1)))
    ours.train(), layer.train()
    empty = torch.empty(0, 48)
    assert torch.equal(as_seeded(ours, empty)["next"], as_seeded(layer, empty)["next"])


def test_dropout_may_go_through_its_backward_twice_and_late():
    layer, x = with_dropouts(), torch.randn(2, 9, 48)
    ours, want = operated(layer), None
    want = as_seeded(layer, x)
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    y = ours(x)
    for _ in range(2):
        torch.rand(5)
        before = torch.get_rng_state()
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(dx, want["dx"])


def test_dropout_of_x_that_needs_no_gradient_and_of_frozen_a():
    layer = with_dropouts()
    layer.lora_A["a0"].requires_grad_(False)
    for need_x in (False, True):
        grads = []
        for m in (operated(layer), layer):
            torch.manual_seed(7)
            x = torch.randn(9, 48).requires_grad_(need_x)
            m.zero_grad()
            m(x).square().sum().backward()
            grads.append([p.grad for p in (x, *m.parameters()) if p.grad is not None])
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("preserve", [True, False])
def test_dropout_in_a_checkpoint_is_pefts(preserve):
    """Without preserve_rng_state the recompute draws anew, and so does everything that the backward uses."""
    layer = with_dropouts(ps=(0.3, 0.5))
    made = []
    for m in (operated(layer), layer):
        torch.manual_seed(5)
        m.zero_grad()
        x = torch.randn(9, 48, requires_grad=True, generator=torch.Generator().manual_seed(1))
        y = torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False, preserve_rng_state=preserve)
        torch.rand(3)
        y.square().sum().backward()
        made.append([y.detach(), x.grad, *(p.grad for p in m.parameters() if p.grad is not None), torch.rand(2)])
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-5)


def test_draws_of_other_threads_do_not_come_between():
    """The gradient is that of the mask of the forward, whoever draws from the same generator meanwhile."""
    ours, done = operated(identity_lora(0.5)), threading.Event()

    def draw():
        while not done.is_set():
            torch.rand(7)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(50):
            x = (torch.rand(64, 16) + 0.5).requires_grad_()
            y = ours(x) - ours.base_layer(x)
            (dx,) = torch.autograd.grad(y.sum(), x)
            assert torch.equal(dx.abs() > 0.1, y.abs() > 1e-3)
    finally:
        done.set()
        thread.join()


def test_the_draws_survive_hooks_that_move_what_is_saved():
    layer, x = with_dropouts(), torch.randn(5, 2, 48).transpose(0, 1)
    ours, want = operated(layer), as_seeded(layer, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):  # strides are lost
        assert_equal(as_seeded(ours, x), want)


class LikeFourBitUnderAutocast(LikeFourBit):
    """PEFT's layers beside bitsandbytes cast x under no autocast only: dropout gets it as it is."""

    def forward(self, x):
        y = self.base_layer(x).clone()
        for name in self.active_adapters:
            a, b, dtype = self.lora_A[name], self.lora_B[name], y.dtype
            casts = not torch.is_autocast_enabled("cpu")
            x = x.to(a.weight.dtype) if casts else x
            y = y + (b(a(self.lora_dropout[name](x))) * self.scaling[name]).to(dtype)
        return y


@pytest.mark.parametrize("kind", [LikeFourBit, LikeFourBitUnderAutocast])
def test_the_dtype_in_which_x_is_dropped_is_found(kind):
    """1 / (1 - p) is rounded to it: 1.0703125 in bfloat16 for 1.0714285."""
    layer = identity_lora(1 / 15)
    layer.__class__ = kind
    ours, x, y = operated(layer), torch.ones(64, 16, dtype=BF16), []
    for m in (ours, layer):
        torch.manual_seed(1)
        with torch.autocast("cpu", BF16):
            y.append(masks(m, x))
    assert torch.equal(*y)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_dropout_input_draws_what_dropout_draws(dtype, shape):
    x = SHAPES[shape]().to(F32).add(10).to(F32)
    for cast in (False, True):
        x = x if cast else x.to(dtype)
        seen = x.to(dtype)
        torch.manual_seed(2)
        want = [F.dropout(seen, 0.3), F.dropout(seen, 0.05)]
        after = torch.get_rng_state()
        torch.manual_seed(2)
        drawn = DropoutInput.of(x, dtype)
        made, state = drawn.draw([0.3, 0.0, 0.05])
        assert torch.equal(torch.get_rng_state(), after) and made[1] is None
        again = drawn.draw_again([0.3, 0.0, 0.05], state)
        rows = seen.reshape(-1, seen.shape[-1])
        for mask, same, y in zip(made[::2], again[::2], want, strict=True):
            assert torch.equal(mask.kept, same.kept) and mask.kept.element_size() == 1
            assert torch.equal(mask.times(rows, 0), y.reshape(rows.shape))


@pytest.mark.parametrize("rank_pattern", [{}, {"q_proj": 2}])
def test_a_model_trains_with_dropout_as_stock(rank_pattern):
    stock = lora_llama(F32, dropout=0.1, rank_pattern=rank_pattern)
    ours, got = copy.deepcopy(stock), []
    unswag.apply_unswag_surgery(ours)
    data = batch(33, rows=2)
    for m in (ours.train(), stock.train()):
        torch.manual_seed(1)
        loss, grads = step(m, data)
        got.append((loss, grads, torch.rand(3)))
    (loss, grads, after), (stock_loss, stock_grads, stock_after) = got
    assert abs(loss - stock_loss) <= 3e-6 * stock_loss and torch.equal(after, stock_after)
    for name, want in stock_grads.items():
        assert (grads[name] - want).norm() <= 1e-5 * want.norm(), name


# ---- an output edited in place


@pytest.mark.parametrize("ps", [(0.0,), (0.3, 0.5), ()], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 48), (5, 48), (1, 48)], ids=str)
def test_the_output_can_be_edited_in_place(ps, shape):
    layer = with_dropouts(ps=ps or (0.0,))
    if not ps:
        layer.set_adapter([])
    ours = operated(layer)
    assert_trains_as(layer, ours, shape)
    for edit in EDITS.values():
        grads = []
        for m in (layer, ours):
            m.zero_grad()
            train(m, edit, shape)
            grads.append([p.grad for p in m.parameters() if p.grad is not None])
        if not grads[0]:  # stock raises
            continue
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_output_lies_in_memory_as_stocks(shape):
    layer, x = peft_linear(), SHAPES[shape]()
    ours, theirs = operated(layer)(x), layer(x)
    assert (ours.stride(), ours.is_contiguous(), ours._is_view()) == (
        theirs.stride(),
        theirs.is_contiguous(),
        theirs._is_view(),
    )


class Clipped(nn.Module):
    """As OLMo with clip_qkv."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(32, 32), nn.Linear(32, 1)

    def forward(self, x):
        y = self.fc(x)
        y += x
        y[:, 0] = 0.0
        y.mul_(2.0).clamp_(-1.5, 1.5)
        return self.out(y).square().mean()


def test_a_model_that_edits_what_a_linear_returns():
    torch.manual_seed(0)
    stock = get_peft_model(Clipped(), LoraConfig(r=4, target_modules=["fc"], lora_dropout=0.1))
    draw_b(stock)
    ours, x, grads = copy.deepcopy(stock), torch.randn(2, 5, 32), []
    unswag.apply_unswag_surgery(ours)
    for m in (ours.train(), stock.train()):
        torch.manual_seed(1)
        m(x).backward()
        grads.append([p.grad for p in m.parameters() if p.grad is not None])
    torch.testing.assert_close(*grads)


# ---- what users of PEFT do after the surgery


def quietly(function):
    """With each warning of ours an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="unswag")
        return function()


LATER = {
    "add": lambda m, d: m.add_adapter("two", LoraConfig(r=3, lora_alpha=9, lora_dropout=0.4, target_modules="all-linear")),
    "draw": lambda m, d: [draw_again(p) for n, p in m.named_parameters() if ".two." in n],
    "set": lambda m, d: m.set_adapter("two"),
    "both": lambda m, d: m.base_model.set_adapter(["default", "two"]),
    "rslora": lambda m, d: m.add_adapter("rs", LoraConfig(r=2, use_rslora=True, lora_bias=False, target_modules=["q_proj"])),
    "scale": lambda m, d: [layer.scale_layer(0.5) for layer in lora_layers(m)],
    "unscale": lambda m, d: [layer.unscale_layer() for layer in lora_layers(m)],
    "set_scale": lambda m, d: [layer.set_scale("two", 3.0) for layer in lora_layers(m) if "two" in layer.lora_A],
    "frozen": lambda m, d: [p.requires_grad_(False) for n, p in m.named_parameters() if "lora_A.two" in n],
    "merge": lambda m, d: m.merge_adapter(),
    "unmerge": lambda m, d: m.unmerge_adapter(),
    "save": lambda m, d: m.save_pretrained(d, selected_adapters=["two"]),
    "delete": lambda m, d: m.delete_adapter("two"),
    "load": lambda m, d: m.load_adapter(d / "two", "again", is_trainable=True),
    "set again": lambda m, d: m.set_adapter("again"),
    "dropout": lambda m, d: [d.__setattr__("p", 0.2) for n, d in m.named_modules() if n.endswith("lora_dropout.again")],
    "default": lambda m, d: m.set_adapter("default"),
}


def draw_again(p):
    with torch.no_grad():
        p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.shape[0])))


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, peft_lora.LoraLayer)]


def test_peft_after_the_surgery(tmp_path):
    stock = lora_llama(F32, dropout=0.1)
    ours, data = copy.deepcopy(stock), batch(12)
    unswag.apply_unswag_surgery(ours)

    def compare(change):
        got = []
        for m in (ours, stock):
            m.train()
            torch.manual_seed(1)
            loss, grads = quietly(lambda: step(m, data))  # noqa: B023
            got.append((loss, grads, torch.rand(3)))
        (loss, grads, after), (stock_loss, stock_grads, stock_after) = got
        assert abs(loss - stock_loss) <= 1e-5 * stock_loss and torch.equal(after, stock_after), change
        assert grads.keys() == stock_grads.keys(), change
        whole = sum(want.norm().square() for want in stock_grads.values()).sqrt()
        for name, want in stock_grads.items():
            assert (grads[name] - want).norm() <= 3e-4 * want.norm() + 1e-6 * whole, (change, name)

    compare("nothing")
    for name, change in LATER.items():
        for which, m in (("ours", ours), ("stock", stock)):
            torch.manual_seed(2)
            change(m, tmp_path / which)
        if name not in ("merge", "save", "delete"):  # merged adapters have no gradient; after delete nothing is active
            compare(name)
    with ours.disable_adapter(), stock.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(ours(**data).loss, stock(**data).loss)
    assert isinstance(ours, PeftModel)
    merged, stock_merged = ours.eval().merge_and_unload(), stock.eval().merge_and_unload()
    assert not lora_layers(merged)
    torch.testing.assert_close(merged(**data).loss, stock_merged(**data).loss)


def hook(m):
    m.lora_A["a0"].register_forward_hook(lambda module, args, y: 2 * y)


def bring_forward(m):
    b = m.lora_B["a0"]
    b.forward = lambda x: 3 * nn.functional.linear(x, b.weight)


def in_place(m):
    m.lora_dropout["a0"] = nn.Dropout(0.5, inplace=True)


def another_dropout(m):
    m.lora_dropout["a0"] = nn.AlphaDropout(0.5)


def parametrize(m):
    torch.manual_seed(0)
    nn.utils.parametrizations.weight_norm(m.lora_A["a0"])


def learn_the_scaling(m):
    m.scaling["a0"] = torch.tensor(0.7)


def swap_the_class(m):
    m.lora_B["a0"].__class__ = type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})


@pytest.mark.parametrize(
    "change", [hook, bring_forward, in_place, another_dropout, parametrize, learn_the_scaling, swap_the_class]
)
def test_an_adapter_that_is_no_longer_plain_runs_as_pefts_own_and_says_so(change):
    layer = with_dropouts(ps=(0.3,))
    ours, x = operated(layer), torch.randn(6, 48)
    change(ours), change(layer)
    with pytest.warns(UserWarning, match="runs its own forward, .*: its adapter 'a0'"):
        have = as_seeded(ours, x)
    want = as_seeded(layer, x)
    assert all(torch.equal(have[k], want[k]) for k in want)


@pytest.mark.parametrize("change", [
    lambda m: setattr(m, "base_layer", nn.Sequential(nn.Linear(48, 40), nn.Dropout(0.5))),
    lambda m: m.base_layer.register_forward_hook(lambda module, args, y: y + 1),
    lambda m: m.to(torch.bfloat16), lambda m: m.to(torch.float64), lambda m: m.base_layer.to(torch.bfloat16),
    lambda m: m.lora_dropout.update({"a0": nn.Identity()}), lambda m: m.scaling.update(a0=-2.5),
    lambda m: m.lora_A["a0"].weight.data.mul_(2), lambda m: m.lora_dropout["a0"].register_module("extra", nn.Identity()),
], ids=["base", "hook on the base", "bf16", "f64", "base in bf16", "dropout", "scaling", "A", "part of a dropout"])  # fmt: skip
def test_what_changes_later_is_seen(change):
    layer = with_dropouts(ps=(0.3, 0.5))
    ours = operated(layer)
    for m in (ours, layer):
        torch.manual_seed(4)
        change(m)
    x = torch.randn(6, 48).to(next(layer.base_layer.parameters()).dtype)
    layer.train(), ours.train()
    assert_equal(quietly(lambda: as_seeded(ours, x)), as_seeded(layer, x))


def unwarned(function):
    with warnings.catch_warnings(action="ignore"):
        return function()


def with_forward(module, forward):
    module.forward = types.MethodType(forward, module)


def doubled(module, args, y):
    return 2 * y


def another(m):
    torch.manual_seed(6)
    m.update_layer("other", 4, 6, LoraConfig(r=4, lora_alpha=6))
    draw_b(m)
    m.set_adapter("other")


AFTER_A_CALL = {
    "nothing": lambda m: None,
    "switched off": lambda m: m.enable_adapters(False),
    "merged": lambda m: m.merge(),
    "another adapter": another,
    "both adapters": lambda m: (another(m), m.set_adapter(["default", "other"])),
    "scaling": lambda m: m.scaling.update(default=-2.5),
    "scaling, anew": lambda m: setattr(m, "scaling", {"default": -2.5}),
    "hook": lambda m: m.lora_A["default"].register_forward_hook(doubled),
    "pre-hook": lambda m: m.lora_B["default"].register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "hook on the dropout": lambda m: m.lora_dropout["default"].register_forward_hook(doubled),
    "forward": lambda m: with_forward(m.lora_B["default"], lambda self, x: 2 * F.linear(x, self.weight)),
    "class": lambda m: setattr(
        m.lora_A["default"], "__class__",
        type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)}),
    ),
    "weight": lambda m: setattr(m.lora_A["default"], "weight", nn.Parameter(torch.full((4, 48), 0.1))),
    "weight of one adapter": lambda m: m.lora_B["default"]._parameters.update(weight=nn.Parameter(torch.ones(40, 4))),
    "weight in place": lambda m: m.lora_A["default"].weight.data.mul_(2),
    "data of a weight": lambda m: setattr(m.lora_A["default"].weight, "data", torch.full((4, 48), 0.1)),
    "bias": lambda m: setattr(m.lora_B["default"], "bias", nn.Parameter(torch.ones(40))),
    "part": lambda m: m.lora_A.update({"default": nn.Linear(48, 4, bias=False).requires_grad_(False)}),
    "parts": lambda m: setattr(m, "lora_B", copy.deepcopy(m.lora_B).requires_grad_(False)),
    "dtype": lambda m: m.to(F64),
    "dtype of the adapter": lambda m: (m.lora_A.to(F64), m.lora_B.to(F64)),
    "dtype of the base": lambda m: m.base_layer.to(F64),
    "dropout": lambda m: m.lora_dropout.update({"default": nn.Dropout(0.5)}),
    "p": lambda m: setattr(m.lora_dropout["default"], "p", 0.5),
}  # fmt: skip


@pytest.mark.parametrize("change", AFTER_A_CALL)
@pytest.mark.parametrize("dropout", [False, True])
def test_what_changes_after_a_call_is_seen(change, dropout):
    """What a call found out of a module serves the next ones, as long as it is so."""
    layer = peft_linear()
    if dropout:
        layer.lora_dropout["default"] = nn.Dropout(0.0)
    ours, x = operated(layer), torch.randn(6, 48)
    assert_equal(run(ours, x), run(layer, x))
    assert vars(ours)[KNOWN].adapter(ours, x) is not None
    if change == "p" and not dropout:
        return
    for m in (ours, layer):
        torch.manual_seed(5)
        AFTER_A_CALL[change](m)
    got = []
    for m in (ours, layer):
        torch.manual_seed(4)
        got.append(unwarned(lambda: run(m, x.to(m.base_layer.weight.dtype))))  # noqa: B023
    assert got[0].keys() == got[1].keys()
    for name, want in got[1].items():
        if want is None:
            assert got[0][name] is None, name
        else:
            assert_equal({name: got[0][name]}, {name: want})
    assert (vars(ours)[KNOWN].adapter(ours, x) is not None) or change != "nothing"


def test_global_hooks_and_a_patched_linear_are_seen_after_a_call(monkeypatch):
    layer = peft_linear()
    ours, x, seen = operated(layer), torch.randn(6, 48), []
    run(ours, x)
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)) or None)
    try:
        unwarned(lambda: run(ours, x))
    finally:
        hook.remove()
    assert seen.count(nn.Linear) == 3  # A and B run as modules
    run(ours, x)
    assert vars(ours)[KNOWN].adapter(ours, x) is not None
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * plain(self, x))
    assert_equal(unwarned(lambda: run(ours, x)), run(layer, x))


def test_a_copy_knows_nothing_of_its_model():
    ours, x = operated(peft_linear()), torch.randn(6, 48)
    run(ours, x)
    made = copy.deepcopy(ours)
    assert vars(made)[KNOWN].adapter(made, x) is None
    with torch.no_grad():
        made.lora_B["default"].weight.zero_()
    assert torch.equal(made(x), made.base_layer(x)) and not torch.equal(ours(x), made(x))


def test_without_a_cast_of_x_dtypes_must_fit_as_in_stock():
    layer = peft_linear(BF16, F32)
    ours, x = operated(layer), torch.randn(6, 48, dtype=BF16)
    for m in (ours, layer):
        m.cast_input_dtype_enabled = False
        with pytest.raises(RuntimeError, match="dtype"):
            m(x)


def test_copies_and_replicas_run_on_their_own_weights():
    layer = with_dropouts(ps=(0.3,))
    ours, x = operated(layer), torch.randn(6, 48)
    deep, shallow = copy.deepcopy(ours), copy.copy(ours)
    replica = ours._replicate_for_data_parallel()
    for made in (deep, shallow, replica):
        other = copy.deepcopy(layer)
        draw_again(other.lora_B["a0"].weight)
        if made is replica:  # parameters are plain tensors there
            made._modules = {k: copy.copy(v) for k, v in made._modules.items()}
            made.lora_B = nn.ModuleDict({"a0": ours.lora_B["a0"]._replicate_for_data_parallel()})
            made.lora_B["a0"].weight, made.lora_B["a0"].bias = other.lora_B["a0"].weight.clone(), None
        else:
            made.lora_B = other.lora_B
        torch.manual_seed(1)
        y = made(x)
        torch.manual_seed(1)
        torch.testing.assert_close(y, other(x))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_forward_mode_and_functional_calls_run_pefts_own(p):
    layer = with_dropouts(ps=(p,))
    ours, x, v = operated(layer), torch.randn(4, 48), torch.randn(4, 48)
    made = []
    for m in (ours, layer):
        torch.manual_seed(1)
        with torch.autograd.forward_ad.dual_level():
            made.append(torch.autograd.forward_ad.unpack_dual(m(torch.autograd.forward_ad.make_dual(x, v))))
    torch.testing.assert_close(*made)
    weights = {n: (2 * w).detach() for n, w in layer.named_parameters()}
    made = [torch.func.functional_call(m, weights, x) for m in (ours, layer) if torch.manual_seed(1)]
    torch.testing.assert_close(*made)


# ---- what else a layer must hold


def test_second_derivative_is_an_error():
    ours, x = operated(peft_linear()), torch.randn(4, 48, requires_grad=True)
    (dx,) = torch.autograd.grad(ours(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        dx.sum().backward()


def test_inputs_and_incoming_gradients_are_not_written():
    ours = operated(peft_linear(F32, F32))
    x, dy = torch.randn(9, 48, requires_grad=True), torch.randn(9, 40)
    before = [t.detach().clone() for t in (x, dy, *ours.parameters())]
    ours(x).backward(dy)
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, (x, dy, *ours.parameters()), strict=True))


def test_a_backward_under_autocast_computes_as_its_forward_did():
    ours, x, dy = operated(peft_linear(F32, F32)), torch.randn(9, 48), torch.randn(9, 40)
    want = run(ours, x, dy)
    y = ours(x)
    with torch.autocast("cpu", BF16):
        grads = torch.autograd.grad(y, [ours.lora_A["default"].weight, ours.lora_B["default"].weight], dy)
    assert all(torch.equal(g, want[f"lora_{k}.default.weight"]) for g, k in zip(grads, "AB", strict=True))


def test_x_changed_in_place_is_an_error():
    ours, x = operated(peft_linear()), torch.randn(4, 48)
    y = ours(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_weight_gradients_of_16_bit_adapters_are_summed_in_float32():
    """4,096 rows of ones: a bf16 sum stops growing at 256."""
    layer = peft_linear(BF16, BF16)
    ours = operated(layer)
    x = torch.ones(4096, 48, dtype=BF16)
    grads = run(ours, x, torch.ones(4096, 40))
    truth = run(copy.deepcopy(layer).to(F64), x.to(F64), torch.ones(4096, 40))
    for name in ("lora_A.default.weight", "lora_B.default.weight"):
        assert (grads[name].double() - truth[name]).norm() <= 2**-7 * truth[name].norm(), name


def test_torch_func_and_compile_run_pefts_own():
    layer = peft_linear()
    ours, x = operated(layer), torch.randn(4, 48)
    call = torch.func.grad(lambda t: ours(t).pow(2).sum())
    torch.testing.assert_close(call(x), torch.func.grad(lambda t: layer(t).pow(2).sum())(x), rtol=1e-5, atol=1e-5)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_in_a_cuda_graph_is_pefts_own(p, monkeypatch):
    module = operated(identity_lora(p))
    proof = Proof(Candidate("", module))
    monkeypatch.setattr("unswag.torch.patterns.lora.is_plain", lambda _: True)
    x = types.SimpleNamespace(is_cuda=True, dtype=torch.float32)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert is_ordinary(module, x, proof) == (not capturing or p == 0)
    assert is_ordinary(module.eval(), x, proof)
