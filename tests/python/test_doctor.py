"""What doctor finds, and that nothing missing makes it fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import unswag
from unswag import _core, doctor
from unswag.policy import protocols

ROOT = Path(__file__).parents[2]


def examined() -> dict:
    return json.loads(json.dumps(doctor.examine()))


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
    assert {one["activation"] for one in found["protocols"]} == set(protocols())


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


@pytest.mark.parametrize("packages", [("torch",), ("jax",), ("torch", "jax", "transformers", "peft", "jaxlib")])
def test_what_is_missing_is_no_failure(monkeypatch, packages):
    without(monkeypatch, *packages)
    found = examined()
    for name in packages:
        assert found["versions"][name] is None and name not in found["uses"]
    assert found["protocols"]
    assert ("PyTorch" in found["verdict"]["works"]) == ("torch" not in packages)
    if len(packages) > 2:
        assert found["verdict"]["works"] == "nothing yet" and "pip install '.[torch]'" in found["verdict"]["next"]


def test_without_kernels_the_note_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "unswag._core", None)
    monkeypatch.delattr(unswag, "_core")
    found = examined()
    assert found["kernels"] == {} and any(note.startswith("kernels: ") for note in found["notes"])
    assert "PyTorch" not in found["verdict"]["works"] and "unswag._core cannot be used" in found["verdict"]["next"]
    assert found["protocols"] == []


def test_a_wrong_name_of_a_row_is_noted(monkeypatch):
    monkeypatch.setenv("UNSWAG_BACKEND", "mmx")
    (note,) = (note for note in examined()["notes"] if note.startswith("kernels: "))
    assert "UNSWAG_BACKEND is 'mmx'" in note and "portable" in note


def on_cuda(monkeypatch, *capabilities: tuple[int, int]) -> types.SimpleNamespace:
    """As if torch found one CUDA device for each, and jax were not there."""
    devices = [types.SimpleNamespace(name="Some T4", major=a, minor=b, total_memory=16 << 30) for a, b in capabilities]
    cuda = types.SimpleNamespace(device_count=lambda: len(devices), get_device_properties=lambda i: devices[i])
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(doctor, "_nvidia", lambda: True)
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0" if name == "torch" else None)
    return cuda


def test_cuda_devices_come_from_torch(monkeypatch):
    cuda = on_cuda(monkeypatch, (7, 5))
    monkeypatch.setattr(_core, "cuda_problem", lambda device: "")
    (device,) = examined()["cuda"]
    assert device == {"index": 0, "name": "Some T4", "architecture": "sm_75", "memory": 16 << 30, "problem": ""}
    assert "make gpu-check" in examined()["verdict"]["next"]
    cuda.device_count = lambda: 1 / 0
    found = examined()
    assert found["cuda"] == [] and any(note.startswith("CUDA: ZeroDivisionError") for note in found["notes"])
    without(monkeypatch, "torch")
    assert any("neither torch nor jax finds a device: install" in note for note in examined()["notes"])


@pytest.mark.parametrize("first", ["", "made for sm_90 [only]"])
def test_cuda_is_used_where_one_device_has_no_problem(monkeypatch, first):
    on_cuda(monkeypatch, (7, 5), (9, 0))
    monkeypatch.setattr(_core, "cuda_problem", lambda device: ("no driver", first)[1 - device])
    monkeypatch.setattr(_core, "cuda_architectures", lambda: ("sm_80", "compute_90"))
    found = examined()
    assert found["kernels"]["cuda"] == ["sm_80", "compute_90"] and [d["problem"] for d in found["cuda"]] == [first, "no driver"]
    use, row = ("cuda", "cuda") if first == "" else ("cpu", found["kernels"]["chosen"])
    assert found["uses"] == {"torch": {"accelerator": use, "implementation": f"native, {row}", "layout": "rows"}}
    assert {one["accelerator"] for one in found["protocols"]} == {"cpu", use}
    assert found["notes"] == [f"no kernels run on CUDA device {i}: {why}" for i, why in enumerate((first, "no driver")) if why]
    assert ("PyTorch on CUDA devices" in found["verdict"]["works"]) == (first == "")
    assert "CUDA kernels (tested emulated" in found["verdict"]["untested"]
    assert "a CUDA device is not used" in found["verdict"]["next"]


def test_the_reason_of_the_core_is_told(monkeypatch):
    on_cuda(monkeypatch, *[(7, 5)] * 100)
    device, why = examined()["cuda"][99], _core.cuda_problem(99)
    assert why and device["problem"] == why
    monkeypatch.setitem(sys.modules, "unswag._core", None)
    monkeypatch.delattr(unswag, "_core")
    found = examined()
    assert found["cuda"][0]["problem"] == "unknown" and found["uses"]["torch"]["accelerator"] == "cpu"


def test_cuda_devices_come_from_jax_where_torch_finds_none(monkeypatch):
    jax = pytest.importorskip("jax")
    device = types.SimpleNamespace(device_kind="Some H100", local_hardware_id=2, compute_capability="9.0")
    monkeypatch.setattr(doctor, "_nvidia", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(_core, "cuda_problem", lambda index: "" if index == 2 else "another")
    without(monkeypatch, "torch")
    found = examined()
    assert found["cuda"] == [{"index": 2, "name": "Some H100", "architecture": "sm_90", "problem": ""}] and found["tpu"] == []
    assert found["uses"]["jax"] == {"accelerator": "cuda", "implementation": "xla", "layout": "rows"}
    assert {one["accelerator"] for one in found["protocols"]} == {"cuda"}


def test_the_generation_of_a_tpu_comes_from_its_kind(monkeypatch):
    jax = pytest.importorskip("jax")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(device_kind="TPU v5 lite")] * 2)
    found = examined()
    assert found["tpu"] == [{"name": "TPU v5 lite", "architecture": "v5e"}] * 2
    assert found["uses"]["jax"]["accelerator"] == "tpu" and found["uses"]["jax"]["layout"] == "rows256"
    assert "JAX on TPUs" in found["verdict"]["works"] and "TPU programs (compiled only)" in found["verdict"]["untested"]
    assert {"cpu", "tpu"} == {one["accelerator"] for one in found["protocols"]}


def test_torch_is_not_imported_where_no_device_is():
    code = (
        "import sys\nfrom unswag import doctor\ndoctor._nvidia = lambda: False\ndoctor.examine()\nprint('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_what_was_only_emulated_is_said_where_it_is_used(monkeypatch):
    monkeypatch.setattr(_core, "cuda_architectures", lambda: ())
    without(monkeypatch, "jax")
    assert examined()["verdict"]["untested"] == "nothing that is used here"
    monkeypatch.setattr(_core, "cuda_architectures", lambda: ("sm_90",))
    assert examined()["verdict"]["untested"].endswith(doctor.TESTED["cuda"])  # the build has them, wherever it runs
