"""What the machine code of the CUDA kernels says of their speed, as docs/devices.md has it as a table.

The figures are those of compute capability 9.0. The predicted share is that of a copy of as many bytes on an H100.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.support import build_cache
from tests.support.devices.cuda_compile import CSRC, compiled, cuobjdump

ARCHITECTURE = "90"
BLOCK = 256  # threads of a block, in all of these kernels
ENOUGH = 32 << 10  # bytes that must be under way in each multiprocessor of an H100 for its memory to be busy
_REGISTERS, _SHARED, _THREADS = 65536, 227 << 10, 2048  # of a multiprocessor


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    name    what the table calls it
    source  its file in csrc/cuda
    symbol  part of its mangled name
    share   predicted, in percent
    bound   what bounds it
    halves  of the loads that its code has, every second is for dtypes of more than two bytes
    exact   it converts nothing between float32 and float64 for each element
    """

    name: str
    source: str
    symbol: str
    share: int
    bound: str
    halves: bool = False
    exact: bool = True


KERNELS = (
    Kernel("sum of 2, bf16", "combine_fast.cu", "4fastILNS_5DTypeE3ELi2ELi30720EE", 98, "memory"),
    Kernel("sum of 4, bf16", "combine_fast.cu", "4fastILNS_5DTypeE3ELi4ELi30720EE", 98, "memory"),
    Kernel("sum of 8, bf16", "combine_fast.cu", "4fastILNS_5DTypeE3ELi8ELi30720EE", 98, "memory"),
    Kernel("prepared sum of 3, bf16", "combine_prepared.cu", "8preparedILNS_5DTypeE3ELi3EE", 98, "memory"),
    Kernel("sum of 4, mixed 16-bit dtypes", "combine_any.cu", "9any_unitsILi30720EE", 85, "issue slots", halves=True),
    Kernel("masked sum of 5, bf16", "masked_units.cu", "17masked_few_kernelILi4ELb1EE", 80, "issue slots"),
    Kernel("masked sum of 5, f32", "masked_units.cu", "18masked_unit_kernelILi1ELNS1_4ModeE0E", 95, "issue slots"),
    Kernel(
        "masked sum of 5, mixed",
        "masked_units.cu",
        "18masked_unit_kernelILin1ELNS1_4ModeE0E",
        45,
        "issue slots",
        halves=True,
    ),
    Kernel(
        "what masks keep of 4, bf16",
        "masked_stats.cu",
        "24masked_stats_unit_kernelILi3EE",
        70,
        "float64 and conversions",
        exact=False,
    ),
    Kernel("sum by group of 5, bf16", "groups.cu", "17group_unit_kernelILi3EE", 90, "loads of weights"),
    Kernel("sum by group of 5, f32", "groups.cu", "17group_unit_kernelILi1EE", 95, "memory"),
    Kernel("histogram of 1, bf16", "histogram.cu", "21histogram_unit_kernelILi3EE", 60, "additions in shared memory"),
    Kernel("measure of 2, bf16", "measure.cu", "14measure_kernelILi3ELi2EE", 85, "conversions"),
    Kernel("measure of 4, bf16", "measure.cu", "14measure_kernelILi3ELi4EE", 80, "float64 and conversions"),
)


@dataclass(frozen=True)
class Shape:
    """Of a kernel's machine code.

    widest     bytes of its widest load
    loads      of these, how many are under way before one is used
    branches   that stand among those
    registers  of a thread
    spilled    bytes of a thread in slow local memory
    blocks     that a multiprocessor holds at a time
    converts   float64 to float32: constants that the host could have converted
    """

    widest: int
    loads: int
    branches: int
    registers: int
    spilled: int
    blocks: int
    converts: int

    @property
    def in_flight(self) -> int:
        """Bytes of loads in a multiprocessor."""
        return self.blocks * BLOCK * self.loads * self.widest


def shape_of(kernel: Kernel) -> Shape:
    """The kernel as it is compiled for compute capability 9.0."""
    made, _ = compiled(CSRC / "cuda" / kernel.source)
    return read_shape(made, kernel)


def read_shape(made: Path, kernel: Kernel) -> Shape:
    [code] = [code for name, code in instructions(made).items() if kernel.symbol in name]
    [usage] = [usage for name, usage in _usage(made).items() if kernel.symbol in name]
    widest = max(_width(op) for op, _ in code if _is_input(op))
    loads, branches = under_way(code, widest)
    granted = -(-usage["REG"] // 8) * 8 * BLOCK  # registers are granted by eights
    blocks = min(_REGISTERS // granted, _SHARED // max(1, usage["SHARED"] + 1024), _THREADS // BLOCK)
    return Shape(
        widest=widest,
        loads=loads // 2 if kernel.halves else loads,
        branches=branches,
        registers=usage["REG"],
        spilled=usage["STACK"],
        blocks=blocks,
        converts=sum(op.startswith("F2F.F32.F64") for op, _ in code),
    )


def _is_input(op: str) -> bool:
    """Whether it loads what is read once: weights and counts stay in the first cache, inputs do not."""
    return op.startswith("LDG") and "NA" in op.split(".")


def _width(op: str) -> int:
    """Bytes that a load reads."""
    parts = op.split(".")
    bits = next((n for n in (128, 64, 16, 8) if str(n) in parts or f"U{n}" in parts), 32)
    return bits // 8


def under_way(code: Sequence[tuple[str, str]], width: int) -> tuple[int, int]:
    """The most loads of a width that follow each other before one of them is used, and the branches among them."""
    best, count, branches, pending = (0, 0), 0, 0, set[int]()
    last = 0  # branches when the last load was seen
    for op, operands in code:
        first, _, rest = operands.partition(",")
        if _is_input(op) and _width(op) == width:
            to = int(re.findall(r"R(\d+)", first)[0])
            pending |= set(range(to, to + width // 4))
            count, last = count + 1, branches
            best = max(best, (count, -last))
        elif pending & {int(n) for n in re.findall(r"\bR(\d+)", rest if op[0] not in "S" else operands)}:
            count, branches, pending = 0, 0, set()
        elif op.startswith(("BRA", "EXIT", "CALL")):
            branches += count > 0
    return best[0], -best[1]


@cache
def instructions(made: Path) -> dict[str, list[tuple[str, str]]]:
    """(operation, operands) of every kernel in an object file, by its mangled name."""
    text = _dumped("-sass", made)
    kernels = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        kernels[name.strip()] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*) *([^;]*);", body)
    return kernels


@cache
def _usage(made: Path) -> dict[str, dict[str, int]]:
    """Registers, stack and shared memory of every kernel in an object file."""
    found = re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", _dumped("-res-usage", made))
    return {name: {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED):(\d+)", line)} for name, line in found}


def _dumped(what: str, made: Path) -> str:
    tool = cuobjdump()
    assert tool is not None
    return build_cache.run([tool, what, "-arch", f"sm_{ARCHITECTURE}", str(made)])


def table() -> str:
    """The table of docs/devices.md."""
    head = ("kernel", "widest load", "loads", "registers", "blocks", "KB under way", "predicted", "bound by")
    rows = [f"| {' | '.join(head)} |", "|---|--:|--:|--:|--:|--:|--:|---|"]
    for kernel in KERNELS:
        s = shape_of(kernel)
        row = (
            kernel.name,
            s.widest,
            s.loads,
            s.registers,
            s.blocks,
            s.in_flight >> 10,
            f"{kernel.share} %",
            kernel.bound,
        )
        rows.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
