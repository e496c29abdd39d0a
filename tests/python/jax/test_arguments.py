"""Arguments that are no arrays, of all public functions: one of a wrong type is named, with its value and the remedy."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unswag.jax as uj

X = jnp.ones((3, 4))
PUBLIC = {name: getattr(module, name) for module in (uj, uj.blocks) for name in module.__all__ if name != "blocks"}
GIVEN = {  # all others are X
    "down": jnp.ones((4, 4)), "into": jnp.ones((4, 4)), "key": jax.random.key(0), "labels": jnp.zeros(3, int), "rate": 0.5,
    "function": uj.relu,
}  # fmt: skip
WEIGHTS = {"mlp": {"up": jnp.ones((4, 4))}, "gated_mlp": {"gate": jnp.ones((4, 4)), "up": jnp.ones((4, 4))}}
ARRAYS = ("Array", "Array | None", "jax.stages.Compiled | None", "jax.stages.Compiled", "Callable[..., Any]")
FLAGS = ("deterministic", "has_aux")
SCALARS = {
    (name, parameter.name): parameter.annotation
    for name, function in PUBLIC.items()
    for parameter in inspect.signature(function).parameters.values()
    if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    and parameter.annotation not in ARRAYS
    and parameter.name not in FLAGS
}


@pytest.mark.parametrize(
    "value", ["x", ["x", "y"], None, 1.5j, np.ones(2), X], ids=["str", "list", "None", "complex", "numpy", "array"]
)
@pytest.mark.parametrize(("name", "argument"), SCALARS)
def test_scalars_of_a_wrong_type_are_named(name, argument, value):
    if value is None and "None" in SCALARS[name, argument]:
        return
    if isinstance(value, str) and SCALARS[name, argument] == "str" and name == "offload":
        return  # which kinds of memory there are JAX knows
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    given = {p.name: GIVEN.get(p.name, X) for p in required} | WEIGHTS.get(name, {}) | {argument: value}
    by_place = [given.pop("function"), X] if name == "audit" else []
    with pytest.raises((TypeError, ValueError)) as raised:
        PUBLIC[name](*by_place, **given)
    said = str(raised.value)
    assert f"{name.removeprefix('unswag_')}: {argument} is " in said, said
    assert repr(value) in said or "is an array; pass a Python number" in said, said


@pytest.mark.parametrize("value", ["none", "tanh"])
def test_approximate_is_not_that_of_torch(value):
    """Where "none" means the erf form, which a true string would not."""
    for call in (lambda: uj.gelu(X, value), lambda: uj.geglu(X, X, value)):
        with pytest.raises(ValueError, match=f"approximate is '{value}'; choose True or False"):
            call()
