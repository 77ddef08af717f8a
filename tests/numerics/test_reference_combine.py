"""The reference's combine, against results worked out by hand, exact properties, and what is known of bf16."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastinterp.ops.combine import Combine, Row, philox_key
from fastinterp.ops.contract import CHUNK
from fastinterp.ops.dtypes import BF16, F8_E4M3, F32, F64, MERGING, DType
from fastinterp.reference.combine import combine, narrow, widen
from tests.support.cases import fill


def raw(values: list[float] | np.ndarray, dtype: DType) -> np.ndarray:
    return narrow(np.array(values, np.float64), dtype).view(np.uint8)


def run(row: Row, inputs: list[np.ndarray], dtypes: list[DType], out: DType, **options):
    outs, stats = combine(inputs, dtypes, [row], out, **options)
    return outs[0], stats[0]


@pytest.mark.parametrize("dtype", MERGING, ids=str)
def test_end_points_bit_for_bit(dtype):
    """alpha 0 and 1 return the models' bytes: NaN payloads, -0 and subnormals included."""
    rng = np.random.default_rng(0)
    a, b = (fill("patterns", dtype, 5000, i, rng).view(np.uint8) for i in range(2))
    for t, want in ((0.0, a), (1.0, b)):
        for row in (Combine((1 - t, t), sums_to_one=True).row(), Combine((0.0, t), base=0).row()):
            assert np.array_equal(run(row, [a, b], [dtype, dtype], dtype)[0], want)


def test_signs_of_zero():
    """A copy to another dtype adds nothing; a sum does: -0 + (+0) is +0."""
    x = raw([-0.0, 0.0], F32)
    assert run(Row(0), [x], [F32], BF16)[0].view(np.uint16).tolist() == [0x8000, 0]
    assert run(Row(0, 2.0), [x], [F32], BF16)[0].view(np.uint16).tolist() == [0, 0]
    assert run(Row(0, 1.0, ((1, 0.5),)), [x, x], [F32] * 2, F32)[0].view(np.uint32).tolist() == [0, 0]


def test_a_total_of_0_makes_zeros():
    """All weights 0: +0 for every finite element, whatever its sign; 0 times NaN or Inf is NaN."""
    row = Combine((0.0, 0.0)).row()
    assert row == Row(0, 0.0)
    x = raw([1.0, -1.0, -0.0, -3e38, math.inf, math.nan], F32)
    out, _ = run(row, [x], [F32], F32)
    assert out.view(np.uint32).tolist() == [0, 0, 0, 0, 0x7FC00000, 0x7FC00000]


def test_a_total_that_rounds_to_1_is_no_copy():
    """Whether a row is a copy is decided before its total is rounded to float32."""
    x = np.array([0x80000000, 0x7F800001], np.uint32).view(np.uint8)
    assert run(Row(0, 1 + 2.0**-40), [x], [F32], F32)[0].view(np.uint32).tolist() == [0, 0x7FC00000]


def test_each_row_has_its_own_compute_dtype():
    """float64 is used where a row reads F64, and only there."""
    a, b, c = raw([1.0], F32), raw([0.1], F32), raw([0.1], F64)
    rows = [Row(0, 1.0, ((1, 0.3),)), Row(0, 1.0, ((2, 0.3),))]
    outs, _ = combine([a, b, c], [F32, F32, F64], rows, F64)
    alone, _ = combine([a, b], [F32, F32], rows[:1], F64)
    assert np.array_equal(outs[0], alone[0])
    assert float(outs[0].view(np.float64)[0]) == float(np.float32(outs[0].view(np.float64)[0]))
    assert abs(float(outs[1].view(np.float64)[0]) - 0.73) < 1e-15


def test_terms_are_summed_in_their_order():
    """1 + 2**30 - 2**30 in float32 depends on the order, so the recipe's order is part of the contract."""
    x = [raw([v], F32) for v in (0.0, 1.0, 2.0**30, -(2.0**30))]
    lost = run(Row(0, 1.0, ((1, 1.0), (2, 1.0), (3, 1.0))), x, [F32] * 4, F32)[0]
    kept = run(Row(0, 1.0, ((2, 1.0), (3, 1.0), (1, 1.0))), x, [F32] * 4, F32)[0]
    assert (lost.view(np.float32)[0], kept.view(np.float32)[0]) == (0.0, 1.0)


