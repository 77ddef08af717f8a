"""Inputs that are mapped: the same bytes and errors as with `pread`, while SIGBUS of others is left to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastinterp
from benchmarks.methods import CASES, recipe, write_sidecars
from fastinterp.backends.cpu import MappedFile, Pump, PumpOptions
from fastinterp.execute import rounds, sources
from fastinterp.execute.reading import may_map, reading_device
from fastinterp.ops.combine import Combine, Row
from fastinterp.ops.dtypes import BF16, F16, F32, F64
from fastinterp.ops.operands import Decoder, Stored
from fastinterp.ops.steps import Combine as CombineStep
from fastinterp.ops.steps import Measure
from tests.support import codes, quantised_models
from tests.support.backends import usable
from tests.support.checkpoints import Tensor, integers, moved, weights, write, write_sparse
from tests.support.written import tree

ROOT = Path(__file__).resolve().parents[2]
READS = ("pread", "mapped")
ROW = Combine((0.3, 0.7), sums_to_one=True).row()


def same(tmp_path: Path, run: Callable[[str, Path], Any]) -> None:
    """`run(read, out)` writes the same files, whichever way inputs are read."""
    for read in READS:
        run(read, tmp_path / "outs" / read)
    assert tree(tmp_path / "outs" / "mapped") == tree(tmp_path / "outs" / "pread") != {}


def odd_model(seed: int) -> dict[str, Tensor]:
    """Many small tensors and empty ones, behind three bytes, so that no data is aligned to its elements."""
    model = {"a": integers([1, 2, 3], "U8")}
    model |= {f"b{i}": weights(seed + i, (BF16, F16, F32, F64)[i % 4], (i % 7, 3)) for i in range(100)}
    return model | {"c": weights(seed + 300, BF16, (700, 1003)), "d": weights(seed + 301, BF16, (0, 4))}


# --- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_small_tensors_at_odd_bytes(tmp_path, threads):
    """Two shards, headers of odd lengths."""
    a, b = (write(tmp_path / "ab"[i], odd_model(1000 * i), shards=2, skew=i + 1) for i in range(2))
    same(tmp_path, lambda read, out: fastinterp.interpolate(a, b, [0.3, 1.0], out, read=read, threads=threads))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, ft1, ft2 for every method, with importances."""
    folder = tmp_path_factory.mktemp("models")
    base = {f"model.layers.{i}.mlp.weight": weights(i, BF16, (65, 517)) for i in range(3)}
    write(folder / "base", base, skew=1)
    for k, name in enumerate(("ft1", "ft2")):
        write(folder / name, {n: moved(t, 10 * k + i) for i, (n, t) in enumerate(base.items())}, skew=1)
    write_sidecars(CASES["fisher"], folder)
    return folder


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_method(tmp_path, models, name):
    asked = recipe(name, CASES[name], models)
    same(tmp_path, lambda read, out: fastinterp.merge(asked, out, read=read, threads=2))


@pytest.mark.parametrize("form", ["blocks", "rows", "e5m2"])
def test_codes_with_scales(tmp_path, form):
    """Decoders read mapped codes, and companions."""
    found = quantised_models.FORMS[form]
    quantised_models.saved(tmp_path, found, quantised_models.family(found, 2))
    same(tmp_path, lambda read, out: fastinterp.interpolate(tmp_path / "a", tmp_path / "b", 0.3, out, read=read))


def test_scales_are_not_read_in_place(tmp_path):
    """Scales are read once and serve all blocks: pages that fail, or change, after that are read by nobody."""
    tensor = codes.scaled("scaled_i8", (4096, 4096), 0, (1, 4096), 4096)
    (scales,) = tensor.companions
    tensor.raw.tofile(tmp_path / "codes")
    decoder = Decoder(tensor.name, tensor.columns, ((1, 0, scales.size),), tensor.parameters)
    step = CombineStep(
        inputs=(Stored(0, 0, F32.kernel_code, decoder),), numel=tensor.numel, sinks=(0,), offsets=(0,),
        out_dtype=F32.kernel_code, rows=(Row(0),),
    )  # fmt: skip
    in_time = 0
    for _ in range(10):
        scales.tofile(tmp_path / "scales")
        with ExitStack() as stack:
            files = [stack.enter_context(open(tmp_path / name, "r+b")) for name in ("codes", "scales")]
            out = stack.enter_context(open(tmp_path / "out", "w+b"))
            sources = [MappedFile(file.fileno()) for file in files]
            pump = Pump(sources, [out.fileno()], [step], PumpOptions(threads=1))
            pump.start()
            while not pump.wait(0) and not pump.bytes_written:
                pass
            os.pwrite(files[1].fileno(), bytes(scales.size), 0)
            in_time += not pump.wait(0)
            assert pump.wait(60)
            pump.join()
            assert pump.error() is None
        assert (codes.bits(np.fromfile(tmp_path / "out", np.float32)) == tensor.want).all()
    assert in_time, "no run took long enough"


