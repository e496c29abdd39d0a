from __future__ import annotations

import re
from collections import Counter
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from near import SEED, assert_as_near
from programs import QUICK, both_ways, collectives, compiled, forward_backward, four_devices, traced
from tests.python.activations import ACTIVATIONS, of_kind
from values import kept, normal, unit

import unswag.jax
from unswag.jax.blocks import gated_mlp, linear_cross_entropy, mlp

H, FF, OUT = 6, 40, 5  # 40 bits do not fill two words
SHAPES = [((), 7, 3), ((2, 3), 6, 2), ((2,), 4, 9)]  # leading dimensions, tokens, chunk

PLAIN_ACTS = {name: partial(row.jax, jax) for name, row in of_kind("mask", "square").items()}
PLAIN_ACTS["leaky_relu"] = partial(jax.nn.leaky_relu, negative_slope=0.2)
GATED_ACTS = {name: partial(row.jax, jax) for name, row in ACTIVATIONS.items() if row.gated_jax}
KEEPS = {
    act: ["mask", "pre_activation", "recompute"] if act != "relu2" else ["pre_activation", "recompute"] for act in PLAIN_ACTS
}
PLAIN_CASES = [(act, keep) for act, keeps in KEEPS.items() for keep in keeps]
GATED_CASES = [(act, keep) for act in GATED_ACTS for keep in ("pre_activation", "recompute")]


def plain_mlp(x, up, down, up_bias=None, down_bias=None, *, act="relu"):
    z = x @ up if up_bias is None else x @ up + up_bias
    y = PLAIN_ACTS[act](z) @ down
    return y if down_bias is None else y + down_bias


def plain_gated(x, gate, up, down, *, act="silu"):
    return (GATED_ACTS[act](x @ gate) * (x @ up)) @ down


def our_mlp(x, up, down, up_bias=None, down_bias=None, **how):
    return mlp(x, up, down, up_bias=up_bias, down_bias=down_bias, negative_slope=0.2, **how)


def arrays(leading=(), tokens=7, dtype=jnp.float32, gated=False, biases=False, sizes=(H, FF, OUT), seed=0):
    hidden, ff, out = sizes
    shapes = [(hidden, ff)] * (1 + gated) + [(ff, out)] + [(ff,), (out,)] * biases
    weights = [normal(shape, dtype, seed + 1 + i, 1 / np.sqrt(shape[0])) for i, shape in enumerate(shapes)]
    return [normal((*leading, tokens, hidden), dtype, seed), *weights]


def cotangent(function, args, seed=9):
    y = jax.eval_shape(function, *args)
    return normal(y.shape, y.dtype, seed)


def assert_equal(ours, plain, tolerance):
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if b.size:
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(np.nanmax(np.abs(b)))))


def as_float64(args):
    return [jnp.asarray(np.asarray(x, np.float64)) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in args]


def draws(ours, plain, dtype, **how):
    """Ours, the plain spelling's and the truth, which is the plain spelling's in float64."""
    ours, plain = both_ways(ours), both_ways(plain)
    for seed in range(0, 30, 10):
        args = arrays((2,), TOKENS, dtype, sizes=(64, 160, 48), seed=seed, **how)
        args = [normal((2, TOKENS, 48), dtype, seed + 9), *args]
        yield ours(*args), plain(*args), plain(*as_float64(args))


TOKENS = 96
TERMS = 2 * TOKENS  # of the longest sum, a weight's gradient


def products(function, *args):
    """Matrix products in the program; those of a loop count once."""
    return traced(function, *args).count("stablehlo.dot_general")


# ---- MLP: values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("act", "keep"), PLAIN_CASES)
def test_mlp_is_the_plain_spelling(x64, act, keep):
    for leading, tokens, chunk in SHAPES if act == "relu" else SHAPES[:1]:
        args = arrays(leading, tokens, jnp.float64, biases=chunk != 2)
        plain = partial(plain_mlp, act=act)
        dy = cotangent(plain, args)
        ours = forward_backward(partial(our_mlp, act=act, keep=keep, chunk=chunk), args, dy)
        assert_equal(ours, forward_backward(plain, args, dy), 1e-12)


