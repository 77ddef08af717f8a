"""How much is read and written at a time, and what scratch memory that takes."""

from __future__ import annotations

from dataclasses import dataclass

from fastinterp.errors import UsageError
from fastinterp.messages import counted
from fastinterp.ops.contract import CHUNK
from fastinterp.plan.plan import Plan

_KEPT_BYTES = 1 << 20  # Pump::kKeptBytes


@dataclass(frozen=True)
class Window:
    """The sizes of reads and writes, and the scratch memory that follows from them, in bytes.

    Reads are small enough that the inputs are still in the second-level cache when they are combined, and writes are no
    larger than those of `cp`: docs/performance.md has the measurements.

    most  memory that may be used
    encodes  whether any output is stored as codes
    asks  whether any method makes requests or masks its sums: these steps have scratch memory of their own, and run on
          fewer threads where it does not fit
    """

    threads: int
    write_bytes: int
    read_bytes: int
    inputs: int
    outputs: int
    most: int
    asks: bool
    encodes: bool = False

    @property
    def bytes(self) -> int:
        """Scratch memory of all threads: that of plain sums, page alignment included; else the limit."""
        return self.most if self.asks else self.plain_bytes

    @property
    def plain_bytes(self) -> int:
        sums = self.inputs * (self.read_bytes + 4096) + self.outputs * (self.write_bytes + 4096)
        # Of encoded outputs: float32 sums that are kept, a span of them, its codes, what these stand for, and room to
        # compare both, 3 chunks of float64.
        encoding = _KEPT_BYTES + (2 * self.outputs + 1) * 4 * self.read_bytes + 3 * 8 * CHUNK + 4096
        return self.threads * (sums + (encoding if self.encodes else 0))


def make_window(plan: Plan, threads: int, max_memory: int) -> Window:
    """The largest window that suits the caches and fits `max_memory`.

    Raises: UsageError, if even the smallest does not fit.
    """
    inputs, outputs = max(len(s.inputs) for s in plan.stages), len(plan.recipes)
    asks = any(s.program is not None for s in plan.stages)
    encodes = any(t.encoding is not None for t in plan.tensors)
    read, write = _pages(max(16 << 10, min(64 << 10, (512 << 10) // inputs))), 128 << 10
    while True:
        window = Window(threads, write, read, inputs, outputs, max_memory, asks, encodes)
        if window.plain_bytes <= max_memory:
            return window
        if write <= 4096 and read <= 4096:
            sizes = f"{counted(threads, 'thread')} with {counted(inputs, 'input')} and {counted(outputs, 'output')}"
            raise UsageError(
                f"{sizes} need at least {window.plain_bytes} bytes, but --max-memory allows {max_memory}. Allow more "
                "(in Python max_memory=...), or use fewer threads"
            )
        write, read = _pages(write // 2), _pages(read // 2)


def fitting_outputs(plan: Plan, threads: int, max_memory: int) -> int:
    """The number of outputs of a plan that can be computed from one read within `max_memory`; at least 1."""
    inputs = max(len(s.inputs) for s in plan.stages)
    encodes = any(t.encoding is not None for t in plan.tensors)
    both = (Window(threads, 4096, 4096, i, k, max_memory, False, encodes) for i, k in ((inputs, 0), (0, 1)))
    fixed, each = (window.plain_bytes for window in both)
    return max(1, (max_memory - fixed) // each)


def _pages(size: int) -> int:
    """`size` rounded down to whole pages, at least one: writes end at page boundaries of the output."""
    return max(4096, size // 4096 * 4096)
