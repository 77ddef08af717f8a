"""The native pump: reads, combines, measures and writes on threads of its own, while Python only watches."""

from __future__ import annotations

from collections.abc import Callable

from fastinterp._C import Masks, Pump, cached_fraction, combine, reserve

__all__ = ["Masks", "Progress", "Pump", "cached_fraction", "combine", "reserve", "watch"]

# Called from the thread that runs the merge, about ten times a second, with bytes done and bytes to do (read and
# written together).
Progress = Callable[[int, int], None]

_TICK_S = 0.1


def watch(pump: Pump, total: int, progress: Progress | None) -> None:
    """Run the pump to its end, or to the first exception here (Ctrl-C): its threads have ended when this returns.

    They have ended even if another exception comes while they are waited for: they use files that are closed next.
    total  bytes that it will read and write, for `progress`
    """
    try:
        pump.start()
        while not pump.wait(_TICK_S):
            if progress:
                progress(pump.bytes_read + pump.bytes_written, total)
    finally:
        ended, late = False, None
        while not ended:
            try:
                pump.cancel()
                pump.join()
                ended = True
            except BaseException as error:
                late = error
        if late is not None:
            raise late
    if progress and pump.error() is None:
        progress(total, total)