@pytest.mark.parametrize(("act", "keep"), GATED_CASES)
def test_gated_mlp_is_the_plain_spelling(x64, act, keep):
    for leading, tokens, chunk in SHAPES[:2] if act == "silu" else SHAPES[:1]:
        args = arrays(leading, tokens, jnp.float64, gated=True)
        plain = partial(plain_gated, act=act)
        dy = cotangent(plain, args)
        ours = forward_backward(partial(gated_mlp, act=act, keep=keep, chunk=chunk), args, dy)
        assert_equal(ours, forward_backward(plain, args, dy), 1e-12)


@pytest.mark.parametrize(
    ("dtype", "keep"), [(jnp.bfloat16, "recompute"), (jnp.float16, "mask"), (jnp.float32, "pre_activation")]
)
def test_mlp_is_as_exact_as_the_plain_spelling(x64, dtype, keep):
    found = draws(partial(our_mlp, keep=keep, chunk=40), plain_mlp, dtype, biases=True)
    assert_as_near(found, TERMS, unit(dtype))


@pytest.mark.parametrize(
    ("dtype", "act", "keep"),
    [
        (jnp.bfloat16, "silu", "pre_activation"),
        (jnp.float16, "gelu_tanh", "recompute"),
        (jnp.float32, "silu", "recompute"),
    ],
)
def test_gated_mlp_is_as_exact_as_the_plain_spelling(x64, dtype, act, keep):
    found = draws(partial(gated_mlp, act=act, keep=keep, chunk=40), partial(plain_gated, act=act), dtype, gated=True)
    assert_as_near(found, TERMS, unit(dtype))


@jax.custom_vjp
def _slightly_steep(z):
    return jax.nn.relu(z)


_slightly_steep.defvjp(lambda z: (jax.nn.relu(z), z > 0), lambda on, dh: (jnp.where(on, dh * (1 + 1e-5), 0),))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, up, down: _slightly_steep(x @ up) @ down,
        lambda x, up, down: (jax.nn.relu(x @ up).astype(jnp.bfloat16) @ down.astype(jnp.bfloat16)).astype(x.dtype),
        lambda x, up, down: (jax.nn.relu(x @ up) @ down).at[0, 0, 0].add(1e-3),
    ],
    ids=["a derivative off by 1e-5", "a sum in bfloat16", "one element"],
)
def test_the_measure_sees_an_error(x64, wrong):
    with pytest.raises(AssertionError, match="ours is off by"):
        assert_as_near(draws(wrong, plain_mlp, jnp.float32), TERMS)


def test_weight_gradients_are_summed_in_float32():
    """256 equal terms and more: a sum kept in bfloat16 would stop growing."""
    x, up, down = jnp.ones((1024, 2), jnp.bfloat16), jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 2), jnp.bfloat16)
    dup = jax.grad(lambda up: mlp(x, up, down, chunk=1).astype(jnp.float32).sum())(up)
    np.testing.assert_array_equal(np.asarray(dup, np.float32), 2048)


