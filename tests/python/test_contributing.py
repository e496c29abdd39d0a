"""The checklists of CONTRIBUTING.md are true: files and lists exist, and a toy pattern and a toy activation that are added by
them to a copy of the tree are picked up by the tests that hold for all; where a line is left out, one of these tests fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from unswag import _core

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^- `([^`]+)`(?:, `([^`]+)`)?: ", re.MULTILINE)


def checklists() -> dict[str, list[tuple[str, str]]]:
    """Heading → its (file, list or "")."""
    sections = re.split(r"^### ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)[1:]
    return {section.partition("\n")[0]: LINE.findall(section.partition("\n## ")[0]) for section in sections}


LINES = [(kind, file, entry) for kind, lines in checklists().items() for file, entry in lines]


def test_there_is_a_checklist_for_each_kind_of_contribution():
    assert checklists().keys() == {
        "An activation", "A model pattern", "A block codec", "An op", "An instruction set", "A command", "A codebook",
    }  # fmt: skip
    assert all(checklists().values()) and len(checklists()["A model pattern"]) == 3 and len(checklists()["A command"]) == 2
    code = [file for file, _ in checklists()["An activation"] if not file.startswith("docs/")]
    assert len(code) <= 9 and len(checklists()["A block codec"]) <= 5


@pytest.mark.parametrize(("kind", "file", "entry"), LINES, ids=[f"{kind}, {file}" for kind, file, _ in LINES])
def test_every_file_and_list_of_a_checklist_exists(kind, file, entry):
    at = ROOT / file
    if "<" in file:  # a new one, beside others of its kind
        assert list(at.parent.glob(re.sub(r"<\w+>", "*", at.name)))
        return
    assert at.is_file()
    assert entry in at.read_text()


# ---- a copy of the tree -----------------------------------------------------------------------------------------------------


class Tree:
    """A copy of what the Python tests need, with the compiled module of this one."""

    def __init__(self, at: Path) -> None:
        self.at = at
        for folder in ("python", "tests", "tools", "docs", "bench"):
            shutil.copytree(ROOT / folder, at / folder, ignore=shutil.ignore_patterns("__pycache__", "_core*.so"))
        shutil.copy(ROOT / "pyproject.toml", at)
        core = Path(_core.__file__)
        (at / "python" / "unswag" / core.name).symlink_to(core)

    def edit(self, file: str, old: str, new: str) -> None:
        text = (self.at / file).read_text()
        assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
        (self.at / file).write_text(text.replace(old, new))

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of python in the copy."""
        environment = os.environ | {"PYTHONPATH": f"python{os.pathsep}.", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, *arguments], cwd=self.at, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def tests(self, *arguments: str) -> dict[str, bool]:
        """Name of each test that ran → whether it passed."""
        _, said = self.run("-m", "pytest", "-q", "-rA", "--no-header", "-p", "no:cacheprovider", "-W", "ignore", *arguments)
        found = {
            name: word == "PASSED" for word, name in re.findall(r"^(PASSED|FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", said, re.M)
        }
        assert found, said
        return found


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


# ---- a pattern --------------------------------------------------------------------------------------------------------------

PATTERN = '''"""Silu and its square in one module: y = silu(x)^2."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from unswag.torch.functional import silu
from unswag.torch.patterns.pattern import Candidate, floating_parameter, reason_to_leave, replace_unary_forward
from unswag.torch.patterns.probing import MODES, differs_in_use, takes_one_argument, twin, usual
from unswag.torch.patterns.proof import Proof


def squared(module: nn.Module, x: Tensor) -> Tensor:
    return silu(x).square()


class SquaredSilu:
    name = "squared_silu"
    role = None
    saves = "x; stock keeps silu(x) too"

    def find(self, model: nn.Module) -> Iterator[Candidate]:
        for name, module in model.named_modules():
            if not (module._modules or module._parameters) and takes_one_argument(module):
                yield Candidate(name, module, {"like": floating_parameter(model)})

    def probe(self, candidate: Candidate) -> str | None:
        module, like = candidate.module, candidate.parts["like"]
        inputs = usual(torch.randn, 8)
        return reason_to_leave(module, like) or differs_in_use(twin(module), squared, inputs, like.dtype, MODES)

    def apply(self, candidate: Candidate) -> None:
        replace_unary_forward(candidate.module, squared, Proof(candidate))
'''

EXAMPLES = '''"""silu(x)^2 is found; what holds for every pattern stands in test_all.py."""

import matrix
from torch import nn
from torch.nn import functional as F


class Squared(nn.Module):
    def forward(self, x):
        return F.silu(x).square()


def examples():
    return {"of a class": matrix.between(Squared)}
'''


def add_pattern(tree: Tree, name: str, text: str) -> None:
    """The file and its line in ALL."""
    pattern, init, _ = (file.replace("<name>", name) for file, _ in checklists()["A model pattern"])
    cls = name.title().replace("_", "")
    (tree.at / pattern).write_text(text.replace("squared_silu", name).replace("SquaredSilu", cls))
    tree.edit(init, "\nALL: ", f"\nfrom unswag.torch.patterns.{name} import {cls}\n\nALL: ")
    tree.edit(init, "\n)\n\n__all__", f"\n    {cls}(),\n)\n\n__all__")


