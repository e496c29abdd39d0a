"""Tensors kept outside the device's memory until they are needed again: in host memory, or in a file without a name.

    store = Store("disk", dir="/scratch", limit="64GiB")
    ticket = store.put(x)      # returns when x may be overwritten; the file is written meanwhile
    ticket.prefetch()          # begins to read
    y = ticket.get()           # the same values, verified

The core (`unswag/store.hpp`, docs/store.md) writes, reads and verifies bytes; here tensors become bytes and come back.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from unswag import _core
from unswag.policy import STORE_TIERS
from unswag.sizes import bytes_of
from unswag.torch.stash import codecs
from unswag.torch.stash.layout import Layout, dense_stride, is_plain

__all__ = ["Store", "Stores", "Ticket", "can_store"]


def can_store(t: torch.Tensor) -> bool:
    """Whether a store takes `t`: strided, its memory its elements, on the CPU, on a CUDA device or without data."""
    return (
        is_plain(t)
        and t.layout is torch.strided
        and not t.is_nested
        and not t.is_conj()
        and not t.is_neg()
        and t.device.type in ("cpu", "cuda", "meta")
    )


def _folder(dir: Any, argument: str) -> str:
    """The path as a text, "" for None."""
    if isinstance(dir, os.PathLike):
        dir = os.fspath(dir)
    if dir is not None and not isinstance(dir, str):
        raise TypeError(f"{argument}={dir!r} is no path; pass the folder's path as a str or a pathlib.Path")
    return dir or ""


_warned: set[str] = set()  # places in memory that were warned of


class Store:
    """Keeps tensors in a tier outside the device's memory, and gives them back verified.

    tier   "host": memory of this machine, not page-locked; "disk": a file without a name, which ends with the process
    dir    folder of that file, a str or a path; None: $TMPDIR, or /tmp
    limit  bytes that may be kept, with headers: a number, or a text like "64GiB"; None: what there is

    The memory of the process does not grow with what is on disk: data go through 16 MiB of buffers. Tensors of a CUDA device go
    through two page-locked buffers more, in a stream of their own. For tensors on the CPU the host tier saves nothing, except
    with a codec: they are copied from one place in memory to another. Tensors without data (FakeTensor, meta) are counted, and
    nothing is written.

    Any thread may use it. A process that is forked has to make stores of its own.

    ValueError for an unknown tier or limit, or a folder of the host tier; TypeError for a folder that is no path; RuntimeError
    if the file cannot be made. Warns if the folder is in memory.
    """

    def __init__(self, tier: str, dir: str | os.PathLike[str] | None = None, limit: int | str | None = None) -> None:
        if tier not in STORE_TIERS:
            raise ValueError(f"Store: tier={tier!r}; choose one of {', '.join(map(repr, STORE_TIERS))}")
        folder = _folder(dir, "dir")
        if tier == "host" and folder:
            raise ValueError(f"Store: dir={dir!r}, and a host store has no folder; leave dir out, or pass tier='disk'")
        self.tier = tier
        self._core = _core.store_open(tier == "disk", folder, -1 if limit is None else bytes_of(limit, "limit"))
        self._lock = threading.Lock()  # of what follows
        self._transfers: dict[torch.device, _Transfers] = {}
        stats: dict[str, Any] = _core.store_stats(self._core)
        self.place: str = stats["place"]
        if stats["ram_disk"] and self.place not in _warned:
            _warned.add(self.place)
            warnings.warn(
                f"unswag: {self.place} is in memory (a RAM disk), so nothing is saved; pass a folder on a disk", stacklevel=2
            )

    def put(self, t: torch.Tensor, role: str | None = None, codec: str | None = None) -> Ticket:
        """Keeps the values of `t`; when it returns, `t` may be overwritten or freed.

        role   what the tensor is used for; kept with it
        codec  a block codec (`policy.BLOCKS`): encoded before it is put, where that makes it smaller (`stash.codecs.takes`)

        TypeError for a tensor whose memory is not its elements (shards, packed weights, sparse tensors, conj and neg views).
        RuntimeError if there
        is no room, or if an earlier block could not be written.
        """
        for bit, is_set in (("conj", t.is_conj()), ("neg", t.is_neg())):
            if is_set:
                raise TypeError(
                    f"Store.put: t is a {bit} view, whose values are not those of its memory; pass t.resolve_{bit}()"
                )
        if not can_store(t):
            raise TypeError(
                f"Store.put: t is a {type(t).__name__} ({t.layout}, {t.device}); pass a plain tensor on the CPU or CUDA"
            )
        t = t.detach()
        layout = Layout.of(t)
        if codec is not None and codecs.takes(codec, t):
            (part,) = codecs.encode(codec, t, None)
            layout = layout if layout.is_dense() else layout._replace(stride=dense_stride(layout.size))
            return Ticket(self, part, layout, codec, role)
        if not layout.is_dense():
            t = t.clone(memory_format=torch.contiguous_format)
        return Ticket(self, t, Layout.of(t), None, role)

    def clear(self) -> None:
        """Drops all tensors and gives the space back to the system; their tickets cannot be read any more."""
        for transfers in list(self._transfers.values()):
            transfers.finish()
        _core.store_clear(self._core)

    def stats(self) -> dict[str, int]:
        """Bytes by memory, now and at most so far: {"host", "host_peak", "pinned", "pinned_peak", "disk", "disk_peak"}. The
        buffers through which a file is written and read are in "host"."""
        found = dict.fromkeys(("host", "host_peak", "pinned", "pinned_peak", "disk", "disk_peak"), 0)
        core: dict[str, Any] = _core.store_stats(self._core)
        with self._lock:
            now = found[self.tier] = core["bytes"] + core["counted"]
            found[f"{self.tier}_peak"] = max(core["peak"], core["most_counted"], now)
            found["pinned"] = found["pinned_peak"] = sum(transfers.bytes() for transfers in self._transfers.values())
        for name in ("host", "host_peak"):
            found[name] += core["buffers"]
        return found

    def _transfers_of(self, device: torch.device) -> _Transfers:
        with self._lock:
            if device not in self._transfers:
                self._transfers[device] = _Transfers(self, device)
            return self._transfers[device]

    def __reduce__(self) -> Any:
        raise TypeError("Store: a store cannot be copied or pickled; make one with Store(tier, dir, limit)")


class Ticket:
    """Stands for one tensor in a store, which is dropped with it.

    tier   "host" or "disk";  bytes  of the tensor there, as encoded
    """

    __slots__ = ("__weakref__", "_codec", "_held", "_label", "_layout", "_like", "_part", "_store", "bytes")

    def __init__(self, store: Store, part: torch.Tensor, layout: Layout, codec: str | None, role: str | None) -> None:
        # What the store has of it, which ends with the ticket; None until a tensor of a device is put.
        self._held: _core.StoreBlock | _core.StoreCount | None = None
        self._store, self._layout, self._codec = store, layout, codec  # of the tensor
        self._part: Layout | None = Layout.of(part)  # of what is stored
        self._like = part.new_empty(0)  # gives memory on the device, in the mode of tensors without data
        self.bytes = part.numel() * part.element_size()
        if isinstance(part, FakeTensor) or part.is_meta:
            self._held = _core.StoreCount(store._core, self.bytes)
            return
        size, stride, dtype, _ = layout
        self._label = f"{dtype} {list(size)} {list(stride)} {codec or 'exact'} {role or ''}".encode()[:2048]
        flat = part.as_strided((part.numel(),), (1,))
        if part.is_cpu:
            self._put(flat)
        else:
            store._transfers_of(part.device).begin(self, flat)

    @property
    def tier(self) -> str:
        return self._store.tier

    def prefetch(self) -> None:
        """Begins to read, as far as there are buffers free, so that `get` waits less. Does nothing for the host tier."""
        if isinstance(held := self._held, _core.StoreBlock):
            held.prefetch()

    def get(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor, without a graph: same size, dtype, device, values (with a codec: the decoded ones) and strides; one
        whose elements had gaps or overlapped comes back contiguous. Any number of times, from any thread.

        out  takes the values, and is returned: of the size, dtype, device and strides of the tensor (else ValueError). Its
             values are undefined after an error

        RuntimeError, before anybody gets a value, if what is read is not what was put, or if it could not be written; the
        message names the memory, its folder and the remedy.
        """
        if self._part is None:
            raise RuntimeError(f"Ticket.get: the tensor in {self._store.place} was dropped; put it again")
        size, stride, dtype, device = self._layout
        if out is not None and not _fits(out, self._layout):
            raise ValueError(
                f"Ticket.get: out is {out.dtype} {list(out.shape)} with strides {list(out.stride())} on {out.device}; pass "
                f"{dtype} {list(size)} with strides {list(stride)} on {device}"
            )
        if out is not None and self._codec is None:
            part = out.detach()
        else:
            part = self._like.new_empty_strided(self._part.size, self._part.stride, dtype=self._part.dtype)
        if not (isinstance(part, FakeTensor) or part.is_meta):
            self._read(part.as_strided((part.numel(),), (1,)))
        if self._codec is None:
            return part if out is None else out
        decoded = codecs.decode(self._codec, (part,), size, dtype)
        if out is None and decoded.stride() == stride:
            return decoded
        return (self._like.new_empty_strided(size, stride, dtype=dtype) if out is None else out).copy_(decoded)

    def drop(self) -> None:
        """Frees the space now. The ticket cannot be read any more."""
        self._part = None
        held, self._held = self._held, None
        if held is not None:
            held.drop()

    def _put(self, flat: torch.Tensor) -> None:
        """`flat` lies in host memory."""
        self._held = _core.StoreBlock(self._store._core, flat.data_ptr(), self.bytes, self._label)

    def _read(self, flat: torch.Tensor) -> None:
        if not flat.is_cpu:
            self._store._transfers_of(flat.device).bring(self, flat)
        else:
            self._block().get(flat.data_ptr())

    def _block(self) -> _core.StoreBlock:
        if not isinstance(held := self._held, _core.StoreBlock):
            raise RuntimeError(f"Ticket.get: the tensor could not be put into {self._store.place}; an earlier error said why")
        return held