def test_rows256_is_the_same_function():
    args = arrays((2,), 600)
    run = [
        forward_backward(partial(mlp, keep="mask", chunk=256, layout=layout), args, jnp.ones((2, 600, OUT)))
        for layout in ("rows", "rows256")
    ]
    for a, b in zip(*run, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("keep", ["mask", "recompute"])
def test_awkward_rows_stay_by_themselves(keep):
    """NaN, infinities and zeros: as in the plain spelling, and no other token hears of it."""
    x, up, down = arrays((), 8)
    x = x.at[1, 0].set(np.nan).at[3].set(0.0).at[4].set(-0.0).at[5, 2].set(np.inf).at[6, 2].set(-np.inf)
    for args, dy in [
        ((x, up, down), jnp.ones((8, OUT))),
        ((x.at[1, 0].set(1.0), up, down), jnp.ones((8, OUT)).at[2].set(np.nan)),
    ]:
        ours = forward_backward(partial(mlp, keep=keep, chunk=3), args, dy)
        plain = forward_backward(plain_mlp, args, dy)
        for a, b in zip(ours[:2], plain[:2], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert np.isfinite(np.asarray(ours[1])[[0, 7]]).all()


@pytest.mark.parametrize("shape", [(0, H), (2, 0, H), (0, 4, H)])
def test_no_tokens(shape):
    _, up, down = arrays()
    for keep in ("mask", "pre_activation") if shape[0] else ("mask",):
        y, dx, dup, ddown = forward_backward(
            partial(mlp, keep=keep, chunk=3), [jnp.zeros(shape), up, down], jnp.zeros((*shape[:-1], OUT))
        )
        assert y.shape == (*shape[:-1], OUT) and dx.shape == shape
        assert not dup.any() and not ddown.any()


# ---- MLP: what is kept ---------------------------------------------------------------------------------------------------

X, UP, DOWN = ("float32", (2, 7, H)), ("float32", (H, FF)), ("float32", (FF, OUT))
KEPT = {  # chunks of 3 tokens: two whole ones and one more token
    "mask": [("uint32", (2, 2, 3, 2)), ("uint32", (2, 1, 2))],
    "pre_activation": [("float32", (2, 2, 3, FF)), ("float32", (2, 1, FF))],
    "recompute": [],
}


@pytest.mark.parametrize("keep", KEPT)
def test_mlp_keeps(keep):
    assert Counter(kept(partial(mlp, keep=keep, chunk=3), *arrays((2,)))) == Counter([X, UP, DOWN, *KEPT[keep]])


@pytest.mark.parametrize("keep", ["pre_activation", "recompute"])
def test_gated_mlp_keeps(keep):
    assert Counter(kept(partial(gated_mlp, keep=keep, chunk=3), *arrays((2,), gated=True))) == Counter(
        [X, UP, UP, DOWN, *KEPT[keep] * 2]
    )


LAYERS = 3


def layers(block, x, stacked):
    return jax.lax.scan(lambda x, weights: (x + block(x, *weights), None), x, stacked)[0]


def layer_arrays(gated=False, tokens=7, leading=(2,)):
    x, *weights = arrays(leading, tokens, gated=gated, sizes=(H, FF, H))
    return x, [jnp.stack([w * (1 + i / 4) for i in range(LAYERS)]) for w in weights]


@pytest.mark.parametrize("keep", KEPT)
def test_scanned_layers_keep_each_thing_once(keep):
    x, stacked = layer_arrays()
    found = kept(lambda x, stacked: layers(partial(mlp, keep=keep, chunk=3), x, stacked), x, stacked)
    expected = [X, UP, ("float32", (FF, H)), *KEPT[keep]]
    assert Counter(found) == Counter((dtype, (LAYERS, *shape)) for dtype, shape in expected)


def test_frozen_layers_keep_the_mask_alone():
    x, stacked = layer_arrays(tokens=13)

    def gradient(keep):
        return traced(jax.grad(lambda x: jnp.sum(layers(partial(mlp, keep=keep, chunk=13), x, stacked) ** 2)), x)

    assert f"tensor<{LAYERS}x2x13x{H}xf32>" in gradient("recompute"), "the inputs of the layers, where they are needed"
    assert not re.search(rf"tensor<{LAYERS}x(1x)?2x13x\d+xf32>", gradient("mask"))
    assert re.search(rf"tensor<{LAYERS}x1x2x13x2xui32>", gradient("mask"))


def gradient_of(block, wanted, args):
    """The gradient of `wanted` arguments, the others are constants of the traced function."""

    def function(*some):
        every = list(args)
        for i, value in zip(wanted, some, strict=True):
            every[i] = value
        return jnp.sum(block(*every) ** 2)

    return jax.grad(function, argnums=tuple(range(len(wanted)))), [args[i] for i in wanted]


@pytest.mark.parametrize(
    ("keep", "wanted", "expected"),
    [  # forward 2; then dh, dx; dup; ddown; and x up again
        ("pre_activation", [0], 4),
        ("pre_activation", [0, 1], 5),
        ("pre_activation", [0, 1, 2], 6),
        ("pre_activation", [1], 4),
        ("pre_activation", [2], 3),
        ("mask", [0], 4),
        ("mask", [0, 1], 5),
        ("mask", [0, 1, 2], 7),
        ("recompute", [0], 5),
        ("recompute", [0, 1], 6),
        ("recompute", [0, 1, 2], 7),
    ],
)
def test_products_that_nobody_asked_for_are_not_made(keep, wanted, expected):
    args = arrays((), 8)
    function, some = gradient_of(partial(mlp, keep=keep, chunk=4), wanted, args)
    assert products(function, *some) == expected


def test_frozen_weights_of_a_gated_mlp_cost_nothing():
    args = arrays((), 8, gated=True)
    for wanted, expected in [([0], 3 + 2 + 3), ([0, 1, 2, 3], 3 + 2 + 3 + 3)]:
        function, some = gradient_of(partial(gated_mlp, chunk=4), wanted, args)
        assert products(function, *some) == expected


@pytest.mark.parametrize("keep", ["mask", "recompute"])
def test_nothing_of_all_tokens_and_all_of_ff_is_built(keep):
    function, args = gradient_of(partial(mlp, keep=keep, chunk=16), [0, 1, 2], arrays((), 112))
    text = traced(function, *args)
    assert f"tensor<16x{FF}xf32>" in text
    assert not re.search(rf"tensor<(112|7x16)x{FF}x", text)


# ---- MLP: transformations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_vmap(gated):
    block, plain = (gated_mlp, plain_gated) if gated else (partial(mlp, keep="mask"), plain_mlp)
    args = arrays((3,), gated=gated)
    axes = (0, *[None] * (len(args) - 1))
    dy = cotangent(plain, args)
    ours = forward_backward(jax.vmap(partial(block, chunk=3), axes), args, dy)
    assert_equal(ours, forward_backward(plain, args, dy), 1e-5)
    stacked = [args[0], *(jnp.stack([w, -w, 2 * w]) for w in args[1:])]
    ours = forward_backward(jax.vmap(partial(block, chunk=3)), stacked, dy)
    assert_equal(ours, forward_backward(jax.vmap(plain), stacked, dy), 1e-5)


def test_scan_over_layers_with_remat():
    x, stacked = layer_arrays()
    dy = cotangent(lambda x: x, [x])
    plain = forward_backward(partial(layers, plain_mlp), [x, stacked], dy)
    policies = {
        "mask": unswag.jax.save("unswag_mask"),
        "pre_activation": unswag.jax.recompute("unswag_stat"),
        "recompute": unswag.jax.save(),
    }
    for keep, policy in policies.items():
        block = partial(mlp, keep=keep, chunk=3)
        ours = forward_backward(partial(layers, jax.checkpoint(block, policy=policy)), [x, stacked], dy)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


P = PartitionSpec


@pytest.mark.parametrize(("gated", "check"), [(False, True), (False, False), (True, True)])
def test_shard_map(gated, check):
    block, plain = (gated_mlp, plain_gated) if gated else (partial(mlp, keep="mask"), plain_mlp)
    args = arrays((8,), gated=gated)
    specs = (P("data"), *[P()] * (len(args) - 1))
    over = jax.shard_map(partial(block, chunk=3), mesh=four_devices(), in_specs=specs, out_specs=P("data"), check_vma=check)
    dy = cotangent(plain, args)
    assert_equal(forward_backward(over, args, dy), forward_backward(plain, args, dy), 1e-5)


def test_shard_map_over_tokens():
    """Not jitted too."""
    args = arrays((), 24)
    over = jax.shard_map(partial(mlp, chunk=4), mesh=four_devices(), in_specs=(P("data"), P(), P()), out_specs=P("data"))
    dy = cotangent(plain_mlp, args)
    plain = forward_backward(plain_mlp, args, dy)
    assert_equal(forward_backward(over, args, dy), plain, 1e-5)
    np.testing.assert_allclose(over(*args), plain[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", KEPT)
def test_sharded_sequences_need_no_communication(keep):
    x, *weights = arrays((8,), gated=False)
    sharded, everywhere = NamedSharding(four_devices(), P("data")), NamedSharding(four_devices(), P())
    x, weights = jax.device_put(x, sharded), jax.device_put(weights, everywhere)

    def gradients(x, *weights, of):
        y, pull = jax.vjp(partial(mlp, keep=keep, chunk=3), x, *weights)
        return y, *(g for i, g in enumerate(pull(y)) if i in of)

    frozen = compiled(partial(gradients, of=[0]), x, *weights)
    assert not collectives(frozen)
    assert frozen.output_shardings[0].is_equivalent_to(sharded, 3)
    trained = compiled(partial(gradients, of=[0, 1, 2]), x, *weights)
    assert set(collectives(trained)) == {"all-reduce"}
    plain = forward_backward(plain_mlp, [x, *weights], plain_mlp(x, *weights))
    assert_equal(trained(x, *weights), plain, 1e-5)


# ---- MLP: wrong arguments -------------------------------------------------------------------------------------------------

x, up, down = (jnp.zeros(shape) for shape in ((7, H), (H, FF), (FF, OUT)))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: mlp(x, up, down, chunk=0), ValueError, "mlp: chunk is 0; pass a positive number of tokens"),
        (lambda: mlp(x, up, down, chunk=2.5), ValueError, "mlp: chunk is 2.5; pass a positive"),
        (lambda: mlp(x, up, down, keep="h"), ValueError, "mlp: keep is 'h'; choose 'mask' or 'pre_activation' or 'recompute'"),
        (lambda: mlp(x, up, down, act="silu"), ValueError, "mlp: act is 'silu'; choose 'relu' or"),
        (lambda: mlp(x, up, down, act="relu2", keep="mask"), ValueError, "mlp: keep is 'mask' but act is 'relu2'"),
        (lambda: mlp(x, up, down, layout="rows"), ValueError, "mlp: layout is 'rows' but keep is 'recompute'"),
        (lambda: mlp(x, up, down, keep="mask", layout="cols"), ValueError, "mlp: layout is 'cols'; choose"),
        (lambda: mlp(x, up, down, negative_slope=jnp.ones(())), TypeError, "mlp: negative_slope is an array"),
        (lambda: mlp(x[0], up, down), ValueError, r"mlp: x has shape \(6,\); pass \[..., tokens, hidden\]"),
        (lambda: mlp(x, up.T, down), ValueError, r"mlp: up has shape \(40, 6\); pass \[6, ff\]"),
        (lambda: mlp(x, up, down.T), ValueError, r"mlp: down has shape \(5, 40\); pass \[40, out\]"),
        (lambda: mlp(x, up, down, up_bias=jnp.zeros(6)), ValueError, r"mlp: up_bias has shape \(6,\); pass \(40,\)"),
        (lambda: mlp(x, up, down, down_bias=jnp.zeros(6)), ValueError, r"mlp: down_bias has shape \(6,\); pass \(5,\)"),
        (lambda: mlp(x.astype(int), up, down), TypeError, "mlp: x has dtype int32; pass a floating array"),
        (lambda: mlp(x, up, down.astype(jnp.bfloat16)), TypeError, r"and down bfloat16; pass down.astype\(float32\)"),
        (lambda: gated_mlp(x, up, up[:, 1:], down), ValueError, r"gated_mlp: gate has shape \(6, 40\) and up \(6, 39\)"),
        (lambda: gated_mlp(x, up, up, down, keep="mask"), ValueError, "gated_mlp: keep is 'mask'; choose 'pre_activation'"),
        (lambda: gated_mlp(x, up, up, down, act="relu6"), ValueError, "gated_mlp: act is 'relu6'; choose 'silu'"),
        (lambda: gated_mlp(x, up, up, down, chunk=-1), ValueError, "gated_mlp: chunk is -1; pass a positive"),
    ],
)
def test_wrong_arguments_of_mlp(call, error, text):
    with pytest.raises(error, match=text):
        call()


# ---- linear + cross-entropy -----------------------------------------------------------------------------------------------

CLASSES = 37


def plain_loss(
    hidden, weight, labels, *, ignore_index=-100, label_smoothing=0.0, softcap=0.0, logit_scale=1.0, reduction="mean"
):
    z = jnp.einsum("...th,vh->...tv", hidden, weight).astype(jnp.promote_types(hidden.dtype, jnp.float32)) * logit_scale
    z = softcap * jnp.tanh(z / softcap) if softcap else z
    target = jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype) * (1 - label_smoothing) + label_smoothing / z.shape[-1]
    counts = labels != ignore_index
    losses = jnp.where(counts, -jnp.sum(target * jax.nn.log_softmax(z), -1), 0)
    return losses if reduction == "none" else losses.sum() / (counts.sum() if reduction == "mean" else 1)


