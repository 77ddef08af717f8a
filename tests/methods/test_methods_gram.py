"""Methods whose weights come from a Gram matrix: against formulas, and at their edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fastinterp import merge_tensors
from fastinterp.errors import MethodError
from fastinterp.methods import find
from fastinterp.ops.combine import Combine, Row, Tensor
from fastinterp.ops.requests import GroupCombine, Measure, Measured, MeasuredGroups, Per
from tests.support.drive import close, models, run

SHAPES = [(), (1,), (7,), (4, 5), (1, 6), (3, 1), (2, 3, 4), (0,), (0, 3), (3, 0)]
GRAM_METHODS = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock", "geometric_median")


def given(gram: list[list[float]]) -> Measured:
    return Measured(tuple(map(tuple, gram)), (0.0,) * len(gram), (1,) * len(gram))


def weights(name: str, gram: list[list[float]], **parameters: object) -> tuple[float, ...]:
    """The weights that a method makes of a hand-made Gram matrix of (x_0, x_1 - x_0, ...)."""
    steps = find(name)(len(gram), Tensor("t", (4,)), **parameters)
    assert next(steps) == Measure(deltas=True)
    with pytest.raises(StopIteration) as end:
        steps.send(given(gram))
    assert isinstance(end.value.value, Combine)
    return end.value.value.weights


# --- formulas, straight from the papers ------------------------------------------------------------------------------


def great_circle(t, a, b, axis=None):
    """Of a and b along `axis`, None for all elements as one vector."""
    norm = [np.sqrt(np.sum(v * v, axis=axis, keepdims=True)) for v in (a, b)]
    theta = np.arccos(np.clip(np.sum(a * b, axis=axis, keepdims=True) / (norm[0] * norm[1]), -1, 1))
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def karcher_mean(x, steps):
    norms = [np.linalg.norm(v) for v in x]
    units = [v / norm for v, norm in zip(x, norms, strict=True)]
    u = sum(units) / np.linalg.norm(sum(units))
    for _ in range(steps):
        tangent = np.zeros_like(u)
        for v in units:
            c = np.clip(np.sum(u * v), -1, 1)
            across = v - c * u
            tangent += math.acos(c) / np.linalg.norm(across) * across / len(x)
        size = np.linalg.norm(tangent)
        if size < 1e-13:
            break
        u = math.cos(size) * u + math.sin(size) / size * tangent
    return np.mean(norms) * u


@pytest.mark.parametrize("t", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 4)], ids=str)
def test_slerp(shape, t):
    a, b = models(2, shape)
    close(run("slerp", [b], base=a, parameters={"t": t}), great_circle(t, a, b))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("factor", [0.01, 1.0, 30.0])
def test_slerp_lengths(factor, t):
    """The direction of the circle between unit vectors, and the length between the lengths; a zero vector has none."""
    a, b = models(2, (4, 5))
    b = b * factor
    length = (1 - t) * np.linalg.norm(a) + t * np.linalg.norm(b)
    want = length * great_circle(t, a / np.linalg.norm(a), b / np.linalg.norm(b))
    close(run("slerp_lengths", [b], base=a, parameters={"t": t}), want)
    close(run("slerp_lengths", [0 * a], base=a, parameters={"t": t}), (1 - t) * a)
    close(run("slerp_lengths", [a * 2], base=a, parameters={"t": t}), (1 + t) * a)


def test_slerp_of_close_models_is_a_straight_line():
    """Above cos 0.9995: exactly the weights 1 - t and t. Just below it, the circle."""
    a, b = models(2, spread=0.01)
    close(run("slerp", [b], base=a, parameters={"t": 0.25}), 0.75 * a + 0.25 * b)
    for theta, straight in ((0.0316, True), (0.0317, False), (math.pi - 0.0316, True)):  # cos 0.9995 is 0.031624
        c, s = math.cos(theta) - 1, math.sin(theta)
        got = weights("slerp", [[1.0, c], [c, c * c + s * s]], t=0.25)
        assert (got == (0.75, 0.25)) == straight


def test_slerp_of_orthogonal_models():
    """x_0 = e_1, x_1 = e_2, so x_1 - x_0 = e_2 - e_1; halfway, both weigh sin(45 degrees)."""
    assert weights("slerp", [[1.0, -1.0], [-1.0, 2.0]], t=0.5) == pytest.approx((0.5**0.5,) * 2, rel=1e-15)


@pytest.mark.parametrize("weight", [(1.0, 3.0), (0.2, 0.2), (3.0, -1.0)], ids=str)
@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("row_wise", [True, False])
@pytest.mark.parametrize("based", [True, False])
def test_nuslerp(weight, flatten, row_wise, based):
    """Rows and columns have angles of their own; mergekit's `row_wise` measures along the first dimension."""
    base, a, b = models(3, (5, 9), seed=3)
    t, axis = weight[1] / sum(weight), None if flatten else 0 if row_wise else 1
    parameters = {"weight": weight, "nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    if based:
        got = run("nuslerp", [a, b], base=base, parameters=parameters)
        close(got, base + great_circle(t, a - base, b - base, axis))
    else:
        close(run("nuslerp", [a, b], parameters=parameters), great_circle(t, a, b, axis))


@pytest.mark.parametrize("row_wise", [True, False])
def test_nuslerp_in_1_and_3_dimensions(row_wise):
    """A 1-d tensor is one vector; in 3 dimensions a vector is all that shares the leading, or the last, index."""
    parameters = {"weight": (0.7, 0.3), "nuslerp_flatten": False, "nuslerp_row_wise": row_wise}
    a, b = models(2, (9,))
    close(run("nuslerp", [a, b], parameters=parameters), great_circle(0.3, a, b))
    a, b = models(2, (3, 4, 5))
    axis = (0, 1) if row_wise else 2
    close(run("nuslerp", [a, b], parameters=parameters), great_circle(0.3, a, b, axis))


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_multislerp(count, normalize, based):
    base, *x = models(count + 1, seed=count)
    w = np.random.default_rng(count).uniform(0.1, 1.0, count)
    share = w / w.sum() if normalize else w
    v = [m - base for m in x] if based else x
    norms = [np.linalg.norm(m) for m in v]
    m = sum(s * a / norm for s, a, norm in zip(share, v, norms, strict=True))
    want = (base if based else 0.0) + np.dot(share, norms) * m / np.linalg.norm(m)
    parameters = {"weight": tuple(w), "normalize_weights": normalize}
    close(run("multislerp", x, base=base if based else None, parameters=parameters), want)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_karcher(count):
    x = models(count, seed=count)
    close(run("karcher", x, parameters={"max_iter": 100, "tol": 1e-14}), karcher_mean(x, 100))
    close(run("karcher", x, parameters={"max_iter": 2, "tol": 0.0}), karcher_mean(x, 2))


def test_karcher_of_close_models():
    """Spread 1e-9: a cosine in float64 has no digit of the angles left, coordinates in Gram space have half of them.

    The mean direction of vectors so close is that of their mean, to spread^3; coordinates are 2^-52 * |x| off.
    """
    x = models(4, spread=1e-9)
    got = run("karcher", x, parameters={"tol": 0.0}) - x[0]
    mean = sum(v / np.linalg.norm(v) for v in x)
    want = mean / np.linalg.norm(mean) * np.mean([np.linalg.norm(v) for v in x]) - x[0]
    assert np.max(np.abs(got - want)) <= 1e-14 * np.linalg.norm(x[0])


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("by_row", [True, False])
def test_model_stock(by_row, count):
    base, *x = models(count + 1, (5, 9), seed=count)
    d = np.stack(x) - base
    axes = 2 if by_row else (1, 2)
    unit = d / np.sqrt(np.sum(d * d, axis=axes, keepdims=True))
    pairs = [np.sum(unit[i] * unit[j], axis=1 if by_row else None) for j in range(count) for i in range(j)]
    c = np.mean(pairs, axis=0)
    t = count * c / (1 + (count - 1) * c)
    want = np.reshape(t, (-1, 1)) * np.mean(x, axis=0) + (1 - np.reshape(t, (-1, 1))) * base
    close(run("model_stock", x, base=base, parameters={"filter_wise": by_row}), want)


@pytest.mark.parametrize("weight", [(1.0, 1.0, 1.0, 1.0), (0.5, 1.2, 1.0, 0.0)], ids=str)
def test_geometric_median(weight):
    """No neighbour is better: the sum of distances is flat there. And an outlier pulls it less than the mean."""
    x = models(4, seed=9)
    x[3] = x[3] * 50.0
    y = run("geometric_median", x, parameters={"weight": weight, "max_iter": 10000, "tol": 1e-13})
    pull = np.sum([w * (v - y) / np.linalg.norm(v - y) for w, v in zip(weight, x, strict=True)], axis=0)
    # The last step, 1e-13 of the largest distance r, is pull / sum(w / r_i): what is left of the pull is below
    # 1e-13 * r * sum(w / r_i) <= 1e-13 * 50 * 4; Weiszfeld's steps shrink linearly, here by less than 10 to the rest.
    assert np.linalg.norm(pull) <= 1e-9
    mean = sum(w * v for w, v in zip(weight, x, strict=True)) / sum(weight)
    assert weight[3] == 0.0 or np.linalg.norm(y - x[0]) < 0.5 * np.linalg.norm(mean - x[0])


def test_geometric_median_at_a_model():
    """A model that outweighs the others is the median, and no division by its distance 0 happens on the way.

    From e_1 and e_2, whose pulls on 0 make sqrt(2), x_0 = 0 holds with a weight of at least that. At a model that is
    not the median, the iteration moves on: the mean of -2, 1, 1 is x_0 = 0, their median is 1.
    """
    gram = [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    options = {"max_iter": 10000, "tol": 1e-9}
    got = weights("geometric_median", gram, weight=(1.5, 1.0, 1.0), **options)
    assert got == pytest.approx((1.0, 0.0, 0.0), abs=1e-6)
    x = [np.array([v]) for v in (0.0, -2.0, 1.0, 1.0)]
    out = run("geometric_median", x, parameters={"weight": (1e-3, 1.0, 1.0, 1.0), **options})
    assert out == pytest.approx(1.0, abs=1e-6)
    # 0 with weight 3, 3 with 1 and -1 with 3: their mean is 0, where the pulls 1 - 3 do not overcome 3. It stays.
    assert weights("geometric_median", [[0.0] * 3, [0.0, 9.0, -3.0], [0.0, -3.0, 1.0]], weight=(3.0, 1.0, 3.0)) == (
        pytest.approx((3 / 7, 1 / 7, 3 / 7))
    )


# --- ends and edges --------------------------------------------------------------------------------------------------


def test_end_points_are_copies_and_read_nothing_else():
    """slerp at t = 0 and 1, nuslerp with one weight 0: a copy, without a measurement."""
    for name, n, parameters, row in (
        ("slerp", 2, {"t": 0.0}, Row(0)),
        ("slerp", 2, {"t": 1.0}, Row(1)),
        ("slerp_lengths", 2, {"t": 0.0}, Row(0)),
        ("slerp_lengths", 2, {"t": 1.0}, Row(1)),
        ("nuslerp", 2, {"weight": (0.3, 0.0)}, Row(0)),
        ("nuslerp", 2, {"weight": (0.0, 0.3)}, Row(1)),
        ("nuslerp", 3, {"weight": (0.3, 0.0)}, Row(1)),
        ("nuslerp", 3, {"weight": (0.0, 0.3), "nuslerp_flatten": False}, Row(2)),
        ("multislerp", 2, {"weight": (0.7,)}, Row(1)),
    ):
        with pytest.raises(StopIteration) as end:
            next(find(name)(n, Tensor("t", (2, 2)), **parameters))
        assert end.value.value.row() == row


def merged(name: str, x: list[np.ndarray], **options: object) -> np.ndarray:
    """Three tensors through any Gram method: the first as the base where one is needed; extremes are taken too."""
    found = find(name)
    parameters = {p.name: 0.4 for p in found.parameters if p.required} | options
    count = found.models[1] if found.models[1] < 3 else 3
    if found.base == "required":
        return run(name, x[1:count], base=x[0], parameters=parameters)
    return run(name, x[: 2 if name == "nuslerp" else count], parameters=parameters)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", GRAM_METHODS)
def test_degenerate_tensors_are_finite(name, shape):
    """Zeros, one zero, equal, opposite and parallel models, subnormal and huge ones, single elements."""
    a, b, c = models(3, shape)
    zero = np.zeros(shape)
    for x in ([zero] * 3, [a, zero, b], [zero, a, b], [zero, a, -a], [a, a, a], [a, -a, a], [a, -a, -a], [a, 2 * a, -a],
              [a, -a * (1 + 1e-15), b], [a * 1e-40, b * 1e-40, c * 1e-40], [a * 1e38, b * 1e38, -c * 1e38],
              [a, a * (1 + 1e-16), b], [a, a + 1e-12 * b, a - 1e-12 * b], [c * 1e-160, a * 1e-160, b * 1e-160],
              [a * 1e149, b * 1e149, c * 1e149]):  # fmt: skip
        for options in ({}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True},
                        {"filter_wise": True}):  # fmt: skip
            if options and next(iter(options)) not in {p.name for p in find(name).parameters}:
                continue
            out = merged(name, x, **options)
            assert out.shape == shape and np.isfinite(out).all()
            # Beyond the models where it is no average (model_stock, ends of an arc nearly opposite), but not far.
            assert np.max(np.abs(out), initial=0.0) <= 4e6 * np.max(np.abs(x), initial=0.0)


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_equal_models_merge_to_themselves(name):
    a = models(1)[0]
    close(merged(name, [a, a, a]), a)


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_zeros_stay_zeros(name):
    assert not merged(name, [np.zeros((3, 4))] * 3).any()


def test_what_opposite_and_cancelling_models_make():
    """As the docstrings say: a straight line, the weighted sum, the first direction, the base."""
    a, b = models(2)
    zero = np.zeros_like(a)
    close(run("slerp", [-a], base=a, parameters={"t": 0.25}), 0.5 * a)
    close(run("nuslerp", [a, -2 * a], parameters={"weight": (3.0, 1.0)}), 0.25 * a)
    close(run("nuslerp", [a, -a], base=zero, parameters={"weight": (3.0, 1.0)}), 0.5 * a)
    close(run("multislerp", [a, -3 * a], parameters={"weight": 0.5}), -a)
    close(run("multislerp", [a + b, a, a - b], base=a, parameters={"weight": 1.0}), a)
    close(run("karcher", [a, -3 * a]), 2 * a)
    close(run("model_stock", [a + b, a - b], base=a), a)
    close(run("model_stock", [a, a], base=a), a)


def test_a_tensor_of_zeros_is_at_a_right_angle():
    a, zero = models(1)[0], np.zeros((8, 9))
    close(run("slerp", [a], base=zero, parameters={"t": 0.3}), math.sin(0.15 * math.pi) * a)
    close(run("nuslerp", [zero, a], parameters={"weight": (0.7, 0.3)}), math.sin(0.15 * math.pi) * a)
    close(run("karcher", [zero, a]), a / 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", GRAM_METHODS)
def test_nan_and_inf_are_errors(name, bad):
    x = models(3)
    x[1][2, 3] = bad
    with np.errstate(all="ignore"), pytest.raises(MethodError, match=r"^tensor holds NaN or Inf.*`linear`"):
        merged(name, x)


def test_weights_that_cancel_are_errors():
    half, cancelling = (run("nuslerp", models(2), parameters={"weight": w}) for w in ((1.0, 1.0), (1.0, -1.0)))
    assert np.array_equal(half, cancelling)  # as in mergekit
    with pytest.raises(MethodError, match=r"sum to 0.*`normalize_weights: false`"):
        run("multislerp", models(2), parameters={"weight": (1.0, -1.0)})
    with pytest.raises(MethodError, match="Give at least one model a weight"):
        run("geometric_median", models(2), parameters={"weight": (0.0, 0.0)})
    with pytest.raises(MethodError, match="exactly 2 models beside the base, got 3"):
        run("nuslerp", models(3), parameters={"weight": 1.0})


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_scaling_by_a_power_of_two_changes_no_weight(name):
    """Every square and product of the Gram matrix scales exactly, so the weights are the same floats."""
    x = models(3)
    want = merged(name, x)
    for scale in (2.0**40, 2.0**-60):
        assert np.array_equal(merged(name, [scale * v for v in x]), scale * want)


@pytest.mark.parametrize("name", ["karcher", "geometric_median", "multislerp", "model_stock"])
def test_order_of_the_models_does_not_matter(name):
    x = models(4)
    base = x[0] if name == "model_stock" else None
    parameters = {"weight": 1.0} if name == "multislerp" else {"tol": 1e-12} if name != "model_stock" else {}
    close(run(name, x[:0:-1], base=base, parameters=parameters), run(name, x[1:], base=base, parameters=parameters))


LENGTHS = (1.0, 1e-3, 1e-6)
ALIKE = ("karcher", "geometric_median", "multislerp")  # whose models have no order


@pytest.mark.parametrize("lengths", [*itertools.permutations(LENGTHS), (1.0, 1e-9, 1e-4)], ids=str)
@pytest.mark.parametrize("name", ALIKE)
def test_lengths_may_differ(name, lengths):
    """In float32, through the kernels, in any order: within a few roundings of the sum in float64.

    The pivot is no longer than 8 times the shortest, |p| <= 8*|x_i|, and the weights are at most the output's length by
    |x_i|: each of 3 differences, coefficients and products is off by 2^-24 times at most 8 times the output's length.
    """
    rng = np.random.default_rng(7)
    x = [(length * rng.normal(size=200)).astype(np.float32) for length in lengths]
    parameters = {"weight": 1.0} if name == "multislerp" else {}
    got = merge_tensors(x, name, parameters=parameters)
    want = run(name, [v.astype(np.float64) for v in x], parameters=parameters)
    assert np.linalg.norm(got - want) <= 3 * 3 * 8 * 2.0**-24 * np.linalg.norm(want)


@pytest.mark.parametrize("t", [0.3, 0.99999])
@pytest.mark.parametrize("length", [1e-3, 1e-9])
@pytest.mark.parametrize("name", ["slerp", "nuslerp"])
def test_the_angle_to_a_short_model(name, length, t):
    """t near the end: the short model makes the sum, and the digits of x_1 - x_0 would not."""
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=200).astype(np.float32), (length * rng.normal(size=200)).astype(np.float32)
    got = (
        merge_tensors([b], name, base=a, parameters={"t": t})
        if name == "slerp"
        else merge_tensors([a, b], name, parameters={"weight": [1 - t, t]})
    )
    want = great_circle(t, a.astype(np.float64), b.astype(np.float64))
    # Either model has at most the output's length times 1/sin(a) < 1.1 for a weight, and the pivot is the shorter one.
    assert np.linalg.norm(got - want) <= 3 * 3 * 2.0**-24 * np.linalg.norm(want)


@pytest.mark.parametrize("by_row", [True, False])
def test_angles_of_groups_with_short_models(by_row):
    """Row or column 1 of the second model is 1e-9 times as long: all are measured once more."""
    rng = np.random.default_rng(9)
    a, b = (rng.normal(size=(6, 7)).astype(np.float32) for _ in range(2))
    if by_row:
        b[1] *= 1e-9
    else:
        b[:, 1] *= 1e-9
    parameters = {"weight": (0.5, 0.5), "nuslerp_flatten": False, "nuslerp_row_wise": not by_row}
    want = great_circle(0.5, a.astype(np.float64), b.astype(np.float64), 1 if by_row else 0)
    assert np.max(np.abs(run("nuslerp", [a, b], parameters=parameters) - want)) <= 8 * 2.0**-24 * np.max(np.abs(want))


@pytest.mark.parametrize("x", [(-1.0, -0.001, 3.0), (-0.00288, -2.37e-6, 0.0112)], ids=str)
def test_karcher_of_single_elements(x):
    """u is -1, the sign of the mean direction; the opposite one has no great circle to it."""
    for order in itertools.permutations(x):
        got = merge_tensors([np.array([v], np.float32) for v in order], "karcher")
        assert float(got[0]) == pytest.approx(-sum(map(abs, x)) / 3, rel=2.0**-21)


def test_karcher_of_many_single_elements():
    """Whatever their lengths and number: the mean length, with the sign of most."""
    rng = np.random.default_rng(11)
    for count in (3, 5, 9):
        for _ in range(200):
            x = rng.choice([-1, 1], count) * 10.0 ** rng.uniform(-6, 3, count)
            out = run("karcher", [np.array([v]) for v in x], parameters={"tol": rng.choice([0.0, 1e-5])})
            assert out[0] == pytest.approx(np.sign(np.sign(x).sum()) * np.abs(x).mean(), rel=1e-6)


def test_groups_are_asked_for():
    """One weight tuple a row or column; a 1-d tensor asks for a plain sum."""
    asked: list[tuple[str, int, dict, Per]] = [
        ("nuslerp", 2, {"weight": (1.0, 1.0), "nuslerp_flatten": False}, "row"),
        ("nuslerp", 2, {"weight": (1.0, 1.0), "nuslerp_flatten": False, "nuslerp_row_wise": True}, "column"),
        ("model_stock", 3, {"filter_wise": True}, "row"),
    ]
    for name, n, parameters, per in asked:
        steps = find(name)(n, Tensor("t", (2, 3)), **parameters)
        assert next(steps) == Measure(deltas=True, per=per)
        groups = 2 if per == "row" else 3
        columns = [[float(i == j)] * groups for i in range(n) for j in range(n)]
        gram = tuple(tuple(columns[n * i : n * i + n]) for i in range(n))
        with pytest.raises(StopIteration) as end:
            steps.send(MeasuredGroups(gram))
        assert isinstance(end.value.value, GroupCombine) and len(end.value.value.weights) == n * groups
        assert next(find(name)(n, Tensor("t", (6,)), **parameters)) == Measure(deltas=True)
