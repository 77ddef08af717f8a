"""How much memory can be had: by the machine, and by the control groups that this process is in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that can be had without swapping, and before a limit of a control group (v1, v2) ends the process.

    root  under which proc/ and sys/ are
    """
    found = [_of_machine(root), *(limit - used for limit, used in _groups(root))]
    return max(0, min(found))


def _of_machine(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of this process's group and of all groups around it, as far as they have a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            yield from _up(root / "sys/fs/cgroup", group, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            yield from _up(root / "sys/fs/cgroup/memory", group, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _up(top: Path, group: str, limit: str, used: str) -> Iterator[tuple[int, int]]:
    """In a container, the group's own folder may be what is mounted as `top`: then the path leads nowhere."""
    folder = top / group.lstrip("/")
    for at in (folder, *folder.parents):
        with suppress(OSError, ValueError):  # there is no such file, or it says `max`
            yield int((at / limit).read_text()), max(0, int((at / used).read_text()) - _droppable(at))
        if at == top:
            return


def _droppable(folder: Path) -> int:
    """Bytes of files that are counted as used, but make room when they must. v1 counts the groups below in total_*."""
    pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    found = {name: int(value) for name, value in pairs}
    total = "total_" if "total_inactive_file" in found else ""
    return found.get(f"{total}inactive_file", 0) + found.get(f"{total}active_file", 0)