def loss_arrays(leading=(), tokens=7, dtype=jnp.float32, hidden=H, classes=CLASSES, ignored=True, seed=0):
    labels = np.random.default_rng(seed + 5 + SEED).integers(0, classes, (*leading, tokens)).astype(np.int32)
    if ignored and labels.size:
        labels.flat[::4] = -100
    return [normal((*leading, tokens, hidden), dtype, seed), normal((classes, hidden), dtype, seed + 1), jnp.asarray(labels)]


def loss_and_gradients(function, args, dlosses=1.0, jit=True):
    hidden, weight, labels = args

    def run(hidden, weight, dlosses):
        losses, pull = jax.vjp(lambda h, w: function(h, w, labels), hidden, weight)
        return (losses, *pull(jnp.broadcast_to(jnp.asarray(dlosses, losses.dtype), losses.shape)))

    return (jax.jit(run, compiler_options=QUICK) if jit else run)(hidden, weight, dlosses)


def loss_draws(ours, plain, dtype):
    """As `draws`; the labels are an argument of the program."""

    def program(function):
        @partial(jax.jit, compiler_options=QUICK)
        def run(hidden, weight, labels):
            losses, pull = jax.vjp(lambda h, w: function(h, w, labels), hidden, weight)
            return losses, *pull(jnp.ones_like(losses))

        return run

    ours, plain = program(ours), program(plain)
    for seed in range(0, 30, 10):
        hidden, weight, labels = loss_arrays((2,), TOKENS, dtype, hidden=64, classes=300, seed=seed)
        args = [hidden, (weight / 4).astype(dtype), labels]
        yield ours(*args), plain(*args), plain(*as_float64(args))


OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "softcap": 3.0},
    {"logit_scale": 0.3, "softcap": 2.0, "label_smoothing": 0.2},
]


@pytest.mark.parametrize(
    ("options", "leading", "tokens", "chunk"),
    list(zip(OPTIONS, [(), (2, 3), (2,), ()], [7, 6, 4, 8], [3, 2, None, 4], strict=True)),
)
def test_loss_is_the_plain_spelling(x64, options, leading, tokens, chunk):
    args = loss_arrays(leading, tokens, jnp.float64)
    dlosses = normal((*leading, tokens), jnp.float64, 7) if options.get("reduction") == "none" else 0.7
    plain = loss_and_gradients(partial(plain_loss, **options), args, dlosses)
    for jit in (True, False) if not options else (True,):
        ours = loss_and_gradients(partial(linear_cross_entropy, chunk=chunk, **options), args, dlosses, jit)
        assert_equal(ours, plain, 1e-12)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(jnp.bfloat16, OPTIONS[0]), (jnp.float16, OPTIONS[1]), (jnp.float32, OPTIONS[0]), (jnp.float32, OPTIONS[3])],
)
def test_loss_is_as_exact_as_the_plain_spelling(x64, dtype, options):
    ours = partial(linear_cross_entropy, chunk=40, **options)
    found = list(loss_draws(ours, partial(plain_loss, **options), dtype))
    assert found[0][0][0].dtype == jnp.float32
    assert_as_near(found, 300, unit(dtype))


