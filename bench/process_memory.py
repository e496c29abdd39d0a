"""Peak memory of the whole process during one step of SmolLM2-135M above the idle model, bf16, as the kernel counts it (VmHWM).

With MALLOC_MMAP_THRESHOLD_=65536, so that freed tensors go back to the system at once and the peak is the program's, not
malloc's. The third of three steps in a fresh process, worst of 3 runs. Results are kept as they come; a run that was killed
goes on.
"""

from __future__ import annotations

import argparse
import dataclasses

from examples.resident import forget_peak, resident

from bench.kept import add_runs, runs_of, runs_of_sides
from bench.smollm2 import Job, Prepared, patched, table, write

MIB = 2**20
ROWS = {  # name: (job, stock as written in the goals, the most that ours may take), MiB
    "full": (Job(tokens=4096), 5_210, 1_700),
    "checkpointing": (Job(tokens=4096, checkpointing=True), 2_458, 1_000),
    "lora": (Job(training="lora", tokens=2048), 3_330, 1_150),
}
SIDES = ["stock", "our loss", "ours"]


def measure(job: dict, steps: int) -> dict:
    """Peak of the last of `steps` steps above the loaded model. Runs in a process of its own."""
    import gc

    from bench import bf16_matmul

    products = bf16_matmul.enable()
    run = Prepared(Job(**job))
    gc.collect()
    idle = resident("VmRSS")
    for _ in range(steps - 1):
        run.step()
        run.zero_grad()
    between = resident("VmRSS")
    forget_peak()
    run.step()
    return {
        "idle_bytes": idle,
        "between_steps_bytes": between,
        "peak_above_idle_bytes": resident("VmHWM") - idle,
        "scratch_of_products_bytes": bf16_matmul.scratch_bytes(),
        "patched": patched(run.report),
        "products": products,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which rows (default: all)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="which sides (default: all)")
    add_runs(parser)
    parser.add_argument("--tokens", type=int, help="(default 4096, LoRA 2048; the goals are for those)")
    parser.add_argument("--steps", type=int, default=3, help="steps per process; the last counts (default 3)")
    args = parser.parse_args()
    runs = runs_of(args)

    results = {}
    for row in args.rows:
        job, published, goal = ROWS[row]
        job = dataclasses.replace(job, tokens=args.tokens or job.tokens)
        environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
        found = runs_of_sides("process_memory", measure, job, args.sides, runs, args.steps, environment)
        sides = {
            side: {
                **max(of, key=lambda r: r["peak_above_idle_bytes"]),
                "runs": [{key: r[key] for key in ("commit", "peak_above_idle_bytes")} for r in of],
            }
            for side, of in found.items()
        }
        results[row] = {"job": dataclasses.asdict(job), "stock_published_mib": published, "goal_mib": goal, "sides": sides}
    write("process_memory", {"runs": {side: runs(side) for side in args.sides}, "steps": args.steps, "rows": results})

    lines = [
        (row, side, f"{r['peak_above_idle_bytes'] / MIB:,.0f}", f"{r['idle_bytes'] / MIB:,.0f}",
         f"{result['stock_published_mib']:,}" if side == "stock" else f"<= {result['goal_mib']:,}" if side == "ours" else "")
        for row, result in results.items()
        for side, r in result["sides"].items()
    ]  # fmt: skip
    table("SmolLM2-135M, bf16: peak of one step", ("row", "side", "MiB above idle", "idle MiB", "goal"), lines)


if __name__ == "__main__":
    main()
