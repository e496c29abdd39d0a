"""Policies: what is kept of a saved tensor, by its role, and how exactly. Framework-neutral.

    Policy.named("int8")
    Policy(mlp="int4", residual="int8", rounding="stochastic")

`exact` keeps every saved tensor that has no recipe as it is, or in fewer bits without loss; its alias `alpha` is the founding
1-bit protocol, which is part of it. Lossy policies are only ever used when asked for by name, and their error is measured
(docs/policies.md).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

ROLES = {
    "mlp": "the input of an activation; gate and up of a gated unit",
    "residual": "the input of a norm, which is the residual stream in most models",
    "attention": "query, key and value",
    "checkpoint": "what a checkpointed layer is recomputed from",
}
EXACT = "exact"
BLOCKS = {"int8": 8.5, "int4": 5.0, "int2": 2.25, "e4m3": 8.5, "e5m2": 8.5}  # codec: bits per element (docs/format.md)
TWO_BITS = "2bit"  # of the role mlp: the derivative as a code of two bits, what else the backward needs in int2
ROUNDINGS = ("nearest", "stochastic")
CODEBOOKS = ("mm1", "mm2", "optimal", "fewbit", "resilu2", "regelu2", "dither2", "seed")


@dataclass(frozen=True)
class Policy:
    """What is kept per role (`ROLES`): "exact", or the name of a block codec (`BLOCKS`); for the role mlp also "2bit".

    rounding  of the block codecs: "nearest", or "stochastic", which is right in the mean and costs more error in each step
    codebook  of "2bit", one of `CODEBOOKS`: the levels of the derivative
    scale     of "2bit": the standard deviation of the activation's input for which the codebook is made; None: measured, module
              by module, on the first batch
    name      for reports

    ValueError for a codec, a rounding or a codebook that does not exist.
    """

    name: str = "own"
    mlp: str = EXACT
    residual: str = EXACT
    attention: str = EXACT
    checkpoint: str = EXACT
    rounding: str = "nearest"
    codebook: str = "mm1"
    scale: float | None = None

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

    @property
    def lossy(self) -> bool:
        """Whether gradients differ from those of "exact"."""
        return any(getattr(self, role) != EXACT for role in ROLES)

    def codec(self, role: str) -> str | None:
        """The block codec of what plays this role, or None: kept exactly. Under "2bit" that of the values."""
        codec: str = getattr(self, role) if role in ROLES else EXACT
        return {EXACT: None, TWO_BITS: "int2"}.get(codec, codec)

    def cost(self) -> str:
        """What the policy does to the gradient, in words; "" for a policy that is exact."""
        if not self.lossy:
            return ""
        error = MEASURED.get(self.name) if POLICIES.get(self.name) == self else None
        measured = (
            "its error was not measured (python -m bench.fidelity shows how)"
            if error is None
            else f"{MEASURED_ON}: {error:.2g}"
        )
        return f"policy {self} is lossy; relative error of the gradient, {measured}"

    def __str__(self) -> str:
        values = [(f.name, getattr(self, f.name), f.default) for f in fields(self) if f.name != "name"]
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
