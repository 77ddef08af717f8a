"""What a merge refuses, what stops it halfway, and what it warns of: nothing is lost, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fastinterp
from fastinterp.backends import cpu as pump_module
from fastinterp.errors import UsageError
from fastinterp.execute import rounds, sinks
from fastinterp.execute.sources import Sources
from fastinterp.ops.dtypes import BF16, F32, F64
from tests.support.checkpoints import (
    family,
    integers,
    recipe,
    saved,
    weights,
    write,
    write_sparse,
)
from tests.support.written import tree


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Two checkpoints of 2.6 MB that fit together."""
    for i, name in enumerate("ab"):
        write(tmp_path / name, {f"x{j}": weights(10 * i + j, BF16, (257, 1001)) for j in range(5)}, shards=2)
    return tmp_path / "a", tmp_path / "b"


@contextmanager
def nothing_lost(folder: Path) -> Iterator[None]:
    """Inside, nothing in `folder` changes, nothing new stays there, and every native thread that starts ends."""
    before, threads = tree(folder), native_threads()
    yield
    after = tree(folder)
    assert sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n)) == []
    assert native_threads() <= threads


def native_threads() -> set[int]:
    """All threads of this process but Python's own."""
    return {int(t) for t in os.listdir("/proc/self/task")} - {t.native_id for t in threading.enumerate() if t.native_id}


# --- checkpoints that do not fit -------------------------------------------------------------------------------------


def test_shapes_that_differ(tmp_path):
    models = family(2)
    models[1]["model.one"] = weights(1, F32, (2,))
    models[1]["model.scale"] = weights(1, BF16, (1,))
    a, b = saved(tmp_path, models)
    with nothing_lost(tmp_path), pytest.raises(fastinterp.ShapeError) as caught:
        fastinterp.merge(recipe("linear", [a, b], weights=[1, 1]), tmp_path / "out")
    assert str(caught.value) == (
        f"model.scale is [] in {a} but [1] in {b}, model.one is [1] in {a} but [2] in {b}. "
        f"Only tensors of the same shape merge: `missing: base` in the recipe (--missing base) takes those of {a}, "
        "`missing: skip` leaves them out"
    )


def test_tensor_sets_that_differ(tmp_path):
    models = family(3)
    del models[2]["model.one"]
    models[2]["model.two"] = weights(1, F32, (2,))
    paths = saved(tmp_path, models)
    with nothing_lost(tmp_path), pytest.raises(fastinterp.ShapeError) as caught:
        fastinterp.merge(recipe("linear", paths, weights=[1, 1, 1]), tmp_path / "out")
    assert str(caught.value) == (
        f"the models have different tensors: {paths[0]} alone has model.one; {paths[2]} alone has model.two. "
        f"`missing: base` in the recipe (--missing base) takes what not all have from {paths[0]} and leaves out what "
        "that lacks, `missing: skip` leaves out all of it, and `modules` merges parts of models"
    )


def test_an_integer_in_one_model_and_a_float_in_the_other(tmp_path):
    paths = saved(tmp_path, [{"x": integers([1], "I64")}, {"x": weights(0, F64, (1,))}])
    with nothing_lost(tmp_path), pytest.raises(fastinterp.ShapeError, match=r"x is I64 in .*a but F64 in .*b"):
        fastinterp.merge(recipe("linear", paths, weights=[1, 1]), tmp_path / "out")


def test_missing_shard(tmp_path, pair):
    (pair[1] / "model-00002-of-00002.safetensors").unlink()
    with nothing_lost(tmp_path), pytest.raises(fastinterp.CheckpointError, match="model-00002-of-00002"):
        fastinterp.interpolate(pair[0], pair[1], 0.5, tmp_path / "out")


# --- what happens while it runs --------------------------------------------------------------------------------------


def when_opened(monkeypatch, action: Callable[[], None]) -> None:
    """Run `action` once the inputs are open and before a byte of theirs is read."""
    init = Sources.__init__

    def opened(*args: Any, **more: Any) -> None:
        init(*args, **more)
        action()

    monkeypatch.setattr(Sources, "__init__", opened)


