"""The store for tensors: what is put comes back as it was, verified, in both tiers."""

import copy
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from unswag import _core
from unswag.torch import store as module
from unswag.torch.store import Store, Stores

pytestmark = pytest.mark.native
TIERS = pytest.mark.parametrize("tier", ["host", "disk"])
ROOT = Path(__file__).parents[3]


def tensors():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 40, 64, generator=generator)
    yield "contiguous", wide
    yield "permuted", wide.permute(2, 0, 1)
    yield "a dense part", wide[1]
    yield "gaps", wide[:, ::2, 3:]
    yield "overlapping", torch.randn(64, generator=generator).expand(50, 64)
    yield "misaligned", torch.randn(1001, generator=generator)[1:]
    yield "scalar", torch.tensor(3.0)
    yield "empty", torch.empty(0, 5)
    yield "bf16", wide.bfloat16()
    yield "special", torch.tensor([float("nan"), -0.0, float("inf"), 1e-45] * 300)
    yield "integers", torch.randint(0, 99, (77, 3), generator=generator)
    yield "bools", torch.rand(999, generator=generator) > 0.5
    yield "complex", torch.randn(64, 8, dtype=torch.complex64, generator=generator)
    yield "large", torch.randn(3 << 18, generator=generator)
    yield "a graph", wide.clone().requires_grad_() * 2


