"""The audit of a function of JAX: every residual once, with its name, its line and its bytes, and nothing computed."""

from __future__ import annotations

import inspect
import json

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct, lax
from values import kept

import unswag
import unswag.jax as uj
from unswag.jax import audit, compiler_memory
from unswag.ledger import Ledger

X = ShapeDtypeStruct((8, 64), jnp.float32)
W1, W2 = ShapeDtypeStruct((64, 256), jnp.float32), ShapeDtypeStruct((256, 64), jnp.float32)


def device(ledger: Ledger) -> list[tuple[str, str, tuple[int, ...], int]]:
    return [(row.name, row.dtype, row.shape, row.bytes) for row in ledger.rows if row.tier == "device"]


def shared(ledger: Ledger) -> list[str]:
    rows = [row for row in ledger.rows if row.tier == "shared"]
    assert all(row.bytes == 0 and row.bits == 0 for row in rows)
    return [row.module for row in rows]


def line_of(function, text: str) -> str:
    lines, start = inspect.getsourcelines(function)
    (found,) = (i for i, line in enumerate(lines) if text in line)
    return f"test_ledger.py:{start + found}"


def mlp(weights, x, act):
    w1, w2 = weights
    h = act(x @ w1)
    return jnp.sum(h @ w2)


def test_the_mask_is_one_row():
    ledger = audit(unswag.unswag_relu, X)
    (row,) = ledger.rows
    assert (row.name, row.shape, row.dtype, row.bits, row.tier, row.bytes) == (
        "unswag_mask",
        (8, 2),
        "uint32",
        32.0,
        "device",
        64,
    )
    assert isinstance(ledger, Ledger) and ledger.total == 8 * 64 // 8


def test_jax_keeps_a_bool():
    mask, zeros = sorted(audit(jax.nn.relu, X).rows, key=lambda row: row.tier)
    assert (mask.shape, mask.dtype, mask.bytes, mask.name) == ((8, 64), "bool", 512, "gt")
    assert (zeros.shape, zeros.dtype, zeros.bytes, zeros.tier) == ((8, 64), "float32", 0, "recipe")  # made again


def test_what_is_frozen_decides_what_is_kept():
    def loss(w1, w2, x, act):
        return mlp((w1, w2), x, act)

    frozen = audit(lambda w1, w2, x: loss(w1, w2, x, uj.relu), W1, W2, X)
    assert device(frozen) == [("unswag_mask", "uint32", (8, 8), 256)]
    assert sorted(shared(frozen)) == ["w2", "x"]
    trained = audit(lambda w1, w2, x: loss(w1, w2, x, uj.relu), W1, W2, X, argnums=(0, 1))
    assert sorted(device(trained))[1:] == [("unswag_mask", "uint32", (8, 8), 256)]
    assert trained.total == 256 + 8 * 256 * 4
    plain = audit(lambda w1, w2, x: loss(w1, w2, x, jax.nn.relu), W1, W2, X)
    assert plain.total == 8 * 256


def test_every_residual_is_there_and_no_other():
    def loss(weights, x):
        h = uj.rms_norm(uj.silu(x @ weights[0]))
        return jnp.sum(jax.nn.softmax(h @ weights[1]) ** 2)

    weights = (jnp.ones(W1.shape), jnp.ones(W2.shape))
    x = jnp.ones(X.shape)
    ledger = audit(loss, weights, x)
    found = {(row.dtype, row.shape) for row in ledger.rows}
    assert found == set(kept(lambda weights: loss(weights, x), weights)) | {("float32", X.shape)}
    assert len(ledger.rows) >= len(kept(lambda weights: loss(weights, x), weights))


def test_where_and_what():
    def attention(q):
        return jnp.exp(q)

    def loss(x):
        return jnp.sum(uj.relu(attention(x)))

    made, mask = sorted((row for row in audit(loss, X).rows), key=lambda row: row.name)
    assert made.source == line_of(attention, "jnp.exp") and made.module == "test_where_and_what.attention"
    assert made.name == "exp" and made.role == "attention"
    assert mask.source == line_of(loss, "uj.relu") and mask.name == "unswag_mask"


@pytest.mark.parametrize("function", [uj.relu, uj.silu, uj.gelu, uj.relu2, uj.relu6, uj.rms_norm])
def test_what_our_functions_made_is_called_after_them(function):
    """Not after the `cond` by which the platform is chosen."""
    rows = audit(mlp, (W1, W2), X, act=function).rows
    names = [row.name for row in rows if row.tier == "device" and row.shape == (8, 256)]
    assert function.__name__ in names and set(names) <= {function.__name__, "unswag_input"}


def test_the_title_is_the_function_and_its_other_arrays():
    ledger = audit(mlp, (W1, W2), X, act=uj.relu)
    assert ledger.title() == "mlp: x 8×64" and "mlp: x 8×64" in str(ledger)
    many = {f"w{i}": X for i in range(9)}  # frozen weights
    assert audit(lambda x, frozen: jnp.sum(x), X, many).batch == {}


def test_lines_inside_jit_are_those_of_the_caller_of_a_library_function():
    @jax.jit
    def twice(x):
        a = jax.nn.silu(x)  # first
        return jax.nn.silu(a)  # second

    def loss(x):
        return jnp.sum(twice(x)) + jnp.sum(jax.nn.silu(2 * x))  # third

    rows = [row for row in audit(loss, X).rows if row.tier == "device"]
    assert {row.source for row in rows} == {line_of(twice, "# first"), line_of(twice, "# second"), line_of(loss, "# third")}
    assert {row.name for row in rows} <= {"silu", "mul"}


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.checkpoint(f, policy=uj.save("unswag_mask"))])
def test_names_are_found_inside_calls(wrap):
    @wrap
    def layer(x, w):
        return uj.relu(x @ w)

    names = [row.name for row in audit(lambda w, x: jnp.sum(layer(x, w)), W1, X).rows if row.tier == "device"]
    assert names == ([] if wrap is jax.checkpoint else ["unswag_mask"])


