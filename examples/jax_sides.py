"""What the JAX examples share: one model trained with jax.nn.relu and with unswag_relu, and a comparison of the two."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from unswag import Ledger, unswag_relu

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"jax.nn.relu": jax.nn.relu, "unswag_relu": unswag_relu}
COLORS = {"jax.nn.relu": "#8a8f98", "unswag_relu": "#d9480f"}

Loss = Callable[..., jax.Array]  # (parameters, *batch) → scalar


@dataclass
class Side:
    name: str
    losses: np.ndarray  # one a step, float32
    seconds: float  # per step, the median without the first
    parameters: Any  # after the last step


def train(name: str, loss: Loss, parameters: Any, batches: Sequence[tuple[Any, ...]], rate: float, every: int = 10) -> Side:
    """Trains with Adam over the batches; prints the loss every `every` steps."""
    optimizer = optax.adam(rate)

    @jax.jit
    def step(parameters: Any, state: Any, *batch: Any) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(parameters, *batch)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, value

    state, losses, ends = optimizer.init(parameters), [], []
    for i, batch in enumerate(batches, start=1):
        parameters, state, value = step(parameters, state, *batch)
        losses.append(np.float32(value))
        ends.append(time.monotonic())
        if i % every == 0 or i == len(batches):
            print(f"{name:12} step {i:4} of {len(batches)}, loss {losses[-1]:.4f}", flush=True)
    seconds = float(np.median(np.diff(ends))) if len(ends) > 1 else float("nan")
    return Side(name, np.asarray(losses), seconds, parameters)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def report(out: Path, title: str, sides: list[Side], kept: dict[str, dict[str, Ledger]], unit: str) -> dict[str, Any]:
    """Prints the table; writes result.json and picture.png. `kept` has for each way of training the ledger of each side."""
    from rich.console import Console
    from rich.table import Table

    stock, ours = sides
    found: dict[str, Any] = {
        "steps": len(stock.losses),
        "losses": {side.name: [float(value) for value in side.losses] for side in sides},
        "seconds_per_step": {side.name: side.seconds for side in sides},
        "equal_losses": int(np.sum(stock.losses.view(np.uint32) == ours.losses.view(np.uint32))),
        "equal_parameters": bits(stock.parameters) == bits(ours.parameters),
        "kept_bytes": {way: {name: ledger.total for name, ledger in both.items()} for way, both in kept.items()},
        f"kept_bytes_per_{unit}": {
            way: {name: ledger.bytes_per_token for name, ledger in both.items()} for way, both in kept.items()
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(found, indent=1) + "\n")
    table = Table(title=title, title_justify="left")
    for column in ("", stock.name, ours.name):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("loss, first step", *(f"{side.losses[0]:.6f}" for side in sides))
    table.add_row("loss, last step", *(f"{side.losses[-1]:.6f}" for side in sides))
    table.add_row("steps whose loss is equal to the bit", "", f"{found['equal_losses']} of {found['steps']}")
    table.add_row("parameters at the end", "", "equal to the bit" if found["equal_parameters"] else "not equal to the bit")
    table.add_row("seconds per step", *(f"{side.seconds:.3f}" for side in sides))
    for way, both in kept.items():
        table.add_row(f"kept for backward, bytes per {unit}, {way}", *(f"{both[s.name].bytes_per_token:,.0f}" for s in sides))
    Console(width=110).print(table)
    _picture(out / "picture.png", sides, kept, unit)
    print(f"result.json and picture.png are in {out}")
    return found


def _picture(path: Path, sides: list[Side], kept: dict[str, dict[str, Ledger]], unit: str) -> None:
    """The losses, and what is kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    loss, memory = figure.subplots(1, 2)
    for side, width in zip(sides, (4, 1.2), strict=True):  # the second line lies on the first
        loss.plot(range(1, len(side.losses) + 1), side.losses, color=COLORS[side.name], linewidth=width, label=side.name)
    loss.set(title="loss", xlabel="step")
    loss.legend()
    for i, side in enumerate(sides):
        values = [both[side.name].bytes_per_token for both in kept.values()]
        places = [j + 0.4 * i for j in range(len(values))]
        bars = memory.bar(places, values, 0.38, color=COLORS[side.name], label=side.name)
        memory.bar_label(bars, fmt="{:,.0f}")
    memory.set_xticks([j + 0.2 for j in range(len(kept))], list(kept))
    memory.set(title=f"kept for backward, bytes per {unit}", ylim=(0, memory.get_ylim()[1] * 1.12))
    for axes in (loss, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
