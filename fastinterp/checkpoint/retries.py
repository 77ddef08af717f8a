"""Says that a place elsewhere is asked again: without a word, a server that is down is silence."""

from __future__ import annotations

import threading
import time
from urllib.parse import urlsplit

from fastinterp.messages import counted, tell

_SILENT_S = 60.0  # between two lines about one place
_lock = threading.Lock()
_told: dict[str, float] = {}  # by scheme and host or bucket, when


def tell_retry(name: str, url: str, why: str, most: int) -> None:
    """Say, once a minute for each host or bucket, that it is asked again. From several threads at once.

    name  of the file, for people
    url   its address
    most  further tries at most
    """
    place = "://".join(urlsplit(url)[:2])
    now = time.monotonic()
    with _lock:
        if now - _told.get(place, -_SILENT_S) < _SILENT_S:
            return
        _told[place] = now
    tell(f"{name}: {why}. Trying again, {counted(most, 'time')} at most")