@pytest.mark.parametrize("read", ["pread", "mapped"])
@pytest.mark.parametrize("keep", [0, 5000, 1_000_000])
def test_input_that_is_cut_while_it_is_read(tmp_path, pair, monkeypatch, keep, read):
    """Ends in an error that names the file."""
    file = pair[1] / "model-00001-of-00002.safetensors"
    when_opened(monkeypatch, lambda: os.truncate(file, keep))
    with pytest.raises(fastinterp.CheckpointError) as caught:
        fastinterp.interpolate(pair[0], pair[1], 0.5, tmp_path / "out", threads=2, read=read)
    assert f"{file}: only " in str(caught.value) and "while it was being read" in str(caught.value)
    assert caught.value.file == str(file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("read", ["pread", "mapped"])
@pytest.mark.parametrize("how", ["replaced", "rewritten", "rewritten in secret", "removed"])
def test_input_that_changes_while_it_is_read(tmp_path, pair, monkeypatch, how, read):
    file = pair[0] / "model-00002-of-00002.safetensors"

    def change() -> None:
        if how == "rewritten":
            os.utime(file, ns=(0, 0))
        elif how == "rewritten in secret":  # in place, and its time is put back
            before = file.stat()
            with open(file, "r+b") as stream:
                stream.seek(-1, os.SEEK_END)
                stream.write(b"\x55")
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        elif how == "removed":
            file.unlink()
        else:
            (tmp_path / "new").write_bytes(file.read_bytes())
            os.replace(tmp_path / "new", file)

    when_opened(monkeypatch, change)
    with pytest.raises(fastinterp.CheckpointError) as caught:
        fastinterp.interpolate(pair[0], pair[1], 0.5, tmp_path / "out", threads=2, read=read)
    assert str(caught.value) == f"{file}: it changed while it was being read. Retry once nothing is writing to it"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("alphas", [0.5, [0.25, 0.5]], ids=["one", "two"])
def test_exception_in_the_progress_callback(tmp_path, pair, error, alphas):
    """Ctrl-C arrives like this too. The threads have ended and the folder is gone when it comes out."""
    with nothing_lost(tmp_path):
        calls = []

        def stop(done: int, total: int) -> None:
            calls.append((done, total))
            raise error("enough")

        with pytest.raises(error, match="enough"):
            fastinterp.interpolate(pair[0], pair[1], alphas, tmp_path / "out" / "deep", progress=stop)
        assert len(calls) == 1 and 0 <= calls[0][0] <= calls[0][1]


def test_interruption_in_the_middle(tmp_path, monkeypatch):
    """The pump is stopped with most of its work undone."""
    for name in "ab":
        write_sparse(tmp_path / name / "model.safetensors", {f"x{i}": (1 << 24,) for i in range(16)}, F32)
    before = sorted(str(p) for p in tmp_path.rglob("*"))

    pumps = []
    watch = pump_module.watch

    def watched(pump: Any, *rest: Any) -> None:
        pumps.append(pump)
        watch(pump, *rest)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "watch", watched)
    with pytest.raises(KeyboardInterrupt):
        fastinterp.interpolate(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "out", progress=stop, threads=2)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    assert pumps[0].wait(0) and pumps[0].error() is None
    assert pumps[0].bytes_written < 1 << 29  # of 2^30


def test_header_is_written_whole_where_the_system_takes_a_part_at_a_time(tmp_path, pair, monkeypatch):
    fastinterp.interpolate(pair[0], pair[1], 0.5, tmp_path / "whole")
    pwrite, sizes = os.pwrite, []

    def short(fd: int, data: bytes, offset: int) -> int:
        sizes.append(len(data))
        return pwrite(fd, data[:1000], offset)

    monkeypatch.setattr(os, "pwrite", short)
    fastinterp.interpolate(pair[0], pair[1], 0.5, tmp_path / "parts")
    assert sizes == [4096, 3096, 2096, 1096, 96]
    assert tree(tmp_path / "whole") == tree(tmp_path / "parts")


FEW_FILES = """
    import resource, sys, fastinterp
    a, b, out, shard, *alphas = sys.argv[1:]
    soft, hard = 128, int(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    if shard == "none":
        hard = 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard), hard))
    try:
        if out == "-":
            print(len(fastinterp.compare(a, b).tensors))
        else:
            print(sum(len(r.files) for r in fastinterp.interpolate(a, b, range(16), out, max_shard_size=1)))
    except fastinterp.StorageError as error:
        print(error)
"""


