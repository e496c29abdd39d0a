"""unswag doctor: what this machine has, as `unswag.doctor` finds it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from unswag.doctor import examine


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what works on this machine, what was never run on hardware of its kind, and what to do next.

    Then the facts: processor and kernels, memory, versions, CUDA devices and TPUs; what PyTorch and JAX will use; what is kept
    of the input of each activation. Nothing is trained or changed. What is missing is no failure: the notes say what it is.
    """
    found = examine()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _show(found, Console(markup=False, highlight=False))


def _show(found: dict[str, Any], console: Console) -> None:
    for words, what in (("Works here", "works"), ("Not run yet", "untested"), ("Next", "next")):
        console.print(f"{words + ':':<13}{found['verdict'][what]}", soft_wrap=True)
    console.print()

    machine = Table(title="What was found", title_justify="left", show_header=False)
    cpu, kernels, memory = found["cpu"], found["kernels"], found["memory"]
    machine.add_row("processor", f"{cpu['model']}, {cpu['cores']} cores")
    machine.add_row("instruction sets", " ".join(cpu["instruction_sets"]) or "–")
    machine.add_row("kernels", f"{kernels['chosen']} of {', '.join(kernels['run_here'])}" if kernels else "–")
    machine.add_row("memory", f"{memory['total'] / 2**30:.1f} GiB" if memory else "–")
    machine.add_row("CUDA kernels", " ".join(kernels.get("cuda", [])) or "none in this build")
    for kind, devices in (("CUDA", found["cuda"]), ("TPU", found["tpu"])):
        machine.add_row(kind, "\n".join(map(_device, devices)) or "none")
    machine.add_row("unswag", found["unswag"])
    for name, version in found["versions"].items():
        machine.add_row(name, version or "not installed")
    console.print(machine)

    used = Table(title="What will be used", title_justify="left")
    for column in ("front end", "accelerator", "implementation", "layout"):
        used.add_column(column)
    for front_end, use in found["uses"].items():
        used.add_row(front_end, use["accelerator"], use["implementation"], use["layout"])
    console.print(used)

    protocols = Table(title="What is kept of an activation's input", title_justify="left", show_header=False)
    alike: dict[tuple[str, str], dict[str, None]] = {}
    for one in found["protocols"]:
        bits = f"{one['bits']} bit{'s' if one['bits'] > 1 else ''}" if one["bits"] else "its own dtype"
        alike.setdefault((f"{one['name']}: {bits}", one["why"]), {})[one["activation"]] = None
    for (kept, why), activations in alike.items():
        protocols.add_row(kept, f"{', '.join(activations)}: {why}")
    console.print(protocols)
    for note in found["notes"]:
        console.print(f"note: {note}")


def _device(device: dict[str, Any]) -> str:
    memory = f", {device['memory'] / 2**30:.1f} GiB" if "memory" in device else ""
    unused = ": not used, see the notes" if device.get("problem") else ""
    return f"{device['name']} ({device['architecture']}{memory}){unused}"
