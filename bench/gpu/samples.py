"""Arguments for every op of torch.ops.unswag, made on the CPU, and the layouts in which an op may get them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

Layout = Callable[[torch.Tensor], torch.Tensor]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIXTEEN = (torch.bfloat16, torch.float16)
MASKS = {"relu": 0.0, "leaky_relu": 0.01, "relu6": 0.0}  # with their slopes
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu2")
GATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu")
DITHERED = ("silu", "gelu", "gelu_tanh")
BLOCKS = ("int8", "int4", "int2", "e4m3", "e5m2")
OPS = (
    "mask_forward", "mask_backward", "activation_forward", "activation_backward", "gated_forward", "gated_backward",
    "gated_backward_product", "gated_halves_backward", "rms_norm_forward", "rms_norm_apply", "rms_norm_backward",
    "layer_norm_forward", "layer_norm_apply", "layer_norm_backward", "cross_entropy_", "dropout", "code_forward",
    "code_backward", "dither_forward", "dither_backward", "block_encode", "block_decode", "signs_encode",
    "signs_decode", "nonzero_encode", "nonzero_decode",
)  # fmt: skip
CODES = (([0.1], 1), ([-0.5, 0.1, 0.9], 2), ([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0], 3))  # bounds, bits
WRITES = "cross_entropy_"  # over its logits
OTHER_LIBRARY = (
    "activation",
    "gated",
    "cross_entropy",
    "code_forward",
    "dither",
)  # in float64 these take exp, log and erf from the device's library


def registered() -> set[str]:
    """The ops that exist, whether or not they are known here."""
    import unswag.torch  # noqa: F401

    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("unswag::") for name in names if name.startswith("unswag::")}


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(shape, generator=generator, dtype=torch.float32)
    flat = x.view(-1)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 6.0, 1e-40])[: max(0, flat.numel() - 8)]
    flat[: len(special)] = special if dtype is not torch.float64 else special.nan_to_num(0.5, 1e3, -1e3)
    return x.to(dtype)


def plain(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Without infinities, which make a whole row of a norm or a loss NaN."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def columns(x: torch.Tensor) -> torch.Tensor:
    """A slice of wider rows: one row stride."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), 99, dtype=x.dtype, device=x.device)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def odd_offset(x: torch.Tensor) -> torch.Tensor:
    """An address that is no multiple of 16 bytes."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    return flat.copy_(x.flatten()).view(x.shape)


def middle(x: torch.Tensor) -> torch.Tensor:
    """Leading dimensions that do not collapse."""
    wide = torch.zeros(x.shape[0], x.shape[1] + 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    wide[:, 1:] = x
    return wide[:, 1:]


def one_value(x: torch.Tensor) -> torch.Tensor:
    """One value expanded, as the gradient of sum() is."""
    return x.new_full((), 0.75).expand(x.shape)


LAYOUTS: dict[str, Layout] = {"columns": columns, "transposed": transposed, "odd offset": odd_offset, "middle": middle}


def arguments(op: str, dtype: torch.dtype, shape: tuple[int, ...], lay: Layout = as_it_is) -> Iterator[tuple[Any, ...]]:
    """Arguments of an op on the CPU, one tuple for each of its variants; tensors that may be laid out anyhow went through
    `lay`."""
    from unswag.torch import ops

    cols = shape[-1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def x(seed: int = 1) -> torch.Tensor:
        return lay(draw(shape, dtype, seed))

    if op == "mask_forward":
        for act, slope in MASKS.items():
            yield x(), act, slope
    elif op == "mask_backward":
        for act, slope in MASKS.items():
            yield x(2), lay(ops.mask_forward(draw(shape, dtype, 1), act, slope)[1]), act, slope
    elif op == "activation_forward":
        for act in ACTIVATIONS:
            yield x(), act
    elif op == "activation_backward":
        for act in ACTIVATIONS:
            yield x(), x(2), act
    elif op == "gated_forward":
        for act in GATED:
            yield x(), x(2), act
    elif op in ("gated_backward", "gated_backward_product"):
        for act in GATED:
            yield x(), x(2), x(3), act
    elif op.startswith("rms_norm"):
        x_, dy = lay(plain(shape, dtype, 1)), lay(plain(shape, dtype, 2))
        for offset, cast, weight in (
            (0.0, True, plain((cols,), dtype, 3)),
            (1.0, False, plain((cols,), wide, 3)),
            (0.0, True, None),
        ):
            if op == "rms_norm_forward":
                yield x_, weight, 1e-6, offset, cast, None
                continue
            rstd = ops.rms_norm_forward(x_, weight, 1e-6, offset, cast, None)[1]
            if op == "rms_norm_apply":
                yield x_, rstd, weight, offset, cast, None
            else:
                yield x_, rstd, weight, dy, offset, cast, True, weight is not None
    elif op == "cross_entropy_":
        logits = 3 * plain(shape, dtype, 1).reshape(-1, cols)
        rows = len(logits)
        labels = torch.arange(rows) * 7 % max(cols, 1)
        labels[1::5] = -100
        scale, weight = torch.linspace(0.5, 1, rows, dtype=wide), torch.linspace(0.1, 2, cols, dtype=wide)
        for class_weight, row_scale, smoothing, softcap, factor in (
            (None, None, 0.0, 0.0, 1.0), (weight, scale, 0.1, 0.0, 1.0), (None, None, 0.1, 30.0, 0.5)
        ):  # fmt: skip
            yield logits.clone(), labels, class_weight, row_scale, 0.5, -100, smoothing, softcap, factor, True
    elif op == "gated_halves_backward":
        for act in GATED:
            yield torch.cat([draw(shape, dtype, 1), draw(shape, dtype, 2)], -1), x(3), act, act == "gelu"
    elif op.startswith("layer_norm"):
        x_, dy = lay(plain(shape, dtype, 1)), lay(plain(shape, dtype, 2))
        for weight, bias in (
            (plain((cols,), dtype, 3), plain((cols,), dtype, 4)),
            (plain((cols,), wide, 3), None),
            (None, None),
        ):
            if op == "layer_norm_forward":
                yield x_, weight, bias, 1e-5, None
                continue
            _, mean, rstd = ops.layer_norm_forward(x_, weight, bias, 1e-5, None)
            if op == "layer_norm_apply":
                yield x_, mean, rstd, weight, bias, None
            else:
                yield x_, mean, rstd, weight, dy, True, weight is not None, bias is not None
    elif op == "code_forward":
        for book in CODES:
            yield x(), "silu", *book, False, True
    elif op == "code_backward":
        for bounds, bits in CODES:
            packed = ops.code_forward(draw(shape, dtype, 1), "silu", bounds, bits, False, False)[1]
            yield x(2), lay(packed), [k / len(bounds) for k in range(len(bounds) + 1)], bits
    elif op == "dither_forward":
        for act in DITHERED:
            yield lay(plain(shape, dtype, 1)), act, 2, -7, 3, True
    elif op == "dither_backward":
        for act in DITHERED:
            packed = ops.dither_forward(plain(shape, dtype, 1), act, 2, -7, 3, False)[1]
            yield x(2), lay(packed), act, 2, -7, 3
    elif op == "block_encode":
        for codec in BLOCKS:
            yield x(), codec, False, 0, 0
        yield x(), "int4", True, -7, 3
    elif op == "block_decode":
        for codec in BLOCKS:
            yield lay(ops.block_encode(plain(shape, dtype, 1), codec, False, 0, 0)), codec, cols, dtype
    elif op == "signs_encode":
        yield (x(),)
    elif op == "signs_decode":
        yield lay(ops.signs_encode(draw(shape, dtype, 1))), list(shape), dtype
    elif op == "nonzero_encode":
        yield (lay(draw(shape, dtype, 1).relu()),)
    elif op == "nonzero_decode":
        bitmap, offsets, values = ops.nonzero_encode(draw(shape, dtype, 1).relu())
        yield lay(bitmap), offsets, values, list(shape)
    elif op == "dropout":
        yield x(), 0.5, -7, 3
        yield x(), 0.1, 1 << 40, 1 << 33
    else:
        raise ValueError(f"there are no sample arguments for the op {op!r}; add them to bench/gpu/samples.py")


def on(device: str, arguments: tuple[Any, ...], lay: Layout = as_it_is) -> tuple[Any, ...]:
    """Fresh copies of the tensors on `device`, laid out there (a copy to a device keeps no layout)."""

    def moved(x: Any) -> Any:
        return lay(x.to(device, copy=True)) if isinstance(x, torch.Tensor) else x

    return tuple(moved(x) for x in arguments)


def call(op: str, arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """The results; of an op that writes over an argument, that argument too."""
    from unswag.torch import ops

    with torch.no_grad():
        out = getattr(ops, op)(*arguments)
    found = [out] if isinstance(out, torch.Tensor) else list(out)
    return [*found, arguments[0]] if op == WRITES else found


def bits(x: torch.Tensor) -> torch.Tensor:
    """As integers, with one NaN for all."""
    if x.is_floating_point():
        x = torch.where(x.isnan(), torch.full((), torch.nan, dtype=x.dtype, device=x.device), x)
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def mismatches(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """Elements whose bits differ, a NaN being equal to any NaN; all of them if shape or dtype do."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return max(ours.numel(), theirs.numel(), 1)
    return int((bits(ours) != bits(theirs.to(ours.device))).sum())


def far_apart(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """Elements of float64 that the math libraries of two devices do not explain: a few units of rounding of the value and of
    the root mean square."""
    theirs = theirs.to(ours.device)
    finite = theirs.isfinite()
    rms = theirs[finite].pow(2).mean().sqrt() if finite.any() else 0.0
    close = (ours - theirs).abs() <= 1e-14 * (theirs.abs() + rms)
    return int((~close & (bits(ours) != bits(theirs))).sum())


def ulps(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """The most values of the format that lie between two tensors of finite numbers."""
    size = ours.element_size()
    sign = torch.iinfo({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).min

    def order(x: torch.Tensor) -> torch.Tensor:
        i = bits(x).long()
        return torch.where(i < 0, sign - i, i)

    return int((order(ours) - order(theirs.to(ours.device))).abs().max()) if ours.numel() else 0
