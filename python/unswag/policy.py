"""Policies: what is kept of a saved tensor, by its role, and how exactly. Framework-neutral.

A policy is chosen by name. `exact` keeps every saved tensor that has no recipe as it is; its alias `alpha` is the
founding 1-bit protocol, which is exact and part of it. Lossy policies are only ever used when asked for by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

ROLES = ("mlp", "residual", "attention", "checkpoint", "logits", "other")


class Codec(Protocol):
    """How a saved tensor is written in fewer bits, and read again."""

    name: str
    bits: float

    def encode(self, tensor: Any) -> Any:
        """The packed form of `tensor`; shares no memory with it."""

    def decode(self, packed: Any) -> Any:
        """A tensor of the shape and dtype that was encoded."""


@dataclass(frozen=True)
class Policy:
    """What is kept per role: `codecs[role]`, or the tensor as it is for a role that is not named there."""

    name: str
    codecs: tuple[tuple[str, Codec], ...] = ()

    def codec(self, role: str) -> Codec | None:
        """The codec for `role`, or None: kept as it is."""
        return dict(self.codecs).get(role)

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


EXACT = Policy("exact")
POLICIES: dict[str, Policy] = {policy.name: policy for policy in (EXACT,)}
ALIASES = {"alpha": "exact"}
