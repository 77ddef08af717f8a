"""The methods of test_methods_gram.py against mergekit 0.1.5 on float32 tensors: the same merge, but for rounding.

Bounds, with u = 2^-24 and tensors of N = 60 elements. mergekit's sums over a tensor are float32: in any order, a sum of
N products is off by at most N*u times the sum of their magnitudes, and a few operations more make (N + 8)*u. So a
cosine, whose terms' magnitudes sum to at most 1, is off by SUM = (N + 8)*u, and what a method does with it magnifies
that by what each test derives. Ours are float64: their error is nothing beside this.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import backends
from tests.support.drive import run

pytestmark = pytest.mark.skipif(bool(backends.mergekit_missing()), reason=backends.mergekit_missing() or "it is there")

U = 2.0**-24
N = 60
SUM = (N + 8) * U
SEEDS = range(8)


def models(count, seed, shape=(5, 12)):
    """Random float32 tensors with a part in common, whose angles are neither small nor near pi."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=shape)
    return [(0.5 * common + rng.normal(size=shape)).astype(np.float32) for _ in range(count)]


def oracle(method, tensors, parameters, *, base=None):
    """mergekit's result as float64. Per-model parameters are tuples, of one value per model other than the base."""
    import torch
    from mergekit.merge_methods.api import merge_tensors

    inputs = [*([] if base is None else [base]), *tensors]
    found = merge_tensors(
        [torch.from_numpy(np.array(x)) for x in inputs],
        method,
        parameters={name: list(v) if isinstance(v, tuple) else v for name, v in parameters.items()},
        base_index=None if base is None else 0,
        name="tensor",
    )
    assert found.dtype == torch.float32
    return found.numpy().astype(np.float64)


def compare(method, tensors, parameters, bound, *, base=None):
    """Both agree to `bound` times the largest element of any input, and the bound means something."""
    assert bound < 2e-3
    got = run(method, tensors, base=base, parameters=parameters)
    want = oracle(method, tensors, parameters, base=base)
    largest = max(float(np.abs(x).max()) for x in [*tensors, *([] if base is None else [base])])
    assert np.max(np.abs(got - want)) <= bound * largest


def uniform(seed, count, low=0.1, high=1.0):
    return tuple(map(float, np.random.default_rng(1000 + seed).uniform(low, high, count)))


def arc_bound(a, b, axis=None):
    """s = sin(k*theta)/sin(theta) has |ds/dtheta| <= 2/sin^2, and dtheta = dcos/sin: for two terms 4/sin^3 times the
    error of a cosine, which is SUM of as many elements as one has, and 8 roundings of weights and products, each of at
    most 1/sin in magnitude.
    """
    elements = a.size if axis is None else a.shape[axis]
    a, b = (v.astype(np.float64) for v in (a, b))
    cos = np.sum(a * b, axis=axis) / np.sqrt(np.sum(a * a, axis=axis) * np.sum(b * b, axis=axis))
    sin = float(np.sqrt(1.0 - np.max(np.abs(cos)) ** 2))
    return 4.0 / sin**3 * (elements + 8) * U + 8.0 * U / sin


@pytest.mark.parametrize("seed", SEEDS)
def test_slerp(seed):
    a, b = models(2, seed)
    compare("slerp", [b], {"t": uniform(seed, 1)[0]}, arc_bound(a, b), base=a)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_slerp_at_the_ends(t):
    a, b = models(2, 0)
    compare("slerp", [b], {"t": t}, 2.0 * U, base=a)
    assert np.array_equal(run("slerp", [b], base=a, parameters={"t": t}), b if t else a)


def test_slerp_of_close_models():
    """A straight line on both sides: two products and a sum."""
    a = models(1, 0)[0]
    compare("slerp", [(a * np.float32(1.01)).astype(np.float32)], {"t": 0.3}, 4.0 * U, base=a)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("keys", [(True, False), (True, True), (False, False), (False, True)], ids=str)
