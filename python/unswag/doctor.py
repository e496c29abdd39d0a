"""What this machine has and what UnSwag will use on it, as plain data. Framework-neutral.

Versions are read from package metadata. Of the frameworks, JAX is imported if it is installed, because only JAX knows its
platform, and PyTorch if the driver of an NVIDIA device is found.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import unswag
from unswag.policy import protocol, protocols

__all__ = ["examine"]

PACKAGES = ("numpy", "torch", "transformers", "peft", "jax", "jaxlib", "libtpu", "flax", "equinox")
INSTRUCTION_SETS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_bf16",
    "neon", "asimd", "asimdhp", "bf16", "sve", "sve2",
)  # fmt: skip
# How kernels were tested so far, where it was not on hardware of their own kind.
TESTED = {
    "cuda": "CUDA kernels (tested emulated, on host threads)",
    "tpu": "TPU programs (compiled only)",
}
TPU_GENERATIONS = {  # what jax calls its devices
    "TPU v2": "v2", "TPU v3": "v3", "TPU v4": "v4", "TPU v4 lite": "v4i", "TPU v5 lite": "v5e", "TPU v5e": "v5e",
    "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "v7x",
}  # fmt: skip


def examine() -> dict[str, Any]:
    """Everything that was found, ready for JSON. Raises nothing: what could not be found out is in "notes"."""
    notes: list[str] = []

    def attempt(what: str, probe: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return probe()
        except Exception as error:
            notes.append(f"{what}: {type(error).__name__}: {error}")
            return otherwise

    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    found: dict[str, Any] = {
        "unswag": unswag.__version__,
        "cpu": attempt("processor", _cpu, {"model": "unknown", "cores": os.cpu_count(), "instruction_sets": []}),
        "memory": attempt("memory", _memory, {}),
        "kernels": attempt("kernels", _kernels, {}),
        "versions": versions,
        "cuda": [],
        "tpu": [],
        "uses": {},
    }
    if _nvidia() and versions["torch"]:
        found["cuda"] = attempt("CUDA", _cuda, [])
    if versions["jax"]:
        use, jax_cuda, found["tpu"] = attempt("JAX", _jax, (None, [], []))
        found["cuda"] = found["cuda"] or jax_cuda
        if use:
            found["uses"]["jax"] = use
    if _nvidia() and not found["cuda"]:
        notes.append(
            "the driver of an NVIDIA device is installed, but neither torch nor jax finds a device: install one of them with "
            "CUDA support (pip install torch, pip install 'jax[cuda12]')"
        )
    for device in found["cuda"]:
        device["problem"] = attempt(f"CUDA device {device['index']}", partial(_cuda_problem, device["index"]), "unknown")
        if device["problem"]:
            notes.append(f"no kernels run on CUDA device {device['index']}: {device['problem']}")
    if versions["torch"]:
        on_cuda = any(not device["problem"] for device in found["cuda"])
        row = "cuda" if on_cuda else found["kernels"].get("chosen", "none")
        use = {"accelerator": "cuda" if on_cuda else "cpu", "implementation": f"native, {row}", "layout": "rows"}
        found["uses"] = {"torch": use} | found["uses"]
    used = [use["accelerator"] for use in found["uses"].values()]
    accelerators = list(dict.fromkeys([*(["cpu"] if versions["torch"] or not used else []), *used]))
    found["protocols"] = [
        {"activation": activation, "accelerator": accelerator} | asdict(protocol(activation, accelerator))
        for accelerator in accelerators
        for activation in attempt("activations", protocols, ())
    ]
    return {"unswag": found.pop("unswag"), "verdict": _verdict(found)} | found | {"notes": list(dict.fromkeys(notes))}


def _verdict(found: dict[str, Any]) -> dict[str, str]:
    """What works here, what of it was never run on such hardware, and what to do next: a sentence or two each."""
    uses, kernels = found["uses"], found["kernels"]
    names = {"torch": "PyTorch", "jax": "JAX"}
    where = {"cpu": "the CPU", "cuda": "CUDA devices", "tpu": "TPUs"}
    works = [
        f"{names[front_end]} on {where[use['accelerator']]} ({use['implementation']})"
        for front_end, use in uses.items()
        if front_end != "torch" or kernels
    ]
    used = {use["accelerator"] for use in uses.values()}
    if kernels.get("cuda"):
        used.add("cuda")
    untested = [words for name, words in TESTED.items() if name in used]
    if not kernels:
        following = "the compiled module unswag._core cannot be used, the notes say why; build it again: pip install ."
    elif any(device["problem"] for device in found["cuda"]):
        following = "a CUDA device is not used; the notes say why"
    elif not uses:
        following = "install a framework; in the folder of UnSwag's sources: pip install '.[torch]' or pip install '.[jax]'"
    elif "cuda" in {use["accelerator"] for use in uses.values()}:
        following = "run make gpu-check in the folder of UnSwag's sources: it tries every kernel on this device (docs/gpu.md)"
    elif "torch" in uses:
        following = "unswag.apply_unswag_surgery(model), then unswag.audit(model, **batch) shows what is kept"
    else:
        following = "call unswag.jax.relu and its like in your model; unswag.audit(function, *arguments) shows what is kept"
    return {
        "works": "; ".join(works) or "nothing yet",
        "untested": "; ".join(untested) or "nothing that is used here",
        "next": following,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    lines = _fields(Path("/proc/cpuinfo")) if sys.platform == "linux" else {}
    flags = (lines.get("flags") or lines.get("Features") or "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = lines.get("model name") or platform.processor() or platform.machine()
    return {"model": model, "cores": cores, "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags]}


def _memory() -> dict[str, int]:
    """Bytes."""
    if sys.platform == "linux":
        lines = _fields(Path("/proc/meminfo"))
        return {
            name: int(lines[field].split()[0]) * 1024 for name, field in (("total", "MemTotal"), ("available", "MemAvailable"))
        }
    return {"total": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}


def _fields(path: Path) -> dict[str, str]:
    """`name: value` of a file in /proc, the first of each name."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found


