"""Stage 3: time of every kernel against a device-to-device copy beside it, and against PyTorch, torch.compile and Liger.

`of_copy` is the time in which a copy would move the bytes that the op must move, divided by the kernel's time. The copy is
torch's copy_ of a tensor of the same size, before and after each row. Times lie between CUDA events on a queue that is never
empty, so launches do not count; best and median of many. The tensors of a row are several times the L2 cache together: it is
not flushed, and each call finds it full of other data. Each result is read after the last call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config as functorch

from bench.gpu.samples import bits
from bench.gpu.stage import Checks, Notes, NotMeasured, Settings, at_least, at_most, best_and_median, seconds

NAME = "gpu-bandwidth"
TITLE = "bandwidth of every kernel against a copy, PyTorch, torch.compile and Liger"

TORCH = torch.nn.functional
aten = torch.ops.aten
ELEMENTS, REPEAT = 64 << 20, 50
OF_COPY = 0.90  # masks, codes, gated units, norms
COLS, CLASSES = 2048, 32768
DTYPES = (torch.bfloat16, torch.float32)
KERNELS = (
    "relu forward", "relu backward", "silu forward", "silu backward", "gelu forward", "gelu backward", "swiglu forward",
    "swiglu backward", "swiglu backward with product", "geglu forward", "geglu backward", "geglu_tanh forward",
    "geglu_tanh backward", "rms_norm forward", "rms_norm again", "rms_norm backward", "dropout", "cross_entropy with gradient",
)  # fmt: skip
NO_GOAL = ("dropout", "cross_entropy with gradient")  # of the copy: these calculate

Call = Callable[[], object]


@dataclass
class Case:
    """One row: bytes that must move, our call, and those of others."""

    moved: float
    ours: Call
    peers: dict[str, Call] = field(default_factory=dict)
    not_measured: list[str] = field(default_factory=list)


class Tensors:
    """Of one dtype, n elements each."""

    def __init__(self, dtype: torch.dtype, n: int, device: str, cols: int, classes: int, compile: bool):
        self.dtype, self.n, self.device, self.cols, self.classes = dtype, n, device, cols, classes
        self.compile = compile
        torch.manual_seed(0)
        self.a, self.b, self.c = (torch.randn(n // cols, cols, dtype=dtype, device=device) for _ in range(3))
        self.x, self.y, self.z = (torch.zeros(n // cols, cols, dtype=dtype, device=device) for _ in range(3))
        self.weight = torch.linspace(0.5, 2, cols, dtype=dtype, device=device)


GATED = {  # our activation, Liger's function
    "swiglu": ("silu", "liger_swiglu"),
    "geglu": ("gelu", None),
    "geglu_tanh": ("gelu_tanh", "liger_geglu"),
}


def torch_forms(act: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """PyTorch's act(x), act(x) into out, and (dy act'(x)) into out."""
    if act == "silu":
        return (
            TORCH.silu,
            lambda x, out: aten.silu.out(x, out=out),
            lambda dy, x, out: aten.silu_backward.grad_input(dy, x, grad_input=out),
        )
    form = "tanh" if act == "gelu_tanh" else "none"
    return (
        lambda x: TORCH.gelu(x, approximate=form),
        lambda x, out: aten.gelu.out(x, approximate=form, out=out),
        lambda dy, x, out: aten.gelu_backward.grad_input(dy, x, approximate=form, grad_input=out),
    )


def torch_backward(act: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """dy act'(x) as a function."""
    if act == "silu":
        return aten.silu_backward.default
    form = "tanh" if act == "gelu_tanh" else "none"
    return lambda dy, x: aten.gelu_backward.default(dy, x, approximate=form)


