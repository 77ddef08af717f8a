"""Masked sums: every instruction set gives the bytes of the reference, through the pump."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from fastinterp.ops.combine import philox_key
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, MERGING, DType
from fastinterp.ops.masked import NOTHING, read_inputs
from fastinterp.ops.operands import Stored
from fastinterp.ops.requests import ALL_BITS, Mask, MaskedCombine, Score
from fastinterp.ops.steps import CopyEqual
from fastinterp.reference import masked as reference_masked
from tests.support import backends
from tests.support.cases import Guarded
from tests.support.pumps import Raw, code, guarded, masked_step, memory, raws, run

every_isa = pytest.mark.parametrize("isa", backends.usable())
COUNTS = ("nan_in", "inf_in", "nan_out", "inf_out", "sampled", "changed")
NAME, SEED = "layers.0.weight", 12345

Shape = tuple[int, ...]


def native(
    isa: str,
    data: Sequence[Raw],
    dtypes: Sequence[DType],
    asks: Sequence[MaskedCombine],
    out_dtype: DType,
    shape: Shape,
    **options: Any,
) -> tuple[list[Raw], list[dict[str, float]]]:
    """Several outputs from one read of the inputs that they need."""
    used = sorted(set().union(*(read_inputs(ask) for ask in asks)))
    numel = math.prod(shape)
    sources = guarded(data)
    sinks = [Guarded(numel * out_dtype.bits // 8, 5 + k) for k in range(len(asks))]
    keys = [philox_key(SEED, 0, NAME)] * len(asks)
    step = masked_step(asks, dtypes, out_dtype, shape, name=NAME, seed=SEED, keys=keys)
    pump = run(isa, [step], memory(sources), memory(sinks), **options)
    assert all(b.intact() for b in (*sources, *sinks))
    assert pump.bytes_read == sum(data[i].size for i in used)
    return [s.view.copy() for s in sinks], pump.stats()[0]


def check(
    isa: str,
    data: Sequence[Raw],
    dtypes: Sequence[DType],
    asks: Sequence[MaskedCombine],
    out_dtype: DType,
    shape: Shape,
    *,
    rounding: str = "nearest",
    fp8_overflow: str = "saturate",
    **options: Any,
) -> None:
    options |= {"stochastic": rounding == "stochastic", "fp8_saturate": fp8_overflow == "saturate"}
    got, stats = native(isa, data, dtypes, asks, out_dtype, shape, **options)
    for k, ask in enumerate(asks):
        want, counts = reference_masked.masked(
            data, dtypes, ask, out_dtype, shape, name=NAME, seed=SEED, rounding=rounding, fp8_overflow=fp8_overflow,
            stats_every=2,
        )  # fmt: skip
        backends.assert_same_bits(want, got[k], out_dtype, f"{ask}")
        assert {name: stats[k][name] for name in COUNTS} == {name: getattr(counts, name) for name in COUNTS}
        for name in ("sum_pp", "sum_dd", "sum_od"):
            expected = getattr(counts, name)
            if counts is not None and math.isfinite(counts.scale_od) and math.isfinite(expected):
                scale = counts.scale_od if name == "sum_od" else expected
                assert stats[k][name] == pytest.approx(expected, abs=counts.sampled * 2.0**-52 * scale, rel=0)


def least_of(data: Sequence[Raw], dtypes: Sequence[DType], share: float) -> list[int]:
    """Per input, the magnitude that the given share of its deltas lies below."""
    found = [0]
    for d in reference_masked.deltas(data, dtypes):
        mag = np.sort(reference_masked.magnitudes(d))
        found.append(int(mag[int(share * (mag.size - 1))]) if mag.size else 0)
    return found


def options_of(data: Sequence[Raw], dtypes: Sequence[DType], shape: Shape) -> dict[str, dict[str, Any]]:
    """What a masked sum may be asked for, each by its name, for n inputs of which the first is the base."""
    n, rows = len(data), math.prod(shape[:-1])
    low, high = least_of(data, dtypes, 0.3), least_of(data, dtypes, 0.9)
    signs = [(-1.0) ** (i // 3) for i in range(n)]
    factors = array("f", (0.25 + 0.5 * (r % 4) for r in range(rows))).tobytes()
    return {
        "least": {"masks": tuple(Mask(min_bits=v) for v in low)},
        "band": {"masks": tuple(Mask(min_bits=v, max_bits=w) for v, w in zip(low, high, strict=True))},
        "random": {"masks": (Mask(), *(Mask(probability=0.3 + 0.6 * i / n) for i in range(1, n)))},
        "ranks": {"masks": (Mask(), *(Mask(probability=0.5, rank_slope=0.1 * i / n) for i in range(1, n)))},
        "clipped": {"masks": (Mask(), *(Mask(low[i], high[i], 0.9, 0.3) for i in range(1, n)))},
        "sign_weights": {"sign_weights": tuple(s * (1 + 0.25 * i) for i, s in enumerate(signs))},
        "some_vote": {"sign_weights": (0.0, 1.0, *(0.0 if i % 2 else 1.0 for i in range(2, n)))},
        "shares": {"shares": tuple(0.5 * s for s in signs), "least_share": 0.75, "other_share": 0.5},
        "sole_weights": {"sole_weights": tuple(2.0 + 0.1 * i for i in range(n))},
        "limit": {"limit": float(np.array(high[1], np.uint32).view(np.float32)) if high[1] < 0x7F800000 else 1.0},
        "variance": {"score": Score("variance", b"", 0x3B000000)},
        "divergence": {"score": Score("divergence", factors, high[1])},
    }


def ask_of(n: int, *options: dict[str, Any]) -> MaskedCombine:
    merged: dict[str, Any] = {"weights": (0.0, *((0.6, -0.3, 1.1)[i % 3] for i in range(n - 1)))}
    for option in options:
        merged |= option
    return MaskedCombine(**merged)


OPTIONS = tuple(options_of(raws("normal", [F32] * 3, 6), [F32] * 3, (2, 3)))
COMBINED = (
    ("least", "sign_weights", "shares"),
    ("random", "sign_weights", "shares"),
    ("ranks", "sign_weights", "shares"),
    ("clipped", "some_vote", "sole_weights"),
    ("variance", "sign_weights", "shares"),
    ("band", "sole_weights", "limit", "divergence"),
    ("random", "some_vote", "shares", "sole_weights", "variance", "limit"),
)
CHOICES = [pytest.param(names, id="+".join(names)) for names in [(), *((o,) for o in OPTIONS), *COMBINED]]


@every_isa
@pytest.mark.parametrize("names", CHOICES)
@pytest.mark.parametrize("kind", ["close", "patterns"])
def test_each_option_alone_and_combined(isa, names, kind):
    """Three outputs of one read, of two to four models; `close` has ties and zeros, `patterns` every NaN and Inf."""
    dtypes, shape = [BF16, F16, BF16, F32], (7, 701)
    data = raws(kind, dtypes, math.prod(shape))
    choices = options_of(data, dtypes, shape)
    asks = [ask_of(4, *(choices[name] for name in names))]
    few = {name: options_of(data[:n], dtypes[:n], shape) for n, name in ((2, "two"), (3, "three"))}
    for n, own in zip((2, 3), few.values(), strict=True):
        asks.append(ask_of(n, *(own[name] for name in names)))
    check(isa, data, dtypes, asks, BF16, shape)


@every_isa
@pytest.mark.parametrize("out", MERGING, ids=str)
@pytest.mark.parametrize("dtype", MERGING, ids=str)
def test_every_dtype(isa, dtype, out):
    dtypes, shape = [dtype, BF16, dtype], (3, 331)
    data = raws("patterns", dtypes, math.prod(shape))
    choices = options_of(data, dtypes, shape)
    names = (("least", "sign_weights", "shares"), ("clipped", "sole_weights", "limit"), ("variance", "sign_weights"))
    asks = [ask_of(3, *(choices[name] for name in some)) for some in names]
    policy = "saturate" if dtype.bits > 8 else "nonfinite"
    check(isa, data, dtypes, asks, out, shape, fp8_overflow=policy)
    check(isa, data, dtypes, asks[:1], out, shape, rounding="stochastic", fp8_overflow=policy)


SHAPES: tuple[Shape, ...] = (
    (), (0,), (1,), (255,), (256,), (257,), (16383,), (16384,), (16385,), (0, 5), (5, 0), (7, 1), (100, 3), (17, 1000),
    (2, 70000), (3, 2, 11), (40009,),
)  # fmt: skip


@every_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size(isa, shape):
    """Rows of 1 to 70000 elements, ranked; spans of the pump that end in the middle of a row."""
    dtypes = [BF16] * 3
    data = raws("close", dtypes, math.prod(shape))
    choices = options_of(data, dtypes, shape)
    asks = [
        ask_of(3, choices["ranks"], choices["sign_weights"]),
        ask_of(3, choices["random"]),
        ask_of(3, choices["clipped"]),
    ]
    if math.prod(shape):
        asks[1] = dataclasses.replace(asks[1], score=choices["divergence"]["score"])
    check(isa, data, dtypes, asks, BF16, shape)
    check(isa, data, dtypes, asks[1:2], BF16, shape)


@every_isa
def test_many_inputs(isa):
    dtypes, shape = [BF16, F32, F16, BF16, F64, BF16, F8_E4M3, F8_E5M2, BF16], (13, 97)
    data = raws("normal", dtypes, math.prod(shape))
    choices = options_of(data, dtypes, shape)
    check(isa, data, dtypes, [ask_of(9, choices["ranks"], choices["sign_weights"], choices["shares"])], F32, shape)
    check(isa, data, dtypes, [ask_of(9, choices["variance"], choices["sole_weights"])], BF16, shape)


BIG: Shape = (1601, 1009)


@pytest.mark.slow
@every_isa
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("ranks", [False, True])
def test_threads_do_not_change_bits(isa, threads, ranks, big):
    """Several blocks, whose edges lie in the middle of elements and rows; a file that begins at an odd place."""
    data, wants = big
    ask, want = wants[ranks]
    sources = guarded(data)
    sink = Guarded(want.size + 3, 0)
    step = replace(masked_step([ask], [BF16] * 3, BF16, BIG, name=NAME, seed=SEED), offsets=(3,))
    run(isa, [step], memory(sources), memory([sink]), threads=threads, read_bytes=1 << 16, write_bytes=1 << 17)
    backends.assert_same_bits(want, sink.view[3:], BF16, f"{threads} threads")
    assert sink.intact()


@pytest.fixture(scope="module")
def big() -> tuple[list[Raw], list[tuple[MaskedCombine, Raw]]]:
    dtypes = [BF16] * 3
    data = raws("close", dtypes, math.prod(BIG))
    choices = options_of(data, dtypes, BIG)
    asks = [ask_of(3, choices[mask], choices["sign_weights"], choices["shares"]) for mask in ("least", "ranks")]
    return data, [(ask, reference_masked.masked(data, dtypes, ask, BF16, BIG, name=NAME, seed=SEED)[0]) for ask in asks]


@every_isa
@pytest.mark.parametrize("write", [4096, 1 << 17])
def test_files_and_rows_longer_than_reads_and_writes(isa, write, tmp_path):
    """Between two other tensors of the same file, with rows of 70000 elements that are ranked."""
    shape, dtypes = (3, 70000), [BF16, F32]
    data = raws("close", dtypes, math.prod(shape))
    ask = ask_of(2, options_of(data, dtypes, shape)["ranks"])
    edge = np.arange(5001, dtype=np.uint8)
    for i, raw in enumerate((*data, edge)):
        raw.tofile(tmp_path / str(i))
    size = math.prod(shape) * 2
    masked = replace(masked_step([ask], dtypes, BF16, shape, name=NAME, seed=SEED), offsets=(edge.size,))
    before, after = (
        CopyEqual(inputs=(Stored(2, 0, code(F8_E4M3)),), numel=edge.size, sinks=(0,), offsets=(at,))
        for at in (0, edge.size + size)
    )
    steps = [before, masked, after]
    with open(tmp_path / "out", "wb") as out:
        sources = [open(tmp_path / str(i), "rb") for i in range(3)]  # noqa: SIM115
        run(isa, steps, [s.fileno() for s in sources], [out.fileno()], write_bytes=write)
        for source in sources:
            source.close()
    want, _ = reference_masked.masked(data, dtypes, ask, BF16, shape, name=NAME, seed=SEED)
    got = np.fromfile(tmp_path / "out", np.uint8)
    backends.assert_same_bits(np.concatenate([edge, want, edge]), got, F8_E4M3, "file")


# --- special values --------------------------------------------------------------------------------------------------


def of(*values: Any) -> list[Raw]:
    return [np.array(v, np.float32).view(np.uint8) for v in values]


def values(isa: str, data: list[Raw], ask: MaskedCombine) -> list[Any]:
    """What the reference and this instruction set make of a row of F32."""
    dtypes, shape = [F32] * len(data), (data[0].size // 4,)
    check(isa, data, dtypes, [ask], F32, shape)
    return list(reference_masked.masked(data, dtypes, ask, F32, shape, name=NAME, seed=SEED)[0].view(np.float32))


@every_isa
def test_votes_that_cancel_elect_plus(isa):
    data = of([0, 0, 0], [1, -1, 0], [-1, 1, 0])
    assert values(isa, data, ask_of(3, {"weights": (0, 1, 1), "sign_weights": (0, 1, 1)})) == [1, 1, 0]


@every_isa
def test_a_nan_passes_the_vote_only_where_it_is_kept(isa):
    data = of([0, 0], [math.nan, math.nan], [-1, -1])
    ask = ask_of(3, {"weights": (0, 1, 1), "sign_weights": (0, 1, 1)})
    assert np.isnan(values(isa, data, ask)).all()
    dropped = dataclasses.replace(ask, masks=(Mask(), Mask(max_bits=ALL_BITS - 1), Mask()))
    assert values(isa, data, dropped) == [-1, -1]


@every_isa
def test_shares_that_are_small_count_as_another(isa):
    data = of([0, 0, 0], [1, 0, 2], [0, 1, 2])
    masks = {"masks": (Mask(), Mask(min_bits=1), Mask(min_bits=1))}
    ask = ask_of(3, masks, {"weights": (0, 1, 1), "shares": (0, 0.5, 2), "least_share": 1.0, "other_share": 4.0})
    assert values(isa, data, ask) == [0.25, 0.5, 1.6000000238418579]
    cancelled = dataclasses.replace(ask, shares=(0, 1, -1), least_share=0.0)
    assert values(isa, data, cancelled) == [1, -1, 1]


@every_isa
def test_only_one_that_takes_part(isa):
    data = of([0, 0, 0], [1, 0, 2], [0, 1, 2])
    masks = {"masks": (Mask(), Mask(min_bits=1), Mask(min_bits=1))}
    ask = ask_of(3, masks, {"weights": (0, 0.5, 0.5), "sole_weights": (0, 8, 16)})
    assert values(isa, data, ask) == [8, 16, 2]


@every_isa
def test_all_equal_zeros_and_nothing_kept(isa):
    """Every magnitude in one run: all have the mean rank, and so the same chance."""
    same = of([1.0] * 1000, [1.5] * 1000, [1.0] * 1000)
    ranked = ask_of(3, {"weights": (0, 1, 1), "masks": (Mask(),) + 2 * (Mask(probability=0.5, rank_slope=0.5),)})
    share = np.mean(np.array(values(isa, same, ranked)) == 1.5)
    assert 0.4 < share < 0.6
    assert values(isa, same, dataclasses.replace(ranked, masks=(Mask(), NOTHING, NOTHING))) == [1.0] * 1000
    assert (
        values(isa, same, dataclasses.replace(ranked, masks=(Mask(), Mask(min_bits=5, max_bits=4), NOTHING)))[0] == 1.0
    )


@every_isa
def test_chance_rises_with_the_rank(isa):
    """From never for the smallest of a row to always for the largest."""
    base, x = np.zeros(100001), np.random.default_rng(1).permutation(100001) / 100000
    ask = ask_of(2, {"weights": (0.0, 1.0), "masks": (Mask(), Mask(probability=0.5, rank_slope=0.5))})
    out = np.array(values(isa, of(base, x), ask))
    for tenth in range(10):
        inside = (x >= tenth / 10) & (x < (tenth + 1) / 10)
        rate, chance = np.mean(out[inside] != 0), tenth / 10 + 0.05
        assert abs(rate - chance) < 5 * math.sqrt(chance * (1 - chance) / inside.sum())


@every_isa
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "patterns"])
def test_importance(isa, dtype, kind):
    dtypes, shape = [dtype] * 6, (3, 700)
    data = raws(kind, dtypes, math.prod(shape))
    asks = [
        MaskedCombine((0.5, 0.25, 0.25), importance=(3, 4, 5)),
        MaskedCombine((0.0, 1.0, 0.0), importance=(3, 4, 5)),
        MaskedCombine((1.0, -1.0), importance=(5, 5), limit=0.5),
    ]
    check(isa, data, dtypes, asks, dtype, shape)


def test_importances_that_cancel_leave_the_base():
    for isa in backends.usable():
        data = of([1, 2], [5, 6], [1, 1])
        ask = MaskedCombine((1.0, -1.0), importance=(2, 2))
        assert values(isa, data, ask) == [1, 2]
