"""ReLU under the stash: in which form its output is kept depends on who else saves it. Gradients are bit for bit PyTorch's.

The backward of PyTorch's ReLU needs one thing of the output y: not (y <= 0). So, in this order:

1. where x costs nothing (a recipe recomputes it, it is held anyway, or it is a sum of two such), y is recomputed as relu(x):
   0 bits;
2. else ReLU itself keeps one bit per element, and as long as no other op saves y (a frozen layer, pooling, a sum follow) that
   is all;
3. when another op saves y (a layer that is trained), y is kept for both as bitmap + non-zeros where that is smaller:
   1 + density bits(dtype) bits, lossless, -0 and NaN are non-zeros;
4. or else y is held by reference, and ReLU reads it there, as in stock.

Nothing is predicted: y passes the door when ReLU saves it and again when a second op does. When a second op saves y, the mask
stored for ReLU is replaced. PyTorch's own op runs forward and backward; only the saved result that it is handed differs, in
ways that its backward cannot tell.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from unswag import _core
from unswag.torch import ops
from unswag.torch.stash.door import Stash, remember
from unswag.torch.stash.handles import ByReference, Handle, Recipe, Recomputed
from unswag.torch.stash.layout import Layout, storage_key, stream_of
from unswag.torch.stash.outputs import RememberedOutput, output_of
from unswag.torch.stash.thread import collecting_references, current_role, state

MASK, NONZEROS, OUTPUT, RECIPE = "mask", "bitmap + non-zeros", "output", "recipe"  # what a ReLU's output was kept as
NODE = "ReluBackward0"
ROW = 128  # words of 32 elements, at most, to which one offset of the non-zeros belongs: 8 bytes in 512 bytes of bits


def rectified(relu: Callable[[Tensor], Tensor], x: Tensor, kept: Counter[str] | None = None) -> Tensor:
    """relu(x), where `relu` is PyTorch's, in place or not, under any name; `kept` counts the forms of the output, by the names
    MASK, NONZEROS, OUTPUT and RECIPE.

    If `relu` turns out to do something else, its result is returned and its saved tensors are kept as the stash keeps any.
    Without a stash in use this is a plain call.
    """
    stash = None if torch.compiler.is_compiling() or not torch.is_grad_enabled() else Stash.current()
    if stash is None or stash.passive:
        return relu(x)
    kept = Counter() if kept is None else kept
    edge = (x.grad_fn, x.output_nr)
    source, chained = None, False
    if x.grad_fn is not None:
        source = stash.free(x)
        if source is None:
            source, chained = _sum(stash, x), True
    with collecting_references() as references:
        y = relu(x)
    node, key = y.grad_fn, storage_key(y)
    if key is None or y.dtype not in ops.DTYPES or not Layout.of(y).is_dense() or not _has_kernels(y):
        return y
    own = references[0] if len(references) == 1 and storage_key(references[0].alias) == key else None
    if y.requires_grad and (own is None or node is None or node.name() != NODE):
        return y
    if source is None or node is None or own is None or node.next_functions != (edge,) or _is_in_place(source, key):
        entry: RememberedOutput = _RectifiedOutput(stash, y, own, kept)
    else:
        recipe = Recipe(torch.relu, (source,), {}, Layout.of(y), stash.results)
        entry = RememberedOutput(y, Layout.of(y), recipe, chained)
        own.replace_with(Recomputed(recipe, y.size(), y.stride(), 0))
        kept[RECIPE] += 1
    stash.add_output(key, entry, node)
    return y


def _sum(stash: Stash, x: Tensor) -> Recomputed | None:
    """A handle for x = a + b where both cost nothing, as in a residual block: the output of BatchNorm, and that of a ReLU which
    is kept anyway. Neither may be such a sum's, so that recomputing one never recomputes a chain of others."""
    node: Any = x.grad_fn
    if node.name() != "AddBackward0" or node._saved_alpha != 1:
        return None
    here, handles, written = x.untyped_storage()._cdata, [], 0
    for operand, number in node.next_functions:
        entry = None if operand is None else output_of(operand)
        if entry is None or entry.recipe is None or entry.chained or entry.number != number or entry.stream != stream_of(x):
            return None
        in_place = entry.storage.cdata == here
        layout = entry.recipe.layout
        if entry.counter._version != entry.version + in_place or not _alike(layout, x):
            return None
        written += in_place
        handles.append(Recomputed(entry.recipe, layout.size, layout.stride, 0))
    if not written and x._version:  # changed since
        return None
    return Recomputed(Recipe(torch.add, tuple(handles), {}, Layout.of(x), stash.results), x.size(), x.stride(), 0)


def _alike(layout: Layout, x: Tensor) -> bool:
    return (layout.size, layout.dtype, layout.device) == (x.size(), x.dtype, x.device)


def _is_in_place(source: Handle, key: int) -> bool:
    """Whether the source is no recipe but the tensor that ReLU has written to."""
    return isinstance(source, ByReference) and storage_key(source.alias) == key


