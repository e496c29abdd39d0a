"""The operation: patterns found in a model, proven by a probe, replaced on the instance; and the stash around its forward."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from unswag.ledger import Ledger
from unswag.policy import EXACT, ROLES, STORE_TIERS, Policy
from unswag.report import html, tables
from unswag.report.terminal import Meter, say
from unswag.torch import checkpoint, patterns
from unswag.torch.audit import refuse_meta
from unswag.torch.checkpoint import Sweep
from unswag.torch.dry_run import NoDryRun, checkpoints, dry_run
from unswag.torch.loss import beside_swept_layers
from unswag.torch.patterns.attention import leave_caches_out
from unswag.torch.patterns.loss import logits_counters
from unswag.torch.patterns.pattern import (
    Candidate,
    Pattern,
    bring_back,
    cannot_operate,
    maker,
    replace,
    restore,
    state,
    wrap_method,
    wrapped,
)
from unswag.torch.patterns.probing import Writes, kind, sealed
from unswag.torch.patterns.relu import kept_as
from unswag.torch.stash import Stash
from unswag.torch.store import Stores

if TYPE_CHECKING:
    from rich.table import Table

Explain = Callable[[nn.Module, Policy, BaseException, tuple[Any, ...], Mapping[str, Any]], None]
CPU_ALLOCATOR = "DefaultCPUAllocator"  # in the message of its errors
CHOICES = {"attention": ("auto", "stock"), "loss": ("chunked", "stock"), "dropout": ("stock", "redrawn")}
STORES = "_unswag_stores"  # model.__dict__[STORES]: where the policy's tiers are kept
SWEEP = "_unswag_sweep"  # model.__dict__[SWEEP]: its checkpoint.Sweep, or None
NOTES = "_unswag_notes"  # model.__dict__[NOTES]: what checkpoint.prepare left unchanged, each sentence once


@dataclass(frozen=True, repr=False)
class SurgeryReport:
    """What `apply_unswag_surgery` did. `print(report)` shows it again, with what has been seen since.

    patched  (module name, pattern) for everything that was replaced; the model itself is ""
    skipped  (module name, reason) for everything that looked like a pattern and was left
    before, after  ledgers of a training step on tensors without data (`unswag.torch.dry_run`): one sequence, image or
             recording, in the model's dtype without autocast, with gradient checkpointing if it was on.
             `before.compare(after)` shows where the difference lies. None if the model cannot run so
    unknown  why there are no such ledgers, "" if there are
    checkpointing  whether gradient checkpointing was on; None if the model has none
    policy   the policy's name and settings, and, when it is lossy, its measured error
    notes    what else was left unchanged, and why: checkpointing that cannot recompute under the stash. Grows when a later
             forward finds something new
    """

    model: str
    patched: list[tuple[str, str]]
    skipped: list[tuple[str, str]]
    before: Ledger | None = None
    after: Ledger | None = None
    unknown: str = ""
    checkpointing: bool | None = None
    notes: list[str] = field(default_factory=list)
    policy: str = "exact"
    _logits: list[Counter[str]] = field(default_factory=list)
    _relus: list[Counter[str]] = field(default_factory=list)

    @property
    def bytes_per_token(self) -> tuple[float | None, float | None]:
        """(before, after): bytes that a training step keeps for its backward pass, per token; without the loss's own
        gradient buffers. None where a ledger or its tokens are not known."""
        before, after = (
            ledger.alive / ledger.tokens if ledger is not None and ledger.alive is not None and ledger.tokens else None
            for ledger in (self.before, self.after)
        )
        return before, after

    @property
    def logits_made(self) -> Counter[str]:
        """How often training steps since the surgery made their logits in full after all, by what was done with them."""
        return sum(self._logits, Counter())

    @property
    def relus_kept(self) -> Counter[str]:
        """How often training steps since the surgery kept the output of a ReLU as what: "mask", "bitmap + non-zeros", "output",
        or not at all ("recipe"). What the next layer keeps settles it, and how many zeros there are."""
        return +sum(self._relus, Counter())

    def __rich__(self) -> Table | str:
        return tables.of_surgery(self)

    def __str__(self) -> str:
        return tables.text(self.__rich__())

    def __repr__(self) -> str:
        return f"<SurgeryReport of {self.model}: {len(self.patched)} replacements, {len(self.skipped)} left; print() shows it>"

    def _repr_html_(self) -> str:
        shown = self.__rich__()
        return html.text(shown) if isinstance(shown, str) else html.table(shown)


def operate(
    model: nn.Module,
    policy: str | Policy = "exact",
    attention: str = "auto",
    loss: str = "chunked",
    verify: bool = True,
    dropout: str = "stock",
    verbose: bool = True,
    store: str | None = None,
    store_dir: str | None = None,
    store_limit: int | str | None = None,
    sweep: bool | int | Sweep = False,
    explain: Explain | None = None,
) -> SurgeryReport:
    """`apply_unswag_surgery` without a plan; `explain` is called with an out-of-memory error of the model's forward."""
    options = {"attention": attention, "loss": loss, "dropout": dropout}
    for argument, given in options.items():
        if given not in CHOICES[argument]:
            known = " or ".join(map(repr, CHOICES[argument]))
            raise ValueError(f"apply_unswag_surgery: {argument}={given!r}; choose {known}")
    if not isinstance(sweep, Sweep) and (not isinstance(sweep, int) or sweep < 0):
        raise ValueError(
            f"apply_unswag_surgery: sweep={sweep!r}; pass True, False, a positive number of tokens per tile, or a Sweep"
        )
    tiles = _tiles(sweep)
    chosen = _with_store(Policy.named(policy), store)
    if not chosen.tiers and not (store_dir is store_limit is None):
        raise ValueError(
            "apply_unswag_surgery: store_dir and store_limit do nothing without a store; pass store='disk' or 'host'"
        )
    if store_dir is not None and "disk" not in chosen.tiers.values():
        raise ValueError(
            f"apply_unswag_surgery: store_dir={store_dir!r}, and a host store has no folder; leave store_dir out, or pass "
            "store='disk'"
        )
    stores = Stores(store_dir, store_limit)
    refuse_meta("apply_unswag_surgery", model)
    stock = {name for name, option in options.items() if option == "stock"}
    shown = verbose and _is_first_rank()
    before = take_back(model)
    try:
        with sealed():
            planned, skipped = _plan(model, [p for p in patterns.ALL if p.name not in stock], verify, options, shown)
            kept_before, unknown = _dry(model) if planned else (None, "")
        for pattern, candidate in planned:
            pattern.apply(candidate)
        patched = [(candidate.name, pattern.name) for pattern, candidate in planned]
        checkpointing = checkpoints(model)
        found = {pattern.role for pattern, _ in planned} | ({"checkpoint"} if patched and checkpointing is not None else set())
        if chosen.lossy and not any(role in found and getattr(chosen, role) != EXACT for role in ROLES):
            raise ValueError(
                f"apply_unswag_surgery: policy {chosen.name!r} would change nothing, because no module that plays one of its "
                "roles was patched (policy='exact' reports why); use policy='exact'"
            )
        if tiles is not None:
            _refuse_to_sweep(model, patched, skipped)
        if nowhere := [role for role in chosen.tiers if role not in found]:
            role = nowhere[0]
            why = "the model has no gradient checkpointing" if role == "checkpoint" else "no module that plays it was patched"
            raise ValueError(
                f"apply_unswag_surgery: the {chosen.tiers[role]} store would keep nothing of the role {role!r}, because {why}; "
                "leave store or the policy's tiers out"
            )
        if patched:
            notes: list[str] = [] if tiles is None else tiles.notes
            if "checkpoint" in chosen.tiers and not checkpointing:
                notes.append(
                    f"the {chosen.tiers['checkpoint']} store is for gradient checkpointing, which was off at the surgery "
                    "(model.activation_checkpointing_enable() switches it on)"
                )
            for tier in set(chosen.tiers.values()):
                stores.of(tier)  # here, so that a folder that cannot be used is an error now
            leave_caches_out(model)
            for module in (model, *_backbones(model)):
                _put_stash_around(module, chosen, notes, stores, tiles, explain)
            patched.append(("", "stash"))
            notes.extend(checkpoint.prepare(model, tiles))
        with sealed():
            kept_after, changed = _dry(model) if kept_before is not None else (None, "")
    except BaseException:
        take_back(model)
        for module, had in before:
            bring_back(module, had)
        raise
    left = vars(model).get(NOTES, [])
    words, relus = chosen.cost() or str(chosen), kept_as(model)
    if tiles is not None:
        words += f"; checkpointed layers are swept, {tiles.tile or 'on a CPU 1,024'} tokens at a time (sweep)"
    report = SurgeryReport(
        model=type(model).__name__, patched=patched, skipped=skipped, before=kept_before, after=kept_after,
        unknown=unknown or changed, checkpointing=checkpoints(model), notes=left, policy=words,
        _logits=logits_counters(model), _relus=relus,
    )  # fmt: skip
    if shown:
        say(report)
    return report


