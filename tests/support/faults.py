"""Programs whose system calls fail: the preloaded library of faults.c, and what it wrote down."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.support.build_cache import BUILD, key, made, run

SOURCE = Path(__file__).with_name("faults.c")
_FLAGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


@cache
def library() -> Path:
    """The library, compiled once. Skips the test where there is no C compiler, or another C library than glibc."""
    compiler = os.environ.get("CC", "").split() or [next(filter(shutil.which, ("cc", "gcc", "clang")), "")]
    if not compiler[0] or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        pytest.skip("needs a C compiler and glibc")
    target = BUILD / "faults" / f"faults-{key(compiler, _FLAGS, [SOURCE])}.so"
    return made(target, lambda path: run([*compiler, *_FLAGS, "-o", str(path), str(SOURCE), "-ldl", "-lpthread"]))


def environment(rules: str, under: Sequence[str | Path], trace: Path | None = None) -> dict[str, str]:
    """The environment of a program, this one's with faults in it.

    rules  `close:2:EIO,fsync:1+:ENOSPC`: see faults.c
    under  files and folders: calls on other files are neither counted nor failed
    trace  a file for the calls that were counted
    """
    own = {"LD_PRELOAD": str(library()), "FAULTS": rules, "FAULTS_UNDER": ":".join(map(str, under))}
    return {**os.environ, **own, **({"FAULTS_TRACE": str(trace)} if trace else {})}


@dataclass(frozen=True)
class Call:
    """A call of a trace. nth: from 1, of those of its name. path: its file's, or `-`. more: offset and size, a name."""

    name: str
    nth: int
    path: str
    more: str = ""
    failed: bool = False


def calls(trace: Path) -> list[Call]:
    """The calls that a program made, in order. Paths have no spaces."""
    found: list[Call] = []
    for line in trace.read_text(errors="surrogateescape").splitlines() if trace.exists() else ():
        first, *rest = line.split(" ", 3)
        if first == "!":  # the one before, of that name
            nth, name = int(rest[0]), rest[1]
            at = max(i for i, call in enumerate(found) if (call.name, call.nth) == (name, nth))
            found[at] = Call(name, nth, found[at].path, found[at].more, failed=True)
        else:
            found.append(Call(rest[0], int(first), rest[1], rest[2] if len(rest) > 2 else ""))
    return found


def counts(trace: Path) -> Mapping[str, int]:
    """Name of a call -> how often it was made."""
    totals: dict[str, int] = {}
    for call in calls(trace):
        totals[call.name] = max(call.nth, totals.get(call.name, 0))
    return totals
