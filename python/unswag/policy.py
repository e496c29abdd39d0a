"""Policies: what is kept of a saved tensor, by its role, and how exactly. Framework-neutral.

    Policy.named("int8")
    Policy(mlp="int4", residual="int8", rounding="stochastic")

`exact` keeps every saved tensor that cannot be recomputed in its own dtype, or in fewer bits without loss. Lossy policies are
used only when asked for by name, and their error is measured (docs/policies.md).

A protocol says the same for one activation: how much of its input is kept for the backward. The project's first names are
protocols, and also aliases of policies: `alpha`, one bit per element, is part of `exact`; `delhi`, two bits, is `2bit`.

    >>> protocol("relu", "tpu").name
    'alpha'
    >>> protocol("silu", "tpu", "delhi").exact
    False
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

ROLES = {
    "mlp": "the input of an activation; gate and up of a gated unit",
    "residual": "the input of a norm, which is the residual stream in most models",
    "attention": "query, key and value",
    "checkpoint": "what a checkpointed layer is recomputed from",
}
EXACT = "exact"
BLOCKS = {"int8": 8.5, "int4": 5.0, "int2": 2.25, "e4m3": 8.5, "e5m2": 8.5}  # codec: bits per element (docs/format.md)
TWO_BITS = "2bit"  # of the role mlp: the derivative as a code of two bits; values that the backward needs are kept in int2
DEVICE = "device"
STORE_TIERS = ("host", "disk")  # where a store keeps tensors (`unswag.torch.store`)
ROUNDINGS = ("nearest", "stochastic")
CODEBOOKS = ("mm1", "mm2", "optimal", "fewbit", "resilu2", "regelu2", "dither2", "seed")


@dataclass(frozen=True)
class Policy:
    """What is kept per role (`ROLES`): "exact", or the name of a block codec (`BLOCKS`); for the role mlp also "2bit".

    rounding  of the block codecs: "nearest", or "stochastic", which is unbiased, with higher variance
    codebook  of "2bit", one of `CODEBOOKS`: the levels of the derivative
    scale     of "2bit": the standard deviation of the activation's input for which the codebook is made; None: each module's is
              measured on the first batch
    tiers     where tensors of a role are kept, where that is not the device: {"checkpoint": "disk"}, or "host" (docs/store.md).
              In the form that their codec gives them
    name      for reports

    ValueError for a role, a tier, a codec, a rounding or a codebook that does not exist.
    """

    name: str = "own"
    mlp: str = EXACT
    residual: str = EXACT
    attention: str = EXACT
    checkpoint: str = EXACT
    rounding: str = "nearest"
    codebook: str = "mm1"
    scale: float | None = None
    tiers: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for role in ROLES:
            codec, choices = getattr(self, role), [EXACT, *BLOCKS, *([TWO_BITS] if role == "mlp" else [])]
            if codec not in choices:
                raise ValueError(f"Policy: {role}={codec!r}: no such codec; choose one of {', '.join(map(repr, choices))}")
        for option, choices in (("rounding", list(ROUNDINGS)), ("codebook", list(CODEBOOKS))):
            if (value := getattr(self, option)) not in choices:
                raise ValueError(f"Policy: {option}={value!r}; choose one of {', '.join(map(repr, choices))}")
        if self.rounding == "stochastic" and (fp8 := [r for r in ROLES if getattr(self, r) in ("e4m3", "e5m2")]):
            raise ValueError(f"Policy: {fp8[0]}={getattr(self, fp8[0])!r} has no stochastic rounding; use rounding='nearest'")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"Policy: scale={self.scale!r}; pass a positive number, or None to measure it on the first batch")

        object.__setattr__(self, "tiers", {role: tier for role, tier in self._checked_tiers().items() if tier != DEVICE})

    def _checked_tiers(self) -> dict[str, str]:
        if not isinstance(self.tiers, Mapping):
            raise ValueError(
                f'Policy: tiers={self.tiers!r}; pass a tier for each role that leaves the device: {{"checkpoint": "disk"}}'
            )
        for role, tier in self.tiers.items():
            for what, value, choices in (("role", role, tuple(ROLES)), ("tier", tier, (DEVICE, *STORE_TIERS))):
                if value not in choices:
                    raise ValueError(
                        f"Policy: tiers={dict(self.tiers)!r}: no {what} {value!r}; choose one of {', '.join(map(repr, choices))}"
                    )
            if tier != DEVICE and getattr(self, role) == TWO_BITS:
                raise ValueError(
                    f"Policy: {role}={TWO_BITS!r} with tiers={dict(self.tiers)!r}: codes of two bits stay on the device; choose a block codec"
                )
        return dict(self.tiers)

    @property
    def lossy(self) -> bool:
        """Whether gradients differ from those of "exact"."""
        return any(getattr(self, role) != EXACT for role in ROLES)

    def codec(self, role: str) -> str | None:
        """The block codec for tensors of this role; None if they are kept exactly. For "2bit", that of the values."""
        codec: str = getattr(self, role) if role in ROLES else EXACT
        return {EXACT: None, TWO_BITS: "int2"}.get(codec, codec)

    def tier(self, role: str) -> str | None:
        """The tier of a store for tensors of this role; None if they stay on the device."""
        return self.tiers.get(role)

    def cost(self) -> str:
        """The measured error of the gradient, as a sentence for reports; "" for a policy that is exact."""
        if not self.lossy:
            return ""
        error = MEASURED.get(self.name) if POLICIES.get(self.name) == replace(self, tiers={}) else None
        measured = (
            "its error was not measured (python -m bench.fidelity shows how)"
            if error is None
            else f"{MEASURED_ON}: {error:.2g}"
        )
        return f"policy {self} is lossy; relative error of the gradient, {measured}"

    def __str__(self) -> str:
        values = [(f.name, getattr(self, f.name), f.default) for f in fields(self) if f.name not in ("name", "tiers")]
        values.append(("tiers", dict(self.tiers), {}))
        chosen = ", ".join(f"{name}={value!r}" for name, value, default in values if value != default)
        return f"{self.name} ({chosen})" if chosen else self.name

    @staticmethod
    def named(policy: str | Policy) -> Policy:
        """The policy of that name; a Policy passes through. ValueError for a name that does not exist."""
        if isinstance(policy, Policy):
            return policy
        name = ALIASES.get(policy, policy) if isinstance(policy, str) else policy
        if name not in POLICIES:
            known = ", ".join(repr(known) for known in (*POLICIES, *ALIASES))
            raise ValueError(f"policy={policy!r}: no such policy; choose one of {known}")
        return POLICIES[name]


# ‖g - exact‖ / ‖exact‖ of the whole gradient (bench/results/fidelity.json; a test compares them).
MEASURED_ON = "one step of SmolLM2-135M on 768 tokens"
MEASURED = {"int8": 0.0071, "int4": 0.0905, "2bit": 0.424}

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("exact"),
        Policy("int8", mlp="int8", residual="int8", checkpoint="int8"),
        Policy("int4", mlp="int4", residual="int8", checkpoint="int8"),
        Policy("2bit", mlp="2bit", residual="int8", checkpoint="int8"),
    )
}
ALIASES = {"alpha": "exact", "delhi": "2bit"}


# ---- protocols --------------------------------------------------------------------------------------------------------------

ACCELERATORS = ("cpu", "cuda", "tpu")
GATED = ("swiglu", "geglu", "reglu")
# Of tensors of at least 256 rows (docs/format.md); the choice for an array is `unswag.jax.how.choose`.
_LAYOUT = {"cpu": "rows", "cuda": "rows", "tpu": "rows256"}


@dataclass(frozen=True)
class Protocol:
    """How much of an activation's input is kept for the backward.

    name    alpha   one bit per element: the ReLU family, whose gradient is the incoming one or a fixed multiple of it
            exact   the input in its own dtype, and nothing else
            delhi   the derivative as a code of two bits, by a table of `unswag.codebooks`. Lossy, so never the default
    bits    kept per element of the activation, None for the bits of the dtype
    exact   whether the gradient is that of the plain activation
    layout  where packed bits lie (docs/format.md), "" if nothing is packed
    why     the reason for the choice, and what it costs
    """

    name: str
    bits: int | None
    exact: bool
    layout: str
    why: str


_ALPHA = Protocol(
    "alpha", 1, True, "rows",
    "one bit says which gradients pass. It saves little where the next layer is trained: that layer keeps the output anyway",
)  # fmt: skip
_INPUT = Protocol("exact", None, True, "", "x is the smallest exact form: value and derivative are recomputed from it")
_GATED = Protocol(
    "exact", None, True, "",
    "gate and up are the smallest exact form, 32 bits in bfloat16. Codes of 2 bits would keep more: the product also needs"
    " act(gate) and up, 34 bits",
)  # fmt: skip
_DELHI = Protocol(
    "delhi", 2, False, "rows",
    "2 bits instead of 16 or 32, only before a frozen layer. It costs exactness: on SmolLM2-135M the founding codebook"
    " gives a relative gradient error of 0.34 to 0.47, the best one 0.18",
)  # fmt: skip


def protocols() -> dict[str, tuple[Protocol, ...]]:
    """The protocols of each activation and gated unit, the default first, in the layout of a CPU. ImportError without the C++
    core, whose lists of activations these are."""
    from unswag import _core
    from unswag.codebooks import SMOOTH

    masks = [name for name in _core.masks if not name.startswith("jax_")]  # jax's differ only in zeros and NaN
    found: dict[str, tuple[Protocol, ...]] = {name: (_ALPHA,) for name in masks}
    for name in _core.activations:
        found.setdefault(name, (_INPUT, _DELHI) if name in SMOOTH else (_INPUT,))
    return found | {name: (_GATED,) for name in GATED}


def protocol(activation: str, accelerator: str, name: str | None = None) -> Protocol:
    """The protocol of an activation on an accelerator: the default, which is exact, or the one with this name.

    ValueError lists the choices.
    """
    known = protocols()
    for argument, value, choices in (("activation", activation, tuple(known)), ("accelerator", accelerator, ACCELERATORS)):
        if value not in choices:
            raise ValueError(f"protocol: {argument} is {value!r}; choose among {', '.join(choices)}")
    rows = known[activation]
    found = next((row for row in rows if name in (None, row.name)), None)
    if found is None:
        raise ValueError(f"protocol: {activation} has no protocol {name!r}; choose among {', '.join(r.name for r in rows)}")
    return replace(found, layout=_LAYOUT[accelerator] if found.layout else "")