def liger(name: str) -> Any:
    """A function of Liger-Kernel's public module; NotMeasured if it is absent or cannot be imported here."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise NotMeasured("liger-kernel is absent")
    try:
        from liger_kernel.transformers import functional

        return getattr(functional, name)
    except Exception as error:
        raise NotMeasured(f"liger-kernel cannot be used: {type(error).__name__}: {error}") from None


def backward(f: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dy: torch.Tensor) -> Call:
    """The backward of f alone, again and again over one graph."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = f(*leaves)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def case(kernel: str, t: Tensors) -> Case:
    """The row; peers that cannot be had are named in `not_measured`."""
    from unswag.torch import ops

    a, b, c, x, y, z, w, n = t.a, t.b, t.c, t.x, t.y, t.z, t.weight, t.n
    size = t.dtype.itemsize
    kind, _, way = kernel.partition(" ")
    result = Case(0, lambda: None)

    def compiled(f: Callable[..., Any], *args: torch.Tensor) -> None:
        if g := of_compiler(f):
            result.peers["torch.compile"] = lambda: g(*args)

    def of_compiler(f: Callable[..., Any]) -> Callable[..., Any] | None:
        if not t.compile:
            return None
        torch.compiler.reset()
        return torch.compile(f)

    def of_liger(name: str, make: Callable[[Any], Call]) -> None:
        try:
            result.peers["Liger"] = make(liger(name))
        except NotMeasured as why:
            result.not_measured.append(f"Liger: {why}")

    if kernel == "relu forward":
        result.moved = n * (2 * size + 1 / 8)
        result.ours = lambda: ops.mask_forward(a, "relu", 0.0)
        result.peers["clamp_min.out"] = lambda: torch.clamp_min(a, 0, out=x)
        compiled(lambda a, x: x.copy_(torch.relu(a)), a, x)
    elif kernel == "relu backward":
        packed = ops.mask_forward(a, "relu", 0.0)[1]
        result.moved = n * (2 * size + 1 / 8)
        result.ours = lambda: ops.mask_backward(b, packed, "relu", 0.0)
        result.peers["threshold_backward.out"] = lambda: aten.threshold_backward.grad_input(b, a, 0, grad_input=x)
        compiled(lambda b, a, x: x.copy_(aten.threshold_backward(b, a, 0)), b, a, x)
    elif kind in ("silu", "gelu"):
        f, out, back = torch_forms(kind)
        if way == "forward":
            result.moved = n * 2 * size
            result.ours = lambda: ops.activation_forward(a, kind)
            result.peers[f"{kind}.out"] = lambda: out(a, x)
            compiled(lambda a, x: x.copy_(f(a)), a, x)
        else:
            result.moved = n * 3 * size
            result.ours = lambda: ops.activation_backward(a, b, kind)
            result.peers[f"{kind}_backward.out"] = lambda: back(b, a, x)
            df = torch_backward(kind)
            compiled(lambda b, a, x: x.copy_(df(b, a)), b, a, x)
    elif kind in GATED:
        act, of_liger_kernel = GATED[kind]
        (f, out, back), df = torch_forms(act), torch_backward(act)
        if way == "forward":
            result.moved = n * 3 * size
            result.ours = lambda: ops.gated_forward(a, b, act)
            result.peers[f"{act}.out, mul.out"] = lambda: (out(a, x), torch.mul(x, b, out=x))
            compiled(lambda a, b, x: x.copy_(f(a) * b), a, b, x)
            if of_liger_kernel:
                of_liger(of_liger_kernel, lambda g: torch.no_grad()(lambda: g(a, b)))
        else:
            product = way == "backward with product"
            result.moved = n * (6 if product else 5) * size
            op = ops.gated_backward_product if product else ops.gated_backward
            result.ours = lambda: op(a, b, c, act)

            def eager() -> None:  # dup = dh act(gate), dgate = (dh up) act'(gate)
                out(a, z)
                torch.mul(c, z, out=y)
                if product:
                    torch.mul(z, b, out=z)
                torch.mul(c, b, out=x)
                back(x, a, x)

            result.peers[f"{act}.out, mul.out, {act}_backward.out"] = eager
            if product:
                compiled(
                    lambda a, b, c, x, y, z: (x.copy_(df(c * b, a)), y.copy_(c * f(a)), z.copy_(f(a) * b)), a, b, c, x, y, z
                )
            else:
                compiled(lambda a, b, c, x, y: (x.copy_(df(c * b, a)), y.copy_(c * f(a))), a, b, c, x, y)
                if of_liger_kernel:
                    of_liger(of_liger_kernel, lambda g: backward(g, [a, b], c))
        if not of_liger_kernel:
            result.not_measured.append("Liger: its geglu is the tanh form")
    elif kind == "rms_norm":
        eps = 1e-6

        def llama(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            wide = v.float()
            return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(v.dtype)

        def builtin(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return TORCH.rms_norm(v, (t.cols,), w, eps)

        rstd = ops.rms_norm_forward(a, w, eps, 0.0, True, None)[1]
        if way == "forward":
            result.moved = n * 2 * size
            result.ours = lambda: ops.rms_norm_forward(a, w, eps, 0.0, True, None)
            result.peers["F.rms_norm"] = torch.no_grad()(lambda: builtin(a, w))
            result.peers["as transformers"] = torch.no_grad()(lambda: llama(a, w))
            compiled(lambda a, w, x: x.copy_(llama(a, w)), a, w, x)
            of_liger("liger_rms_norm", lambda g: torch.no_grad()(lambda: g(a, w, eps)))
        elif way == "again":  # with the rstd of the forward
            result.moved = n * 2 * size
            result.ours = lambda: ops.rms_norm_apply(a, rstd, w, 0.0, True, None)
        else:
            result.moved = n * 3 * size
            result.ours = lambda: ops.rms_norm_backward(a, rstd, w, b, 0.0, True, True, True)
            result.peers["F.rms_norm"] = backward(builtin, [a, w], b)
            result.peers["as transformers"] = backward(llama, [a, w], b)
            functorch.donated_buffer = False  # the backward runs many times over one graph
            if g := of_compiler(llama):
                result.peers["torch.compile"] = backward(g, [a, w], b)
            # it may write dx over dy: it gets a copy
            of_liger("liger_rms_norm", lambda g: backward(lambda v, w: g(v, w, eps), [a, w], b.clone()))
    elif kernel == "dropout":
        result.moved = n * 2 * size
        result.ours = lambda: ops.dropout(a, 0.1, 7, 0)
        result.peers["native_dropout"] = lambda: torch.native_dropout(a, 0.1, True)
        compiled(lambda a, x: x.copy_(TORCH.dropout(a, 0.1, True)), a, x)
    elif kernel == "cross_entropy with gradient":
        rows = n // t.classes
        result.moved = n * 3 * size  # the logits are read twice, the gradient written once
        labels = torch.arange(rows, device=t.device) * 7 % t.classes
        logits = x.view(rows, t.classes)
        logits.copy_(a.view(rows, t.classes))
        result.ours = lambda: ops.cross_entropy_(logits, labels, None, None, 1 / rows, -100, 0.0, 0.0, 1.0, True)
        scores = a.view(rows, t.classes)

        def whole(f: Callable[..., torch.Tensor]) -> Call:
            def call() -> None:
                leaf = scores.detach().requires_grad_()
                torch.autograd.grad(f(leaf, labels), leaf)

            return call

        result.peers["F.cross_entropy, backward"] = whole(TORCH.cross_entropy)
        if g := of_compiler(TORCH.cross_entropy):
            result.peers["torch.compile"] = whole(g)
        # it writes its gradient over the logits: it gets its own
        own = scores.clone()

        def liger_call(g: Any) -> Call:
            def call() -> None:
                leaf = own.detach().requires_grad_()
                g(leaf, labels).backward()

            return call

        of_liger("liger_cross_entropy", liger_call)
    else:
        raise ValueError(f"there is no kernel {kernel!r}")
    return result


def measure(kernel: str, dtype: torch.dtype, settings: Settings) -> dict[str, Any]:
    n, cols, classes, repeat = (1 << 14, 64, 128, 3) if settings.dry else (ELEMENTS, COLS, CLASSES, REPEAT)
    t = Tensors(dtype, n, settings.device, cols, classes, compile=not settings.dry)
    row = case(kernel, t)
    copied: list[float] = []

    def copy() -> None:
        copied.extend(seconds(lambda: t.z.copy_(t.c), settings.device, repeat))

    copy()
    times = seconds(row.ours, settings.device, repeat)
    copy()
    ours = best_and_median(times)
    bandwidth = 2 * n * dtype.itemsize / min(copied)
    result: dict[str, Any] = {
        "moved_bytes": row.moved,
        "ours_seconds": ours,
        "copy_bytes_per_second": bandwidth,
        "bytes_per_second": row.moved / ours["best"],
        "of_copy": row.moved / bandwidth / ours["best"],
        "of_copy_median": row.moved / (2 * n * dtype.itemsize / best_and_median(copied)["median"]) / ours["median"],
        "peers_seconds": {},
        "not_measured": list(row.not_measured),
    }
    for name, call in row.peers.items():
        try:
            result["peers_seconds"][name] = best_and_median(seconds(call, settings.device, repeat))
        except Exception as error:  # a peer's fault is no fault of ours
            result["not_measured"].append(f"{name}: {type(error).__name__}: {error}"[:300])
            if settings.cuda:
                torch.cuda.synchronize()  # raises if the GPU itself is at fault, and then the piece starts afresh
    with torch.no_grad():
        out = row.ours()
    outs = out if isinstance(out, tuple) else (out,)
    result["checksum"] = sum(int(bits(o).long().sum()) for o in outs if isinstance(o, torch.Tensor))
    checks: Checks = {}
    if kernel not in NO_GOAL:
        checks["share of the copy's bandwidth"] = at_least(round(result["of_copy"], 3), OF_COPY, must=False)
    for name, peer in result["peers_seconds"].items():
        checks[f"time, of {name}"] = at_most(round(ours["best"] / peer["best"], 3), 1.0, must=False)
    if settings.cuda and (l2 := getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)):
        result["working_set_of_l2"] = row.moved / l2
    return result | {"checks": {} if settings.dry else checks}


def pieces(settings: Settings) -> list[str]:
    return [f"{kernel}, {str(dtype).removeprefix('torch.')}" for kernel in KERNELS for dtype in DTYPES]


def run(piece: str, settings: Settings, notes: Notes) -> dict[str, Any]:
    kernel, _, dtype = piece.partition(", ")
    return measure(kernel, getattr(torch, dtype), settings)


def checks(pieces: dict[str, dict[str, Any]]) -> Checks:
    return {}


def table(pieces: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = []
    for piece, r in pieces.items():
        peers = ", ".join(f"{name} {p['best'] / r['ours_seconds']['best']:.2f}" for name, p in r["peers_seconds"].items())
        ours = r["ours_seconds"]["best"] * 1e3
        rows.append((piece, f"{ours:.3f}", f"{r['bytes_per_second'] / 1e9:,.0f}", f"{r['of_copy']:.3f}", peers))
    return ("kernel", "ms", "GB/s", "of the copy", "others' time, of ours"), rows
