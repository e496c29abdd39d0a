"""Every list that names what the core has: ops, reference, patterns, modules, JAX, policies, docs and tests agree with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.python.activations import ACTIVATIONS, MASKS, Row

from unswag import _core, codebooks, policy, reference

pytestmark = pytest.mark.native

DOCS = Path(__file__).parents[2] / "docs"


class Names:
    """In place of a module: notes the names that a spelling asks it for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __getattr__(self, name: str):
        self.asked.add(name)
        return lambda *args, **options: None


def asked(field: str, *others: object) -> set[str]:
    """The names of a module of ours that the spellings of this field use."""
    names = Names()
    for row in (MASKS | ACTIVATIONS).values():
        if spelling := getattr(row, field):
            spelling(names, *others)
    return names.asked


def words(cell: str) -> list[str]:
    """The names in backquotes."""
    return re.findall(r"`(\w+)`", cell)


# ---- activations and masks ----------------------------------------------------------------------------------------------


def test_activations_of_the_core_are_those_of_reference_jax_and_the_tests():
    assert list(reference.ACTIVATIONS) == list(_core.activations)
    assert set(ACTIVATIONS) == set(_core.activations)


def test_masks_of_the_core_are_those_of_reference_and_the_tests():
    assert list(reference.PREDICATES) == list(_core.masks)
    assert set(MASKS) == {name for name in _core.masks if not name.startswith("jax_")}


def test_what_is_dithered_has_its_lowest_derivative_in_the_reference():
    assert list(reference.LOWEST_SLOPE) == list(_core.dithered)


def test_every_smooth_activation_has_codebooks():
    assert set(codebooks.SMOOTH) == {name for name, row in ACTIVATIONS.items() if row.kind == "smooth"}


def test_torch_has_them_all():
    pytest.importorskip("torch")
    import unswag.torch
    from unswag.torch import functional, nn, ops

    for table, names in (
        (ops.ACTIVATIONS, _core.activations),
        (ops.MASKS, _core.masks),
        (ops.BLOCKS, _core.blocks),
        (ops.DITHERED, _core.dithered),
    ):
        assert list(table) == list(names)
    assert [str(dtype).removeprefix("torch.") for dtype in ops.DTYPES] == list(_core.dtypes)
    others = {"activation", "dropout", "gated", "gated_halves", "layer_norm", "rms_norm"}
    assert set(functional.__all__) == asked("ours", None) | asked("gated", None, None) | others
    assert set(nn.__all__) == asked("module") | {"Dropout", "GEGLU", "LayerNorm", "RMSNorm", "ReGLU", "SwiGLU"}
    assert set(functional.__all__) < set(unswag.torch.__all__)
    assert all(getattr(unswag.torch, name) is getattr(functional, name) for name in functional.__all__)


def test_patterns_recognise_them_all():
    pytest.importorskip("torch")
    from unswag.torch.patterns import activation

    assert set(activation.ACTIVATIONS) == set(_core.activations)


def test_jax_has_them_all():
    pytest.importorskip("jax")
    from unswag import jax as uj
    from unswag.jax.formulas import FUNCTIONS

    assert list(FUNCTIONS) == list(_core.activations)
    found = asked("ours_jax", None) | asked("gated_jax", None, None)
    assert found < set(uj.__all__)
    rows = [line for line in (DOCS / "jax.md").read_text().splitlines() if re.match(r"\| `\w+`", line)]
    assert {name for row in rows for name in words(row.split("|")[1])} == found | {"dropout", "layer_norm", "rms_norm"}


def test_docs_give_the_formula_of_each():
    """docs/math.md has a section of masks and one of activations, a formula a line; relu is among the masks."""
    masks, activations = (DOCS / "math.md").read_text().split("\n## ")[2:4]
    assert masks.startswith("1. Masks") and activations.startswith("2. ")
    found = [set(re.findall(r"^ {4}(\w+) +(?:y|f\(x\)) = ", section, re.M)) for section in (masks, activations)]
    assert found[0] == set(MASKS) and found[0] | found[1] == set(MASKS) | set(_core.activations)


def test_a_row_spells_what_it_is_called():
    """So that no two rows are the same, and each name is that of the formula."""
    torch = pytest.importorskip("torch")
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    for name, row in ACTIVATIONS.items():
        assert torch.allclose(row.torch(torch, x), torch.from_numpy(reference.activation(x.numpy(), name)), rtol=1e-12)
    assert all(isinstance(row, Row) and row.kind in ("mask", "smooth", "square") for row in ACTIVATIONS.values())


# ---- block codecs -------------------------------------------------------------------------------------------------------


def test_block_codecs_of_the_core_are_those_of_policy_reference_and_docs():
    forms = _core.block_forms
    assert list(forms) == list(_core.blocks)
    bits = {name: bits + 16 / values for name, (values, bits, _) in forms.items()}  # with a scale of 2 bytes a block
    assert bits == policy.BLOCKS
    assert {name: (values, bits) for name, (values, bits, _) in forms.items()} == reference.BLOCKS
    documented = {}
    for row in re.findall(r"^\| (`.*?) \| (\d+) \| (\d+) \| ([\d.]+) \|", (DOCS / "format.md").read_text(), re.M):
        documented |= {name: (int(row[1]), int(row[2]), float(row[3])) for name in words(row[0])}
    assert documented == {name: (values, width, bits[name]) for name, (values, width, _) in forms.items()}