@pytest.mark.parametrize("shape", [(5, 12), (60,)], ids=str)
@pytest.mark.parametrize("based", [True, False])
def test_nuslerp(based, shape, keys, seed):
    """Every setting of the two keys means what it means in mergekit."""
    base, a, b = models(3, seed, shape)
    flatten, row_wise = keys
    axis = None if flatten or len(shape) == 1 else 0 if row_wise else 1
    parameters = {"weight": uniform(seed, 2), "nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    if based:  # the two differences are rounded on both sides: no further error; the base adds 2 roundings
        bound = 2.0 * arc_bound(a - base, b - base, axis) + 2.0 * U  # differences: up to twice the largest input
        compare("nuslerp", [a, b], parameters, bound, base=base)
    else:
        compare("nuslerp", [a, b], parameters, arc_bound(a, b, axis))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("based", [True, False])
def test_multislerp(based, normalize, seed):
    """out = S * m/|m|, S = sum w_i*|v_i|: |v_i|, |m| and S are each off by SUM, and dividing by |m| < 1 magnifies.

    With u_i = v_i/|v_i| and the weights W = sum |w_i|: m is off by (SUM + 4u)*W per element, so is its tangent part,
    which is nothing but this error; m/|m| by 3*SUM*W/|m| in all, where an element of a unit vector is at most 1, and S
    at most W*sqrt(N) times the largest element.
    """
    count = 2 + seed % 4
    base, *x = models(count + 1, seed)
    w = uniform(seed, count)
    v = [m.astype(np.float64) - base if based else m.astype(np.float64) for m in x]
    share = np.array(w) / (sum(w) if normalize else 1.0)
    mean = sum(s * a / np.linalg.norm(a) for s, a in zip(share, v, strict=True))
    total, direction = sum(share), np.abs(mean / np.linalg.norm(mean)).max()
    scale = sum(s * np.linalg.norm(a) for s, a in zip(share, v, strict=True))
    largest = max(float(np.abs(a).max()) for a in [*x, base])
    bound = 4.0 * SUM * total / np.linalg.norm(mean) * direction * scale / largest + 8.0 * U
    compare("multislerp", x, {"weight": w, "normalize_weights": normalize}, bound, base=base if based else None)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("max_iter", [0, 1, 3])
def test_karcher(max_iter, seed):
    """The start is off by 3*SUM (as in multislerp), each step by what arccos makes of SUM: dtheta = SUM/sin, and
    theta/sin times the tangent changes by at most 4*SUM/sin^3; the angles to the mean have a sine of at least 0.4. The
    length of the result is at most sqrt(N) times the largest element, one of a unit vector at most 0.5 here.
    """
    x = models(2 + seed % 4, seed)
    units = [a.astype(np.float64) / np.linalg.norm(a) for a in x]
    mean = sum(units) / np.linalg.norm(sum(units))
    assert all(np.sqrt(1.0 - np.sum(mean * a) ** 2) >= 0.4 for a in units) and np.abs(mean).max() <= 0.5
    bound = (4.0 * SUM / np.linalg.norm(sum(units) / len(x)) + max_iter * 4.0 / 0.4**3 * SUM) * 0.5
    compare("karcher", x, {"max_iter": max_iter, "tol": 0.0}, bound)
    compare("karcher", x, {"max_iter": max_iter}, bound + 1e-5)  # one of the two may stop a step before the other


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("by_row", [True, False])
def test_model_stock(by_row, seed):
    """t = n*c/D, D = 1 + (n-1)*c, so |dt/dc| = n/D^2; out changes by dt*|mean - base|, and has 8 roundings of terms of
    at most (|t| + |1-t|) times the largest element.
    """
    count = 2 + seed % 3
    base, *x = models(count + 1, seed)
    d = np.stack(x).astype(np.float64) - base
    axis = 2 if by_row else (1, 2)
    unit = d / np.sqrt(np.sum(d * d, axis=axis, keepdims=True))
    c = np.mean([np.sum(unit[i] * unit[j], axis=1 if by_row else None) for j in range(count) for i in range(j)], axis=0)
    divisor = float(np.min(1.0 + (count - 1) * c))
    t = float(np.max(np.abs(count * c / (1.0 + (count - 1) * c))))
    bound = 2.0 * count / divisor**2 * SUM + 8.0 * U * (1.0 + 2.0 * t)
    compare("model_stock", x, {"filter_wise": by_row}, bound, base=base)


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_task_arithmetic_passthrough(seed):
    """n products and sums of terms |w_i| times an input or a difference, and a division by sum w_i, all rounded."""
    base, *x = models(4, seed)
    w = uniform(seed, 3)
    for normalize in (True, False):
        size = sum(w) / (sum(w) if normalize else 1.0)
        compare("linear", x, {"weight": w, "normalize": normalize}, 8.0 * U * size)
        parameters = {"weight": w, "normalize": normalize, "lambda": 0.7}
        compare("task_arithmetic", x, parameters, 20.0 * U * (1.0 + size), base=base)
    compare("passthrough", x[:1], {"scale": w[:1]}, 2.0 * U)
    compare("passthrough", x[:1], {"scale": (0.0,)}, 0.0)
