"""Devices through Triton: memory, streams and events are torch's, the kernels those of fastinterp._triton.

For NVIDIA and AMD: torch.cuda is ROCm's, too. Under TRITON_INTERPRET=1 Triton interprets kernels on the host, slowly;
then the only device uses host memory, and every call is synchronous.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from typing import Any

from fastinterp.backends.device import Pending, Piece
from fastinterp.backends.prepared import PreparedPieces
from fastinterp.errors import BackendError, OutOfMemory
from fastinterp.ops.steps import Step
from fastinterp.system.available_memory import available_memory


def interpreted() -> bool:
    """Whether Triton interprets kernels on the host."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "on", "true", "yes", "y")


# Older versions flush subnormals in divisions; older interpreters round an fma twice.
OLDEST, OLDEST_INTERPRETER = (3, 6), (3, 9)


def missing() -> str:
    """The reason why there is no device; empty if there is one."""
    try:
        import torch

        if not interpreted() and not torch.cuda.is_available():
            return "torch sees no GPU"
        import triton  # only where it is of use: some versions print a list of leaks at exit
    except ImportError as error:
        return f"{error.name} is not installed: pip install 'fastinterp[gpu]'"
    except (OSError, RuntimeError) as error:  # of libraries that torch loads, and of a driver that is broken
        return f"torch cannot be used: {(str(error).splitlines() or [''])[0]}"
    oldest = OLDEST_INTERPRETER if interpreted() else OLDEST
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < oldest:
        return f"triton {triton.__version__} rounds differently: {oldest[0]}.{oldest[1]} or newer is needed"
    return ""


def device_count() -> int:
    """The number of devices."""
    if missing():
        return 0
    import torch

    return 1 if interpreted() else torch.cuda.device_count()


def device(index: int) -> TritonDevice:
    """The device of this number, from 0.

    Raises: BackendError, if there is none.
    """
    return TritonDevice(index)


@contextlib.contextmanager
def _explained(what: str, kind: type[BackendError] = BackendError) -> Iterator[None]:
    """Raise errors of torch and Triton as `kind`, or OutOfMemory. what: call, device and bytes."""
    import torch
    from triton.errors import TritonError

    try:
        yield
    except (RuntimeError, TritonError) as error:
        kind = OutOfMemory if isinstance(error, torch.cuda.OutOfMemoryError) else kind
        raise kind(f"{what}: {(str(error).splitlines() or [''])[0]}") from error


class TritonDevice:
    """A Device (device.py).

    Raises: BackendError, if there is no such device.
    """

    backend = "triton"

    def __init__(self, index: int = 0):
        reason = missing()
        if not reason and not 0 <= index < device_count():
            reason = f"there are {device_count()}, numbered from 0"
        if reason:
            raise BackendError(f"device triton:{index} cannot be used: {reason}")
        import torch

        self.index, self.host_only = index, interpreted()
        self.torch_device = torch.device("cpu") if self.host_only else torch.device("cuda", index)
        self.name = f"triton:{index}" if self.host_only else f"cuda:{index}"

    @property
    def label(self) -> str:
        import torch

        return "Triton's interpreter" if self.host_only else str(torch.cuda.get_device_name(self.index))

    def free_bytes(self) -> int:
        import torch

        if self.host_only:
            return available_memory()
        with _explained(f"free memory of {self.name}"):
            return int(torch.cuda.mem_get_info(self.index)[0])

    def memory(self, nbytes: int) -> TritonBuffer:
        import torch

        with _explained(f"memory of {nbytes} bytes on {self.name}", OutOfMemory):
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
            if not self.host_only:
                # Torch may return memory that work on its current stream still uses; it will be used on other streams.
                torch.cuda.current_stream(self.index).synchronize()
            return TritonBuffer(buffer, nbytes)

    def host(self, nbytes: int) -> TritonBuffer:
        import torch

        with _explained(f"pinned memory of {nbytes} bytes for {self.name}", OutOfMemory):
            return TritonBuffer(torch.empty(nbytes, dtype=torch.uint8, pin_memory=not self.host_only), nbytes)

    def queue(self, handle: int | None = None) -> TritonQueue:
        import torch

        if self.host_only:
            return TritonQueue(self, None)
        with _explained(f"stream of {self.name}"):
            if handle is None:
                return TritonQueue(self, torch.cuda.Stream(self.index))
            if handle == 0:
                return TritonQueue(self, torch.cuda.default_stream(self.index))
            return TritonQueue(self, torch.cuda.ExternalStream(handle, self.index))

    def prepare(self, pieces: Sequence[Piece]) -> PreparedPieces:
        return PreparedPieces(pieces)

    def refuses(self, step: Step) -> str | None:
        from fastinterp.backends.triton.pieces import refuses

        return refuses(step)


