"""The checksum of a file of weights as its header states it: `fastinterp.checksum` of the metadata, `xxh3-32k:` and 16
hexadecimal digits, over the data section. reference/checksum.py defines the number.

It is in the header, so it is written after the data; a file whose checksum differs is not the one that was written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

KEY = "fastinterp.checksum"
_PREFIX = "xxh3-32k:"
UNKNOWN = _PREFIX + "-" * 16  # in a header that is laid out before the data is known: of the same length


def checksum_text(checksum: int) -> str:
    return f"{_PREFIX}{checksum:016x}"


def stated_checksum(metadata: Mapping[str, str]) -> int | None:
    """The checksum that the metadata of a header state; None, if they have none that can be checked."""
    found = re.fullmatch(rf"{_PREFIX}([0-9a-f]{{16}})", metadata.get(KEY, ""), re.ASCII)
    return int(found[1], 16) if found else None
