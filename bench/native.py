"""C++ that a benchmark needs beside the library, compiled when first used and kept in .cache/."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from bench.smollm2 import ROOT

FLAGS = ["-O3", "-std=c++20", "-shared", "-fPIC"]


def compiled(name: str, *flags: str) -> ctypes.CDLL:
    """bench/<name>, as a shared library; made again when the source or the flags change."""
    source = ROOT / "bench" / name
    key = hashlib.sha256(source.read_bytes() + " ".join(flags).encode() + _cpu()).hexdigest()[:16]
    library = ROOT / ".cache" / "native" / f"{source.stem}-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as made:
            whole = Path(made) / library.name
            subprocess.run(["g++", *FLAGS, *flags, str(source), "-o", str(whole)], check=True)
            os.replace(whole, library)  # complete or not at all
    return ctypes.CDLL(str(library))


def _cpu() -> bytes:
    """What -march=native depends on."""
    with open("/proc/cpuinfo") as f:
        return next((line for line in f if line.startswith("flags")), "").encode()
