"""Training steps on the CPU under jit: jax.nn against unswag.jax, in plain XLA and with the C++ kernels.

    python -m bench.jax_speed [--rounds 15] [--shape 4096 14336]

step   value and gradient of the function alone, both handed out: one compiled function
apart  the same as two compiled functions, what the first keeps for the second in between, as in a network
mlp    value and all gradients of x W1, the function, W2 (gated: x W1, x W2, the unit, W3)

The sides take turns, each round in another order; best of the rounds, and the median of the ratios within a round. The results
of a call are waited for and dropped before the next one. glibc is told to keep freed memory, so that no side pays for fresh
pages; page faults of each best call are counted and written down. Busy seconds, of all threads together, say something on a
machine that others use too. Writes bench/results/jax-cpu.json.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.smollm2 import say, table, write

HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_ARENA_MAX": "1",
}
FUNCTIONS = {"relu": 1, "silu": 1, "gelu": 1, "swiglu": 2}  # number of arguments
SIDES = ["jax.nn", "xla", "ffi"]

Call = Callable[[], Any]


def sides(name: str) -> dict[str, Callable[..., Any]]:
    import jax

    import unswag.jax as uj

    theirs = {"relu": jax.nn.relu, "silu": jax.nn.silu, "gelu": jax.nn.gelu, "swiglu": lambda gate, up: jax.nn.silu(gate) * up}
    ours = getattr(uj, name)
    return {"jax.nn": theirs[name], "xla": partial(ours, implementation="xla"), "ffi": partial(ours, implementation="ffi")}


def random(shape: tuple[int, ...], dtype: str, seed: int, scale: float = 1.0) -> Any:
    import jax

    return jax.block_until_ready(jax.random.normal(jax.random.key(seed), shape, dtype) * scale)


def step(function: Callable[..., Any], xs: list[Any], dy: Any) -> Call:
    import jax

    def run(xs: list[Any], dy: Any) -> Any:
        y, back = jax.vjp(function, *xs)
        return y, back(dy)

    return partial(jax.jit(run), xs, dy)


def apart(function: Callable[..., Any], xs: list[Any], dy: Any) -> Call:
    import jax

    forward = jax.jit(lambda xs: jax.vjp(function, *xs))
    backward = jax.jit(lambda back, dy: back(dy))

    def call() -> Any:
        y, back = forward(xs)
        return y, backward(back, dy)

    return call


def mlp(function: Callable[..., Any], xs: list[Any], weights: list[Any]) -> Call:
    import jax
    import jax.numpy as jnp

    def loss(x: Any, weights: list[Any]) -> Any:
        *before, after = weights
        y = function(*(x @ w for w in before)) @ after
        return jnp.sum(y.astype(jnp.float32) ** 2)

    return partial(jax.jit(jax.value_and_grad(loss, (0, 1))), xs[0], weights)


def timed(call: Call) -> tuple[float, float, int]:
    """Seconds, seconds of all threads together, and page faults."""
    import jax

    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start, busy = time.perf_counter(), time.process_time()
    results = jax.block_until_ready(call())
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    del results
    return seconds, busy, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def compare(calls: dict[str, Call], rounds: int) -> dict[str, Any]:
    for call in calls.values():
        for _ in range(2):
            timed(call)
    names, runs = list(calls), []
    for i in range(rounds):
        turn = i % len(names)
        runs.append({name: timed(calls[name]) for name in names[turn:] + names[:turn]})
    best = {name: min(run[name] for run in runs) for name in names}
    first = names[0]
    return {
        "seconds": {name: best[name][0] for name in names},
        "busy_seconds": {name: min(run[name][1] for run in runs) for name in names},
        "page_faults": {name: best[name][2] for name in names},
        "ratio": {name: best[name][0] / best[first][0] for name in names[1:]},
        "median_of_paired_ratios": {
            name: statistics.median(run[name][0] / run[first][0] for run in runs) for name in names[1:]
        },
    }


def main() -> None:
    if any(os.environ.get(name) != value for name, value in HEAP.items()):
        os.execve(sys.executable, [sys.executable, "-m", "bench.jax_speed", *sys.argv[1:]], os.environ | HEAP)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 14336], help="of step and apart (default 4096 14336)")
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, default=list(FUNCTIONS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--kinds", nargs="+", choices=["step", "apart", "mlp"], default=["step", "apart", "mlp"])
    parser.add_argument("--rounds", type=int, default=15, help="the best counts (default 15)")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    tokens, width, hidden = {"float32": 1024, "bfloat16": 512}, 1024, 4096
    rows, lines = [], []
    for dtype in args.dtypes:
        for name in args.functions:
            count = FUNCTIONS[name]
            for kind in args.kinds:
                if kind == "mlp":
                    shape = (tokens[dtype], width)
                    xs = [random(shape, dtype, 0)]
                    weights = [random((width, hidden), dtype, 1 + i, 0.03) for i in range(count)]
                    weights.append(random((hidden, width), dtype, 9, 0.03))
                    calls = {side: mlp(f, xs, weights) for side, f in sides(name).items()}
                else:
                    shape = tuple(args.shape)
                    xs, dy = [random(shape, dtype, i) for i in range(count)], random(shape, dtype, 9)
                    calls = {side: (step if kind == "step" else apart)(f, xs, dy) for side, f in sides(name).items()}
                result = compare(calls, args.rounds)
                rows.append({"kind": kind, "function": name, "dtype": dtype, "shape": shape, **result})
                shown = (f"{1e3 * result['seconds'][side]:.1f} ({result['page_faults'][side]})" for side in SIDES)
                ratios = (f"{result['ratio'][side]:.3f} ({result['median_of_paired_ratios'][side]:.3f})" for side in SIDES[1:])
                busy = " : ".join(f"{1e3 * result['busy_seconds'][side]:.0f}" for side in SIDES)
                lines.append((kind, name, dtype, *shown, *ratios, busy))
                say(*lines[-1])
    times = (f"{side}, ms (faults)" for side in SIDES)
    header = ("kind", "function", "dtype", *times, "xla / jax.nn (pairs)", "ffi / jax.nn", "busy ms")
    table(f"training steps on the CPU, best of {args.rounds}, jax {jax.__version__}", header, lines)
    if not args.dry:
        about = {"jax": jax.__version__, "rounds": args.rounds, "threads": os.cpu_count(), "mlp": [tokens, width, hidden]}
        write("jax-cpu", {**about, "rows": rows})


if __name__ == "__main__":
    main()
