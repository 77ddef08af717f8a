"""Progress of a run on stderr: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastinterp.progress import Progress, Rate

_LINE_S = 10.0  # between plain lines
_PATIENCE_S = 0.3  # a shorter run shows no bar


@contextmanager
def shown(quiet: bool) -> Iterator[Progress | None]:
    """Context manager: the progress callback for the run inside; None if `quiet`."""
    if quiet or sys.stderr is None:  # None: it was closed before the program started
        yield None
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        bar = _Bar()
        try:
            yield bar
        finally:
            bar.close()
    else:
        yield _Lines()


class _Lines:
    def __init__(self) -> None:
        self._rate = Rate()
        self._last = self._rate.start

    def __call__(self, done: int, total: int) -> None:
        self._rate.see(done)
        now = time.monotonic()
        if now - self._last >= _LINE_S and done < total:
            self._last = now
            print(f"{done / total:4.0%} {self._rate.text(done, total)}", file=sys.stderr, flush=True)  # noqa: T201 # a log


class _Bar:
    """A progress bar, drawn in the thread that calls it, about ten times a second."""

    def __init__(self) -> None:
        self._rate = Rate()
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int) -> None:
        self._rate.see(done)
        if self._bar is None:
            if time.monotonic() - self._rate.start < _PATIENCE_S or done >= total:
                return
            self._open(total)
        self._bar.update(self._task, completed=done, text=self._rate.text(done, total), refresh=True)

    def _open(self, total: int) -> None:
        # Imported here: it takes as long as a small merge.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = BarColumn(), TextColumn("{task.percentage:3.0f}% {task.fields[text]}")
        self._bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
        self._task = self._bar.add_task("", total=total, text="")
        self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
