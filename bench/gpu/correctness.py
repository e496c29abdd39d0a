"""Stage 1: the CUDA kernels write the bits that the CPU kernels write, and behave inside PyTorch and JAX."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.gpu import samples
from bench.gpu.samples import ACTIVATIONS, DTYPES, GATED, MASKS, SIXTEEN, arguments, call, mismatches, on
from bench.gpu.stage import Checks, Notes, NotMeasured, Settings, at_most, holds, none, release, synchronize
from bench.smollm2 import ROOT

NAME = "gpu-correct"
TITLE = "bits equal to the CPU's, and behaviour in PyTorch and JAX"

TORCH = torch.nn.functional
ROWS = ("avx2", "avx512")  # of the CPU, whose bits the device must write
PAIRS = [("activation_backward", act, d) for act in ACTIVATIONS for d in SIXTEEN]
PAIRS += [("gated_forward", act, d) for act in GATED for d in SIXTEEN]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- what is compared ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def row(name: str) -> Iterator[None]:
    """The CPU kernels of one instruction set."""
    from unswag import _core

    _core.use_backend(name)
    try:
        yield
    finally:
        _core.use_backend("")


def rows() -> list[str]:
    from unswag import _core

    return [name for name in ROWS if name in _core.backend_names() and _core.backend_runs_here(name)]


class Tally:
    """Elements compared and elements that differ, by op."""

    def __init__(self) -> None:
        self.compared: dict[str, int] = {}
        self.different: dict[str, int] = {}
        self.largest_ulp = 0  # of the losses of cross_entropy_

    def add(self, what: str, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
        found = 0 if len(ours) == len(theirs) else 1
        for a, b in zip(ours, theirs, strict=False):
            wide = a.dtype == b.dtype == torch.float64 and a.shape == b.shape and what.startswith(samples.OTHER_LIBRARY)
            found += samples.far_apart(a, b) if wide else mismatches(a, b)
        self.count(what, sum(a.numel() for a in ours), found)

    def count(self, what: str, compared: int, different: int) -> None:
        self.compared[what] = self.compared.get(what, 0) + compared
        self.different[what] = self.different.get(what, 0) + different

    def result(self) -> dict[str, Any]:
        return {
            "compared": sum(self.compared.values()),
            "mismatches": sum(self.different.values()),
            "different": {what: n for what, n in self.different.items() if n},
            "checks": {"mismatches": none(sum(self.different.values())), "compared": holds(bool(self.compared))},
        }


def same(tally: Tally, op: str, args: tuple[Any, ...], settings: Settings, name: str = "", theirs: Any = None) -> None:
    """The op on the device against the op on the CPU."""
    theirs = call(op, on("cpu", args)) if theirs is None else theirs
    ours = call(op, on(settings.device, args))
    what = f"{op}{name}"
    if op == "cross_entropy_":  # its loss and lse go through exp and log in double, of two libraries
        tally.largest_ulp = max(tally.largest_ulp, *(samples.ulps(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True)))
        ours, theirs = ours[2:], theirs[2:]
    tally.add(what, ours, theirs)


# ---- pieces -------------------------------------------------------------------------------------------------------------


def module(settings: Settings) -> dict[str, Any]:
    """Which module was loaded, and whether every op has a sample."""
    import unswag
    from unswag import _core

    found: dict[str, Any] = {"unswag": _relative(unswag.__file__), "core": _relative(_core.__file__)}
    for name in ("cuda_problem", "cuda_architectures"):
        if hasattr(_core, name):
            found[name] = _core.cuda_problem(0) if name == "cuda_problem" else list(_core.cuda_architectures())
    names = (
        {name for name in _core.masks if not name.startswith("jax_")} ^ set(samples.MASKS)
        | set(_core.activations) ^ set(samples.GATED)
        | set(_core.dithered) ^ set(samples.DITHERED)
        | set(_core.blocks) ^ set(samples.BLOCKS)
    )
    checks = _has_a_sample("op", samples.registered() ^ set(samples.OPS)) | _has_a_sample("name of the lists", names)
    if settings.cuda:
        checks["the module is the one built here"] = holds("build/gpu" in found["core"])
        checks["the kernels can be used"] = holds(not found.get("cuda_problem", "there is no cuda_problem"))
    return found | {"checks": checks}


def _has_a_sample(what: str, without: set[str]) -> dict[str, Any]:
    name = f"every {what} has a sample"
    return {f"{name} (not {', '.join(sorted(without))})" if without else name: holds(not without)}


def _relative(path: str) -> str:
    file = Path(path)
    return file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name


WORDS = {"uint8": torch.uint8, "float16": torch.int16, "bfloat16": torch.int16, "float32": torch.int32,
         "float64": torch.int64, "int64": torch.int64}  # fmt: skip


def cases(file: str) -> Iterator[tuple[dict[str, str], dict[str, torch.Tensor]]]:
    """(settings, tensors) of each case of a golden file."""
    key: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for line in (ROOT / "tests" / "vectors" / f"{file}.txt").read_text().splitlines()[1:]:
        first, *rest = line.split()
        if first == "case":
            if key:
                yield key, tensors
            key, tensors = dict(word.split("=") for word in rest[1:]), {}
        elif rest[0] in WORDS:
            dtype, height, width, *words = rest
            integer = WORDS[dtype]
            size = 1 << 8 * integer.itemsize
            values = [int(word, 16) for word in words]
            signed = values if integer == torch.uint8 else [v - size if v >= size // 2 else v for v in values]
            tensors[first] = torch.tensor(signed, dtype=integer).view(int(height), int(width)).view(getattr(torch, dtype))
    yield key, tensors


def far(ours: torch.Tensor, truth: torch.Tensor, units: float = 4) -> int:
    """Elements further from the truth than some units of rounding of the value and of the root mean square."""
    unit = 2.0**-9 if ours.dtype == torch.bfloat16 else 2.0**-24
    allowed = units * unit * (truth.abs() + truth.pow(2).mean().sqrt())
    return int(((ours.cpu().double().view(truth.shape) - truth).abs() > allowed).sum())


def golden(settings: Settings) -> dict[str, Any]:
    """The files of tests/vectors: packed bytes and draws equal, values near their float64 truth."""
    tally, device = Tally(), settings.device
    for key, t in cases("mask"):
        y_packed = call("mask_forward", on(device, (t["x"], key["act"], float(key["slope"]))))
        tally.add("mask bytes", y_packed[1:], [t["packed"]])
    for key, t in cases("dropout"):
        seed, offset = (int(key[name]) for name in ("seed", "offset"))
        signed = [v - (1 << 64) if v >= 1 << 63 else v for v in (seed, offset)]
        tally.add("dropout", call("dropout", on(device, (t["x"], float(key["p"]), *signed))), [t["y"]])
    for key, t in cases("gated"):
        args = on(device, (t["gate"], t["up"], t["dh"], key["act"]))
        dgate, dup, h = call("gated_backward_product", args)
        for name, ours in (("h", h), ("dgate", dgate), ("dup", dup)):
            tally.count(f"gated {name}", ours.numel(), far(ours, t[name]))
        tally.add("gated product again", call("gated_forward", (*args[:2], key["act"])), [h])
    for key, t in cases("rms_norm"):
        eps, offset = float(key["eps"]), float(key["weight_offset"])
        x, w, dy = on(device, (t["x"], t["weight"].flatten(), t["dy"]))
        y, rstd = call("rms_norm_forward", (x, w, eps, offset, True, None))
        dx, dw = call("rms_norm_backward", (x, rstd, w, dy, offset, True, True, True))
        for name, ours in (("y", y), ("rstd", rstd), ("dx", dx), ("dw", dw)):
            tally.count(f"rms_norm {name}", ours.numel(), far(ours, t[name]))
    for key, t in cases("cross_entropy"):
        smoothing, softcap, scale = (float(key[name]) for name in ("label_smoothing", "softcap", "logit_scale"))
        logits, labels = on(device, (t["logits"], t["labels"].flatten()))
        out = call("cross_entropy_", (logits, labels, None, None, 1.0, -100, smoothing, softcap, scale, True))
        # e^z takes over the absolute error of a soft-capped z, which is a few units of |z|
        for name, ours, units in zip(("loss", "lse", "gradient"), out, (4, 4, 16 if softcap else 4), strict=True):
            tally.count(f"cross_entropy {name}", ours.numel(), far(ours, t[name], units))
    return tally.result()


def every(dtype: torch.dtype) -> torch.Tensor:
    """Each of the 65,536 values once."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def exhaustive(settings: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """All 16-bit inputs of every mask, activation and gated unit, forward and backward, against each row of the CPU. Of two or
    three inputs the first takes every value, beside drawn ones and beside the special ones."""
    tally, names = Tally(), rows()
    x = every(dtype)
    many = 2 if settings.dry else 64
    others = [samples.draw((65536,), dtype, seed).roll(seed) for seed in range(many)]
    others += [torch.full_like(x, v) for v in (0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan, 1e-7)]
    first, second = x.repeat(len(others)), torch.cat(others)
    third = second.roll(65537)
    for name in names or [""]:
        with row(name):
            for act, slope in MASKS.items():
                same(tally, "mask_forward", (x, act, slope), settings, f" {act} {name}")
                packed = samples.call("mask_forward", (second, act, slope))[1]
                same(tally, "mask_backward", (first, packed, act, slope), settings, f" {act} {name}")
            for act in ACTIVATIONS:
                same(tally, "activation_forward", (x, act), settings, f" {act} {name}")
                same(tally, "activation_backward", (first, second, act), settings, f" {act} {name}")
            for act in GATED:
                same(tally, "gated_forward", (first, second, act), settings, f" {act} {name}")
                same(tally, "gated_backward", (first, second, third, act), settings, f" {act} {name}")
                same(tally, "gated_backward_product", (first, second, third, act), settings, f" {act} {name}")
                same(tally, "gated_backward", (second, first, third, act), settings, f" {act} {name}")
                same(tally, "gated_backward", (second, third, first, act), settings, f" {act} {name}")
    return tally.result() | {"rows": names}


def pairs(settings: Settings, op: str, act: str, dtype: torch.dtype, notes: Notes) -> dict[str, Any]:
    """All 2^32 pairs of two 16-bit inputs, against the CPU's fastest row, 2^24 at a time; in a dry run a few of them."""
    x, step, at_once = every(dtype), 1 if settings.dry else 256, 1 if settings.dry else 4096
    here = x.to(settings.device)
    first = {x.device: x.repeat(step), here.device: here.repeat(step)}
    second = {device: torch.empty_like(t) for device, t in first.items()}

    def some(start: int) -> list[int]:
        tally = Tally()
        for begin in range(start, start + at_once, step):
            for values in (x, here):
                second[values.device].view(step, -1).copy_(values[begin : begin + step, None])
            ours, theirs = (call(op, (first[v.device], second[v.device], act)) for v in (here, x))
            tally.add(op, ours, theirs)
        return [tally.compared[op], tally.different[op]]

    found = [notes.get(str(start), lambda s=start: some(s)) for start in range(0, 2 if settings.dry else 65536, at_once)]
    compared, different = (sum(f[i] for f in found) for i in (0, 1))
    return {"compared": compared, "mismatches": different, "checks": {"mismatches": none(different)}}


