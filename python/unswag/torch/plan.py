"""The planner: how to train a model in a given memory, from shapes alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unswag import sizes
from unswag.plans import MEMORIES, Option, Plan
from unswag.torch import scratch
from unswag.torch.blueprint import Blueprint, blueprint, model_of
from unswag.torch.forecast import Forecast
from unswag.torch.optimizers import OPTIMIZERS
from unswag.torch.ways import STOCK, WAYS, Way, checkpoint_layers, prepared

__all__ = ["Case", "forecasts_of", "machine_memory", "plan", "plan_of", "prepare_for"]

LONGEST = 1 << 26  # tokens: no plan is for more
STEP = 64  # a longest context is a multiple of it
MOST_ALIVE = 40


def plan(
    model: nn.Module | str | Path | dict[str, Any] | Any,
    memory: str | int = "16GiB",
    context: int | None = None,
    *,
    batch: int = 1,
    host_memory: str | int | None = None,
    disk: str | int | None = None,
    lora: int | None = None,
    weights: str | None = None,
    optimizer: str = "adamw",
    lossy: bool = False,
    device: str | None = None,
    compare: bool = False,
) -> Plan:
    """How to train `model` in `memory`: the longest context that fits, or for a given `context` the fastest way that fits.

    model        a module with data or on the meta device, a config of transformers, a dict of its values, or a folder, a
                 config.json or a name that transformers knows. It is not touched, and no weights are read
    memory       of the device: bytes, or a text such as "16GiB" or "24GB". On a CPU, of the process
    context      tokens of each sequence;  batch  sequences of a step
    host_memory, disk   what checkpoints may take there; None: nothing
    lora         rank of adapters on all Linears but the head, by PEFT; None: the model is trained as it is
    weights      "nf4": 4-bit weights, as bitsandbytes keeps them (with `lora`); None: as they are
    optimizer    "adamw", "adamw_8bit" or "sgd"
    lossy        also propose codecs that change gradients; else all ways are exact
    compare      also say what the stock model takes, with and without checkpointing
    device       "cuda" or "cpu"; None: where the model's weights are, and "cuda" where they are nowhere

    The model's own code runs, with UnSwag's surgery, on tensors without data, at two lengths and with few layers that stand for
    the rest. The peak is the highest instant of forward, loss, backward and optimizer step, plus what is there all the time.
    Kernel scratch is a model (`unswag.torch.scratch`).

    ValueError for a size, a device or an optimizer that is not known; RuntimeError for a model that does not run without data.
    """
    limits = {"device": sizes.bytes_of(memory, "memory"), "pinned": None, "host": None, "disk": None}
    limits["host"] = None if host_memory is None else sizes.bytes_of(host_memory, "host_memory")
    limits["disk"] = None if disk is None else sizes.bytes_of(disk, "disk")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"plan: optimizer={optimizer!r}; choose one of {', '.join(map(repr, OPTIMIZERS))}")
    if device not in (None, "cuda", "cpu"):
        raise ValueError(f"plan: device={device!r}; choose 'cuda' or 'cpu'")
    for name, number in (("context", context), ("batch", batch), ("lora", lora)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"plan: {name}={number!r}; pass a positive whole number")
    if weights is not None and lora is None:
        raise ValueError(f"plan: weights={weights!r} cannot be trained; pass lora=16 (or another rank) too")
    made = model_of(model)
    stands_on = next((p.device.type for p in made.parameters()), "meta")
    case = Case(
        blueprint(made, lora, weights), batch, device or ("cuda" if stands_on == "meta" else stands_on), optimizer, limits
    )
    words = f"LoRA of rank {lora}" if lora else ("as its parameters require" if _partly(made) else "full training")
    return plan_of(
        case, list(forecasts_of(case, lossy, context, compare)), context, words + (f" on {weights} weights" if weights else "")
    )


@dataclass
class Case:
    """What is to be trained, where, and in how much."""

    blueprint: Blueprint
    batch: int
    device: str
    optimizer: str
    limits: dict[str, int | None]

    def __post_init__(self) -> None:
        self.weights = self.blueprint.bytes_of_weights()
        trained = list(self.blueprint.parameters(True))
        self.states = OPTIMIZERS[self.optimizer].held(trained)
        self.optimizer_step = OPTIMIZERS[self.optimizer].step(trained, self.device)
        self.trains_weights = sum(n * p.numel() for n, p in trained) > 0.5 * self.weights / 2

    def always(self, way: Way) -> int:
        """Bytes on the device that are there all the time."""
        return self.weights + self.states + scratch.fixed(self.device, self.trains_weights, way.recompute)

    def at(self, forecast: Forecast, tokens: int) -> tuple[int, str]:
        """(peak on the device, its instant), of a step in the middle of training."""
        peak, end = forecast.peak(tokens), forecast.at_end(tokens) + self.optimizer_step
        held, instant = (end, "the optimizer's step") if end > peak.held else (peak.held, str(peak.instant))
        return self.always(forecast.way) + held, instant

    def fits(self, forecast: Forecast, tokens: int) -> bool:
        allocated = self.at(forecast, tokens)[0]
        limit, tier = self.limits["device"], forecast.way.tier
        if tier and forecast.stored(tokens) > (self.limits[tier] or 0):
            return False
        return limit is not None and (scratch.reserved(allocated) if self.device == "cuda" else allocated) <= limit

    def longest(self, forecast: Forecast) -> int:
        """The most tokens that fit, a multiple of `STEP`; 0 if none does."""
        low, high = 0, LONGEST // STEP
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(forecast, middle * STEP) else (low, middle - 1)
        return low * STEP


def forecasts_of(case: Case, lossy: bool, context: int | None, compare: bool) -> Iterator[Forecast]:
    """One for each way that is allowed; with `compare`, the stock ways before them."""
    model, before = case.blueprint.model, None
    for way in (*(STOCK if compare else ()), *sorted(WAYS, key=lambda way: str((way.surgery or {}).get("policy")))):
        if (way.lossy and not lossy) or (way.tier and case.limits[way.tier] is None):
            continue
        if way.tier == "host" and case.device == "cpu":
            continue  # that is the device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers and PEFT, about a model that nobody trains
            try:
                prepared(model, way, before)
                before = way
                yield Forecast(case.blueprint, way, case.batch, case.device, context)
            except Exception as error:  # of the model's own code, on tensors without data
                raise RuntimeError(
                    f"plan: {case.blueprint.name} does not run without data ({way.name}): {type(error).__name__}: {error}"
                ) from error


def plan_of(case: Case, forecasts: list[Forecast], context: int | None, training: str) -> Plan:
    """The best of the forecasts for a context, or for the longest."""
    longest = {f.way.name: case.longest(f) for f in forecasts}
    ours = [f for f in forecasts if f.way not in STOCK]
    ranked = sorted(ours, key=lambda f: (f.way.lossy, f.way.cost(case.trains_weights)))
    furthest = max(ranked, key=lambda f: longest[f.way.name])  # the first of equals, which costs least
    limit = sizes.show(case.limits["device"] or 0)
    fitting = [f for f in ranked if context is not None and longest[f.way.name] >= context]
    fits = True
    if context is None:
        chosen, tokens = furthest, longest[furthest.way.name]
        reason = f"{chosen.way.name} reaches the longest context in {limit}"
        if not tokens:
            fits, tokens = False, STEP
            reason = f"not even {STEP} tokens fit in {limit}: without any, {sizes.show(case.always(chosen.way))} are taken"
    elif fitting:
        chosen, tokens = fitting[0], context
        faster = [f.way.name for f in ranked if f.way.cost(case.trains_weights) < chosen.way.cost(case.trains_weights)]
        reason = f"{chosen.way.name} is the fastest way that fits in {limit}"
        reason += f"; faster and too large: {', '.join(faster)}" if faster else ""
    else:
        chosen, tokens, fits = furthest, context, False
        reason = f"{context:,} tokens do not fit in {limit}; {chosen.way.name} would reach {longest[chosen.way.name]:,}"
        reason += f", or take {sizes.show(_needed(case, chosen, tokens))}"
    device, instant = case.at(chosen, tokens)
    return Plan(
        model=case.blueprint.name, device=case.device, context=tokens, batch=case.batch,
        peak=_by_memory(case, chosen, tokens, device),
        reserved=_needed(case, chosen, tokens), instant=instant,
        alive=chosen.peak(tokens).alive(case.blueprint)[:MOST_ALIVE], choices=dict(chosen.way.choices), reason=reason,
        step_cost=round(chosen.way.cost(case.trains_weights), 2), fits=fits, limits=case.limits, weights=case.weights,
        states=case.states, way=chosen.way.name, training=training,
        options=[_option(case, f, tokens, longest[f.way.name]) for f in (*forecasts[: -len(ours)], *ranked)],
        surgery=dict(chosen.way.surgery or {}), checkpointing=chosen.way.recompute,
    )  # fmt: skip


def _needed(case: Case, forecast: Forecast, tokens: int) -> int:
    allocated = case.at(forecast, tokens)[0]
    return scratch.reserved(allocated) if case.device == "cuda" else allocated


def _option(case: Case, forecast: Forecast, tokens: int, longest: int) -> Option:
    way = forecast.way
    here, further = (case.at(forecast, n)[0] for n in (tokens, 2 * tokens))
    slope = (further - here) / tokens
    return Option(
        way.name, way not in STOCK, way.lossy, longest, _by_memory(case, forecast, tokens, here),
        round(way.cost(case.trains_weights), 2),
        (here - slope * tokens, slope),
    )  # fmt: skip


def _by_memory(case: Case, forecast: Forecast, tokens: int, device: int) -> dict[str, int]:
    """A store in host memory is page-locked where there is CUDA."""
    where = {"": "", "disk": "disk", "host": "pinned" if case.device == "cuda" else "host"}[forecast.way.tier]
    return {memory: device if memory == "device" else forecast.stored(tokens) * (memory == where) for memory in MEMORIES}


def _partly(model: nn.Module) -> bool:
    return not all(p.requires_grad for p in model.parameters())


def prepare_for(model: nn.Module, plan: Plan) -> None:
    """Before the surgery of a plan: refuses one that this machine does not hold, and switches checkpointing on.

    ValueError for a plan that does not fit its own limits, or the machine."""
    if not plan.fits:
        raise ValueError(f"apply_unswag_surgery: the plan does not fit: {plan.reason}")
    here = machine_memory(next((p.device for p in model.parameters()), torch.device("cpu")))
    if here is not None and plan.reserved > here:
        room = plan.reserved - here
        slope = next(option.line[1] for option in plan.options if option.name == plan.way)
        tokens = max(0, plan.context - int(room / slope)) // STEP * STEP
        raise ValueError(
            f"apply_unswag_surgery: the plan takes {sizes.show(plan.reserved)} on the device, and "
            f"this one has {sizes.show(here)}; about {tokens:,} tokens would fit: "
            f"unswag.plan(model, memory='{here // 2**20}MiB')"
        )
    checkpoint_layers(model, plan.checkpointing)


def machine_memory(device: torch.device) -> int | None:
    """Bytes that this device has in all; of a CPU, what the system, a control group or a limit of this process leaves it. None
    where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    from unswag.memory import of_process

    return of_process()
