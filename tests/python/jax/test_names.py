"""Under jax.checkpoint the policies save the named residuals and nothing else."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from values import kept, normal

import unswag.jax
from unswag.jax import offload, recompute, save
from unswag.jax.blocks import gated_mlp, linear_cross_entropy, mlp
from unswag.jax.names import NAMES

H, FF, TOKENS = 8, 40, 6
W = [normal(shape, jnp.float32, i, 0.3) for i, shape in enumerate([(H, FF), (FF, H), (FF,), (H,)])]


def layer(x):
    """All four names: rstd and x of the norm, a mask, a code, gate and up."""
    x = unswag.jax.rms_norm(x, W[3])
    x = unswag.jax.relu(x @ W[0]) @ W[1]
    x = unswag.jax.silu(x @ W[0], bits=2) @ W[1]
    return unswag.jax.swiglu(x @ W[0], x @ W[0] + W[2]) @ W[1]


x = normal((TOKENS, H), jnp.float32, 9)
ROW, WIDE = ("float32", (TOKENS, H)), ("float32", (TOKENS, FF))
SAVED = {
    "unswag_mask": [("uint32", (TOKENS, 2))],
    "unswag_code": [("uint32", (TOKENS, 3))],
    "unswag_input": [ROW, WIDE, WIDE],
    "unswag_stat": [("float32", (TOKENS, 1))],
}


def saved(function, *args):
    """What the backward is given beside the arguments and the weights."""
    constants = Counter((str(w.dtype), w.shape) for w in W)
    return Counter(kept(function, *args)) - Counter({key: 99 for key in constants})


@pytest.mark.parametrize("name", SAVED)
def test_save_saves_just_that(name):
    found = saved(jax.checkpoint(layer, policy=save(name)), x)
    # the argument x is there in any case
    assert found == Counter([ROW, *(s for s in SAVED[name] if s != ROW)])


def test_save_of_all_names():
    assert saved(jax.checkpoint(layer, policy=save()), x) == Counter([s for each in SAVED.values() for s in each])
    assert set(SAVED) == set(NAMES)


def test_without_a_policy_just_the_argument_is_kept():
    assert saved(jax.checkpoint(layer), x) == Counter([ROW])


@pytest.mark.parametrize("name", SAVED)
def test_recompute_saves_our_others(name):
    found = saved(jax.checkpoint(layer, policy=recompute(name)), x)
    others = [s for other, each in SAVED.items() if other != name for s in each]
    assert found == Counter([ROW, *(s for s in others if s != ROW)])


def test_recompute_of_all_names_saves_nothing():
    assert saved(jax.checkpoint(layer, policy=recompute()), x) == Counter([ROW])


@pytest.mark.parametrize("policy", [save("unswag_mask"), recompute("unswag_mask"), offload("unswag_input")])
def test_gradients_are_the_same(policy):
    gradient = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(f(x) ** 2)))(x)  # noqa: E731
    np.testing.assert_allclose(gradient(jax.checkpoint(layer, policy=policy)), gradient(layer), rtol=1e-4, atol=1e-5)


def stacked(policy):
    def scanned(x):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(layer, policy=policy)(x), None), x, None, length=3)[0]

    return saved(scanned, x)


def test_scanned_layers_stack_what_is_named():
    for names in (["unswag_mask"], ["unswag_mask", "unswag_stat"], ["unswag_code"]):
        expected = [ROW, *(s for name in names for s in SAVED[name])]
        assert stacked(save(*names)) == Counter((dtype, (3, *shape)) for dtype, shape in expected)


def test_offload_moves_what_is_named():
    """What the backward is given lies on the host; this CPU has it all in one place."""

    def on_host(policy):
        residuals = jax.make_jaxpr(lambda x: jax.vjp(jax.checkpoint(layer, policy=policy), x)[1])(x).jaxpr.outvars
        return Counter((str(v.aval.dtype), v.aval.shape) for v in residuals if "host" in str(v.aval))

    assert on_host(offload("unswag_mask")) == Counter(SAVED["unswag_mask"])
    assert on_host(offload()) == Counter([s for each in SAVED.values() for s in each])
    assert not on_host(save())


def test_residuals_of_blocks_have_names():
    label = jnp.zeros(TOKENS, jnp.int32)
    blocks = {
        "mask": (
            lambda x: mlp(x, W[0], W[1], keep="mask", chunk=4),
            "unswag_mask",
            [("uint32", (1, 4, 2)), ("uint32", (2, 2))],
        ),
        "z": (
            lambda x: mlp(x, W[0], W[1], keep="pre_activation", chunk=4),
            "unswag_input",
            [("float32", (1, 4, FF)), ("float32", (2, FF))],
        ),
        "gate, up": (
            lambda x: gated_mlp(x, W[0], W[0], W[1], keep="pre_activation", chunk=6),
            "unswag_input",
            [("float32", (1, 6, FF))] * 2,
        ),
        "loss": (
            lambda x: linear_cross_entropy(x, W[1], label, chunk=4, reduction="none"),
            "unswag_stat",
            [("float32", (TOKENS,))] * 2,
        ),
    }
    for name, (block, policy, expected) in blocks.items():
        found = saved(jax.checkpoint(lambda x, block=block: block(jnp.sin(x)), policy=save(policy)), x)
        inner = [ROW] if policy == "unswag_input" else []  # sin(x), the block's own input
        labels = [("int32", (TOKENS,))] if name == "loss" else []
        assert found - Counter(labels) == Counter([ROW, *inner, *expected]), name


@pytest.mark.parametrize(("function", "name"), [(save, "save"), (offload, "offload"), (recompute, "recompute")])
def test_unknown_names(function, name):
    with pytest.raises(ValueError, match=f"{name}: no residual is called 'mask'; choose among unswag_mask, unswag_code"):
        function("unswag_mask", "mask")
