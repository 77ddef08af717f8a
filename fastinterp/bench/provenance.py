"""The provenance of a measurement: commit, machine and versions."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastinterp._version import __version__
from fastinterp.backends.registry import cpu_isa, cpu_threads


def provenance(folder: Path | None = None) -> dict[str, Any]:
    """Commit, machine and versions as plain values; with `folder`, the one measured in, also its file system.

    memory_bytes is the machine's; commit is None outside a git checkout of fastinterp.
    """
    values = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fastinterp": __version__,
        "commit": commit(),
        "isa": cpu_isa(),
        "threads": cpu_threads(),
        "cpu": _first("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": 1024 * int((_first("/proc/meminfo", "MemTotal") or "0").split()[0]),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    return values if folder is None else values | {"file_system": file_system(folder)}


def commit() -> str | None:
    """The commit of the git checkout with this package, and `+` if files are modified; None outside of a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # or the commit may be that of another project
        return None
    try:
        commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        head, changed = (
            subprocess.run(["git", "-C", root, *c], capture_output=True, text=True, check=True).stdout.strip()
            for c in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def file_system(folder: Path) -> str:
    """The type of file system that `folder` is on: `ext4`, `xfs`, `tmpfs`, `nfs4`, ..., or `unknown`."""
    real = folder.resolve()
    best, kind = -1, "unknown"
    try:
        mounts = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    except OSError:
        return kind
    for line in mounts:
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].encode().decode("unicode_escape")
        if real.is_relative_to(point) and len(point) >= best:  # of several on one mount point, the last is visible
            best, kind = len(point), rest.split()[0]
    return kind


def _first(file: str, key: str) -> str | None:
    """The value of the first `key : value` line."""
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