def test_small_probabilities_reach_float16_gradients(x64):
    """softmax / tokens is about 2e-9 here, the smallest float16 is 6e-8."""
    hidden, weight, labels = loss_arrays((), 4096, jnp.float16, classes=1000, ignored=False)
    weight = weight * 0
    truth = loss_and_gradients(plain_loss, as_float64([hidden, weight, labels]), 1.0)
    ours = loss_and_gradients(linear_cross_entropy, [hidden, weight, labels], 1.0)
    np.testing.assert_allclose(ours[2].astype(jnp.float64), truth[2], rtol=0, atol=1e-3 * np.abs(truth[2]).max() + 6e-8)


def test_loss_keeps():
    hidden, weight, labels = loss_arrays((2,))
    found = kept(lambda h, w: linear_cross_entropy(h, w, labels, chunk=3, reduction="none"), hidden, weight)
    assert Counter(found) == Counter(
        [("float32", (2, 7, H)), ("float32", (CLASSES, H)), ("int32", (2, 7)), *[("float32", (2, 7))] * 2]
    )


def test_no_logits_beyond_a_chunk():
    hidden, weight, labels = loss_arrays((), 112)
    text = traced(jax.grad(lambda h, w: linear_cross_entropy(h, w, labels, chunk=16), (0, 1)), hidden, weight)
    assert f"tensor<16x{CLASSES}xf32>" in text
    assert not re.search(rf"tensor<(112|7x16)x{CLASSES}x", text)