SHAPES = ((1, 1), (3, 37), (257, 576), (64, 4099), (33, 2048))
LARGE_SHAPES = ((4096, 2048), (512, 14336), (70000, 64), (8, 128256))


def by_rows(settings: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """Norms, cross-entropy and dropout against the CPU: values to the bit; of the loss and lse the units in the last place, one
    of which is allowed, and more in float64, where all of exp and log is the library's."""
    tally, unsupported = Tally(), set()
    for shape in SHAPES + (() if settings.dry else LARGE_SHAPES):
        for op in ("rms_norm_forward", "rms_norm_apply", "rms_norm_backward", "cross_entropy_", "dropout"):
            for args in arguments(op, dtype, shape):
                try:
                    same(tally, op, args, settings, f" {shape[0]} x {shape[1]}")
                except NotImplementedError as error:
                    unsupported.add(f"{op}: {error}")
    result = tally.result() | {"loss_largest_ulp": tally.largest_ulp, "not_measured": sorted(unsupported)}
    result["checks"]["loss and lse, units in the last place"] = at_most(
        tally.largest_ulp, 1024 if dtype == torch.float64 else 1
    )
    return result


def layouts(settings: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """Strided, misaligned and expanded views, tails and sizes of 0: the bits of the same numbers side by side on the CPU."""
    tally, unsupported = Tally(), set()
    shapes = [
        (2, 3, n)
        for n in ((1, 5, 33) if settings.dry else (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 257, 1023))
    ]
    empty = [(0, 3), (3, 0), (0,), (2, 3, 0)]
    for op in samples.OPS:
        try:
            for shape in shapes:
                for args in arguments(op, dtype, shape):
                    theirs = call(op, on("cpu", args))
                    for name, lay in ({"as it is": samples.as_it_is} | samples.LAYOUTS).items():
                        if op == samples.WRITES and name in ("transposed", "middle"):
                            continue  # cannot be written in place: an error
                        if name == "middle" and any(isinstance(a, torch.Tensor) and a.dim() < 3 for a in args):
                            continue
                        ours = call(op, on(settings.device, args, lay))
                        if op == samples.WRITES:
                            ours, used = ours[2:], theirs[2:]
                        else:
                            used = theirs
                        tally.add(f"{op} {name}", ours, used)
            for shape in empty:
                if shape[-1] == 0 and op == samples.WRITES:
                    continue
                for args in arguments(op, dtype, shape):
                    tally.add(f"{op} empty", call(op, on(settings.device, args)), call(op, on("cpu", args)))
        except NotImplementedError as error:
            unsupported.add(f"{op}: {error}")
    for act in ACTIVATIONS:  # a gradient that is one value expanded
        x = samples.draw((3, 257), dtype, 1)
        with contextlib.suppress(NotImplementedError):
            theirs = call("activation_backward", (x, torch.full_like(x, 0.75), act))
            here = x.to(settings.device)
            tally.add("activation_backward expanded", call("activation_backward", (here, samples.one_value(here), act)), theirs)
    return tally.result() | {"not_measured": sorted(unsupported)}


# More than 2^31 elements: (rows, columns); in one row; and a dry run's.
BIG, BIG_ROW, NOT_BIG, NOT_BIG_ROW = (65537, 32771), (1, 2**31 + 40), (67, 129), (1, 4133)


def large(settings: Settings, notes: Notes) -> dict[str, Any]:
    """bfloat16 tensors of more than 2^31 elements: the op on the whole against the op on parts of it, on the device, and on
    the first and last part on the CPU."""
    tally, skipped = Tally(), []
    device, dtype = settings.device, torch.bfloat16
    ways = {
        "mask_forward": (1, 1.1, ("relu", 0.0)),
        "mask_backward": (1, 1.1, ("relu", 0.0)),
        "activation_forward": (1, 1.0, ("silu",)),
        "activation_backward": (2, 1.0, ("silu",)),
        "gated_forward": (2, 1.0, ("silu",)),
        "gated_backward_product": (3, 3.0, ("silu",)),
        "dropout": (1, 1.0, (0.5, 7, 0)),
        "rms_norm_forward": (1, 1.0, ()),
        "rms_norm_backward": (2, 1.0, ()),
        "cross_entropy_": (1, 0.0, ()),
    }
    for op, (inputs, outputs, rest) in ways.items():
        by_rows_only = op.startswith("rms_norm") or op == "cross_entropy_"
        shapes = (NOT_BIG, NOT_BIG_ROW) if settings.dry else (BIG, BIG_ROW)
        for shape in shapes[:1] if by_rows_only else shapes:
            n = shape[0] * shape[1]
            # one more than the op holds, for the reference's parts and the bits that are compared
            needed = int(n * dtype.itemsize * (inputs + outputs + 1))
            release(device)
            if settings.cuda and torch.cuda.mem_get_info()[0] < needed:
                skipped.append(f"{op} of {shape[0]} x {shape[1]}: needs {needed / 2**30:.0f} GiB")
                continue
            found = notes.get(f"{op} {shape}", lambda o=op, s=shape, i=inputs, r=rest: _large_one(settings, o, s, i, r))
            tally.count(op, *found)
    return tally.result() | {"not_measured": skipped}


def _large_one(settings: Settings, op: str, shape: tuple[int, int], inputs: int, rest: tuple[Any, ...]) -> list[int]:
    device, dtype = settings.device, torch.bfloat16
    height, width = shape
    generator = torch.Generator(device).manual_seed(5)
    xs = [torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator) for _ in range(inputs)]
    weight = torch.linspace(0.5, 2, width, device=device, dtype=dtype) if op.startswith("rms_norm") else None
    labels = torch.arange(height, device=device) * 7 % width if op == "cross_entropy_" else None
    packed = call("mask_forward", (xs[0], "relu", 0.0))[1] if op == "mask_backward" else None
    rstd = call("rms_norm_forward", (xs[0], weight, 1e-6, 0.0, True, None))[1] if op == "rms_norm_backward" else None
    untouched = xs[0].view(-1)[-5:].clone()

    def run(part: tuple[slice, slice], to: str) -> list[torch.Tensor]:
        of = [x[part].clone().to(to) for x in xs] if op == "cross_entropy_" and part != whole else [x[part].to(to) for x in xs]
        if op == "mask_backward":
            bytes_ = slice(part[1].start // 8, None if part[1].stop is None else part[1].stop // 8)
            return call(op, (of[0], packed[part[0], bytes_].to(to), *rest))
        if op == "rms_norm_forward":
            return call(op, (*of, weight.to(to), 1e-6, 0.0, True, None))
        if op == "rms_norm_backward":
            return call(op, (of[0], rstd[part[0]].to(to), weight.to(to), of[1], 0.0, True, True, False))[:1]
        if op == "cross_entropy_":
            return call(op, (*of, labels[part[0]].to(to), None, None, 1.0, -100, 0.0, 0.0, 1.0, True))[2:]
        return call(op, (*of, *rest))

    whole = (slice(0, None), slice(0, None))
    logits = xs[0].clone() if op == "cross_entropy_" else None
    results = run(whole, device)
    if logits is not None:
        xs = [logits]
    compared = different = 0
    # dropout draws by the place in the tensor: only the first part can be made alone
    parts = _parts(shape, 1 << 10 if settings.dry else 1 << 24)
    edges = parts[:1] if op == "dropout" else parts
    for index, part in enumerate(edges):
        for to in {device, *(("cpu",) if index in (0, len(edges) - 1) else ())}:
            if to == "cpu" and part[0].stop is not None and (part[0].stop - part[0].start) * width > 1 << 27:
                continue
            for whole_result, of_part in zip(results, run(part, to), strict=True):
                if whole_result.dtype == torch.uint8:
                    span = slice(part[1].start // 8, None if part[1].stop is None else part[1].stop // 8)
                    here = whole_result[part[0], span][:, : of_part.shape[1]]
                else:
                    here = whole_result[part] if whole_result.dim() == 2 else whole_result[part[0]]
                compared, different = compared + here.numel(), different + mismatches(of_part, here.to(to))
    different += mismatches(xs[0].view(-1)[-5:], untouched)
    return [compared, different]


def _parts(shape: tuple[int, int], most: int = 1 << 24) -> list[tuple[slice, slice]]:
    """First, last and some between, of at most about `most` elements; columns are cut at multiples of 32, where packed rows can
    be."""
    height, width = shape
    if height == 1:
        last = max(0, (width - most) // 32 * 32)
        starts = sorted({0, last, *range(0, last, max(most, width // 8 // 32 * 32))})
        return [(slice(0, 1), slice(s, None if s == last else s + most)) for s in starts]
    step = max(1, min(height, most // width))
    last = height - step
    starts = sorted({0, last, *range(0, last, max(step, height // 8))})
    return [(slice(s, s + step), slice(0, None)) for s in starts]


def opcheck(settings: Settings) -> dict[str, Any]:
    """torch.library.opcheck of every op: schema, fake kernel, dispatch, AOTAutograd."""
    bad = {}
    for op in samples.OPS:
        for dtype in (torch.float32, torch.bfloat16):
            args = next(arguments(op, dtype, (3, 5, 37)))
            numbers = (a.nan_to_num(1, 2, -2) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
            args = on(settings.device, tuple(numbers))  # opcheck takes no NaN for equal
            try:
                found = torch.library.opcheck(getattr(torch.ops.unswag, op).default, args)
                if set(found.values()) != {"SUCCESS"}:
                    bad[f"{op} {short(dtype)}"] = str(found)
            except Exception as error:
                bad[f"{op} {short(dtype)}"] = f"{type(error).__name__}: {error}"[:500]
    return {"ops": len(samples.OPS), "failed": bad, "checks": {"ops that fail": none(len(bad))}}


def functions() -> dict[str, tuple[Callable[..., Any], Callable[..., Any], str]]:
    """name -> (ours, PyTorch's, kind of its inputs)"""
    from unswag.torch import functional as F

    def llama(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def gemma(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + w.to(wide.dtype))).to(x.dtype)

    return {
        "relu": (F.relu, torch.relu, "x"),
        "leaky_relu": (F.leaky_relu, TORCH.leaky_relu, "x"),
        "relu6": (F.relu6, TORCH.relu6, "x"),
        "silu": (F.silu, TORCH.silu, "x"),
        "gelu": (F.gelu, TORCH.gelu, "x"),
        "gelu_tanh": (lambda x: F.gelu(x, "tanh"), lambda x: TORCH.gelu(x, approximate="tanh"), "x"),
        "swiglu": (F.swiglu, lambda g, u: TORCH.silu(g) * u, "gate up"),
        "geglu": (F.geglu, lambda g, u: TORCH.gelu(g) * u, "gate up"),
        "geglu_tanh": (lambda g, u: F.geglu(g, u, "tanh"), lambda g, u: TORCH.gelu(g, approximate="tanh") * u, "gate up"),
        "reglu": (F.reglu, lambda g, u: torch.relu(g) * u, "gate up"),
        "llama norm": (F.rms_norm, llama, "norm"),
        "gemma norm": (lambda x, w: F.rms_norm(x, w, weight_offset=1.0, cast_before_weight=False), gemma, "norm"),
    }


def inputs(kind: str, dtype: torch.dtype, shape: tuple[int, int], seed: int, device: str) -> list[torch.Tensor]:
    shapes = {"x": [shape], "gate up": [shape, shape], "norm": [shape, shape[-1:]]}[kind]
    return [(2 * samples.plain(s, torch.float32, seed + i)).to(dtype).to(device) for i, s in enumerate(shapes)]


def differentiated(f: Callable[..., Any], xs: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    """Value and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in xs]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def compiled(settings: Settings) -> dict[str, Any]:
    """Every op and every function with its gradient under torch.compile(fullgraph=True), and one chain of them through
    inductor: the bits of the eager call."""
    from unswag.torch import functional as F

    tally, bad = Tally(), {}

    def attempt(what: str, compare: Callable[[], None]) -> None:
        torch.compiler.reset()
        try:
            compare()
        except Exception as error:
            bad[what] = f"{type(error).__name__}: {error}"[:500]

    for op in samples.OPS:
        args = next(arguments(op, torch.float32, (3, 5, 37)))

        def of_op(op: str = op, args: Any = args) -> None:
            f = torch.compile(lambda *a: getattr(torch.ops.unswag, op)(*a), fullgraph=True, backend="aot_eager")
            given = on(settings.device, args)
            with torch.no_grad():
                out = f(*given)
            found = [out] if isinstance(out, torch.Tensor) else list(out)
            tally.add(op, [*found, given[0]] if op == samples.WRITES else found, call(op, on(settings.device, args)))

        attempt(op, of_op)

    def chain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.relu(F.rms_norm(F.swiglu(gate * 2, up))) * 4)

    chains = {"chain": (chain, "gate up", "aot_eager" if settings.dry else "inductor")}
    whole = {name: (f, kind, "aot_eager") for name, (f, _, kind) in functions().items()} | chains
    for name, (function, kind, backend) in whole.items():
        xs = inputs(kind, torch.float32, (64, 256), 0, settings.device)
        dy = samples.plain((64, 256), torch.float32, 9).to(settings.device)

        def of_function(name: str = name, f: Any = function, how: str = backend, xs: Any = xs, dy: Any = dy) -> None:
            tally.add(name, differentiated(torch.compile(f, fullgraph=True, backend=how), xs, dy), differentiated(f, xs, dy))

        attempt(name, of_function)
    result = tally.result() | {"failed": bad}
    result["checks"]["that do not compile"] = none(len(bad))
    return result


def graphs(settings: Settings) -> dict[str, Any]:
    """Every op captured in a CUDA graph, replayed twice with other numbers in its inputs: the bits of a call."""
    if not settings.cuda:
        raise NotMeasured("CUDA graphs need a GPU")
    tally, bad = Tally(), {}
    for op in samples.OPS:
        for dtype in (torch.float32, torch.bfloat16):
            first = next(arguments(op, dtype, (64, 2048)))
            given = on(settings.device, first)
            start = on(settings.device, first)
            try:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    call(op, given)
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = call(op, given)
                for turn in (0, 1):
                    now = on(settings.device, start)
                    if turn:  # gradients and packed masks as they are, the first input otherwise
                        now[0].copy_(now[0].roll(1, 0))
                    for a, b in zip(given, now, strict=True):
                        if isinstance(a, torch.Tensor):
                            a.copy_(b)
                    graph.replay()
                    torch.cuda.synchronize()
                    tally.add(op, [x.clone() for x in out], call(op, on(settings.device, now)))
            except Exception as error:
                bad[f"{op} {short(dtype)}"] = f"{type(error).__name__}: {error}"[:500]
    result = tally.result() | {"failed": bad}
    result["checks"]["that cannot be captured"] = none(len(bad))
    return result


def streams(settings: Settings) -> dict[str, Any]:
    """On a stream of its own, behind a producer that is late: an op that went to another stream would read old numbers, and one
    that waited would not come back before the producer ends."""
    if not settings.cuda:
        raise NotMeasured("streams need a GPU")
    tally, waited, side = Tally(), [], torch.cuda.Stream()
    for op in samples.OPS:
        args = next(arguments(op, torch.bfloat16, (64, 2048)))
        expected = call(op, on(settings.device, args))
        source = on(settings.device, args)
        given = tuple(torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in source)
        late = torch.cuda.Event()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            call(op, on(settings.device, args))  # so that this stream has the memory
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)  # 50 ms
            for a, b in zip(given, source, strict=True):
                if isinstance(a, torch.Tensor):
                    a.copy_(b)
            late.record()
            out = call(op, given)
            if late.query():
                waited.append(op)
        side.synchronize()
        tally.add(op, out, expected)
    result = tally.result() | {"waited": waited}
    result["checks"]["that wait for the device"] = none(len(waited))
    return result


def again(settings: Settings) -> dict[str, Any]:
    """Four calls give the same bits."""
    tally = Tally()
    for op in samples.OPS:
        for dtype in DTYPES:
            for args in arguments(op, dtype, (3, 9, 515) if settings.dry else (4, 256, 515)):
                try:
                    first = call(op, on(settings.device, args))
                    for _ in range(3):
                        tally.add(op, call(op, on(settings.device, args)), first)
                except NotImplementedError:
                    break
    return tally.result()


def gradients(settings: Settings) -> dict[str, Any]:
    """unswag.torch.functional against float64: worst error at most 1.25 times PyTorch's in each tensor (float32 norms: 1.5, and
    their error as a vector not above PyTorch's), in the median over tensors not above it."""
    worst, above, compared = {}, [], 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, (ours, theirs, kind) in functions().items():
            if name in MASKS:
                continue  # to the bit, elsewhere
            wide_norm = kind == "norm" and dtype == torch.float32
            ratios = []
            for seed in range(1 if settings.dry else 5):
                xs = inputs(kind, dtype, (64, 257), 10 * seed, settings.device)
                dy = samples.plain((64, 257), torch.float32, seed + 100).to(dtype).to(settings.device)
                truth = differentiated(theirs, [x.double() for x in xs], dy.double())
                for true, a, t in zip(truth, differentiated(ours, xs, dy), differentiated(theirs, xs, dy), strict=True):
                    compared += a.numel()
                    mine, other = ((v.double() - true).abs().max().item() for v in (a, t))
                    ratios.append(mine / other if other else 1.0 if mine == 0 else float("inf"))
                    if wide_norm and (a.double() - true).norm() > (t.double() - true).norm():
                        above.append(f"{name}, seed {seed}: error as a vector")
            label = f"{name} {short(dtype)}"
            worst[label] = max(ratios)
            if max(ratios) > (1.5 if wide_norm else 1.25):
                above.append(f"{label}: {max(ratios):.3f} of PyTorch's worst error")
            if not settings.dry and sorted(ratios)[len(ratios) // 2] > 1:
                above.append(f"{label}: {sorted(ratios)[len(ratios) // 2]:.3f} of PyTorch's worst error in the median")
    return {"compared": compared, "of_pytorch": worst, "above": above, "checks": {"tensors above the bound": none(len(above))}}


def labels(settings: Settings) -> dict[str, Any]:
    """A label out of range: its loss and its row of the gradient are NaN, all others as without it (a CPU can say so
    at once: an error)."""
    logits = samples.plain((6, 83), torch.float32, 1)
    good = torch.tensor([0, 5, 82, 7, -100, 3])
    bad = torch.tensor([0, 83, 82, -1, -100, 3])
    rest = (None, None, 1.0, -100, 0.0, 0.0, 1.0, True)
    if not settings.cuda:
        try:
            call("cross_entropy_", (logits, bad, *rest))
        except ValueError as error:
            return {"said": str(error), "checks": {"the CPU refuses it": holds("label" in str(error))}}
        return {"checks": {"the CPU refuses it": holds(False)}}
    loss, _, gradient = call("cross_entropy_", on(settings.device, (logits, bad, *rest)))
    true_loss, _, true_gradient = call("cross_entropy_", on(settings.device, (logits, good, *rest)))
    wrong = torch.tensor([False, True, False, True, False, False], device=loss.device)
    found = mismatches(loss[~wrong], true_loss[~wrong]) + mismatches(gradient[~wrong], true_gradient[~wrong])
    nan = bool(loss[wrong].isnan().all() and gradient[wrong].isnan().all())
    return {"checks": {"its rows are NaN": holds(nan), "other rows that changed": none(found)}}


def tiny_llama(dtype: torch.dtype, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, max_position_embeddings=1024, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).to(device).train()


def surgery(settings: Settings) -> dict[str, Any]:
    """A small Llama, stock and `exact`: loss and gradients near, a gradient for every trained parameter, and the ledger's bytes
    those of the storages that are alive. Gradients: |ours - stock| / |stock|, of what rounding to the dtype explains."""
    from unswag import apply_unswag_surgery, audit

    checks: Checks = {}
    figures = {}
    for dtype, loss_limit, limit in ((torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-2, 0.1)):
        ids = torch.randint(0, 97, (2, 64), generator=torch.Generator().manual_seed(1)).to(settings.device)
        batch = {"input_ids": ids, "labels": ids.clone()}
        found = {}
        for side in ("stock", "ours"):
            model = tiny_llama(dtype, settings.device)
            if side == "ours":
                report = apply_unswag_surgery(model, verbose=False)
            loss = model(**batch).loss
            loss.backward()
            found[side] = (loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        (stock_loss, stock), (our_loss, ours) = found["stock"], found["ours"]
        without = [n for n, g in ours.items() if g is None]
        apart = max(
            ((ours[n].double() - g.double()).norm() / g.double().norm()).item() for n, g in stock.items() if ours[n] is not None
        )
        model.zero_grad(set_to_none=True)
        ledger = audit(model, **batch)
        kinds = sorted({pattern for _, pattern in report.patched})
        name = short(dtype)
        figures[name] = {
            "loss": our_loss, "stock_loss": stock_loss, "gradients_apart": apart, "ledger_bytes": ledger.total,
            "alive_bytes": ledger.alive, "patched": kinds, "skipped": [list(s) for s in report.skipped],
        }  # fmt: skip
        checks |= {
            f"{name}: loss, relative difference": at_most(abs(our_loss / stock_loss - 1), loss_limit),
            f"{name}: gradients, relative difference": at_most(apart, limit),
            f"{name}: parameters without a gradient": none(len(without)),
            f"{name}: ledger against live storages": at_most(abs(ledger.total / ledger.alive - 1), 0.02),
            f"{name}: patterns found (mlp, norm, loss, stash)": holds(len(kinds) >= 4),
        }
    return {"figures": figures, "checks": checks}


def jax_calls(settings: Settings) -> dict[str, Any]:
    """XLA custom calls of the CUDA kernels against the XLA form: values and gradients of masks to the bit, of smooth functions
    as near as the dtype allows."""
    if importlib.util.find_spec("jax") is None:
        raise NotMeasured("jax is absent")
    import jax
    import jax.numpy as jnp
    import numpy as np

    if settings.cuda and jax.default_backend() != "gpu":
        raise NotMeasured(f"jax sees no GPU (its backend is {jax.default_backend()})")
    import unswag.jax as uj

    def run(f: Callable[..., Any], implementation: str, arrays: list[Any], dy: Any) -> list[Any]:
        def both(arrays: list[Any], dy: Any) -> list[Any]:
            y, back = jax.vjp(lambda *a: f(*a, implementation=implementation), *arrays)
            return [y, *back(dy)]

        return jax.jit(both)(arrays, dy)

    checks: Checks = {}
    figures = {}
    key = jax.random.key(0)
    for name, exact, count in (("relu", True, 1), ("relu6", True, 1), ("leaky_relu", True, 1), ("silu", False, 1),
                               ("gelu", False, 1), ("swiglu", False, 2), ("geglu", False, 2)):  # fmt: skip
        for dtype in ("float32", "bfloat16"):
            arrays = [jax.random.normal(k, (33, 1000), dtype) * 2 for k in jax.random.split(key, count + 1)]
            try:
                ours, theirs = (run(getattr(uj, name), how, arrays[:-1], arrays[-1]) for how in ("ffi", "xla"))
            except NotImplementedError as error:
                return {"checks": {"custom calls on this platform": holds(False)}, "said": str(error)[:500]}
            apart = max(
                float(jnp.max(jnp.abs(a.astype("float32") - b.astype("float32")))) for a, b in zip(ours, theirs, strict=True)
            )
            differ = sum(int(np.sum(np.asarray(a) != np.asarray(b))) for a, b in zip(ours, theirs, strict=True))
            figures[f"{name} {dtype}"] = {"largest_difference": apart, "elements_that_differ": differ}
            if exact:
                checks[f"{name} {dtype}: elements that differ"] = none(differ)
            else:  # a few units of values that reach 50
                checks[f"{name} {dtype}: largest difference"] = at_most(apart, 2e-5 if dtype == "float32" else 0.25)
    return {"platform": jax.default_backend(), "figures": figures, "checks": checks}


# ---- the stage ----------------------------------------------------------------------------------------------------------


def work(settings: Settings, notes: Notes) -> dict[str, Callable[[], dict[str, Any]]]:
    """The pieces, what says most first."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "module": lambda: module(settings),
        "golden": lambda: golden(settings),
    }
    for dtype in SIXTEEN:
        found[f"exhaustive {short(dtype)}"] = lambda d=dtype: exhaustive(settings, d)
    for dtype in DTYPES:
        found[f"rows {short(dtype)}"] = lambda d=dtype: by_rows(settings, d)
        found[f"layouts {short(dtype)}"] = lambda d=dtype: layouts(settings, d)
    found |= {
        "labels": lambda: labels(settings),
        "again": lambda: again(settings),
        "streams": lambda: streams(settings),
        "graphs": lambda: graphs(settings),
        "opcheck": lambda: opcheck(settings),
        "gradients": lambda: gradients(settings),
        "surgery": lambda: surgery(settings),
        "jax": lambda: jax_calls(settings),
        "large": lambda: large(settings, notes),
        "compile": lambda: compiled(settings),
    }
    for op, act, dtype in PAIRS:
        found[f"pairs {op} {act} {short(dtype)}"] = lambda o=op, a=act, d=dtype: pairs(settings, o, a, d, notes)
    return found


def pieces(settings: Settings) -> list[str]:
    return list(work(settings, Notes()))


def run(piece: str, settings: Settings, notes: Notes) -> dict[str, Any]:
    result = work(settings, notes)[piece]()
    synchronize(settings.device)
    return result


def checks(pieces: dict[str, dict[str, Any]]) -> Checks:
    return {}


def table(pieces: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = []
    for name, r in pieces.items():
        reached = [c["reached"] for c in r.get("checks", {}).values()]
        compared = f"{r['compared']:,}" if "compared" in r else ""
        differ = f"{r['mismatches']:,}" if "mismatches" in r else ""
        verdict = "not measured" if not reached else "yes" if all(reached) else "NO"
        rows.append((name, compared, differ, verdict, f"{r.get('took', 0):.1f}"))
    return ("piece", "elements compared", "mismatches", "holds", "s"), rows
