"""Surgery: what makes a model train with less memory, and what undoes it; with a plan, what fits into a given memory."""

from __future__ import annotations

from torch import nn

from unswag.plans import Plan
from unswag.policy import Policy
from unswag.torch import plan as planner
from unswag.torch.checkpoint import Sweep
from unswag.torch.operation import SurgeryReport, operate, take_back
from unswag.torch.out_of_memory import explain

__all__ = ["SurgeryReport", "apply_unswag_surgery", "remove_unswag_surgery"]


def apply_unswag_surgery(
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
    plan: Plan | None = None,
    memory: str | int | None = None,
    context: int | None = None,
) -> SurgeryReport:
    """Makes `model` train with less activation memory and reports what it did.

    Every pattern of `unswag.torch.patterns` is looked for by structure. Where a probe of values and gradients shows that the
    replacement computes the same, the module gets it, on the instance; any other module is left, with the reason. The forward
    of `model` then runs inside a `Stash`. Parameters, buffers, hooks, training mode, random state and state_dict do not change;
    a module that is operated on gets a subclass of its class (`isinstance` holds, `type(m) is nn.Linear` does not).
    `remove_unswag_surgery` undoes everything. Call it on the outermost model (the PeftModel, not the model in it), before or
    after gradient checkpointing is switched on, and before DDP, FSDP and torch.compile. Calling it again starts afresh, with
    the new arguments. A whole model that is pickled after the surgery comes back with its own forwards; operate on it again.

    policy     what is kept, and how: "exact", a lossy one by name ("int8", "int4", "2bit"), or a `Policy` (docs/policies.md)
    attention  "auto": flash-attn if it is installed and can run, else SDPA, for padded and packed batches too (packed
               batches come with position_ids and without attention_mask). The model's config is not written to, and an
               attention chosen later (`set_attn_implementation`) wins. Models loaded as "eager" are left, because they return
               attention weights. "stock": the model's own
    loss       "chunked": no logits in training (`patterns.loss`); "stock": the model's own
    verify     False: probe one module of each kind (same class, shapes, dtypes and settings) and trust the others
    dropout    "stock": draws of PyTorch. LoRA keeps the generator's state (5 KB per Linear on the CPU) and draws again, other
               dropouts keep PyTorch's masks. "redrawn": draws from seeds of UnSwag's, no mask is kept, and losses are those of
               another seed
    store      "host" or "disk": what checkpointed layers are recomputed from is kept there instead of on the device, as with
               `Policy(..., tiers={"checkpoint": store})`. Takes effect when gradient checkpointing is on (docs/store.md)
    store_dir  folder of the disk store's file, which has no name; None: $TMPDIR, or /tmp
    store_limit  bytes that a store may keep: a number, or a text like "64GiB"; None: what there is
    sweep      True: layers under gradient checkpointing are recomputed and differentiated in tiles of tokens, which lowers what
               one layer needs from ten hidden states and more to about two (docs/long-context.md); a number: tokens per tile;
               or a `checkpoint.Sweep`. Each layer is compared with itself as a whole when it is first called in training. What
               cannot be swept is checkpointed as without, with a warning and a note in the report
    plan       what `unswag.plan` returned: its policy is taken, and its gradient checkpointing switched on
    memory, context  plan first: `plan=unswag.plan(model, memory, context)`
    verbose    True: print the report to stderr, on the first rank alone. False: print nothing; the report is returned all the
               same

    Packed rows (position_ids that start again at 0, and no attention_mask) are computed without a cache in every mode, because
    transformers tells their sequences apart only then: `past_key_values` is None, and with `use_cache=True` a warning says so.
    All else has the cache that stock makes; in training pass `use_cache=False` or set it in the config, as the HF Trainer does,
    or the output keeps all keys and values alive. Under torch.compile with `fullgraph=True` say `use_cache` where position_ids
    are given: their values cannot be looked at there.

    Raises TypeError if `model` is not a module, ValueError for an unknown policy, attention, loss, dropout or store, a model
    that is on the meta device in part, a policy or a store of whose roles nothing was found, or a plan that does not fit the
    device, RuntimeError if a forward that an earlier call replaced was wrapped since, or if the store cannot be opened. If
    anything else goes wrong the model is as it was before the call.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_unswag_surgery: model is a {type(model).__name__}; pass the torch.nn.Module to be trained")
    if plan is not None or memory is not None:
        policy, store = _planned(model, policy, store, plan, memory, context)
    elif context is not None:
        raise ValueError(f"apply_unswag_surgery: context={context!r} does nothing without memory; pass memory='16GiB', say")
    return operate(model, policy, attention, loss, verify, dropout, verbose, store, store_dir, store_limit, sweep, explain)


def _planned(
    model: nn.Module, policy: str | Policy, store: str | None, plan: Plan | None, memory: str | int | None, context: int | None
) -> tuple[str, str | None]:
    """Makes ready for a plan, or for the one that `memory` and `context` ask for; returns its policy and its store."""
    if policy != "exact" or store is not None or (plan is not None and memory is not None):
        raise ValueError("apply_unswag_surgery: plan, or memory, says what policy and store would say; pass one of them")
    if plan is None:
        assert memory is not None
        plan = planner.plan(model, memory, context)
    planner.prepare_for(model, plan)
    return plan.surgery.get("policy", "exact"), plan.surgery.get("store")


def remove_unswag_surgery(model: nn.Module) -> None:
    """Undoes `apply_unswag_surgery`: every attribute is restored. Does nothing to a model without surgery.

    Raises RuntimeError, and changes nothing, if a forward that the surgery replaced was wrapped since.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"remove_unswag_surgery: model is a {type(model).__name__}; pass the torch.nn.Module")
    take_back(model)
