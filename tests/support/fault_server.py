"""Runs the program `fastinterp` many times with faults, from one process that has imported it: 30 ms a run, not 300.

The process is started with the library of faults.c preloaded and forks for every run; the fault begins in the child.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """How a run ended. code: exit code, or minus the signal; -14 (SIGALRM) if it took too long."""

    code: int
    out: str
    err: str


class FaultServer:
    """Context manager: the process.

    modules  imported before it forks, beside those of the command line
    """

    def __init__(self, modules: Sequence[str] = (), limit_s: int = 20):
        self._modules, self._limit_s = list(modules), limit_s

    def __enter__(self) -> FaultServer:
        from tests.support.faults import library

        env = {**os.environ, "LD_PRELOAD": str(library()), "FAULTS": "", "FAULTS_UNDER": "/nowhere"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fault_server", str(self._limit_s), *self._modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def run(
        self, args: Sequence[object], rules: str = "", under: Sequence[object] = (), trace: Path | None = None
    ) -> Run:
        """`fastinterp ARGS`, with the rules of faults.c for files below `under`."""
        env = {
            "FAULTS": rules,
            "FAULTS_UNDER": ":".join(map(str, under)),
            "FAULTS_TRACE": str(trace) if trace else None,
        }
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"args": list(map(str, args)), "env": env}) + "\n")
        self._process.stdin.flush()
        return Run(**json.loads(self._process.stdout.readline()))


def _serve(limit_s: int) -> None:
    """A line of stdin is a run; a line of stdout says how it ended."""
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                _run(asked, limit_s, out.fileno(), err.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = [os.pread(f.fileno(), 1 << 24, 0).decode(errors="surrogateescape") for f in (out, err)]
        sys.stdout.write(json.dumps({"code": code, "out": texts[0], "err": texts[1]}) + "\n")
        sys.stdout.flush()


def _run(asked: dict[str, object], limit_s: int, out: int, err: int) -> None:
    """In the child: never returns. The interpreter ends as it does after a command, with its buffers written."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(limit_s)
    sys.argv = ["fastinterp", *asked["args"]]  # type: ignore[misc]  # a list of str
    for name, value in asked["env"].items():  # type: ignore[attr-defined]  # str -> str or None
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    from fastinterp.__main__ import main

    main()
    sys.exit(0)


if __name__ == "__main__":
    import importlib

    for name in sys.argv[2:]:
        importlib.import_module(name)
    _serve(int(sys.argv[1]))
