"""bf16 matrix products at fp32 speed on CPUs without bf16 instructions. For benchmarks only; says so in every result.

PyTorch's bf16 products on such a CPU run at 1 to 15 GFLOP/s against 100 in fp32, so that a step of SmolLM2 takes minutes and
says nothing about anything but that loop. `enable()` replaces, for bf16 tensors on the CPU, mm, addmm, bmm, baddbmm and the
backward of flash attention (causal or full, without mask) by the same in bench/bf16.cpp: operands widened to fp32 as they are
packed, fp32 sums, one rounding at the end, which is what bf16 hardware does. The stock model and ours run on the same
replacement. Its scratch memory (`scratch_bytes()`) is kept from call to call and is the same on every side. It does nothing
where the CPU multiplies bf16 itself.

    python -m bench.bf16_matmul        checks values, shapes and strides, and prints seconds with and without
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import time
import warnings

import torch

from bench.native import compiled

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
        "bf16 products and attention backward: summed in fp32 and rounded once, on every side alike (bench/bf16.cpp), because "
        "this CPU has no bf16 instructions"
    )


def scratch_bytes() -> int:
    """Bytes that the replacement holds: 2.6 MiB a thread, more where attention is long."""
    return _native().bf16_scratch_bytes() if _library is not None else 0


def enable(force: bool = False) -> str:
    """Install the replacement if this CPU needs it (once per process); returns `describe()`."""
    global _library
    if _library is None and (force or not native()):
        _native()
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


@functools.cache
def _native() -> ctypes.CDLL:
    """bench/bf16.cpp; its OpenMP threads are torch's, whose library is loaded already under the same name."""
    library = compiled("bf16.cpp", "-fopenmp", "-march=native")
    integer, number, address = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    library.bf16_product.argtypes = [integer] * 3 + [address] * 5 + [number, number, ctypes.c_int]
    library.bf16_product.restype = None
    library.bf16_attention_backward.argtypes = [integer] * 4 + [address] * 3 + [number, ctypes.c_int, ctypes.c_int]
    library.bf16_attention_backward.restype = None
    library.bf16_scratch_bytes.restype = integer
    return library


def _for_bf16(function, original):
    def call(keys, *args, **kwargs):
        if args[0].dtype == torch.bfloat16 and kwargs.get("out", args[0]).dtype == torch.bfloat16:
            return function(*args, **kwargs)
        return original.call_boxed(keys, *args, **kwargs)

    return call


def _product(a, b, out, *, bias=None, beta=1.0, alpha=1.0):
    """out (m, n) = beta * bias + alpha * a (m, k) @ b (k, n), any strides; `bias` may be `out`."""
    bias = None if beta == 0 else bias  # torch: a NaN in it does not count then
    strides = [*a.stride(), *b.stride(), *out.stride(), *(bias.stride() if bias is not None else (0, 0))]
    _native().bf16_product(
        *out.shape, a.shape[1], a.data_ptr(), b.data_ptr(), out.data_ptr(), bias.data_ptr() if bias is not None else None,
        (ctypes.c_int64 * 8)(*strides), alpha, beta, torch.get_num_threads(),
    )  # fmt: skip
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
    """Gradients with the strides of the stock kernel's: of (batch, tokens, heads, width), transposed."""
    if attn_mask is not None or dropout_p or q.shape[3] % 16:
        raise NotImplementedError("bench.bf16_matmul: attention with a mask, dropout or a head width that is no multiple of 16")
    grads = [torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2) for t in (q, k, v)]
    shared = q.shape[1] // k.shape[1]  # query heads to one head of k and v
    width = q.shape[3]
    tensors = [q, k, v, y, dy, *grads]
    strides = [s for t in tensors for s in (t.stride(2), t.stride(3), t.stride(1))] + [lse.stride(2), lse.stride(1)]
    strides = (ctypes.c_int64 * len(strides))(*strides)
    for row in range(q.shape[0]):
        for head in range(k.shape[1]):
            of = [t[row, head * (shared if t.shape[1] == q.shape[1] else 1)].data_ptr() for t in tensors]
            _native().bf16_attention_backward(
                q.shape[2], k.shape[2], width, shared, (ctypes.c_void_p * 8)(*of), lse[row, head * shared].data_ptr(), strides,
                width**-0.5 if scale is None else scale, is_causal, torch.get_num_threads(),
            )  # fmt: skip
    return tuple(grads)


def cases() -> dict[str, tuple]:
    """name: (call, the same call in fp32 of the same numbers)."""
    torch.manual_seed(0)
    rows, inner, cols = 1000, 1500, 570  # no multiples of anything
    a, b = torch.randn(rows, inner).bfloat16(), torch.randn(cols, inner).bfloat16().t()
    bias = torch.randn(cols).bfloat16()
    batches = a.view(8, 125, inner), b.expand(8, -1, -1), bias.view(1, 1, -1)

    def product(function, *operands, **options):
        return lambda: (function(*operands, **options),), lambda: (function(*(x.float() for x in operands), **options),)

    def attention(kv_heads: int, causal: bool):
        q, k, v, dy = (torch.randn(2, 500, n, 64).bfloat16().transpose(1, 2) for n in (9, kv_heads, kv_heads, 9))
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        inputs = dy, q, k, v, y
        return lambda: backward(*inputs, lse, 0.0, causal), lambda: backward(*(x.float() for x in inputs), lse, 0.0, causal)

    return {
        "mm": product(torch.mm, a, b),
        "mm, weight gradient": product(torch.mm, a.t(), a),
        "mm, every other row and column": product(torch.mm, a[::2, ::2], b[::2, ::2]),
        "mm, rank 16": product(torch.mm, a, b[:, :16]),
        "mm, nothing to sum": product(torch.mm, a[:, :0], b[:0]),
        "addmm": product(torch.addmm, bias, a, b),
        "bmm": product(torch.bmm, *batches[:2]),
        "baddbmm": product(torch.baddbmm, batches[2], *batches[:2], beta=0.5, alpha=2.0),
        "attention backward": attention(9, True),
        "attention backward, shared k and v": attention(3, True),
        "attention backward, not causal": attention(9, False),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

    def timed(call):
        call()
        start = time.perf_counter()
        result = call()
        return result, time.perf_counter() - start

    before = {name: timed(call) for name, (call, _) in cases().items()}
    print(enable(force=True))
    for name, (call, exact) in cases().items():
        (stock, stock_s), (ours, ours_s) = before[name], timed(call)
        far = 0.0
        for s, o, e in zip(stock, ours, exact(), strict=True):
            assert (s.shape, s.stride(), s.dtype) == (o.shape, o.stride(), o.dtype), (name, s.stride(), o.stride())
            far = max(far, ((o.float() - e.bfloat16().float()).norm() / e.norm().clamp_min(1e-30)).item())
        assert far < 1e-3, (name, far)  # a rounding is 2^-9; few fall to the other side
        print(f"{name:36s} {stock_s * 1e3:8.1f} ms -> {ours_s * 1e3:7.1f} ms   from fp32, rounded once: {far:.1e}")


if __name__ == "__main__":
    main()
