"""A model without its weights, and with few of its layers: what the planner runs in place of the whole model.

Layers of one kind (the same code, settings and shapes) take the same memory. So of each kind the first and the last layer stay,
and two of each run of like layers between them; the two stand for all that were left out (`Blueprint.left_out`). All parameters
are zero pages, which take no memory until somebody writes to them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unswag.torch.operation import take_back
from unswag.torch.patterns.probing import setting

__all__ = ["Blueprint", "blueprint", "config_of_model", "model_of"]

NF4_BLOCK, NF4_NESTED = 64, 256  # weights per scale of 8 bits; scales per float32, as bitsandbytes' double quantisation has it


@dataclass
class Blueprint:
    """`model` stands for a whole model.

    left_out  {(name of a layer, name of the next of its kind): n}: n layers more are like each of these two
    name      of the model's class;  layers  of the whole model
    """

    model: nn.Module
    left_out: dict[tuple[str, str], int] = field(default_factory=dict)
    name: str = ""
    layers: int = 0

    def times(self, name: str) -> float:
        """How many parameters (or modules) of the whole model one of this name stands for: 1, or more inside a layer that
        stands for others. The two layers of a pair share what was left out, so it may be half a number."""
        for pair, n in self.left_out.items():
            if any(name == layer or name.startswith(f"{layer}.") for layer in pair):
                return 1 + n / 2
        return 1

    def bytes_of_weights(self) -> int:
        """Of all parameters and buffers of the whole model, each storage once."""
        return round(sum(self.times(name) * t.untyped_storage().nbytes() for name, t in self._tensors()))

    def parameters(self, trained: bool) -> Iterator[tuple[float, nn.Parameter]]:
        """(how many of the whole model it stands for, parameter)."""
        for name, t in self._tensors():
            if isinstance(t, nn.Parameter) and t.requires_grad == trained:
                yield self.times(name), t

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        seen: set[int] = set()
        for name, t in (*self.model.named_parameters(), *self.model.named_buffers()):
            if (key := t.untyped_storage()._cdata) not in seen:
                seen.add(key)
                yield name, t


def config_of_model(model: str | Path | dict[str, Any] | Any) -> Any:
    """The config of transformers: itself, of a dict of its values with `model_type`, of a folder, a config.json or a name.

    ValueError for a path that does not exist and for what is no config; OSError as transformers raises it for a name.
    """
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        if path.is_file():
            model = json.loads(path.read_text())
        elif not path.is_dir() and (path.is_absolute() or str(model).startswith(".")):
            raise ValueError(f"model={str(model)!r}: there is no such folder or file")
        else:
            model = AutoConfig.from_pretrained(str(model))
    if isinstance(model, dict):
        values = dict(model)
        if "model_type" not in values:
            raise ValueError("model: the config has no model_type, which names its architecture; pass a config of transformers")
        model = AutoConfig.for_model(values.pop("model_type"), **values)
    if not isinstance(model, PretrainedConfig):
        raise TypeError(f"model is a {type(model).__name__}; pass a module, a config, a folder or a name of transformers")
    return model


def model_of(model: nn.Module | str | Path | dict[str, Any] | Any, dtype: torch.dtype | None = None) -> nn.Module:
    """A causal language model without data, of what `config_of_model` takes; a module passes through. No weights are read."""
    if isinstance(model, nn.Module):
        return model
    from transformers import AutoModelForCausalLM

    config = config_of_model(model)
    dtype = dtype or getattr(config, "dtype", None) or torch.bfloat16
    with torch.device("meta"):
        made: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return made


def blueprint(model: nn.Module, lora: int | None = None, weights: str | None = None, whole: bool = False) -> Blueprint:
    """The blueprint of `model`, which is not touched and may be on the meta device.

    lora     rank of adapters on all Linears but the head, made by PEFT with its defaults; None: as the model is
    weights  "nf4": Linears but the head have 4-bit weights, as bitsandbytes keeps them (doubly quantised); None: as they are
    whole    all layers stay

    ModuleNotFoundError for `lora` without PEFT; ValueError for unknown `weights`.
    """
    if weights not in (None, "nf4"):
        raise ValueError(f"plan: weights={weights!r}; pass 'nf4', or None for the weights as they are")
    with _without_data(model) as memo:
        made = copy.deepcopy(model, memo)
    take_back(made)
    left_out, layers = _thin(made, whole)
    for module in made.modules():
        for tensors in (module._parameters, module._buffers):
            for key, t in tensors.items():
                if t is not None and t.is_meta:
                    tensors[key] = _zeros_like(t)  # type: ignore[assignment]
    _tie(made)
    if weights is not None:
        _pack(made)
    if lora is not None:
        made = _with_lora(made, lora)
        left_out = {(_inside(made, a), _inside(made, b)): n for (a, b), n in left_out.items()}
    made.train()
    return Blueprint(made, left_out, type(model).__name__, layers)


# ---- without data -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_data(model: nn.Module) -> Iterator[dict[int, Any]]:
    """A memo for deepcopy in which parameters and buffers are on the meta device; packed weights, which only their own
    library can copy, are shared."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        plain = type(p) is nn.Parameter
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) if plain else p
    for b in model.buffers():
        memo[id(b)] = b.detach().to("meta")
    gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    try:
        for p, _ in gradients:
            p.grad = None
        yield memo
    finally:
        for p, gradient in gradients:
            p.grad = gradient


