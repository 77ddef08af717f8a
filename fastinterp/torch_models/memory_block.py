"""One allocation that holds several tensors: of the host, on large pages, or of a device."""

from __future__ import annotations

import mmap
from collections.abc import Hashable, Mapping
from contextlib import suppress
from typing import Any

from fastinterp.backends.cpu import Memory

_ALIGN = 64  # bytes


class MemoryBlock:
    """Memory for tensors of given sizes, uninitialised.

    sizes  bytes of each tensor, by any key
    block  u8[MemoryBlock.room(sizes)] that kernels of a device reach; None: newly allocated on the host
    """

    def __init__(self, sizes: Mapping[Any, int], block: Any = None):
        self._spans: dict[Hashable, tuple[int, int]] = {}  # offset, bytes
        end = 0
        for key, nbytes in sizes.items():
            self._spans[key] = end, nbytes
            end += _padded(nbytes)
        self._kind = "memory" if block is None else "device"
        self._block = _pages(end) if block is None else block

    @staticmethod
    def room(sizes: Mapping[Any, int]) -> int:
        """Bytes of a block that holds all of them."""
        return max(1, sum(map(_padded, sizes.values())))

    def handle(self, key: Hashable) -> Memory:
        """The memory of one tensor."""
        start, nbytes = self._spans[key]
        return self._kind, int(self._block.data_ptr()) + start, nbytes


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _pages(nbytes: int) -> Any:
    """u8[nbytes], on large pages where the kernel has them."""
    import torch

    pages = mmap.mmap(-1, max(1, nbytes))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)  # a page fault for 2 MB, not for every 4 KB
    return torch.frombuffer(pages, dtype=torch.uint8)
