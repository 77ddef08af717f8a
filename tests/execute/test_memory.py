"""Anonymous memory of a merge: bounded, and the same for small and large models."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fastinterp.ops.dtypes import BF16
from tests.support.checkpoints import write_sparse

MIB = 1 << 20

# Prints RssAnon before the merge and its peak, in KiB. The kernel keeps no peak of it, so it is read every millisecond;
# the scratch lives as long as the merge.
PROGRAM = """
    import sys, threading, time
    import fastinterp
    from fastinterp import merge

    def anonymous():
        with open("/proc/self/status") as stream:
            return next(int(line.split()[1]) for line in stream if line.startswith("RssAnon"))

    seen, over = [anonymous()], threading.Event()
    def watch():
        while not over.wait(0.001):
            seen.append(anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    models = [{"model": path} for path in sys.argv[1:3]]
    merge({"merge_method": "linear", "models": models, "parameters": {"weight": 1}}, sys.argv[3], threads=2)
    over.set()
    watcher.join()
    print(seen[0], max(seen), len(seen))
"""


def peak_over_idle(folder: Path, nbytes: int, tensors: int) -> int:
    """Bytes of anonymous memory that a merge of two models of `nbytes` takes beyond the idle interpreter."""
    shapes = {f"model.layers.{i}.weight": (1024, nbytes // 2 // 1024 // tensors) for i in range(tensors)}
    paths = [write_sparse(folder / name / "model.safetensors", shapes, BF16) for name in "ab"]
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), *map(str, paths), str(folder / "out")]
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert (folder / "out" / "model.safetensors").stat().st_size > nbytes * 0.99
    finally:
        shutil.rmtree(folder)
    idle, peak, samples = map(int, done.stdout.split())
    assert samples > 10
    return (peak - idle) * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is in Linux's /proc")
def test_memory_does_not_grow_with_the_models(tmp_path):
    """At most 40 MiB over an idle interpreter, and as much for 8 tensors in 50 MB as for 300 in 300 MB.

    Scratch and plan take 1 MiB or so; the rest is room for what Python and the allocator keep.
    """
    small = peak_over_idle(tmp_path / "small", 50 * 10**6, 8)
    large = peak_over_idle(tmp_path / "large", 300 * 10**6, 300)
    assert large <= 40 * MIB
    assert abs(large - small) <= 16 * MIB
