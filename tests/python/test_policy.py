import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from unswag import _core, codebooks
from unswag.policy import (
    ACCELERATORS,
    ALIASES,
    BLOCKS,
    CODEBOOKS,
    GATED,
    MEASURED,
    POLICIES,
    ROLES,
    Policy,
    Protocol,
    protocol,
    protocols,
)


def test_exact_keeps_everything_as_it_is():
    exact = Policy.named("exact")
    assert exact.name == "exact" and not exact.lossy and all(exact.codec(role) is None for role in (*ROLES, "anything"))
    assert Policy.named("alpha") is exact and Policy.named(exact) is exact


def test_the_presets():
    assert set(POLICIES) == {"exact", "int8", "int4", "2bit"} and Policy.named("delhi") is POLICIES["2bit"]
    assert [POLICIES["int4"].codec(role) for role in ROLES] == ["int4", "int8", None, "int8"]
    assert POLICIES["2bit"].codec("mlp") == "int2"  # the values beside the codes of the derivative
    assert all(POLICIES[name].lossy for name in ("int8", "int4", "2bit")) and not POLICIES[ALIASES["alpha"]].lossy
    assert {p.rounding for p in POLICIES.values()} == {"nearest"}


@pytest.mark.parametrize("name", ["int16", "", "Exact", 2, None])
def test_another_name_says_what_there_is(name):
    with pytest.raises(
        ValueError, match=r"policy=.*no such policy; choose one of 'exact', 'int8', 'int4', '2bit', 'alpha', 'del"
    ):
        Policy.named(name)


def test_a_role_is_overridden_by_name():
    policy = Policy(mlp="int4", residual="int8")
    assert (policy.codec("mlp"), policy.codec("residual"), policy.codec("attention")) == ("int4", "int8", None)
    assert str(policy) == "own (mlp='int4', residual='int8')" and str(Policy.named("exact")) == "exact"
    assert str(dataclasses.replace(policy, name="mine", rounding="stochastic")).endswith("rounding='stochastic')")


def test_tiers_are_places_and_change_no_value():
    policy = Policy(tiers={"checkpoint": "disk", "mlp": "device"})
    assert [policy.tier(role) for role in (*ROLES, "anything")] == [None, None, None, "disk", None]
    assert not policy.lossy and policy.cost() == "" and policy == Policy(tiers={"checkpoint": "disk"}) != Policy()
    assert str(policy) == "own (tiers={'checkpoint': 'disk'})" and isinstance(hash(policy), int)
    stored = dataclasses.replace(POLICIES["int8"], tiers={"checkpoint": "host"})
    assert stored.codec("checkpoint") == "int8" and "0.0071" in stored.cost()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(tiers={"checkpoint": "ssd"}), r"no tier 'ssd'; choose one of 'device', 'host', 'disk'"),
        (dict(tiers={"layers": "disk"}), r"no role 'layers'; choose one of 'mlp', 'residual', 'attention', 'checkpoint'"),
        (dict(tiers="disk"), r"tiers='disk'; pass a tier for each role"),
        (dict(mlp="2bit", tiers={"mlp": "host"}), r"codes of two bits stay on the device; choose another codec"),
    ],
)
def test_tiers_that_do_not_exist(arguments, words):
    with pytest.raises(ValueError, match=words):
        Policy(**arguments)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("codec", ["int3", "2bits", "", None])
def test_a_codec_that_does_not_exist(role, codec):
    with pytest.raises(ValueError, match=rf"Policy: {role}={codec!r}: no such codec; choose one of 'exact', 'int8'"):
        Policy(**{role: codec})


def test_two_bits_are_for_the_mlp_alone():
    assert Policy(mlp="2bit").codec("mlp") == "int2"
    with pytest.raises(ValueError, match="Policy: residual='2bit'"):
        Policy(residual="2bit")


@pytest.mark.parametrize(
    "wrong", [{"rounding": "up"}, {"codebook": "mm3"}, {"scale": 0.0}, {"scale": -1.0}, {"scale": float("nan")}]
)
def test_other_options_say_what_there_is(wrong):
    with pytest.raises(ValueError, match=f"Policy: {next(iter(wrong))}="):
        Policy(mlp="2bit", **wrong)


