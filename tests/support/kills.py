"""Kills a process at a chosen system call that changes files or folders."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

CALLS = ("mkdir", "rmdir", "replace", "rename", "unlink", "write", "pwrite", "ftruncate", "truncate", "link", "fsync")


class _Counter:
    """Calls of the module `os`, counted; the process dies before or after the one of the number `at`."""

    def __init__(self, at: int, late: bool, die: Callable[[], object]):
        self.at, self.late, self.die, self.count = at, late, die, 0

    def wrap(self, name: str) -> None:
        real = getattr(os, name)

        def call(*args: object, **options: object) -> object:
            if name == "open" and not int(args[1]) & os.O_CREAT:  # type: ignore[call-overload]
                return real(*args, **options)
            self.count += 1
            if self.count == self.at and not self.late:
                self.die()
            result = real(*args, **options)
            if self.count == self.at and self.late:
                self.die()
            return result

        setattr(os, name, call)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(action: Callable[[], object], at: int, *, late: bool = False, die: Callable[[], object] = die) -> bool:
    """Run `action` in a child process, which is killed by SIGKILL at its call number `at`, from 1. False, if it ended
    before that; its exceptions are errors.

    late  after the call, not before it
    die   what ends the process instead: by SIGKILL in the end
    """
    child = os.fork()
    if not child:
        with suppress(BaseException):
            counter = _Counter(at, late, die)
            for name in ("open", *CALLS):
                counter.wrap(name)
            try:
                action()
                os._exit(0)
            except BaseException:
                traceback.print_exc(file=sys.stderr)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the action failed: exit code {code}"
    return code != 0


def every_kill(prepare: Callable[[int], Path], action: Callable[[Path], object]) -> Iterator[tuple[int, Path]]:
    """(number of the call, folder) for every call of `action(folder)` that a process can be killed at.

    prepare  makes the folder of a run
    """
    at = 0
    while True:
        at += 1
        folder = prepare(at)
        if not killed(lambda folder=folder: action(folder), at):  # type: ignore[misc]
            return
        yield at, folder
