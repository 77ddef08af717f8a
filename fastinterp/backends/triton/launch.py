"""Launches of Triton kernels: memory for their arguments and results, alignment, and the interpreter's lock."""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from fastinterp.ops.dtypes import CODE_BYTES

_INTERPRETER = threading.Lock()
ALIGNED, NATURAL, BYTES = 16, 0, 1  # VECTORS, ELEMENTS and BYTES of _triton/numbers.py


class LaunchContext:
    """Allocates, copies and launches on torch's current stream of one device."""

    def __init__(self, device: Any):
        self.device = device
        self.on_host = device.type == "cpu"

    def upload(self, numbers: array[Any] | bytearray, dtype: str) -> Any:
        """A copy on the device, of at least one number. dtype: torch's name of it."""
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

    def fetch(self, tensor: Any) -> Any:
        """A copy on the host, complete once an event that is recorded later is."""
        import torch

        if self.on_host:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def launch(self, kernel: Any, programs: int, *arguments: Any, threads: int = 128, **constants: Any) -> None:
        """Launch a kernel. threads: of a program; there are more where a warp has more."""
        if programs:
            options = {"num_warps": max(1, threads // self.warp), "num_stages": 1, "enable_fp_fusion": False}
            with self._interpreting():
                self._launch(kernel, programs, arguments, constants | options)

    def _launch(self, kernel: Any, programs: int, arguments: Sequence[Any], named: dict[str, Any]) -> None:
        kernel[(programs,)](*arguments, **named)

    @cached_property
    def warp(self) -> int:
        """Threads of a warp: 32 on NVIDIA, 64 on most of AMD."""
        if self.on_host:
            return 32
        from triton.runtime import driver

        return int(driver.active.get_current_target().warp_size)

    @contextlib.contextmanager
    def _interpreting(self) -> Iterator[None]:
        """A context for the interpreter: one kernel at a time, and no warnings of numpy about Inf and NaN."""
        if not self.on_host:
            yield
            return
        import numpy as np

        with _INTERPRETER, np.errstate(all="ignore"):
            yield

    def tile(self, compiled: int, interpreted: int) -> int:
        """The size of a program's tile: the interpreter takes as long for large tiles as for small ones."""
        return interpreted if self.on_host else compiled


class Answer:
    """The results of a piece that does not write: a Pending (device.py). answer: converts what was fetched."""

    def __init__(self, answer: Callable[[], Any]):
        self.answer = answer

    def stats(self) -> list[dict[str, float]]:
        return []


def signed(word: int) -> int:
    """A u64 as the i64 with the same bits."""
    return word - (1 << 64) if word >> 63 else word


def alignment(addresses: Sequence[int], codes: Sequence[int], *counts: int) -> int:
    """The alignment that a kernel may assume. ALIGNED: addresses and `counts` are multiples of 16."""
    low = 0
    for number in (*addresses, *counts):
        low |= number
    if low % 16 == 0:
        return ALIGNED
    natural = all(a % CODE_BYTES[code] == 0 for a, code in zip(addresses, codes, strict=True))
    return NATURAL if natural else BYTES
