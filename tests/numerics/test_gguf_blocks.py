"""Decoders of GGUF's blocks: the reference is what the package gguf makes of them, and the engine the reference."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from fastinterp.checkpoint.gguf_types import TYPES
from fastinterp.ops import steps
from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import F32
from fastinterp.ops.operands import Decoder, Stored
from fastinterp.reference.decode import decode
from tests.support import backends
from tests.support.pumps import code, run

NATIVE = [t for t in TYPES.values() if t.decoder]
every_isa = pytest.mark.parametrize("isa", backends.usable())
every_type = pytest.mark.parametrize("kind", NATIVE, ids=lambda kind: kind.name)


def blocks(number: int, count: int) -> np.ndarray:
    """All bit patterns: codes and scales of every kind, Inf and NaN among them."""
    _, nbytes = TYPES[number].block
    return np.random.default_rng(number).integers(0, 256, (count, nbytes), dtype=np.uint8)


def package(raw: np.ndarray, number: int) -> np.ndarray:
    """The numbers that the package makes of blocks; every NaN is the one that is stored."""
    with np.errstate(all="ignore"):
        numbers = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(number)).astype(np.float32).reshape(-1)
    return np.where(np.isnan(numbers), np.float32(np.nan), numbers)


@every_type
def test_reference_is_the_package(kind):
    raw = blocks(kind.number, 4000)
    want = package(raw, kind.number)
    got = decode(kind.decoder, raw, [], (), want.size, want.size)
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    assert np.isfinite(want).mean() > 0.5


@every_type
@every_isa
@pytest.mark.parametrize("skew", [0, 1])
def test_engine_is_the_reference(tmp_path, kind, isa, skew):
    raw = blocks(kind.number, 3 * 16384 // kind.block[0] + 1)
    numel = len(raw) * kind.block[0]
    want = decode(kind.decoder, raw, [], (), numel, numel)
    source, sink = tmp_path / "in", tmp_path / "out"
    source.write_bytes(bytes(skew) + raw.tobytes())
    np.testing.assert_array_equal(decoded(source, sink, skew, kind.decoder, numel, isa), want.view(np.uint32))


def decoded(source: Path, sink: Path, skew: int, decoder: str, numel: int, isa: str) -> np.ndarray:
    """What the pump makes of one encoded tensor in F32, as u32[numel]."""
    operand = Stored(0, skew, code(F32), Decoder(decoder, numel, (), ()))
    step = steps.Combine(
        inputs=(operand,), numel=numel, columns=numel, sinks=(0,), offsets=(0,), out_dtype=code(F32),
        rows=(Row(0),),
    )  # fmt: skip
    with open(source, "rb") as read, open(sink, "w+b") as write:
        write.truncate(4 * numel)
        run(isa, [step], [read.fileno()], [write.fileno()])
    return np.fromfile(sink, np.uint32)
