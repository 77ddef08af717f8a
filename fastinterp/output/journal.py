"""The journal of an output that is not finished: which run writes it, how far that is, and whether it is alive.

    with the lock of the file held, from the first temporary file to the last name:
    begin      the run and its process. Temporary names derive from the run
    ...        what the run notes of its own, to be resumed from
    finishing  the commit point: all temporary files are complete. From here on any run gives them their names

The journal is removed with the last step of the finish, so an output without one is finished, or was never begun.
Who works on an output has its journal locked (flock), and the system gives the lock back however the process ends: a
journal that is not locked is of a run that died. Where a file system has no locks, the number of the process, its start
and the boot of its machine tell whether it lives.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from fastinterp.checkpoint.journal_file import (
    BEGIN,
    FINISHING,
    GOES_ON,
    PLACED,
    SUBFOLDER,
    Begin,
    Finishing,
    Record,
    decoded,
    encoded,
    line_of,
    parsed_all,
)
from fastinterp.checkpoint.names import quote
from fastinterp.errors import OutputError

T = TypeVar("T")
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_OWN = {BEGIN, GOES_ON, SUBFOLDER, FINISHING, PLACED}
_MOST = 1 << 31  # bytes of a journal that are read
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Busy(OutputError):
    """A process that may be alive works on the output."""


class Journal:
    """A journal that this process has locked, until `close` or `remove`.

    begun      who began the output; a run that goes on with it keeps its number
    owner      the last process that worked on it
    finishing  the commit record, if there is one in force
    placed     all files have their names
    same_boot  whether that process was of this boot of this machine: what the system had not written to the disk yet is
               there as well then
    notes      whether there are records to resume from

        journal.append("round", Round(...))       a record of a kind of one's own, in lower-case letters
        journal.read("round", Round)              those that are there
    """

    def __init__(self, path: Path, fd: int, records: list[Record], end: int):
        self.path = path
        self.removed = False
        self._fd, self._records, self._end = fd, records, end
        self._understood()

    def _understood(self) -> None:
        begun = self.read(BEGIN, Begin) or [Begin("")]
        self.begun, self.owner = begun[0], [*begun, *self.read(GOES_ON, Begin)][-1]
        self.same_boot = self.owner.boot == boot()

    @property
    def run(self) -> str:
        return self.begun.run

    @property
    def finishing(self) -> Finishing | None:
        found = self.read(FINISHING, Finishing)
        return found[-1] if found else None

    @property
    def placed(self) -> bool:
        return any(record.kind == PLACED for record in self._records)

    @property
    def notes(self) -> bool:
        return any(record.kind not in _OWN for record in self._records)

    def read(self, kind: str, type_: type[T]) -> list[T]:
        """The values of all records of a kind, in order. type_: a msgspec.Struct, or any type of plain values

        Raises: OutputError, if one is of another type: a newer version may have written it.
        """
        try:
            return [decoded(r.value, type_) for r in self._records if r.kind == kind]
        except (msgspec.DecodeError, ValueError) as error:
            raise OutputError(f"{self.path}: the journal has a record `{kind}` that is not read: {error}") from None

    def append(self, kind: str, value: object, *, sync: bool = False) -> None:
        """Add a record. It is written as a whole or not at all. sync: wait until it is on the disk

        Raises: OutputError.
        """
        record = Record(kind, encoded(value))
        line = line_of(kind, record.value)
        try:
            self.settle()
            done = 0
            while done < len(line):
                written = os.write(self._fd, memoryview(line)[done:])
                if not written:
                    raise OSError(errno.EIO, "the system wrote 0 bytes")
                done += written
            if sync:
                os.fsync(self._fd)
            self._end += len(line)
        except BaseException as error:
            with suppress(OSError):
                self.settle()
            if isinstance(error, OSError):
                raise OutputError(f"{self.path}: the journal cannot be written: {error.strerror}") from None
            raise
        self._records.append(record)

    def settle(self, *, sync: bool = False) -> None:
        """Cut off what is not a whole record of this journal. Raises: OSError."""
        os.ftruncate(self._fd, self._end)
        if sync:
            os.fsync(self._fd)

    def withdraw(self, *, sync: bool = False) -> None:
        """Cut the commit record off: the finish is taken back. Raises: OSError."""
        kept = [record for record in self._records if record.kind not in (FINISHING, PLACED)]
        self._end = sum(len(line_of(record.kind, record.value)) for record in kept)
        self.settle(sync=sync)
        self._records = kept

    def go_on(self) -> None:
        """This process works on the output from here on. Raises: OutputError."""
        self.append(GOES_ON, this_process(self.run, self.begun.merge))
        self._understood()

    def begin(self, merge: str = "", run: str | None = None) -> None:
        """Begin anew: what was noted is gone. The lock stays. Raises: OutputError.

        merge  what tells merges apart
        run    12 hexadecimal digits; by default drawn at random
        """
        self._records, self._end = [], 0
        self.append(BEGIN, this_process(run or os.urandom(6).hex(), merge))
        self._understood()

    def remove(self) -> None:
        """The output is finished, or given up. Does nothing, if it is closed.

        Raises: OSError; the journal stays locked then.
        """
        if self._fd < 0:
            return
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        self.removed = True
        self.close()

    def close(self) -> None:
        """Unlock it, and leave it to the next run. May be called again."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # also for processes forked meanwhile
            os.close(fd)


