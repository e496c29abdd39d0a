"""Shows the kernels' machine code: python tools/cuda_code.py FILE (a library, object, cubin or Python module).

Reads the machine code with cuobjdump and nvdisasm (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm; of the toolkit's major
version and not older than it) and prints a line for each architecture and kernel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

_MEMBER = re.compile(r"^member .*:([^:]+):$")
_KIND = re.compile(r"^Fatbin (elf|ptx) code:$")
_ARCH = re.compile(r"^arch = sm_(\w+)$")
_CODE_FOR = re.compile(r"^\s*code for (sm_\w+)$")  # a bare cubin has no `arch`
_FUNCTION = re.compile(r"^\s*Function\s?(?:: )?(\S+?):?$")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)(.*)")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*;")
_RESOURCES = re.compile(r"^\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) ")
_WIDTH = re.compile(r"\.(?:U|S)?(8|16|64|128|256)\b")
_ATOMIC = re.compile(r"^(RED|REDG|REDS|ATOM|ATOMG|ATOMS|SURED|SUATOM)\b")
_FLOAT = re.compile(r"\.B?F(16|32|64)\w*\b")
_SWAP = re.compile(r"\.CAST?\b")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # LDG.E.128.CONSTANT
    conditional: bool  # under a predicate
    target: int | None = None  # of a branch or a call

    @property
    def bits(self) -> int:
        """The width of an access."""
        width = _WIDTH.search(self.opcode)
        return int(width[1]) if width else 32


@dataclass
class Kernel:
    """One kernel's machine code for one architecture; the counts are of instructions."""

    source: str  # the object in the library that it is from; "" if FILE is not a library
    architecture: str  # sm_80
    name: str  # as in C++, without parameters
    registers: int = 0
    stack: int = 0  # bytes per thread in local memory
    shared: int = 0  # bytes per block, without what a launch asks for
    local_loads: int = 0  # of spilled registers and of arrays that are indexed at run time
    local_stores: int = 0
    loads: Counter[int] = field(default_factory=Counter)  # of global (or unknown) memory, by width in bits
    stores: Counter[int] = field(default_factory=Counter)
    float_atomics: Counter[str] = field(default_factory=Counter)  # compare-and-swap too: a float atomic may be a loop of it
    barriers: int = 0  # of a block
    listing: list[Instruction] = field(default_factory=list)  # where it was asked for

    def count(self, instruction: Instruction) -> None:
        opcode, bits = instruction.opcode, instruction.bits
        base = opcode.partition(".")[0]
        if base in ("LDG", "LD", "LDGSTS"):
            self.loads[bits] += 1
        elif base in ("STG", "ST"):
            self.stores[bits] += 1
        elif base == "LDL":
            self.local_loads += 1
        elif base == "STL":
            self.local_stores += 1
        elif base == "BAR":
            self.barriers += 1
        elif _ATOMIC.match(opcode) and (_FLOAT.search(opcode) or _SWAP.search(opcode)):
            self.float_atomics[opcode] += 1


@dataclass
class Code:
    kernels: list[Kernel] = field(default_factory=list)
    ptx: dict[str, set[str]] = field(default_factory=dict)  # source: {"compute_90"}


def read(path: str | Path, listed: Callable[[str, str], bool] = lambda source, name: False) -> Code:
    """The kernels in a library, an object, a cubin or a shared object; with their instructions those for whose source and name
    `listed` is true.

    Raises ``FileNotFoundError`` when a tool is missing, ``RuntimeError`` with the tool's output when it fails.
    """
    code = Code()
    found: dict[tuple[str, str, str], Kernel] = {}

    def kernel(source: str, architecture: str, name: str) -> Kernel:
        key = (source, architecture, name)
        if key not in found:
            found[key] = Kernel(*key)
        return found[key]

    for source, _, architecture, name, line in _walk(path, "-res-usage"):
        if name and (match := _RESOURCES.match(line)):
            one = kernel(source, architecture, name)
            one.registers, one.stack, one.shared = (int(number) for number in match.groups())
            if architecture == "sm_90" and one.shared:
                one.shared -= 1024  # what the device takes for itself
    names = sorted({(one.source, one.name) for one in found.values()})
    in_full = {key for key, name in zip(names, _demangled([name for _, name in names]), strict=True) if listed(key[0], name)}
    for source, kind, architecture, name, line in _walk(path, "-sass"):
        if kind == "ptx" and architecture:
            code.ptx.setdefault(source, set()).add(architecture.replace("sm_", "compute_"))
        elif name and line.startswith("        /*") and (match := _INSTRUCTION.match(line)):
            if (source, "", name) in found:  # the resources in a bare cubin are listed without its architecture
                found[source, architecture, name] = replace(found.pop((source, "", name)), architecture=architecture)
            instruction = _instruction(match)
            kernel(source, architecture, name).count(instruction)
            if (source, name) in in_full:
                kernel(source, architecture, name).listing.append(instruction)
    code.kernels = list(found.values())
    for one, name in zip(code.kernels, _demangled([one.name for one in code.kernels]), strict=True):
        one.name = name
    return code


