"""What launches of Triton kernels have in common: memory on the device, tables, and what they may count on."""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastinterp.ops.dtypes import CODE_BYTES

_INTERPRETER = threading.Lock()
ALIGNED, NATURAL, BYTES = 16, 0, 1  # VECTORS, ELEMENTS and BYTES of _triton/numbers.py


class LaunchContext:
    """Where launches take their memory from, on the stream that is torch's current one."""

    def __init__(self, device: Any):
        self.device = device
        self.on_host = device.type == "cpu"

    def upload(self, numbers: array[Any] | bytearray, dtype: str) -> Any:
        """A copy on the device, of at least one number. dtype: as torch names it."""
        import torch

        kind = getattr(torch, dtype)
        if not len(numbers):
            return torch.zeros(1, dtype=kind, device=self.device)
        here = torch.frombuffer(numbers, dtype=kind)
        return here.clone() if self.on_host else here.pin_memory().to(self.device, non_blocking=True)

    def zeros(self, dtype: str, *shape: int) -> Any:
        import torch

        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self.device)

    def empty(self, dtype: str, *shape: int) -> Any:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def fetch(self, found: Any) -> Any:
        """A copy on the host, there once an event that is recorded later has passed."""
        import torch

        if self.on_host:
            return found
        return torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)

    def launch(self, kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: Any) -> None:
        if programs == 0:
            return
        with self._interpreting():
            kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=1, enable_fp_fusion=False)

    @contextlib.contextmanager
    def _interpreting(self) -> Iterator[None]:
        """The interpreter runs one kernel at a time, in numpy, which warns where numbers become infinite."""
        if not self.on_host:
            yield
            return
        import numpy as np

        with _INTERPRETER, np.errstate(all="ignore"):
            yield

    def tile(self, compiled: int, interpreted: int) -> int:
        """How much a program does: the interpreter takes as long for much as for little, and compilers do not."""
        return interpreted if self.on_host else compiled


class Answer:
    """Pending, see device.py, of a piece that answers: a function looks at what was fetched."""

    def __init__(self, answer: Callable[[], Any]):
        self.answer = answer

    def stats(self) -> list[dict[str, float]]:
        return []


def signed(word: int) -> int:
    """64 bits as the i64 that has them."""
    return word - (1 << 64) if word >> 63 else word


def alignment(addresses: Sequence[int], codes: Sequence[int], *counts: int) -> int:
    """What a kernel may count on; counts: of elements, that must be multiples of 16 where it is ALIGNED."""
    low = 0
    for number in (*addresses, *counts):
        low |= number
    if low % 16 == 0:
        return ALIGNED
    natural = all(a % CODE_BYTES[code] == 0 for a, code in zip(addresses, codes, strict=True))
    return NATURAL if natural else BYTES


def steps(rows: int) -> int:
    """Halvings that find one of so many rows: few different ones, since each is a kernel of its own."""
    needed = max(0, (rows - 1).bit_length())
    return next(s for s in (4, 6, 8, 10, 12, 20, 31) if s >= needed)