def test_a_frozen_head_costs_nothing():
    hidden, weight, labels = loss_arrays((), 8)
    loss = lambda h, w: linear_cross_entropy(h, w, labels, chunk=4)  # noqa: E731
    assert products(jax.grad(loss), hidden, weight) == 3
    assert products(jax.grad(loss, (0, 1)), hidden, weight) == 4


def test_ignored_rows_are_not_read():
    hidden, weight, labels = loss_arrays((2,))
    clean = loss_and_gradients(partial(linear_cross_entropy, chunk=3), [hidden, weight, labels])
    spoilt = jnp.where((labels == -100)[..., None], np.nan, hidden)
    for a, b in zip(loss_and_gradients(partial(linear_cross_entropy, chunk=3), [spoilt, weight, labels]), clean, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not clean[1][np.asarray(labels) == -100].any()


@pytest.mark.parametrize(("reduction", "value"), [("mean", np.nan), ("sum", 0.0)])
def test_no_label_counts(reduction, value):
    hidden, weight, labels = loss_arrays()
    for rows in (7, 0) if reduction == "mean" else (7,):
        loss, dhidden, dweight = loss_and_gradients(
            partial(linear_cross_entropy, chunk=3, reduction=reduction), [hidden[:rows], weight, labels[:rows] * 0 - 100]
        )
        np.testing.assert_array_equal(loss, value)
        assert not dhidden.any() and not dweight.any()


def test_a_label_out_of_range_is_loud():
    hidden, weight, labels = loss_arrays(ignored=False)
    for wrong in (-1, CLASSES):
        with pytest.raises(ValueError, match=rf"labels\[2\] is {wrong}; pass labels in \[0, 37\), or -100 \(ignore_index\)"):
            linear_cross_entropy(hidden, weight, labels.at[2].set(wrong))
    bad = labels.at[2].set(CLASSES)
    # an argument of the program and not a constant of it
    loss = lambda h, w, label: linear_cross_entropy(h, w, label.astype(int), reduction="none", chunk=3)  # noqa: E731
    losses, dhidden, dweight, _ = forward_backward(loss, [hidden, weight, bad.astype(float)], jnp.ones(7))
    for found in (losses, dhidden.sum(-1)):
        np.testing.assert_array_equal(np.isnan(found), np.arange(7) == 2)
    assert np.isnan(dweight).all()


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16])
def test_label_dtypes(dtype):
    hidden, weight, labels = loss_arrays(ignored=False)
    narrow = labels.astype(dtype)
    np.testing.assert_array_equal(linear_cross_entropy(hidden, weight, narrow), linear_cross_entropy(hidden, weight, labels))
    many = jnp.tile(weight, (8, 1))  # more classes than a byte counts
    np.testing.assert_array_equal(linear_cross_entropy(hidden, many, narrow), linear_cross_entropy(hidden, many, labels))


