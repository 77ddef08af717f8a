"""A lock for many steps of generation at a time, or one change of the weights: never both."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastinterp.errors import UsageError

Call = FrameType | str | None
_LOOK_S = 1.0  # between looks for threads that ended inside a step


class StepLock:
    """A lock that threads share for steps, each any number of times, and that a change has alone.

    A waiting change goes before steps that have not begun, so that generation without pause does not starve it.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._inside: dict[int, list[Call]] = {}  # thread -> the calls that are its steps
        self._changing: int | None = None  # the thread that changes
        self._waiting = 0  # changes

    def enter(self, call: Call = None) -> int:
        """Begin a step. Returns what `leave` takes: the thread, for the step may end in another one.

        call  the frame that is a step until it ends, if one is; else anything that `leave` is given too
        """
        me = threading.get_ident()
        with self._free:
            if me in self._inside:
                self._forget_dead()
            while me not in self._inside and self._changing != me and (self._changing is not None or self._waiting):
                self._free.wait()
            self._inside.setdefault(me, []).append(call)
        return me

    def leave(self, thread: int, call: Call = None) -> None:
        """End the step of this call. Nothing, if it was not begun: hooks that end a step run even if its beginning
        failed.
        """
        with self._free:
            calls = self._inside.get(thread, [])
            if call in calls:
                calls.remove(call)
                self._clear(thread)

    def _clear(self, thread: int) -> None:
        if not self._inside[thread]:
            del self._inside[thread]
            self._free.notify_all()

    def _forget_dead(self) -> None:
        """End the steps of frames that are gone: no hook runs after KeyboardInterrupt and SystemExit.

        Only those of this thread and of threads that have ended: the frames of others change meanwhile.
        """
        me, running = threading.get_ident(), sys._current_frames()
        for thread in [t for t in self._inside if t == me or t not in running]:
            frames = set(_frames()) if thread == me else set()
            calls = self._inside[thread]
            calls[:] = [c for c in calls if not isinstance(c, FrameType) or c in frames]
            self._clear(thread)

    @contextmanager
    def change(self) -> Iterator[None]:
        """Raises: UsageError, if this thread is in a step, which would wait for itself."""
        me = threading.get_ident()
        with self._free:
            self._forget_dead()
            if me in self._inside or self._changing == me:
                raise UsageError("the weights cannot change inside a step of generation: call this between steps")
            self._waiting += 1
            try:
                while self._inside or self._changing is not None:
                    self._free.wait(_LOOK_S)
                    self._forget_dead()
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


def call() -> Call:
    """The frame of the call of a torch module of which a hook runs now: what `enter` and `leave` take."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_call_impl":
        frame = frame.f_back
    return frame or "compiled"


def _frames() -> Iterator[FrameType]:
    """The frames of this thread, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
