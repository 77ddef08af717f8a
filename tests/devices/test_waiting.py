"""Waits for devices: Ctrl-C ends them, errors come through, and work that ends is seen soon."""

from __future__ import annotations

import _thread
import threading
import time

import pytest

from fastinterp.backends import waiting
from fastinterp.backends.waiting import wait
from fastinterp.errors import BackendError
from tests.support.processes import interruptible


class Event:
    """Complete after `looks` of the main thread, or never."""

    def __init__(self, looks: float, error: BackendError | None = None):
        self.looks, self.error, self.waits = looks, error, 0

    def done(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> None:
        self.waits += 1
        if self.error is not None:
            raise self.error


def test_an_interrupt_ends_the_wait_for_what_never_comes():
    timer = threading.Timer(0.05, _thread.interrupt_main)
    event = Event(float("inf"))
    with interruptible(), pytest.raises(KeyboardInterrupt):
        timer.start()
        wait(event)
    assert event.waits == 0  # it would not have come back from that


@pytest.mark.parametrize("looks", [0, 1, 5])
def test_errors_of_the_device_are_raised(looks):
    event = Event(looks, BackendError("the device failed"))
    with pytest.raises(BackendError, match="the device failed"):
        wait(event)
    assert event.waits == 1


def test_looks_are_soon_at_first_and_never_far_apart(monkeypatch):
    """A sleep is a sixteenth of what was waited, and at most a millisecond."""
    now, sleeps = [0.0], []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        now[0] += seconds + 20e-6

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    wait(Event(2000))
    assert sleeps[0] == 0.0 and max(sleeps) == waiting._LONGEST_S and sleeps == sorted(sleeps)
    assert len([s for s in sleeps if s < waiting._LONGEST_S]) < 200


def test_other_threads_block_in_the_driver():
    """Signals do not reach them, and they need no processor."""
    event = Event(float("inf"))
    thread = threading.Thread(target=wait, args=(event,))
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and event.waits == 1
