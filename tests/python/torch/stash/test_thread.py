"""Each thread has stashes of its own."""

import threading
from types import SimpleNamespace

import pytest
import torch
from small_models import made, rms_norm
from tests.python.torch.stash.small_programs import HEADS, NO_STASH, W, X, assert_equal_with_and_without, block, bytes_kept
from torch.nn import functional as F

from unswag.torch import stash
from unswag.torch.stash import Stash, thread


def test_nested_stashes_share_the_outer_door():
    def function(x, w, head):
        with Stash():
            y = rms_norm(x, w, 1e-6)
        return F.linear(y, head).sum()

    with Stash() as outer:
        with Stash() as inner:
            assert Stash.current() is outer is not inner
        with outer:
            assert Stash.current() is outer
        assert Stash.current() is outer
    assert bytes_kept(Stash, function, X, W, HEADS[0]) < bytes_kept(NO_STASH, function, X, W, HEADS[0])
    assert_equal_with_and_without(function, X, W, HEADS[0])


def test_each_thread_has_its_own_door_and_any_thread_may_go_back():
    losses, failures, all_of_them = {}, [], threading.Barrier(3, timeout=60)

    def forward(name):
        try:
            with Stash() as door:
                all_of_them.wait()
                assert Stash.current() is door
                losses[name] = block(X, W, *HEADS)
                all_of_them.wait()
        except BaseException as error:
            failures.append(error)

    with Stash() as mine:
        threads = [threading.Thread(target=forward, args=(n,)) for n in range(3)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert Stash.current() is mine and not mine.entries().outputs
    assert not failures
    found = {}
    for n, loss in losses.items():
        other = threading.Thread(target=lambda n=n, loss=loss: found.update({n: torch.autograd.grad(loss, (X, W))}))
        other.start()
        other.join()
    plain = torch.autograd.grad(block(X, W, *HEADS), (X, W))
    assert all(torch.equal(a, b) for n in range(3) for a, b in zip(found[n], plain, strict=True))
    assert made == ["norm"] * 3


@pytest.mark.parametrize(
    "enter",
    [
        Stash,
        lambda: stash.role("mlp"),
        lambda: stash.recording(SimpleNamespace(leases=stash.Leases())),
        stash.collecting_references,
    ],
)
def test_a_thread_is_idle_outside_of_every_block_of_ours(enter):
    assert thread.idle()
    with enter():
        assert not thread.idle()
    assert thread.idle()
    stash.step_aside()
    assert not thread.idle()
    stash.leave()


def test_collecting_references_sees_each_storage_once_and_the_innermost_block_wins():
    with Stash() as door, stash.collecting_references() as outer:
        x, y = X * 1, X * 2
        first = door.door(x)
        door.door(x[1:])
        with stash.collecting_references() as inner:
            second = door.door(y)
        door.door(W)
    assert outer == [first] and inner == [second]