def _zeros_like(t: torch.Tensor) -> torch.Tensor:
    """Zeros that the system gives when they are read: numpy asks calloc, torch.zeros would write them."""
    pages = torch.from_numpy(np.zeros(max(1, t.numel() * t.element_size()), np.uint8))[: t.numel() * t.element_size()]
    made = pages.view(t.dtype).view(t.shape)
    return nn.Parameter(made, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else made


def _tie(model: nn.Module) -> None:
    """Parameters that were one on the meta device are one again."""
    for module in model.modules():
        if hasattr(module, "tie_weights"):
            module.tie_weights()  # type: ignore[operator]
            return


# ---- fewer layers -----------------------------------------------------------------------------------------------------------


def _thin(model: nn.Module, whole: bool) -> tuple[dict[tuple[str, str], int], int]:
    """Takes layers out of each list of layers of the model; returns `Blueprint.left_out` and the number of layers it had."""
    left_out: dict[tuple[str, str], int] = {}
    most, inside = 0, "\0"
    for name, layers in list(model.named_modules()):
        if not isinstance(layers, nn.ModuleList) or name.startswith(inside) or len(layers) < 2:
            continue
        inside = f"{name}."
        most = max(most, len(layers))
        chosen, stands_for = _choose([_kind(layer) for layer in layers])
        if whole or len(chosen) == len(layers):
            continue
        _keep_settings(model, len(layers), chosen)
        places = {old: new for new, old in enumerate(chosen)}
        for layer, old in zip([layers[i] for i in chosen], chosen, strict=True):
            for module in layer.modules():
                if vars(module).get("layer_idx") == old:
                    module.layer_idx = places[old]  # type: ignore[assignment]
        layers._modules = {str(places[i]): layers[i] for i in chosen}
        for (a, b), n in stands_for.items():
            left_out[f"{name}.{places[a]}", f"{name}.{places[b]}"] = n
    return left_out, most


def _choose(kinds: list[Hashable]) -> tuple[list[int], dict[tuple[int, int], int]]:
    """Which layers stay, and for each pair of like ones how many were left out beside them."""
    ends = {kinds.index(k) for k in kinds} | {len(kinds) - 1 - kinds[::-1].index(k) for k in kinds}
    kept, stands_for = set(ends), {}
    borders = sorted(ends)
    for begin, end in itertools.pairwise(borders):
        between: dict[Hashable, list[int]] = {}
        for i in range(begin + 1, end):
            between.setdefault(kinds[i], []).append(i)
        for places in between.values():
            kept.update(places[:2])
            if len(places) > 2:
                stands_for[places[0], places[1]] = len(places) - 2
    return sorted(kept), stands_for


def _kind(layer: nn.Module) -> Hashable:
    """Equal for layers that take the same memory: their code, their settings without their place, and their shapes."""
    return (
        tuple((name, type(m), _settings(m)) for name, m in layer.named_modules()),
        tuple((name, t.shape, t.dtype) for name, t in (*layer.named_parameters(), *layer.named_buffers())),
    )


def _settings(module: nn.Module) -> Hashable:
    own = {
        k: v for k, v in vars(module).items() if not k.startswith("_") and k not in ("layer_idx", "layer_id", "layer_number")
    }
    return tuple((k, setting(v)) for k, v in own.items() if isinstance(v, (int, float, str, bool, type(None))))


def _keep_settings(model: nn.Module, layers: int, chosen: list[int]) -> None:
    """Makes the configs of the model (copies, of this model alone) those of the layers that stay."""
    configs: dict[int, Any] = {id(c): c for m in model.modules() if hasattr(c := vars(m).get("config"), "to_dict")}
    for config in configs.values():
        for key, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == layers:
                setattr(config, key, [value[i] for i in chosen])
        if getattr(config, "num_hidden_layers", None) == layers:
            config.num_hidden_layers = len(chosen)


# ---- adapters and 4-bit weights ---------------------------------------------------------------------------------------------


def _with_lora(model: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    made: Any = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    return made


def _inside(model: nn.Module, name: str) -> str:
    """The name that a module has since PEFT put the model into its own."""
    return next(full for full, _ in model.named_modules() if full.endswith(f".{name}"))


class Packed4Bit(nn.Linear):
    """Stands for a Linear of bitsandbytes with NF4 weights: 4 bits each and their scales, made whole for each product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        n = linear.in_features * linear.out_features
        scales = -(-n // NF4_BLOCK)
        packed = torch.empty(n // 2 + scales + 4 * -(-scales // NF4_NESTED), dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(_zeros_like(packed), requires_grad=False)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Product.apply(x, self.weight, self.dtype, self.out_features)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """y = x w^T with a weight that is unpacked in the forward and once more in the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, dtype: torch.dtype, out_features: int) -> torch.Tensor:
        ctx.shape, ctx.dtype = (out_features, x.shape[-1]), dtype
        return x @ packed.new_zeros(ctx.shape, dtype=dtype).T.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return dy @ dy.new_zeros(ctx.shape, dtype=ctx.dtype).to(dy.dtype), None, None, None


def _pack(model: nn.Module) -> None:
    head = next((m.get_output_embeddings() for m in model.modules() if hasattr(m, "get_output_embeddings")), None)  # type: ignore[operator]
    for p in model.parameters():
        p.requires_grad_(False)
    for module in model.modules():
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(module, name, Packed4Bit(child))