def test_a_scan_keeps_the_residuals_of_each_step():
    stacked = ShapeDtypeStruct((6, 64, 64), jnp.float32)

    def loss(w, x):
        return jnp.sum(lax.scan(lambda x, w: (x + uj.relu(x @ w), None), x, w)[0])

    rows = [row for row in audit(loss, stacked, X).rows if row.tier == "device"]
    assert sorted((row.shape, row.bytes) for row in rows) == [((6, 8, 2), 6 * 64), ((6, 8, 64), 6 * 2048)]
    assert "unswag_mask" in [row.name for row in rows] and "w" in shared(audit(loss, stacked, X))


def test_a_storage_counts_once():
    def loss(x):
        h = jnp.exp(x)
        return jnp.sum(uj.relu2(h)) + jnp.sum(h.reshape(64, 8) * h.reshape(64, 8))  # all keep h

    ledger = audit(loss, X)
    assert ledger.total == 8 * 64 * 4
    assert sum(row.tier == "device" for row in ledger.rows) == 1 and len(ledger.rows) > 1


def test_arguments_are_shared_also_behind_a_name_and_inside_jit():
    ledger = audit(uj.relu2, X)
    (row,) = ledger.rows
    assert (row.tier, row.bytes, row.name, row.module) == ("shared", 0, "unswag_input", "x")
    ledger = audit(lambda tree: jnp.sum(jax.jit(uj.relu2)(tree["layers"][1])), {"layers": [X, X]})
    assert shared(ledger) == ["tree.layers.1"]


def test_nothing_is_computed():
    huge = ShapeDtypeStruct((1 << 20, 1 << 14), jnp.bfloat16)  # 32 GiB
    assert audit(uj.relu, huge).total == (1 << 34) // 8


def test_arguments_that_are_no_arrays_are_given_as_they_are():
    def function(x, name, *, slope, key):
        assert isinstance(name, str) and isinstance(slope, float)
        return uj.dropout(uj.leaky_relu(x, slope), 0.5, key)

    ledger = audit(function, X, "name", slope=0.1, key=jax.random.key(0))
    assert ("unswag_mask", "uint32", (8, 2), 64) in device(ledger) and shared(ledger) == ["key"]
    assert ledger.total == 64


def test_auxiliary_output_and_tokens():
    def loss(x):
        return jnp.sum(uj.relu(x)), {"seen": jnp.sum(jnp.exp(x))}  # whose gradient would need exp(x)

    ledger = audit(loss, X, has_aux=True, tokens=8)
    assert ledger.total == 64 and ledger.bytes_per_token == 8


def test_table_picture_and_json(tmp_path):
    ledger = audit(mlp, (W1, W2), X, act=uj.relu, tokens=8)
    text = str(ledger)
    for words in ("unswag_mask", line_of(mlp, "act(x @ w1)"), "weights.*", "mlp", "total"):
        assert words in text, words
    found = json.loads(ledger.to_json())
    assert found["total"] == 8 * 256 * 4 + 256 and found["bytes_per_token"] == found["total"] / 8
    ledger.plot(tmp_path / "ledger.png")
    assert (tmp_path / "ledger.png").read_bytes()[:4] == b"\x89PNG"


def test_the_compilers_account_stands_beside():
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(uj.relu(x) * 2))(x)

    compiled = jax.jit(gradient).lower(X).compile()
    memory = compiler_memory(compiled)
    assert (memory.arguments, memory.outputs, memory.aliased) == (2048, 2048, 0) and memory.temporaries >= 0
    ledger = audit(uj.relu, X, compiled=compiled)
    assert ledger.compiler == memory and ledger.total == 64
    assert "the compiler: arguments" in str(ledger) and "2,048" in str(ledger)
    donated = jax.jit(gradient, donate_argnums=0).lower(X).compile()
    assert compiler_memory(donated).aliased == 2048


def test_without_the_compilers_account_there_is_an_error():
    class Silent:
        def memory_analysis(self):
            return None

    with pytest.raises(NotImplementedError, match="gives no memory analysis"):
        compiler_memory(Silent())


@pytest.mark.parametrize(
    "arguments, options, error, words",
    [
        ((3, X), {}, TypeError, "function is a int; pass a function and its arguments"),
        ((uj.relu,), {}, ValueError, "argnums is 0, but 0 arguments were given by place"),
        ((uj.relu, X), {"argnums": (0, 1)}, ValueError, "argnums is (0, 1), but 1 arguments"),
        ((jnp.sum, ShapeDtypeStruct((3,), jnp.int32)), {}, ValueError, "argnums is 0, where no floating array is"),
    ],
)
def test_bad_arguments(arguments, options, error, words):
    with pytest.raises(error) as caught:
        audit(*arguments, **options)
    assert words in str(caught.value)


def test_the_audit_of_the_top_level_takes_functions():
    assert unswag.audit(uj.relu, X).total == 64
    assert unswag.audit(lambda x, w: jnp.sum(uj.relu(x @ w)), X, W1, argnums=1, tokens=8).tokens == 8
    with pytest.raises(TypeError, match=r"got a int; pass a torch.nn.Module, or a function of JAX and its arguments"):
        unswag.audit(3)
