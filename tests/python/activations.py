"""Every activation, once: how the frameworks spell it and how we do, for the tests of ops, functional, nn, JAX and reference.

Spellings take the framework as their first argument, so that this table imports none. The truth of a name is
`reference.activation` and `reference.activation_derivative`, of a mask `reference.mask_value` and `reference.PREDICATES`.
test_lists.py holds the names to the lists of the core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Spelling = Callable[..., Any]


class Row(NamedTuple):
    """A mask of one bit, or an activation whose backward reads x.

    kind        "mask"; "smooth", held to float64; "square", held to PyTorch bit for bit
    torch, jax  the framework's own spelling: of (torch, x) and (jax, x)
    ours        ours for PyTorch: of (unswag.torch.functional, x)
    module      its module: of (unswag.torch.nn)
    ours_jax    ours for JAX: of (unswag.jax, x, **options); None where there is only the formula, for gated units
    gated       our name of act(gate) * up for PyTorch, of (unswag.torch.functional, gate, up); None: `gated` by name
    gated_jax   likewise for JAX, of (unswag.jax, gate, up, **options); None: there is none
    reach       tests draw x from -reach to reach: beyond it, value and derivative are their limits in float32
    """

    kind: str
    torch: Spelling
    jax: Spelling
    ours: Spelling
    module: Spelling
    ours_jax: Spelling | None = None
    gated: Spelling | None = None
    gated_jax: Spelling | None = None
    reach: float = 12.0


ACTIVATIONS = {
    "silu": Row(
        "smooth",
        torch=lambda torch, x: torch.nn.functional.silu(x),
        jax=lambda jax, x: jax.nn.silu(x),
        ours=lambda F, x, **options: F.silu(x, **options),
        module=lambda nn: nn.SiLU(),
        ours_jax=lambda uj, x, **options: uj.silu(x, **options),
        gated=lambda F, gate, up: F.swiglu(gate, up),
        gated_jax=lambda uj, gate, up, **options: uj.swiglu(gate, up, **options),
    ),
    "gelu": Row(
        "smooth",
        torch=lambda torch, x: torch.nn.functional.gelu(x),
        jax=lambda jax, x: jax.nn.gelu(x, approximate=False),
        ours=lambda F, x, **options: F.gelu(x, **options),
        module=lambda nn: nn.GELU(),
        ours_jax=lambda uj, x, **options: uj.gelu(x, approximate=False, **options),
        gated=lambda F, gate, up: F.geglu(gate, up),
        gated_jax=lambda uj, gate, up, **options: uj.geglu(gate, up, approximate=False, **options),
    ),
    "gelu_tanh": Row(
        "smooth",
        torch=lambda torch, x: torch.nn.functional.gelu(x, approximate="tanh"),
        jax=lambda jax, x: jax.nn.gelu(x, approximate=True),
        ours=lambda F, x, **options: F.gelu(x, "tanh", **options),
        module=lambda nn: nn.GELU("tanh"),
        ours_jax=lambda uj, x, **options: uj.gelu(x, approximate=True, **options),
        gated=lambda F, gate, up: F.geglu(gate, up, "tanh"),
        gated_jax=lambda uj, gate, up, **options: uj.geglu(gate, up, **options),
    ),
    "relu": Row(  # of gated units; alone it is a mask
        "mask",
        torch=lambda torch, x: torch.relu(x),
        jax=lambda jax, x: jax.nn.relu(x),
        ours=lambda F, x: F.relu(x),
        module=lambda nn: nn.ReLU(),
        ours_jax=lambda uj, x, **options: uj.relu(x, **options),
        gated=lambda F, gate, up: F.reglu(gate, up),
        gated_jax=lambda uj, gate, up, **options: uj.reglu(gate, up),
    ),
    "relu2": Row(
        "square",
        torch=lambda torch, x: torch.relu(x).square(),
        jax=lambda jax, x: jax.numpy.square(jax.nn.relu(x)),
        ours=lambda F, x: F.relu2(x),
        module=lambda nn: nn.ReLU2(),
        ours_jax=lambda uj, x, **options: uj.relu2(x),
    ),
    "quick_gelu": Row(
        "smooth",
        torch=lambda torch, x: x * torch.sigmoid(1.702 * x),
        jax=lambda jax, x: x * jax.nn.sigmoid(1.702 * x),
        ours=lambda F, x: F.quick_gelu(x),
        module=lambda nn: nn.QuickGELU(),
    ),
}

MASKS = {
    "relu": ACTIVATIONS["relu"],
    "leaky_relu": Row(
        "mask",
        torch=lambda torch, x: torch.nn.functional.leaky_relu(x, 0.01),
        jax=lambda jax, x: jax.nn.leaky_relu(x),
        ours=lambda F, x: F.leaky_relu(x, 0.01),
        module=lambda nn: nn.LeakyReLU(),
        ours_jax=lambda uj, x, **options: uj.leaky_relu(x, **options),
    ),
    "relu6": Row(
        "mask",
        torch=lambda torch, x: torch.nn.functional.relu6(x),
        jax=lambda jax, x: jax.nn.relu6(x),
        ours=lambda F, x: F.relu6(x),
        module=lambda nn: nn.ReLU6(),
        ours_jax=lambda uj, x, **options: uj.relu6(x, **options),
    ),
}


def of_kind(*kinds: str) -> dict[str, Row]:
    """The activations of these kinds."""
    return {name: row for name, row in (MASKS | ACTIVATIONS).items() if row.kind in kinds}
