"""Runs whole commands in turn, each in processes of its own, and measures them from start to end."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastinterp.backends.cpu import cached_fraction
from fastinterp.errors import FastinterpError, UsageError

_TICK_S = 0.005  # between two looks at the memory
_SHOWN = 2000  # characters of what a failed command said last


@dataclass
class Racer:
    """One competitor. Its command makes the folder `out`, which does not exist when it starts."""

    name: str
    command: Sequence[str]
    check: Callable[[], int]  # raises if the output is wrong; the number of elements that were compared
    version: str | None = None
    checked: int = 0
    peak_anon_bytes: int = 0  # of the process tree, in the first run, which is not timed: looking takes time
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)  # user and system, of the process and those that it waited for

    def as_dict(self, pacer: Racer) -> dict[str, Any]:
        """Plain values. `ratio`: how much of this one's time `pacer` took, in each round."""
        ratios = [mine / other for mine, other in zip(pacer.wall_s, self.wall_s, strict=True)]
        return {
            "version": self.version,
            "checked_elements": self.checked,
            "peak_anon_bytes": self.peak_anon_bytes,
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s,
            "median_wall_s": statistics.median(self.wall_s),
            "median_cpu_s": statistics.median(self.cpu_s),
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        }


def race(
    racers: Sequence[Racer],
    inputs: Sequence[Path],
    work: Path,
    *,
    runs: int,
    cold: bool,
    say: Callable[[str], None],
) -> tuple[float, float] | None:
    """Run every racer once to check its answer and its memory, then `runs` rounds of all in turn. Fills in the racers.

    inputs   the files whose place in the page cache is set before every run: all of them in it, or with `cold` none
    work     a folder that is empty but for recipes; `work/out` is where outputs appear, and are removed
    Returns the smallest and the largest part of the inputs that was in the page cache before a run; None, if the system
    does not tell.
    Raises: FastinterpError, if a command fails; WrongAnswerError; UsageError, if the page cache cannot be emptied.
    """
    out, log = work / "out", work / "log"
    cached: list[float | None] = []
    for turn in range(runs + 1):
        for racer in racers:
            cached.append(_prepare(inputs, cold))
            wall_s, cpu_s, peak = _run(racer, log, watch=turn == 0)
            if turn == 0:
                racer.peak_anon_bytes, racer.checked = peak, racer.check()
                checked = f", right in {racer.checked:,} elements" if racer.checked else ""
                say(f"first round, not timed: {racer.name} {wall_s:.2f} s{checked}")
            else:
                racer.wall_s.append(wall_s)
                racer.cpu_s.append(cpu_s)
                say(f"round {turn} of {runs}: {racer.name} {wall_s:.2f} s")
            shutil.rmtree(out)
            os.sync()  # what one racer wrote must not be written out during another's turn
    known = [part for part in cached if part is not None]
    return (min(known), max(known)) if known else None


def _prepare(inputs: Sequence[Path], cold: bool) -> float | None:
    """Read all inputs into the page cache, or drop them from it. Returns which part of the bytes is in it then.

    None, if the system does not tell: it answers only those who may write the files.
    """
    held = total = 0.0
    known = True
    for path in inputs:
        fd = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            if cold:
                os.fsync(fd)  # pages that wait to be written cannot be dropped
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while os.read(fd, 1 << 22):
                    pass
            part = cached_fraction(fd, size)
            known &= part >= 0
            held += part * size
            total += size
        finally:
            os.close(fd)
    if not known:
        return None
    if cold and held > 0.05 * total:
        raise UsageError(
            f"{held / total:.0%} of the inputs stay in the page cache, so --cold cannot be measured here: their file "
            "system keeps them in memory (tmpfs), or another process has them mapped"
        )
    return held / total


def _run(racer: Racer, log: Path, watch: bool) -> tuple[float, float, int]:
    """Wall and CPU seconds, and with `watch` the peak anonymous memory in bytes. Leaves no process behind."""
    peak = 0
    with open(log, "wb") as said:
        start = time.perf_counter()
        # A session of its own, so that all of it can be ended at once.
        child = subprocess.Popen(
            racer.command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        try:
            pid = 0
            while watch and not pid:
                peak = max(peak, _anonymous(child.pid))
                time.sleep(_TICK_S)
                pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if not pid:
                pid, status, usage = os.wait4(child.pid, 0)
            wall_s = time.perf_counter() - start
            child.returncode = os.waitstatus_to_exitcode(status)  # or Popen waits for a process that is gone
        finally:
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if child.returncode:
        tail = log.read_text("utf-8", "replace")[-_SHOWN:].strip()
        raise FastinterpError(f"{racer.name} failed (exit {child.returncode}): {' '.join(racer.command)[:200]}\n{tail}")
    return wall_s, usage.ru_utime + usage.ru_stime, peak


def _anonymous(pid: int) -> int:
    """Bytes of anonymous memory that a process and its descendants hold now."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
            if line.startswith("RssAnon"):
                total = 1024 * int(line.split()[1])
        for task in os.listdir(f"/proc/{pid}/task"):
            total += sum(map(_anonymous, map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())))
    except OSError:
        pass  # it has ended meanwhile
    return total
