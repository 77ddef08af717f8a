"""Child processes of tests: a time limit for each, and SIGINT as in the foreground."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt here and ends processes started here.

    A shell without job control starts background commands, the tests among them, with SIGINT ignored, and children
    inherit that. To be used on the main thread.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def started(command: Sequence[object], *, limit_s: float = 60, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that SIGINT ends. It is killed at the end of the block, or `limit_s` seconds after its start.

    `options` are those of Popen; its pipes carry text.
    """
    with interruptible():
        process = subprocess.Popen([str(part) for part in command], text=True, **options)
    watchdog = threading.Timer(limit_s, process.kill)
    watchdog.daemon = True
    watchdog.start()
    with process:
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()
