"""Protocols: how much of an activation's input is kept for the backward, chosen by activation and accelerator.

    alpha   one bit per element: the ReLU family, whose gradient is the incoming one or a fixed multiple of it. Exact
    exact   the input in its own dtype, and nothing beside it. Exact
    delhi   the derivative as a code of 2 bits, of the silu and gelu of `unswag.jax`, by a table of `unswag.codebooks`: mm2 for
            silu and mm1 for gelu unless another is named. Lossy, so never unless asked for by name

    >>> protocol("relu", "tpu").name
    'alpha'
    >>> protocol("silu", "tpu", "delhi").exact
    False

Framework-neutral; nothing is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ACCELERATORS", "ACTIVATIONS", "Protocol", "protocol"]

ACCELERATORS = ("cpu", "cuda", "tpu")


@dataclass(frozen=True)
class Protocol:
    """bits    kept per element of the activation, None for the bits of the dtype
    exact   whether the gradient is that of the plain activation
    layout  where packed bits lie (docs/format.md), "" if nothing is packed
    why     the reason for the choice, and what it costs
    """

    name: str
    bits: int | None
    exact: bool
    layout: str
    why: str


@dataclass(frozen=True)
class _Row:
    protocol: str
    activations: tuple[str, ...]
    bits: int | None
    exact: bool
    why: str


# The first row of an activation is its default.
_TABLE = (
    _Row("alpha", ("relu", "relu6", "leaky_relu"), 1, True,
         "one bit says which gradients pass. It saves nothing where a trained layer comes next: that keeps the output anyway"),
    _Row("exact", ("relu2",), None, True, "the gradient is 2 max(x, 0) dy: no bit can stand for x"),
    _Row("exact", ("silu", "gelu"), None, True,
         "x is the smallest exact form: value and derivative are made again from it"),
    _Row("exact", ("swiglu", "geglu", "reglu"), None, True,
         "gate and up are the smallest exact form, 32 bits in bfloat16. Codes of 2 bits would keep more: the product also needs"
         " act(gate) and up, 34 bits"),
    _Row("delhi", ("silu", "gelu"), 2, False,
         "2 bits instead of 16 or 32, only before a frozen layer. It costs exactness: on SmolLM2-135M the founding codebook"
         " gives a relative gradient error of 0.34 to 0.47, the best one 0.18"),
)  # fmt: skip

ACTIVATIONS = tuple(dict.fromkeys(activation for row in _TABLE for activation in row.activations))

# Tensors of at least 256 rows; the choice for an array is `unswag.jax.how.choose`.
_LAYOUT = {"cpu": "rows", "cuda": "rows", "tpu": "rows256"}


def protocol(activation: str, accelerator: str, name: str | None = None) -> Protocol:
    """The protocol of an activation on an accelerator: the default, which is exact, or the one that is asked for by name.

    ValueError lists the choices.
    """
    for argument, value, choices in (("activation", activation, ACTIVATIONS), ("accelerator", accelerator, ACCELERATORS)):
        if value not in choices:
            raise ValueError(f"protocol: {argument} is {value!r}; choose among {', '.join(choices)}")
    rows = [row for row in _TABLE if activation in row.activations]
    row = next((row for row in rows if name in (None, row.protocol)), None)
    if row is None:
        raise ValueError(f"protocol: {activation} has no protocol {name!r}; choose among {', '.join(r.protocol for r in rows)}")
    packed = row.bits is not None
    return Protocol(row.protocol, row.bits, row.exact, _LAYOUT[accelerator] if packed else "", row.why)