def begin(path: Path, merge: str = "", run: str | None = None) -> Journal:
    """Make the journal of a new output, and lock it. merge, run: as of Journal.begin

    Raises: Busy, if another process has just made one; OSError.
    """
    flags = _FLAGS | os.O_CREAT | os.O_EXCL
    try:
        fd = os.open(path, flags, 0o666)
    except FileExistsError:
        raise Busy(f"another process begins to write there: {quote(path)}. Wait for it, then run this again") from None
    try:
        if not _locked(path, fd):
            raise Busy(f"another process begins to write there: {quote(path)}. Wait for it, then run this again")
    except BaseException as error:
        if not isinstance(error, Busy):  # it is this process's own, and empty
            with suppress(OSError):
                os.unlink(path)
        os.close(fd)
        raise
    journal = Journal(path, fd, [], 0)
    try:
        journal.begin(merge, run)
    except BaseException:
        with suppress(OSError):
            journal.remove()
        raise
    return journal


def take_over(path: Path, *, force: bool = False) -> Journal | None:
    """Lock the journal that a run left which has ended; None, if there is none.

    force  where there are no locks: take it also from a process of which nothing is known
    Raises: Busy, if the run may be alive; OutputError.
    """
    while True:
        try:
            fd = os.open(path, _FLAGS)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise OutputError(f"{path}: the journal cannot be opened: {error.strerror}") from None
        try:
            locked = _locked(path, fd)
            if locked is None:  # it is not there any more, or another one
                os.close(fd)
                continue
            records, end = _content(path, fd)
            journal = Journal(path, fd, records, end)
            if not locked:
                raise Busy(_busy(journal.owner, path))
            if locked == "unknown" and not force:
                _refuse_living(journal.owner, path)
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        return journal


def _locked(path: Path, fd: int) -> str | bool | None:
    """Lock the open journal. False, if another process has it locked; None, if this file is no longer the journal;
    `unknown`, if the file system has no locks.
    """
    how: str | bool = True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OutputError(f"{path}: the journal cannot be locked: {error.strerror}") from None
        how = "unknown"
    try:
        at_path, own = os.lstat(path), os.fstat(fd)
    except FileNotFoundError:
        return None
    return how if (at_path.st_dev, at_path.st_ino) == (own.st_dev, own.st_ino) else None


def _content(path: Path, fd: int) -> tuple[list[Record], int]:
    """The records of a journal, and where the last one ends."""
    try:
        size = os.fstat(fd).st_size
        if size > _MOST:
            raise OutputError(f"{path}: this is no journal: it has {size} bytes. Remove it")
        content = bytearray()
        while len(content) < size and (more := os.pread(fd, size - len(content), len(content))):
            content += more
    except OSError as error:
        raise OutputError(f"{path}: the journal cannot be read: {error.strerror}") from None
    found = list(parsed_all(bytes(content)))
    if not found or found[0][0].kind != BEGIN:
        return [], 0
    return [record for record, _ in found], found[-1][1]


def _busy(begun: Begin, path: Path) -> str:
    if begun.boot == boot() and begun.pid:
        return f"process {begun.pid} is writing here: {quote(path.name)}. Wait for it, or end it"
    return f"a process, perhaps on another machine, is writing here: {quote(path.name)}. Wait for it, or end it"


def _refuse_living(begun: Begin, path: Path) -> None:
    """Where there are no locks. Raises: Busy."""
    if begun.boot == boot():
        if begun.pid and _alive(begun):
            raise Busy(_busy(begun, path))
        return
    if begun.run:
        raise Busy(
            f"a run on another machine, or before this one was started anew, was writing here: {quote(path.name)}. The "
            "file system has no locks, which would tell whether it is alive. If it is not: --force "
            "(in Python force=True)"
        )


def _alive(begun: Begin) -> bool:
    if begun.started:
        return started(begun.pid) == begun.started
    try:
        os.kill(begun.pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def this_process(run: str, merge: str = "") -> Begin:
    """The record of the kind `begin` for a run of this process."""
    return Begin(run, merge, os.getpid(), started(os.getpid()), boot(), *_command())


def _command() -> tuple[tuple[str, ...], str]:
    """The command line and its folder, if the process is the program; else empty."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name == "fastinterp" or getattr(main, "name", "") == "fastinterp.__main__":
        with suppress(OSError):
            return ("fastinterp", *sys.argv[1:]), os.getcwd()
    return (), ""


def boot() -> str:
    """What the system calls its present boot; empty, if it does not say."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as stream:
        return stream.read().strip()
    return ""


def started(pid: int) -> int:
    """When a process began, in ticks since the boot; 0, if there is none of that number, or the system does not say."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/stat", "rb") as stream:
        return int(stream.read().rpartition(b")")[2].split()[19])
    return 0
