"""Geometry of saved tensors: which storage a tensor lies in, how, and whether it is a view, a cast or a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor


class Layout(NamedTuple):
    """Size, strides (in elements), dtype and device of a tensor, without the tensor."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(t: torch.Tensor) -> Layout:
        return Layout(t.size(), t.stride(), t.dtype, t.device)

    def is_dense(self) -> bool:
        """Whether the elements fill a stretch of the storage without gaps or overlaps, in any order of dimensions."""
        step = 1
        for stride, n in sorted((s, n) for s, n in zip(self.stride, self.size, strict=True) if n != 1):
            if stride != step:
                return self.size.numel() == 0
            step *= n
        return True

    def is_contiguous(self) -> bool:
        step = 1
        for n, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if n != 1 and stride != step:
                return False
            step *= n
        return True

    def contains(self, t: torch.Tensor, offset: int) -> bool:
        """Whether `t`, which starts `offset` elements behind the start of a dense tensor of this layout, lies inside it."""
        if t.dtype != self.dtype or t.is_conj() or t.is_neg():
            return False
        if offset == 0 and t.size() == self.size and t.stride() == self.stride:
            return True
        last = offset + sum((n - 1) * step for n, step in zip(t.size(), t.stride(), strict=True))
        return not t.numel() or (offset >= 0 and last < self.size.numel())


def dense_stride(size: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of that size."""
    strides, step = [], 1
    for n in reversed(size):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


PLAIN = (torch.Tensor, nn.Parameter, FakeTensor)  # types of tensors whose elements are what their memory holds


def is_plain(t: torch.Tensor) -> bool:
    """Whether the elements of `t` are what its memory holds. False for shards, packed weights and other subclasses."""
    return type(t) in PLAIN


def storage_key(t: torch.Tensor) -> int | None:
    """The address of the storage object, by which the registries know it; None for what has no storage of its own (sparse
    tensors, wrapper subclasses). Valid while the storage lives: hold a `StorageWeakRef` beside it."""
    return t.untyped_storage()._cdata if is_plain(t) and t.layout is torch.strided else None


def storages(t: Any) -> list[torch.UntypedStorage]:
    """The storages that hold the data of `t`: one for a plain tensor, those of its parts for a sparse tensor or a wrapper
    subclass (DTensor and its like), none for what is no tensor."""
    if not isinstance(t, torch.Tensor):
        return []
    if hasattr(type(t), "__tensor_flatten__"):
        return [s for name in t.__tensor_flatten__()[0] for s in storages(getattr(t, name))]  # type: ignore[attr-defined]
    if t.layout is torch.sparse_coo:
        return [*storages(t._indices()), *storages(t._values())]
    if t.layout is torch.strided:
        return [t.untyped_storage()]
    return []


def stream_of(t: torch.Tensor) -> torch.cuda.Stream | None:
    """The CUDA stream in which work on `t` is queued now; None on the CPU."""
    return torch.cuda.current_stream(t.device) if t.is_cuda and torch.cuda.is_initialized() else None


def version_counter(t: torch.Tensor) -> torch.Tensor:
    """An empty tensor that shares the version counter of `t` and none of its memory."""
    counter = t.detach()
    counter.data = t.new_empty(0)
    return counter


def is_parameter(t: torch.Tensor) -> bool:
    """Whether `t` is a parameter or a view of one."""
    return isinstance(t, nn.Parameter) or isinstance(t._base, nn.Parameter)


def is_cast_of_parameter(t: torch.Tensor) -> bool:
    """Whether `t` is autocast's copy of a weight, or a view of it: a cast whose source is a leaf that accumulates into a
    parameter."""
    source, _ = cast_from(t if t._base is None else t._base)
    return source is not None and isinstance(getattr(source, "variable", None), nn.Parameter)


# Views that keep the order of the elements; if they keep their number too, they keep all.
_ORDERLY = ("ViewBackward0", "UnsafeViewBackward0", "SliceBackward0", "AliasBackward0")


def cast_from(t: torch.Tensor) -> tuple[Any, int]:
    """(autograd node, number of its output) of the tensor that `t` is a dtype cast of, looking through views of it that keep
    the order of the elements; (None, 0) if `t` is no cast."""
    node: Any = t.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return None, 0
    node, number = node.next_functions[0]
    while node is not None and node.name() in _ORDERLY:
        node, number = node.next_functions[0]
    return node, number


def is_whole_cast(copy: torch.Tensor, layout: Layout) -> bool:
    """Whether `copy`, cast from a tensor of that layout or a view of it, has all of its elements in the same order."""
    return copy.device == layout.device and copy.numel() == layout.size.numel() and (
        (copy.size(), copy.stride()) == (layout.size, layout.stride) or (copy.is_contiguous() and layout.is_contiguous())
    )  # fmt: skip
