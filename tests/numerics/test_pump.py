"""The native pump by itself: blocks and their edges at any byte offset, and `measure` against the reference."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastinterp.backends.cpu import Pump, PumpOptions, watch
from fastinterp.errors import StorageError
from fastinterp.execute.window import Window
from fastinterp.ops.combine import Combine, Row
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, DType
from fastinterp.ops.operands import Stored
from fastinterp.ops.steps import Combine as CombineStep
from fastinterp.ops.steps import CopyEqual, Measure
from fastinterp.reference import combine as reference
from tests.support import backends
from tests.support.cases import fill

Raw = np.ndarray[Any, np.dtype[np.uint8]]


def raws(kind: str, dtypes: Sequence[DType], numel: int, seed: int = 0) -> list[Raw]:
    rng = [np.random.default_rng([seed, i]) for i in range(len(dtypes))]
    return [fill(kind, d, numel, i, rng[i]).view(np.uint8) for i, d in enumerate(dtypes)]


def run(sources: Sequence[Path], sinks: Sequence[Path], steps: list[Any], *, isa: str = "", **options: Any) -> Pump:
    """Run a pump over files to its end, without an error."""
    settings: dict[str, Any] = {"threads": 2, "write_bytes": 4096, "read_bytes": 4096, "stats_every": 1}
    with ExitStack() as stack:
        fds = [os.open(p, os.O_RDONLY) for p in sources] + [os.open(p, os.O_WRONLY) for p in sinks]
        for fd in fds:
            stack.callback(os.close, fd)
        read, written = fds[: len(sources)], fds[len(sources) :]
        chosen = PumpOptions(isa=isa or backends.usable()[0], **(settings | options))
        pump = Pump(read, written, steps, chosen)
        pump.start()
        assert pump.wait(60)
        pump.join()
    assert pump.error() is None
    return pump


def code(dtype: DType) -> int:
    assert dtype.code is not None
    return dtype.code


# --- combine ---------------------------------------------------------------------------------------------------------

# in dtypes, out dtype, elements: each tensor starts where the one before ends, at any byte. None: bytes that agree.
TENSORS: list[tuple[tuple[DType, DType] | None, DType, int]] = [
    ((BF16, F16), F8_E4M3, 3),
    ((F64, F32), F64, 2049),  # 8-byte elements across every edge of a block
    (None, F32, 5001),
    ((BF16, BF16), BF16, 4096),
    ((F8_E4M3, F8_E5M2), F32, 1),
    ((BF16, F32), F32, 0),
    ((F32, F32), F32, 3077),
    (None, F32, 1),
    ((F16, F16), F8_E5M2, 12289),
    ((BF16, BF16), F64, 511),
]
BLOCK = 2 << 20  # bytes of the first output that a thread takes at a time
ROWS = (Combine((0.3, 0.7), sums_to_one=True).row(), Combine((-0.5, 1.5), sums_to_one=True).row(), Row(1))


def laid_out(
    folder: Path, starts: Sequence[int], row_count: int
) -> tuple[list[Path], list[Path], list[Any], list[Raw]]:
    """Two sources, one sink per row that begins with `starts[k]` bytes of 0xA5, the steps, and what must be written."""
    data: list[list[Raw]] = [[np.zeros(5, np.uint8)], [np.zeros(2, np.uint8)]]
    want: list[list[Raw]] = [[np.full(start, 0xA5, np.uint8)] for start in starts]
    steps: Any = []
    for seed, (dtypes, out, numel) in enumerate(TENSORS):
        places = [sum(r.size for r in made) for made in want]
        inputs = raws("patterns", dtypes or (F8_E4M3,), numel, seed)
        inputs = inputs if dtypes else inputs * 2
        at = [sum(r.size for r in source) for source in data]
        common: Any = {
            "inputs": tuple(Stored(i, at[i], code(dtypes[i]) if dtypes else 0) for i in range(2)), "numel": numel,
            "sinks": tuple(range(row_count)), "offsets": tuple(places),
        }  # fmt: skip
        if dtypes:
            steps.append(CombineStep(**common, rows=ROWS[:row_count], out_dtype=code(out)))
        else:
            steps.append(CopyEqual(**common))
        outputs = [inputs[0]] * row_count
        if dtypes:
            outputs, _ = reference.combine(inputs, dtypes, ROWS[:row_count], out)
        for source, raw in zip(data, inputs, strict=True):
            source.append(raw)
        for made, raw in zip(want, outputs, strict=True):
            made.append(raw)
    files = [np.concatenate(source) for source in data]
    results = [np.concatenate([*made, np.full(77, 0xA5, np.uint8)]) for made in want]
    sources, sinks = [folder / f"in{i}" for i in range(2)], [folder / f"out{k}" for k in range(row_count)]
    for path, raw in zip(sources, files, strict=True):
        raw.tofile(path)
    for path, raw in zip(sinks, results, strict=True):
        np.full(raw.size, 0xA5, np.uint8).tofile(path)
    return sources, sinks, steps, results


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("starts", [(1,), (BLOCK - 5,), (BLOCK - 20003, BLOCK - 11811, 77)], ids=str)
@pytest.mark.parametrize("write", [4096, 4099, 1 << 19])
def test_elements_across_the_edges_of_writes_and_blocks(tmp_path, starts, threads, write):
    """Tensors of all dtypes back to back at odd offsets, in and out; nothing is written before, between or behind."""
    sources, sinks, steps, want = laid_out(tmp_path, starts, len(starts))
    pump = run(sources, sinks, steps, threads=threads, write_bytes=write)
    for path, expected in zip(sinks, want, strict=True):
        backends.assert_same_bits(expected, np.fromfile(path, np.uint8), F8_E4M3, path.name)
    read = sum(sum(d.bits // 8 for d in dtypes or (F8_E4M3, F8_E4M3)) * numel for dtypes, _, numel in TENSORS)
    assert pump.bytes_read == read
    assert pump.bytes_written == sum(w.size - s - 77 for w, s in zip(want, starts, strict=True))


@pytest.mark.parametrize("step", [7, 2])
def test_bytes_that_differ_name_step_and_input(tmp_path, step):
    sources, sinks, steps, _ = laid_out(tmp_path, (1,), 1)
    operands, numel = steps[step].inputs, steps[step].numel
    with open(sources[1], "r+b") as stream:
        stream.seek(operands[1].offset + numel - 1)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([last ^ 1]))
    with pytest.raises(AssertionError, match=rf"\('differs', {step}, 1\)"):
        run(sources, sinks, steps)


def test_errors_of_the_system_name_the_file(tmp_path):
    """A write to what is open for reading, and a read beyond the end."""
    sources, sinks, steps, _ = laid_out(tmp_path, (1,), 1)
    with open(sources[0], "rb") as a, open(sources[1], "rb") as b:
        for sink, wanted in ((b, ("write", 0, errno.EBADF, 1)), (None, ("read", 0, 0))):
            if sink is None:
                os.truncate(sources[0], 6)
            with open(sinks[0], "r+b") as good:
                options = PumpOptions(isa="scalar", write_bytes=1 << 16, read_bytes=4096, prefetch=True)
                pump = Pump([a.fileno(), b.fileno()], [(sink or good).fileno()], steps, options)
                pump.start()
                assert pump.wait(60)
                pump.join()
                error = pump.error()
                assert error is not None and error[: len(wanted)] == wanted


@pytest.mark.parametrize("threads", [1, 64])
def test_more_threads_than_work(tmp_path, threads):
    """Threads that find nothing to do may end before the last one starts: the pump must end all the same."""
    for _ in range(20):
        assert run([], [], [], threads=threads).stats() == []


@pytest.mark.parametrize("outputs", [1, 3, 16])
@pytest.mark.parametrize("inputs", [1, 2, 5, 64])
def test_window_counts_all_of_the_scratch(inputs, outputs):
    """What --max-memory bounds is what the pump takes."""
    step = CombineStep(
        inputs=(Stored(0, 0, code(BF16)),) * inputs, numel=10, sinks=(0,) * outputs, offsets=(4096,) * outputs,
        out_dtype=code(BF16), rows=(Row(0, 1.0, tuple((i, 0.5) for i in range(1, inputs))),) * outputs,
    )  # fmt: skip
    window = Window(
        threads=1, write_bytes=1 << 16, read_bytes=1 << 14, inputs=inputs, outputs=outputs, most=0, asks=False
    )
    options = PumpOptions(isa="scalar", write_bytes=window.write_bytes, read_bytes=window.read_bytes)
    pump = Pump([0], [1], [step], options)
    assert pump.scratch_bytes == window.bytes


class Interrupted:
    """A pump whose end is interrupted: the second Ctrl-C comes as `cancel` or `join` returns."""

    def __init__(self, at: str):
        self.at, self.ended = at, 0

    def start(self) -> None:
        raise RuntimeError("first")

    def cancel(self) -> None:
        self.interrupt("cancel")

    def join(self) -> None:
        self.interrupt("join")
        self.ended += 1

    def interrupt(self, where: str) -> None:
        if where == self.at:
            self.at = ""
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["", "cancel", "join"])
def test_threads_are_waited_for_whatever_comes(at):
    pump: Any = Interrupted(at)
    with pytest.raises(KeyboardInterrupt if at else StorageError):
        watch(pump, 0, None)
    assert pump.ended == 1


# --- measure ---------------------------------------------------------------------------------------------------------


def measured(
    folder: Path, data: Sequence[Raw], dtypes: Sequence[DType], deltas: bool, **options: Any
) -> tuple[Any, list[int]]:
    """Sums and counts by the pump, of files in which the tensors start at odd offsets."""
    paths, operands = [], []
    for i, (raw, dtype) in enumerate(zip(data, dtypes, strict=True)):
        paths.append(folder / f"x{i}")
        np.concatenate([np.zeros(2 * i + 1, np.uint8), raw]).tofile(paths[i])
        operands.append(Stored(i, 2 * i + 1, code(dtype)))
    numel = data[0].size * 8 // dtypes[0].bits
    step = Measure(inputs=tuple(operands), numel=numel, deltas=deltas)
    pump = run(paths, [], [step], **options)
    assert pump.bytes_read == sum(raw.size for raw in data)
    ((sums, nonzero),) = pump.answers()
    return np.array(sums), list(nonzero)


def assert_measures_alike(
    folder: Path, kind: str, dtypes: Sequence[DType], numel: int, deltas: bool, **options: Any
) -> None:
    data = raws(kind, dtypes, numel)
    want, want_nonzero = reference.measure(data, dtypes, deltas)
    nan = np.isnan(want)  # of no promised sign or payload
    for isa in backends.usable():
        got, nonzero = measured(folder, data, dtypes, deltas, isa=isa, **options)
        assert nonzero == want_nonzero.tolist(), isa
        assert np.array_equal(nan, np.isnan(got)), isa
        assert [x.hex() for x in got[~nan].tolist()] == [x.hex() for x in want[~nan].tolist()], isa


@pytest.mark.parametrize("numel", [0, 1, 255, 256, 257, 16383, 16384, 16385, 3 * 16384 + 5, 16 * 16384 + 1])
@pytest.mark.parametrize("deltas", [False, True], ids=["inputs", "deltas"])
def test_measure_of_sizes(tmp_path, numel, deltas):
    """Around every edge of lanes, chunks, and what a thread takes at a time."""
    assert_measures_alike(tmp_path, "close", (BF16, BF16), numel, deltas)


@pytest.mark.parametrize(
    "dtypes",
    [(F64,), (F32,), (F16, F8_E4M3), (F64, F64), (F32, BF16, F64), (F8_E5M2, F16, F32, BF16, F8_E4M3)],
    ids=lambda ds: "+".join(map(str, ds)),
)
@pytest.mark.parametrize("deltas", [False, True], ids=["inputs", "deltas"])
@pytest.mark.parametrize(
    "kind", ["patterns", *(pytest.param(k, marks=pytest.mark.slow) for k in ("normal", "subnormal", "huge"))]
)
def test_measure_of_dtypes(tmp_path, dtypes, deltas, kind):
    """Sums of NaN, Inf, overflow and underflow too."""
    assert_measures_alike(tmp_path, kind, dtypes, 16384 + 300, deltas)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_measure_on_any_number_of_threads(tmp_path, threads):
    numel = 35 * 16384 + 77
    assert_measures_alike(tmp_path, "normal", (BF16, F32), numel, True, threads=threads, read_bytes=1 << 17)


def test_reference_measure_is_near_the_exact_sums():
    """Within n * 2^-53 of the sums of magnitudes: the oracle of the tests above has an oracle of its own."""
    data = raws("normal", (F32, F32, F32), 40000)
    x = np.stack([r.view(np.float32).astype(np.longdouble) for r in data])
    sums, nonzero = reference.measure(data, [F32] * 3, False)
    pairs = [(i, j) for i in range(3) for j in range(i, 3)]
    for value, (i, j) in zip(sums, pairs, strict=False):
        assert abs(value - x[i] @ x[j]) <= 40000 * 2.0**-53 * (abs(x[i]) @ abs(x[j]))
    for value, row in zip(sums[len(pairs) :], x, strict=True):
        assert abs(value - abs(row).sum()) <= 40000 * 2.0**-53 * abs(row).sum()
    assert nonzero.tolist() == [np.count_nonzero(row) for row in x]