def test_loss_under_vmap_scan_and_remat():
    hidden, weight, labels = loss_arrays((3,))
    plain = jax.value_and_grad(lambda h, w: jax.vmap(plain_loss, (0, None, 0))(h, w, labels).sum(), (0, 1))(hidden, weight)

    def scanned(hidden, weight):
        step = jax.checkpoint(
            lambda total, given: (total + linear_cross_entropy(given[0], weight, given[1], chunk=3), None),
            policy=unswag.jax.save("unswag_stat"),
        )
        return jax.lax.scan(step, 0.0, (hidden, labels))[0]

    mapped = lambda h, w: jax.vmap(partial(linear_cross_entropy, chunk=3), (0, None, 0))(h, w, labels).sum()  # noqa: E731
    for function in (scanned, mapped):
        ours = jax.jit(jax.value_and_grad(function, (0, 1)), compiler_options=QUICK)(hidden, weight)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_loss_under_shard_map():
    args = loss_arrays((8,))
    over = jax.shard_map(
        partial(linear_cross_entropy, chunk=3, reduction="none"),
        mesh=four_devices(),
        in_specs=(P("data"), P(), P("data")),
        out_specs=P("data"),
    )
    plain = loss_and_gradients(partial(plain_loss, reduction="none"), args)
    assert_equal(loss_and_gradients(over, args), plain, 1e-5)


def test_loss_of_sharded_sequences_needs_no_communication():
    hidden, weight, labels = loss_arrays((8,))
    sharded = NamedSharding(four_devices(), P("data"))
    hidden, labels = jax.device_put((hidden, labels), sharded)
    weight = jax.device_put(weight, NamedSharding(four_devices(), P()))

    def gradients(hidden, weight, labels, of):
        losses, pull = jax.vjp(lambda h, w: linear_cross_entropy(h, w, labels, chunk=3, reduction="none"), hidden, weight)
        return losses, pull(losses)[:of]

    assert not collectives(compiled(partial(gradients, of=1), hidden, weight, labels))
    assert set(collectives(compiled(partial(gradients, of=2), hidden, weight, labels))) == {"all-reduce"}


h, w, y = jnp.zeros((7, H)), jnp.zeros((CLASSES, H)), jnp.zeros(7, jnp.int32)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: linear_cross_entropy(h, w, y, chunk=0), ValueError, "chunk is 0; pass a positive number of tokens"),
        (lambda: linear_cross_entropy(h, w.T, y), ValueError, r"weight \(6, 37\); pass \[..., tokens, H\] and \[classes, H\]"),
        (lambda: linear_cross_entropy(h[0], w, y[0]), ValueError, r"hidden has shape \(6,\)"),
        (lambda: linear_cross_entropy(h, w[:0], y), ValueError, "pass at least one class"),
        (lambda: linear_cross_entropy(h, w, y[1:]), ValueError, r"labels has shape \(6,\); pass \(7,\)"),
        (lambda: linear_cross_entropy(h, w, y * 1.0), TypeError, "labels has dtype float32; pass integers"),
        (lambda: linear_cross_entropy(h.astype(int), w, y), TypeError, "hidden has dtype int32; pass a floating array"),
        (lambda: linear_cross_entropy(h, w.astype(jnp.bfloat16), y), TypeError, r"pass weight.astype\(float32\)"),
        (lambda: linear_cross_entropy(h, w, y, label_smoothing=1.5), ValueError, "label_smoothing is 1.5; choose"),
        (lambda: linear_cross_entropy(h, w, y, softcap=-1), ValueError, "softcap is -1; choose a positive cap, or 0"),
        (lambda: linear_cross_entropy(h, w, y, logit_scale=np.nan), ValueError, "logit_scale is nan; choose a finite number"),
        (lambda: linear_cross_entropy(h, w, y, softcap=jnp.ones(())), TypeError, "softcap is an array; pass a Python number"),
        (
            lambda: linear_cross_entropy(h, w, y, reduction="avg"),
            ValueError,
            "reduction is 'avg'; choose 'mean' or 'sum' or 'none'",
        ),
    ],
)
def test_wrong_arguments_of_the_loss(call, error, text):
    with pytest.raises(error, match=f"linear_cross_entropy: .*{text}"):
        call()


def test_chunks_cover_every_token_once():
    """Every chunk size gives the same loss: none is read twice or left out."""
    args = loss_arrays((), 13, ignored=False)
    values = [float(linear_cross_entropy(*args, chunk=chunk, reduction="sum")) for chunk in range(1, 15)]
    assert all(abs(a - b) < 1e-4 for a, b in pairwise(values)) and values[0] > 10
