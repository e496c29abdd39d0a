"""What the compiled kernels cost on a GPU, by reading them: python tools/cuda_model.py [--write] FILE

Prints the table of docs/gpu.md from a library of kernels (build/release/libunswag_cuda.a), or writes it there. Nothing is
measured. For each kernel and architecture:

* registers, and the warps that a processor can hold at a time, of those that it has places for;
* instructions per byte: those on the shortest way through the innermost loops that moves whole eights, over the bytes that the
  op must move. What stands outside of these loops is left out, so there may be more;
* the share of a copy that this allows at most: the time that memory needs for the bytes, over the longest of that time and the
  times that the scheduler and each pipe need for the instructions. Latencies are left out.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_code  # noqa: E402
from cuda_code import Instruction, Kernel  # noqa: E402

PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- kernels: begin, written by tools/cuda_model.py -->", "<!-- kernels: end -->"


# ---- the machines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """From the data sheets, and from the tables of the CUDA C++ Programming Guide (compute capabilities, throughput)."""

    name: str
    processors: int
    ghz: float  # boost
    gb_s: float  # of memory
    warps: int  # a processor has places for
    blocks: int
    shared: int  # bytes
    reserved: int  # of them, for each block of any kernel
    cycles: dict[str, float]  # of a scheduler, for a warp's instruction in a pipe; there are four schedulers


SCHEDULERS, REGISTERS = 4, 65536
MACHINES = {
    "sm_75": Machine("T4", 40, 1.59, 320, 32, 16, 64 << 10, 0, {"fma": 2, "alu": 2, "xu": 8, "double": 64, "memory": 8}),
    "sm_80": Machine("A100", 108, 1.41, 2039, 64, 32, 164 << 10, 1024, {"fma": 2, "alu": 2, "xu": 8, "double": 4, "memory": 4}),
    "sm_90": Machine("H100", 132, 1.83, 3350, 64, 32, 228 << 10, 1024, {"fma": 1, "alu": 2, "xu": 8, "double": 2, "memory": 4}),
}

PIPES = (
    (r"F(ADD|MUL|FMA)|IMAD|HFMA2|HADD2|HMUL2", "fma"),
    (r"D(ADD|MUL|FMA|SETP)", "double"),
    (r"MUFU|POPC|FLO|BREV|I2F|F2I|F2F$|I2I", "xu"),
    (r"LD|ST|RED|ATOM", "memory"),
    (r"BRA|BSSY|BSYNC|EXIT|NOP|CALL|RET|BAR|WARPSYNC|U[A-Z]|S2UR|R2UR|CS2R|MOV", "none"),
)


def pipe(instruction: Instruction) -> str:
    base = instruction.opcode.partition(".")[0]
    return next((name for pattern, name in PIPES if re.match(pattern, base)), "alu")


# ---- loops ----------------------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """The instructions of one pass through a loop."""

    instructions: list[Instruction] = field(default_factory=list)

    def bits(self, base: str) -> int:
        """Of the accesses whose opcode begins with `base` (LDG, STG, LDS, STS)."""
        return sum(i.bits for i in self.instructions if i.opcode.split(".")[0] == base)

    def count(self, base: str, bits: int) -> int:
        return sum(i.opcode.split(".")[0] == base and i.bits == bits for i in self.instructions)


def blocks_of(listing: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """The basic blocks, and the blocks that may follow each."""
    at = {instruction.address: k for k, instruction in enumerate(listing)}
    ends = [i.opcode.split(".")[0] in ("BRA", "EXIT", "RET", "BRX") for i in listing]
    starts = {0} | {k + 1 for k, end in enumerate(ends) if end}
    starts |= {at[i.target] for i in listing if i.target in at}
    order = sorted(k for k in starts if k < len(listing))
    number = {k: b for b, k in enumerate(order)}
    blocks = [listing[k:end] for k, end in zip(order, [*order[1:], len(listing)], strict=True)]
    follows = []
    for b, block in enumerate(blocks):
        last = block[-1]
        leaves = last.opcode.split(".")[0] in ("EXIT", "RET", "BRX", "BRA") and not last.conditional
        next_blocks = [] if leaves or b + 1 == len(blocks) else [b + 1]
        if last.opcode.startswith("BRA") and last.target in at:
            next_blocks.append(number[at[last.target]])
        follows.append(next_blocks)
    return blocks, follows


def loops_of(follows: list[list[int]]) -> dict[int, set[int]]:
    """{header: blocks} of every loop: of a jump back to a block without which its own is not reached."""
    before = defaultdict(list)
    for b, next_blocks in enumerate(follows):
        for n in next_blocks:
            before[n].append(b)
    everything = set(range(len(follows)))
    over = {b: {0} if b == 0 else everything for b in everything}  # the blocks that every way to b passes
    changed = True
    while changed:
        changed = False
        for b in sorted(everything - {0}):
            new = {b} | (set.intersection(*(over[p] for p in before[b])) if before[b] else set())
            if new != over[b]:
                over[b], changed = new, True
    loops: dict[int, set[int]] = {}
    for b, next_blocks in enumerate(follows):
        for header in next_blocks:
            if header in over[b]:
                body, left = {header}, [b]
                while left:
                    one = left.pop()
                    if one not in body:
                        body.add(one)
                        left += before[one]
                loops[header] = loops.get(header, set()) | body
    return loops


class Ways:
    """Finds the shortest ways through a kernel."""

    def __init__(self, listing: list[Instruction]):
        self.blocks, self.follows = blocks_of(listing)
        self.at = {block[0].address: b for b, block in enumerate(self.blocks)}
        self.called: dict[int, list[Instruction]] = {}

    def loops(self) -> list[Way]:
        """Of each loop, without those inside it, the way that moves most bytes, and of these the shortest."""
        loops = loops_of(self.follows)
        found = []
        for header, body in loops.items():
            own = body - set().union(*(other for h, other in loops.items() if h != header and other < body))
            if header in own and (way := self.best(header, own, lambda b, h=header: h in self.follows[b])):
                found.append(Way(way))
        return found

    def in_full(self, b: int) -> list[Instruction]:
        """The instructions of block b and of what it calls."""
        out = []
        for i in self.blocks[b]:
            out.append(i)
            if i.opcode.startswith("CALL") and i.target in self.at:
                out += self.callee(self.at[i.target])
        return out

    def callee(self, start: int) -> list[Instruction]:
        if start not in self.called:
            self.called[start] = []  # no function here calls itself
            everywhere = set(range(len(self.blocks)))
            returns = lambda b: self.blocks[b][-1].opcode.startswith("RET")  # noqa: E731
            self.called[start] = self.best(start, everywhere, returns)
        return self.called[start]

    def best(self, start: int, own: set[int], ends: Callable[[int], bool]) -> list[Instruction]:
        """From block `start` through those of `own`, once each, to one that `ends`."""
        best: dict[int, tuple[float, list[int]]] = {}

        def walk(b: int) -> tuple[float, list[int]]:
            if b not in best:
                best[b] = (-math.inf, [])
                choices = [(0.0, list[int]())] if ends(b) else []
                choices += [walk(n) for n in self.follows[b] if n in own and n != start]
                value, rest = max(choices, key=lambda choice: choice[0], default=(-math.inf, []))
                instructions = self.in_full(b)
                moved = sum(i.bits for i in instructions if re.match("LD|ST", i.opcode))
                best[b] = (value + 1e6 * moved - len(instructions), [b, *rest])
            return best[b]

        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(max(limit, 10 * len(self.blocks) + 1000))
        value, path = walk(start)
        sys.setrecursionlimit(limit)
        return [i for b in path for i in self.in_full(b)] if value > -math.inf else []


# ---- the kernels ----------------------------------------------------------------------------------------------------------

Cost = Counter[str]  # of an element: "instructions", and those of each pipe


@dataclass(frozen=True)
class Phase:
    """A loop, known by what it moves: elements(way, bits of an element) in one pass, 0 for a loop that is another."""

    elements: Callable[[Way, int], float]
    times: int = 1  # how many such loops there are, for as many tensors

    def cost(self, candidates: Iterable[Way], bits: int) -> Cost:
        fitting = [(len(way.instructions) / n, way, n) for way in candidates if (n := self.elements(way, bits))]
        if not fitting:
            raise LookupError("there is no such loop")
        _, way, n = min(fitting, key=lambda entry: entry[0])
        cost: Cost = Counter()
        for i in way.instructions:
            cost["instructions"] += self.times / n
            words = max(1, i.bits / 32) if pipe(i) == "memory" else 1
            cost[pipe(i)] += self.times * words / n
        return cost


def stream(inputs: int) -> tuple[Phase, ...]:
    """From global memory to global memory, eight elements of each input at a time."""

    def elements(way: Way, bits: int) -> float:
        n = way.bits("LDG") / bits / inputs
        return n if n >= 8 and way.bits("STG") and way.count("LDG", 128) else 0

    return (Phase(elements),)


def rows(copied: int, summed: int, passes: int = 1) -> tuple[Phase, ...]:
    """Into shared memory, from there into sums, and from there or again from global memory to global memory."""

    def copy(way: Way, bits: int) -> float:
        return way.bits("LDG") / bits if way.count("LDG", 128) and way.count("STS", 128) else 0

    def add(way: Way, bits: int) -> float:
        n = way.count("LDS", bits) / summed
        return n if not way.bits("STG") and not way.bits("STS") and n >= 1 else 0

    def write(way: Way, bits: int) -> float:
        return way.bits("STG") / bits if way.count("STG", 128) and (way.count("LDS", 128) or way.count("LDG", 128)) else 0

    return Phase(copy, copied), Phase(add, passes), Phase(write)


def held(bytes_of_a_row: int) -> int:
    """`rows_held` of src/cuda/norm.hpp."""
    count = 4
    while count > 1 and count * bytes_of_a_row > (44 << 10) // 3:
        count //= 2
    return count * bytes_of_a_row


COLUMNS = 2048  # of a norm's rows


@dataclass(frozen=True)
class Row:
    op: str
    kernel: str  # source and name, a pattern; T is the type
    moved: Callable[[int], float]  # bytes for an element of so many bytes
    phases: tuple[Phase, ...]
    threads: int = 256
    shared: Callable[[int], int] = lambda item: 0  # what a launch asks for


def elementwise(name: str, kernel: str, inputs: int, outputs: int) -> Row:
    return Row(name, rf"Map<{kernel}, T, {inputs}, {outputs}> ", lambda item: (inputs + outputs) * item, stream(inputs))


ROWS = (
    Row("relu forward", r"mask.*Forward<T, math::MaskOf<T, \(Mask\)0> ", lambda item: 2 * item + 1 / 8, stream(1)),
    Row("relu backward", r"mask.*Backward<T, false>", lambda item: 2 * item + 1 / 8, stream(1)),
    elementwise("silu forward", "Forward<T, math::Silu>", 1, 1),
    elementwise("silu backward", "Backward<T, math::Silu>", 2, 1),
    elementwise("gelu forward", "Forward<T, math::Gelu>", 1, 1),
    elementwise("gelu backward", "Backward<T, math::Gelu>", 2, 1),
    elementwise("swiglu forward", "Forward<T, math::Silu>", 2, 1),
    elementwise("swiglu backward", "Backward<T, math::Silu, 2>", 3, 2),
    Row("2-bit silu forward", r"EncodeFields<T, StepCodes<T, math::Silu> ", lambda item: 2 * item + 1 / 4, stream(1)),
    Row("2-bit backward", r"DecodeFields<T, StepFactors<T> ", lambda item: 2 * item + 1 / 4, stream(1)),
    Row("2-bit dither silu forward", r"EncodeFields<T, DitherCodes<T, math::Silu> ", lambda item: 2 * item + 1 / 4, stream(1)),
    Row("rms_norm forward", r"rms_norm.*Forward<Types<T, T, T>, float, CAST>", lambda item: 2 * item, rows(1, 1),
        shared=lambda item: held(COLUMNS * item)),
    Row("rms_norm backward", r"rms_norm.*Backward<Types<T, T, T>, float, CAST>", lambda item: 3 * item, rows(2, 2),
        shared=lambda item: held(2 * COLUMNS * item)),
    Row("layer_norm forward", r"layer_norm.*Forward<Types<T, T, T>, float>", lambda item: 2 * item, rows(1, 1, passes=3),
        shared=lambda item: held(COLUMNS * item)),
    Row("layer_norm backward", r"layer_norm.*Backward<Types<T, T, T>, float>", lambda item: 3 * item, rows(2, 2, passes=2),
        shared=lambda item: held(2 * COLUMNS * item)),
    Row("cross_entropy with gradient", r"CrossEntropyRows<T, math::LinearLogit, false>", lambda item: 3 * item, rows(1, 1)),
)  # fmt: skip
TYPES = {"bfloat16": ("bf16", 2, "true"), "float32": ("float", 4, "false")}


def pattern_of(row: Row, name: str, cast: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\bCAST\b", cast, re.sub(r"\bT\b", name, row.kernel)))


def plain(kernel: Kernel) -> str:
    return f"{kernel.source} " + re.sub(r"\(anonymous namespace\)::|unswag::(cuda::)?", "", kernel.name)


def wanted(source: str, name: str) -> bool:
    """Whether a row of the table is of this kernel."""
    text = plain(Kernel(source, "", name))
    return any(pattern_of(row, name, cast).search(text) for row in ROWS for name, _, cast in TYPES.values())


def resident_warps(machine: Machine, kernel: Kernel, threads: int, shared: int) -> int:
    """Of a processor, by registers, shared memory and places."""
    warps = math.ceil(threads / 32)
    of_registers = SCHEDULERS * (REGISTERS // SCHEDULERS // (256 * math.ceil(kernel.registers / 8))) // warps
    needed = kernel.shared + shared + machine.reserved
    of_shared = machine.shared // needed if needed else machine.blocks
    return warps * min(of_registers, of_shared, machine.warps // warps, machine.blocks)


def share_of_copy(machine: Machine, cost: Cost, moved: float) -> float:
    """At most, for a cost of an element that moves so many bytes."""
    memory = moved / machine.gb_s
    warps_per_ns = SCHEDULERS * machine.processors * machine.ghz * 32
    pipes = [cost[name] * cycles for name, cycles in machine.cycles.items()]
    return min(1.0, memory / (max(cost["instructions"], *pipes) / warps_per_ns))


def table(code: cuda_code.Code, compiler: str) -> str:
    by_name: dict[tuple[str, str], Kernel] = {(k.architecture, plain(k)): k for k in code.kernels if k.listing}
    lines = [
        f"| kernel | dtype | bytes per element | {' | '.join(f'{a} ({m.name})' for a, m in MACHINES.items())} |",
        f"|---|---|---:|{'---|' * len(MACHINES)}",
    ]
    for row in ROWS:
        for dtype, (name, item, cast) in TYPES.items():
            cells = []
            for architecture, machine in MACHINES.items():
                pattern = pattern_of(row, name, cast)
                (kernel,) = (k for (a, text), k in by_name.items() if a == architecture and pattern.search(text))
                found = Ways(kernel.listing).loops()
                cost: Cost = Counter()
                for phase in row.phases:
                    cost.update(phase.cost(found, 8 * item))
                warps = resident_warps(machine, kernel, row.threads, row.shared(item))
                shared = (kernel.shared + row.shared(item)) / 1024
                cells.append(
                    f"{kernel.registers}, {shared:.1f}, {100 * warps / machine.warps:.0f} %, "
                    f"{cost['instructions'] / row.moved(item):.1f}, {share_of_copy(machine, cost, row.moved(item)):.2f}"
                )
            lines.append(f"| {row.op} | {dtype} | {row.moved(item):g} | {' | '.join(cells)} |")
    return "\n".join([f"From the code that nvcc {compiler} makes.", "", *lines])


def current() -> str:
    """The table in the page."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", action="store_true", help="write the table into docs/gpu.md")
    args = parser.parse_args()
    made = table(cuda_code.read(args.file, wanted), cuda_code.compiler())
    if not args.write:
        print(made)
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
