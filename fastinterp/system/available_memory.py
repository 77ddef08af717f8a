"""Available memory of the machine, within the limits of the control groups that this process is in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that can be allocated without swapping and without exceeding a control group limit (v1, v2).

    root  folder with proc/ and sys/
    """
    limits = [_of_machine(root), *(limit - used for limit, used in _groups(root))]
    return max(0, min(limits))


def _of_machine(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, usage) in bytes of this process's control group and its parents, if they have a limit."""
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
    """(limit, usage) of the group's folder and its parents up to `top`, which in a container may be the group."""
    folder = top / group.lstrip("/")
    for at in (folder, *folder.parents):
        with suppress(OSError, ValueError):  # no such file, or its content is `max`
            yield int((at / limit).read_text()), max(0, int((at / used).read_text()) - _reclaimable(at))
        if at == top:
            return


def _reclaimable(folder: Path) -> int:
    """Bytes of page cache that count as used but can be reclaimed. v1 counts child groups in total_*."""
    pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    stats = {name: int(value) for name, value in pairs}
    total = "total_" if "total_inactive_file" in stats else ""
    return stats.get(f"{total}inactive_file", 0) + stats.get(f"{total}active_file", 0)