def _fits(out: torch.Tensor, layout: Layout) -> bool:
    size, stride, dtype, device = layout
    same = out.size() == size and out.dtype == dtype and out.device == device and can_store(out)
    return same and all(a == b for n, a, b in zip(size, out.stride(), stride, strict=True) if n > 1)


class Stores:
    """The stores of a model: one for each tier, opened with its first tensor, anew in each process. `dir`, `limit` as `Store`.

    A copy of the model gets stores of its own; what is pickled is only how to open them.
    """

    def __init__(self, dir: str | os.PathLike[str] | None = None, limit: int | str | None = None) -> None:
        self.dir, self.limit = _folder(dir, "store_dir") or None, None if limit is None else bytes_of(limit, "store_limit")
        self._open: dict[tuple[str, int], Store] = {}
        self._lock = threading.Lock()

    def of(self, tier: str) -> Store:
        """The store of this tier, in this process."""
        key = tier, os.getpid()
        store = self._open.get(key)
        if store is None:
            with self._lock:
                store = self._open.get(key)
                if store is None:
                    store = self._open[key] = Store(tier, self.dir if tier == "disk" else None, self.limit)
        return store

    def stats(self) -> dict[str, int]:
        """The sums of `Store.stats` in this process."""
        found = dict.fromkeys(("host", "host_peak", "pinned", "pinned_peak", "disk", "disk_peak"), 0)
        for (_, process), store in list(self._open.items()):
            if process == os.getpid():
                found = {name: value + store.stats()[name] for name, value in found.items()}
        return found

    def __reduce__(self) -> Any:  # deepcopy's, too
        return Stores, (self.dir, self.limit)


