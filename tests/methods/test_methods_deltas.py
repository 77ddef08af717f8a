"""The methods that thin out deltas on tensors, against formulas of its own.

The formulas are numpy in float64, written from the papers and not from the requests: no masks, no bits, no elections.
"""

from __future__ import annotations

import numpy as np
import pytest

from fastinterp import merge_tensors
from tests.support import drive


def draw(seed: int, n: int, shape: tuple[int, ...] = (12, 17)) -> tuple[np.ndarray, list[np.ndarray]]:
    """A base and n models, float32."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    return base, [base + (0.3 * rng.standard_normal(shape)).astype(np.float32) for _ in range(n)]


def deltas(base: np.ndarray, models: list[np.ndarray]) -> np.ndarray:
    return np.stack([x - base for x in models]).astype(np.float64)


def trim(d: np.ndarray, first: int, count: int) -> np.ndarray:
    """Zero but for the `count` largest magnitudes after the first ones, in each of the stacked deltas."""
    out = np.zeros_like(d)
    for o, x in zip(out, d, strict=True):
        order = np.argsort(-np.abs(x), axis=None)[first : first + count]
        o.flat[order] = x.flat[order]
    return out


def disjoint(t: np.ndarray, w: np.ndarray, votes: np.ndarray, normalize: bool) -> np.ndarray:
    """The sum of w*t over those whose sign is that of the sum of votes*t, divided by their weights."""
    elected = np.where((votes * t).sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(votes * t) == elected
    total = (w * t * agree).sum(0)
    share = (np.where(votes == 1, 1.0, w) * agree).sum(0)
    return total / np.where(share == 0, 1, share) if normalize else total


def close(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for the order of a few float64 operations on numbers of order 1."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("preset", ["mergekit", "peft", "paper"])
def test_ties(seed, preset):
    base, models = draw(seed, 3)
    weight, p, lam = (0.5, -0.3, 1.2), 0.1 + 0.15 * seed, 0.7
    normalize, rescale = seed % 2 == 0, seed % 3 == 0
    given = {
        "weight": weight,
        "density": p,
        "lambda": lam,
        "normalize": normalize,
        "rescale": rescale,
        "preset": preset,
    }
    d, w = deltas(base, models), np.array(weight).reshape(3, 1, 1)
    t = trim(d, 0, int(p * base.size))
    if rescale:
        t *= (np.abs(d).sum((1, 2)) / np.abs(t).sum((1, 2)))[:, None, None]
    step = disjoint(t, w, w if preset == "mergekit" else np.ones_like(w), normalize)
    close(drive.run("ties", models, base=base, parameters=given), base + lam * step)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(name, seed):
    base, models = draw(seed, 3)
    weight, p, gamma = (0.5, -0.3, 1.2), 0.2 + 0.15 * seed, 0.02 + 0.1 * seed
    given = {"weight": weight, "density": p, "gamma": gamma, "normalize": seed % 2 == 0, "rescale": seed > 1}
    d, w = deltas(base, models), np.array(weight).reshape(3, 1, 1)
    t = trim(d, int(gamma * base.size), int(p * base.size))
    if seed > 1:
        t *= (np.abs(d).sum((1, 2)) / np.abs(t).sum((1, 2)))[:, None, None]
    if name == "breadcrumbs":
        step = (w * t).sum(0) / (sum(weight) if given["normalize"] else 1)
    else:
        step = disjoint(t, w, w, bool(given["normalize"]))
    close(drive.run(name, models, base=base, parameters=given), base + step)


def test_ignore_k():
    base, models = draw(1, 2)
    t = trim(deltas(base, models), 20, base.size)  # floor(0.1 * 204)
    close(
        drive.run("ignore_k", models, base=base, parameters={"weight": (0.4, -1.0), "k": 0.1}), base + 0.4 * t[0] - t[1]
    )


@pytest.mark.parametrize("topk", [1.0, 0.5, 0.03, 0.004])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_sce(topk, scale):
    """Below an energy of 1e-6 all models weigh the same; 0.004 selects nothing."""
    base, models = draw(2, 3)
    models = [(base + np.float32(scale * (i + 1)) * (x - base)).astype(np.float32) for i, x in enumerate(models)]
    t = deltas(base, models)
    if topk < 1:
        order = np.argsort(-t.var(0), axis=None)[: int(topk * base.size)]
        chosen = np.zeros(base.size, bool)
        chosen[order] = True
        t *= chosen.reshape(base.shape)
    energy = (t**2).mean((1, 2))
    w = (energy / energy.sum() if energy.sum() >= 1e-6 else np.full(3, 1 / 3)).reshape(3, 1, 1)
    agree = np.sign(t) == np.where(t.sum(0) >= 0, 1, -1)
    step = (w * t * agree).sum(0) / np.maximum((w * agree).sum(0), 1e-6)
    close(drive.run("sce", models, base=base, parameters={"select_topk": topk}), base + step)


@pytest.mark.parametrize("name", ["ram", "ramplus_tl"])
def test_ram(name):
    base, models = draw(3, 3)
    d = deltas(base, models)
    changed = np.abs(d) > 0.3
    count = changed.sum(0)
    alone, shared = changed & (count == 1), changed & (count > 1)
    strength = np.ones(3)
    if name == "ramplus_tl":
        strength = 1 + 0.3 * np.clip(shared.sum((1, 2)) / np.maximum(alone.sum((1, 2)), 0.3), 0, 1.5)
    expected = base + (strength[:, None, None] * d * alone).sum(0) + (d * shared).sum(0) / np.maximum(count, 1)
    given = {"epsilon": 0.3} | ({"r": 0.3, "alpha": 1.5} if name == "ramplus_tl" else {})
    close(drive.run(name, models, base=base, parameters=given), expected)


@pytest.mark.parametrize("t", [1e-3, 0.2, 5.0])
def test_nearswap(t):
    base, (other,) = draw(4, 1)
    near = np.clip(t / np.maximum(np.abs(other - base), 1e-6).astype(np.float64), 0, 1)
    expected = base + near * (other - base)
    close(drive.run("nearswap", [other], base=base, parameters={"t": t}), expected)


def test_arcee_fusion():
    base, (other,) = draw(5, 1)
    p, q = (np.exp(x.astype(np.float64)) for x in (other, base))
    p, q = (x / x.sum(-1, keepdims=True) + 1e-8 for x in (p, q))
    score = np.abs(other - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    low, middle, high = np.sort(score, axis=None)[[50, 101, 152]]  # floor(q * 203)
    expected = np.where(score >= middle + 1.5 * (high - low), base + (other - base).astype(np.float64), base)
    assert 0 < (expected != base).sum() < 40
    close(drive.run("arcee_fusion", [other], base=base), expected)


# --- random masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_the_expected_number_stays_and_its_l1_is_restored(name, density):
    """Within 5 standard deviations of the binomial; della's sum of unequal chances varies less than that."""
    base, models = draw(6, 1, (50, 200))
    step = drive.run(name, models, base=base, parameters={"weight": 1.0, "density": density}, seed=7) - base
    kept = step != 0
    assert abs(kept.sum() - density * base.size) <= 5 * np.sqrt(base.size * density * (1 - density))
    d = deltas(base, models)[0]
    assert np.abs(step).sum() == pytest.approx(np.abs(d).sum(), rel=1e-12)
    ratio = np.abs(d).sum() / np.abs(d[kept]).sum()
    close(step[kept], ratio * d[kept])


