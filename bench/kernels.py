"""Elementwise kernels against a non-temporal copy measured beside them, and against PyTorch's best spelling of the same thing.

    python bench/kernels.py [--threads 1 2] [--mib 96] [--backend avx2] [--repeat 15] [--no-compile]

One process; every buffer is allocated and touched before the clock starts, page faults during a call are counted (any row with
some is marked); best of many; each output is read once at the end, so that nothing can be dropped. PyTorch is called with out=
where it has one, and through torch.compile. A row's `of_copy` is the time that the copy takes for the same bytes, divided by
the kernel's. Writes bench/results/kernels-<row>.json.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import torch  # noqa: E402
import torch._functorch.config  # noqa: E402
import torch._inductor.config  # noqa: E402

from bench import smollm2  # noqa: E402
from bench.native_copy import Copy  # noqa: E402
from unswag import _core  # noqa: E402
from unswag.torch.ops import ACTIVATIONS, BLOCKS, DTYPES, MASKS  # noqa: E402

F = torch.nn.functional
aten = torch.ops.aten

WHOLE = ("int8", "int4", "int2")  # block codecs of whole numbers

# Bytes that must move, our call, PyTorch's calls.
Row = tuple[float, Callable[[], object], dict[str, Callable[[], object]]]


def best(call: Callable[[], object], repeat: int) -> tuple[float, int]:
    """Seconds of the best call, and its page faults."""
    call()
    results = []
    for _ in range(repeat):
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        call()
        results.append((time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))
    return min(results)


class Case:
    """Buffers of one dtype, and per row: bytes that must move, our call, PyTorch's (all into the same buffers)."""

    def __init__(self, dtype: torch.dtype, size: int, threads: int) -> None:
        n = size // dtype.itemsize
        self.n, self.threads, self.code = n, threads, DTYPES[dtype]
        self.a, self.b, self.c = (torch.randn(n).to(dtype) for _ in range(3))
        self.x, self.y, self.z = (torch.zeros(n, dtype=dtype) for _ in range(3))
        self.packed = torch.zeros(n // 8, dtype=torch.uint8)

    def rows(self) -> dict[str, Row]:
        n, code, here, item = self.n, self.code, (-1, 0, self.threads), self.a.element_size()
        a, b, c, x, y, z, packed = self.a, self.b, self.c, self.x, self.y, self.z, self.packed
        pa, pb, pc, px, py, pp = (v.data_ptr() for v in (a, b, c, x, y, packed))
        relu, silu, gelu = MASKS["relu"], ACTIVATIONS["silu"], ACTIVATIONS["gelu"]

        def gated_forward(act: int) -> Callable[[], object]:
            return lambda: _core.gated_forward(act, code, 1, n, pa, n, pb, n, px, n, *here)

        def gated_backward(act: int) -> Callable[[], object]:
            return lambda: _core.gated_backward(act, code, 1, n, pa, n, pb, n, pc, n, px, n, py, n, 0, 0, *here)

        def torch_gated_backward(forward: Callable, backward: Callable) -> Callable[[], object]:
            def call() -> None:  # dup = dh act(gate), dgate = (dh up) act'(gate)
                forward(a, z)
                torch.mul(c, z, out=y)
                torch.mul(c, b, out=z)
                backward(z, a, x)

            return call

        def silu_out(v: torch.Tensor, out: torch.Tensor) -> None:
            aten.silu.out(v, out=out)

        def gelu_out(v: torch.Tensor, out: torch.Tensor) -> None:
            aten.gelu.out(v, out=out)

        def silu_back(dy: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
            aten.silu_backward.grad_input(dy, v, grad_input=out)

        def gelu_back(dy: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
            aten.gelu_backward.grad_input(dy, v, grad_input=out)

        return {
            "relu forward": (
                n * (2 * item + 1 / 8),
                lambda: _core.mask_forward(relu, 0.0, code, 1, n, pa, n, px, n, pp, n // 8, *here),
                {"clamp_min.out": lambda: torch.clamp_min(a, 0, out=x)},
            ),
            "relu backward": (
                n * (2 * item + 1 / 8),
                lambda: _core.mask_backward(relu, 0.0, code, 1, n, pa, n, pp, n // 8, px, n, *here),
                {"threshold_backward.out": lambda: aten.threshold_backward.grad_input(a, b, 0, grad_input=x)},
            ),
            "silu forward": (
                n * 2 * item,
                lambda: _core.activation_forward(silu, code, 1, n, pa, n, px, n, *here),
                {"silu.out": lambda: silu_out(a, x)},
            ),
            "silu backward": (
                n * 3 * item,
                lambda: _core.activation_backward(silu, code, 1, n, pa, n, pb, n, px, n, *here),
                {"silu_backward.out": lambda: silu_back(b, a, x)},
            ),
            "gelu forward": (
                n * 2 * item,
                lambda: _core.activation_forward(gelu, code, 1, n, pa, n, px, n, *here),
                {"gelu.out": lambda: gelu_out(a, x)},
            ),
            "gelu backward": (
                n * 3 * item,
                lambda: _core.activation_backward(gelu, code, 1, n, pa, n, pb, n, px, n, *here),
                {"gelu_backward.out": lambda: gelu_back(b, a, x)},
            ),
            "swiglu forward": (
                n * 3 * item,
                gated_forward(silu),
                {"silu.out, mul.out": lambda: (silu_out(a, x), torch.mul(x, b, out=x))},
            ),
            "swiglu backward": (
                n * 5 * item,
                gated_backward(silu),
                {"silu.out, mul.out, silu_backward.out": torch_gated_backward(silu_out, silu_back)},
            ),
            "geglu forward": (
                n * 3 * item,
                gated_forward(gelu),
                {"gelu.out, mul.out": lambda: (gelu_out(a, x), torch.mul(x, b, out=x))},
            ),
            "geglu backward": (
                n * 5 * item,
                gated_backward(gelu),
                {"gelu.out, mul.out, gelu_backward.out": torch_gated_backward(gelu_out, gelu_back)},
            ),
        }

    def codec_rows(self) -> dict[str, Row]:
        """What is kept instead of x: 2-bit codes, by bounds and by dither, and non-zeros of a tensor that is half zeros."""
        n, code, here, item = self.n, self.code, (-1, 0, self.threads), self.a.element_size()
        silu, cols = ACTIVATIONS["silu"], 4096
        rows = n // cols
        a, b, x, y = self.a, self.b, self.x, self.y
        pa, pb, px = (v.data_ptr() for v in (a, b, x))
        self.codes, self.half = torch.zeros(n // 4, dtype=torch.uint8), a.relu()
        self.offsets = torch.zeros(rows + 1, dtype=torch.int64)
        pc, ph, po, pp, pv = (v.data_ptr() for v in (self.codes, self.half, self.offsets, self.packed, y))
        torch.cumsum((self.half.view(rows, cols) != 0).sum(-1), 0, out=self.offsets[1:])
        kept = int(self.offsets[-1])
        counts = torch.zeros(rows, dtype=torch.int64)
        self.counts = counts
        bounds, levels = [-0.9, 0.0, 0.9], [-0.07, 0.32, 0.68, 1.07]
        bits_of_two, bits_of_one = n * (2 * item + 1 / 4), n / 8

        def copy() -> None:
            x.copy_(a)

        plain = {"copy_": copy}
        return {
            "2-bit silu forward": (
                bits_of_two,
                lambda: _core.code_forward(silu, False, 2, bounds, code, 1, n, pa, n, px, n, pc, n // 4, *here),
                {"silu.out": lambda: aten.silu.out(a, out=x)},
            ),
            "2-bit codes alone": (
                n * (item + 1 / 4),
                lambda: _core.code_forward(silu, False, 2, bounds, code, 1, n, pa, n, 0, n, pc, n // 4, *here),
                plain,
            ),
            "4-bit codes alone": (  # of one half
                n / 2 * (item + 1 / 2),
                lambda: _core.code_forward(
                    silu, False, 4, [k / 4 - 2 for k in range(15)], code, 1, n // 2, pa, n, 0, n, pc, n // 4, *here
                ),
                plain,
            ),
            "2-bit backward": (
                bits_of_two,
                lambda: _core.code_backward(2, levels, code, 1, n, pb, n, pc, n // 4, px, n, *here),
                {"silu_backward.out": lambda: aten.silu_backward.grad_input(b, a, grad_input=x)},
            ),
            "2-bit dither silu forward": (
                bits_of_two,
                lambda: _core.dither_forward(silu, 2, 1, 2, code, 1, n, pa, n, px, n, pc, n // 4, *here),
                {"silu.out": lambda: aten.silu.out(a, out=x)},
            ),
            "2-bit dither backward": (
                bits_of_two,
                lambda: _core.dither_backward(silu, 2, 1, 2, code, 1, n, pb, n, pc, n // 4, px, n, *here),
                {"silu_backward.out": lambda: aten.silu_backward.grad_input(b, a, grad_input=x)},
            ),
            "nonzero count": (
                n * item,
                lambda: _core.nonzero_count(code, rows, cols, ph, cols, counts.data_ptr(), *here),
                {"count_nonzero": lambda: torch.count_nonzero(self.half)},
            ),
            "nonzero encode": (
                n * item + kept * item + bits_of_one,
                lambda: _core.nonzero_encode(code, rows, cols, ph, cols, po, pp, cols // 8, pv, kept, *here),
                plain,
            ),
            "nonzero decode": (
                n * item + kept * item + bits_of_one,
                lambda: _core.nonzero_decode(code, rows, cols, pp, cols // 8, po, pv, kept, px, cols, *here),
                plain,
            ),
        }

    def block_rows(self) -> dict[str, Row]:
        """Block codecs of rows of 4096, both ways."""
        n, code, here, cols = self.n, self.code, (-1, 0, self.threads), 4096
        rows, a, x = n // cols, self.a, self.x
        pa, px = a.data_ptr(), x.data_ptr()
        self.blocks = {name: torch.zeros(rows, _core.block_row_bytes(BLOCKS[name], cols), dtype=torch.uint8) for name in WHOLE}

        def encode(name: str, stochastic: bool) -> Row:
            packed = self.blocks[name]
            pp, stride = packed.data_ptr(), packed.shape[1]
            return (
                n * a.element_size() + packed.numel(),
                lambda: _core.block_encode(BLOCKS[name], stochastic, 1, 2, code, rows, cols, pa, cols, pp, stride, *here),
                {"copy_": lambda: x.copy_(a)},
            )

        def decode(name: str) -> Row:
            packed = self.blocks[name]
            pp, stride = packed.data_ptr(), packed.shape[1]
            return (
                n * a.element_size() + packed.numel(),
                lambda: _core.block_decode(BLOCKS[name], code, rows, cols, pp, stride, px, cols, *here),
                {"copy_": lambda: x.copy_(a)},
            )

        all_rows = {}
        for name in WHOLE:
            all_rows[f"{name} block encode"] = encode(name, False)
            all_rows[f"{name} block encode, stochastic"] = encode(name, True)
            all_rows[f"{name} block decode"] = decode(name)
        return all_rows

    def norm_rows(self, compile: bool) -> dict[str, Row]:
        """RMSNorm and LayerNorm of rows of 2048 and cross-entropy over 49,152 classes; PyTorch has no out= for these but
        LayerNorm's forward, its outputs come from memory that the process has touched before."""
        code, here, item = self.code, (-1, 0, self.threads), self.a.element_size()
        cols, classes = 2048, 49152
        rows = self.n // cols
        a, b, x = (v[: rows * cols].view(rows, cols) for v in (self.a, self.b, self.x))
        weight, bias = torch.ones(cols, dtype=a.dtype), torch.zeros(cols, dtype=a.dtype)
        mean, rstd, dw, db = torch.zeros(rows), torch.zeros(rows), torch.zeros(cols), torch.zeros(cols)
        leaf, leaf_weight, leaf_bias = (
            a.detach().requires_grad_(),
            weight.clone().requires_grad_(),
            bias.clone().requires_grad_(),
        )

        def huggingface(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            wide = v.float()
            return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(v.dtype)

        def builtin(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(v, (cols,), w, 1e-6)

        def layer_norm(v: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            return F.layer_norm(v, (cols,), w, c, 1e-6)

        def layer_norm_out() -> None:
            aten.native_layer_norm.out(a, (cols,), weight, bias, 1e-6, out0=x, out1=self.statistics[0], out2=self.statistics[1])

        def backward_of(norm: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> Callable[[], object]:
            y = norm(*leaves)
            return lambda: torch.autograd.grad(y, leaves, b, retain_graph=True)

        def compiled(make: Callable[[], Callable[[], object]]) -> dict[str, Callable[[], object]]:
            return {"torch.compile": make()} if compile else {}

        def into_x(norm: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> Callable[[], object]:
            f = torch.compile(lambda to, *v: to.copy_(norm(*v)))
            return torch.no_grad()(lambda: f(x, *arguments))

        self.statistics = aten.native_layer_norm(a, (cols,), weight, bias, 1e-6)[1:]
        self.kept = (weight, bias, mean, rstd, dw, db)  # the calls below hold addresses only
        pw, pc, pm, pr, pd, pe = (v.data_ptr() for v in self.kept)
        pa, pb, px = (v.data_ptr() for v in (a, b, x))
        many = self.n // classes
        logits, labels = self.y[: many * classes].view(many, classes), torch.arange(many) * 7 % classes
        logits.copy_(self.a[: many * classes].view(many, classes))
        loss, lse = torch.zeros(many), torch.zeros(many)

        def cross_entropy_of_torch(loss_of: Callable[..., torch.Tensor]) -> Callable[[], object]:
            scores = self.a[: many * classes].view(many, classes).detach().requires_grad_()
            return lambda: torch.autograd.grad(loss_of(scores, labels), scores)

        return {
            "rms_norm forward": (
                rows * cols * 2 * item,
                lambda: _core.rms_norm_forward(
                    1e-6, 0.0, True, False, rows, cols, code, pa, cols, code, pw, code, px, cols, pr, *here
                ),
                {
                    "F.rms_norm": torch.no_grad()(lambda: builtin(a, weight)),
                    "Llama's": torch.no_grad()(lambda: huggingface(a, weight)),
                    **compiled(lambda: into_x(huggingface, a, weight)),
                },
            ),
            "rms_norm backward": (
                rows * cols * 3 * item,
                lambda: _core.rms_norm_backward(
                    0.0, True, rows, cols, code, pa, cols, code, pw, pr, code, pb, cols, px, cols, pd, 0, *here
                ),
                {
                    "F.rms_norm": backward_of(builtin, leaf, leaf_weight),
                    "Llama's": backward_of(huggingface, leaf, leaf_weight),
                    **compiled(lambda: backward_of(torch.compile(huggingface), leaf, leaf_weight)),
                },
            ),
            "layer_norm forward": (
                rows * cols * 2 * item,
                lambda: _core.layer_norm_forward(
                    1e-6, False, rows, cols, code, pa, cols, code, pw, code, pc, code, px, cols, pm, pr, *here
                ),
                {"native_layer_norm.out": layer_norm_out, **compiled(lambda: into_x(layer_norm, a, weight, bias))},
            ),
            "layer_norm backward": (
                rows * cols * 3 * item,
                lambda: _core.layer_norm_backward(
                    rows, cols, code, pa, cols, code, pw, pm, pr, code, pb, cols, px, cols, pd, pe, 0, *here
                ),
                {
                    "F.layer_norm": backward_of(layer_norm, leaf, leaf_weight, leaf_bias),
                    **compiled(lambda: backward_of(torch.compile(layer_norm), leaf, leaf_weight, leaf_bias)),
                },
            ),
            "cross_entropy with gradient": (
                many * classes * 3 * item,
                lambda: _core.cross_entropy(
                    code, many, classes, logits.data_ptr(), classes, labels.data_ptr(), 0, 0, 1.0, -100, 0.0, 0.0, 1.0, True,
                    loss.data_ptr(), lse.data_ptr(), *here,
                ),
                {
                    "F.cross_entropy, backward": cross_entropy_of_torch(F.cross_entropy),
                    **compiled(lambda: cross_entropy_of_torch(torch.compile(F.cross_entropy))),
                },
            ),
        }  # fmt: skip

    def compiled(self) -> dict[str, Callable[[], object]]:
        """The same by torch.compile, which fuses; it writes into our buffers too."""
        a, b, c, x, y = self.a, self.b, self.c, self.x, self.y

        def forward(act: Callable) -> Callable[[], object]:
            f = torch.compile(lambda g, u, h: h.copy_(act(g) * u))
            return lambda: f(a, b, x)

        def backward(act: Callable, back: Callable) -> Callable[[], object]:
            f = torch.compile(lambda g, u, d, dg, du: (dg.copy_(back(d * u, g)), du.copy_(d * act(g))))
            return lambda: f(a, b, c, x, y)

        return {
            "swiglu forward": forward(F.silu),
            "swiglu backward": backward(F.silu, aten.silu_backward.default),
            "geglu forward": forward(F.gelu),
            "geglu backward": backward(F.gelu, aten.gelu_backward.default),
        }


def measure(dtype: torch.dtype, threads: int, size: int, repeat: int, compile: bool, only: str) -> list[dict[str, object]]:
    torch.set_num_threads(threads)
    case, copy = Case(dtype, size, threads), Copy(threads)
    rows = []
    compiled = case.compiled() if compile else {}
    for name, (moved, ours, peers) in (case.rows() | case.codec_rows() | case.block_rows() | case.norm_rows(compile)).items():
        if only not in name:
            continue

        # The yardstick is taken beside each kernel, before and after it.
        def yardstick() -> None:
            copy(case.x.data_ptr(), case.a.data_ptr(), case.n * case.a.element_size())

        before = best(yardstick, repeat)[0]
        seconds, faults = best(ours, repeat)
        bandwidth = 2 * size / min(before, best(yardstick, repeat)[0])
        peers = peers | ({"torch.compile": compiled[name]} if name in compiled else {})
        peer = {label: best(call, repeat) for label, call in peers.items()}
        fastest = min(peer, key=lambda label: peer[label][0])
        rows.append(
            {
                "kernel": name,
                "dtype": str(dtype).removeprefix("torch."),
                "threads": threads,
                "ms": round(seconds * 1e3, 3),
                "copy_gb_s": round(bandwidth / 1e9, 2),
                "of_copy": round(moved / bandwidth / seconds, 3),
                "torch_ms": {label: round(value[0] * 1e3, 3) for label, value in peer.items()},
                "torch_best": fastest,
                "times_torch": round(peer[fastest][0] / seconds, 2),
                "page_faults": faults,
                "checksum": float(case.x.float().sum()),
            }
        )
        print(*(f"{key}={value}" for key, value in rows[-1].items() if key not in ("checksum", "torch_ms")), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--mib", type=int, default=96, help="of each tensor; far above the last-level cache")
    parser.add_argument("--backend", default="", help="a row of kernels; default: the fastest that runs here")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--only", default="", help="rows with this in their name")
    args = parser.parse_args()
    libc = ctypes.CDLL(None)  # what is freed stays with the process: no fresh pages for PyTorch's outputs
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    torch.manual_seed(0)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # also where ATEN_CPU_CAPABILITY says so
        torch._inductor.config.cpp.simdlen = 256
    torch._functorch.config.donated_buffer = False  # else a compiled function's backward can be called only once
    _core.use_backend(args.backend)
    rows = []
    for threads in args.threads:
        for dtype in (torch.float32, torch.bfloat16):
            rows += measure(dtype, threads, args.mib << 20, args.repeat, not args.no_compile, args.only)
    smollm2.write(
        f"kernels-{_core.current_backend()}",
        {"backend": _core.current_backend(), "mib_per_tensor": args.mib, "best_of": args.repeat, "rows": rows},
    )


if __name__ == "__main__":
    main()