def test_statistics_by_hand():
    """p = 1, 2, NaN, 4 and x = 3, 2, 1, Inf at t = 1/2, stored in E4M3: out = 2, 2, NaN, NaN."""
    p, x = raw([1, 2, math.nan, 4], F32), raw([3, 2, 1, math.inf], F32)
    out, stats = run(Row(0, 1.0, ((1, 0.5),)), [p, x], [F32] * 2, F8_E4M3, stats_every=1)
    assert out.tolist() == [0x40, 0x40, 0x7F, 0x7F]
    assert (stats.nan_in, stats.inf_in, stats.nan_out, stats.inf_out) == (1, 1, 2, 0)
    assert (stats.sampled, stats.changed) == (4, 2)  # NaN stays NaN; 1 became 2, and 4 became NaN
    assert math.isnan(stats.sum_pp) and math.isnan(stats.sum_od)
    _, finite = run(Row(0, 1.0, ((1, 0.5),)), [p[:8], x[:8]], [F32] * 2, F8_E4M3, stats_every=1)
    assert (finite.sum_pp, finite.sum_dd, finite.sum_od) == (5.0, 1.0, 1.0)
    _, scaled = run(Row(0, 3.0, ((1, 0.5),)), [p[:8], x[:8]], [F32] * 2, F32, stats_every=1)
    assert (scaled.sum_pp, scaled.sum_dd, scaled.sum_od) == (5.0, 25.0, 25.0)  # y = 4, 6: D = 3, 4


def test_the_intended_change_is_taken_before_it_is_added():
    """D = acc if total is 1, however little of it y shows; else y - p. out - p is rounded to the compute dtype too."""
    p, x = raw([1.0, 2.0**-30], F32), raw([1 + 2.0**-20, 2.0], F32)
    for total, sum_dd in ((1.0, 2.0**-80), (1 + 2.0**-40, 0.0)):  # the second is 1 once rounded, and yet is not 1
        _, stats = run(Row(0, total, ((1, 2.0**-20),)), [p[:4], x[:4]], [F32] * 2, F32, stats_every=1)
        assert (stats.sum_dd, stats.sum_od, stats.changed) == (sum_dd, 0.0, 0)
    _, stats = run(Row(0, 1.0, ((1, 0.5),)), [p[4:], x[4:]], [F32] * 2, BF16, stats_every=1)
    assert stats.sum_od == 1.0  # of out - p = 1 - 2**-30


def test_changed_compares_with_the_pivot_stored_under_the_same_policy():
    p, x = raw([1e9], F32), raw([2e9], F32)
    for policy, code in (("nonfinite", 0x7F), ("saturate", 0x7E)):
        out, stats = run(Row(0, 1.0, ((1, 0.5),)), [p, x], [F32] * 2, F8_E4M3, fp8_overflow=policy, stats_every=1)
        assert out.tolist() == [code] and stats.changed == 0


def test_statistics_sample_whole_chunks_of_the_tensor():
    """Chunk c of the tensor, not of the piece, is sampled iff c % stats_every == 0; counts cover every element."""
    n = 3 * CHUNK + 10
    p, x = np.zeros(n, np.float32), np.full(n, np.nan, np.float32)
    x[: 3 * CHUNK] = 1.0
    row, dtypes = Row(0, 1.0, ((1, 0.5),)), [F32, F32]
    for first, every, sampled in ((0, 1, n), (0, 2, 2 * CHUNK), (0, 4, CHUNK), (0, 0, 0)):
        _, stats = run(row, [p.view(np.uint8), x.view(np.uint8)], dtypes, BF16, first=first, stats_every=every)
        assert (stats.sampled, stats.nan_in, stats.nan_out) == (sampled, 10, 10)
    _, stats = run(row, [p.view(np.uint8), x.view(np.uint8)], dtypes, BF16, first=CHUNK - 5, stats_every=2)
    assert stats.sampled == 5 + CHUNK + 5  # the last 5 elements of chunk 0, chunk 2, the first 5 of chunk 4