def test_many_files_at_a_time(tmp_path):
    """More inputs, or more outputs, than the soft limit on open files allows: it is raised to the hard one."""
    for name in "ab":
        write(tmp_path / name, {f"x{j}": weights(j, BF16, (3,)) for j in range(100)}, shards=100)
        write(tmp_path / f"few_{name}", {f"x{j}": weights(j, BF16, (3,)) for j in range(10)})
    many, few = ([tmp_path / f"{kind}{name}" for name in "ab"] for kind in ("", "few_"))
    done = [
        run_python(FEW_FILES, *few, tmp_path / "out", "tiny"),  # 2 files in, 160 out
        run_python(FEW_FILES, *many, "-", "tiny"),  # 200 files in
        run_python(FEW_FILES, *many, "-", "none"),
    ]
    assert [(d.returncode, d.stderr) for d in done] == [(0, "")] * 3
    assert [d.stdout for d in done[:2]] == ["160\n", "100\n"]
    assert re.fullmatch(
        r".*safetensors: Too many open files\. Allow more open files \(ulimit -n\), .*\n", done[2].stdout
    )


def test_progress_ends_at_the_total(tmp_path, pair):
    seen: list[tuple[int, int]] = []
    (report,) = fastinterp.interpolate(pair[0], pair[1], 0.5, tmp_path / "out", progress=lambda *now: seen.append(now))
    assert seen[-1] == (report.bytes_read + report.bytes_written,) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# --- no room -------------------------------------------------------------------------------------------------------


def run_python(program: str, *args: object) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60, check=False)


def test_file_size_limit(tmp_path, pair):
    """Shows when the space is reserved, before any work is done."""
    with nothing_lost(tmp_path):
        program = """
            import resource, sys, fastinterp
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            try:
                size = sys.argv[4] if sys.argv[4:] else None
                fastinterp.interpolate(
                    *sys.argv[1:3], 0.5, sys.argv[3], max_shard_size=size, progress=lambda *_: print("worked")
                )
            except fastinterp.OutputError as error:
                print(error)
        """
        done = run_python(program, *pair, tmp_path / "out")
        assert (done.returncode, done.stderr) == (0, "")
        file = tmp_path / "out" / "model.safetensors"
        assert done.stdout.startswith(f"{file}: {os.strerror(errno.EFBIG)}. ulimit -f allows files of 1048576 bytes: ")
        assert "worked" not in done.stdout
    (size,) = re.findall(r"--max-shard-size (\d+),", done.stdout)
    done = run_python(program, *pair, tmp_path / "out", size)
    assert (done.returncode, done.stderr) == (0, "") and "worked" in done.stdout
    assert len([*(tmp_path / "out").glob("*.safetensors")]) > 1


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A tmpfs of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system can be mounted by root only, outside containers")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(pair, small_disk):
    with pytest.raises(fastinterp.OutputError) as caught:
        fastinterp.interpolate(pair[0], pair[1], 0.5, small_disk / "out")
    assert "not enough space: the output takes 25" in str(caught.value)
    assert list(small_disk.iterdir()) == []


def test_disk_that_fills_up_meanwhile(pair, small_disk, monkeypatch):
    """Somebody else takes the room after it was found to be enough."""
    monkeypatch.setattr("fastinterp.output.refusals.about_space", lambda *_: "")
    with pytest.raises(fastinterp.OutputError, match=os.strerror(errno.ENOSPC)):
        fastinterp.interpolate(pair[0], pair[1], 0.5, small_disk / "out")
    assert list(small_disk.iterdir()) == []
    # And where space cannot be reserved, so that a write of the pump is what fails.
    monkeypatch.setattr(sinks, "reserve", lambda fd, size: None)
    with pytest.raises(fastinterp.OutputError, match=f"{os.strerror(errno.ENOSPC)}, writing .*Free some space"):
        fastinterp.interpolate(pair[0], pair[1], 0.5, small_disk / "out")
    assert list(small_disk.iterdir()) == []


# --- arguments -------------------------------------------------------------------------------------------------------


