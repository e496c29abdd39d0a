"""A copy with non-temporal stores: the yardstick of memory-bound kernels (glibc's memcpy is no such thing on every machine)."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

from bench.native import compiled


class Copy:
    """`copy(to, from, bytes)` with as many threads as were asked for."""

    def __init__(self, threads: int) -> None:
        self._copy = compiled("copy.cpp", "-mavx2").copy
        self._copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self, to: int, source: int, size: int) -> None:
        part = size // self._threads // 64 * 64
        futures = [self._pool.submit(self._copy, to + b, source + b, part) for b in range(part, part * self._threads, part)]
        self._copy(to, source, part)
        for future in futures:
            future.result()
