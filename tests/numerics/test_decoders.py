"""Encoded operands: every kind of step gives what it gives for the float32 tensor that its decoder makes.

The decoders are compiled here and registered by address, as one of the engine's own is by a row in its table.
"""

from __future__ import annotations

import ctypes
import math
import os
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastinterp import _C
from fastinterp.backends.cpu import Handle, Pump, PumpOptions
from fastinterp.ops import steps
from fastinterp.ops.combine import Combine, Row
from fastinterp.ops.dtypes import BF16, F32
from fastinterp.ops.operands import Decoder, Stored
from fastinterp.ops.requests import GroupCombine, Mask, MaskedCombine, MeasureMasked
from fastinterp.ops.steps import Bracket
from fastinterp.reference import combine as reference
from tests.support import backends, decoders
from tests.support.devices import cuda_host
from tests.support.pumps import code, masked_step, stats_step, stored

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())
every_isa = pytest.mark.parametrize("isa", backends.usable())
CSRC = Path(__file__).resolve().parents[2] / "csrc"

# int8 codes with one scale; with a scale for each row; and in blocks of 32 behind a scale of their own.
TOY = """
#include <cstring>

#include "decoder.h"

static float number(const void* at) { float x; memcpy(&x, at, sizeof x); return x; }

extern "C" void one_scale(const fi::DecodeArgs& a) {
  const signed char* codes = static_cast<const signed char*>(a.bytes);
  const float scale = number(a.companions[0]) * float(a.parameters[0]);
  for (int64_t i = 0; i < a.count; ++i) a.to[i] = float(codes[i]) * scale;
}

extern "C" void row_scales(const fi::DecodeArgs& a) {
  const signed char* codes = static_cast<const signed char*>(a.bytes);
  const char* scales = static_cast<const char*>(a.companions[0]);
  for (int64_t i = 0; i < a.count; ++i) a.to[i] = float(codes[i]) * number(scales + 4 * ((a.first + i) / a.columns));
}

extern "C" void block_scales(const fi::DecodeArgs& a) {
  const char* block = static_cast<const char*>(a.bytes);
  for (int64_t b = 0; b < a.count / 32; ++b, block += 36)
    for (int i = 0; i < 32; ++i) a.to[32 * b + i] = float(static_cast<signed char>(block[4 + i])) * number(block);
}
"""
BLOCKS = {"one_scale": (1, 1), "row_scales": (1, 1), "block_scales": (32, 36)}
Shape = tuple[int, int]


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return decoders.register(TOY, BLOCKS, tmp_path_factory.mktemp("decoders"))


