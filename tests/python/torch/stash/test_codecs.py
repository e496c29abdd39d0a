"""Codecs: a tensor that plays a role is encoded once, for all who save it or a view of it."""

import pytest
import torch

from unswag import Policy
from unswag.torch import functional, stash
from unswag.torch.audit import LiveStorages
from unswag.torch.draws import Draws
from unswag.torch.stash import Stash, codecs

pytestmark = pytest.mark.native


def saved(policy, forward):
    """The loss of `forward`, under a stash."""
    with Stash(policy):
        return forward()


def test_a_view_of_a_marked_tensor_shares_its_packed_form():
    x = torch.randn(64, 64, requires_grad=True)

    def forward():
        y = x * 1.0
        stash.plays("mlp", y)
        return (y * y).sum() + (y.t() @ torch.ones(64, 3)).square().sum() + (y.view(-1) ** 3).sum()

    encoded, encode = [], codecs.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "encode", lambda *args: (encoded.append(args[0]), encode(*args))[1])
        saved(Policy(mlp="int8"), forward).backward()
    assert encoded == ["int8"]
    ours, x.grad = x.grad, None
    forward().backward()
    assert 0 < (ours - x.grad).norm() / x.grad.norm() < 0.02


def test_halves_of_one_tensor_are_encoded_each():
    x = torch.randn(32, 256, requires_grad=True)

    def forward():
        gate, up = (x * 1.0).chunk(2, -1)
        return functional.swiglu(gate, up).square().sum()

    saved(Policy(mlp="int8"), forward).backward()
    ours, x.grad = x.grad, None
    forward().backward()
    assert 0 < (ours - x.grad).norm() / x.grad.norm() < 0.05


def test_what_changed_since_it_was_encoded_is_encoded_anew():
    x = torch.randn(64, 64, requires_grad=True)

    def forward(stay):
        y = x * 1.0
        stash.plays("mlp", y)
        first = (y.detach() * x).sum()  # keeps y as it is now
        if not stay:
            with torch.no_grad():
                y.mul_(3)
        return first + (y.detach() * x).sum()

    saved(Policy(mlp="int8"), lambda: forward(False)).backward()
    assert torch.allclose(x.grad, 4 * x.detach(), atol=0.1)


def test_small_tensors_parameters_and_other_dtypes_are_kept_as_they_are():
    with Stash(Policy(mlp="int2")):
        for t in (torch.randn(8, 8), torch.nn.Parameter(torch.randn(64, 64)), torch.arange(4096)):
            leaf = t.requires_grad_() if t.is_floating_point() else t
            stash.plays("mlp", leaf)
            assert torch.equal(stash.unpack(Stash.current().door(leaf)), t)


def test_packed_forms_die_with_the_graph():
    x = torch.randn(64, 64, requires_grad=True)
    with LiveStorages(inputs=x) as live:
        loss = saved(Policy(mlp="int8"), lambda: functional.silu(x * 1.0).square().sum())
        assert 0 < live.bytes() < x.nbytes
        loss.backward()
        del loss
        x.grad = None
        assert live.bytes() == 0


def test_rows_shorter_than_a_block_are_kept_as_they_are():
    """Heads of 16 numbers would fill half a block: 18 bits instead of 16."""
    assert not codecs.takes("int8", torch.zeros(4, 96, 16, dtype=torch.bfloat16))
    assert codecs.takes("int8", torch.zeros(4, 96, 16)) and codecs.takes("int4", torch.zeros(4, 96, 16, dtype=torch.bfloat16))


def test_each_tensor_of_a_forward_has_draws_of_its_own():
    x, draws = torch.randn(64, 64), Draws(3)
    first, second = (codecs.encode("int4", x, draws)[0] for _ in range(2))
    assert not torch.equal(first, second) and torch.equal(first, codecs.encode("int4", x, Draws(3))[0])
