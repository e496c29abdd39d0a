"""ReLU under the stash: what is kept of its output is settled by who else saves it. Gradients are bit for bit torch's.

The backward of torch's ReLU asks one thing of the output y: not (y <= 0). So, in this order:

1. where x costs nothing (a recipe makes it, somebody holds it, or it is a sum of two such) y is relu(x), made again: 0 bits;
2. else ReLU itself keeps one bit per element, and as long as nobody else saves y (a frozen layer, pooling, a sum follow) that
   is all;
3. when somebody else saves y (a layer that is trained), y is kept for both as bitmap + non-zeros where that is smaller:
   1 + density bits(dtype) bits, lossless, -0 and NaN are non-zeros;
4. or else as it is, and ReLU reads it there, as in stock.

Nothing is predicted: y passes the door when ReLU saves it and again when another op does, and what ReLU keeps gives way then.
torch's own op runs forward and backward; only what it is handed as its saved result differs, where it cannot see it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from unswag import _core
from unswag.torch import ops, stash
from unswag.torch.stash import Stash, _About, _Again, _Cell, _Kept, _Layout, _Output

MASK, NONZEROS, OUTPUT, RECIPE = "mask", "bitmap + non-zeros", "output", "recipe"  # what a ReLU's output was kept as
NODE = "ReluBackward0"
ROW = 128  # words of 32 elements, at most, to which one offset of the non-zeros belongs: 8 bytes in 512 bytes of bits


def rectified(relu: Callable[[Tensor], Tensor], x: Tensor, kept: Counter[str] | None = None) -> Tensor:
    """relu(x), where `relu` is torch's, in place or not, behind any name; `kept` counts what the output was kept as.

    Whatever else `relu` turns out to do is done, and kept as the stash keeps it. Without a stash in use it is just called.
    """
    door = None if torch.compiler.is_compiling() or not torch.is_grad_enabled() else Stash.current()
    if door is None or door.passive:
        return relu(x)
    kept = Counter() if kept is None else kept
    edge = (x.grad_fn, x.output_nr)
    source, chained = None, False
    if x.grad_fn is not None:
        source = door.free(x)
        if source is None:
            source, chained = _sum(door, x), True
    with stash.keeping() as handles:
        y = relu(x)
    node, key = y.grad_fn, stash._storage_key(y)
    if key is None or y.dtype not in ops.DTYPES or not stash._is_dense(y) or not _has_kernels(y):
        return y
    own = handles[0] if len(handles) == 1 and stash._storage_key(handles[0].alias) == key else None
    if y.requires_grad and (own is None or node is None or node.name() != NODE):
        return y
    if source is None or node is None or own is None or node.next_functions != (edge,) or _is_in_place(source, key):
        entry: _Output = _Rectified(door, y, own, kept)
    else:
        entry = _Output(y, _Layout.of(y), cell := _Cell(torch.relu, (source,), {}, _Layout.of(y), door._recent), chained)
        own.give_way(_Again(cell, y.size(), y.stride(), 0))
        kept[RECIPE] += 1
    door._outputs[key] = entry
    if node is not None:
        node.metadata[stash._MARK] = weakref.ref(entry)  # type: ignore[index]
    return y


def _sum(door: Stash, x: Tensor) -> _Again | None:
    """A handle for x = a + b where both cost nothing, as in a residual block: the output of BatchNorm, and that of a ReLU which
    is kept anyway. Neither may be such a sum's, so that making one never makes a chain of others."""
    node: Any = x.grad_fn
    if node.name() != "AddBackward0" or node._saved_alpha != 1:
        return None
    here, handles, written = StorageWeakRef(x.untyped_storage()).cdata, [], 0
    for operand, number in node.next_functions:
        mark = None if operand is None else operand.metadata.get(stash._MARK)
        entry: _Output | None = None if mark is None else mark()
        if entry is None or entry.cell is None or entry.chained or entry.number != number or entry.stream != stash._stream(x):
            return None
        in_place = entry.storage.cdata == here
        layout = entry.cell.layout
        if entry.counter._version != entry.version + in_place or not _alike(layout, x):
            return None
        written += in_place
        handles.append(_Again(entry.cell, layout.size, layout.stride, 0))
    if not written and x._version:  # changed since
        return None
    return _Again(_Cell(torch.add, tuple(handles), {}, _Layout.of(x), door._recent), x.size(), x.stride(), 0)


def _alike(layout: _Layout, x: Tensor) -> bool:
    return (layout.size, layout.dtype, layout.device) == (x.size(), x.dtype, x.device)


def _is_in_place(source: _Kept | _Again, key: int) -> bool:
    """Whether the source is no recipe but what ReLU has written to."""
    return isinstance(source, _Kept) and stash._storage_key(source.alias) == key


def squared(x: Tensor, kept: Counter[str] | None = None) -> Tensor:
    """relu(x)². Kept is relu(x), as `rectified` says; the square is made again from it. Stock keeps both."""
    r = rectified(torch.relu, x, kept)
    y = torch.square(r)
    stash.remember(y, torch.square, r)
    return y


