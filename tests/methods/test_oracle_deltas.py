"""The methods that thin out deltas, against mergekit in float32 on random tensors and parameters.

mergekit rounds every operation to float32; ours is evaluated in float64 here, so the difference must be within the
rounding errors of mergekit's operations, which each test bounds from the numbers at hand. Deltas are exact: base and
models are multiples of 2^-20 below 4. Where a sign or a threshold is decided by rounding, elements are left out; where
thresholds are tested, magnitudes are distinct, so that mergekit has no choice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support import backends, drive

pytestmark = pytest.mark.skipif(bool(backends.mergekit_missing()), reason=backends.mergekit_missing() or "it is there")

U = 2.0**-24  # of float32: the relative error of one operation


def draw(seed: int, n: int, shape: tuple[int, ...] = (24, 25)) -> tuple[np.ndarray, list[np.ndarray]]:
    """A base and n models, float32, whose deltas are exact and of distinct magnitudes from 2^-20 to 1."""
    rng, size = np.random.default_rng(seed), int(np.prod(shape))
    base = rng.integers(-3 * 2**20, 3 * 2**20, shape) * 2.0**-20
    models = []
    for _ in range(n):
        magnitude = rng.choice(2**20, size, replace=False) + 1
        models.append(base + (magnitude * rng.choice((-1, 1), size)).reshape(shape) * 2.0**-20)
    return base.astype(np.float32), [x.astype(np.float32) for x in models]


def theirs(name: str, base: np.ndarray, models: list[np.ndarray], parameters: dict[str, Any]) -> np.ndarray:
    import torch
    from mergekit.merge_methods.api import merge_tensors

    tensors = [torch.from_numpy(x.copy()) for x in (base, *models)]
    return merge_tensors(tensors, name, base_index=0, parameters=parameters).numpy().astype(np.float64)


def within(got: np.ndarray, expected: np.ndarray, bound: np.ndarray, decided: Any = True) -> None:
    """Equal within the bound where rounding decides nothing, and that is nearly everywhere."""
    where = np.broadcast_to(decided, got.shape) & (bound < np.inf)
    assert where.mean() > 0.98
    off = np.abs(got - expected) > bound
    assert not (off & where).any(), (
        f"{(off & where).sum()} elements, of {off.size}; first {np.argwhere(off & where)[0]}"
    )


def task_bound(
    base: np.ndarray, t: np.ndarray, w: np.ndarray, lam: float, relative: float, vote: bool, normalize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The error of base + lam * sum w*t / share in float32, and where the election does not hang on it.

    t         f64[n, ...], exact but for a relative error, beside one for rounding w and one for the product
    """
    n, terms = len(t), w * t
    each = (2 + n) * U + relative  # of a term: its two roundings, and at most one for each addition
    size = np.abs(terms).sum(0)
    if not vote:
        share = abs(w.sum()) if normalize else 1.0
        error = each * size / share + (n * U * np.abs(w).sum() / share) * size / share
        total = size / share
        decided = np.ones(base.shape, bool)
    else:
        votes = terms.sum(0)
        decided = (np.abs(votes) > each * size) | (size == 0)
        agree = (np.sign(terms) == np.where(votes >= 0, 1, -1)) & (terms != 0)
        used = (np.abs(terms) * agree).sum(0)
        share, mass = np.abs((w * agree).sum(0)), (np.abs(w) * agree).sum(0)
        if not normalize:
            share, mass = np.ones_like(share), np.zeros_like(share)
        share = np.where(share == 0, 1.0, share)
        slack = (n + 1) * U * mass / share  # of the divisor
        error = np.where(slack < 0.01, (each + 1.1 * slack) * used / share, np.inf)
        total = used / share
    error = abs(lam) * (error + 3 * U * total)  # the quotient, and the product with lam, itself rounded
    return error + U * (np.abs(base) + abs(lam) * total + error), decided


