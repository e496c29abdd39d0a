"""The formulas of the activations in plain JAX (docs/math.md). XLA compiles them; the C++ kernels are differentiated by them.

16-bit values are computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

__all__ = ["FUNCTIONS", "Act", "gradient", "gradients", "product", "value", "wide", "wide_type"]


def wide_type(x: Array) -> Any:
    """float32 for the 16-bit types: what the formulas are computed in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def wide(x: Array) -> Array:
    return x.astype(wide_type(x))


# ---- smooth -------------------------------------------------------------------------------------------------------------
# sigmoid(-x) and not 1 - sigmoid(x): no digits are lost.


def _vanishing(term: Array, x: Array) -> Array:
    """A term whose limit at both infinities is 0, where it is computed as 0 times infinity."""
    return jnp.where(jnp.isfinite(term) | jnp.isnan(x), term, jnp.zeros_like(x))


def _silu(x: Array) -> Array:
    return x * jax.nn.sigmoid(x)


def _silu_derivative(x: Array) -> Array:
    s = jax.nn.sigmoid(x)
    return s + _vanishing(x * s * jax.nn.sigmoid(-x), x)


def _phi(x: Array) -> Array:
    """The distribution function of the normal distribution."""
    return lax.erfc(-x * np.asarray(np.sqrt(0.5), x.dtype)) / 2


def _gelu(x: Array) -> Array:
    return x * _phi(x)


def _gelu_derivative(x: Array) -> Array:
    density = jnp.exp(-x * x / 2) * np.asarray(1 / np.sqrt(2 * np.pi), x.dtype)
    return _phi(x) + _vanishing(x * density, x)


_TANH_SCALE, _TANH_CUBE = np.sqrt(2 / np.pi), 0.044715


def _tanh_twice(x: Array) -> Array:
    """2 u, where (1 + tanh u) / 2 = sigmoid(2 u)."""
    cube = x * x * x * np.asarray(_TANH_CUBE, x.dtype)
    return (x + cube) * np.asarray(2 * _TANH_SCALE, x.dtype)


def _gelu_tanh(x: Array) -> Array:
    return x * jax.nn.sigmoid(_tanh_twice(x))


def _gelu_tanh_derivative(x: Array) -> Array:
    twice = _tanh_twice(x)
    s = jax.nn.sigmoid(twice)
    slope = np.asarray(2 * _TANH_SCALE, x.dtype) * (1 + np.asarray(3 * _TANH_CUBE, x.dtype) * x * x)
    return s + _vanishing(x * s * jax.nn.sigmoid(-twice) * slope, x)


def _relu_derivative(x: Array) -> Array:
    return (x > 0).astype(x.dtype)


def _relu2(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


def _relu2_derivative(x: Array) -> Array:
    return 2 * jax.nn.relu(x)


_QUICK_SCALE = 1.702


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(x * np.asarray(_QUICK_SCALE, x.dtype))


def _quick_gelu_derivative(x: Array) -> Array:
    return _silu_derivative(x * np.asarray(_QUICK_SCALE, x.dtype))


FUNCTIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {  # value and derivative, of a wide x
    "silu": (_silu, _silu_derivative),
    "gelu": (_gelu, _gelu_derivative),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_derivative),
    "relu": (jax.nn.relu, _relu_derivative),
    "relu2": (_relu2, _relu2_derivative),
    "quick_gelu": (_quick_gelu, _quick_gelu_derivative),
}


def value(x: Array, act: str) -> Array:
    return FUNCTIONS[act][0](wide(x)).astype(x.dtype)


def gradient(x: Array, dy: Array, act: str) -> Array:
    return (FUNCTIONS[act][1](wide(x)) * wide(dy)).astype(x.dtype)


# ---- gated --------------------------------------------------------------------------------------------------------------


def product(gate: Array, up: Array, act: str) -> Array:
    return (FUNCTIONS[act][0](wide(gate)) * wide(up)).astype(gate.dtype)


def gradients(gate: Array, up: Array, dh: Array, act: str) -> tuple[Array, Array]:
    g, u, d = map(wide, (gate, up, dh))
    function, derivative = FUNCTIONS[act]
    return (d * u * derivative(g)).astype(dh.dtype), (d * function(g)).astype(dh.dtype)


# ---- masks --------------------------------------------------------------------------------------------------------------

_PREDICATES: dict[str, Callable[[Array], Array]] = {  # the gradient passes where
    "relu": lambda x: x > 0,
    "relu6": lambda x: (x > 0) & (x < 6),
    "leaky_relu": lambda x: x >= 0,
}


@dataclass(frozen=True)
class Act:
    """value(x) is that of jax.nn; the gradient is dy where the bit is set, else slope dy."""

    name: str
    slope: float = 0.0

    def value(self, x: Array) -> Array:
        function = getattr(jax.nn, self.name)
        return function(x, self.slope) if self.name == "leaky_relu" else function(x)

    def bit(self, x: Array) -> Array:
        return _PREDICATES[self.name](x).astype(jnp.uint32)

    def gradient(self, bit: Array, dy: Array) -> Array:
        off = dy * np.asarray(self.slope, dy.dtype) if self.slope else jnp.zeros_like(dy)
        return jnp.where(bit != 0, dy, off)