def test_dare_of_the_paper_restores_by_the_density():
    base, models = draw(6, 1, (50, 200))
    given = {"weight": 1.0, "density": 0.25, "preset": "paper"}
    step = drive.run("dare_linear", models, base=base, parameters=given) - base
    close(step[step != 0], 4 * deltas(base, models)[0][step != 0])


def test_della_keeps_large_changes_more_often():
    """The chance at rank r is density + epsilon * (2r - 1), in the lower and the upper half of each row."""
    base, models = draw(8, 1, (50, 200))
    given = {"weight": 1.0, "density": 0.5, "epsilon": 0.4, "rescale": False}
    kept = drive.run("della_linear", models, base=base, parameters=given) != base
    order = np.argsort(np.abs(deltas(base, models)[0]), axis=1)
    halves = np.take_along_axis(kept, order, axis=1).reshape(50, 2, 100).mean((0, 2))
    assert halves == pytest.approx([0.3, 0.7], abs=5 * np.sqrt(0.25 / 5000))


def test_models_and_seeds_draw_apart():
    """Two models keep together what independent draws would; another seed keeps others."""
    base, models = draw(9, 1, (50, 200))
    given = {"weight": 1.0, "density": 0.5}

    def kept(seed, *models):
        return drive.run("dare_linear", models, base=base, parameters=given, seed=seed) != base

    first = kept(1, models[0], base)
    for other in (kept(2, models[0], base), kept(1, base, models[0])):
        assert (first & other).mean() == pytest.approx(0.25, abs=5 * np.sqrt(0.1875 / base.size))


@pytest.mark.parametrize("method", ["ties", "della", "dare_ties", "breadcrumbs_ties"])
@pytest.mark.parametrize("scale", [3e38, 1e-46, 2.0**40])
def test_only_quotients_of_weights_count(method, scale):
    """Divided by their sum, weights that float32 cannot add or hold act as those that it can."""
    base, models = draw(3, 3)
    base, models = base.astype(np.float32), [m.astype(np.float32) for m in models]
    same = {"normalize": True, "density": 0.7} | ({"epsilon": 0.1} if method == "della" else {})
    got, want = (
        merge_tensors(models, method, base=base, parameters={"weight": w, **same})
        for w in ([scale, 0.5 * scale, -0.125 * scale], [1.0, 0.5, -0.125])
    )
    # 10 roundings, of which the sum of weights magnifies some by 1.625 / 0.375.
    assert np.max(np.abs(got - want)) <= 2.0**-18 * np.max(np.abs(want))


def test_votes_of_large_weights_count():
    """4e38 - 15e38 + 4e38 elects minus, although float32 cannot add it; lambda makes an ordinary step of it."""
    base = np.zeros(2, np.float32)
    models = [np.array([v, -v], np.float32) for v in (4.0, -5.0, 4.0)]
    parameters = {"weight": [1e38, 3e38, 1e38], "rescale": False, "lambda": 1e-38}
    got = merge_tensors(models, "dare_ties", base=base, parameters=parameters)
    np.testing.assert_allclose(got, [-15.0, 15.0], rtol=2.0**-22)
