"""Which tensors are walked: by one `Live` alone, as a second would take the first one's point for their own values."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar
from weakref import WeakSet

from fastinterp.errors import UsageError
from fastinterp.torch_models.module_tensors import Weight

_LOCK = threading.Lock()


class Claim:
    """Tensors that nothing else may claim, until `release`, or until nobody holds the claim any more.

    Raises: UsageError, if any shares memory with a tensor of another claim.
    """

    _standing: ClassVar[WeakSet[Claim]] = WeakSet()

    def __init__(self, weights: Sequence[Weight]):
        self._weights = weights
        with _LOCK:
            for other in self._standing:
                self._refuse(other)
            self._standing.add(self)

    def release(self) -> None:
        self._standing.discard(self)

    def _refuse(self, other: Claim) -> None:
        """Tensors of one claim lie apart, so that one that begins in another is the next after it."""
        ranges = sorted(
            (str(w.tensor.device), w.address, w.nbytes, k, w.name)
            for k, claim in enumerate((self, other))
            for w in claim._weights
            if w.nbytes
        )
        for (device, start, nbytes, k, name), (place, at, _, i, named) in pairwise(ranges):
            if k != i and device == place and at < start + nbytes:
                raise UsageError(
                    f"an open Live already walks {named if i == 0 else name}, so that its own weights would be lost. "
                    "Close that Live first: live.close(), or leave its `with`"
                )
