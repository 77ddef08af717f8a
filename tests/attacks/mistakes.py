"""A deliberate mistake, which the sanitizer that is loaded must report: `mistakes.py address|thread`."""

from __future__ import annotations

import ctypes
import sys
import threading

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p


def beyond_the_end() -> None:
    """Writes 9 bytes into 8."""
    libc.memset(ctypes.c_void_p(libc.malloc(8)), 0, 9)


def without_order() -> None:
    """Two threads write the same bytes; ctypes releases the lock of the interpreter."""
    block = ctypes.c_void_p(libc.malloc(1 << 20))

    def write() -> None:
        for _ in range(1000):
            libc.memset(block, 0, 1 << 20)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    {"address": beyond_the_end, "thread": without_order}[sys.argv[1]]()
