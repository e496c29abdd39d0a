"""What is declared is pinned, the core has its types beside it, and the wheel carries the library and nothing else."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def name_of(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def test_every_declared_package_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in ("torch", "jax", "dev"):
        declared += project["project"]["optional-dependencies"][extra]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {name_of(line) for line in lines}
    assert len(pinned) == len(lines)
    assert {name_of(requirement) for requirement in declared} <= pinned
    assert {"jax", "jaxlib"} <= pinned


def test_the_stub_beside_the_core_is_that_of_this_core():
    from unswag import _core

    def functions(text: str) -> dict[str, list[str]]:
        """name → names of the parameters"""
        found = [f for f in ast.parse(text).body if isinstance(f, ast.FunctionDef)]  # not those of the submodules
        return {f.name: [a.arg for a in f.args.args] for f in found}

    stub = Path(_core.__file__).with_name("_core.pyi")
    assert stub.is_file(), f"{stub} is missing; run make native"
    of_module = [f for f in vars(_core).values() if callable(f) and not isinstance(f, type)]
    given = "\n".join(f"def {line}: ..." for f in of_module for line in f.__doc__.splitlines()[:1])
    assert functions(given) == functions(stub.read_text()), f"{stub} is older than the module; run make native"
    assert len(functions(given)) > 15
    names = {node.target.id for node in ast.parse(stub.read_text()).body if isinstance(node, ast.AnnAssign)}
    assert names == {name for name, value in vars(_core).items() if isinstance(value, tuple | dict) and name[0] != "_"}


@pytest.mark.slow
def test_the_wheel_carries_one_core_and_the_package_alone(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    environment = os.environ | {"UNSWAG_CUDA": "OFF"}
    subprocess.run([*command, f"-Cbuild-dir={tmp_path / 'build'}"], cwd=ROOT, env=environment, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 6e6
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if ".dist-info/" not in name]
        symbols = {name: b"\0.symtab\0" in file.read(name) for name in names if name.endswith(".so")}
    assert symbols and not any(symbols.values()), "the library is not stripped"
    sources = subprocess.run(["git", "ls-files", "."], cwd=ROOT / "python", capture_output=True, text=True, check=True)
    cores = [name for name in names if "_core." in name and not name.endswith(".pyi")]
    assert len(cores) == 1 and cores[0].startswith("unswag/_core.")
    assert sorted(set(names) - set(cores)) == sorted([*sources.stdout.split(), "unswag/_core.pyi"])
