"""What tests start and compile: processes that end, and files that are made once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import build_cache
from tests.support.processes import interruptible, started

SLEEPS = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]


@pytest.fixture
def in_the_background():
    """SIGINT is ignored, as a shell has it for commands that it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_ends_what_was_started_in_the_background(in_the_background):
    with started(SLEEPS, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == "\n"
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]
    with interruptible(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_process_is_killed_at_its_limit_and_at_the_end_of_the_block():
    with started(SLEEPS, limit_s=0.1, stdout=subprocess.PIPE) as process:
        process.communicate(timeout=20)
        assert process.returncode == -signal.SIGKILL
    with started(SLEEPS, stdout=subprocess.PIPE) as process:
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL


def test_file_is_made_once_and_not_at_all_by_a_failure(tmp_path):
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        time.sleep(0.05)
        path.write_text("done")

    target = tmp_path / "folder" / "x.o"
    with pytest.raises(RuntimeError, match="exit"):
        build_cache.made(target, lambda path: build_cache.run([sys.executable, "-c", "exit(1)"]))
    with ThreadPoolExecutor(4) as pool:
        assert {path.read_text() for path in pool.map(lambda _: build_cache.made(target, make), range(4))} == {"done"}
    assert len(made) == 1 and made[0].parent == target.parent and not made[0].exists()


def test_key_depends_on_flags_and_sources(tmp_path):
    source = tmp_path / "x.cpp"
    keys = set()
    for flags, text in (["-O1"], "a"), (["-O2"], "a"), (["-O2"], "b"):
        source.write_text(text)
        keys.add(build_cache.key([sys.executable], flags, [source]))
    assert len(keys) == 3 and keys == {key for key in keys if len(key) == 16}
