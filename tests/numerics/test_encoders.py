"""Encoded outputs: codes and scales are those that the numpy reference makes of the float32 sums."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from fastinterp.backends.cpu import Pump, PumpOptions
from fastinterp.ops import steps
from fastinterp.ops.combine import Combine, Row
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64
from fastinterp.ops.operands import Encoder, Stored
from fastinterp.ops.requests import GroupCombine, Mask, MaskedCombine
from fastinterp.ops.steps import LargestMagnitudes, SumStep
from fastinterp.reference import combine as reference
from fastinterp.reference.encode import encode
from tests.support import backends
from tests.support.cases import Guarded
from tests.support.pumps import code, masked_step, memory, run, stored

every_isa = pytest.mark.parametrize("isa", backends.usable())
every_name = pytest.mark.parametrize("name", ["scaled_f8_e4m3", "scaled_f8_e5m2", "scaled_i8"])
F32_SCALES, F16_SCALES, BF16_SCALES, E8M0_SCALES = range(4)
SCALE_BYTES = (4, 2, 2, 1)
Array = NDArray[Any]

# Rows, columns, and parameters: kind of scales, rows and columns of blocks, rows of matrices.
GEOMETRIES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "blocks": (384, 512, (F32_SCALES, 128, 128, 384)),
    "edges": (300, 1031, (F32_SCALES, 128, 128, 300)),
    "rows of blocks longer than a span": (130, 9000, (F32_SCALES, 128, 128, 130)),
    "less than a block": (7, 13, (F32_SCALES, 128, 128, 7)),
    "experts": (6 * 70, 100, (F32_SCALES, 32, 64, 70)),
    "power of two": (300, 257, (F32_SCALES, 64, 64, 300, 1)),
    "rows": (301, 1013, (F32_SCALES, 1, 1013, 301)),
    "rows in bf16": (301, 1013, (BF16_SCALES, 1, 1013, 301)),
    "rows in f16": (301, 113, (F16_SCALES, 1, 113, 301)),
    "a long row": (3, 70001, (F32_SCALES, 1, 70001, 3)),
    "mxfp8": (61, 1024, (E8M0_SCALES, 1, 32, 61)),
    "mxfp8 with edges": (61, 1031, (E8M0_SCALES, 1, 32, 61)),
    "a scale": (301, 1013, (F32_SCALES, 301, 1013, 301)),
    "a scale for each expert": (5 * 60, 100, (F32_SCALES, 60, 100, 60)),
    "one": (1, 1, (F32_SCALES, 1, 1, 1)),
}


def scale_count(rows: int, columns: int, parameters: Sequence[int]) -> int:
    _, down, across, matrix, *_ = parameters
    return rows // matrix * -(-matrix // down) * -(-columns // across)


def inputs_of(rows: int, columns: int, count: int = 2, dtype: Any = F32) -> list[Array]:
    """Tensors near each other, whose rows differ in size; with zeros in whole blocks, -0 and subnormal numbers."""
    rng = np.random.default_rng([rows, columns])
    base = rng.normal(size=(rows, columns)) * np.exp(rng.normal(size=(rows, 1)) * 3)
    base[: rows // 4, : columns // 2] = 0
    base[rows // 2, : columns // 3] = -0.0
    base[rows * 3 // 4] *= 1e-42
    tensors = [base + (base != 0) * rng.normal(size=base.shape) * 1e-3 * i for i in range(count)]
    return [reference.narrow(x.astype(np.float32).reshape(-1), dtype).view(np.uint8) for x in tensors]


def codes_bytes(name: str, numel: int) -> int:
    return numel // 32 * 34 if name == "q8_0" else numel


def encoded(
    step: SumStep, sources: Sequence[Array], encoder: Encoder, isa: str, scales: int, **options: Any
) -> tuple[list[tuple[bytes, bytes]], Pump]:
    """Codes and scales of each output of a step, and the pump. scales: their bytes."""
    k = len(step.sinks)
    codes = [Guarded(codes_bytes(encoder.name, step.numel), 5 * i + 1) for i in range(k)]
    places = [Guarded(scales, 3 * i + 1) for i in range(k)] if scales else []
    encoder = replace(encoder, scales=tuple((k + i, 0) for i in range(len(places))))
    step = replace(step, sinks=tuple(range(k)), offsets=(0,) * k, out_dtype=code(F32), encoder=encoder, keys=())
    pump = run(isa, [step], memory_of(sources), memory([*codes, *places]), **options)
    for guard in (*codes, *places):
        assert guard.intact()
    kept = [p.view.tobytes() for p in places] or [b""] * k
    return list(zip([c.view.tobytes() for c in codes], kept, strict=True)), pump


def memory_of(tensors: Sequence[Array]) -> list[Any]:
    return [("memory", x.ctypes.data, x.nbytes) for x in tensors]


def sums_of(step: SumStep, sources: Sequence[Array], isa: str) -> list[Array]:
    """The float32 sums that a step writes."""
    k = len(step.sinks)
    outs = [Guarded(4 * step.numel, 1) for _ in range(k)]
    step = replace(step, sinks=tuple(range(k)), offsets=(0,) * k, out_dtype=code(F32), keys=(), encoder=None)
    run(isa, [step], memory_of(sources), memory(outs))
    return [np.frombuffer(out.view.tobytes(), np.float32) for out in outs]


def combine_step(rows: int, columns: int, sums: Sequence[Row], dtypes: Sequence[Any] = (F32, F32)) -> steps.Combine:
    return steps.Combine(
        inputs=stored(dtypes), numel=rows * columns, columns=columns, sinks=tuple(range(len(sums))),
        offsets=(0,) * len(sums), out_dtype=code(F32), rows=tuple(sums),
    )  # fmt: skip


HALF = Combine((0.4, 0.6)).row()


@every_isa
@every_name
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_bytes_are_those_of_the_reference(isa, name, geometry):
    rows, columns, parameters = GEOMETRIES[geometry]
    tensors = inputs_of(rows, columns)
    step = combine_step(rows, columns, [HALF])
    [sums] = sums_of(step, tensors, isa)
    want = encode(name, sums, columns, parameters)
    scales = scale_count(rows, columns, parameters) * SCALE_BYTES[parameters[0]]
    assert want[1].size == scales
    for threads, read_bytes in ((1, 4096), (3, 65536)):
        [got], pump = encoded(
            step, tensors, Encoder(name, columns, parameters), isa, scales, threads=threads, read_bytes=read_bytes
        )
        np.testing.assert_array_equal(np.frombuffer(got[1], np.uint8), want[1])
        np.testing.assert_array_equal(np.frombuffer(got[0], np.uint8), want[0])
        assert pump.bytes_written == want[0].size + want[1].size


@every_isa
@pytest.mark.parametrize("shape", [(1, 32), (7, 64), (61, 1024), (3, 70016)], ids=str)
def test_q8_0_is_that_of_gguf(isa, shape):
    """Its own quantiser makes the same bytes of the same sums, and so does the reference."""
    quants = pytest.importorskip("gguf.quants")
    rows, columns = shape
    tensors = inputs_of(rows, columns)
    step = combine_step(rows, columns, [HALF])
    [sums] = sums_of(step, tensors, isa)
    with np.errstate(all="ignore"):
        want = quants.quantize(sums.reshape(shape), quants.GGMLQuantizationType.Q8_0).reshape(-1)
    np.testing.assert_array_equal(encode("q8_0", sums, columns)[0], want)
    for threads, read_bytes in ((1, 4096), (3, 65536)):
        [got], _ = encoded(step, tensors, Encoder("q8_0", columns), isa, 0, threads=threads, read_bytes=read_bytes)
        np.testing.assert_array_equal(np.frombuffer(got[0], np.uint8), want)


# --- kinds of sums ---------------------------------------------------------------------------------------------------

MASKS = (Mask(), Mask(min_bits=0x3C000000), Mask(probability=0.5, rank_slope=0.2))


def kinds(rows: int, columns: int) -> dict[str, Callable[[], SumStep]]:
    """A step of each kind that sums three tensors."""
    weights = np.random.default_rng(1).normal(size=(rows, 3))
    group: Any = GroupCombine(array("d", weights.ravel()), 3, "row").row()
    several = [Combine((0.2, 0.3, 0.5)).row(), Row(1), Combine((0.0, 0.5, -1.5), base=0).row()]
    ask = [MaskedCombine((0.0, 0.5, 1.5), masks=MASKS), MaskedCombine((0.0, 1.0, 0.1))]
    common: Any = {"numel": rows * columns, "columns": columns, "out_dtype": code(F32)}
    return {
        "several outputs": lambda: replace(combine_step(rows, columns, several, [F32] * 3)),
        "by row": lambda: steps.GroupCombine(
            **common, inputs=stored([F32] * 3), sinks=(0,), offsets=(0,), per="row", rows=(group,)
        ),
        "masked, by rank": lambda: masked_step(ask, [F32] * 3, F32, (rows, columns), name="w", seed=1),
    }


@every_isa
@pytest.mark.parametrize("kind", ["several outputs", "by row", "masked, by rank"])
@pytest.mark.parametrize("geometry", ["edges", "rows", "a long row", "mxfp8", "experts", "q8_0"])
def test_kinds_of_sums(isa, kind, geometry):
    rows, columns, parameters = GEOMETRIES.get(geometry, (61, 1024, ()))
    name = "q8_0" if geometry == "q8_0" else "scaled_f8_e4m3"
    tensors = inputs_of(rows, columns, 3)
    step = kinds(rows, columns)[kind]()
    sums = sums_of(step, tensors, isa)
    scales = scale_count(rows, columns, parameters) * SCALE_BYTES[parameters[0]] if parameters else 0
    for threads, read_bytes in ((1, 4096), (3, 65536)):
        got, _ = encoded(
            step, tensors, Encoder(name, columns, parameters), isa, scales, threads=threads, read_bytes=read_bytes
        )
        assert len(got) == len(sums)
        for (codes, places), x in zip(got, sums, strict=True):
            want = encode(name, x, columns, parameters)
            np.testing.assert_array_equal(np.frombuffer(places, np.uint8), want[1])
            np.testing.assert_array_equal(np.frombuffer(codes, np.uint8), want[0])


@every_isa
@pytest.mark.parametrize("dtype", [F64, F16, BF16, F8_E4M3, F8_E5M2], ids=str)
def test_inputs_of_every_dtype(isa, dtype):
    rows, columns, parameters = GEOMETRIES["edges"]
    tensors = inputs_of(rows, columns, 2, dtype)
    step = combine_step(rows, columns, [HALF], [dtype] * 2)
    [sums] = sums_of(step, tensors, isa)
    want = encode("scaled_f8_e4m3", sums, columns, parameters)
    [got], _ = encoded(step, tensors, Encoder("scaled_f8_e4m3", columns, parameters), isa, want[1].size)
    assert got == (want[0].tobytes(), want[1].tobytes())


# --- numbers ---------------------------------------------------------------------------------------------------------


def special() -> Array:
    """Rows of 32 numbers: NaN and Inf alone and among others, zeros, the largest and the least numbers, ties."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(24, 32)).astype(np.float32)
    rows[0, 3], rows[1, 4], rows[2, 5] = np.nan, np.inf, -np.inf
    rows[3], rows[4], rows[5] = np.nan, np.inf, 0
    rows[6], rows[6, 1] = -0.0, np.nan
    rows[7] *= np.float32(3e38) / np.abs(rows[7]).max()
    rows[8], rows[8, 7] = 1, 3.4028235e38
    rows[9] *= np.float32(1e-37)
    rows[10] *= np.float32(1e-40)
    rows[11], rows[11, 2] = 0, 1e-45
    rows[12], rows[12, 2] = 0, np.float32(2.0**-141)
    rows[13] = np.arange(32) + 0.5
    rows[13, 0] = 127
    rows[14] = -rows[13]
    rows[15] = np.arange(32) * 14
    rows[15, 31] = 448
    rows[16] = 2.0 ** (np.arange(32) - 16.0)
    rows[17] *= np.float32(1e-7)
    rows[18] *= np.float32(1e9)
    rows[19], rows[19, 0] = np.float32(2.0**-9), 448  # ties and subnormal numbers of E4M3
    rows[19, 1:9] *= np.arange(8, dtype=np.float32) + 0.5
    rows[20, 0], rows[20, 1] = np.nan, np.inf
    return rows.reshape(-1)


