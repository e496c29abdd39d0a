"""The tests over whole formats: how much was checked, what was not correctly rounded, how far the worst was off.

It takes three quarters of an hour on 2 cores. Runs the tests of build/release that UNSWAG_EXHAUSTIVE=1 adds: all 2^32 floats
through the forward of each mask (values and bits), all 2^32 pairs (x, dy) of bf16 through the backward of silu and gelu, on
every row that runs here, src/cuda by host threads among them. A wrong bit or more than 1 ulp fails the test, and nothing is
written. Writes bench/results/exhaustive.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import smollm2

TESTS = {"mask_test": "MaskExhaustive.EveryFloat", "activations_test": "ActivationsExhaustive.EveryPairOfBf16*"}
KEYS = {"checked": int, "mismatches": int, "not_correctly_rounded": int, "worst_ulp": float}


def run(program: str, selection: str) -> list[dict[str, object]]:
    """One row for each property that the test records as "<backend> <function>" = "<key>=<number> ..."."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = subprocess.run(
            [smollm2.ROOT / "build/release" / program, f"--gtest_filter={selection}", f"--gtest_output=json:{report}"],
            env=os.environ | {"UNSWAG_EXHAUSTIVE": "1"},
            stdout=sys.stderr,
        )
        if done.returncode:
            sys.exit(f"{program} failed; nothing is written")
        tests = json.loads(report.read_text())["testsuites"][0]["testsuite"]
    rows: list[dict[str, object]] = []
    for test in tests:
        for name, text in test.items():
            if isinstance(text, str) and text.startswith("checked="):
                backend, _, function = name.partition(" ")
                counts = dict(pair.split("=") for pair in text.split())
                rows.append(
                    {"test": test["name"], "backend": backend, "function": function}
                    | {key: KEYS[key](number) for key, number in counts.items()}
                )
    if not rows:
        sys.exit(f"{program} recorded nothing; build it again: make native")
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with ThreadPoolExecutor() as pool:  # each test keeps one core busy
        rows = [row for found in pool.map(run, TESTS, TESTS.values()) for row in found]
    smollm2.write("exhaustive", {"rows": rows})


if __name__ == "__main__":
    main()