def test_eight_bit_floats_are_rounded_to_nearest_only():
    with pytest.raises(ValueError, match="residual='e4m3' has no stochastic rounding"):
        Policy(residual="e4m3", rounding="stochastic")


def test_bits_are_those_of_the_core():
    assert tuple(BLOCKS) == _core.blocks
    for code, bits in enumerate(BLOCKS.values()):
        assert _core.block_row_bytes(code, 1 << 20) * 8 == bits * (1 << 20)


def test_codebooks_exist():
    for name in CODEBOOKS:
        if name not in ("dither2", "regelu2"):
            assert codebooks.codebook("silu", 2, name).bits == 2
    assert codebooks.codebook("gelu", 2, "regelu2").bits == 2 and codebooks.dither("silu", 2).bits == 2


def test_the_errors_that_are_printed_are_those_of_the_committed_result():
    result = json.loads((Path(__file__).parents[2] / "bench" / "results" / "fidelity.json").read_text())
    assert result["tokens"] == 768 and set(MEASURED) == {name for name, policy in POLICIES.items() if policy.lossy}
    for name, error in MEASURED.items():
        assert error == pytest.approx(result["sides"][name]["error"], rel=0.01)
        assert f"{error:.2g}" in POLICIES[name].cost() and "lossy" in POLICIES[name].cost()
    assert POLICIES["exact"].cost() == "" and "not measured" in Policy(mlp="int4").cost()


# ---- protocols ---------------------------------------------------------------------------------------------------------


def test_the_default_is_exact_everywhere():
    for activation, accelerator in itertools.product(protocols(), ACCELERATORS):
        found = protocol(activation, accelerator)
        assert isinstance(found, Protocol) and found.exact and found.why, activation
        assert (found.name, found.bits) in (("alpha", 1), ("exact", None))


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_the_relu_family_keeps_one_bit(activation):
    layouts = {accelerator: protocol(activation, accelerator).layout for accelerator in ACCELERATORS}
    assert protocol(activation, "tpu").name == "alpha" and protocol(activation, "tpu").bits == 1
    assert layouts == {"cpu": "rows", "cuda": "rows", "tpu": "rows256"}


def test_what_one_bit_cannot_say_keeps_its_input():
    for activation in ("relu2", "silu", "gelu", "gelu_tanh", "quick_gelu", "swiglu", "geglu", "reglu"):
        found = protocol(activation, "cpu")
        assert (found.name, found.bits, found.layout) == ("exact", None, ""), activation
    assert "34 bits" in protocol("swiglu", "cpu").why  # what codes would keep


def test_delhi_is_lossy_and_says_what_it_costs():
    for activation in codebooks.SMOOTH:
        found = protocol(activation, "tpu", "delhi")
        assert (found.name, found.bits, found.exact, found.layout) == ("delhi", 2, False, "rows256")
        assert "relative gradient error" in found.why


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ("relo", "cpu"),
            "activation is 'relo'; choose among relu, leaky_relu, relu6, silu, gelu, gelu_tanh, relu2, quick_gelu, swiglu, ",
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


def test_the_activations_are_those_of_the_core_and_of_the_front_ends():
    masks = {name for name in _core.masks if not name.startswith("jax_")}
    assert set(protocols()) == masks | set(_core.activations) | set(GATED)
    assert {name for name, found in protocols().items() if found[0].bits == 1} == masks
    torch = pytest.importorskip("unswag.torch", reason="the front end needs torch")
    assert all(callable(getattr(torch, name)) for name in protocols() if name != "gelu_tanh")
    jax = pytest.importorskip("unswag.jax", reason="the front end needs jax")
    assert all(callable(getattr(jax, name)) for name in GATED)


def test_the_founding_names_are_protocols_and_policies():
    names = {one.name for found in protocols().values() for one in found}
    assert names == {*ALIASES, "exact"}
    assert protocol("relu", "cpu", "alpha").exact and not Policy.named("alpha").lossy
    assert not protocol("silu", "cpu", "delhi").exact and Policy.named("delhi").lossy