class Encoded:
    """Tensors of one format: how they are stored, and what they are in float32.

    raw, scales  stored bytes of each tensor
    floats       of each tensor, as bytes
    """

    def __init__(self, name: str, shape: Shape, count: int):
        self.name, self.shape = name, shape
        rng, numel = np.random.default_rng([*shape, count]), math.prod(shape)
        base = rng.integers(-100, 100, numel)
        self.raw, self.scales, self.floats = [], [], []
        for i in range(count):
            codes = (base + i * rng.integers(-9, 10, numel)).clip(-127, 127).astype(np.int8)
            number = {"one_scale": 1, "row_scales": shape[0], "block_scales": -(-numel // 32)}[name]
            scales = rng.uniform(0.01, 0.02, number).astype(np.float32)
            each = scales.repeat({"one_scale": numel, "row_scales": shape[1], "block_scales": 32}[name])[:numel]
            if name == "one_scale":
                each = each * np.float32(0.5)
            self.floats.append((codes.astype(np.float32) * each).view(np.uint8))
            if name == "block_scales":
                padded = np.pad(codes, (0, -numel % 32)).view(np.uint8).reshape(-1, 32)
                self.raw.append(np.hstack([scales.view(np.uint8).reshape(-1, 4), padded]).ravel())
                scales = scales[:0]
            else:
                self.raw.append(codes.view(np.uint8))
            self.scales.append(scales.view(np.uint8))

    def stored(self, folder: Path | None, stack: ExitStack) -> tuple[list[Handle], tuple[Stored, ...], list[Any]]:
        """Sources, operands, what to keep alive: tensors at odd places behind their scales, in files or in memory."""
        sources: list[Handle] = []
        operands, kept = [], []
        for i, (raw, scales) in enumerate(zip(self.raw, self.scales, strict=True)):
            whole = np.concatenate([np.zeros(1, np.uint8), scales, np.zeros(i, np.uint8), raw])
            if folder is None:
                kept.append(whole)
                sources.append(("memory", whole.ctypes.data, whole.size))
            else:
                whole.tofile(folder / str(i))
                fd = os.open(folder / str(i), os.O_RDONLY)
                stack.callback(os.close, fd)
                sources.append(fd)
            companions = ((i, 1, scales.size),) if scales.size else ()
            decoder = Decoder(self.name, self.shape[1], companions, (0.5,))
            operands.append(Stored(i, 1 + scales.size + i, code(F32), decoder))
        return sources, tuple(operands), kept


def in_memory(tensors: Sequence[Any]) -> list[Handle]:
    return [("memory", x.ctypes.data, x.size) for x in tensors]


def run(sources: list[Handle], step: steps.Step, **options: Any) -> tuple[list[bytes], Any, Any, Pump]:
    """What a step writes (at an odd offset), its answer and its statistics."""
    sinks = []
    if isinstance(step, steps.WritingStep):
        size = 3 + step.numel * (8 if isinstance(step, steps.SumStep) else 1)
        sinks = [np.zeros(size, np.uint8) for _ in step.sinks]
    settings: dict[str, Any] = {"threads": 2, "write_bytes": 4096, "read_bytes": 4096, "stats_every": 2}
    pump = Pump(sources, in_memory(sinks), [step], PumpOptions(**(settings | options)))
    pump.start()
    assert pump.wait(60)
    pump.join()
    assert pump.error() is None, pump.error()
    (answer,), (stats,) = pump.answers(), pump.stats()
    return [x.tobytes() for x in sinks], answer, stats, pump


def told(answer: Any) -> Any:
    if isinstance(answer, list):
        return [(c.elements, c.above, c.zero, c.bins.tobytes()) for c in answer]
    return answer if answer is None else [part.tobytes() for part in answer]


MASKS = (Mask(), Mask(min_bits=0x3C000000), Mask(probability=0.5, rank_slope=0.2))


def kinds(shape: Shape) -> dict[str, Callable[..., steps.Step]]:
    """A step of each kind that reads three tensors, but for its inputs."""
    out: Any = {"sinks": (0,), "offsets": (3,)}
    common: Any = {"numel": math.prod(shape), "columns": shape[1]}
    weights = np.random.default_rng(1).normal(size=(shape[0], 3))
    masked = masked_step([MaskedCombine((0.0, 0.5, 1.5), masks=MASKS)], [F32] * 3, BF16, shape, name="w", seed=1)
    stats = stats_step(MeasureMasked(MASKS), [F32] * 3, shape, name="w", seed=1)
    group: Any = GroupCombine(array("d", weights.ravel()), 3, "row").row()
    return {
        "combine": partial(
            steps.Combine, **common, **out, out_dtype=code(BF16), rows=(Combine((0.2, 0.3, 0.5)).row(),), keys=(7,)
        ),
        "copy": partial(steps.Combine, **common, **out, out_dtype=code(F32), rows=(Row(0),), keys=(7,)),
        "group_combine": partial(
            steps.GroupCombine, **common, **out, out_dtype=code(F32), per="row", rows=(group,), keys=(7,)
        ),
        "masked_sum": partial(
            steps.MaskedSum, **common, **out, out_dtype=code(BF16), keys=(7,), outputs=masked.outputs
        ),
        "measure": partial(steps.Measure, **common, deltas=True),
        "rows": partial(steps.Measure, **common, per="row"),
        "columns": partial(steps.Measure, **common, per="column"),
        "masked_stats": partial(steps.MaskedStats, **common, tests=stats.tests, score=None, l1=True, squares=True),
        "histogram": partial(steps.Histogram, **common, brackets=(Bracket(1, 0, 0x7FFFFFFF, 15),)),
        "sample": partial(steps.Histogram, **common, brackets=(Bracket(2, 0, 0x7FFFFFFF, 15),), every=3),
        "divergence": partial(steps.Divergence, **common),
    }


INPUTS = {"copy": 1, "divergence": 2}
SHAPES = [(1, 1), (7, 13), (61, 1031), (2, 20011)]


@every_isa
@pytest.mark.parametrize("memory", [False, True], ids=["files", "memory"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_every_kind_of_step_sees_float32(tmp_path, name, shape, memory, isa):
    """Blocks lie across the edges of reads, rows and chunks, and the last one is not whole."""
    encoded = Encoded(name, shape, 3)
    with ExitStack() as stack:
        sources, operands, _kept = encoded.stored(None if memory else tmp_path, stack)
        for kind, step in kinds(shape).items():
            n = INPUTS.get(kind, 3)
            want = run(in_memory(encoded.floats), step(inputs=stored([F32] * n)), isa=isa)
            got = run(sources, step(inputs=operands[:n]), isa=isa)
            assert (got[0], told(got[1]), got[2]) == (want[0], told(want[1]), want[2]), kind


@every_isa
@pytest.mark.parametrize("threads", [1, 7])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_sums_are_those_of_the_reference(isa, threads, rounding):
    """Of the numpy reference, on what numpy makes of codes and scales; companions are read once."""
    shape = (301, 1013)
    encoded = Encoded("row_scales", shape, 3)
    rows = (Combine((0.2, 0.3, 0.5)).row(),)
    want, _ = reference.combine(encoded.floats, [F32] * 3, rows, BF16, rounding=rounding, keys=[7])
    with ExitStack() as stack:
        sources, operands, _kept = encoded.stored(None, stack)
        step = kinds(shape)["combine"](inputs=operands)
        (out,), _, _, pump = run(sources, step, isa=isa, threads=threads, stochastic=rounding == "stochastic")
    got = np.frombuffer(out, np.uint8)[3 : 3 + want[0].size]
    backends.assert_same_bits(want[0], got, BF16, isa)
    assert pump.bytes_read == sum(x.size for x in (*encoded.raw, *encoded.scales))


@every_isa
def test_encoded_and_plain_inputs_mix(isa):
    """What is stored as the kernels read it is passed on as it is."""
    shape = (61, 1031)
    encoded = Encoded("block_scales", shape, 3)
    with ExitStack() as stack:
        sources, operands, _kept = encoded.stored(None, stack)
        sources += in_memory(encoded.floats)
        mixed = (operands[0], Stored(4, 0, code(F32)), operands[2])
        for kind in ("combine", "masked_sum", "measure"):
            step = kinds(shape)[kind]
            plain = run(in_memory(encoded.floats), step(inputs=stored([F32] * 3)), isa=isa)
            got = run(sources, step(inputs=mixed), isa=isa)
            assert (got[0], told(got[1])) == (plain[0], told(plain[1])), kind


def test_bytes_that_must_agree_are_not_decoded():
    encoded = Encoded("one_scale", (3, 5), 1)
    with ExitStack() as stack:
        sources, (operand,), _kept = encoded.stored(None, stack)
        step = steps.CopyEqual(inputs=(operand, operand), numel=15, sinks=(0,), offsets=(3,))
        (out,), *_ = run(sources, step)
    assert out[3:18] == encoded.raw[0].tobytes()


@pytest.mark.parametrize(
    ("operand", "words"),
    [
        (Stored(0, 0, code(F32), Decoder("nothing", 4)), "no such decoder: nothing"),
        (Stored(0, 0, code(BF16), Decoder("one_scale", 4)), "a decoded operand is float32"),
        (Stored(0, 0, code(F32), Decoder("one_scale", 0)), "columns"),
        (Stored(0, 0, code(F32), Decoder("one_scale", 4, ((1, 0, 4),))), "none of the sources"),
        (Stored(0, 0, code(F32), Decoder("one_scale", 4, ((0, 0, -1),))), "0 bytes or more"),
    ],
)
def test_what_is_refused(operand, words):
    with pytest.raises(ValueError, match=words):
        Pump([("memory", 0, 0)], [], [steps.Measure(inputs=(operand,), numel=4)], PumpOptions())


@pytest.mark.parametrize("blocks", [(0, 1), (1, 0), (_C.CHUNK + 1, 1), (2, 33)], ids=str)
def test_blocks_that_the_pump_does_not_read_are_refused(toys, blocks):
    address = ctypes.cast(toys.one_scale, ctypes.c_void_p).value or 0
    with pytest.raises(ValueError, match="blocks of 1 to 16384 elements"):
        _C.register_decoder("huge", address, *blocks)


def test_companions_that_are_cut_are_an_error_of_their_source():
    encoded = Encoded("one_scale", (3, 5), 1)
    with ExitStack() as stack:
        sources, (operand,), _kept = encoded.stored(None, stack)
        cut = Stored(0, 0, code(F32), Decoder("one_scale", 5, ((0, 18, 4),), (1.0,)))
        for inputs in ((cut,), (operand, cut)):
            pump = Pump(sources, [], [steps.Measure(inputs=inputs, numel=15)], PumpOptions())
            pump.start()
            pump.join()
            assert pump.error() == ("read", 0, 0, 18, 4, 2)
