"""Waits for a device that Ctrl-C ends, also where the device has hung."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastinterp.backends.device import Event

_LONGEST_S = 1e-3  # between two looks
_SHARE = 16  # a look comes too late by at most this part of the time that was waited


def wait(event: Event) -> None:
    """Wait until an event is complete. In the main thread signals are handled meanwhile: drivers heed none.

    Raises: BackendError, if work before it failed; what a signal's handler raises, as KeyboardInterrupt.
    """
    if threading.current_thread() is threading.main_thread():
        began = time.perf_counter()
        while not event.done():
            time.sleep(min(_LONGEST_S, (time.perf_counter() - began) / _SHARE))
    event.wait()
