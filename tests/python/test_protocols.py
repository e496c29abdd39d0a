"""Which protocol for which activation: exact unless a lossy one is asked for by name."""

from __future__ import annotations

import itertools

import pytest

from unswag.protocols import ACCELERATORS, ACTIVATIONS, Protocol, protocol


def test_the_default_is_exact_everywhere():
    for activation, accelerator in itertools.product(ACTIVATIONS, ACCELERATORS):
        found = protocol(activation, accelerator)
        assert isinstance(found, Protocol) and found.exact and found.why, activation
        assert (found.name, found.bits) in (("alpha", 1), ("exact", None))


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_the_relu_family_keeps_one_bit(activation):
    layouts = {accelerator: protocol(activation, accelerator).layout for accelerator in ACCELERATORS}
    assert protocol(activation, "tpu").name == "alpha" and protocol(activation, "tpu").bits == 1
    assert layouts == {"cpu": "rows", "cuda": "rows", "tpu": "rows256"}


def test_what_one_bit_cannot_say_keeps_its_input():
    for activation in ("relu2", "silu", "gelu", "swiglu", "geglu", "reglu"):
        found = protocol(activation, "cpu")
        assert (found.name, found.bits, found.layout) == ("exact", None, ""), activation
    assert "34 bits" in protocol("swiglu", "cpu").why  # what codes would keep


def test_delhi_is_lossy_and_says_what_it_costs():
    for activation in ("silu", "gelu"):
        found = protocol(activation, "tpu", "delhi")
        assert (found.name, found.bits, found.exact, found.layout) == ("delhi", 2, False, "rows256")
        assert "relative gradient error" in found.why


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ("relo", "cpu"),
            "activation is 'relo'; choose among relu, relu6, leaky_relu, relu2, silu, gelu, swiglu, geglu",
        ),
        (("relu", "npu"), "accelerator is 'npu'; choose among cpu, cuda, tpu"),
        (("relu", "cpu", "delhi"), "relu has no protocol 'delhi'; choose among alpha"),
        (("silu", "cpu", "alpha"), "silu has no protocol 'alpha'; choose among exact, delhi"),
        (("swiglu", "tpu", "delhi"), "swiglu has no protocol 'delhi'; choose among exact"),
    ],
)
def test_errors_list_the_choices(arguments, words):
    with pytest.raises(ValueError) as caught:
        protocol(*arguments)
    assert words in str(caught.value)


def test_the_activations_are_those_of_the_front_end():
    jax = pytest.importorskip("unswag.jax", reason="the front end needs jax")
    for activation in ACTIVATIONS:
        assert callable(getattr(jax, activation)), activation
