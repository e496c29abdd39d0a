"""The command `unswag`: what doctor says, and that nothing missing makes it fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

import unswag
from unswag import _core, cli, doctor
from unswag.protocols import ACTIVATIONS

ROOT = Path(__file__).parents[2]


def examined() -> dict:
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def without(monkeypatch, *packages: str) -> None:
    """As if these packages were not installed."""
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in packages else version(name))
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)


def test_doctor_tells_what_is_here():
    found = examined()
    assert found["unswag"] == unswag.__version__
    assert found["kernels"]["chosen"] == _core.current_backend() and found["kernels"]["chosen"] in found["kernels"]["run_here"]
    assert found["cpu"]["cores"] >= 1 and found["cpu"]["model"]
    assert found["memory"]["total"] > 2**28
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    import numpy

    assert found["versions"]["numpy"] == numpy.__version__
    assert {one["activation"] for one in found["protocols"]} == set(ACTIVATIONS)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_doctor_names_the_instruction_sets_of_the_processor():
    flags = Path("/proc/cpuinfo").read_text()
    sets = examined()["cpu"]["instruction_sets"]
    assert all(f" {name}" in flags for name in sets)
    assert ("avx2" in sets) == (" avx2" in flags)


def test_doctor_says_what_jax_will_use():
    pytest.importorskip("jax")
    from unswag.jax.how import choose

    use = examined()["uses"]["jax"]
    import jax.numpy as jnp

    how = choose("relu", jnp.ones((4096, 2)), None, None)
    assert (use["implementation"], use["layout"]) == (how.implementation or "ffi", how.layout)


def test_the_table_for_people_says_the_same(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = examined()
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0
    here = (found["cpu"]["model"], found["kernels"]["chosen"], found["versions"]["numpy"])
    for words in (*here, "leaky_relu", "alpha", "What will be used"):
        assert words in result.stdout, words


@pytest.mark.parametrize("packages", [("torch",), ("jax",), ("torch", "jax", "transformers", "peft", "jaxlib")])
def test_what_is_missing_is_no_failure(monkeypatch, packages):
    without(monkeypatch, *packages)
    found = examined()
    for name in packages:
        assert found["versions"][name] is None and name not in found["uses"]
    assert found["protocols"]
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 0


def test_without_kernels_the_note_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "unswag._core", None)
    monkeypatch.delattr(unswag, "_core")
    found = examined()
    assert found["kernels"] == {} and any(note.startswith("kernels: ") for note in found["notes"])
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 0


def test_a_wrong_name_of_a_row_is_noted(monkeypatch):
    monkeypatch.setenv("UNSWAG_BACKEND", "mmx")
    (note,) = (note for note in examined()["notes"] if note.startswith("kernels: "))
    assert "UNSWAG_BACKEND is 'mmx'" in note and "portable" in note


def test_cuda_devices_come_from_torch(monkeypatch):
    device = types.SimpleNamespace(name="Some T4", major=7, minor=5, total_memory=16 << 30)
    cuda = types.SimpleNamespace(device_count=lambda: 1, get_device_properties=lambda i: device)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(doctor, "_nvidia", lambda: True)
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0" if name == "torch" else None)
    assert examined()["cuda"] == [{"name": "Some T4", "architecture": "sm_75", "memory": 16 << 30}]
    cuda.device_count = lambda: 1 / 0
    found = examined()
    assert found["cuda"] == [] and any(note.startswith("CUDA: ZeroDivisionError") for note in found["notes"])
    without(monkeypatch, "torch")
    assert any("pip install 'unswag[torch]'" in note for note in examined()["notes"])


def test_the_generation_of_a_tpu_comes_from_its_kind(monkeypatch):
    jax = pytest.importorskip("jax")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5 lite")] * 2)
    found = examined()
    assert found["tpu"] == [{"name": "TPU v5 lite", "architecture": "v5e"}] * 2
    assert found["uses"]["jax"]["accelerator"] == "tpu" and found["uses"]["jax"]["layout"] == "rows256"
    assert {"cpu", "tpu"} == {one["accelerator"] for one in found["protocols"]}


def test_torch_is_not_imported_where_no_device_is():
    code = (
        "import sys\nfrom unswag import doctor\ndoctor._nvidia = lambda: False\ndoctor.examine()\nprint('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_help_and_wrong_arguments():
    run = CliRunner()
    assert "doctor" in run.invoke(cli.app, ["--help"]).stdout
    assert "--json" in run.invoke(cli.app, ["doctor", "--help"], env={"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}).stdout
    assert run.invoke(cli.app, ["doctr"]).exit_code == 2


def test_the_command_is_declared_and_runs_as_a_module():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = declared["unswag"].partition(":")
    assert getattr(__import__(module, fromlist=[function]), function) is cli.main
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "COLUMNS": "100"}
    run = subprocess.run(
        [sys.executable, "-m", "unswag", "--help"], env=environment, capture_output=True, text=True, check=True
    )
    assert "Usage: unswag" in run.stdout and "doctor" in run.stdout