class _Buffer:
    """Page-locked memory that a transfer goes through, and what it is in use for."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.done: torch.cuda.Event | torch.cuda.Stream | None = None  # of the copy that reads or writes it
        self.ticket: weakref.ref[Ticket] | None = None  # whose tensor it holds until that is put

    def finish(self) -> None:
        """The memory may be used again: its copy has ended, and its tensor is in the store. What an interrupt leaves undone is
        done by the next call."""
        if self.done is not None:
            self.done.synchronize()
            self.done = None
        ticket = None if self.ticket is None else self.ticket()
        try:
            if ticket is not None and ticket._part is not None:
                ticket._put(self.memory)  # which may be longer: the ticket knows its bytes
        except Exception:  # said once
            self.ticket = None
            raise
        self.ticket = None

    def room(self, nbytes: int) -> torch.Tensor:
        if self.memory.numel() < nbytes:
            try:
                self.memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self.memory = torch.empty(nbytes, dtype=torch.uint8)
                if not _refused:
                    _refused.append(str(error).partition("\n")[0])
                    warnings.warn(
                        f"unswag: {nbytes} bytes of page-locked memory were refused ({_refused[0]}); transfers go through "
                        "pageable memory and are slower. Raise the limit of locked memory (ulimit -l)",
                        stacklevel=2,
                    )
        return self.memory[:nbytes]


_refused: list[str] = []  # why page-locked memory was refused: said once


class _Transfers:
    """Copies between a CUDA device and host memory, in a stream of their own, through two buffers."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self.store, self.device = store, device
        self.stream = torch.cuda.Stream(device)
        self.buffers = (_Buffer(), _Buffer())
        self.turn = 0
        self.lock = threading.RLock()  # a ticket may be dropped by the garbage collector in the middle

    def bytes(self) -> int:
        return sum(buffer.memory.numel() for buffer in self.buffers if buffer.memory.is_pinned())

    def finish(self) -> None:
        """Everything that was begun is in the store."""
        with self.lock:
            for buffer in self.buffers:
                buffer.finish()

    def begin(self, ticket: Ticket, flat: torch.Tensor) -> None:
        """Copies `flat` to the host, behind what its producer has queued; it is put when its buffer is needed again, or it is
        read."""
        with self.lock:
            buffer = self._next()
            memory = buffer.room(ticket.bytes)
            self._queue(buffer, memory, flat.view(torch.uint8), flat)
            buffer.ticket = weakref.ref(ticket)

    def bring(self, ticket: Ticket, flat: torch.Tensor) -> None:
        """Reads the ticket's tensor into `flat`: verified on the host, and there before what is queued next in this stream."""
        with self.lock:
            if ticket._held is None:
                self.finish()
            block = ticket._block()
            buffer = self._next()
            memory = buffer.room(ticket.bytes)
            block.get(memory.data_ptr())
            self._queue(buffer, flat.view(torch.uint8), memory, flat)
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _next(self) -> _Buffer:
        buffer = self.buffers[self.turn]
        self.turn ^= 1
        buffer.finish()
        return buffer

    def _queue(self, buffer: _Buffer, to: torch.Tensor, of: torch.Tensor, on_device: torch.Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        # Before the copy: an interrupt behind it may not leave memory that looks unused.
        on_device.record_stream(self.stream)
        buffer.done = self.stream
        with torch.cuda.stream(self.stream), torch.no_grad():
            to.copy_(of, non_blocking=True)
        buffer.done = self.stream.record_event()
