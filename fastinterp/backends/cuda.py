"""Devices of NVIDIA through the extension fastinterp._cuda: Device of device.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastinterp.backends.registry import how_to_build, maybe_driver
from fastinterp.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from fastinterp.backends.device import Buffer, Piece, PreparedSums, Queue
    from fastinterp.ops.steps import Step


def _native() -> ModuleType:
    try:
        from fastinterp import _cuda
    except ImportError as error:
        raise BackendError(f"this installation has no CUDA kernels (fastinterp._cuda): {how_to_build()}") from error
    return _cuda


def missing() -> str:
    """Why there is no device here; empty if there is one."""
    try:
        return "" if device_count() else "no device is visible"
    except BackendError as error:
        return str(error) if maybe_driver() else "there is no GPU driver on this machine"


def device_count() -> int:
    """The number of devices.

    Raises: BackendError, if this build has no CUDA kernels, or there is no driver for them.
    """
    count: int = _native().device_count()
    return count


def device(index: int) -> CudaDevice:
    """The device of this number, from 0.

    Raises: BackendError, if there is none, or if no kernel of this build can run on it, or its memory is taken.
    """
    count = device_count()
    if not 0 <= index < count:
        there = ", ".join(f"cuda:{i}" for i in range(count))
        raise BackendError(f"there is no device cuda:{index}. There are: {there or 'none'}")
    found = CudaDevice(index)
    if why := _native().unusable(index):
        raise BackendError(f"cuda:{index}, {found.label}, cannot be used: {why}")
    return found


class CudaDevice:
    """One GPU. Its buffers, queues and events are the native ones of fastinterp._cuda."""

    backend = "cuda"

    def __init__(self, index: int):
        self.name = f"cuda:{index}"
        self._native = _native().Device(index)
        self._kinds = frozenset(_native().kinds())

    @property
    def label(self) -> str:
        label: str = self._native.label
        return label

    def free_bytes(self) -> int:
        free: int = self._native.free_bytes()
        return free

    def memory(self, nbytes: int) -> Buffer:
        buffer: Buffer = self._native.memory(nbytes)
        return buffer

    def host(self, nbytes: int) -> Buffer:
        buffer: Buffer = self._native.host(nbytes)
        return buffer

    def queue(self, handle: int | None = None) -> Queue:
        queue: Queue = self._native.queue(handle)
        return queue

    def prepare(self, pieces: Sequence[Piece]) -> PreparedSums:
        prepared: PreparedSums = self._native.prepare(pieces)
        return prepared

    def refuses(self, step: Step) -> str | None:
        if step.kind not in self._kinds:
            return f"no CUDA kernel for {step.kind}"
        if step.decodes:
            return "encoded inputs"
        if step.encodes:
            return "encoded outputs"
        return "random masks by rank" if step.by_rank else None
