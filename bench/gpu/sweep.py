"""Every kernel once for each dtype, tail and layout, small enough for compute-sanitizer: the program that stage 2 watches.

    python -m bench.gpu.sweep --device cuda

Inputs are made on the CPU and copied, so that few kernels but ours run. Prints how many calls were made, as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from bench.gpu import samples
from bench.gpu.samples import DTYPES, OPS, arguments, call

# One element; tails around the 8 that a thread takes and the 32 of a packed word; more than one block; columns that are no
# multiple of a vector.
SHAPES = ((1, 1, 1), (2, 3, 7), (1, 2, 33), (2, 2, 1027), (1, 3, 2048), (1, 2, 4099))
STRIDED = (2, 3, 33)


def sweep(device: str) -> dict[str, Any]:
    start, calls, unsupported = time.perf_counter(), 0, set()
    for op in OPS:
        for dtype in DTYPES:
            try:
                for shape in SHAPES:
                    for args in arguments(op, dtype, shape):
                        _once(op, args, device)
                        calls += 1
                for lay in (samples.columns, samples.odd_offset):
                    for args in arguments(op, dtype, STRIDED):
                        _once(op, args, device, lay)
                        calls += 1
            except NotImplementedError as error:
                unsupported.add(f"{op} {dtype}: {error}")
    return {"calls": calls, "unsupported": sorted(unsupported), "seconds": round(time.perf_counter() - start, 1)}


def _once(op: str, args: tuple[Any, ...], device: str, lay: samples.Layout | None = None) -> None:
    """Views are cut on the device from what was copied there, so that all of it is initialised."""
    given = []
    for a in args:
        if isinstance(a, torch.Tensor) and lay is not None:
            laid = lay(a)
            base = torch.as_strided(laid, (laid.untyped_storage().nbytes() // laid.element_size(),), (1,), 0)
            given.append(base.to(device, copy=True).as_strided(laid.shape, laid.stride(), laid.storage_offset()))
        else:
            given.append(a.to(device, copy=True) if isinstance(a, torch.Tensor) else a)
    for out in call(op, tuple(given)):
        out.cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    print(json.dumps(sweep(parser.parse_args().device)))


if __name__ == "__main__":
    main()
