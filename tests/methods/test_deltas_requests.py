"""The methods that thin out deltas, without tensors: what they ask for, and which sum they make of the answers."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest

from fastinterp.errors import MethodError
from fastinterp.methods import find
from fastinterp.methods._float32 import bits_above, bits_from
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.ops.requests import (
    ALL_BITS,
    Divergence,
    Mask,
    MaskedCombine,
    Measure,
    Measured,
    MeasuredMasked,
    MeasureMasked,
    Score,
    Select,
    Selected,
)

T = Tensor("t", (4, 25), model_numel=1000)


def asks(name: str, n: int, *answers: Any, tensor: Tensor = T, **parameters: Any) -> list[Any]:
    """The requests of a method, each given the next answer, and last the sum that it returns.

    parameters  one value for all models, or a tuple; the defaults as recipes fill them in
    """
    method = find(name)
    for p in method.parameters:
        value = parameters.get(p.keyword, p.default)
        parameters[p.keyword] = (value,) * (n - 1) if p.each and not isinstance(value, tuple) else value
    steps = method(n, tensor, **parameters)
    seen = []
    try:
        seen.append(next(steps))
        for answer in answers:
            seen += [steps.send(answer)]
    except StopIteration as end:
        seen.append(end.value)
    return seen


def found(*bits: int) -> tuple[Selected, ...]:
    return tuple(Selected(b, 1) for b in bits)


def test_ties_selects_one_rank_per_model_and_votes():
    select, total = asks("ties", 3, found(70, 80), weight=(1.0, 3.0), density=(0.256, 0.001), lambda_=2.0)
    assert select == Select(((1, 25), (2, 1)))  # floor(25.6), and at least one
    assert total == MaskedCombine(
        (0.0, 2.0, 6.0),
        masks=(Mask(), Mask(min_bits=70), Mask(min_bits=80)),
        sign_weights=(0.0, 1.0, 3.0),
        shares=(0.0, 1.0, 3.0),
    )


def test_ties_of_the_paper_trims_the_whole_model_and_counts():
    select, total = asks("ties", 3, found(70), weight=(1.0, -3.0), density=(0.5, 1.0), preset="paper")
    assert select == Select(((1, 500),), whole=True)
    assert (total.sign_weights, total.shares, total.weights) == ((0.0, 1.0, 1.0), (0.0, 1.0, 1.0), (0.0, 1.0, -3.0))


def test_ties_of_peft_trims_the_tensor_and_counts():
    select, total = asks("ties", 3, found(70, 80), weight=(1.0, 0.0), density=(0.5, 0.5), preset="peft")
    assert select == Select(((1, 50), (2, 50)))
    assert total.sign_weights == total.shares == (0.0, 1.0, 1.0)  # a weight of 0 votes


def test_models_that_add_nothing_are_neither_ranked_nor_read():
    """Density 0 and weight 0; a model without opposition needs no vote, and is not divided by its own weight."""
    select, total = asks("ties", 4, found(70), weight=(2.0, 1.0, 0.0), density=(0.5, 0.0, 0.5))
    assert select == Select(((1, 50),))
    assert total == MaskedCombine((0.0, 1.0, 0.0, 0.0), masks=(Mask(), Mask(min_bits=70), Mask(), Mask()))


@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "breadcrumbs", "ignore_k"])
def test_without_masks_and_votes_it_is_task_arithmetic(name):
    parameters: dict[str, Any] = {"k": (0.0, 0.0)} if name == "ignore_k" else {}
    assert asks(name, 3, weight=(0.5, -2.0), lambda_=2.0, **parameters) == [Combine((0.0, 1.0, -4.0), base=0)]


@pytest.mark.parametrize("name", ["ties", "dare_ties", "della", "breadcrumbs_ties"])
def test_density_1_votes_without_asking(name):
    (total,) = asks(name, 3, weight=(1.0, 2.0), density=(1.0, 1.0), normalize=True)
    assert total == MaskedCombine((0.0, 1.0, 2.0), sign_weights=(0.0, 1.0, 2.0), shares=(0.0, 1.0, 2.0))


@pytest.mark.parametrize(
    "name", ["ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"]
)
def test_density_0_is_the_base(name):
    """For every model: nothing is asked, only the base is read. A weight of 0 for every model does the same."""
    each: dict[str, Any] = {"epsilon": (0.1, 0.1)} if name.startswith("della") else {}
    for weight, density in (((1.0, 2.0), (0.0, 0.0)), ((0.0, 0.0), (0.5, 0.5))):
        parameters: dict[str, Any] = {"normalize": False} if "linear" in name else {}
        (total,) = asks(name, 3, weight=weight, density=density, **each, **parameters)
        assert total == Combine((0.0, 0.0, 0.0), base=0)


def test_dare_folds_the_l1_ratio_into_the_weights():
    measure, total = asks(
        "dare_linear",
        4,
        MeasuredMasked((0.0, 6.0, 8.0, 1.0), (0.0, 3.0, 2.0, 1.0), (0, 5, 5, 9), (0, 0, 0, 0)),
        weight=(1.0, 2.0, 3.0),
        density=(0.5, 0.25, 1.0),
    )
    masks = (Mask(), Mask(probability=0.5), Mask(probability=0.25), None)
    assert measure == MeasureMasked(masks, squares=False), "density 1 needs no measure"
    assert total == MaskedCombine((0.0, 2.0, 8.0, 3.0), masks=(*measure.masks[:3], Mask()))


@pytest.mark.parametrize("l1", [(5e-8, 5e-8), (1.0, 5e-8), (0.0, 0.0)], ids=str)
def test_the_l1_ratio_is_1_where_a_sum_is_next_to_nothing(l1):
    measured = MeasuredMasked((0.0, l1[0]), (0.0, l1[1]), (0, 1), (0, 0))
    assert asks("dare_linear", 2, measured, weight=(2.0,), density=(0.5,))[1].weights == (0.0, 2.0)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("preset", ["paper", "peft"])
def test_dare_of_the_paper_divides_by_the_density(name, preset):
    (total,) = asks(name, 3, weight=(1.0, 3.0), density=(0.5, 0.25), preset=preset)
    assert total.weights == (0.0, 2.0, 12.0)
    if name == "dare_ties":
        assert (total.sign_weights, total.shares) == ((0.0, 2.0, 4.0), (0.0, 1.0, 1.0))


def test_a_sum_that_is_not_finite_cannot_be_rescaled_to():
    measured = MeasuredMasked((0.0, float("inf")), (0.0, 1.0), (0, 1), (0, 0))
    with pytest.raises(MethodError, match=r"^t of model 1 .* NaN or Inf.*`rescale: false`"):
        asks("dare_linear", 2, measured, weight=1.0, density=0.5)


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.15), (0.1, 0.1), (0.5, 0.5)], ids=str)
def test_della_refuses_probabilities_outside_0_to_1(name, density, epsilon):
    with pytest.raises(MethodError, match=r"`density` .* with `epsilon` .* Use an `epsilon` below 0\.[15]$"):
        asks(name, 2, weight=(1.0,), density=(density,), epsilon=(epsilon,))


def test_della_spreads_the_chance():
    (total,) = asks("della", 2, weight=(1.0,), density=(0.5,), epsilon=(0.2,), rescale=False)
    assert total.masks == (Mask(), Mask(probability=0.5, rank_slope=0.2))


@pytest.mark.parametrize(
    ("density", "gamma", "ranks", "mask"),
    [
        (0.5, 0.1, ((1, 11), (1, 60)), Mask(min_bits=60, max_bits=11)),
        (0.5, 0.0, ((1, 50),), Mask(min_bits=50)),  # no outliers, and nothing is lost for it
        (0.5, 0.001, ((1, 50),), Mask(min_bits=50)),
        (0.5, 0.75, ((1, 51),), Mask(max_bits=51)),  # more outliers than there is room for
        (0.001, 1.0, ((1, 100),), None),
        (1.0, 0.3, None, None),
    ],
    ids=str,
)
def test_breadcrumbs_keeps_a_band_of_ranks(density, gamma, ranks, mask):
    given = {"weight": 1.0, "density": density, "gamma": gamma}
    if ranks is None:
        assert asks("breadcrumbs", 2, **given) == [Combine((0.0, 1.0), base=0)]
        return
    select, total = asks("breadcrumbs", 2, found(*(k for _, k in ranks)), **given)
    assert select == Select(ranks)
    if mask:
        assert total == MaskedCombine((0.0, 1.0), masks=(Mask(), mask))


def test_ignore_k_drops_the_largest():
    select, total = asks("ignore_k", 4, found(500), weight=(1.0, 2.0, 3.0), k=(0.1, 0.0, 1.0))
    assert select == Select(((1, 11),))
    assert total == MaskedCombine((0.0, 1.0, 2.0, 0.0), masks=(Mask(), Mask(max_bits=500), Mask(), Mask()))


def test_sce_weighs_by_energy():
    gram = ((0.0, 0.0, 0.0), (0.0, 30.0, 0.0), (0.0, 0.0, 10.0))
    measure, total = asks("sce", 3, Measured(gram, (0.0,) * 3, (0,) * 3))
    assert measure == Measure(deltas=True)
    w = (0.0, 0.75, 0.25)
    assert total == MaskedCombine(w, sign_weights=(0.0, 1.0, 1.0), shares=w, least_share=1e-6, other_share=1e-6)


def test_sce_selects_and_then_weighs_what_it_selected():
    measured = MeasuredMasked((0.0,) * 3, (0.0,) * 3, (0,) * 3, (0,) * 3, (0.0, 1e-6, 3e-6))
    select, measure, total = asks("sce", 3, found(77), measured, select_topk=0.5)
    assert select == Select(((0, 0.5),), score=Score("variance"), nonzero=True)
    assert measure == MeasureMasked((Mask(),) * 3, Score("variance", min_bits=77), l1=False)
    assert total.weights == (0.0, 0.5, 0.5)  # the sum of the means is below 1e-6
    assert total.score == Score("variance", min_bits=77)


def test_sce_adds_nothing_where_nothing_is_selected():
    assert asks("sce", 3, found(ALL_BITS + 1), select_topk=0.5)[1] == Combine((0.0, 0.0, 0.0), base=0)


def test_ram_averages_what_several_changed():
    masks = (Mask(), Mask(min_bits=bits_above(1e-5)), Mask(min_bits=bits_above(1e-5)))
    assert find("ram")(3, T) == MaskedCombine((0.0, 1.0, 1.0), masks=masks, shares=(0.0, 1.0, 1.0))


def test_ramplus_scales_what_one_alone_changed():
    measured = MeasuredMasked((0.0,) * 4, (0.0,) * 4, (0, 10, 5, 0), (0, 1, 5, 0))
    measure, total = asks("ramplus_tl", 4, measured, r=0.5, alpha=0.2)
    assert measure.masks == total.masks
    assert total.sole_weights == pytest.approx((0.0, 1.0 + 0.5 / 9, 1.1, 1.0))
    assert asks("ramplus_tl", 4, measured, epsilon=0.0)[1].sole_weights == pytest.approx(
        (0.0, 1.0 + 0.1 / 9, 1.02, 1.0)
    )


def test_nearswap_limits_the_step():
    assert find("nearswap")(2, t=0.5) == MaskedCombine((0.0, 1.0), limit=0.5)
    assert find("nearswap")(2, t=0.0).row().is_copy


def test_arcee_fusion_takes_exact_quantiles():
    divergence, select, total = asks("arcee_fusion", 2, (1.0, 2.0, -1e-20, 0.5), found(*map(bits_from, (1, 2, 4))))
    assert divergence == Divergence()
    factors = array("f", (1.0, 2.0, 0.0, 0.5)).tobytes()
    assert select == Select(((0, 76), (0, 51), (0, 26)), score=Score("divergence", factors))
    assert total == MaskedCombine((0.0, 1.0), score=Score("divergence", factors, min_bits=bits_from(6.5)))


def test_weights_that_cancel_cannot_be_normalised():
    for name in ("ties", "della", "dare_ties", "dare_linear", "breadcrumbs"):
        with pytest.raises(MethodError, match="too near 0 to divide by"):
            asks(name, 3, weight=(1.0, -1.0), normalize=True)


def test_sums_of_weights_that_cancel_up_to_rounding_count_as_0():
    """In float32 0.1 + 0.2 - 0.3 is 3e-8, and nothing to divide by; a lone weight never counts as 0."""
    (total,) = asks("ties", 5, weight=(0.1, 0.2, -0.3, 1.0))
    assert 3e-8 < total.least_share < 1e-6
    (total,) = asks("ties", 5, weight=(0.1, 0.2, -1e-9, 1.0))
    assert total.least_share == 5e-10
    assert asks("ties", 5, weight=(0.1, 1e-9, 1e9, 1.0))[0].least_share == 0.0


def test_thresholds_become_the_float32_that_is_not_below():
    for value in (0.0, 1.0, 1e-5, 0.1, 0.3, 1e-46, 1e-40, 3.4028234663852886e38):
        at, above = (np.uint32(f(value)).view(np.float32) for f in (bits_from, bits_above))
        assert float(at) >= value > float(np.nextafter(at, np.float32(-1)))
        assert float(above) > value >= float(np.nextafter(above, np.float32(-1)))
    assert bits_from(1e39) == bits_from(float("inf")) == 0x7F800000
    assert bits_from(float("nan")) == ALL_BITS + 1


def test_an_empty_tensor_is_not_asked_about():
    empty = Tensor("t", (0, 4))
    for name, parameters in (
        ("ties", {"weight": (1.0, 1.0), "density": (0.5, 0.5)}),
        ("breadcrumbs", {"weight": (1.0, 1.0), "density": (0.5, 0.5), "gamma": (0.1, 0.1)}),
        ("ignore_k", {"weight": (1.0, 1.0), "k": (0.5, 0.5)}),
        ("sce", {"select_topk": 0.5}),
    ):
        assert asks(name, 3, tensor=empty, **parameters) == [Combine((0.0, 0.0, 0.0), base=0)]
    assert asks("arcee_fusion", 2, tensor=empty) == [Combine((0.0, 0.0), base=0)]
