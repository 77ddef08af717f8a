"""Progress of long work: the callback's type, the rate as text, and the line that `progress=True` shows."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Annotated, TextIO

Progress = Annotated[
    Callable[[int, int], None],
    """A function that is called about ten times a second while work is done: fn(done, total), both in bytes.

    An exception that it raises stops the work, as Ctrl-C does. `progress=True` in place of it shows a line on stderr.
    """,
]

_RECENT_S = 5.0  # the rate is an average over this time
_REDRAW_S = 0.1  # between two states of the line
_BAR = 24  # characters


def callback_of(progress: Progress | bool | None) -> Progress | None:
    """The callback for an argument `progress`: True stands for a line on stderr, as of tqdm; False for none."""
    return ProgressLine() if progress is True else progress or None


class Rate:
    """Bytes per second over the last few seconds."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, done: int) -> None:
        """To be called whenever something was done: a run that is resumed does not begin at 0."""
        if not self._seen:
            self._seen.append((time.monotonic(), done))

    def text(self, done: int, total: int) -> str:
        """`1.2 of 9.8 GB, 2.1 GB/s, 4 s left`"""
        self.see(done)
        now = time.monotonic()
        self._seen.append((now, done))
        while now - self._seen[0][0] > _RECENT_S and len(self._seen) > 2:
            self._seen.popleft()
        then, before = self._seen[0]
        rate = (done - before) / (now - then) if now > then else 0.0
        left = f", {_duration((total - done) / rate)} left" if rate > 0 else ""
        return f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e9:.1f} GB/s{left}"


class ProgressLine:
    """A line that is written over until the work is done, in terminals and notebooks:

    ` 43% [##########              ] 1.2 of 9.8 GB, 2.1 GB/s, 4 s left`
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = sys.stderr if stream is None else stream  # None, if it was closed before the program started
        self._rate = Rate()
        self._next, self._width = self._rate.start, 0

    def __call__(self, done: int, total: int) -> None:
        now, ended = time.monotonic(), done >= total
        if self._stream is None or (now < self._next and not ended):
            return
        self._next = now + _REDRAW_S
        part = done / total if total else 1.0
        line = f"{part:4.0%} [{'#' * int(part * _BAR):{_BAR}}] {self._rate.text(done, total)}"
        self._stream.write(f"\r{line:{self._width}}" + ("\n" if ended else ""))
        self._stream.flush()
        self._width = 0 if ended else len(line)


def _duration(seconds: float) -> str:
    """A duration with one unit: `4 s`, `3 min`, `2 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"
