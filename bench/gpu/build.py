"""The module built for this machine in build/gpu, without touching the tree, and the wheels that were carried along."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.smollm2 import ROOT, say

BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"  # the package `unswag` of links to python/unswag, with the _core built here
WHEELS = ROOT / "wheels"
CARRIED = BUILD / "wheels"


def link(package: Path, at: Path) -> None:
    """`at` becomes `package` without its built modules: one link per file, so that a _core of the tree is neither found nor
    overwritten."""
    at.mkdir(parents=True, exist_ok=True)
    wanted = {p.name: p for p in package.iterdir() if not p.name.startswith("_core.")}
    wanted.pop("__pycache__", None)
    for old in at.iterdir():
        if old.is_symlink() and old.name not in wanted:
            old.unlink()
    for name, target in wanted.items():
        if not (at / name).is_symlink():
            (at / name).symlink_to(os.path.relpath(target, at), target_is_directory=target.is_dir())


def configure() -> list[str]:
    return [
        "cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DUNSWAG_CUDA=ON",
        "-DUNSWAG_PYTHON=ON", "-DUNSWAG_NANOBIND_STATIC=ON", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DUNSWAG_PYTHON_DIR={SITE / 'unswag'}",
    ]  # fmt: skip


def build(budget: float) -> dict[str, Any]:
    """Builds what is missing. SystemExit with what the compiler said if it fails."""
    for tool in ("cmake", "ninja", "nvcc"):
        if shutil.which(tool) is None:
            raise SystemExit(
                f"{tool} is not on the PATH; the build of the CUDA kernels needs it (nvcc is also looked for in CUDA_HOME)"
            )
    start = time.monotonic()
    link(ROOT / "python" / "unswag", SITE / "unswag")
    log = BUILD / "build.log"
    with log.open("w") as f:
        for words, command in (
            ("configuring", configure()),
            ("building", ["cmake", "--build", str(BUILD), "--target", "_core"]),
        ):
            say(f"{words} {BUILD.relative_to(ROOT)} (what it says is in {log.relative_to(ROOT)})")
            left = budget - (time.monotonic() - start)
            try:
                done = subprocess.run(command, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, timeout=max(1.0, left))
            except subprocess.TimeoutExpired:
                raise SystemExit(f"{words} did not end in {budget:.0f} s; run it again, it goes on where it was") from None
            if done.returncode:
                f.flush()
                raise SystemExit(f"{words} failed:\n" + "\n".join(log.read_text().splitlines()[-40:]))
    return {"seconds": round(time.monotonic() - start, 1)}


def install_wheels(folder: Path = WHEELS, target: Path = CARRIED) -> list[str]:
    """Unpacks the wheels of `folder`; what pip refuses (another Python, say) is returned in words."""
    refused = []
    for wheel in sorted(folder.glob("*.whl")) if folder.is_dir() else ():
        mark = target / f".{wheel.name}"
        if mark.exists():
            continue
        say(f"unpacking {wheel.name}")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade",
             "--disable-pip-version-check", "--target", str(target), str(wheel)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            refused.append(f"{wheel.name} could not be installed: {done.stderr.strip().splitlines()[-1]}")
        else:
            mark.touch()
    return refused


def environment(dry: bool) -> dict[str, str]:
    """In which the workers run. A dry run takes the module of the tree."""
    package = ROOT / "python" if dry else SITE
    path = [str(ROOT), str(package), *([] if dry else [str(CARRIED)])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def find_tools() -> None:
    """The compiler and the sanitizer of CUDA_HOME, if they are not on the PATH."""
    if shutil.which("nvcc") is None and "CUDA_HOME" in os.environ:
        os.environ["PATH"] += os.pathsep + os.path.join(os.environ["CUDA_HOME"], "bin")
