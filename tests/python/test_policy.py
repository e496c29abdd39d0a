import dataclasses
import json
from pathlib import Path

import pytest

from unswag.policy import ALIASES, BLOCKS, CODEBOOKS, MEASURED, POLICIES, ROLES, Policy


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
    _core = pytest.importorskip("unswag._core")
    assert tuple(BLOCKS) == _core.blocks
    for code, bits in enumerate(BLOCKS.values()):
        assert _core.block_row_bytes(code, 1 << 20) * 8 == bits * (1 << 20)


def test_codebooks_exist():
    from unswag import codebooks

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
