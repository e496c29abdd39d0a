"""Every benchmark with its own defaults, one after the other (hours): the files of bench/results.

python -m bench [name …]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench.smollm2 import ROOT, say

ALL = (
    "memory",
    "process_memory",
    "step_time",
    "host_time",
    "store",
    "gradients",
    "convergence",
    "kernels",
    "rounding",
    "exhaustive",
    "jax_speed",
    "minilm",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which (default: all): {', '.join(ALL)}")
    names = parser.parse_args().names or ALL
    if unknown := set(names) - set(ALL):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(ALL)}")
    for name in names:
        say(f"bench.{name}")
        subprocess.run([sys.executable, "-m", f"bench.{name}"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