@every_isa
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *((n, (k, 1, 32, 24)) for n in ("scaled_f8_e4m3", "scaled_f8_e5m2", "scaled_i8") for k in range(4)),
        ("scaled_f8_e4m3", (F32_SCALES, 1, 32, 24, 1)),
        ("scaled_i8", (F32_SCALES, 24, 32, 24)),
        ("q8_0", ()),
    ],
)
def test_numbers(isa, name, parameters):
    x = special()
    step = combine_step(24, 32, [Row(0)], [F32])
    [sums] = sums_of(step, [x.view(np.uint8)], isa)
    want = encode(name, sums, 32, parameters)
    [got], _ = encoded(step, [x.view(np.uint8)], Encoder(name, 32, parameters), isa, want[1].size)
    np.testing.assert_array_equal(np.frombuffer(got[1], np.uint8), want[1])
    np.testing.assert_array_equal(np.frombuffer(got[0], np.uint8), want[0])


def test_numbers_of_q8_0_are_those_of_gguf():
    """NaN, Inf and subnormal numbers among them."""
    quants = pytest.importorskip("gguf.quants")
    x = special()
    with np.errstate(all="ignore"):
        want = quants.quantize(x.reshape(-1, 32), quants.GGMLQuantizationType.Q8_0).reshape(-1)
    np.testing.assert_array_equal(encode("q8_0", x, 32)[0], want)