def parameters_of(rng: np.random.Generator, n: int) -> dict[str, Any]:
    return {
        "weight": [float(v) for v in rng.uniform(-0.7, 1.3, n)],
        "density": [float(v) for v in rng.choice([1.0, *rng.uniform(0.02, 0.98, 4)], n)],
        "lambda": float(rng.choice([1.0, rng.uniform(0.2, 2.0)])),
        "normalize": bool(rng.integers(2)),
        "rescale": bool(rng.integers(2)),
        "int8_mask": bool(rng.integers(2)),
    }


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_magnitudes(name, seed):
    """Any density, gamma (0, and more than there is room for), sign of weights, with and without rescale, normalize."""
    rng = np.random.default_rng(100 + seed)
    n = 1 + seed % 4
    base, models = draw(seed, n)
    given = parameters_of(rng, n)
    if name != "ties":
        given["gamma"] = [float(v) for v in rng.choice([0.0, 0.001, *rng.uniform(0.0, 0.3, 3), 0.9], n)]
    d = np.stack([x - base for x in models]).astype(np.float64)
    t = np.zeros_like(d)
    for i, p in enumerate(given["density"]):
        count = int(p * base.size)
        top = min(int(given["gamma"][i] * base.size), base.size - count) if name != "ties" and p < 1 else 0
        chosen = np.argsort(-np.abs(d[i]), axis=None)[top : top + count]
        t[i].flat[chosen] = d[i].flat[chosen]
        if given["rescale"]:
            t[i] *= np.abs(d[i]).sum() / np.abs(t[i]).sum()
    relative = (2 * base.size + 2) * U if given["rescale"] else 0.0  # two sums of any order, a quotient, a product
    w = np.array(given["weight"]).reshape(n, 1, 1)
    bound, decided = task_bound(base, t, w, given["lambda"], relative, name != "breadcrumbs", given["normalize"])
    got = drive.run(name, models, base=base, parameters=given)
    within(got, theirs(name, base, models, given), bound, decided)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs"])
def test_density_1(name, seed):
    """The random methods too: nothing is dropped, nothing is rescaled."""
    rng = np.random.default_rng(200 + seed)
    n = 1 + seed % 4
    base, models = draw(seed, n)
    given = parameters_of(rng, n) | {"density": 1.0}
    t = np.stack([x - base for x in models]).astype(np.float64)
    vote = name in ("ties", "dare_ties", "della")
    w = np.array(given["weight"]).reshape(n, 1, 1)
    bound, decided = task_bound(base, t, w, given["lambda"], 0.0, vote, given["normalize"])
    within(drive.run(name, models, base=base, parameters=given), theirs(name, base, models, given), bound, decided)


def test_defaults():
    """What a recipe leaves out is what mergekit takes."""
    base, models = draw(3, 3)
    t = np.stack([x - base for x in models]).astype(np.float64)
    for name in ("ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"):
        given = {"weight": [0.5, 0.75, -0.25]}
        w = np.array(given["weight"]).reshape(3, 1, 1)
        bound, decided = task_bound(base, t, w, 1.0, 0.0, "linear" not in name and name != "breadcrumbs", name in
                                    ("ties", "della"))  # fmt: skip
        within(drive.run(name, models, base=base, parameters=given), theirs(name, base, models, given), bound, decided)


def test_tied_magnitudes():
    """bf16 fine-tunes have many; those above the threshold stay in both, of those at it mergekit keeps some."""
    rng = np.random.default_rng(5)
    base = np.zeros((40, 50), np.float32)
    other = (rng.integers(1, 40, base.shape) * rng.choice((-1, 1), base.shape) / 64).astype(np.float32)
    for density in (0.1, 0.5, 0.9):
        given = {"weight": [1.0], "density": [density]}
        mine, other_engine = (
            drive.run("ties", [other], base=base, parameters=given),
            theirs("ties", base, [other], given),
        )
        least = np.sort(np.abs(other), axis=None)[::-1][int(density * base.size) - 1]
        at = np.abs(other) == least
        assert (mine == other_engine)[~at].all() and at.sum() > 1
        assert (mine[at] == other[at]).all() and (other_engine != 0).sum() == int(density * base.size)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("density", [0.3, 0.8])
def test_random_keeps_have_the_same_statistics(name, density):
    """The number kept of both is binomial, at most; the L1 norm is restored in both, ours exactly."""
    import torch

    base, models = draw(6, 1, (100, 100))
    torch.manual_seed(3)
    given = {"weight": [1.0], "density": [density]}
    l1 = float(np.abs(models[0] - base).sum(dtype=np.float64))
    for merged in (drive.run(name, models, base=base, parameters=given), theirs(name, base, models, given)):
        kept = merged != base
        assert abs(kept.sum() - density * base.size) <= 5 * np.sqrt(base.size * density * (1 - density))
        rounding = U * (np.abs(merged) + np.abs(merged - base)).sum() + (2 * base.size + 2) * U * l1
        assert abs(np.abs(merged - base).sum() - l1) <= rounding


