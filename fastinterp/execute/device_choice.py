"""What a merge costs on the processor and on an accelerator, roughly: how `--device auto` chooses.

Both read the same files into memory and write the same ones, at the same rate. The accelerator saves the kernels' time,
and adds its start. So it wins where the kernels take long for the cores that are there. A cold disk slows both alike,
and is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastinterp.backends.registry import built
from fastinterp.messages import seconds
from fastinterp.plan.inputs import PlannedTensor
from fastinterp.plan.plan import Plan

# Of one thread, measured on an EPYC with AVX-512 (docs/performance.md): reads and writes of files in the page cache,
# 10^9 bytes a second. Writes go on in as many files at a time as there are.
READ_GB_S, WRITE_GB_S = 18.0, 10.0
# Of all threads together: a guess at one socket of a server, not measured.
HOST_GB_S = 100.0
# Nanoseconds per element of an input, one thread. Sums, masked sums and counts: kernels in cache. Measures and
# divergences: from whole merges, less their reads (both in docs/performance.md).
PLAIN_NS, MASKED_NS, SELECT_NS, MEASURE_NS, DIVERGENCE_NS = 0.05, 0.35, 0.25, 0.27, 1.8
# An accelerator. Bus: pinned copies over PCIe 4.0 x16 as nvbandwidth reports them, each way; half of PCIe 5.0.
BUS_GB_S = 25.0
MEMORY_GB_S = 1500.0  # of the oldest that there are binaries for, the A100 with 40 GB
PIN_GB_S = 1.7  # locking host memory: llama.cpp issue 28223
CONTEXT_S = 0.4  # the driver's start: a guess, not measured
TORCH_S = 2.0  # importing torch, as measured for the table of what starting costs; the Triton backend needs it
COMPILE_S = 1.0  # of Triton kernels that no cache holds: a guess, not measured

_NS = {"measure": MEASURE_NS, "select": SELECT_NS, "divergence": DIVERGENCE_NS}
_ON_CPU = ("divergence",)  # no accelerator has a kernel for it


@dataclass(frozen=True)
class Choice:
    """What `--device auto` chose: cpu, or the name of a backend. Estimated seconds of both, and in one sentence why."""

    device: str
    cpu_s: float
    device_s: float
    why: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose(plans: Sequence[Plan], threads: int, max_memory: int) -> Choice:
    """Between the processor and the first accelerator."""
    from fastinterp.execute.device.executor import SLOT_BYTES, SLOTS

    tensors = [s for plan in plans for t in plan.tensors for s in t.stages]
    read = sum(t.bytes_read for t in tensors)
    written = sum(plan.bytes_written + plan.bytes_made for plan in plans)
    files = sum(len(layout.files) for plan in plans for layout in plan.layouts)
    copies = (
        max(
            read / READ_GB_S / threads + written / WRITE_GB_S / min(threads, max(1, files)),
            (read + written) / HOST_GB_S,
        )
        / 1e9
    )
    kernels = sum(_kernel_s(t, on_device=True) for t in tensors) / threads
    rest = sum(_kernel_s(t, on_device=False) for t in tensors) / threads
    backend = "cuda" if built("fastinterp._cuda") else "triton"
    start = CONTEXT_S + min(max_memory // 2, SLOTS * SLOT_BYTES, read + written) / PIN_GB_S / 1e9
    if backend == "triton":
        start += COMPILE_S + (0.0 if "torch" in sys.modules else TORCH_S)
    bus = max(read, written) / BUS_GB_S / 1e9
    memory = (read + written) / MEMORY_GB_S / 1e9
    cpu_s, device_s = copies + kernels + rest, start + max(copies + rest, bus, memory)
    better = backend if device_s < cpu_s else "cpu"
    why = (
        f"--device auto chose {better}: about {seconds(cpu_s)} on the cpu, {seconds(kernels + rest)} of that "
        f"arithmetic; about {seconds(device_s)} with {backend}, {seconds(start)} of that its start"
    )
    return Choice(better, cpu_s, device_s, why)


def _kernel_s(tensor: PlannedTensor, on_device: bool) -> float:
    """Seconds of one thread's arithmetic for the requests that accelerators do, or for those that they do not."""
    total = 0.0
    for what, inputs in tensor.reads:
        if (what in _ON_CPU) == on_device or not tensor.merged:
            continue
        total += _NS.get(what, PLAIN_NS if tensor.program is None else MASKED_NS) * len(inputs) * tensor.numel
    return total / 1e9
