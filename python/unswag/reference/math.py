"""docs/math.md in plain numpy, in float64 and in the textbook form: the truth of the tests.

Arguments are [rows, cols] of any floating dtype; results are float64. `unswag.codebooks` fits its levels to the derivatives
here too, in production: they are formulas and no twin of a kernel there, so they stand in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

# ---- activations ----------------------------------------------------------------------------------------------------------

_erfc = np.vectorize(math.erfc, otypes=[np.float64])
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715
_QUICK_SCALE = 1.702


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1, e) / (1 + e)


def _normal(x: Array) -> Array:
    """Phi(x), the normal distribution."""
    return _erfc(-x / math.sqrt(2)) / 2


def _relu(x: Array) -> Array:
    return np.where(x < 0, 0.0, x)


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _silu_derivative(x: Array) -> Array:
    s = _sigmoid(x)
    return s + x * s * _sigmoid(-x)


def _gelu(x: Array) -> Array:
    return x * _normal(x)


def _gelu_derivative(x: Array) -> Array:
    return _normal(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh(x: Array) -> Array:
    return x * _sigmoid(2 * _TANH_SCALE * (x + _TANH_CUBE * x**3))  # (1 + tanh u) / 2 = sigmoid(2 u)


def _gelu_tanh_derivative(x: Array) -> Array:
    u = 2 * _TANH_SCALE * (x + _TANH_CUBE * x**3)
    s = _sigmoid(u)
    return s + x * s * _sigmoid(-u) * 2 * _TANH_SCALE * (1 + 3 * _TANH_CUBE * x**2)


def _quick_gelu(x: Array) -> Array:
    return x * _sigmoid(_QUICK_SCALE * x)


def _quick_gelu_derivative(x: Array) -> Array:
    s = _sigmoid(_QUICK_SCALE * x)
    return s + _QUICK_SCALE * x * s * _sigmoid(-_QUICK_SCALE * x)


ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {  # name → value, derivative
    "silu": (_silu, _silu_derivative),
    "gelu": (_gelu, _gelu_derivative),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_derivative),
    "relu": (_relu, lambda x: (~(x <= 0)).astype(np.float64)),  # NaN passes its gradient
    "relu2": (lambda x: _relu(x) * _relu(x), lambda x: np.where(x < 0, 0.0, 2 * x)),
    "quick_gelu": (_quick_gelu, _quick_gelu_derivative),
}


def activation(x: Array, act: str) -> Array:
    """act(x), one of ACTIVATIONS."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        return ACTIVATIONS[act][0](x.astype(np.float64))


def activation_derivative(x: Array, act: str) -> Array:
    """act'(x), one of ACTIVATIONS."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        return ACTIVATIONS[act][1](x.astype(np.float64))


# ---- gated units, RMSNorm, LayerNorm, cross-entropy -----------------------------------------------------------------------


def gated_forward(gate: Array, up: Array, act: str) -> Array:
    """h = act(gate) up."""
    return activation(gate, act) * up


def gated_backward(gate: Array, up: Array, dh: Array, act: str) -> tuple[Array, Array]:
    """dgate, dup."""
    return dh * up * activation_derivative(gate, act), dh * activation(gate, act)


def rms_norm_forward(x: Array, weight: Array | None, eps: float, weight_offset: float = 0.0) -> tuple[Array, Array]:
    """y, rstd [rows]."""
    x = x.astype(np.float64)
    rstd = 1 / np.sqrt((x * x).mean(-1) + eps)
    factor = 1.0 if weight is None else weight_offset + weight.astype(np.float64)
    return x * rstd[:, None] * factor, rstd


def rms_norm_backward(
    x: Array, rstd: Array, weight: Array | None, dy: Array, weight_offset: float = 0.0
) -> tuple[Array, Array]:
    """dx, dw [cols]."""
    xhat = x.astype(np.float64) * rstd[:, None]
    g = dy * (1.0 if weight is None else weight_offset + weight.astype(np.float64))
    dx = rstd[:, None] * (g - xhat * (g * xhat).mean(-1, keepdims=True))
    return dx, (dy * xhat).sum(0)


def layer_norm_forward(x: Array, weight: Array | None, bias: Array | None, eps: float) -> tuple[Array, Array, Array]:
    """y, mean [rows], rstd [rows]."""
    x = x.astype(np.float64)
    mean = x.mean(-1)
    rstd = 1 / np.sqrt(((x - mean[:, None]) ** 2).mean(-1) + eps)
    y = (x - mean[:, None]) * rstd[:, None]
    if weight is not None:
        y = y * weight.astype(np.float64)
    if bias is not None:
        y = y + bias.astype(np.float64)
    return y, mean, rstd


def layer_norm_backward(x: Array, mean: Array, rstd: Array, weight: Array | None, dy: Array) -> tuple[Array, Array, Array]:
    """dx, dw [cols], db [cols]."""
    xhat = (x.astype(np.float64) - mean[:, None]) * rstd[:, None]
    g = dy * (1.0 if weight is None else weight.astype(np.float64))
    dx = rstd[:, None] * (g - g.mean(-1, keepdims=True) - xhat * (g * xhat).mean(-1, keepdims=True))
    return dx, (dy * xhat).sum(0), dy.astype(np.float64).sum(0)


def cross_entropy(
    logits: Array,
    labels: NDArray[np.int64],
    class_weight: Array | None = None,
    row_scale: Array | None = None,
    gradient_scale: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
) -> tuple[Array, Array, Array]:
    """loss [rows], lse [rows], gradient [rows, classes] with respect to the logits; all 0 in ignored rows."""
    rows, classes = logits.shape
    z = logit_scale * logits.astype(np.float64)
    dz = np.full_like(z, logit_scale)
    if softcap:
        z = softcap * np.tanh(z / softcap)
        dz *= 1 - (z / softcap) ** 2
    top = z.max(-1)
    lse = top + np.log(np.exp(z - top[:, None]).sum(-1))
    w = np.ones(classes) if class_weight is None else class_weight.astype(np.float64)
    loss, gradient = np.zeros(rows), np.zeros_like(z)
    for row, label in enumerate(labels):
        if label == ignore_index:
            lse[row] = 0
            continue
        # The target: (1 - smoothing) on the label, smoothing / classes on each class, all times the class weights.
        target = label_smoothing / classes * w
        target[label] += (1 - label_smoothing) * w[label]
        loss[row] = (target * (lse[row] - z[row])).sum()
        softmax = np.exp(z[row] - lse[row])
        scale = gradient_scale * (1.0 if row_scale is None else float(row_scale[row]))
        gradient[row] = (target.sum() * softmax - target) * dz[row] * scale
    return loss, lse, gradient
