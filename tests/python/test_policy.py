import pytest

from unswag.policy import Policy


def test_exact_keeps_everything_as_it_is():
    exact = Policy.named("exact")
    assert exact.name == "exact" and all(exact.codec(role) is None for role in ("mlp", "residual", "anything"))
    assert Policy.named("alpha") is exact and Policy.named(exact) is exact


@pytest.mark.parametrize("name", ["int8", "", "Exact", 2, None])
def test_another_name_says_what_there_is(name):
    with pytest.raises(ValueError, match=r"policy=.*no such policy; choose one of 'exact', 'alpha'"):
        Policy.named(name)


def test_a_codec_belongs_to_its_role():
    codec = object()
    policy = Policy("mine", (("mlp", codec),))
    assert policy.codec("mlp") is codec and policy.codec("residual") is None
