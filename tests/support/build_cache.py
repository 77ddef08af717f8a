"""Files that compilers make for the tests, kept in build/: made again when a source, the compiler or a flag changes."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

BUILD = Path(__file__).resolve().parents[2] / "build"


def key(compiler: Sequence[str], flags: Sequence[str], sources: Iterable[Path]) -> str:
    """16 hexadecimal digits of a compiler, its version, its flags, and the contents of all that it may read."""
    digest = hashlib.sha256(repr((compiler, _version(tuple(compiler)), flags)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _version(compiler: tuple[str, ...]) -> str:
    return run([*compiler, "--version"])


def made(target: Path, make: Callable[[Path], object]) -> Path:
    """`target`. If it does not exist, `make(path)` writes it under a temporary path, and one rename puts it there.

    Processes and threads may ask for the same file at once: one makes it, and the others wait.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f".{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            draft = target.with_name(f"draft-{target.name}")
            make(draft)
            draft.replace(target)
    return target


def run(command: Sequence[str]) -> str:
    """Run a program to its end. Returns its stdout and stderr.

    Raises: RuntimeError, with the command and all that it said, if its exit status is not 0.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