def test_unknown_instruction_set(tmp_path, pair, monkeypatch):
    with nothing_lost(tmp_path):
        monkeypatch.setenv("FASTINTERP_ISA", "nonsense")
        with pytest.raises(fastinterp.BackendError, match="FASTINTERP_ISA=nonsense, but this build has no such"):
            fastinterp.interpolate(pair[0], pair[1], 0.5, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory": "20KB", "threads": 2}, "2 threads with 2 inputs and 1 output need at least 49152 bytes"),
        ({"threads": 0}, "the number of threads must be a whole number in 1..1024, got 0"),
        ({"threads": 5000}, "the number of threads must be a whole number in 1..1024, got 5000"),
        ({"threads": "2"}, "the number of threads must be a whole number in 1..1024, got '2'"),
        ({"device": "cuda"}, "device 'cuda' cannot be used"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"rounding": "up"}, "rounding must be nearest or stochastic, got 'up'"),
        ({"seed": -1}, "the seed must be in"),
        ({"seed": "1"}, "the seed must be a whole number, got '1'"),
        ({"dtype": 3}, "unknown dtype 3"),
        ({"alphas": "0.5"}, "alpha must be a number, or several in a list, got '0.5'"),
        ({"alphas": 10**400}, "alpha must be a number"),
        ({"alphas": True}, "alpha must be a number, or several in a list, got True"),
        ({"base": 1}, "`base` must be a path, got 1"),
        ({"integers": 1}, "`integers` must be a path, got 1"),
        ({"integers": "c"}, "`integers` must be one of the checkpoints that are read, got 'c'"),
        ({"max_shard_size": "many"}, "`many` is not a size"),
        ({"alphas": []}, "at least one alpha is needed"),
        ({"alphas": [0.5, 0.5]}, "alphas must be different, but alpha_0.5 is repeated"),
        ({"alphas": [0.1, 0.1 + 1e-15]}, "alphas must be different"),  # the same name of a folder
        ({"alphas": [0.5, float("nan")]}, "alpha must be a finite number, got nan"),
        ({"alphas": 1e30}, "alpha must be in -4.0e+07..4.0e+07, got 1e+30"),
        ({"alphas": 1e300, "base": "base"}, "alpha must be in -3.4e+38..3.4e+38, got 1e+300"),
        ({"alphas": [i / 16 for i in range(4097)]}, "at most 4096 alphas are possible, got 4097"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, pair, options, message):
    with nothing_lost(tmp_path):
        with pytest.raises(fastinterp.UsageError) as caught:
            fastinterp.interpolate(pair[0], pair[1], options.pop("alphas", 0.5), tmp_path / "out", **options)
        assert message in str(caught.value)


def test_one_alpha_by_its_own_name(tmp_path, pair):
    """`alpha` or `alphas`, as the command takes both; not both, nor none."""
    a, b = pair
    fastinterp.interpolate(a, b, [0.3], tmp_path / "x")
    fastinterp.interpolate(a, b, alpha=0.3, out=tmp_path / "y")
    fastinterp.interpolate(a, b, alphas=0.3, out=tmp_path / "z")
    x, y, z = ((tmp_path / name / "model.safetensors").read_bytes() for name in "xyz")
    assert x == y == z
    wrong: tuple[dict[str, Any], ...] = ({"out": "o"}, {"alpha": 0.3, "alphas": 0.3, "out": "o"})
    for more in wrong:
        with pytest.raises(UsageError, match="one of `alphas` and `alpha` is needed: interpolate"):
            fastinterp.interpolate(a, b, **more)
    with pytest.raises(UsageError, match="`out` must be a path, got None"):
        fastinterp.interpolate(a, b, alpha=0.3)


def test_remedies_name_the_argument_too(tmp_path, pair):
    a, b = pair
    with pytest.raises(UsageError, match=r"Allow more \(in Python max_memory=\.\.\.\)"):
        fastinterp.interpolate(a, b, 0.3, tmp_path / "x", max_memory=1000)
    with pytest.raises(UsageError, match=r"\(in Python stream=True, device='cuda'\)\. Leave one of the two out"):
        fastinterp.interpolate(a, b, 0.3, tmp_path / "x", stream=True, device="cuda")


def test_paths_that_are_none(tmp_path, pair):
    nothing: Any = None
    for call in (
        lambda: fastinterp.interpolate(nothing, pair[1], 0.5, tmp_path / "out"),
        lambda: fastinterp.interpolate(pair[0], pair[1], 0.5, nothing),
        lambda: fastinterp.merge(recipe("linear", pair, weights=[1, 1]), nothing),
        lambda: fastinterp.compare(pair[0], nothing),
    ):
        with pytest.raises(fastinterp.UsageError, match="path, got None"):
            call()


def test_an_output_without_a_name_is_refused(tmp_path, pair, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = pair
    for alphas in ([0.5], [0.25, 0.5]):
        with nothing_lost(tmp_path), pytest.raises(fastinterp.UsageError, match="name of the output folder is empty"):
            fastinterp.interpolate(a, b, alphas, "")
