"""Exclusive use of a module's tensors: a second `Live` would take the first one's point for their own values."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar
from weakref import WeakSet

from fastinterp.errors import UsageError
from fastinterp.torch_models.module_tensors import Weight

_LOCK = threading.Lock()


class ExclusiveTensors:
    """A registration of tensors, which nothing else may register until `release`, or until this object is gone.

    Raises: UsageError, if any shares memory with a registered tensor.
    """

    _registered: ClassVar[WeakSet[ExclusiveTensors]] = WeakSet()

    def __init__(self, weights: Sequence[Weight]):
        self._weights = weights
        with _LOCK:
            for other in self._registered:
                self._refuse_overlap(other)
            self._registered.add(self)

    def release(self) -> None:
        with _LOCK:  # no other thread goes through them meanwhile
            self._registered.discard(self)

    def _refuse_overlap(self, other: ExclusiveTensors) -> None:
        """The tensors of one registration do not overlap, so of two that do one follows the other in memory."""
        ranges = sorted(
            (str(w.tensor.device), w.address, w.nbytes, k, w.name)
            for k, registration in enumerate((self, other))
            for w in registration._weights
            if w.nbytes
        )
        for (device, start, nbytes, k, name), (next_device, next_start, _, next_k, next_name) in pairwise(ranges):
            if k != next_k and device == next_device and next_start < start + nbytes:
                raise UsageError(
                    f"an open Live already sets {next_name if next_k == 0 else name}, so that its own weights would be "
                    "lost. Close that Live first: live.close(), or leave its `with`"
                )
