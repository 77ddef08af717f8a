"""JSON from files that may be damaged or hostile."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from fastinterp.checkpoint.names import quote
from fastinterp.errors import CheckpointError

MAX_VALUES = 8_000_000  # values take 50 to 200 bytes of memory each; tokenizers in use have up to 2 million
MAX_DEPTH = 64  # files in use have 10; what handles values calls itself for each level


class _Duplicate(Exception):
    """A name that occurs twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _Duplicate(next(name for name, count in counts.items() if count > 1))
    return table


def parse_object(raw: bytes, what: str, file: str, *, most: int = MAX_VALUES, text: bool = True) -> dict[str, Any]:
    """The JSON object in `raw`, which is called `what` (`the header`) in messages about `file`.

    most  values that it may hold
    text  whether it must be valid Unicode: `"\\ud800"`, half of a pair of surrogates, cannot be written again
    Raises: CheckpointError, if it is not UTF-8, not JSON, not an object, names a key twice, nests too deeply, or holds
    too many values.
    """
    # json.loads would also take UTF-16 and a byte order mark; safetensors allows neither.
    if raw[:1] != b"{":
        raise CheckpointError(f"{what} must start with '{{', got {bytes(raw[:8])!r}", file=file)
    return parse_json(raw, what, file, most=most, text=text)  # type: ignore[no-any-return]  # it starts with '{'


def parse_json(raw: bytes, what: str, file: str, *, most: int = MAX_VALUES, text: bool = True) -> Any:
    """The JSON value in `raw`, as parse_object has it."""
    refuse_many(raw, what, file, most)
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        if text and b"\\u" in raw:
            json.dumps(table, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{what} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}", file=file
        ) from None
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 20) : error.end + 10]
        raise CheckpointError(
            f"{what} is not valid Unicode: it holds half of a pair of surrogates, near {quote(near)}", file=file
        ) from None
    except _Duplicate as error:
        raise CheckpointError(f"{what} names {quote(error)} twice", file=file) from None
    except RecursionError:
        raise CheckpointError(f"{what} nests too deeply to be read", file=file) from None
    except ValueError as error:
        raise CheckpointError(f"{what} is not JSON: {error}", file=file) from None
    if nests_deeper(table, MAX_DEPTH):
        raise CheckpointError(f"{what} nests too deeply to be read: more than {MAX_DEPTH} levels", file=file)
    return table


def refuse_many(raw: bytes, what: str, file: str, most: int = MAX_VALUES) -> None:
    """Raises: CheckpointError, if JSON holds more than `most` values: each is preceded by one of these bytes."""
    if len(raw) > most and (count := raw.count(b",") + raw.count(b"[") + raw.count(b"{")) > most:
        raise CheckpointError(
            f"{what} holds up to {count:,} values, more than the allowed {most:,}: damaged, or made to use up memory",
            file=file,
        )


def nests_deeper(value: Any, most: int) -> bool:
    """Whether lists and dicts are nested in more than `most` levels."""
    level = [value] if type(value) is dict or type(value) is list else []
    for _ in range(most + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True
