"""How many of the 65,536 values of a 16-bit format are not correctly rounded: ours on every row of kernels, and PyTorch's.

    python bench/rounding.py

Value and derivative (backward with dy = 1) of each activation, against the definition in double precision, rounded once. Also
the largest error in units in the last place. Writes bench/results/rounding.json.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from bench import smollm2  # noqa: E402
from unswag import _core  # noqa: E402
from unswag.torch import ops  # noqa: E402,F401  (registers the ops)

F = torch.nn.functional
ACTS = {
    "silu": (F.silu, torch.ops.aten.silu_backward.default),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward.default),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x: torch.ops.aten.gelu_backward.default(dy, x, approximate="tanh"),
    ),
    "relu": (torch.relu, lambda dy, x: torch.ops.aten.threshold_backward.default(dy, x, 0)),
}


def truth(act: str, x: float) -> tuple[float, float]:
    """f(x) and f'(x) in double; the left half is computed so that it keeps its digits."""
    if math.isinf(x):
        return (x, 1.0) if x > 0 else (-0.0, 0.0)
    if act == "relu":
        return (x, 1.0) if x > 0 else (0.0, 0.0)
    u = abs(x)
    if act == "gelu":
        g, ug = 0.5 * math.erfc(u * math.sqrt(0.5)), u * math.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    else:
        c = math.sqrt(8 / math.pi)
        q, uq = (u, u) if act == "silu" else (c * (u + 0.044715 * u**3), c * (u + 3 * 0.044715 * u**3))
        t = math.exp(-q) if q < 745 else 0.0
        g, ug = t / (1 + t), uq * t / (1 + t) ** 2
    h = g - ug
    return (x * g, h) if x < 0 else (x * (1 - g), 1 - h)


def compare(got: torch.Tensor, want: np.ndarray, dtype: torch.dtype) -> dict[str, float]:
    smallest, digits, largest = (-126, 8, 255 * 2.0**120) if dtype == torch.bfloat16 else (-14, 11, 65504.0)
    ulp = np.ldexp(1.0, np.maximum(np.frexp(want)[1] - 1, smallest) - digits + 1)
    with np.errstate(invalid="ignore"):  # rounded once: torch would go through float
        rounded = np.rint(want / ulp) * ulp
    rounded = np.where(np.abs(rounded) > largest, np.copysign(math.inf, rounded), rounded)
    values = got.double().numpy()
    off = (values != rounded) & ~np.isnan(want) & ~(np.isnan(values) & np.isnan(rounded))
    finite = np.isfinite(rounded) & np.isfinite(values)
    error = np.abs(values[finite] - want[finite]) / ulp[finite]
    return {"not_correctly_rounded": int(off.sum()), "max_ulp": round(float(error.max()), 4)}


def main() -> None:
    rows = []
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        one = torch.ones_like(x)
        for act, (value, slope) in ACTS.items():
            want = np.array([truth(act, float(v)) if v == v else (math.nan, math.nan) for v in x.double()]).T.copy()
            results = {"torch": (value(x), slope(one, x))}
            for backend in _core.backend_names():
                if _core.backend_runs_here(backend):
                    _core.use_backend(backend)
                    results[backend] = (
                        torch.ops.unswag.activation_forward(x, act),
                        torch.ops.unswag.activation_backward(x, one, act),
                    )
            _core.use_backend("")
            for who, got in results.items():
                row = {"act": act, "dtype": str(dtype).removeprefix("torch."), "who": who}
                for what, i in (("value", 0), ("slope", 1)):
                    row[what] = compare(got[i], want[i], dtype)
                rows.append(row)
                print(row, flush=True)
    smollm2.write("rounding", {"of": 65536, "rows": rows})


if __name__ == "__main__":
    main()
