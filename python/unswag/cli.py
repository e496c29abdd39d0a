"""The command `unswag`. Results go to stdout; exit code 0, or 2 for an argument that is not understood."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from unswag import doctor as examination

app = typer.Typer(add_completion=False, no_args_is_help=True)


def main() -> None:
    """What the console script calls."""
    app(prog_name="unswag")


@app.callback()
def _unswag() -> None:
    """UnSwag makes training fit: it keeps what the backward pass needs in the smallest exact form."""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what this machine has and what UnSwag will use on it.

    Processor and kernels, memory, versions, CUDA devices and TPUs; then implementation, layout and protocol per activation.
    Nothing is trained or changed, and what is missing is no failure: it stands under the notes.
    """
    found = examination.examine()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _show(found, Console())


def _show(found: dict[str, Any], console: Console) -> None:
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

    protocols = Table(title="Protocols", title_justify="left")
    for column in ("activation", "accelerator", "protocol", "bits", "why"):
        protocols.add_column(column)
    for one in found["protocols"]:
        bits = str(one["bits"] or "of the dtype")
        protocols.add_row(one["activation"], one["accelerator"], one["name"], bits, one["why"])
    console.print(protocols)
    for note in found["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)


def _device(device: dict[str, Any]) -> str:
    memory = f", {device['memory'] / 2**30:.1f} GiB" if "memory" in device else ""
    unused = ": not used, see the notes" if device.get("problem") else ""
    return f"{device['name']} ({device['architecture']}{memory}){unused}"