def _kernels() -> dict[str, Any]:
    from unswag import _core

    rows = [row for row in _core.backend_names() if _core.backend_runs_here(row)]
    if (named := os.environ.get("UNSWAG_BACKEND")) and named not in rows:
        raise ValueError(
            f"UNSWAG_BACKEND is {named!r}, so that every call is an error; choose among {', '.join(rows)}, or unset it"
        )
    return {
        "rows": list(_core.backend_names()),
        "run_here": rows,
        "chosen": _core.current_backend(),
        "threads": _core.default_threads(),
        "cuda": list(_core.cuda_architectures()),
    }


def _nvidia() -> bool:
    """Whether the driver of an NVIDIA device is there (the last one: under WSL)."""
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def _cuda() -> list[dict[str, Any]]:
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        architecture = f"sm_{properties.major}{properties.minor}"
        memory = properties.total_memory
        found.append({"index": i, "name": properties.name, "architecture": architecture, "memory": memory})
    return found


def _cuda_problem(index: int) -> str:
    """Why the kernels of this build cannot run on this device; "" if they can."""
    from unswag import _core

    return _core.cuda_problem(index)


def _jax() -> tuple[dict[str, str], list[dict[str, Any]], list[dict[str, Any]]]:
    """What the JAX front end uses for large arrays; the CUDA devices, and the TPUs, that it finds."""
    import jax

    from unswag.jax import how

    backend = jax.default_backend()
    accelerator = {"gpu": "cuda", "tpu": "tpu"}.get(backend, "cpu")
    use = how.choose("relu", jax.ShapeDtypeStruct((4096, 4096), "float32"), None, None)  # type: ignore[arg-type]
    devices = jax.local_devices() if accelerator != "cpu" else []
    cuda = [
        {"index": d.local_hardware_id, "name": d.device_kind, "architecture": f"sm_{d.compute_capability.replace('.', '')}"}
        for d in devices
        if accelerator == "cuda"
    ]
    kinds = [d.device_kind for d in devices if accelerator == "tpu"]
    tpus = [{"name": kind, "architecture": TPU_GENERATIONS.get(kind, "unknown generation")} for kind in kinds]
    return {"accelerator": accelerator, "implementation": use.implementation or "ffi", "layout": use.layout}, cuda, tpus