@pytest.mark.parametrize("isa", usable())
def test_beyond_four_gigabytes(tmp_path, isa):
    """A sparse file: offsets need more than 32 bits."""
    numel, at = 5000, (5 << 30) + 1
    values = weights(3, F32, (numel,)).raw
    for name in ("x", "y"):
        with open(tmp_path / name, "wb") as stream:
            stream.seek(at)
            stream.write(values.tobytes())
    written = []
    for read in READS:
        with open(tmp_path / "x", "rb") as x, open(tmp_path / "y", "rb") as y, open(tmp_path / read, "wb") as out:
            files: list[Any] = [MappedFile(f.fileno()) if read == "mapped" else f.fileno() for f in (x, y)]
            step = CombineStep(
                inputs=(Stored(0, at, F32.kernel_code), Stored(1, at, F32.kernel_code)), numel=numel, sinks=(0,),
                offsets=(0,), out_dtype=BF16.kernel_code, rows=(ROW,),
            )  # fmt: skip
            assert run(Pump(files, [out.fileno()], [step], PumpOptions(isa=isa))) is None
        written.append((tmp_path / read).read_bytes())
    assert written[0] == written[1] and any(written[0])


def test_files_that_are_open_in_turns(tmp_path, monkeypatch):
    a, b = (write(tmp_path / name, {f"x{i}": weights(i, F32, (50,)) for i in range(8)}, shards=8) for name in "ab")
    monkeypatch.setattr(sources, "_allow_files", lambda count: 5)
    same(tmp_path, lambda read, out: fastinterp.interpolate(a, b, 0.5, out, read=read, device="cpu"))


def test_in_memory_and_replayed(tmp_path):
    a, b = (write(tmp_path / "ab"[i], odd_model(500 * i), skew=1) for i in range(2))
    found = {}
    for read in READS:
        points = fastinterp.sweep(
            a, b, [0.3], in_memory=lambda p, tensors: {n: t.tobytes() for n, t in tensors.items()}, read=read,
            framework="numpy", dtype="float32",
        )  # fmt: skip
        found[read] = points[0].result
    assert found["pread"] == found["mapped"]
    fastinterp.interpolate(a, b, 0.3, tmp_path / "out", read="mapped")
    assert fastinterp.verify(tmp_path / "out", sample=1.0).ok
    assert fastinterp.replay(tmp_path / "out", tmp_path / "again", read="mapped").same


# --- auto ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mapped_fds(monkeypatch) -> list[int]:
    """The files that the package maps from now on."""
    found: list[int] = []

    def noted(fd: int) -> MappedFile:
        found.append(fd)
        return MappedFile(fd)

    monkeypatch.setattr("fastinterp.execute.reading.MappedFile", noted)
    return found


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("ties", 3),
        ("slerp", 2),
        ("sce", 3),
        *((name, 0) for name in ("linear", "task_arithmetic", "ram", "nearswap", "fisher")),
    ],
)
def test_auto_maps_what_is_read_again(tmp_path, models, mapped_fds, name, files):
    fastinterp.merge(recipe(name, CASES[name], models), tmp_path / "out", device="cpu")
    assert len(mapped_fds) == files
    fastinterp.merge(recipe(name, CASES[name], models), tmp_path / "again", read="pread")
    assert len(mapped_fds) == files and tree(tmp_path / "again") == tree(tmp_path / "out")


