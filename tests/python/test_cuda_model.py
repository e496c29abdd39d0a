"""What docs/gpu.md says about the compiled kernels: loops are found, costs counted, and the table is that of the library."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import cuda_code  # noqa: E402
import cuda_model  # noqa: E402


def listing(text):
    """Instructions from lines like "L1: @P0 BRA L2", of 16 bytes each."""
    lines = [line.split() for line in text.strip().splitlines()]
    labels = {line[0]: 16 * k for k, line in enumerate(lines) if line[0].endswith(":")}
    out = []
    for k, words in enumerate(lines):
        words = words[1:] if words[0].endswith(":") else words
        conditional = words[0].startswith("@")
        opcode, *rest = words[1:] if conditional else words
        out.append(cuda_code.Instruction(16 * k, opcode, conditional, labels[f"{rest[0]}:"] if rest else None))
    return out


# Sixteen bytes at a time, or, where they are not aligned, two loads of eight bytes; a rare detour; a loop inside.
LOOP = """
        MOV
head:   @P0 BRA narrow
        LDG.E.128
        BRA both
narrow: LDG.E.64
        LDG.E.64
        IADD3
both:   @P1 BRA after
        FADD
        MUFU.RCP
after:  FMUL
inner:  FFMA
        @P2 BRA inner
        STG.E.128
        @P3 BRA head
        EXIT
"""


def test_the_shortest_way_that_moves_most_bytes():
    both, inner = sorted(cuda_model.Ways(listing(LOOP.replace("inner:", "inside:").replace("@P2 BRA inner", "NOP"))).loops() +
                         cuda_model.Ways(listing(LOOP)).loops(), key=lambda way: -len(way.instructions))[:2]  # fmt: skip
    assert [i.opcode for i in both.instructions] == [
        "BRA", "LDG.E.128", "BRA", "BRA", "FMUL", "FFMA", "NOP", "STG.E.128", "BRA"
    ]  # fmt: skip
    assert (both.bits("LDG"), both.bits("STG"), both.count("LDG", 128)) == (128, 128, 1)
    assert len(inner.instructions) == 2  # the loop around it has no way that leaves it out


def test_what_is_called_counts():
    text = """
head:   LDG.E.128
        CALL.REL.NOINC helper
        STG.E.128
        @P0 BRA head
        EXIT
helper: DFMA
        @P1 BRA long
        RET
long:   DADD
        DADD
        RET
"""
    (way,) = cuda_model.Ways(listing(text)).loops()
    assert [i.opcode for i in way.instructions] == ["LDG.E.128", "CALL.REL.NOINC", "DFMA", "BRA", "RET", "STG.E.128", "BRA"]


def test_a_jump_back_into_the_middle_is_no_loop():
    assert cuda_model.loops_of([[1, 2], [2], [1, 3], []]) == {}
    assert cuda_model.loops_of([[1], [1, 2], [0, 3], []]) == {0: {0, 1, 2}, 1: {1}}


@pytest.mark.parametrize(
    "opcode, pipe",
    [("FFMA", "fma"), ("IMAD.WIDE.U32", "fma"), ("DFMA", "double"), ("MUFU.EX2", "xu"), ("F2F.F64.F32", "xu"),
     ("F2FP.BF16", "alu"), ("LDG.E.128", "memory"), ("STS", "memory"), ("LOP3.LUT", "alu"), ("FSETP.GT", "alu"),
     ("UIADD3", "none"), ("BRA", "none")],
)  # fmt: skip
def test_pipes(opcode, pipe):
    assert cuda_model.pipe(cuda_code.Instruction(0, opcode, False)) == pipe


def test_costs_are_of_an_element():
    way = cuda_model.Way(listing("LDG.E.128\nFADD\nFADD\nMUFU.RCP\nSTG.E.128\nSTG.E.U8\nBRA"))
    (phase,) = cuda_model.stream(1)
    cost = phase.cost([way, cuda_model.Way(listing("FADD"))], 16)
    assert cost == {"instructions": 7 / 8, "fma": 2 / 8, "xu": 1 / 8, "memory": (4 + 4 + 1) / 8, "none": 1 / 8}
    with pytest.raises(LookupError):
        phase.cost([cuda_model.Way(listing("LDG.E\nSTG.E"))], 16)


def test_the_share_of_a_copy_is_bound_by_the_slowest():
    machine = cuda_model.Machine("one", 1, 1.0, 128, 64, 32, 1 << 16, 1024, {"fma": 1, "xu": 8})  # 128 instructions per ns
    share = cuda_model.share_of_copy
    assert share(machine, cuda_model.Cost({"instructions": 4}), 4) == 1.0
    assert share(machine, cuda_model.Cost({"instructions": 8, "fma": 4}), 4) == 0.5
    assert share(machine, cuda_model.Cost({"instructions": 4, "xu": 2}), 4) == 0.25


@pytest.mark.parametrize(
    "registers, shared, threads, warps",
    [(32, 0, 256, 64), (33, 0, 256, 48), (64, 0, 256, 32), (64, 40 << 10, 256, 32), (64, 70 << 10, 256, 24), (64, 0, 512, 32),
     (96, 0, 256, 16), (16, 1024, 32, 32), (32, 57856, 256, 24)],  # the last: 1 KiB of each block is the device's
)  # fmt: skip
def test_warps_that_a_processor_holds(registers, shared, threads, warps):
    kernel = cuda_code.Kernel("", "sm_90", "", registers=registers, shared=shared)
    assert cuda_model.resident_warps(cuda_model.MACHINES["sm_90"], kernel, threads, 0) == warps


def test_rows_that_are_held():
    assert [cuda_model.held(n) for n in (1000, 4096, 8192, 40000)] == [4000, 8192, 8192, 40000]


def test_the_page_has_a_row_for_every_kernel():
    """tests/python/test_cuda_code.py, which reads the library, compares what stands in them."""
    lines = cuda_model.current().splitlines()
    ops = [line.split(" | ")[:2] for line in lines if line.startswith("| ")][1:]
    assert ops == [[f"| {row.op}", dtype] for row in cuda_model.ROWS for dtype in cuda_model.TYPES]
