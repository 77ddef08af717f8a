"""Orders the streams of a device: changes of weights, and steps of generation that read them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastinterp.backends.torch_device import capturing, current_queue

if TYPE_CHECKING:
    from fastinterp.backends.device import Event, Queue


class StreamOrder:
    """Makes streams wait for each other by events. The host does not wait.

    Steps that have ended on the host may still run on the device, and so may a change.

    device  the torch.device
    """

    def __init__(self, device: Any):
        self._device, self._lock = device, threading.Lock()
        self._steps: dict[int, Queue] = {}  # streams in which steps began since the last change, by their handle
        self._changed: tuple[int, Event] | None = None  # stream of the last change, and its end

    def step(self) -> None:
        """Order what this thread puts into its current stream after the last change."""
        queue = current_queue(self._device)
        with self._lock:
            self._steps[queue.handle] = queue
            changed = self._changed
        # A graph cannot wait for what is outside of it; before its capture torch waits for all streams.
        if changed is not None and changed[0] != queue.handle and not capturing(self._device):
            queue.after(changed[1])

    @contextmanager
    def change(self) -> Iterator[None]:
        """Inside, the current stream comes after all steps, and after the last change."""
        queue = current_queue(self._device)
        with self._lock:
            steps, changed = self._steps, self._changed
            self._steps = {}
        for handle, other in steps.items():
            if handle != queue.handle:
                queue.after(other.record())
        if changed is not None and changed[0] != queue.handle:
            queue.after(changed[1])
        try:
            yield
        finally:
            event = queue.record()
            with self._lock:
                self._changed = queue.handle, event
