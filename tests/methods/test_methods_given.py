"""Methods whose weights come from the recipe alone: against formulas, and at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastinterp import merge_tensors
from fastinterp.errors import MethodError
from fastinterp.methods import find
from fastinterp.ops.combine import Row
from fastinterp.ops.requests import MaskedCombine
from tests.support.drive import close, models, run


def test_expo():
    a, b = models(2)
    close(run("expo", [b], base=a, parameters={"alpha": 0.3}), b + 0.3 * (b - a))
    assert find("expo")(2, alpha=0.0).row() == Row(1)
    assert find("expo")(2, alpha=-1.0).row() == Row(0)


def test_ema_unrolls_the_moving_average():
    x = models(5)
    e = x[0]
    for v in x[1:]:
        e = 0.8 * e + 0.2 * v
    close(run("ema", x, parameters={"decay": 0.8}), e)
    assert find("ema")(3, decay=0.0).row() == Row(2)
    assert find("ema")(3, decay=1.0).row() == Row(0)


@pytest.mark.parametrize("schedule", ["1-sqrt", "linear", "cosine", "uniform"])
def test_ema_stands_for_a_decayed_run(schedule):
    """Checkpoints x_j = x_0 - sum of the first j steps: the average is x_0 - sum of left(i/n) * step i."""
    left = {"1-sqrt": lambda s: 1 - s**0.5, "cosine": lambda s: (1 + math.cos(math.pi * s)) / 2}
    rng = np.random.default_rng(1)
    x0, steps, n = rng.normal(size=6), rng.normal(size=(7, 6)), 8
    x = [x0 - steps[:j].sum(axis=0) for j in range(n)]
    want = x0 - sum(left.get(schedule, lambda s: 1 - s)(i / n) * steps[i - 1] for i in range(1, n))
    close(run("ema", x, parameters={"weights": schedule}), want)
    asked = find("ema")(n, weights=schedule)
    assert asked.sums_to_one and math.fsum(asked.weights) == pytest.approx(1.0, abs=1e-15)
    assert min(asked.weights) > 0.0


@pytest.mark.parametrize(("parameters", "got"), [({}, "neither"), ({"decay": 0.9, "weights": "linear"}, "both")])
def test_ema_takes_exactly_one_rule(parameters, got):
    with pytest.raises(MethodError, match=rf"needs `decay: 0\.9`, .*got {got}"):
        find("ema")(3, **parameters)


def test_lines():
    """Layer 2 of 0..4 is halfway; embeddings, and the only layer of a model, count as the first."""
    base, a, b = models(3)
    parameters = {"alpha": 0.2, "beta": 0.6, "weight": (1.0, -0.5)}
    step = (a - base) - 0.5 * (b - base)
    for layer, layers, factor in ((0, 5, 0.2), (2, 5, 0.5), (4, 5, 0.8), (None, 5, 0.2), (0, 1, 0.2), (None, 0, 0.2)):
        got = run("lines", [a, b], base=base, parameters=parameters, layer=layer, layers=layers)
        close(got, base + factor * step)


def test_fisher():
    x, f = models(3), [np.abs(v) for v in models(3, seed=5)]
    w = (0.5, 1.0, 2.0)
    g = [a * (v + 1e-6) for a, v in zip(w, f, strict=True)]
    want = sum(a * v for a, v in zip(g, x, strict=True)) / sum(g)
    close(run("fisher", x, parameters={"fisher": f, "weight": w}), want)
    asked = find("fisher")(3, fisher=("a", "b", "c"), weight=(1.0, 2.0, 3.0))
    assert asked == MaskedCombine((1.0, 2.0, 3.0), importance=(3, 4, 5))
    with pytest.raises(MethodError, match="every weight is 0"):
        find("fisher")(2, fisher=("a", "b"), weight=(0.0, 0.0))


def test_fisher_of_equal_importance_is_the_mean():
    """Importance 0 everywhere as well: the 1e-6 that is added stands for it."""
    x = models(3)
    for value in (0.0, 2.5):
        close(run("fisher", x, parameters={"fisher": [np.full((8, 9), value)] * 3}), np.mean(x, axis=0))


@pytest.mark.parametrize("scale", [3e38, 1e-46])
def test_only_quotients_of_fisher_weights_count(scale):
    """Weights that float32 cannot add or hold act as 1 and 1/2."""
    x, f = ([v.astype(np.float32) for v in models(2, seed=s)] for s in (0, 5))
    got, want = (
        merge_tensors(x, "fisher", parameters={"fisher": list(map(np.abs, f)), "weight": [w, 0.5 * w]})
        for w in (scale, 1.0)
    )
    assert np.max(np.abs(got - want)) <= 2.0**-21 * np.max(np.abs(want))