def test_copies_are_not_measured():
    x = raw([1.0, math.nan], F32)
    assert run(Row(0), [x], [F32], F32)[1] is None
    assert run(Row(0), [x], [F32], BF16)[1] is None


@pytest.mark.parametrize("power", [-3, 1, 5])
def test_scaling_by_a_power_of_two_scales_the_output(power):
    """Exact, as long as nothing leaves the range: rounding commutes with it."""
    rng = np.random.default_rng(11)
    x = [rng.normal(0, 0.02, 4000) for _ in range(3)]
    row = Combine((0.2, 0.5, 0.4)).row()
    plain, _ = run(row, [raw(v, BF16) for v in x], [BF16] * 3, BF16)
    scaled, _ = run(row, [raw(v * 2.0**power, BF16) for v in x], [BF16] * 3, BF16)
    assert np.array_equal(widen(plain, BF16) * np.float32(2.0**power), widen(scaled, BF16))


def test_pivot_form_is_almost_always_correctly_rounded():
    """Of an average of three close bf16 models, at most 1 element in 2000 differs from the exact result rounded."""
    rng = np.random.default_rng(12)
    base = rng.normal(0, 0.02, 100000)
    x = [raw(base + rng.normal(0, 2e-4, base.size), BF16) for _ in range(3)]
    out, _ = run(Combine((1 / 3, 1 / 3, 1 / 3), sums_to_one=True).row(), x, [BF16] * 3, BF16)
    exact = np.mean([widen(v, BF16).astype(np.float64) for v in x], axis=0)
    assert np.mean(out.view(np.uint16) != narrow(exact, BF16)) <= 1 / 2000


def test_inputs_of_different_length_and_missing_keys_are_refused():
    with pytest.raises(ValueError, match=r"same number of elements, got \[1, 2\]"):
        combine([raw([1.0], F32), raw([1.0, 2.0], F32)], [F32, F32], [Row(0)], F32)
    with pytest.raises(ValueError, match="2 rows, 1 keys"):
        combine([raw([1.0], F32)], [F32], [Row(0), Row(0)], F32, rounding="stochastic", keys=[1])


# --- the staircase ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fine_tune() -> list[np.ndarray]:
    """bf16 weights of spread 0.02, and a fine-tune that moved them by 1e-5, about one ulp where it shows at all."""
    rng = np.random.default_rng(13)
    base = widen(raw(rng.normal(0, 0.02, 1 << 19), BF16), BF16).astype(np.float64)
    return [raw(base, BF16), raw(base + rng.normal(0, 1e-5, base.size), BF16)]


def effective_alpha(models: list[np.ndarray], alpha: float, out: DType = BF16, rounding: str = "nearest") -> float:
    row = Combine((1 - alpha, alpha), sums_to_one=True).row()
    _, stats = run(row, models, [BF16] * 2, out, rounding=rounding, keys=[philox_key(0, 0, "w")], stats_every=1)
    return alpha * stats.sum_od / stats.sum_dd


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "effective"), [(0.25, 0.06), (0.4, 0.10), (0.6, 0.90), (1.25, 1.06), (1.5, 1.5)])
def test_the_staircase_of_bf16_shows_in_the_statistics(fine_tune, alpha, effective):
    """Rounded to nearest, a small fine-tune hardly moves below 1/2 and jumps above; float32 and stochastic do not."""
    assert effective_alpha(fine_tune, alpha) == pytest.approx(effective, abs=0.015)
    assert effective_alpha(fine_tune, alpha, out=F32) == pytest.approx(alpha, rel=2**-15)
    assert effective_alpha(fine_tune, alpha, rounding="stochastic") == pytest.approx(alpha, abs=0.02)


def test_a_sum_may_choose_its_pivot():
    """The input that is named, in front; the others stay in order. One without a weight is no pivot."""
    assert Combine((0.5, 0.25, 0.0, 2.0), pivot=3).row() == Row(3, 2.75, ((0, 0.5), (1, 0.25)))
    assert Combine((0.5, 0.25, 0.0, 2.0), pivot=2).row() == Combine((0.5, 0.25, 0.0, 2.0)).row()
    assert Combine((0.5, 0.5), sums_to_one=True, pivot=1).row() == Row(1, 1.0, ((0, 0.5),))