def squared(x: Tensor, kept: Counter[str] | None = None) -> Tensor:
    """relu(x)². Kept is relu(x), as `rectified` says; the square is recomputed from it. Stock keeps both."""
    r = rectified(torch.relu, x, kept)
    y = torch.square(r)
    remember(y, torch.square, r)
    return y


class _RectifiedOutput(RememberedOutput):
    """The registry's entry for the output of a ReLU. `own` is the handle of ReLU itself, None if it needs no gradient."""

    recomputable = False
    __slots__ = ("kept", "mask", "own", "stash")

    def __init__(self, stash: Stash, y: Tensor, own: ByReference | None, kept: Counter[str]) -> None:
        super().__init__(y, Layout.of(y), None)
        self.stash, self.kept = stash, kept
        self.own: weakref.ref[ByReference] | None = None
        self.mask: weakref.ref[ByReference] | None = None
        if own is not None:
            (mask,) = self._packed(y, ops.signs_encode(_flat(y, y.numel(), self.offset)))
            own.replace_with(self._signs(mask))
            self.own, self.mask = weakref.ref(own), weakref.ref(mask)
            kept[MASK] += 1

    def handle(self, t: Tensor) -> Handle | None:
        if t._version != self.version or not self.unchanged() or stream_of(t) != self.stream:
            return None
        if not self.layout.contains(t, int(t.storage_offset() - self.offset)):
            return None
        if self.recipe is None and not self._encode(t):
            return self._hold(t)
        return super().handle(t)

    def _encode(self, t: Tensor) -> bool:
        """Whether bitmap + non-zeros are smaller than y; then they are what is kept."""
        own, mask = _alive(self.own), _alive(self.mask)
        if isinstance(t, FakeTensor) or (t.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False  # how many there are is not known
        packed = ops.nonzero_encode(_flat(t, self.layout.size.numel(), self.offset))
        if sum(part.nbytes for part in packed) >= self.layout.size.numel() * t.element_size():
            return False
        parts = self._packed(t, *packed)
        constants = {"size": self.layout.size, "stride": self.layout.stride}
        self.recipe = Recipe(_decode_nonzeros, parts, constants, self.layout, self.stash.results)
        if own is not None and mask is not None:
            plain = torch.equal(mask.open(), packed[0])  # else there is a -0 in y, which is kept and stops the gradient
            if plain:
                own.replace_with(self._signs(parts[0]))
            else:
                own.replace_with(Recomputed(self.recipe, self.layout.size, self.layout.stride, 0))
        self._count(NONZEROS)
        return True

    def _hold(self, t: Tensor) -> ByReference:
        """Holds y by reference, for both."""
        whole = t.detach().as_strided(self.layout.size, self.layout.stride, self.offset)
        lease = self.stash.lease(t)
        reference = self.stash.by_reference(whole, lease, "device")
        own = _alive(self.own)
        if own is not None:
            own.replace_with(reference)
        self._count(OUTPUT)
        return self.stash.by_reference(t, lease, "shared")

    def _count(self, form: str) -> None:
        if self.own is not None:
            self.kept[MASK] -= 1
        self.kept[form] += 1

    def _packed(self, y: Tensor, *parts: Tensor) -> tuple[ByReference, ...]:
        """Handles of what is kept in place of y; the ledger's row lives as long as the first."""
        handles = self.stash.packed(parts, current_role())
        if state.recorder is not None:
            state.recorder.note(y, handles[0], "device", None, parts)
        return handles

    def _signs(self, bits: ByReference) -> Recomputed:
        """Handle on a tensor that is 1 where y is not (y <= 0), else 0."""
        size, stride, dtype, _ = self.layout
        constants = {"size": size, "stride": stride, "dtype": dtype}
        return Recomputed(Recipe(_decode_signs, (bits,), constants, self.layout, self.stash.results), size, stride, 0)


def _has_kernels(y: Tensor) -> bool:
    return y.is_cpu or (y.is_cuda and not _core.cuda_problem(y.device.index))


def _alive(ref: weakref.ref[ByReference] | None) -> ByReference | None:
    return None if ref is None else ref()


def rows(n: int) -> list[int]:
    """[rows, columns] in which n elements are packed: rows of whole words, so that their bits follow each other without a gap;
    one row if that cannot be."""
    words = n // 32
    per_row = next((k for k in range(ROW, 7, -1) if words % k == 0), 0) if n % 32 == 0 else 0
    return [words // per_row, 32 * per_row] if per_row else [1, n]


def _flat(t: Tensor, n: int, offset: Any) -> Tensor:
    """The n elements that lie `offset` elements into the storage of `t`, in the order of memory, as `rows`."""
    height, width = rows(n)
    return t.detach().as_strided((height, width), (width, 1), offset)


def _decode_signs(packed: Tensor, size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return ops.signs_decode(packed, rows(size.numel()), dtype).as_strided(size, stride)


def _decode_nonzeros(
    bitmap: Tensor, offsets: Tensor, values: Tensor, size: torch.Size, stride: tuple[int, ...]
) -> Tensor:  # fmt: skip
    return ops.nonzero_decode(bitmap, offsets, values, rows(size.numel())).as_strided(size, stride)
