"""The order of checkpoints by the numbers in their names: `checkpoint-500`, `alpha_0.55`, `v1.10`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise

from fastinterp.errors import UsageError

# A number: signed behind `_` and `=`, with decimals, or with the parts of a version; as Python prints 1e-05.
_NUMBER = re.compile(r"(?:(?<=[_=])-)?\d+(?:\.\d+)*(?:e[+-]\d{2,3}(?!\d))?")
_OF_VERSIONS = re.compile(r"(?:\b|_|\d)(?:v|ver|version|release)[-_=.]?$", re.IGNORECASE)
_OF_POINTS = re.compile(r"alpha[-_=]$")
_IN_ORDER = "give all from the oldest to the newest with --in-order (in Python in_order=True)"


def by_step(paths: Sequence[str]) -> list[str]:
    """Checkpoints ordered by the numbers in their paths, which are alike but for these: `run/checkpoint-500`.

    Raises: UsageError, if a path differs in more than its numbers, two have the same, or it is not known whether they
    are decimals or versions.
    """
    if len(paths) < 2:
        return [*paths]
    kinds: dict[str, list[str]] = {}
    for path in paths:
        kinds.setdefault(_NUMBER.sub("#", _plain(path)), []).append(path)
    usual = max(kinds, key=lambda kind: len(kinds[kind]))
    odd = [path for kind, group in kinds.items() if kind != usual for path in group]
    if odd:
        raise UsageError(
            f"the order of {odd[0]!r} is not known: its name is not that of {kinds[usual][0]!r} with another number. "
            f"Leave it out, or {_IN_ORDER}"
        )
    return _Names(paths).ordered()


class _Names:
    """Paths that differ in nothing but their numbers."""

    def __init__(self, paths: Sequence[str]):
        self.paths = list(paths)
        self.rows = [[*_NUMBER.finditer(_plain(path))] for path in paths]
        columns = zip(*self.rows, strict=True)
        parted = [any(number[0].count(".") > 1 for number in column) for column in columns]
        self.versions = [tuple(_version(number[0]) for number in row) for row in self.rows]
        self.decimals = [
            tuple(_version(n[0]) if parts else (Decimal(n[0]),) for n, parts in zip(row, parted, strict=True))
            for row in self.rows
        ]

    def ordered(self) -> list[str]:
        """Raises: UsageError."""
        every = range(len(self.paths))
        seen: dict[object, int] = {}
        for i in every:
            first = seen.setdefault((self.decimals[i], self.versions[i]), i)
            if first != i:
                raise UsageError(self._same(first, i))
        decimal = sorted(every, key=lambda i: (self.decimals[i], self.versions[i]))
        version = sorted(every, key=lambda i: (self.versions[i], self.decimals[i]))
        equal = next(((a, b) for a, b in pairwise(decimal) if self.decimals[a] == self.decimals[b]), None)
        if equal is not None or decimal != version:
            pair = equal or next((a, b) for a, b in zip(decimal, version, strict=True) if a != b)
            if self._are_versions(*pair, equal=equal is not None):
                return [self.paths[i] for i in version]
        return [self.paths[i] for i in decimal]

    def _same(self, first: int, second: int) -> str:
        a, b = self.paths[first], self.paths[second]
        if a == b:
            return f"{b!r} is named twice"
        return f"{a!r} and {b!r} have the same step number. Leave one out, or {_IN_ORDER}"

    def _are_versions(self, first: int, second: int, *, equal: bool) -> bool:
        """Whether numbers by which two paths are told apart are versions, and no decimals: their order differs.

        first, second  the smaller and the larger one, as decimals; equal: they are the same
        Raises: UsageError, if they may be either.
        """
        # The first number that differs: what follows does not matter.
        keys = [zip(self.decimals[i], self.versions[i], strict=True) for i in (first, second)]
        at = next(i for i, (a, b) in enumerate(zip(*keys, strict=True)) if a != b)
        numbers = [row[at] for row in self.rows]
        before = [number.string[: number.start()] for number in numbers]
        if any(map(_OF_VERSIONS.search, before)):
            return True
        texts = [number[0] for number in numbers]
        fractions = [fraction for text in texts if (fraction := text.partition(".")[2])]
        padded = any(f.endswith("0") and len(f) > min(map(len, fractions)) for f in fractions)
        below_one = any(re.match(r"-?0\.|.*\.0\d|.*e", text) for text in texts)
        if not equal and not padded and (below_one or any(map(_OF_POINTS.search, before))):
            return False
        a, b = texts[first], texts[second]
        said = (
            "as decimals they are equal, as versions not"
            if equal
            else f"as decimals {a} is less than {b}, as versions it comes after that"
        )
        raise UsageError(
            f"the order of {self.paths[first]!r} and {self.paths[second]!r} is not known: {said}. "
            f"{_IN_ORDER[0].upper()}{_IN_ORDER[1:]}"
        )


def _version(text: str) -> tuple[Decimal, ...]:
    """The parts of a number, 1 and 10 of 1.10. What has an exponent is a decimal."""
    if "e" in text:
        return (Decimal(text),)
    sign = -1 if text.startswith("-") else 1
    return tuple(sign * Decimal(part) for part in text.removeprefix("-").split("."))


def _plain(path: str) -> str:
    """A path as it is compared: absolute, without a trailing slash."""
    return os.path.abspath(os.path.expanduser(path))