def test_scales_by_hand():
    """What is in docs/NUMERICS.md, number by number."""
    x = np.zeros((6, 32), np.float32)
    x[0, :3] = 448, -3.5, np.nan
    x[1, :3] = 896, -np.inf, 1
    x[2, 0] = np.float32(449)
    x[3, 0] = 1e-45
    codes, scales = encode("scaled_f8_e4m3", x, 32, (F32_SCALES, 1, 32, 6))
    rows = codes.reshape(6, 32)
    assert scales.view(np.float32).tolist() == [1.0, 2.0, float(np.float32(449) / np.float32(448)), 2.0**-149, 1.0, 1.0]
    assert rows[0, :4].tolist() == [0x7E, 0xC6, 0x7F, 0]  # 448, -3.5, NaN, 0
    assert rows[1, :3].tolist() == [0x7E, 0x7F, 0x30]  # -Inf is NaN in E4M3; 1 / 2
    assert rows[2, 0] == 0x7E
    assert rows[3, 0] == 0x38  # 1e-45 is 2^-149, and its scale no less: 1
    _, exponents = encode("scaled_f8_e4m3", x, 32, (E8M0_SCALES, 1, 32, 6))
    assert exponents.tolist() == [127, 128, 128, 0, 127, 127]
    codes, scales = encode("scaled_f8_e5m2", x, 32, (F32_SCALES, 1, 32, 6))
    assert codes.reshape(6, 32)[1, 1] == 0xFC  # -Inf
    codes, scales = encode("scaled_i8", x, 32, (F32_SCALES, 1, 32, 6))
    assert np.isnan(scales.view(np.float32)[:2]).all()
    assert not codes.reshape(6, 32)[:2].any()


