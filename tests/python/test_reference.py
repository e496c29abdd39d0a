"""The plain numpy twin against the worked examples of docs/format.md, published answers, torch in float64, golden files."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.python.activations import ACTIVATIONS

from unswag import reference

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "tests" / "vectors"
NAN, INF = math.nan, math.inf


def test_golden_files_are_what_the_twin_writes():
    written = reference.vectors()
    assert sorted(written) == sorted(path.name for path in VECTORS.glob("*.txt"))
    for name, text in written.items():
        old, new = (VECTORS / name).read_text().splitlines(), text.splitlines()
        assert len(old) == len(new), name
        for number, (a, b) in enumerate(zip(old, new, strict=True), 1):
            assert _close(a, b), f"{name}:{number}"


def _close(a: str, b: str) -> bool:
    """Equal; float64 truth up to the last digits, which the platform's libm may round otherwise."""
    if a == b:
        return True
    (name, dtype, rows, cols, *words), (*head, other) = a.split(), (*b.split()[:4], b.split()[4:])
    if [name, dtype, rows, cols] != head or dtype != "float64":
        return False
    as_float = lambda w: np.array([int(v, 16) for v in w], np.uint64).view(np.float64)  # noqa: E731
    return np.allclose(as_float(words), as_float(other), rtol=1e-13, atol=1e-15, equal_nan=True)


def test_worked_examples_of_the_format_page():
    x = np.array([[-1, -0.0, 0, 0.5, NAN, 7, -INF, INF, 2]], np.float32)
    text = (ROOT / "docs" / "format.md").read_text()
    found = dict(re.findall(r"`(\w+)`: [01 ]+ → bytes ([0-9a-f ]+)", text))
    assert set(found) == {"not_le_zero", "gt_zero", "not_le_zero_or_ge_six", "ge_zero", "gt_zero_and_lt_six"}
    for name, written in found.items():
        assert reference.pack(getattr(reference, name)(x)).tobytes() == bytes.fromhex(written), name
    assert [reference.row_bytes(cols, 1) for cols in (0, 7, 32, 33)] == [0, 4, 4, 8]
    draws = re.search(r"draws 0 to 4 are ([0-9a-f ]+)", text)
    assert draws and [f"{reference.draw(i, 0, 0):08x}" for i in range(5)] == draws[1].split()
    assert reference.dropout(np.ones((1, 4), np.float32), 0.5, 0, 0).tolist() == [[0, 2, 2, 2]]


def test_worked_examples_of_dither_and_non_zeros():
    text = (ROOT / "docs" / "format.md").read_text()
    x = np.array([[-2, -0.5, 0, 1]], np.float32)
    code = reference.dither_code(x, "silu", 2, 0, 0)
    for shown, name in (
        (reference.dither_units(1, 4, 0, 0), "v"),
        (reference.dithered(x, "silu", 2, 0, 0), "\\(f' - m\\) / step \\+ v"),
    ):
        written = re.search(name + r" = ([0-9. ]+)(,| →)", text)
        assert written and [float(f"{v:.5f}") for v in shown[0]] == [float(v) for v in written[1].split()]
    written = re.search(r"codes ([0-3 ]+) → bytes (e4[0-9a-f ]+)\n> factors ([0-9. -]+)", text)
    assert written and written[1] == " ".join(map(str, code[0]))
    assert bytes.fromhex(written[2]) == reference.pack_codes(code, 2).tobytes()
    assert written[3] == " ".join(f"{v:.5f}" for v in reference.dither_factor(code, "silu", 2, 0, 0)[0])
    lowest = {name: float(value) for name, value in re.findall(r"\| (silu|gelu|gelu_tanh) \| (-0[0-9.]+) \|", text)}
    assert lowest == reference.LOWEST_SLOPE
    for act, value in lowest.items():
        grid = reference.activation_derivative(np.linspace(-4, 0, 400_001), act)
        assert abs(grid.min() - value) < 1e-11

    x = np.array([[0, -0.0, 0, 1.5, 0], [NAN, 0, 2, 0, 0]], np.float32)
    written = re.search(r"bitmap ([0-9a-f ]+) / ([0-9a-f ]+), offsets ([0-9 ]+),\n> values ([0-9a-f ]+)", text)
    bitmap, offsets, values = reference.nonzero_encode(x)
    assert written and [b.tobytes().hex(" ") for b in bitmap] == [written[1], written[2]]
    assert written[3] == " ".join(map(str, offsets))
    assert written[4].split() == [f"{v:08x}" for v in values.view(np.uint32)]
    assert reference.nonzero_decode(bitmap, offsets, values, 5).tobytes() == x.tobytes()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_mean_of_dither_is_the_derivative(bits):
    """Over all 2^16 values of v: off by 2^-17 steps at most, since f' reaches neither end of the codes."""
    v = (2 * np.arange(2**16) + 1) / 2**17
    for act, lowest in reference.LOWEST_SLOPE.items():
        step = reference.dither_step(act, bits)
        for slope in [lowest, 1 - lowest, *reference.activation_derivative(np.linspace(-5, 5, 41), act)]:
            code = np.floor((slope - lowest) / step + v)
            assert code.min() >= 0 and code.max() <= 2**bits - 1
            factor = lowest + step * (code + 0.5 - v)
            assert abs(factor.mean() - slope) <= step * 2**-17 * (1 + 1e-6)
            assert abs(((factor - slope) ** 2).mean() / (step**2 / 12) - 1) < 1e-3


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # Random123's kat_vectors, philox4x32 10
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, answer):
    assert [f"{word:08x}" for word in reference.philox4x32(counter, key)] == answer.split()


