"""A tiny Llama, its data, and the comparison of two runs of training, for the tests of the stacks."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tests.python.torch import families
from torch.distributed.tensor import DTensor

import unswag
from unswag.torch import stash

# Stock and ours compute the same products in another order: gradients differ by a few rounding errors of fp32 (2^-24), and so
# do, with SGD, the sums of them that parameters moved by. A parameter is itself rounded after each step; relative to what it
# moved by, that is at most some 1e-5 here, because the learning rate is large. A wrong gradient is off by 1e-2 or more.
FP32 = 1e-4
# Under bf16 autocast each product is rounded to 2^-9; sums of products rounded in another place differ by some of these.
BF16 = 3e-2


class Run(NamedTuple):
    """What training left behind.

    losses    of each step
    moved     by how much each trained parameter moved in all, by name
    warnings  that were given meanwhile
    """

    losses: list[float]
    moved: dict[str, torch.Tensor]
    warnings: set[str]


def tiny_llama(**settings: Any) -> torch.nn.Module:
    """32 wide, 88 hidden, 2 layers, vocabulary 128; the same weights at each call."""
    return families.build("llama", hidden_size=32, intermediate_size=88, head_dim=8, **settings)


def rows(n: int = 12, seed: int = 5) -> list[dict[str, list[int]]]:
    """Sequences of 5 to 29 tokens, as trainers take them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 30, (n,), generator=generator).tolist()
    tokens = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right; no labels on the padding."""
    length = max(len(row["input_ids"]) for row in batch)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    lists = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in batch]
    return {key: torch.tensor([row[key] + [pad] * (length - len(row[key])) for row in lists]) for key, pad in fill.items()}


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trained parameters, whole, by the names they had before anyone wrapped the model."""
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters() if p.requires_grad}
    return {name.removeprefix("module."): p.detach().clone() for name, p in whole.items()}


class Recording:
    """Watches a model: `with Recording(model) as recording:` around its training, then `recording.run(losses)`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._start = values(model)
        self._catcher = warnings.catch_warnings(record=True)

    def __enter__(self) -> Recording:
        self._caught = self._catcher.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *exception: object) -> None:
        self._catcher.__exit__(*exception)

    def run(self, model: torch.nn.Module, losses: list[float]) -> Run:
        """What happened meanwhile; `model` as it is now, wrapped or not."""
        moved = {name: value - self._start[name] for name, value in values(model).items()}
        return Run(losses, moved, {str(w.message) for w in self._caught})


def operate(model: torch.nn.Module, **options: Any) -> unswag.SurgeryReport:
    """Surgery that found everything there is to find in a tiny Llama."""
    report = unswag.apply_unswag_surgery(model, **options)
    counts = Counter(pattern for _, pattern in report.patched)
    assert not report.skipped and not report.notes, (report.skipped, report.notes)
    assert (counts["rms_norm"], counts["gated_mlp"], counts["attention"], counts["loss"]) == (5, 2, 1, 1)
    return report


def assert_same(ours: Run, stock: Run, tolerance: float = FP32) -> None:
    """Every loss, and what every parameter moved by, within `tolerance` of what they are, and no warning of ours."""
    assert ours.warnings <= stock.warnings
    assert len(ours.losses) == len(stock.losses) > 1
    for mine, theirs in zip(ours.losses, stock.losses, strict=True):
        assert abs(mine - theirs) <= tolerance * abs(theirs), (ours.losses, stock.losses)
    assert ours.moved.keys() == stock.moved.keys() and stock.moved
    apart = {name: families.distance(ours.moved[name], stock.moved[name]) for name in stock.moved}
    worst = max(apart, key=apart.__getitem__)
    assert apart[worst] <= tolerance, f"{worst}: {apart[worst]:.1e}"
    assert all(by.abs().max() > 0 for by in stock.moved.values())


class Doors:
    """Counts what passes the doors of all stashes from now on: tensors that are kept, and those for which a recipe stands."""

    def __init__(self, replace: Callable[[object, str, object], None] = setattr) -> None:
        self.kept = self.again = 0
        door = stash.Stash.door

        def counting(this: stash.Stash, t: torch.Tensor, depth: int = 1) -> Any:
            handle = door(this, t, depth + 1)
            again = isinstance(handle, stash.Recomputed)
            self.again += again
            self.kept += not again
            return handle

        replace(stash.Stash, "door", counting)