class TritonBuffer:
    """A Buffer (device.py)."""

    def __init__(self, tensor: Any, nbytes: int):
        self._tensor, self.nbytes = tensor, nbytes

    @property
    def address(self) -> int:
        return int(self._tensor.data_ptr())

    @property
    def view(self) -> memoryview:
        if self._tensor.device.type != "cpu":
            raise BackendError("device memory has no view on the host")
        return memoryview(self._tensor.numpy())

    def free(self) -> None:
        self._tensor = None


class TritonEvent:
    """An Event (device.py). event: torch's; None where calls are synchronous."""

    def __init__(self, event: Any, name: str):
        self.event, self._name = event, name

    def done(self) -> bool:
        if self.event is None:
            return True
        with _explained(f"event of {self._name}"):
            return bool(self.event.query())

    def wait(self) -> None:
        if self.event is not None:
            with _explained(f"work of {self._name}"):
                self.event.synchronize()


class TritonQueue:
    """A Queue (device.py). stream: torch's; None where calls are synchronous."""

    def __init__(self, device: TritonDevice, stream: Any):
        self.device, self._stream = device, stream

    @property
    def handle(self) -> int:
        return 0 if self._stream is None else int(self._stream.cuda_stream)

    @contextlib.contextmanager
    def _current(self, what: str) -> Iterator[None]:
        """A context in which torch and Triton enqueue work in this queue."""
        import torch

        with _explained(f"{what} on {self.device.name}"):
            if self._stream is None:
                yield
            else:
                with torch.cuda.device(self.device.index), torch.cuda.stream(self._stream):
                    yield

    def upload(self, to: int, host: int, nbytes: int) -> None:
        with self._current(f"upload of {nbytes} bytes"):
            if self._stream is None:
                ctypes.memmove(to, host, nbytes)
            elif nbytes:
                self._at(to, nbytes).copy_(_host_at(host, nbytes), non_blocking=True)

    def download(self, host: int, of: int, nbytes: int) -> None:
        with self._current(f"download of {nbytes} bytes"):
            if self._stream is None:
                ctypes.memmove(host, of, nbytes)
            elif nbytes:
                _host_at(host, nbytes).copy_(self._at(of, nbytes), non_blocking=True)

    def _at(self, address: int, nbytes: int) -> Any:
        """Device memory at an address, as u8[nbytes]."""
        import torch

        return torch.as_tensor(_Memory(address, nbytes), device=self.device.torch_device)

    def run(self, pieces: Sequence[Piece]) -> list[Pending]:
        import torch

        from fastinterp.backends.triton.launch import LaunchContext
        from fastinterp.backends.triton.pieces import run

        nbytes = 8 * sum(piece.numel for piece in pieces)
        with self._current(f"kernels for {len(pieces)} pieces, at most {nbytes} bytes an operand,"):
            if self._stream is not None and torch.cuda.is_current_stream_capturing():
                raise BackendError(
                    f"{self.device.name}: Triton's kernels read their tables from memory, which a CUDA graph does not "
                    "keep. Use the CUDA backend inside of graphs"
                )
            return run(LaunchContext(self.device.torch_device), pieces)

    def record(self) -> TritonEvent:
        if self._stream is None:
            return TritonEvent(None, self.device.name)
        import torch

        with _explained(f"event of {self.device.name}"):
            # Waiting for it blocks instead of spinning: the CPU has other threads to run.
            return TritonEvent(self._stream.record_event(torch.cuda.Event(blocking=True)), self.device.name)

    def after(self, event: TritonEvent) -> None:
        if self._stream is not None and event.event is not None:
            self._stream.wait_event(event.event)


class _Memory:
    """Device memory at an address, for torch.as_tensor."""

    def __init__(self, address: int, nbytes: int):
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 2,
        }  # fmt: skip


def _host_at(address: int, nbytes: int) -> Any:
    import torch

    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)
