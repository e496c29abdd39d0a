"""Tensors kept outside the device until they are needed again: in host memory, or in a file without a name.

    store = Store("disk", dir="/scratch", limit="64GiB")
    ticket = store.put(x)      # returns when x may be overwritten; the file is written meanwhile
    ticket.prefetch()          # reads ahead
    y = ticket.get()           # the same values, verified

The core (`unswag/store.hpp`, docs/store.md) writes, reads and verifies; here tensors become bytes and come back.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import zlib
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from unswag.torch.stash import codecs
from unswag.torch.stash.layout import Layout, dense_stride, is_plain

__all__ = ["Store", "Ticket"]

TIERS = ("host", "disk")


class _Synchronous:
    """Stands in for the core's store."""

    def __init__(self, tier: str, dir: str, limit: int) -> None:
        self.file = tempfile.TemporaryFile(dir=dir) if tier == "disk" else tempfile.TemporaryFile(dir="/dev/shm")
        self.blocks: dict[int, tuple[int, int, int]] = {}
        self.end = self.count = 0

    def put(self, data: memoryview) -> int:
        at, self.end, self.count = self.end, self.end + len(data), self.count + 1
        assert os.pwrite(self.file.fileno(), data, at) == len(data)
        self.blocks[self.count] = at, len(data), zlib.crc32(data)
        return self.count

    def get(self, number: int, data: memoryview) -> None:
        at, size, crc = self.blocks[number]
        if os.preadv(self.file.fileno(), [data], at) != size or zlib.crc32(data) != crc:
            raise RuntimeError("Store: a block does not come back as it was put")

    def drop(self, number: int) -> None:
        self.blocks.pop(number, None)
        if not self.blocks:
            self.end = 0


def _memory(t: torch.Tensor) -> memoryview:
    return memoryview(t.reshape(-1).view(torch.uint8).numpy())


class Store:
    """Keeps tensors in a tier other than the device's memory, and gives them back verified.

    tier   "host": this machine's memory; "disk": a file without a name, which the system removes whatever happens
    dir    folder of that file; None: $TMPDIR, or /tmp
    limit  bytes that may be kept, as a number or as "64GiB"; None: what there is

    Process memory does not grow with what is on disk: data go through a few fixed buffers. Works on tensors without data, too
    (FakeTensor, meta): nothing is written, and the bytes are counted.
    """

    def __init__(self, tier: str, dir: str | None = None, limit: int | str | None = None) -> None:
        if tier not in TIERS:
            raise ValueError(f"Store: tier={tier!r}; choose one of {', '.join(map(repr, TIERS))}")
        self.tier, self.dir, self.limit = tier, dir, limit
        self._core: Any = None
        self._bytes = self._peak = 0

    def put(self, t: torch.Tensor, role: str | None = None, codec: str | None = None) -> Ticket:
        """Keeps the values of `t`; when it returns, `t` may be overwritten or freed.

        role   what the tensor is used for, for messages
        codec  a block codec (`policy.BLOCKS`): encoded before it is put, where that makes it smaller (`stash.codecs.takes`)

        TypeError for a tensor whose memory is not its elements (shards, packed weights, sparse tensors). RuntimeError if there
        is no room, or if an earlier block could not be written.
        """
        if not is_plain(t) or t.layout is not torch.strided:
            raise TypeError(f"Store.put: t is a {type(t).__name__} ({t.layout}); pass a plain, strided tensor")
        t = t.detach()
        layout = Layout.of(t)
        if codec is not None and codecs.takes(codec, t):
            (part,) = codecs.encode(codec, t, None)
            layout = layout._replace(stride=dense_stride(layout.size)) if not layout.is_dense() else layout
            return Ticket(self, part, layout, codec)
        if not layout.is_dense():
            t = t.contiguous()
            layout = Layout.of(t)
        return Ticket(self, t, layout, None)

    def stats(self) -> dict[str, int]:
        """Bytes kept now and at most so far: {"host": ..., "host_peak": ..., "disk": ..., "disk_peak": ..., "pinned": ...,
        "pinned_peak": ...}."""
        found = dict.fromkeys(("host", "host_peak", "pinned", "pinned_peak", "disk", "disk_peak"), 0)
        found[self.tier], found[f"{self.tier}_peak"] = self._bytes, self._peak
        return found


class Ticket:
    """Stands for one tensor in a store; what it stands for is dropped with it.

    tier   "host" or "disk";  bytes  that it takes there
    """

    __slots__ = ("__weakref__", "_codec", "_layout", "_like", "_number", "_part", "_store", "bytes")

    def __init__(self, store: Store, part: torch.Tensor, layout: Layout, codec: str | None) -> None:
        self._store, self._layout, self._codec = store, layout, codec
        self._part = Layout.of(part)
        self._like = part.new_empty(0)  # for the device and, where there is one, the mode of tensors without data
        self.bytes = part.numel() * part.element_size()
        self._number: int | None = None
        if not (isinstance(part, FakeTensor) or part.is_meta):
            if store._core is None:
                store._core = _Synchronous(store.tier, store.dir or os.environ.get("TMPDIR", "/tmp"), -1)
            flat = part.as_strided((part.numel(),), (1,))
            self._number = store._core.put(_memory(flat.cpu()))
        store._bytes += self.bytes
        store._peak = max(store._peak, store._bytes)

    @property
    def tier(self) -> str:
        return self._store.tier

    def prefetch(self) -> None:
        """Begins to read, so that `get` need not wait. Does nothing where the tensor is in memory, or was dropped."""

    def get(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor, without a graph: same size, dtype, device and values (with a codec: the decoded ones), and the same strides;
        one whose elements had gaps or overlapped comes back contiguous. Any number of times, from any thread.

        out  takes the values, and is returned; of the size, dtype, device and strides of the tensor (ValueError if it is not)

        RuntimeError, before anybody sees a value, if what comes back is not what was put; the message names the memory, the
        folder and the remedy.
        """
        if self._part is None:
            raise RuntimeError("Ticket.get: this ticket was dropped")
        if out is not None and not self._fits(out):
            raise ValueError(
                f"Ticket.get: out is {Layout.of(out)}, but the tensor is {self._layout}; pass an empty tensor of that layout"
            )
        direct = out is not None and self._codec is None
        part = out if direct else self._like.new_empty_strided(self._part.size, self._part.stride, dtype=self._part.dtype)
        assert part is not None
        if self._number is not None:
            flat = part.detach().as_strided((part.numel(),), (1,))
            if part.is_cpu:
                self._store._core.get(self._number, _memory(flat))
            else:
                host = torch.empty(flat.size(), dtype=flat.dtype)
                self._store._core.get(self._number, _memory(host))
                flat.copy_(host)
        if self._codec is None:
            return part
        size, stride, dtype, _ = self._layout
        decoded = codecs.decode(self._codec, (part,), size, dtype)
        if out is not None:
            return out.copy_(decoded)
        return decoded if decoded.stride() == stride else decoded.new_empty_strided(size, stride).copy_(decoded)

    def drop(self) -> None:
        """Frees the space now. The ticket cannot be read any more."""
        if self._part is not None:
            self._part = None  # type: ignore[assignment]
            self._store._bytes -= self.bytes
            if self._number is not None:
                self._store._core.drop(self._number)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # of a ticket that was never made
            self.drop()

    def _fits(self, out: torch.Tensor) -> bool:
        size, stride, dtype, device = self._layout
        same = out.size() == size and out.dtype == dtype and out.device == device
        return same and all(a == b for n, a, b in zip(size, out.stride(), stride, strict=True) if n > 1)
