"""JSON objects from files that may be damaged or hostile."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from fastinterp.checkpoint.names import quote
from fastinterp.errors import CheckpointError


class _Duplicate(Exception):
    """A name that occurs twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _Duplicate(next(name for name, count in counts.items() if count > 1))
    return table


def parse_object(raw: bytes, what: str, file: str) -> dict[str, Any]:
    """The JSON object in `raw`, which is called `what` (`the header`) in messages about `file`.

    Raises: CheckpointError, if it is not UTF-8, not JSON, not an object, names a key twice, or nests too deeply.
    """
    # json.loads would also take UTF-16 and a byte order mark; safetensors allows neither.
    if raw[:1] != b"{":
        raise CheckpointError(f"{what} must start with '{{', got {bytes(raw[:8])!r}", file=file)
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{what} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}", file=file
        ) from None
    except _Duplicate as error:
        raise CheckpointError(f"{what} names {quote(error)} twice", file=file) from None
    except RecursionError:
        raise CheckpointError(f"{what} nests too deeply to be read", file=file) from None
    except ValueError as error:
        raise CheckpointError(f"{what} is not JSON: {error}", file=file) from None
    return table  # type: ignore[no-any-return]  # it starts with '{', so it is a dict