@pytest.mark.parametrize("seed", range(8))
def test_sce(seed):
    """The threshold lies in a gap of the variances that is wider than the error of a variance in float32."""
    n = 2 + seed % 3
    base, models = draw(seed, n)
    t = np.stack([x - base for x in models]).astype(np.float64)
    given: dict[str, Any] = {"int8_mask": seed % 2 == 0}
    if seed > 1:
        variance = np.sort(t.var(0), axis=None)[::-1]
        ranks = np.arange(10 * seed, 10 * seed + 40)
        gap = (variance[ranks - 1] - variance[ranks]) / np.square(t).max()
        k = ranks[gap.argmax()]
        assert gap.max() > 4 * (n + 4) * U  # each of two variances: errors of squares of at most max t^2
        given["select_topk"] = (k + 0.5) / np.count_nonzero(variance)
        t *= t.var(0) >= variance[k - 1]
    energy = np.square(t).mean((1, 2))
    w = (energy / energy.sum()).reshape(n, 1, 1)
    relative = 2 * (base.size + n + 3) * U  # of a weight: two sums of squares, a mean each, a quotient
    agree = np.sign(t) == np.where(t.sum(0) >= 0, 1, -1)
    share, used = (w * agree).sum(0), (w * np.abs(t) * agree).sum(0)
    step = np.divide(used, share, out=np.zeros_like(used), where=share != 0)
    bound = U * np.abs(base) + (2 * relative + (2 * n + 6) * U) * step
    decided = (np.abs(t.sum(0)) > n * U * np.abs(t).sum(0)) | (np.abs(t).sum(0) == 0)
    got = drive.run("sce", models, base=base, parameters=given)
    within(got, theirs("sce", base, models, given), bound, decided)


def test_sce_with_uniform_weights_and_with_nothing_selected():
    base, models = draw(1, 3)
    small = [(base + (x - base) * np.float32(2.0**-10)).astype(np.float32) for x in models]
    for given in ({}, {"select_topk": 0.0}, {"select_topk": 0.0001}):
        t = np.stack([x - base for x in small]).astype(np.float64)
        bound = U * np.abs(base) + 12 * U * np.abs(t).max(0)
        decided = np.abs(t.sum(0)) > 3 * U * np.abs(t).sum(0)
        within(drive.run("sce", small, base=base, parameters=given), theirs("sce", base, small, given), bound, decided)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["ram", "ramplus_tl"])
def test_ram(name, seed):
    n = 1 + seed % 4
    base, models = draw(seed, n)
    rng = np.random.default_rng(seed)
    given: dict[str, Any] = {"epsilon": float(rng.choice([1e-5, 0.2, 0.5]))}
    if name == "ramplus_tl":
        given |= {"r": float(rng.uniform(0, 1)), "alpha": float(rng.choice([0.2, 3.0]))}
    d = np.stack([x - base for x in models]).astype(np.float64)
    size = 4 * np.abs(d).sum(0)  # 1 + r*alpha is at most 4
    bound = U * (np.abs(base) + size) + (n + 8) * U * size
    within(drive.run(name, models, base=base, parameters=given), theirs(name, base, models, given), bound)


@pytest.mark.parametrize("t", [1e-6, 1e-4, 0.3, 2.0])
def test_nearswap(t):
    """mergekit: a quotient q, q*x + (1 - q)*base. Every one of its steps errs by U of something below |x| + |base|."""
    base, (other,) = draw(2, 1)
    bound = 8 * U * (np.abs(base) + np.abs(other))
    within(
        drive.run("nearswap", [other], base=base, parameters={"t": t}),
        theirs("nearswap", base, [other], {"t": t}),
        bound,
    )


@pytest.mark.parametrize("seed", range(4))
def test_arcee_fusion(seed):
    """Scores that differ from the threshold by less than their errors may go either way."""
    base, (other,) = draw(seed, 1)
    d = np.abs(other - base).astype(np.float64)
    p, q = (np.exp(x.astype(np.float64)) for x in (other, base))
    p, q = (x / x.sum(-1, keepdims=True) + 1e-8 for x in (p, q))
    m = base.shape[1]
    ratio = np.log(p / q)
    row = (p * ratio).sum(-1, keepdims=True)
    # exp errs by 2 U and U*|x - max| <= 8 U, the sum by m U: p and q by (m + 12) U each; then product and sum
    error = d * ((m + 12) * U * p * (np.abs(ratio) + 2) + (m + 3) * U * np.abs(p * ratio)).sum(-1, keepdims=True)
    score = d * row
    low, middle, high = np.sort(score, axis=None)[[(score.size - 1) * k // 4 for k in (1, 2, 3)]]
    least = middle + 1.5 * (high - low)
    decided = np.abs(score - least) > error + 4 * error.max()  # an order statistic errs by at most the largest error
    got, expected = drive.run("arcee_fusion", [other], base=base), theirs("arcee_fusion", base, [other], {})
    assert (got != base).sum() > 10
    within(got, expected, U * (np.abs(base) + 2 * d), decided)