def same(a, b):
    flat = [t.detach().contiguous().view(torch.uint8) if t.dim() else t.detach().reshape(1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@TIERS
def test_what_is_put_comes_back(tier):
    store = Store(tier)
    kept = {name: (t, store.put(t, role="mlp")) for name, t in tensors()}
    for name, (t, ticket) in reversed(kept.items()):
        ticket.prefetch()
        for _ in range(2):
            found = ticket.get()
            assert same(found, t), name
            assert not found.requires_grad and found.grad_fn is None
            if name not in ("gaps", "overlapping"):
                assert found.stride() == t.stride(), name
        assert ticket.tier == tier and ticket.bytes == t.numel() * t.element_size()


@TIERS
def test_memory_may_be_overwritten_as_soon_as_put_returns(tier):
    store, tickets = Store(tier), []
    t = torch.empty(300_000)
    for i in range(40):
        tickets.append(store.put(t.fill_(i)))
    t.fill_(-1)
    for i, ticket in enumerate(tickets):
        assert (ticket.get() == i).all()


@TIERS
def test_out_takes_the_values_and_has_to_fit(tier):
    store = Store(tier)
    t = torch.randn(1, 100, 64)
    ticket = store.put(t)
    room = torch.zeros(1, 200, 64)  # a tile's buffer, of which a shorter tile fills a part
    out = room[:, :100]
    assert ticket.get(out=out) is out and torch.equal(out, t) and not room[:, 100:].any()
    for wrong in (torch.empty(100, 64), torch.empty(1, 100, 64, dtype=torch.bfloat16), torch.empty(1, 64, 100).transpose(1, 2)):
        with pytest.raises(ValueError, match=r"out is torch\..*pass torch.float32 \[1, 100, 64\] with strides"):
            ticket.get(out=wrong)
    packed = store.put(t, codec="int8")
    assert torch.equal(packed.get(out=out), packed.get())


@TIERS
def test_a_codec_encodes_first(tier):
    torch.manual_seed(0)  # the error of four bits grows with the largest number of a block
    store = Store(tier)
    t = torch.randn(64, 256).bfloat16()
    for codec, bits in (("int8", 8.5), ("int4", 5.0)):
        ticket = store.put(t, codec=codec)
        assert ticket.bytes == t.numel() * bits / 8
        found = ticket.get()
        assert found.dtype == t.dtype and found.stride() == t.stride()
        assert 0 < (found - t).abs().max() < 0.5
        turned = store.put(t.t(), codec=codec).get()
        assert turned.stride() == t.t().stride() and 0 < (turned - t.t()).abs().max() < 0.5
    small = torch.randn(10)
    assert torch.equal(store.put(small, codec="int4").get(), small)


@TIERS
def test_bytes_are_counted_and_fall_with_the_tickets(tier):
    store = Store(tier)
    assert store.stats()[tier] == 0
    buffers = 0 if tier == "host" else 16 * ((1 << 20) + 16384)
    first, second = store.put(torch.zeros(1000)), store.put(torch.zeros(500))
    assert store.stats()[tier] == 6000 and store.stats()["host"] == (6000 if tier == "host" else buffers)
    del first
    assert store.stats()[tier] == 2000 and store.stats()[f"{tier}_peak"] == 6000
    second.drop()
    second.drop()
    assert store.stats()[tier] == 0
    with pytest.raises(RuntimeError, match="was dropped"):
        second.get()


@TIERS
def test_clear_takes_the_tickets_with_it(tier):
    store = Store(tier)
    ticket = store.put(torch.zeros(1000))
    store.clear()
    assert _core.store_stats(store._core)["space"] == 0
    with pytest.raises(RuntimeError, match=r"no block.*the store was cleared; put it again"):
        ticket.get()
    ticket.drop()
    del ticket
    assert torch.equal(store.put(torch.ones(1000)).get(), torch.ones(1000))


@TIERS
def test_tensors_without_data_are_counted_and_nothing_is_written(tier):
    store = Store(tier)
    with FakeTensorMode():
        fake = torch.empty(100, 64).t()
        tickets = [store.put(fake), store.put(fake, codec="int8")]
    found = tickets[0].get()
    assert isinstance(found, FakeTensor) and found.shape == fake.shape and found.stride() == fake.stride()
    assert isinstance(tickets[1].get(), FakeTensor)
    meta = store.put(torch.empty(10, device="meta"))
    assert meta.get().is_meta
    assert store.stats()[tier] == 25600 + tickets[1].bytes + 40 and 6400 < tickets[1].bytes < 9600
    assert _core.store_stats(store._core)["blocks"] == 0
    del tickets, meta
    assert store.stats()[tier] == 0


@TIERS
def test_a_step_that_raises_leaves_the_store_empty(tier):
    store = Store(tier)

    def step(fail):
        tickets = []
        for i in range(8):
            tickets.append(store.put(torch.full((50_000,), float(i))))
            if i == fail:
                raise KeyboardInterrupt
        for i, ticket in reversed(list(enumerate(tickets))):
            ticket.prefetch()
            if i + 8 == fail:
                raise KeyboardInterrupt
            assert (ticket.get() == i).all()

    gc.disable()
    try:
        for fail in range(16):
            with pytest.raises(KeyboardInterrupt):
                step(fail)
            assert store.stats()[tier] == 0
        step(-1)
    finally:
        gc.enable()


@pytest.mark.parametrize("fake", [False, True])
@TIERS
def test_an_interrupt_at_any_instruction_leaves_nothing(tier, fake):
    """Python may raise KeyboardInterrupt behind any instruction, as here, before what a call returned has a name."""
    store, count = Store(tier), 0
    device = "meta" if fake else "cpu"

    def step():
        first, second = store.put(torch.zeros(100, device=device)), store.put(torch.ones(50, device=device))
        first.get()
        first.prefetch()
        second.drop()

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename not in (module.__file__, __file__):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    interrupted = True
    while interrupted:
        count += 1
        left = count
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            step()
            interrupted = False
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert store.stats()[tier] == 0, count
    assert count > 100


def test_what_is_alive_at_the_end_of_the_process_is_no_leak_report():
    """As is a loss that a script still has; here for certain."""
    code = """
import ctypes
from unswag import _core
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_core.StoreCount(_core.store_open(False, "", -1), 4)))
"""
    output, _ = (process := run(code)).communicate(timeout=120)
    assert process.returncode == 0 and not output


@TIERS
def test_memory_threads_and_files_are_flat_over_a_thousand_steps(tier):
    store = Store(tier, limit=20 * 98 * 4096)  # full at each step: a header and whole pages
    t = torch.randn(100_000)

    def figures():
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        return (
            resident,
            len(os.listdir("/proc/self/task")),
            len(os.listdir("/proc/self/fd")),
            _core.store_stats(store._core)["space"],
        )

    for i in range(1000):
        tickets = None  # type: ignore[assignment]
        tickets = [store.put(t) for _ in range(20)]
        if i % 100 == 0:
            assert torch.equal(tickets[7].get(), t)
        if i == 10:
            before = figures()
    after = figures()
    assert after[1:] == before[1:] and after[0] - before[0] < 4 << 20


def test_it_is_full():
    store = Store("host", limit=1 << 20)
    kept = store.put(torch.zeros(200_000))
    with pytest.raises(RuntimeError, match=r"the host store.*limit is 1048576; raise the limit"):
        store.put(torch.zeros(200_000))
    assert torch.equal(kept.get(), torch.zeros(200_000))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(tier="gpu"), ValueError, "tier='gpu'; choose one of 'host', 'disk'"),
        (dict(tier="disk", limit="64 apples"), ValueError, "limit='64 apples' is no size"),
        (dict(tier="disk", limit=-1), ValueError, "limit=-1 is no size"),
        (dict(tier="disk", limit="8388608TiB"), ValueError, "limit='8388608TiB' is more than a signed 64-bit size holds"),
        (dict(tier="host", dir="/tmp"), ValueError, "dir='/tmp', and a host store has no folder; leave dir out"),
        (dict(tier="disk", dir=5), TypeError, "dir=5 is no path; pass the folder's path"),
        (dict(tier="disk", dir="/nowhere/at/all"), RuntimeError, "/nowhere/at/all: No such file.*pass a folder"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        Store(**arguments)


def test_other_tensors_are_refused():
    store = Store("host")
    with pytest.raises(TypeError, match="pass a plain tensor"):
        store.put(torch.zeros(3, 3).to_sparse())
    with pytest.raises(TypeError, match="pass a plain tensor"):
        store.put(torch.nested.nested_tensor([torch.zeros(2)]))
    z = torch.zeros(3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"t is a conj view.*pass t.resolve_conj\(\)"):
        store.put(z.conj())
    with pytest.raises(TypeError, match=r"t is a neg view.*pass t.resolve_neg\(\)"):
        store.put(z.conj().imag)


def test_a_ram_disk_is_warned_of_once():
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm here")
    module._warned.clear()
    with pytest.warns(UserWarning, match=r"/dev/shm is in memory.*pass a folder on a disk"):
        Store("disk", dir="/dev/shm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Store("disk", dir="/dev/shm")


def test_many_threads_without_deadlock():
    store, wrong = Store("disk"), []

    def work(seed):
        draw = random.Random(seed)
        for i in range(30):
            t = torch.full((draw.randrange(1, 300_000),), float(seed * 100 + i))
            ticket = store.put(t)
            ticket.prefetch()
            if not torch.equal(ticket.get(), t):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong and store.stats()["disk"] == 0


def test_stores_are_opened_when_needed_and_copies_have_their_own():
    stores = Stores(limit="1MiB")
    first = stores.of("host")
    assert stores.of("host") is first and stores.of("disk") is not first
    for twin in (copy.deepcopy(stores), pickle.loads(pickle.dumps(stores))):
        assert twin.limit == 1 << 20 and twin.of("host") is not first
    ticket = first.put(torch.zeros(100))
    assert stores.stats()["host"] == 400 and ticket.bytes == 400
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(first)


def run(code, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def test_in_a_fork_the_parent_s_tickets_are_errors_and_new_stores_work():
    code = """
import os, torch
from unswag.torch.store import Stores
stores = Stores()
ticket = stores.of("disk").put(torch.arange(500_000.0))
if (child := os.fork()) == 0:
    try:
        ticket.get()
    except RuntimeError as error:
        assert "is a fork" in str(error) and "store of its own" in str(error)
    else:
        os._exit(2)
    ours = stores.of("disk").put(torch.ones(1000))
    assert stores.stats()["disk"] == 4000
    del ticket
    os._exit(0 if torch.equal(ours.get(), torch.ones(1000)) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(ticket.get(), torch.arange(500_000.0))
"""
    process = run(code)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and not out, out


def test_a_process_ends_in_silence_with_blocks_alive_and_being_written():
    code = """
import torch
from unswag.torch.store import Store
store = Store("disk")
tickets = [store.put(torch.zeros(1_000_000)) for _ in range(5)]
tickets[0].prefetch()
cycle = [store, tickets]
cycle.append(cycle)
"""
    process = run(code)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and not out, out


def test_killed_at_any_moment_it_leaves_no_file(tmp_path):
    code = f"""
import torch
from unswag.torch.store import Store
store = Store("disk", dir={str(tmp_path)!r})
print("ready", flush=True)
t = torch.zeros(1_000_000)
while True:
    tickets = [store.put(t) for _ in range(6)]
    for ticket in reversed(tickets):
        ticket.prefetch()
        ticket.get()
"""
    draw = random.Random(0)
    for _ in range(int(os.environ.get("UNSWAG_KILLS", "3"))):
        process = run(code)
        assert process.stdout.readline() == "ready\n"
        time.sleep(draw.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert os.listdir(tmp_path) == []
