"""Many steps of generation at a time, or one change of the weights: never both."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastinterp.errors import UsageError


class StepLock:
    """A lock that threads share for steps, each any number of times, and that a change has alone.

    A change that waits goes before steps that have not begun, so that generation without pause does not starve it.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._inside: dict[int, int] = {}  # thread -> how many steps it is in
        self._changing: int | None = None  # the thread that changes
        self._waiting = 0  # changes

    def enter(self) -> None:
        me = threading.get_ident()
        with self._free:
            while me not in self._inside and self._changing != me and (self._changing is not None or self._waiting):
                self._free.wait()
            self._inside[me] = self._inside.get(me, 0) + 1

    def leave(self) -> None:
        """Of a thread that is in no step, nothing: hooks that end a step run even if its beginning failed."""
        me = threading.get_ident()
        with self._free:
            if self._inside.get(me, 0) > 1:
                self._inside[me] -= 1
            else:
                self._inside.pop(me, None)
                self._free.notify_all()

    @contextmanager
    def change(self) -> Iterator[None]:
        """Raises: UsageError, if this thread is in a step, which would wait for itself."""
        me = threading.get_ident()
        with self._free:
            if me in self._inside or self._changing == me:
                raise UsageError("the weights cannot change inside a step of generation: call this between steps")
            self._waiting += 1
            try:
                while self._inside or self._changing is not None:
                    self._free.wait()
                self._changing = me
            finally:
                self._waiting -= 1
                self._free.notify_all()
        try:
            yield
        finally:
            with self._free:
                self._changing = None
                self._free.notify_all()
