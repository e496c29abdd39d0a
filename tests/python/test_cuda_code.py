"""The compiled CUDA kernels: no local memory, no float atomics, sixteen-byte accesses, the table of docs/gpu.md; and the tool
that reads them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import cuda_code  # noqa: E402
import cuda_model  # noqa: E402

ARCHITECTURES = ("sm_75", "sm_80", "sm_90")
PTX = "compute_90"

# Kernels that do not stream whole tensors, and why.
NOT_STREAMING = {
    r"FillWith<": "one value per row, where a tensor has no elements",
    r"SumOfRows<": "adds up partial sums, a column each",
    r"Nonzeros<": "values that are kept lie side by side, wherever that is",
    r"::(En|De)code<.*BlockOf<": "codes are bytes of rows that may begin at any byte; what is computed on is shared memory",
}
NO_LOADS = r"::Fill\b"  # writes random draws
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


# ---- the tool ------------------------------------------------------------------------------------------------------------

SAMPLES = r"""
#include <cstdint>
namespace sample {
__global__ void wide(const float4* x, float4* y) { float4 v = x[threadIdx.x]; v.x += 1; y[threadIdx.x] = v; }
__global__ void narrow(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x] + 1; }
__global__ void mixed(const double* x, const std::uint8_t* b, std::uint16_t* y) {
  y[threadIdx.x] = std::uint16_t(x[threadIdx.x] + b[threadIdx.x]);
}
__global__ void spills(const float* x, float* y) {  // 64 values, compiled for 32 registers
  float a[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) a[i] = x[1024 * i + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) y[1024 * i + threadIdx.x] = a[i] * a[(i + 17) % 64] + a[(i + 31) % 64];
}
__global__ void indexes(const float* x, float* y, int k) {
  float a[256];
  for (int i = 0; i < 256; ++i) a[i] = x[i * k];
  y[threadIdx.x] = a[k & 255] + a[(k + 1) & 255];
}
template <class T>
__global__ void adds(const T* x, T* sum) { atomicAdd(sum, x[threadIdx.x]); }
template __global__ void adds<float>(const float*, float*);
template __global__ void adds<double>(const double*, double*);
template __global__ void adds<int>(const int*, int*);
__global__ void fetches(const float* x, float* y) { y[threadIdx.x + 1] = atomicAdd(y, x[threadIdx.x]); }
__global__ void shares(const float* x, float* y) {
  __shared__ float sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, x[threadIdx.x]);
  __syncthreads();
  y[threadIdx.x] = sum;
}
}
"""


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    (folder / "sample.cu").write_text(SAMPLES)
    (folder / "host.cpp").write_text("int nothing() { return 0; }\n")
    targets = [f"-gencode=arch=compute_{name[3:]},code={name}" for name in ARCHITECTURES]
    command = [
        "nvcc",
        "-std=c++17",
        *targets,
        f"-gencode=arch={PTX},code={PTX}",
        "-maxrregcount=32",
        "-c",
        "sample.cu",
        "-o",
        "sample.o",
    ]
    subprocess.run(command, cwd=folder, check=True)
    subprocess.run(["nvcc", "-c", "host.cpp", "-o", "host.o"], cwd=folder, check=True)
    subprocess.run(["ar", "rcs", "library.a", "host.o", "sample.o"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def sample_code(samples):
    return cuda_code.read(samples / "library.a")


def sample(code, architecture, name):
    (one,) = (k for k in code.kernels if (k.architecture, k.name) == (architecture, f"sample::{name}"))
    return one


@needs_nvcc
def test_a_library_is_read_object_by_object(sample_code, samples):
    assert {k.source for k in sample_code.kernels} == {"sample.o"}
    assert sample_code.ptx == {"sample.o": {PTX}}
    names = {k.name for k in sample_code.kernels}
    assert len(names) == 10 and len(sample_code.kernels) == 30
    assert all(k.registers > 0 for k in sample_code.kernels)
    object_code = cuda_code.read(samples / "sample.o")
    assert [(k.architecture, k.name, k.loads) for k in object_code.kernels] == [
        (k.architecture, k.name, k.loads) for k in sample_code.kernels
    ]
    assert {k.source for k in object_code.kernels} == {""}
    assert cuda_code.read(samples / "host.o") == cuda_code.Code()


@needs_nvcc
def test_a_cubin_is_read(samples):
    subprocess.run(
        ["nvcc", "-cubin", "-arch=sm_80", "-maxrregcount=32", "sample.cu", "-o", "sample.cubin"], cwd=samples, check=True
    )
    code = cuda_code.read(samples / "sample.cubin")
    assert {k.architecture for k in code.kernels} == {"sm_80"} and len(code.kernels) == 10
    assert sample(code, "sm_80", "wide").registers > 0 and sample(code, "sm_80", "spills").stack > 0


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accesses_are_counted_by_their_width(sample_code, architecture):
    def of(name):
        k = sample(sample_code, architecture, name)
        return dict(k.loads), dict(k.stores)

    assert of("wide") == ({128: 1}, {128: 1})
    assert of("narrow") == ({32: 1}, {32: 1})
    assert of("mixed") == ({64: 1, 8: 1}, {16: 1})
    assert of("spills") == ({32: 64}, {32: 64})


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_local_memory_is_seen(sample_code, architecture):
    for k in sample_code.kernels:
        uses = k.name in ("sample::spills", "sample::indexes")
        assert (k.stack > 0) == (k.local_loads > 0) == (k.local_stores > 0) == uses, k
    assert sample(sample_code, architecture, "spills").registers == 32
    assert sample(sample_code, architecture, "indexes").stack >= 4 * 256


@needs_nvcc
def test_barriers_are_counted(sample_code):
    for k in sample_code.kernels:
        assert k.barriers == {"sample::shares": 2, "sample::spills": 1}.get(k.name, 0), k


@pytest.mark.parametrize(
    "opcode, what, bits",
    [
        ("LDG.E.EF.128.SYS", "loads", 128),
        ("LDG.E.LTC128B.64.CONSTANT", "loads", 64),
        ("LDG.E.U8", "loads", 8),
        ("LD.E", "loads", 32),
        ("LDGSTS.E.BYPASS.128", "loads", 128),
        ("STG.E.S16", "stores", 16),
        ("STG.E.ENL2.256", "stores", 256),
        ("ST.E.64", "stores", 64),
    ],
)
def test_widths_of_opcodes(opcode, what, bits):
    k = cuda_code.Kernel("", "", "")
    k.count(cuda_code.Instruction(0, opcode, False))
    expected = cuda_code.Kernel("", "", "")
    getattr(expected, what)[bits] = 1
    assert k == expected


@pytest.mark.parametrize(
    "opcode", ["LDS.128", "STS.128", "LDC.64", "REDUX.SUM", "RED.E.ADD.STRONG.GPU", "FADD", "ATOMS.POPC.INC.32"]
)
def test_opcodes_that_count_for_nothing(opcode):
    k = cuda_code.Kernel("", "", "")
    k.count(cuda_code.Instruction(0, opcode, False))
    assert k == cuda_code.Kernel("", "", "")


@pytest.mark.parametrize(
    "opcode",
    [
        "RED.E.ADD.F32.FTZ.RN.STRONG.GPU",
        "REDG.E.ADD.F64.RN",
        "ATOMG.E.ADD.F16x2.RN",
        "RED.E.ADD.BF16_V2",
        "ATOM.E.CAS",
        "ATOMS.CAST.SPIN",
    ],
)
def test_float_atomics_among_opcodes(opcode):
    k = cuda_code.Kernel("", "", "")
    k.count(cuda_code.Instruction(0, opcode, False))
    assert dict(k.float_atomics) == {opcode: 1}


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.a does not exist; build it"):
        cuda_code.read("nowhere.a")


@needs_nvcc
def test_a_file_that_is_no_library(tmp_path):
    (tmp_path / "words.a").write_text("words")
    with pytest.raises(RuntimeError, match="cuobjdump"):
        cuda_code.read(tmp_path / "words.a")


def test_missing_tools_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_code.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="cuobjdump is missing; pip install"):
        cuda_code.read(__file__)


# ---- what is asked of a kernel ---------------------------------------------------------------------------------------------


def uses_local_memory(k):
    """For spilled registers, for arrays or for calls: no kernel may, those in float64 neither."""
    return bool(k.stack or k.local_loads or k.local_stores)


def has_float_atomics(k):
    return bool(k.float_atomics)


def is_narrow(k):
    """Does not both load and store 128 bits at a time, though it streams whole tensors."""
    streams = not any(re.search(pattern, k.name) for pattern in NOT_STREAMING)
    return streams and not (k.stores[128] and (k.loads[128] or re.search(NO_LOADS, k.name)))


def elementwise(k):
    """(bits of an element, inputs, outputs) of an elementwise kernel, else None."""
    match = re.search(r"\bMap<.*, ([\w:]+), (\d), (\d)>", k.name)
    bits = {"float": 32, "double": 64, "unswag::f16": 16, "unswag::bf16": 16}
    return (bits[match[1]], int(match[2]), int(match[3])) if match else None


def is_uneven(k):
    """Is elementwise, but does not take eight elements of each tensor: 128 bits at a time, and one by one where unaligned."""
    if (shape := elementwise(k)) is None:
        return False
    bits, inputs, outputs = shape
    loads, stores = ({128: bits // 16 * tensors, bits: 8 * tensors} for tensors in (inputs, outputs))
    return (dict(k.loads), dict(k.stores)) != (loads, stores)


CHECKS = (uses_local_memory, has_float_atomics, is_narrow, is_uneven)


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "check, caught",
    [
        (uses_local_memory, {"spills", "indexes"}),
        (has_float_atomics, {"adds<float>", "adds<double>", "fetches", "shares"}),
        (is_narrow, {"narrow", "mixed", "spills", "indexes", "adds<float>", "adds<double>", "adds<int>", "fetches", "shares"}),
        (is_uneven, set()),
    ],
)
def test_checks_catch_what_they_should(sample_code, architecture, check, caught):
    names = {k.name.removeprefix("sample::") for k in sample_code.kernels if k.architecture == architecture and check(k)}
    assert names == caught


@pytest.mark.parametrize("change", ["", "loads", "stores"])
def test_uneven_elementwise_kernels_are_caught(change):
    k = cuda_code.Kernel("", "sm_80", "run<Map<Backward<float, Silu, 2>, float, 3, 2> >")
    k.loads.update({128: 6, 32: 24})
    k.stores.update({128: 4, 32: 16})
    if change:
        getattr(k, change)[128] -= 1
    assert is_uneven(k) == bool(change)


# ---- the library ---------------------------------------------------------------------------------------------------------


def library():
    """libunswag_cuda.a: what UNSWAG_CUDA_LIBRARY names, or that of the release build."""
    named = os.environ.get("UNSWAG_CUDA_LIBRARY")
    path = Path(named) if named else ROOT / "build" / "release" / "libunswag_cuda.a"
    if not named and not path.is_file():
        cache = ROOT / "build" / "release" / "CMakeCache.txt"
        if cache.is_file() and re.search(r"^UNSWAG_CUDA:\w+=OFF$", cache.read_text(), re.MULTILINE):
            pytest.skip("build/release has no CUDA kernels (UNSWAG_CUDA=OFF)")
        if shutil.which("nvcc") is None:
            pytest.skip("there are no CUDA kernels: nvcc is not on PATH")
        pytest.fail(f"nvcc is on PATH, but {path} is missing; run make native")
    return path


def test_the_compiled_kernels_are_as_promised():
    """One test, because reading the library takes most of a minute."""
    code = cuda_code.read(library(), cuda_model.wanted)
    kernels = {a: {(k.source, k.name) for k in code.kernels if k.architecture == a} for a in ARCHITECTURES}
    assert {k.architecture for k in code.kernels} == set(ARCHITECTURES)
    assert kernels["sm_75"] == kernels["sm_80"] == kernels["sm_90"]
    assert code.ptx == {source: {PTX} for source in {k.source for k in code.kernels}}

    wrong = {check.__name__: cuda_code.text(cuda_code.Code([k for k in code.kernels if check(k)])) for check in CHECKS}
    assert not any(wrong.values()), "\n".join(f"{name}:\n{kernels}" for name, kernels in wrong.items() if kernels)

    # The names are what the checks take them for.
    shapes = {elementwise(k) for k in code.kernels}
    assert {(bits, *shape) for bits in (16, 32, 64) for shape in [(1, 1), (2, 1), (3, 2), (3, 3)]} <= shapes
    for pattern in [*NOT_STREAMING, NO_LOADS]:
        assert any(re.search(pattern, k.name) for k in code.kernels), pattern

    # What docs/gpu.md says of them, if it was written with this nvcc.
    release, page = cuda_code.compiler(), cuda_model.current()
    if f"nvcc {release} makes" in page:
        made = cuda_model.table(code, release)
        assert made == page, "docs/gpu.md is not current; python tools/cuda_model.py --write build/release/libunswag_cuda.a"
