"""Estimates the time of a merge on the CPU and on an accelerator, for the choice of `--device auto`.

Both read and write the same files at the same rate. The accelerator saves the time of the CPU kernels and adds that of
its start, so it is faster where the kernels take long on the available cores. A cold disk slows both equally: it is
not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastinterp.backends.registry import built
from fastinterp.messages import seconds
from fastinterp.plan.plan import Plan
from fastinterp.plan.planned import PlannedTensor

# Of one thread, measured on an EPYC with AVX-512 (docs/performance.md): reads and writes of files in the page cache,
# 10^9 bytes a second. One thread at a time writes to a file.
READ_GB_S, WRITE_GB_S = 18.0, 10.0
# Of all threads together: an assumption about one socket of a server, not measured.
HOST_GB_S = 100.0
# Nanoseconds per element of an input, one thread. Sums, masked sums and counts: kernels in cache. Measures and
# divergences: from whole merges, less their reads (both in docs/performance.md).
PLAIN_NS, MASKED_NS, SELECT_NS, MEASURE_NS, DIVERGENCE_NS = 0.05, 0.35, 0.25, 0.27, 1.8
# An accelerator. Bus: pinned copies over PCIe 4.0 x16 as nvbandwidth reports them, each way; half of PCIe 5.0.
BUS_GB_S = 25.0
MEMORY_GB_S = 1500.0  # of the oldest supported GPU, the A100 with 40 GB
PIN_GB_S = 1.7  # locking host memory: llama.cpp issue 28223
CONTEXT_S = 0.4  # start of the driver: an assumption, not measured
TORCH_S = 2.0  # importing torch, as measured for the table of what starting costs; the Triton backend needs it
COMPILE_S = 1.0  # of Triton kernels that are not cached: an assumption, not measured

_NS = {"measure": MEASURE_NS, "select": SELECT_NS, "divergence": DIVERGENCE_NS}
_ON_CPU = ("divergence",)  # no accelerator has a kernel for it


@dataclass(frozen=True)
class Choice:
    """The choice of `--device auto`: "cpu" or a backend, the estimated seconds of both, and the reason as text."""

    device: str
    cpu_s: float
    device_s: float
    why: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose(plans: Sequence[Plan], threads: int, max_memory: int) -> Choice:
    """Choose between the CPU and the first accelerator."""
    from fastinterp.execute.device.executor import SLOT_BYTES, slots_of

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
    start = CONTEXT_S + min(max_memory // 2, slots_of(threads) * SLOT_BYTES, read + written) / PIN_GB_S / 1e9
    if backend == "triton":
        start += COMPILE_S + (0.0 if "torch" in sys.modules else TORCH_S)
    bus = max(read, written) / BUS_GB_S / 1e9
    memory = (read + written) / MEMORY_GB_S / 1e9
    cpu_s, device_s = copies + kernels + rest, start + max(copies + rest, bus, memory)
    better = backend if device_s < cpu_s else "cpu"
    why = (
        f"--device auto chose {better}: about {seconds(cpu_s)} on the cpu, with {seconds(kernels + rest)} of "
        f"arithmetic; about {seconds(device_s)} with {backend}, with {seconds(start)} for its start"
    )
    return Choice(better, cpu_s, device_s, why)


def _kernel_s(tensor: PlannedTensor, on_device: bool) -> float:
    """Seconds of arithmetic in one thread, for the requests that accelerators have kernels for, or for the others."""
    total = 0.0
    for what, inputs in tensor.reads:
        if (what in _ON_CPU) == on_device or not tensor.merged:
            continue
        total += _NS.get(what, PLAIN_NS if tensor.program is None else MASKED_NS) * len(inputs) * tensor.numel
    return total / 1e9
