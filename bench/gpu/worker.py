"""A process that does the pieces of one stage, one JSON line for each: a fault on the GPU ends it and not the stage.

Reads {"piece", "settings", "known"} from stdin; writes {"part", "value"} as they come and {"result"} or {"error"} in the end.
The piece "machine" describes the machine.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import traceback
from typing import Any, TextIO

from bench import smollm2
from bench.gpu.stage import Notes, NotMeasured, Settings, release

PACKAGES = ("triton", "jax", "jaxlib", "liger-kernel", "nanobind", "accelerate")
TOOLS = {
    "nvcc": ["nvcc", "--version"],
    "cmake": ["cmake", "--version"],
    "compute-sanitizer": ["compute-sanitizer", "--version"],
}


def machine(settings: Settings) -> dict[str, Any]:
    """What a figure depends on."""
    import torch

    found = smollm2.machine() | {"cuda": torch.version.cuda, "gpu": "none (dry run)" if settings.dry else None}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    for name, command in TOOLS.items():
        path = shutil.which(name)
        said = subprocess.run(command, capture_output=True, text=True).stdout.split("\n") if path else []
        found[name] = next((line.strip() for line in said if "ersion" in line or "release" in line), None)
    if settings.cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "architecture": f"sm_{properties.major}{properties.minor}",
            "gpu_memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "driver": driver(),
        }
    return found


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or None


def serve(stage: Any, requests: TextIO, answers: TextIO) -> None:
    turn = threading.Lock()  # the sides of a piece may run in threads

    def send(message: dict[str, Any]) -> None:
        with turn:
            print(json.dumps(message), file=answers, flush=True)

    for line in requests:
        request = json.loads(line)
        settings = Settings(**request["settings"])
        notes = Notes(request["known"], lambda key, value: send({"part": key, "value": value}))
        try:
            if request["piece"] == "machine":
                result = machine(settings)
            else:
                result = stage.run(request["piece"], settings, notes)
                release(settings.device)
        except NotMeasured as why:
            result = {"not_measured": [str(why)]}
        except Exception as error:
            traceback.print_exc()
            send({"error": f"{type(error).__name__}: {error}"[:2000]})
            continue
        send({"result": result})


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is progress
    serve(importlib.import_module(sys.argv[1]), sys.stdin, answers)


if __name__ == "__main__":
    main()