def take_back(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Restores every module; returns what they had from us."""
    if over := [name for name, module in model.named_modules() if wrapped(module)]:
        where = f"{over[0]}.forward" if over[0] else "the model's forward"
        raise RuntimeError(
            f"{where} was wrapped by {maker(model.get_submodule(over[0]).forward)} after the surgery, and the wrapper would be "
            "lost; remove it first (accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )
    checkpoint.release(model)
    had = [(module, state(module)) for module in model.modules()]
    for module in model.modules():
        restore(module)
    return had


def _plan(
    model: nn.Module, chosen: list[Pattern], verify: bool, options: Mapping[str, str], shown: bool
) -> tuple[list[tuple[Pattern, Candidate]], list[tuple[str, str]]]:
    """What to patch, and what to leave with its reason. Changes nothing."""
    planned: list[tuple[Pattern, Candidate]] = []
    skipped: list[tuple[str, str]] = []
    said: set[tuple[str, str]] = set()
    covered: set[int] = set()  # modules that a planned replacement does the work of, by identity
    probed: dict[tuple[str, Any], tuple[str | None, dict[str, Any]]] = {}
    found = [(pattern, candidate) for pattern in chosen for candidate in _found(pattern, model, skipped)]
    with Meter("UnSwag surgery: comparing modules", len(found), shown, count=True) as meter:
        for pattern, candidate in found:
            meter.advance(1)
            if id(candidate.module) in covered:
                continue
            candidate.options, candidate.said = options, said
            key = (pattern.name, candidate.module if verify else kind(candidate.module))
            if key not in probed:
                probed[key] = (cannot_operate(candidate.module) or _probe(pattern, candidate), candidate.parts)
            reason, parts = probed[key]
            candidate.parts = parts | candidate.parts  # what its own `find` saw, and what the probe chose for its kind
            if reason is None:
                planned.append((pattern, candidate))
                if "covers" in candidate.parts:
                    covered.add(id(candidate.module))
                    covered.update(id(getattr(candidate.module, child)) for child in candidate.parts["covers"])
            else:
                skipped.append((candidate.name, f"{pattern.name}: {reason}"))
    return planned, skipped


def _found(pattern: Pattern, model: nn.Module, skipped: list[tuple[str, str]]) -> Iterator[Candidate]:
    try:
        yield from pattern.find(model)
    except Exception as error:  # of a stranger's code: a property that raises
        skipped.append(("", f"{pattern.name}: the search for it raises {type(error).__name__}: {error}"))


def _probe(pattern: Pattern, candidate: Candidate) -> str | None:
    try:
        return pattern.probe(candidate)
    except Exception as error:  # of a stranger's code, on inputs that it did not expect
        return str(error) if isinstance(error, Writes) else f"its probe raises {type(error).__name__}: {error}"


def _prepare_checkpoints(model: nn.Module) -> None:
    """Before each forward. What it leaves unchanged is said once, in a warning and in the report."""
    notes: list[str] = vars(model)[NOTES]
    for note in checkpoint.prepare(model, vars(model)[SWEEP]):
        if note not in notes:
            notes.append(note)
            warnings.warn(f"unswag: {note}", stacklevel=4)


def _backbones(model: nn.Module) -> list[nn.Module]:
    """What transformers calls the base model, of `model` and of the models inside it: trainers that make their loss from hidden
    states call it past the model's own forward (TRL does), and then its stash is the one that is entered."""
    bases = (getattr(module, getattr(type(module), "base_model_prefix", "") or "-", None) for module in model.modules())
    return [base for base in dict.fromkeys(bases) if isinstance(base, nn.Module) and base is not model]


def _tiles(sweep: bool | int | Sweep) -> Sweep | None:
    if isinstance(sweep, Sweep):
        return copy.deepcopy(sweep)
    return Sweep(None if sweep is True else sweep) if sweep else None


def _refuse_to_sweep(model: nn.Module, patched: list[tuple[str, str]], skipped: list[tuple[str, str]]) -> None:
    """ValueError if no layer of `model` could be swept: none has ever checkpointing, or its attention was left."""
    if checkpoints(model) is None:
        raise ValueError(
            "apply_unswag_surgery: sweep is for layers under gradient checkpointing, and this model has none; leave sweep out"
        )
    if not any(pattern == "attention" for _, pattern in patched):
        reasons = [reason for _, reason in skipped if reason.startswith("attention: ")]
        raise ValueError(
            "apply_unswag_surgery: no layer can be swept, because the attention was left ("
            f"{'; '.join(reasons) or 'attention=' + repr('stock')}); leave sweep out"
        )


def _with_store(policy: Policy, store: str | None) -> Policy:
    if store is None:
        return policy
    if store not in STORE_TIERS:
        raise ValueError(f"apply_unswag_surgery: store={store!r}; choose {' or '.join(map(repr, STORE_TIERS))}, or None")
    return dataclasses.replace(policy, tiers={**policy.tiers, "checkpoint": store})


def _put_stash_around(
    model: nn.Module, policy: Policy, notes: list[str], stores: Stores, sweep: Sweep | None, explain: Explain | None
) -> None:
    """The model's forward, inside a stash. With the signature it had: HF Trainer reads it to choose columns."""
    replace(model, NOTES, notes)
    replace(model, STORES, stores)
    replace(model, SWEEP, sweep)

    def around(inner: Callable[..., Any], self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _prepare_checkpoints(self)
        outermost = Stash.current() is None
        chunks = contextlib.nullcontext() if vars(self)[SWEEP] is None else beside_swept_layers()
        try:
            with chunks, Stash(policy, model=self, stores=vars(self)[STORES]):
                return inner(self, *args, **kwargs)
        except RuntimeError as error:
            if outermost and explain is not None and is_out_of_memory(error):
                explain(self, policy, error, args, kwargs)
            raise

    wrap_method(model, "forward", around)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of PyTorch found no memory, on a device or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error))


def _dry(model: nn.Module) -> tuple[Ledger | None, str]:
    """The ledger of a step without data, or the reason why there is none."""
    try:
        return dry_run(model), ""
    except NoDryRun as error:
        return None, str(error)


def _is_first_rank() -> bool:
    """Whether this process is the one that speaks for all."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") in ("", "0")