def test_auto_maps_nothing_that_is_not_in_the_page_cache(tmp_path, models, mapped_fds, monkeypatch):
    monkeypatch.setattr(sources, "cached_fraction", lambda fd, size: 0.5)
    fastinterp.merge(recipe("ties", CASES["ties"], models), tmp_path / "out")
    assert mapped_fds == []


def test_auto_reads_what_cannot_be_mapped(tmp_path, models, monkeypatch):
    tried: list[int] = []

    def fails(fd: int) -> None:
        tried.append(fd)
        raise OSError(19, "No such device")

    monkeypatch.setattr("fastinterp.execute.reading.MappedFile", fails)
    fastinterp.merge(recipe("ties", CASES["ties"], models), tmp_path / "out", device="cpu")
    fastinterp.merge(recipe("ties", CASES["ties"], models), tmp_path / "again", read="pread")
    assert len(tried) == 1 and tree(tmp_path / "out") == tree(tmp_path / "again")


def test_auto_leaves_a_limited_address_space_to_other_memory(monkeypatch):
    assert may_map("auto", reads_again=True) and not may_map("auto", reads_again=False)
    assert not may_map("pread", reads_again=True)
    monkeypatch.setattr("resource.getrlimit", lambda what: (1 << 40, 1 << 40))
    assert not may_map("auto", reads_again=True)


# --- what cannot be mapped -------------------------------------------------------------------------------------------


def test_refusals(tmp_path, monkeypatch):
    a, b = (write(tmp_path / name, {"x": weights(1, F32, (5,))}) for name in "ab")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"read": "mmap"}, "read must be one of auto, pread, mapped, got 'mmap'"),
        ({"read": "mapped", "device": "cuda"}, "--read mapped is for the CPU, and cannot go with --device cuda"),
    )
    for wrong, match in cases:
        with pytest.raises(fastinterp.UsageError, match=match):
            fastinterp.interpolate(a, b, 0.5, tmp_path / "out", **wrong)
        with pytest.raises(fastinterp.UsageError, match=match):
            fastinterp.sweep(a, b, [0.5], in_memory=print, **wrong)

    assert reading_device("pread", "auto", ["org/model"]) == "auto"
    with pytest.raises(fastinterp.UsageError, match="org/model is read from where it is, and only files here"):
        reading_device("mapped", "auto", ["org/model"])

    def fails(fd: int) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr("fastinterp.execute.reading.MappedFile", fails)
    with pytest.raises(fastinterp.StorageError, match=r"it cannot be mapped: No such device\. Use --read pread"):
        fastinterp.interpolate(a, b, 0.5, tmp_path / "out", read="mapped")
    assert not (tmp_path / "out").exists()


# --- files that shrink -----------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    for i, name in enumerate("ab"):
        write(tmp_path / name, {f"x{j}": weights(10 * i + j, BF16, (257, 1001)) for j in range(5)}, skew=1)
    return tmp_path / "a", tmp_path / "b"


def error_of(run: Callable[[], Any]) -> str:
    with pytest.raises(fastinterp.CheckpointError) as caught:
        run()
    return str(caught.value)


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
@pytest.mark.parametrize("keep", [0, 5000, 1_000_000, 1_003_520, -1])
def test_the_error_is_that_of_pread(tmp_path, pair, monkeypatch, method, keep):
    """Cut once the inputs are open: in the middle of a page, at its edge, one byte before the end (no page is gone
    then); where sums are written, and where data is only measured.
    """
    file = pair[1] / "model.safetensors"
    whole = file.read_bytes()
    asked: dict[str, Any] = {"merge_method": method, "models": [{"model": str(p)} for p in pair]}
    asked |= {"parameters": {"t": 0.3} if method == "slerp" else {"weight": 0.5, "density": 0.5}}
    asked |= {} if method == "linear" else {"base_model": str(pair[0])}
    init = sources.Sources.__init__

    def opened(*args: Any, **more: Any) -> None:
        init(*args, **more)
        os.truncate(file, keep % len(whole))

    found = []
    for read in READS:
        file.write_bytes(whole)
        with monkeypatch.context() as patch:
            patch.setattr(sources.Sources, "__init__", opened)
            merge = partial(fastinterp.merge, asked, tmp_path / "out", read=read, threads=1)
            found.append(error_of(merge))
        assert not (tmp_path / "out").exists()
    assert found[0] == found[1]
    assert f"{file}: only " in found[0] and "truncated or replaced while it was being read" in found[0]


