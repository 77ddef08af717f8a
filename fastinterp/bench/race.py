"""Runs commands in turn, each in a process of its own, and measures wall time, CPU time and memory."""

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
from fastinterp.errors import CheckpointError, FastinterpError, StorageError, UsageError

_TICK_S = 0.005  # between two measurements of the memory
_SHOWN = 2000  # characters of the output of a failed command, the last ones


@dataclass
class Racer:
    """One of the programs compared. Its command creates the folder `out`, which does not exist when it starts."""

    name: str
    command: Sequence[str]
    check: Callable[[], int]  # returns the number of elements compared; raises if the output is wrong
    version: str | None = None
    checked: int = 0
    peak_anon_bytes: int = 0  # of the process tree, in the first run, which is not timed
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)  # user and system time of the process and its children

    def as_dict(self, pacer: Racer) -> dict[str, Any]:
        """Plain values. `ratio`: the time of `pacer` divided by that of this one, in each round."""
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
    """Run every racer once to check its output and measure its memory, then `runs` rounds of all in turn. The results
    are stored in the racers.

    inputs   files that are read into the page cache before every run, or with `cold` dropped from it
    work     a folder with recipes only; outputs are written to `work/out`, and removed
    Returns the smallest and the largest fraction of the inputs in the page cache before a run; None if it is unknown.
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
                checked = f", {racer.checked:,} elements checked" if racer.checked else ""
                say(f"first round, not timed: {racer.name} {wall_s:.2f} s{checked}")
            else:
                racer.wall_s.append(wall_s)
                racer.cpu_s.append(cpu_s)
                say(f"round {turn} of {runs}: {racer.name} {wall_s:.2f} s")
            shutil.rmtree(out)
            os.sync()  # or it is written to the disk during the run of the next
    known = [part for part in cached if part is not None]
    return (min(known), max(known)) if known else None


def _prepare(inputs: Sequence[Path], cold: bool) -> float | None:
    """Read all inputs into the page cache, or drop them from it. Returns the fraction of the bytes that is then in it;
    None if it is unknown, as for files that the user may not write.
    """
    cached = total = 0.0
    known = True
    for path in inputs:
        fd = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            if cold:
                os.fsync(fd)  # dirty pages cannot be dropped
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while os.read(fd, 1 << 22):
                    pass
            part = cached_fraction(fd, size)
            known &= part >= 0
            cached += part * size
            total += size
        finally:
            os.close(fd)
    if not known:
        return None
    if cold and cached > 0.05 * total:
        raise UsageError(
            f"{cached / total:.0%} of the inputs stay in the page cache, so --cold cannot be measured here: their file "
            "system keeps them in memory (tmpfs), or another process has them mapped"
        )
    return cached / total


def _run(racer: Racer, log: Path, watch: bool) -> tuple[float, float, int]:
    """Run the command: wall and CPU seconds, and with `watch` the peak anonymous memory in bytes."""
    peak = 0
    with open(log, "wb") as output:
        start = time.perf_counter()
        # In a session of its own, whose processes can be ended together.
        child = subprocess.Popen(
            racer.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
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
        raise _failed(racer, child.returncode, log.read_text("utf-8", "replace")[-_SHOWN:])
    return wall_s, usage.ru_utime + usage.ru_stime, peak


def _failed(racer: Racer, code: int, output: str) -> FastinterpError:
    """The error of a program that failed, with the last line of its output. That of fastinterp has its exit code."""
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "it said nothing")
    what = f"{racer.name} failed (exit {code}): {last}"
    if racer.name != "fastinterp":
        return UsageError(
            f"{what}. Mend that, or leave {racer.name} out of --against, or choose with --python another Python"
        )
    error = StorageError(what)
    if code in (UsageError.exit_code, CheckpointError.exit_code):
        error.exit_code = code
    return error


def _anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process and its descendants now."""
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
