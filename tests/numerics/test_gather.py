"""Operands whose rows are gathered: every kind of step gives what it gives for a tensor that holds these rows."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastinterp.backends.cpu import Pump, PumpOptions
from fastinterp.ops import steps
from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import BF16, F16, F32, MERGING
from fastinterp.ops.operands import Decoder, Gathered, Stored
from fastinterp.ops.requests import GroupCombine
from tests.support import pumps
from tests.support.cases import fill
from tests.support.pumps import code

COLUMNS = 37
DTYPES = (BF16, F32, F16)
OPTIONS = PumpOptions(threads=2, write_bytes=4096, read_bytes=4096, prefetch=True, stats_every=1)
ROWS = 2500
RNG = np.random.default_rng(3)
MAPS = {
    "in order": np.arange(ROWS),
    "backwards": np.arange(ROWS)[::-1],
    "runs, repeats and zeros": np.concatenate(
        [
            np.arange(700, 1300),
            [-1] * 40,
            np.arange(600),
            [5, 5, 5, -1, 9],
            np.arange(1499, 1500).repeat(255),
            np.arange(1000),
        ]
    ),
    "anywhere": RNG.integers(-1, ROWS, ROWS),
    "zeros only": np.full(ROWS, -1),
}


def run(handles: list[Any], sinks: list[Any], step: steps.Step) -> Pump:
    pump = Pump(handles, sinks, [step], OPTIONS)
    pump.start()
    assert pump.wait(60)
    pump.join()
    return pump


def stored(folder: Path, memory: bool, stack: ExitStack) -> tuple[list[Any], list[Any], list[np.ndarray], list[Any]]:
    """Three operands of 1500 rows in one source and 1000 in another: sources, parts, rows as bytes, what to keep."""
    sources: list[Any] = []
    parts, matrices, kept = [], [], []
    for i, dtype in enumerate(DTYPES):
        matrix = fill("normal", dtype, ROWS * COLUMNS, i, np.random.default_rng(i)).view(np.uint8).reshape(ROWS, -1)
        places = []
        for start, count in ((0, 1500), (1500, 1000)):
            raw = np.concatenate([np.zeros(2 * i + 1, np.uint8), matrix[start : start + count].ravel()])
            places.append((len(sources), 2 * i + 1, count))
            if memory:
                kept.append(raw)
                sources.append(("memory", raw.ctypes.data, raw.size))
            else:
                path = folder / f"{i}.{start}"
                raw.tofile(path)
                sources.append(os.open(path, os.O_RDONLY))
                stack.callback(os.close, sources[-1])
        parts.append(places)
        matrices.append(matrix)
    return sources, parts, matrices, kept


WRITES: dict[str, Any] = {"sinks": (0,), "offsets": (0,)}
KINDS: dict[str, Callable[..., steps.Step]] = {
    "combine": partial(steps.Combine, rows=(Row(0, 1.0, ((1, 0.3), (2, -0.7))),), out_dtype=code(BF16), **WRITES),
    "copy": partial(steps.Combine, rows=(Row(0),), out_dtype=code(BF16), **WRITES),
    "by row": partial(steps.GroupCombine, per="row", out_dtype=code(F32), **WRITES),
    "measure": partial(steps.Measure, deltas=True),
    "rows": partial(steps.Measure, per="row"),
    "columns": partial(steps.Measure, per="column"),
    "divergence": steps.Divergence,
}
INPUTS = {"copy": 1, "divergence": 2}


@pytest.mark.parametrize("memory", [False, True], ids=["files", "memory"])
@pytest.mark.parametrize("order", MAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_gathered_operands_are_as_good_as_gathered_tensors(tmp_path, kind, order, memory):
    step = KINDS[kind]
    n = INPUTS.get(kind, 3)
    if kind == "by row":
        weights = np.random.default_rng(1).normal(size=(ROWS, 3))
        step = partial(step, rows=(GroupCombine(array("d", weights.ravel()), 3, "row").row(),))
    wanted = MAPS[order]
    with ExitStack() as stack:
        sources, parts, matrices, _kept = stored(tmp_path, memory, stack)
        rows = array("q", wanted.tolist())
        gathered = tuple(Gathered(tuple(parts[i]), code(DTYPES[i]), rows) for i in range(n))
        whole = [np.where((wanted >= 0)[:, None], m[wanted], 0).astype(np.uint8) for m in matrices]
        plain = [("memory", w.ctypes.data, w.size) for w in whole]
        found: list[Any] = []
        for handles, inputs in ((plain, pumps.stored(DTYPES[:n])), (sources, gathered)):
            out = np.zeros(ROWS * COLUMNS * 4, np.uint8)
            full = step(inputs=inputs, numel=ROWS * COLUMNS, columns=COLUMNS)
            sinks = [("memory", out.ctypes.data, out.size)] if isinstance(full, steps.WritingStep) else []
            pump = run(handles, sinks, full)
            assert pump.error() is None
            (answer,) = pump.answers()
            found.append((out.tobytes(), [list(part) for part in answer or []]))
            read = sum(d.bits // 8 for d in DTYPES[:n]) * COLUMNS
        assert found[0] == found[1]
        assert pump.bytes_read == read * int((wanted >= 0).sum())
        assert any(found[0][0]) or any(map(any, found[0][1])) or order == "zeros only"


@pytest.mark.parametrize("order", MAPS)
@pytest.mark.parametrize("kind", ["copy", "combine", "measure"])
def test_rows_of_decoded_parts(kind, order):
    """1000 rows in float32, then 1500 that are codes with a scale each: rows move among both."""
    rng, wanted = np.random.default_rng(8), MAPS[order]
    numbers = rng.normal(size=(1000, COLUMNS)).astype("<f4")
    codes, scales = rng.integers(-127, 128, (1500, COLUMNS), np.int8), rng.random(1500).astype("<f4")
    every = np.concatenate([numbers, codes.astype(np.float32) * scales[:, None]])
    whole = np.where((wanted >= 0)[:, None], every[wanted], np.float32(0))
    decoder = Decoder("scaled_i8", COLUMNS, ((2, 0, scales.nbytes),), (0, 1, COLUMNS, 1500))
    parts, memory = (
        ((0, 0, 1000), (1, 0, 1500)),
        [("memory", v.ctypes.data, v.nbytes) for v in (numbers, codes, scales)],
    )
    gathered = Gathered(parts, code(F32), array("q", wanted.tolist()), (None, decoder))
    found = []
    for handles, one in (([("memory", whole.ctypes.data, whole.nbytes)], Stored(0, 0, code(F32))), (memory, gathered)):
        out = np.zeros(whole.nbytes, np.uint8)
        n = INPUTS.get(kind, 3)
        full = KINDS[kind](inputs=(one,) * n, numel=whole.size, columns=COLUMNS)
        sinks = [("memory", out.ctypes.data, out.size)] if isinstance(full, steps.WritingStep) else []
        pump = run(handles, sinks, full)
        assert pump.error() is None
        found.append((out.tobytes(), [list(part) for part in pump.answers()[0] or []]))
    assert found[0] == found[1]
    assert gathered.decoders and KINDS[kind](inputs=(gathered,), numel=whole.size, columns=COLUMNS).decodes


def test_decoders_of_gathered_parts_are_checked():
    x = np.zeros(80, np.uint8)
    decoder = Decoder("scaled_i8", 5, ((0, 0, 4),), (0, 4, 5, 4))
    rows = array("q", [0, 1, 2])
    for operand, said in (
        (Gathered(((0, 0, 4),), code(F32), rows, (None, decoder)), "one, or None, for each part"),
        (Gathered(((0, 0, 4),), code(BF16), rows, (decoder,)), "is float32"),
        (Gathered(((0, 0, 4),), code(F32), rows, (Decoder("none", 5),)), "no such decoder"),
    ):
        with pytest.raises(ValueError, match=said):
            run([("memory", x.ctypes.data, 80)], [], steps.Measure(inputs=(operand,), numel=15, columns=5))


def test_bytes_that_must_agree_may_be_gathered():
    """Rows of bytes of any dtype; `columns` counts bytes there."""
    x = np.arange(60, dtype=np.uint8)
    back = np.ascontiguousarray(x.reshape(6, 10)[::-1])
    out = np.zeros(60, np.uint8)
    memory = [("memory", v.ctypes.data, v.size) for v in (x, back, out)]
    gathered = Gathered(((1, 0, 6),), 0, array("q", [5, 4, 3, 2, 1, 0]))
    step = steps.CopyEqual(inputs=(Stored(0, 0, 0), gathered), numel=60, columns=10, sinks=(0,), offsets=(0,))
    assert run(memory[:2], memory[2:], step).error() is None
    assert np.array_equal(out, x)
    back[2, 3] ^= 1
    assert run(memory[:2], memory[2:], step).error() == ("differs", 0, 1)


def test_rows_that_follow_each_other_are_read_at_once():
    """What an error names is the run of rows that was asked for: here all of a source that is too short."""
    x = np.zeros(100, np.uint8)
    gathered = Gathered(((0, 0, 50),), code(BF16), array("q", [-1, *range(1, 40), 3]))
    step = steps.Measure(inputs=(gathered,), numel=41 * 5, columns=5)
    pump = run([("memory", x.ctypes.data, 100)], [], step)
    assert pump.error() == ("read", 0, 0, 10, 390, 90)


@pytest.mark.parametrize(
    ("operand", "said"),
    [
        (Gathered(((0, 0, 4),), code(F32), array("q", [0, 1, 4])), "none of the parts' rows"),
        (Gathered(((0, 0, 4),), code(F32), array("q", [0, 1, -2])), "none of the parts' rows"),
        (Gathered(((1, 0, 4),), code(F32), array("q", [0, 1, 2])), "none of the sources"),
        (Gathered(((0, 0, 4),), code(F32), array("q", [0, 1])), "buffer of 3 int64"),
        (Gathered(((0, 0, 4),), code(F32), array("i", [0, 1, 2])), "buffer of 3 int64"),
        (Stored(1, 0, code(F32)), "none of the sources"),
        (Stored(0, 0, len(MERGING)), f"no dtype has code {len(MERGING)}"),
    ],
)
def test_wrong_maps_are_refused(operand, said):
    x = np.zeros(80, np.uint8)
    step = steps.Measure(inputs=(operand,), numel=15, columns=5)
    with pytest.raises(ValueError, match=said):
        run([("memory", x.ctypes.data, 80)], [], step)