@pytest.mark.parametrize("geometry", ["blocks", "power of two", "rows", "rows in bf16", "mxfp8", "a scale"])
@every_name
def test_error_is_half_a_step(name, geometry):
    """Of the quantised numbers against the float32 sums.

    Codes round x / scale to nearest: the error is half the spacing of codes there, times the scale. The division's and
    the multiplication's own roundings are 2^-24 of the number each; a scale that was rounded down makes the largest
    numbers saturate, by the 2^-9 (BF16) of 448, which is less than half of the spacing there.
    """
    rows, columns, parameters = GEOMETRIES[geometry]
    x = np.random.default_rng(5).normal(size=rows * columns).astype(np.float32)
    codes, stored_scales = encode(name, x, columns, parameters)
    numbers, spacing = decoded(name, codes, stored_scales, rows, columns, parameters)
    error = np.abs(numbers - x.astype(np.float64))
    assert (error <= spacing / 2 + np.abs(x) * 2.0**-22).all()


def decoded(
    name: str, codes: Array, scales: Array, rows: int, columns: int, parameters: Sequence[int]
) -> tuple[Array, Array]:
    """What codes and scales stand for, and the distance of neighbouring numbers there, in float64."""
    kind, down, across, matrix, *_ = parameters
    if kind == E8M0_SCALES:
        values = np.ldexp(1.0, scales.astype(int) - 127)
    else:
        values = reference.widen(scales, (F32, F16, BF16)[kind]).astype(np.float64)
    grid = values.reshape(-1, -(-matrix // down), -(-columns // across))
    each = grid.repeat(down, axis=1)[:, :matrix].repeat(across, axis=2)[:, :, :columns].reshape(-1)
    if name == "scaled_i8":
        return codes.view(np.int8) * each, each
    dtype = F8_E4M3 if name == "scaled_f8_e4m3" else F8_E5M2
    assert dtype.layout is not None
    numbers = reference.widen(codes, dtype).astype(np.float64)
    least = 1 - dtype.layout.bias
    exponents = np.maximum(np.frexp(numbers)[1] - 1, least)
    return numbers * each, np.ldexp(1.0, exponents - dtype.layout.mantissa) * each


# --- known magnitudes ------------------------------------------------------------------------------------------------


@every_isa
@every_name
@pytest.mark.parametrize("kind", ["several outputs", "masked, by rank"])
@pytest.mark.parametrize("geometry", ["a scale", "a scale for each expert", "one"])
def test_magnitudes_that_are_measured_first(isa, name, kind, geometry):
    """A step measures the largest magnitudes of sums, and another encodes with them: the same bytes as in one."""
    rows, columns, parameters = GEOMETRIES[geometry]
    tensors = inputs_of(rows, columns, 3)
    step = kinds(rows, columns)[kind]()
    sums = sums_of(step, tensors, isa)
    encoder = Encoder(name, columns, parameters)
    scales = 4 * scale_count(rows, columns, parameters)
    places = tuple((k, 0) for k in step.sinks)
    survey = LargestMagnitudes(
        inputs=step.inputs, numel=step.numel, columns=columns, of=replace(step, encoder=replace(encoder, scales=places))
    )
    sinks = [("memory", 0, 0)] * len(sums)
    for threads, read_bytes in ((1, 4096), (3, 65536)):
        options: Any = {"threads": threads, "read_bytes": read_bytes}
        pump = run(isa, [survey], memory_of(tensors), sinks, **options)
        [(reals, _)] = pump.answers()
        want = [np.abs(x.reshape(-1, parameters[3] * columns)).max(axis=1) for x in sums]
        np.testing.assert_array_equal(np.asarray(reals), np.concatenate(want))
        known = replace(encoder, magnitudes=tuple(reals))
        got, _ = encoded(step, tensors, known, isa, scales, **options)
        for (codes, stored_scales), x in zip(got, sums, strict=True):
            assert (codes, stored_scales) == tuple(part.tobytes() for part in encode(name, x, columns, parameters))


# --- files, statistics, errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 7])
def test_several_steps_into_one_file(tmp_path, threads):
    """Codes and scales of tensors beside one that is not encoded, at odd offsets: nothing else of the file changes."""
    plans = [("scaled_f8_e4m3", "edges"), ("scaled_i8", "rows"), ("", "rows"), ("scaled_f8_e4m3", "mxfp8")]
    sources: list[Any] = []
    every, expected, at = [], bytearray(b"\x5b" * 3), 3
    for name, geometry in plans:
        rows, columns, parameters = GEOMETRIES[geometry]
        tensors = inputs_of(rows, columns)
        step = combine_step(rows, columns, [HALF])
        [sums] = sums_of(step, tensors, backends.usable()[0])
        inputs = tuple(Stored(len(sources) + i, 0, code(F32)) for i in range(2))
        sources += tensors
        codes, scales = (
            encode(name, sums, columns, parameters) if name else (sums.view(np.uint8), np.zeros(0, np.uint8))
        )
        encoder = Encoder(name, columns, parameters, ((0, at + codes.size + 5),)) if name else None
        every.append(replace(step, inputs=inputs, offsets=(at,), encoder=encoder))
        expected += codes.tobytes() + b"\x5b" * 5 + scales.tobytes() + b"\x5b" * 2
        at = len(expected)
    path = tmp_path / "out"
    path.write_bytes(b"\x5b" * at)
    fd = os.open(path, os.O_RDWR)
    try:
        run("", every, memory_of(sources), [fd], threads=threads)
    finally:
        os.close(fd)
    assert path.read_bytes() == bytes(expected)


@every_isa
def test_statistics(isa):
    """How much of the change codes preserved: of sampled chunks, against what they stand for."""
    rows, columns, parameters = GEOMETRIES["edges"]
    tensors = inputs_of(rows, columns)
    step = combine_step(rows, columns, [HALF, Row(0)])
    p, x = (a.view(np.float32).astype(np.float64) for a in (tensors[0], sums_of(step, tensors, isa)[0].view(np.uint8)))
    got, pump = encoded(
        step, tensors, Encoder("scaled_f8_e4m3", columns, parameters), isa, 4 * scale_count(rows, columns, parameters),
        stats_every=3,
    )  # fmt: skip
    [[stats, copied]] = pump.stats()
    codes, scales = (np.frombuffer(part, np.uint8) for part in got[0])
    numbers, _ = decoded("scaled_f8_e4m3", codes, scales, rows, columns, parameters)
    sampled = np.arange(x.size) // 16384 % 3 == 0
    d, o, p = (x - p)[sampled], (numbers - p)[sampled], p[sampled]
    assert stats["sampled"] == sampled.sum()
    assert stats["changed"] == np.count_nonzero(numbers[sampled].astype(np.float32) != p.astype(np.float32))
    assert stats["sum_pp"] == pytest.approx((p * p).sum(), rel=1e-9)
    assert stats["sum_dd"] == pytest.approx((d * d).sum(), rel=1e-5)  # differences are float32
    assert stats["sum_od"] == pytest.approx((o * d).sum(), rel=1e-3)
    assert copied["sampled"] == 0


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (Encoder("nothing", 4, (0, 1, 4, 2), ((1, 0),)), "no such encoder: nothing"),
        (Encoder("scaled_i8", 0, (0, 1, 4, 2), ((1, 0),)), "an encoder has a name, and columns"),
        (Encoder("scaled_i8", 4, (0, 1, 4), ((1, 0),)), "the parameters of scaled_i8 are"),
        (Encoder("scaled_i8", 4, (4, 1, 4, 2), ((1, 0),)), "the parameters of scaled_i8 are"),
        (Encoder("scaled_i8", 4, (0, 1, 4, 3), ((1, 0),)), "whole matrices"),
        (Encoder("scaled_i8", 4, (0, 1, 4, 2), ((2, 0),)), "the sink of scales is none of the sinks"),
        (Encoder("scaled_i8", 4, (0, 1, 4, 2)), "scales have a place"),
        (Encoder("scaled_i8", 4, (0, 1, 4, 2), ((1, 0), (1, 0))), "a place for the scales of every output"),
        (Encoder("scaled_i8", 4, (0, 1, 4, 2), ((1, 0),), (1.0, 2.0)), "magnitudes are known of each matrix"),
        (Encoder("q8_0", 4), "a row whole blocks of q8_0"),
    ],
)
def test_what_is_refused(encoder, words):
    step = replace(combine_step(2, 4, [HALF]), encoder=encoder)
    with pytest.raises(ValueError, match=words):
        Pump([("memory", 0, 0)] * 2, [("memory", 0, 0)] * 2, [step], PumpOptions())


def test_stochastic_rounding_and_other_dtypes_are_refused():
    step = replace(combine_step(2, 4, [HALF]), encoder=Encoder("scaled_i8", 4, (0, 1, 4, 2), ((1, 0),)), keys=(7,))
    with pytest.raises(ValueError, match="codes are rounded to nearest"):
        Pump([("memory", 0, 0)] * 2, [("memory", 0, 0)] * 2, [step], PumpOptions(stochastic=True))
    with pytest.raises(ValueError, match="what is encoded is float32"):
        Pump([("memory", 0, 0)] * 2, [], [replace(step, out_dtype=code(BF16))], PumpOptions())