class _Rectified(_Output):
    """The registry's entry for the output of a ReLU. `own` is what ReLU itself keeps, None if it needs no gradient."""

    recipe = False
    __slots__ = ("door", "kept", "mask", "own")

    def __init__(self, door: Stash, y: Tensor, own: _Kept | None, kept: Counter[str]) -> None:
        super().__init__(y, _Layout.of(y), None)
        self.door, self.kept = door, kept
        self.own: weakref.ref[_Kept] | None = None
        self.mask: weakref.ref[_Kept] | None = None
        if own is not None:
            (mask,) = self._pack(y, ops.signs_encode(_flat(y, y.numel(), self.offset)))
            own.give_way(self._signs(mask))
            self.own, self.mask = weakref.ref(own), weakref.ref(mask)
            kept[MASK] += 1

    def handle(self, t: Tensor) -> _Kept | _Again | None:
        if t._version != self.version or not self.unchanged() or stash._stream(t) != self.stream:
            return None
        if not stash._is_view(t, self.layout, int(t.storage_offset() - self.offset)):
            return None
        if self.cell is None and not self._encode(t):
            return self._leave(t)
        return super().handle(t)

    def _encode(self, t: Tensor) -> bool:
        """Whether bitmap + non-zeros are smaller than y; then they are what is kept."""
        own, mask = _alive(self.own), _alive(self.mask)
        if isinstance(t, FakeTensor) or (t.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False  # how many there are is not known
        packed = ops.nonzero_encode(_flat(t, self.layout.size.numel(), self.offset))
        if sum(part.nbytes for part in packed) >= self.layout.size.numel() * t.element_size():
            return False
        parts = self._pack(t, *packed)
        constants = {"size": self.layout.size, "stride": self.layout.stride}
        self.cell = _Cell(_nonzero_again, parts, constants, self.layout, self.door._recent)
        if own is not None and mask is not None:
            plain = torch.equal(mask.open(), packed[0])  # else there is a -0 in y, which is kept and stops the gradient
            own.give_way(self._signs(parts[0]) if plain else _Again(self.cell, self.layout.size, self.layout.stride, 0))
        self._count(NONZEROS)
        return True

    def _leave(self, t: Tensor) -> _Kept:
        """Keeps y as it is, for both."""
        whole = t.detach().as_strided(self.layout.size, self.layout.stride, self.offset)
        hold = self.door._hold(t, t.untyped_storage()._cdata)
        kept = self.door._keep(whole, hold, "device")
        own = _alive(self.own)
        if own is not None:
            own.give_way(kept)
        self._count(OUTPUT)
        return self.door._keep(t, hold, "shared")

    def _count(self, way: str) -> None:
        if self.own is not None:
            self.kept[MASK] -= 1
        self.kept[way] += 1

    def _pack(self, y: Tensor, *packed: Tensor) -> tuple[_Kept, ...]:
        """Handles of what is kept instead of y; the ledger's row lives as long as the first."""
        kept = tuple(_Kept(part, _About(stash.current_role(), self.door._model)) for part in packed)
        if stash._thread.recorder is not None:
            stash._thread.recorder.note(y, kept[0], "device", None, packed)
        return kept

    def _signs(self, bits: _Kept) -> _Again:
        """Handle on a tensor that is 1 where y is not (y <= 0), else 0."""
        size, stride, dtype, _ = self.layout
        cell = _Cell(_signs_again, (bits,), {"size": size, "stride": stride, "dtype": dtype}, self.layout, self.door._recent)
        return _Again(cell, size, stride, 0)


def _has_kernels(y: Tensor) -> bool:
    return y.is_cpu or (y.is_cuda and not _core.cuda_problem(y.device.index))


def _alive(ref: weakref.ref[_Kept] | None) -> _Kept | None:
    return None if ref is None else ref()


def _rows(n: int) -> list[int]:
    """n elements as rows of whole words, so that their bits follow each other without a gap; as one row if that cannot be."""
    words = n // 32
    per_row = next((k for k in range(ROW, 7, -1) if words % k == 0), 0) if n % 32 == 0 else 0
    return [words // per_row, 32 * per_row] if per_row else [1, n]


def _flat(t: Tensor, n: int, offset: Any) -> Tensor:
    """The n elements that lie `offset` elements into the storage of `t`, as they follow each other there, in rows."""
    rows, cols = _rows(n)
    return t.detach().as_strided((rows, cols), (cols, 1), offset)


def _signs_again(packed: Tensor, size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return ops.signs_decode(packed, _rows(size.numel()), dtype).as_strided(size, stride)


def _nonzero_again(
    bitmap: Tensor, offsets: Tensor, values: Tensor, size: torch.Size, stride: tuple[int, ...]
) -> Tensor:  # fmt: skip
    return ops.nonzero_decode(bitmap, offsets, values, _rows(size.numel())).as_strided(size, stride)
