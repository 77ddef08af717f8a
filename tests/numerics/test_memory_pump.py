"""The pump over memory: what is read and written in place is what files would hold, and nothing beyond its bounds."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from fastinterp.backends.cpu import Pump, PumpOptions
from fastinterp.ops import operands
from fastinterp.ops import steps as kinds
from fastinterp.ops.combine import Combine, Row
from fastinterp.ops.dtypes import BF16, F32
from fastinterp.reference import combine as reference
from tests.numerics.test_pump import TENSORS, laid_out
from tests.support import backends
from tests.support.cases import fill
from tests.support.pumps import code, stored

SETTINGS: dict[str, Any] = {
    "threads": 2, "write_bytes": 4096, "read_bytes": 4096, "prefetch": True, "stats_every": 1,
}  # fmt: skip


def memory(x: np.ndarray) -> tuple[str, int, int]:
    return "memory", x.ctypes.data, x.nbytes


def run(sources: list[Any], sinks: list[Any], steps: list[Any], **options: Any) -> Pump:
    pump = Pump(sources, sinks, steps, PumpOptions(**(SETTINGS | options)))
    pump.start()
    assert pump.wait(60)
    pump.join()
    return pump


@pytest.mark.parametrize("threads", [1, 7])
@pytest.mark.parametrize("kinds", [(True, True), (False, True), (True, False)], ids=["both", "one out", "the other"])
def test_memory_holds_what_files_would(tmp_path, kinds, threads):
    """Tensors of all dtypes at odd offsets: from memory and a file, to memory, or to memory and a file at once."""
    starts = ((1 << 20) - 5, 77)
    paths, outputs, steps, want = laid_out(tmp_path, starts, 2)
    held = np.fromfile(paths[0], np.uint8)
    made = [np.fromfile(path, np.uint8) for path in outputs]
    fds = [os.open(paths[1], os.O_RDONLY), *(os.open(path, os.O_WRONLY) for path in outputs)]
    try:
        sinks = [memory(x) if in_memory else fd for x, fd, in_memory in zip(made, fds[1:], kinds, strict=True)]
        pump = run([memory(held), fds[0]], sinks, steps, threads=threads)
    finally:
        for fd in fds:
            os.close(fd)
    assert pump.error() is None
    for x, path, expected, in_memory in zip(made, outputs, want, kinds, strict=True):
        backends.assert_same_bits(expected, x if in_memory else np.fromfile(path, np.uint8), BF16, path.name)
    assert pump.bytes_written == sum(w.size - s - 77 for w, s in zip(want, starts, strict=True))
    assert len(steps) == len(TENSORS)


def test_answers_stand_beside_writers():
    """One entry per step: None for what writes, memoryviews of float64 and int64 for what measures."""
    x = [np.full(5, v, np.float32) for v in (2, 3)]
    out = np.zeros(5, np.float32)
    inputs = stored([F32, F32])
    row = Combine((0.5, 0.5), sums_to_one=True).row()
    steps = [
        kinds.Measure(inputs=inputs, numel=5),
        kinds.Combine(inputs=inputs, numel=5, rows=(row,), sinks=(0,), offsets=(0,), out_dtype=code(F32)),
        kinds.Measure(inputs=inputs[:1], numel=0),
    ]
    pump = run([memory(v) for v in x], [memory(out)], steps)
    assert pump.error() is None
    first, second, third = pump.answers()
    assert [v.format for v in first] == ["d", "q"]
    assert [list(v) for v in first] == [[20, 30, 45, 10, 15], [5, 5]]
    assert second is None and [list(v) for v in third] == [[0, 0], [0]]
    assert out.tolist() == [2.5] * 5
    assert [len(s) for s in pump.stats()] == [0, 1, 0]


@pytest.mark.parametrize("offset", [-2, 24, 41, 1 << 62])
def test_bounds_of_sources_are_kept(offset):
    """An error as of a file that ended too early; nothing is touched."""
    x, out = np.zeros(40, np.uint8), np.zeros(20, np.uint8)
    step = kinds.Combine(
        inputs=(operands.Stored(0, offset, code(BF16)), operands.Stored(0, 0, code(BF16))), numel=10, sinks=(0,),
        rows=(Row(0, 1.0, ((1, 0.5),)),), offsets=(0,), out_dtype=code(BF16),
    )  # fmt: skip
    error = run([memory(x)], [memory(out)], [step]).error()
    assert error == ("read", 0, 0, offset, 20, 16 if offset == 24 else 0)


@pytest.mark.parametrize("offset", [-2, 24, 41])
def test_bounds_of_sinks_are_kept(offset):
    x, out = np.ones(20, np.uint8), np.full(60, 7, np.uint8)
    step = kinds.Combine(
        inputs=stored([BF16]), numel=10, sinks=(0,), rows=(Row(0),), offsets=(offset,), out_dtype=code(BF16)
    )
    error = run([memory(x)], [("memory", out.ctypes.data + 10, 40)], [step]).error()
    assert error is not None and error[:4] == ("write", 0, 0, offset)
    assert (out == 7).all()


@pytest.mark.parametrize("handle", [("file", 1, 2), ("memory", 1, -1), "memory", (1, 2)], ids=str)
def test_other_handles_are_refused(handle):
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        run([handle], [], [])


def test_measure_of_memory():
    raw = fill("normal", F32, 1 << 18, 0, np.random.default_rng(0)).view(np.uint8)
    pump = run([memory(raw)], [], [kinds.Measure(inputs=stored([F32]), numel=1 << 18)])
    ((sums, nonzero),) = pump.answers()
    want, counts = reference.measure([raw], [F32], False)
    assert np.array(sums).tobytes() == want.tobytes() and list(nonzero) == counts.tolist()
    assert pump.bytes_read == raw.size
