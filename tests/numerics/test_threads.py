"""Where the system allows no more threads, the work goes on with those that run."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

LIMITED = """
    import resource, sys
    import numpy as np
    import fastinterp
    from pathlib import Path

    x = np.ones(200 << 14, np.float32)  # more than twelve ranges of 16 chunks
    a, b, out = sys.argv[1:]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    room = used + (96 << 20)  # a thread's stack takes 8 MiB of addresses
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
    from tests.support.models import layers, save

    a, b = save(tmp_path / "a", layers(1)), save(tmp_path / "b", layers(2))
    program = textwrap.dedent(LIMITED) + job
    command = [sys.executable, "-c", program, str(a), str(b), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