def compiler() -> str:
    """nvcc's release: 13.0.88; "" where there is none."""
    if not shutil.which("nvcc"):
        return ""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"\bV([\d.]+)", said)
    return match[1] if match else ""


def _instruction(match: re.Match[str]) -> Instruction:
    address, predicate, opcode, rest = match.groups()
    target = None
    if opcode.startswith(("BRA", "CALL")) and (to := _TARGET.search(rest)):
        target = int(to[1], 16)
        predicate = predicate or re.match(r"\s+[!~]?U?[PR]", rest)  # BRA P1, 0x990
    return Instruction(int(address, 16), opcode, bool(predicate), target)


def _walk(path: str | Path, what: str) -> Iterator[tuple[str, str, str, str, str]]:
    """(source, "elf" or "ptx", architecture, mangled name, line) for each line of cuobjdump's listing."""
    source = architecture = name = ""
    kind = "elf"
    for line in _listing(path, what):
        if match := _MEMBER.match(line):
            source, architecture, name = match[1], "", ""
        elif match := _KIND.match(line):
            kind, architecture, name = match[1], "", ""
        elif match := _ARCH.match(line):
            architecture = "sm_" + match[1]
            yield source, kind, architecture, "", line
        elif (match := _CODE_FOR.match(line)) and not architecture:
            architecture = match[1]
        elif match := _FUNCTION.match(line):
            name = match[1]
        else:
            yield source, kind, architecture, name, line


def _listing(path: str | Path, what: str) -> Iterator[str]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; build it first (make native)")
    tools = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"  # where the two packages put them
    search = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"  # cuobjdump calls nvdisasm
    for tool in ("cuobjdump", "nvdisasm"):
        if not shutil.which(tool, path=search):
            raise FileNotFoundError(f"{tool} is missing; pip install -c constraints.txt nvidia-cuda-{tool}")
    command = [shutil.which("cuobjdump", path=search) or "", what, str(path)]
    environment = {**os.environ, "PATH": search}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        assert process.stdout is not None
        complaints = []
        for line in process.stdout:
            if line.startswith("cuobjdump ") and "does not contain device code" not in line:
                complaints.append(line)
            yield line.rstrip("\n")
    if complaints or process.returncode not in (0, 255):  # 255: there is no device code
        raise RuntimeError(f"cuobjdump {what} {path} failed ({process.returncode}): {''.join(complaints)}")


def _demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt", "--no-params"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _widths(counts: Counter[int]) -> str:
    return " ".join(f"{bits}:{count}" for bits, count in sorted(counts.items())) or "-"


def text(code: Code) -> str:
    lines = []
    for k in sorted(code.kernels, key=lambda k: (k.source, k.name, k.architecture)):
        lines.append(
            f"{k.architecture:7} registers {k.registers:3}  stack {k.stack:4}  local {k.local_loads}/{k.local_stores}  "
            f"loads {_widths(k.loads)}  stores {_widths(k.stores)}  barriers {k.barriers}  "
            f"float atomics {', '.join(k.float_atomics) or '-'}  {k.source} {k.name}"
        )
    lines += [f"PTX {' '.join(sorted(names))}  {source}" for source, names in sorted(code.ptx.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(text(read(sys.argv[1])))
