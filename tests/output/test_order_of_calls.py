"""The order of the system calls of a whole merge, the pump's included, as a preloaded library sees them.

What a crash of the machine may leave follows from it: a file that has its header has had all of its data written
before; a name that is on the disk has its data there, if the run syncs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.faults import Call, calls, environment
from tests.support.models import layers, save

ROOT = Path(__file__).resolve().parents[2]
CHANGES = ("open", "write", "pwrite", "ftruncate", "fallocate", "fsync", "rename", "unlink")


def traced(folder: Path, *options: str) -> list[Call]:
    """The calls of a merge into `folder/out` that change files there, or sync them."""
    trace = folder / "trace"
    trace.unlink(missing_ok=True)
    env = environment("", [folder / "out"], trace)
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "fastinterp", "interpolate", "a", "b", "--alpha", "0.5", "-o", "out"]
    command += ["--max-shard-size", "100", *options]
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
    return [call for call in calls(trace) if call.name in CHANGES]


@pytest.fixture
def place(tmp_path) -> Path:
    for name, noise in (("a", 0.1), ("b", 0.2)):
        save(tmp_path / name, layers(1, count=4, noise=noise))
    return tmp_path


def last(found: list[Call], name: str, ending: str) -> int:
    """The place of the last call `name` on a file whose path ends so."""
    return max(i for i, call in enumerate(found) if call.name == name and call.path.endswith(ending))


def commit_point(found: list[Call]) -> int:
    """The place of the journal's last record before the first name is given."""
    first = min(i for i, call in enumerate(found) if call.name == "rename")
    return max(i for i, c in enumerate(found[:first]) if c.name == "write" and "fastinterp-journal" in c.path)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--durable"], ["--force"]], ids=["default", "durable", "force"])
def test_order_of_calls(place, options):
    if options == ["--force"]:
        traced(place)
    found = traced(place, *options)
    renamed = {c.path: i for i, c in enumerate(found) if c.name == "rename" and ".partial-" in c.path}
    weights = [path for path in renamed if ".safetensors.partial-" in path]
    commit = commit_point(found)
    assert len(weights) > 2 and len(renamed) >= len(weights) + 4
    for path, named in renamed.items():
        writes = [i for i, c in enumerate(found) if c.path == path and c.name in ("write", "pwrite", "ftruncate")]
        assert max(writes) < commit < named
        if path in weights:  # space first, data, then the header
            offsets = [int(found[i].more.split()[0]) for i in writes if found[i].name == "pwrite"]
            assert offsets[-1] == 0 and 0 not in offsets[:-1] and len(offsets) > 1
            assert last(found, "fallocate", path) < min(i for i in writes if found[i].name == "pwrite")
    synced = [c for c in found if c.name == "fsync"]
    if not options:
        assert not synced
        return
    out = os.fspath(place / "out")
    for path in renamed:
        assert last(found, "fsync", path) > max(
            i for i, c in enumerate(found) if c.path == path and c.name in ("write", "pwrite", "ftruncate")
        )
        assert last(found, "fsync", path) < commit
    before = [i for i, c in enumerate(found) if c.name == "fsync" and c.path == out]
    assert any(max(last(found, "fsync", path) for path in renamed) < i < commit for i in before)
    journal = [i for i, c in enumerate(found) if c.name == "fsync" and c.path.endswith(".fastinterp-journal")]
    assert any(commit < i < min(renamed.values()) for i in journal)
    removed = [i for i, c in enumerate(found) if c.name == "unlink"]
    assert any(max(renamed.values()) < i < min(removed) for i in before)
    assert before[-1] > removed[-1] and found[removed[-1]].path.endswith(".fastinterp-journal")
    aside = [i for i, c in enumerate(found) if c.name == "rename" and ".old-" in c.more]
    assert bool(aside) == (options == ["--force"]) and all(commit < i < min(renamed.values()) for i in aside)