@pytest.mark.parametrize(("read", "threads"), [("mapped", 1), ("mapped", 4), ("auto", 2)])
def test_cut_between_two_reads(tmp_path, pair, monkeypatch, read, threads):
    """When its pages have been mapped and read once: `slerp` measures, and reads again."""
    file, runs = pair[1] / "model.safetensors", []
    inner = rounds.PumpExecutor._run

    def cutting(self: Any, steps: Any) -> Any:
        runs.append(1)
        if len(runs) == 2:
            os.truncate(file, 700_001)
        return inner(self, steps)

    monkeypatch.setattr(rounds.PumpExecutor, "_run", cutting)
    asked = {"merge_method": "slerp", "base_model": str(pair[0]), "models": [{"model": str(pair[1])}]}
    text = error_of(
        lambda: fastinterp.merge(asked | {"parameters": {"t": 0.3}}, tmp_path / "out", read=read, threads=threads)
    )
    assert f"{file}: only " in text and len(runs) == 2
    assert not (tmp_path / "out").exists()


def run(pump: Pump) -> tuple[Any, ...] | None:
    pump.start()
    assert pump.wait(60)
    pump.join()
    return pump.error()


def test_file_that_was_cut_and_is_whole_again(tmp_path):
    """A page failed, and `pread` finds nothing wrong: what was read may be zeros, and that is an error, too. The next
    pump reads it with `pread`.
    """
    (tmp_path / "x").write_bytes(bytes(range(256)) * 4096)
    with open(tmp_path / "x", "r+b") as file:
        mapped = MappedFile(file.fileno())
        step = Measure(inputs=(Stored(0, 0, F32.kernel_code),), numel=1 << 18, deltas=False)
        os.truncate(tmp_path / "x", 4096)
        assert run(Pump([mapped], [], [step], PumpOptions(threads=1))) == ("read", 0, 0, 0, 131072, 4096)
        assert mapped.failed
        os.truncate(tmp_path / "x", 1 << 20)
        pump = Pump([mapped], [], [step], PumpOptions())
        assert run(pump) is None and pump.bytes_read == 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("read", READS)