def test_a_pattern_is_three_files(tree):
    """Without examples the matrix fails, with them its tests run, and pass for a pattern that is right. One that proves nothing
    and computes something else does not pass."""
    matrix, supported = "tests/python/torch/patterns/test_all.py", "tests/python/test_supported.py"
    row = "| `squared_silu` | Silu and its square in one module: y = silu(x)^2. | x; stock keeps silu(x) too |\n"
    add_pattern(tree, "squared_silu", PATTERN)
    assert tree.tests(matrix, supported, "-k", "squared_silu or table_of_support") == {
        "test_a_pattern_is_a_file_of_its_name_that_says_what_it_is[squared_silu]": False,
        "test_the_table_of_support_is_the_one_of_the_code": False,
    }
    a, b = PATTERN.index("        inputs = "), PATTERN.index("    def apply")
    add_pattern(tree, "wrong_silu", (PATTERN[:a] + "        return None\n\n" + PATTERN[b:]).replace(".square()", " * 1.001"))
    tree.edit("docs/supported.md", "\n## Functions", row + row.replace("squared_silu", "wrong_silu") + "\n## Functions")
    for name in ("squared_silu", "wrong_silu"):
        (tree.at / checklists()["A model pattern"][2][0].replace("<name>", name)).write_text(EXAMPLES)
    ran = tree.tests(matrix, supported, "-k", "squared_silu or (wrong_silu and less_is_kept) or table_of_support")
    assert not ran.pop("test_results_are_stocks_and_less_is_kept[wrong_silu, of a class]")
    assert not [name for name, passed in ran.items() if not passed]
    assert {name.partition("[")[0] for name in ran} >= {
        "test_a_pattern_is_a_file_of_its_name_that_says_what_it_is",
        "test_results_are_stocks_and_less_is_kept",
        "test_removed_everything_is_as_it_was",
        "test_a_copy_computes_with_its_own_weights_and_stays_operated",
        "test_a_pickle_is_stock",
        "test_what_changed_after_the_surgery_is_what_runs",
        "test_another_dtype_after_the_surgery",
        "test_transforms_of_torch_func_work_as_stock",
        "test_the_table_of_support_is_the_one_of_the_code",
    }


# ---- an activation ----------------------------------------------------------------------------------------------------------

# The part of the checklist that runs without a compiler: the tables, and the test that finds each of them incomplete. A plugin
# gives the core the new name, in place of a build.
CORE = "from unswag import _core\n\n_core.activations = (*_core.activations, 'mish')\n"
TABLES = {
    "python/unswag/torch/patterns/mlp.py": (
        "ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {\n",
        '    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),\n',
        '    "mish": F.mish,\n',
        "tests/python/torch/patterns/test_mlp.py::test_the_activations_are_those_of_the_core",
    ),
    "python/unswag/jax/formulas.py": (
        "FUNCTIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {",
        '    "quick_gelu": (_quick_gelu, _quick_gelu_derivative),\n',
        '    "mish": (jax.nn.mish, jax.grad(jax.nn.mish)),\n',
        "tests/python/test_lists.py::test_jax_has_them_all",
    ),
    "python/unswag/reference/math.py": (
        "ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {",
        '    "quick_gelu": (_quick_gelu, _quick_gelu_derivative),\n',
        '    "mish": (lambda x: x * np.tanh(np.logaddexp(0, x)), _quick_gelu_derivative),\n',
        "tests/python/test_lists.py::test_activations_of_the_core_are_those_of_reference_jax_and_the_tests",
    ),
    "tests/python/activations.py": (
        "ACTIVATIONS = {",
        "        module=lambda nn: nn.QuickGELU(),\n    ),\n",
        '    "mish": Row("smooth", lambda torch, x: torch.nn.functional.mish(x), lambda jax, x: jax.nn.mish(x),\n'
        "        lambda F, x: F.mish(x), lambda nn: nn.Mish()),\n",
        "tests/python/test_lists.py::test_activations_of_the_core_are_those_of_reference_jax_and_the_tests",
    ),
}


def test_an_activation_that_is_missing_in_a_table_is_found_there(tree):
    assert TABLES.keys() <= {file for file, _ in checklists()["An activation"]}
    (tree.at / "toy_core.py").write_text(CORE)
    consistency = [test for *_, test in TABLES.values()]
    names = [test.partition("::")[2] for test in consistency]
    assert tree.tests("-p", "toy_core", *consistency) == dict.fromkeys(names, False)
    for file, (table, last, row, _) in TABLES.items():
        assert table in (tree.at / file).read_text()
        tree.edit(file, last, last + row)
    assert tree.tests("-p", "toy_core", *consistency) == dict.fromkeys(names, True)