def test_philox_counter_carries_into_the_upper_half():
    # offset 2^64 - 1, draw 4: counter 2^64, whose words are 0 0 1 0
    assert reference.draw(4, 9, 2**64 - 1) == reference.philox4x32((0, 0, 1, 0), (9, 0))[0]


@pytest.mark.parametrize("cols", [0, 1, 7, 8, 31, 32, 33, 100])
def test_unpack_undoes_pack_and_tails_are_zero(cols):
    bit = np.random.default_rng(cols).random((3, cols)) < 0.5
    packed = reference.pack(bit)
    assert packed.shape == (3, reference.row_bytes(cols, 1))
    assert (reference.unpack(packed, cols) == bit).all()
    assert np.unpackbits(packed).sum() == bit.sum()  # nothing set past the last column


def test_bfloat16_is_torch_bfloat16():
    x = np.concatenate([np.random.default_rng(0).standard_normal(4096).astype(np.float32), np.float32([0, -0.0, INF, 1e-45])])
    expected = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert (reference.to_bfloat16(x) == expected).all()
    assert np.isnan(reference.from_bfloat16(reference.to_bfloat16(np.float32([NAN])))).all()


# ---- the mathematics, against PyTorch in float64 ---------------------------------------------------------------------

TORCH = {name: partial(row.torch, torch) for name, row in ACTIVATIONS.items()}


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("act", TORCH)
def test_activation_and_derivative(act):
    reach = ACTIVATIONS[act].reach
    x = torch.linspace(-reach, reach, 2401, dtype=torch.float64).requires_grad_()
    y = TORCH[act](x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    np.testing.assert_allclose(reference.activation(x.detach().numpy(), act), y.detach(), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(reference.activation_derivative(x.detach().numpy(), act), dx, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("act", TORCH)
def test_gated(act):
    gate, up, dh = _draw(3, 4, 9)
    gate.requires_grad_(), up.requires_grad_()
    h = TORCH[act](gate) * up
    dgate, dup = torch.autograd.grad(h, (gate, up), dh)
    g, u = gate.detach().numpy(), up.detach().numpy()
    np.testing.assert_allclose(reference.gated_forward(g, u, act), h.detach(), rtol=1e-12)
    for ours, torchs in zip(reference.gated_backward(g, u, dh.numpy(), act), (dgate, dup), strict=True):
        np.testing.assert_allclose(ours, torchs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_rms_norm(weight_offset):
    x, dy = _draw(2, 5, 11)
    w = _draw(11)
    x.requires_grad_(), w.requires_grad_()
    y = torch.nn.functional.rms_norm(x, (11,), w + weight_offset, 1e-6)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    ours, rstd = reference.rms_norm_forward(x.detach().numpy(), w.detach().numpy(), 1e-6, weight_offset)
    np.testing.assert_allclose(ours, y.detach(), rtol=1e-12)
    back = reference.rms_norm_backward(x.detach().numpy(), rstd, w.detach().numpy(), dy.numpy(), weight_offset)
    for a, b in zip(back, (dx, dw), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(smoothing, softcap, weighted):
    logits, labels = (3 * _draw(6, 13)).requires_grad_(), torch.tensor([0, 12, -100, 5, 5, 1])
    w = _draw(13).abs() if weighted else None
    z = 0.7 * logits
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    loss = torch.nn.functional.cross_entropy(z, labels, weight=w, label_smoothing=smoothing, reduction="none")
    row_scale = _draw(6)
    (gradient,) = torch.autograd.grad(loss, logits, row_scale * 1.5)
    lse = torch.where(labels == -100, 0.0, z.logsumexp(-1).detach())
    ours = reference.cross_entropy(
        logits.detach().numpy(), labels.numpy(), None if w is None else w.numpy(), row_scale.numpy(), 1.5,
        label_smoothing=smoothing, softcap=softcap, logit_scale=0.7,
    )  # fmt: skip
    for a, b in zip(ours, (loss.detach(), lse, gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)
