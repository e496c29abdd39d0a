"""bf16 matrix products at fp32 speed on CPUs without bf16 instructions. For benchmarks only; says so in every result.

PyTorch's bf16 products on such a CPU run at 1 to 15 GFLOP/s against 100 in fp32, so that a step of SmolLM2 takes minutes and
says nothing about anything but that loop. `enable()` replaces, for bf16 inputs on the CPU, mm, addmm, bmm, baddbmm (and the
backward of flash attention) by the same product computed in fp32, tile by tile, and rounded once: what bf16 hardware does. The
stock model and ours run on the same replacement. Tiles bound the extra memory at `TEMPORARY_BYTES` (attention: three heads at
a time), on either side. It does nothing where the CPU multiplies bf16 itself.

    python -m bench.bf16_matmul        checks values, shapes, strides and extra memory, and prints the speed with and without
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch

TILE = 512  # rows and columns of a tile of the result
DEPTH = 1024  # of the inner dimension taken at once
TEMPORARY_BYTES = 4 * (2 * TILE * DEPTH + TILE * TILE)  # two operands and the sum, in fp32: 5 MiB
HEADS = 3  # attention heads done at once in the backward

_library: torch.library.Library | None = None


def native() -> bool:
    """Does this CPU multiply bf16 itself?"""
    with open("/proc/cpuinfo") as f:
        flags = next((line.split() for line in f if line.startswith("flags")), [])
    return "avx512_bf16" in flags or "amx_bf16" in flags


def describe() -> str:
    """One sentence for the results."""
    if _library is None:
        return "bf16 products: PyTorch's own"
    return (
        f"bf16 products and attention backward: computed in fp32 tiles (at most {TEMPORARY_BYTES / 2**20:.0f} MiB) and rounded "
        "once, on every side alike (bench/bf16_matmul.py), because this CPU has no bf16 instructions"
    )


def enable(force: bool = False) -> str:
    """Install the replacement if this CPU needs it (once per process); returns `describe()`."""
    global _library
    if _library is None and (force or not native()):
        _library = torch.library.Library("aten", "IMPL")
        for name, function in {
            "mm": _mm, "mm.out": _mm_out, "addmm": _addmm, "addmm.out": _addmm_out, "addmm_": _addmm_,
            "bmm": _bmm, "bmm.out": _bmm_out, "baddbmm": _baddbmm, "baddbmm.out": _baddbmm_out, "baddbmm_": _baddbmm_,
            "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
        }.items():  # fmt: skip
            original = torch.library.get_kernel(f"aten::{name}", "CPU")
            with warnings.catch_warnings():  # torch warns that a kernel is overridden: it is
                warnings.simplefilter("ignore")
                _library.impl(name, _for_bf16(function, original), "CPU", with_keyset=True, allow_override=True)
    return describe()


def _for_bf16(function, original):
    def call(keys, *args, **kwargs):
        if args[0].dtype == torch.bfloat16 and kwargs.get("out", args[0]).dtype == torch.bfloat16:
            return function(*args, **kwargs)
        return original.call_boxed(keys, *args, **kwargs)

    return call


def _tiles(size: int, step: int):
    return (slice(i, min(i + step, size)) for i in range(0, size, step))


def _product(a, b, out, *, bias=None, beta=1.0, alpha=1.0):
    """out (m, n) = beta * bias + alpha * a (m, k) @ b (k, n); every tile summed in fp32 and rounded once."""
    for rows in _tiles(a.shape[0], TILE):
        for cols in _tiles(b.shape[1], TILE):
            total = None
            for inner in _tiles(a.shape[1], DEPTH):
                left, right = a[rows, inner].float(), b[inner, cols].float()
                total = torch.mm(left, right) if total is None else total.addmm_(left, right)
            if total is None:
                total = torch.zeros(out[rows, cols].shape)
            if alpha != 1.0:
                total.mul_(alpha)
            if bias is not None and beta != 0.0:
                total.add_(bias[rows, cols], alpha=beta)
            out[rows, cols] = total
    return out


def _mm(a, b):
    return _product(a, b, a.new_empty(a.shape[0], b.shape[1]))


def _mm_out(a, b, *, out):
    return _product(a, b, out.resize_(a.shape[0], b.shape[1]))


def _addmm(bias, a, b, *, beta=1, alpha=1):
    out = a.new_empty(a.shape[0], b.shape[1])
    return _product(a, b, out, bias=bias.expand(out.shape), beta=beta, alpha=alpha)


def _addmm_out(bias, a, b, *, beta=1, alpha=1, out):
    return _product(a, b, out, bias=bias.expand(out.shape), beta=beta, alpha=alpha)


def _addmm_(bias, a, b, *, beta=1, alpha=1):
    return _product(a, b, bias, bias=bias, beta=beta, alpha=alpha)


def _bmm(a, b):
    return _bmm_out(a, b, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))


def _bmm_out(a, b, *, out):
    for i in range(a.shape[0]):
        _product(a[i], b[i], out[i])
    return out


def _baddbmm(bias, a, b, *, beta=1, alpha=1):
    return _baddbmm_out(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))


def _baddbmm_out(bias, a, b, *, beta=1, alpha=1, out):
    for i, one in enumerate(bias.expand(out.shape)):
        _product(a[i], b[i], out[i], bias=one, beta=beta, alpha=alpha)
    return out


def _baddbmm_(bias, a, b, *, beta=1, alpha=1):
    return _baddbmm_out(bias, a, b, beta=beta, alpha=alpha, out=bias)


def _attention_backward(dy, q, k, v, y, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    """The fp32 kernel on the same numbers, `HEADS` heads at a time; gradients have the strides of the stock kernel's."""
    stock = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = [torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2) for t in (q, k, v)]
    shared = q.shape[1] // k.shape[1]  # query heads to one head of k and v
    for row in (slice(i, i + 1) for i in range(q.shape[0])):
        for few in _tiles(k.shape[1], max(1, HEADS // shared)):
            heads = slice(few.start * shared, few.stop * shared)
            mask = attn_mask
            if mask is not None:
                mask = mask.expand(q.shape[0], q.shape[1], *mask.shape[2:])[row, heads]
                mask = mask.float() if mask.is_floating_point() else mask
            part = [t[row, few if t is k or t is v else heads].float() for t in (dy, q, k, v, y)]
            done = stock(*part, lse[row, heads], dropout_p, is_causal, attn_mask=mask, scale=scale)
            for whole, at, piece in zip(grads, (heads, few, few), done, strict=True):
                whole[row, at] = piece
    return tuple(grads)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    rows, inner, cols = 1024, 1536, 576
    a, b = torch.randn(rows, inner).bfloat16(), torch.randn(cols, inner).bfloat16().t()
    bias = torch.randn(cols).bfloat16()
    a_batch, b_batch, bias_batch = a.view(8, 128, inner), b.expand(8, -1, -1), bias.view(1, 1, -1)

    def attention(kv_heads: int):
        heads = [torch.randn(2, 512, n, 64).bfloat16().transpose(1, 2).requires_grad_() for n in (9, kv_heads, kv_heads)]
        dy = torch.randn(2, 9, 512, 64).bfloat16()

        def call():
            y = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            return torch.autograd.grad(y, heads, dy)

        return call

    calls = {
        "mm": lambda: (a @ b,),
        "mm, weight gradient": lambda: (a.t() @ a,),
        "addmm": lambda: (torch.addmm(bias, a, b),),
        "bmm": lambda: (a_batch @ b_batch,),
        "baddbmm": lambda: (torch.baddbmm(bias_batch, a_batch, b_batch, beta=0.5, alpha=2.0),),
        "attention, both ways": attention(9),
        "attention, shared k and v": attention(3),
    }

    def timed(call):
        call()
        start = time.perf_counter()
        result = call()
        return result, time.perf_counter() - start

    before = {name: timed(call) for name, call in calls.items()}
    print(enable(force=True))
    for name, call in calls.items():
        (stock, stock_s), (ours, ours_s) = before[name], timed(call)
        for s, o in zip(stock, ours, strict=True):
            assert (s.shape, s.stride(), s.dtype) == (o.shape, o.stride(), o.dtype), (name, s.stride(), o.stride())
        far = max(((o - s).float().norm() / s.float().norm()).item() for s, o in zip(stock, ours, strict=True))
        assert far < 8e-3, (name, far)  # 2^-7: one bf16 rounding each
        print(f"{name:32s} {stock_s * 1e3:8.1f} ms -> {ours_s * 1e3:7.1f} ms   difference {far:.1e}")


if __name__ == "__main__":
    main()
