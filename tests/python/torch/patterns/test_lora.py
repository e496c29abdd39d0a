"""LoRA beside a Linear: what PEFT computes, with x kept as it is.

lora_B is drawn anew everywhere: a fresh one is zero, and then every gradient of lora_A is zero too.
"""

import copy
import math
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora as peft_lora
from tests.python.torch.small_models import batch, step, tiny_llama, with_recipes, with_stash
from torch import nn

from unswag.torch.lora import TILE, TILE_ELEMENTS, Adapter, _How, add_lora
from unswag.torch.patterns.lora import Lora, _ordinary
from unswag.torch.patterns.pattern import replaced, restore
from unswag.torch.patterns.probing import sealed, ulps

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


def operate(model):
    """The pattern alone on every place it finds; {module name: reason} of what it leaves."""
    pattern, left = Lora(), {}
    for candidate in list(pattern.find(model)):
        with sealed():
            reason = pattern.probe(candidate)
        if reason is None:
            pattern.apply(candidate)
        else:
            left[candidate.name] = reason
    return left


def operated(layer):
    ours = copy.deepcopy(layer)
    assert operate(ours) == {} and replaced(ours)
    return ours


def run(layer, x, dy=None, **context):
    """y, dx and the gradient of every adapter weight."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", **context) if context else torch.enable_grad():
        y = layer(x.view_as(x))  # no leaf: autocast would share one cast of it, as it does for weights
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


def test_restored():
    layer = peft_linear()
    assert operate(layer) == {} and replaced(layer)
    restore(layer)
    assert "forward" not in vars(layer) and not replaced(layer)


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


def ours_llama(stock, prepare=None):
    model = copy.deepcopy(stock)
    assert operate(model) == {}
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


@pytest.mark.native
@pytest.mark.parametrize("rows", [5, 2 * TILE + 3])
def test_dropout_drops_and_scales(rows):
    ours = operated(identity_lora(0.25))
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


@pytest.mark.native
def test_dropout_is_the_same_in_the_backward():
    ours, rows = operated(identity_lora(0.5)), 2 * TILE + 3
    x = (torch.rand(rows, 16) + 0.5).requires_grad_()
    y = ours(x)
    kept_elements = (y - ours.base_layer(x)).abs() > 1e-3
    (dx,) = torch.autograd.grad((y - ours.base_layer(x)).sum(), x, retain_graph=True)
    torch.testing.assert_close(dx, kept_elements * 2.0, rtol=1e-4, atol=1e-4)  # same mask for x ...
    dy = torch.randn(rows, 16)
    (da,) = torch.autograd.grad(y, ours.lora_A["default"].weight, dy)
    torch.testing.assert_close(da, dy.t() @ (x * kept_elements * 2.0), rtol=1e-4, atol=1e-3)  # ... and for the gradient of A


@pytest.mark.native
def test_dropout_follows_torchs_seed():
    ours, x = operated(identity_lora(0.5)), torch.rand(8, 16) + 0.5

    def draw(seed):
        torch.manual_seed(seed)
        return masks(ours, x), masks(ours, x)

    (a, b), (again, _), (other, _) = draw(1), draw(1), draw(2)
    assert torch.equal(a, again) and not torch.equal(a, b) and not torch.equal(a, other)


@pytest.mark.native
def test_the_seed_is_drawn_on_the_cpu_whatever_the_default_device_is():
    ours, x = operated(identity_lora(0.5)), torch.rand(8, 16) + 0.5
    torch.manual_seed(1)
    expected = ours(x)
    torch.manual_seed(1)
    with torch.device("meta"):
        assert torch.equal(ours(x), expected)


@pytest.mark.native
def test_no_mask_is_kept():
    ours, x = operated(peft_linear(BF16, F32, dropout=0.5)), torch.randn(100, 48).to(BF16)
    assert kept(lambda: ours(x))[0] == x.nbytes + 100 * 4 * 4


@pytest.mark.native
@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_in_a_checkpoint(reentrant):
    """The recompute restores torch's generator, so it draws the seeds of the first forward."""
    stock = lora_llama(F32, dropout=0.3)
    plain, checkpointed = ours_llama(stock), ours_llama(stock)
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


# ---- add_lora by itself


@pytest.mark.parametrize("p", [0.0, pytest.param(0.4, marks=pytest.mark.native)])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(p, bias):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=F64, generator=g, requires_grad=True)

    base, x, a, b = draw(5, 7), draw(5, 8), draw(3, 8), draw(7, 3)
    shift = draw(7) if bias else None
    assert torch.autograd.gradcheck(
        lambda *t: add_lora(t[0], t[1], [Adapter(t[2], t[3], t[4] if bias else None, 0.7, p, 11)]),
        (base, x, a, b, *([shift] if bias else [])),
    )


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


def test_mixed_dtypes_are_an_error():
    with pytest.raises(TypeError, match=r"torch\.bfloat16, torch\.float32; convert all"):
        add_lora(torch.zeros(2, 7), torch.zeros(2, 8), [Adapter(torch.zeros(3, 8), torch.zeros(7, 3, dtype=BF16), None, 1.0)])


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
    x = types.SimpleNamespace(is_cuda=True, dtype=torch.float32)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert _ordinary(module, x) == (not capturing or p == 0)
    assert _ordinary(module.eval(), x)


@pytest.mark.parametrize("cols", [0, 1, 2048, 14336, 1 << 23])
def test_tiles_of_cuda_are_large_and_begin_on_a_block_of_draws(cols):
    how = {dtype: _How(dtype, dtype, False, ()) for dtype in (F32, BF16)}
    for rows in (0, 3, 9_001):
        tiles = how[F32].tiles(rows, cols, on_cuda=True)
        assert [i for tile in tiles for i in range(tile.start, tile.stop)] == list(range(rows))
        assert all(tile.start % 4 == 0 and max(tile.stop - tile.start, 4) * cols <= TILE_ELEMENTS * 2 for tile in tiles)
        assert len(tiles) <= rows * cols // TILE_ELEMENTS * 2 + 1
        assert len(how[BF16].tiles(rows, cols, on_cuda=True)) == min(rows, 1)
        assert len(how[F32].tiles(rows, cols, on_cuda=False)) == -(-rows // TILE)