def test_as_a_program(tmp_path, read):
    """Cut by another process in the middle of a merge: exit code and message are those of `pread`."""
    for name in "ab":
        write_sparse(tmp_path / name / "model.safetensors", {f"x{i}": (1 << 24,) for i in range(16)}, F32)
    code = """
        import os, sys, threading
        from fastinterp.execute import rounds
        inner = rounds.PumpExecutor._run
        def cutting(self, steps):
            threading.Timer(0.02, os.truncate, ("b/model.safetensors", 100000)).start()
            return inner(self, steps)
        rounds.PumpExecutor._run = cutting
        from fastinterp.cli import main
        sys.argv[1:] = ["interpolate", "a", "b", "out", "--alpha", "0.5", "--quiet", "--read", sys.argv[1]]
        main()
    """
    done = python(code, read, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "b/model.safetensors: only " in done.stderr and "while it was being read" in done.stderr
    assert not (tmp_path / "out").exists()


# --- SIGBUS that is not ours -----------------------------------------------------------------------------------------

# A file `x` of one page; a pump that maps it and has ended, and holds the guard until it is joined; `torn`, a mapping
# of the program itself, beyond the end of its file.
SETTING = """
    import faulthandler, mmap, os, signal, sys
    from fastinterp.backends.cpu import MappedFile, Pump, PumpOptions
    from fastinterp.ops.operands import Stored
    from fastinterp.ops.steps import Measure
    open("x", "wb").write(bytes(4096))
    open("y", "wb").write(bytes(8192))
    file, other = open("x", "r+b"), open("y", "r+b")
    torn = mmap.mmap(other.fileno(), 8192)
    os.truncate("y", 100)
    step = Measure(inputs=(Stored(0, 0, 1),), numel=1024, deltas=False)
    def pump():
        made = Pump([MappedFile(file.fileno())], [], [step], PumpOptions(threads=1))
        made.start()
        assert made.wait(60)
        return made
    def cut():  # the same, of a file that has no pages any more
        mapped = MappedFile(file.fileno())
        os.truncate("x", 0)
        made = Pump([mapped], [], [step], PumpOptions(threads=1))
        made.start()
        assert made.wait(60)
        return made
    def caught():  # whether this process has a handler of SIGBUS
        line = next(line for line in open("/proc/self/status") if line.startswith("SigCgt"))
        return bool(int(line.split()[1], 16) >> (signal.SIGBUS - 1) & 1)
"""


def python(code: str, *args: str, cwd: Path, setting: str = "") -> subprocess.CompletedProcess[str]:
    text = textwrap.dedent(setting) + textwrap.dedent(code)
    # A build with AddressSanitizer would report every SIGBUS that is not ours, and abort.
    sanitizer = ":".join(filter(None, (os.environ.get("ASAN_OPTIONS"), "handle_sigbus=0")))
    return subprocess.run(
        [sys.executable, "-c", text, *args], cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ASAN_OPTIONS": sanitizer},
    )  # fmt: skip


def alone(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return python(code, cwd=folder, setting=SETTING)


BEFORE = "faulthandler.enable()\nheld = pump()\n"
DURING = "held = pump()\nfaulthandler.enable()\n"
AGAIN = "held = pump()\nfaulthandler.enable()\nmore = pump()\n"  # the guard is put above faulthandler's handler
BURIED = "held = pump()\nfaulthandler.enable()\nheld.join()\nheld = pump()\n"


@pytest.mark.parametrize("when", [BEFORE, DURING, AGAIN, BURIED], ids=["before", "during", "again", "buried"])
def test_faulthandler_is_called(tmp_path, when):
    done = alone(when + "print(torn[5000])", tmp_path)
    assert done.returncode == -signal.SIGBUS, done.stderr
    assert "Fatal Python error: Bus error" in done.stderr


@pytest.mark.parametrize("when", [BEFORE, AGAIN, BURIED], ids=["before", "again", "buried"])
def test_own_faults_are_not_told_to_faulthandler(tmp_path, when):
    code = when + textwrap.dedent("""
        held = cut()
        held.join()
        print(held.error())
    """)
    done = alone(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "('read', 0, 0, 0, 4096, 0)\n", "")


def test_without_any_handler_the_process_ends_as_before(tmp_path):
    assert alone("held = pump()\nprint(torn[5000])", tmp_path).returncode == -signal.SIGBUS
    assert alone("held = pump()\nos.kill(os.getpid(), signal.SIGBUS)", tmp_path).returncode == -signal.SIGBUS


def test_handlers_of_python_are_called_and_put_back(tmp_path):
    code = """
        told = []
        signal.signal(signal.SIGBUS, lambda number, frame: told.append(number))
        held = pump()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGBUS)
        held.join()
        os.kill(os.getpid(), signal.SIGBUS)
        assert told == 3 * [signal.SIGBUS], told
        signal.signal(signal.SIGBUS, signal.SIG_IGN)
        held = pump()
        os.kill(os.getpid(), signal.SIGBUS)
        held.join()
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        assert not caught()
        held, other_one = pump(), pump()
        assert caught()
        held.join()
        assert caught()
        other_one.join()
        assert not caught()
        print("all")
    """
    done = alone(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "all\n", "")


def test_threads_that_block_signals(tmp_path):
    """A fault of a thread that blocks SIGBUS would end the process, and threads inherit what is blocked."""
    code = """
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        held = cut()
        print(held.error())
    """
    done = alone(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "('read', 0, 0, 0, 4096, 0)\n"), done.stderr


def test_fork_during_a_merge(tmp_path):
    code = """
        held = pump()
        child = os.fork()
        if child == 0:
            again = cut()
            again.join()
            os._exit(7 if again.error() == ("read", 0, 0, 0, 4096, 0) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = alone(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


def test_mappings_are_given_back(tmp_path):
    (tmp_path / "x").write_bytes(bytes(1 << 20))
    with open(tmp_path / "x", "rb") as file:
        held = [MappedFile(file.fileno()) for _ in range(3)]
        assert Path("/proc/self/maps").read_text().count(str(tmp_path / "x")) >= 1
        del held
        assert str(tmp_path / "x") not in Path("/proc/self/maps").read_text()
