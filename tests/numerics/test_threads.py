"""Where the system allows no more threads, the work goes on with those that run."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from tests.support.models import layers, save

LIMITED = """
    import resource, sys
    import numpy as np
    import fastinterp
    from pathlib import Path

    x = np.ones(200 << 14, np.float32)  # more than twelve ranges of 16 chunks
    a, b, out = sys.argv[1:]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    room = used + 12 * (64 << 20) + (48 << 20)  # addresses for twelve stacks, and for what else the threads need
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
"""


@pytest.mark.parametrize(
    "job",
    [
        "assert (fastinterp.weighted_sum([x, x], [0.5, 0.5], threads=200) == 1).all()",
        "assert fastinterp.interpolate(a, b, 0.5, out, threads=64)[0].files",
    ],
    ids=["arrays", "files"],
)
def test_fewer_threads_than_asked_for(tmp_path, job):
    a, b = save(tmp_path / "a", layers(1)), save(tmp_path / "b", layers(2))
    program = textwrap.dedent(LIMITED) + job
    command = [sys.executable, "-c", program, str(a), str(b), str(tmp_path / "out")]
    # Large stacks and one heap: what threads of the usual stacks, or heaps of their own, leave to others is a matter of
    # luck, and the C library ends the process where a thread's own variables do not fit.
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    limits: dict[str, Any] = {
        "env": {**os.environ, "MALLOC_ARENA_MAX": "1"},
        "preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_STACK, (64 << 20, hard)),
    }
    done = subprocess.run(command, **limits, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
