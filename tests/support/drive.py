"""Runs a merge method on arrays, without the engine: answers its requests and evaluates its sum in float64, straight
from the definitions in ops/requests.py. Slow and obvious: what the tests of methods compare with formulas.

Deltas are x_i - x_0 in the dtype of the arrays (float32 arrays: rounded once, as the engine does), everything after
that is float64. Only the tests of masks are on float32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinterp.methods import Method, Sidecar, find
from fastinterp.ops.combine import Combine, Tensor, philox_key
from fastinterp.ops.requests import (
    ALL_BITS,
    Divergence,
    GroupCombine,
    Mask,
    MaskedCombine,
    Measure,
    Measured,
    MeasuredGroups,
    MeasuredMasked,
    MeasureMasked,
    Request,
    Score,
    Select,
    Selected,
    Sum,
)
from fastinterp.reference import masked as reference_masked

Array = NDArray[Any]


def run(
    method: str | Method,
    tensors: Sequence[Array],
    *,
    base: Array | None = None,
    parameters: Mapping[str, Any] | None = None,
    name: str = "tensor",
    seed: int = 0,
    layer: int | None = None,
    layers: int = 0,
) -> NDArray[np.float64]:
    """What the method makes of one tensor.

    tensors     float32 or float64, one dtype and shape, 0-d or more; the models other than the base
    base        becomes input 0
    parameters  name -> value as the method's function takes it; one value per model for `Each` parameters, where a
                single value stands for all models. Side-cars are given as arrays, and follow the models as inputs
    """
    inputs = [*([] if base is None else [base]), *tensors]
    tensor = Tensor(name, inputs[0].shape, layer, layers, inputs[0].size)
    total, sidecars = asked(method, inputs, tensor, seed, parameters or {}, len(tensors))
    return evaluate(total, [*inputs, *sidecars], tensor, seed)


def asked(
    method: str | Method,
    inputs: Sequence[Array],
    tensor: Tensor,
    seed: int,
    parameters: Mapping[str, Any],
    models: int,
) -> tuple[Sum, list[Array]]:
    """The sum that the method returns, its requests answered, and its side-cars."""
    found = find(method) if isinstance(method, str) else method
    known = {p.name: p for p in found.parameters}
    assert set(parameters) <= set(known), f"{found.name} has no {sorted(set(parameters) - set(known))}"
    assert (found.base == "required") <= (len(inputs) == models + 1), f"{found.name} needs a base"
    keywords: dict[str, Any] = {}
    sidecars: list[Array] = []
    for p in found.parameters:
        assert not p.required or p.name in parameters, f"{found.name} needs {p.name}"
        value = parameters.get(p.name, p.default)
        if p.kind is Sidecar:
            sidecars += value
            value = tuple(Sidecar(f"side-car {i}") for i in range(len(value)))
        elif p.each:
            value = tuple(value) if isinstance(value, (tuple, list)) else (value,) * models
            assert len(value) == models, f"{p.name}: {len(value)} values for {models} models"
        keywords[p.keyword] = value
    wanted = found(len(inputs), tensor, **keywords)
    if not found.generator:
        return wanted, sidecars
    try:
        request = next(wanted)
        while True:
            request = wanted.send(answer(request, inputs, tensor, seed))
    except StopIteration as end:
        return end.value, sidecars


# --- answers ---------------------------------------------------------------------------------------------------------


def answer(request: Request, inputs: Sequence[Array], tensor: Tensor, seed: int) -> Any:
    if isinstance(request, Measure):
        return _measure(request, inputs)
    if isinstance(request, MeasureMasked):
        return _measure_masked(request, inputs, tensor, seed)
    if isinstance(request, Divergence):
        return _divergence(inputs)
    assert isinstance(request, Select)
    return _select(request, inputs)


def _rows(x: Array) -> Array:
    """float64[rows, columns]."""
    return x.astype(np.float64).reshape(math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1)


def deltas(inputs: Sequence[Array]) -> list[NDArray[np.float64]]:
    """x_i - x_0 in the dtype of the inputs, as float64 in the shape of the tensor; the first is zeros."""
    return [(x - inputs[0]).astype(np.float64) for x in inputs]


def _measure(request: Measure, inputs: Sequence[Array]) -> Any:
    vectors: list[Any] = [inputs[0], *deltas(inputs)[1:]] if request.deltas else list(inputs)
    v = np.stack([_rows(x) for x in vectors])
    groups = {"tensor": v.reshape(1, len(v), -1), "row": v.swapaxes(0, 1), "column": v.transpose(2, 0, 1)}
    g = groups[request.per]  # groups, vectors, elements
    n = range(len(v))
    gram = tuple(tuple([float(np.sum(x[i] * x[j])) for x in g] for j in n) for i in n)
    if request.per != "tensor":
        return MeasuredGroups(gram)
    return Measured(
        tuple(tuple(column[0] for column in row) for row in gram),
        tuple(float(np.abs(x).sum()) for x in g[0]),
        tuple(int(np.count_nonzero(x)) for x in g[0]),
    )


def _measure_masked(request: MeasureMasked, inputs: Sequence[Array], tensor: Tensor, seed: int) -> MeasuredMasked:
    d = deltas(inputs)
    d = [x if k else np.zeros_like(x) for x, k in zip(d, request.masks, strict=True)]
    masks = [passes(k, d[i], i, tensor, seed) if k else np.zeros(d[i].shape, bool) for i, k in enumerate(request.masks)]
    if request.score is not None:
        chosen = score(request.score, d) >= request.score.min_bits
        masks = [m & chosen for m in masks]
    masks[0] = np.zeros_like(masks[0])
    count = np.sum(masks, axis=0)
    return MeasuredMasked(
        tuple(float(np.abs(x).sum()) for x in d),
        tuple(float(np.abs(x[m]).sum()) for x, m in zip(d, masks, strict=True)),
        tuple(int(m.sum()) for m in masks),
        tuple(int((m & (count > 1)).sum()) for m in masks),
        tuple(float(np.sum(x[m] ** 2)) for x, m in zip(d, masks, strict=True)),
    )


def _divergence(inputs: Sequence[Array]) -> tuple[float, ...]:
    p, q = (_softmax(_rows(x)) + 1e-8 for x in (inputs[1], inputs[0]))
    return tuple(map(float, np.sum(p * np.log(p / q), axis=1)))


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _select(request: Select, inputs: Sequence[Array]) -> tuple[Selected, ...]:
    d, found = deltas(inputs), []
    for i, k in request.ranks:
        bits = magnitude(d[i]) if request.score is None else score(request.score, d)
        ordered = np.sort(bits, axis=None)[::-1]
        if request.nonzero:
            k = int(np.floor(k * np.count_nonzero(bits)))
        assert k == int(k) and (request.nonzero or 1 <= k <= bits.size), f"rank {k} of {bits.size}"
        least = int(ordered[int(k) - 1]) if k else ALL_BITS + 1
        found.append(Selected(least, int((bits >= least).sum())))
    return tuple(found)


# --- masks -----------------------------------------------------------------------------------------------------------


def magnitude(d: Array) -> NDArray[np.int64]:
    """float32 bits of |d|."""
    with np.errstate(over="ignore", under="ignore"):
        return np.abs(d).astype(np.float32).view(np.uint32).astype(np.int64).reshape(d.shape)


def passes(mask: Mask, d: Array, i: int, tensor: Tensor, seed: int) -> NDArray[np.bool_]:
    """Where input i's delta takes part: bool in the shape of d."""
    mag = magnitude(d)
    in_bounds = (mask.min_bits <= mag) & (mag <= mask.max_bits)
    if not mask.is_random:
        return in_bounds
    numbers = reference_masked.mask_numbers(philox_key(seed, 1 + i, tensor.name), d.size).astype(np.int64)
    return in_bounds & (numbers.reshape(d.shape) < _limits(mask, mag))


def _limits(mask: Mask, mag: NDArray[np.int64]) -> Any:
    """The limit below which the 32-bit random number of an element must lie."""
    lo, hi = (round(min(max(mask.probability + s, 0.0), 1.0) * 2**32) for s in (-mask.rank_slope, mask.rank_slope))
    if mask.rank_slope == 0.0:
        return lo
    limits = []
    for row in mag.reshape(-1, mag.shape[-1] if mag.ndim else 1):
        ordered, m = np.sort(row), row.size
        twice = np.searchsorted(ordered, row, "left") + np.searchsorted(ordered, row, "right") - 1
        limits.append(lo + (hi - lo) * twice // (2 * (m - 1)) if m > 1 else np.full(1, (lo + hi) // 2))
    return np.array(limits).reshape(mag.shape)


def score(wanted: Score, d: Sequence[Array]) -> NDArray[np.int64]:
    """float32 bits of every element's score; NaN counts as the largest."""
    if wanted.kind == "divergence":
        factors = np.frombuffer(wanted.factors, np.float32).astype(np.float64)
        value = (np.abs(d[1]).reshape(len(factors), -1) * factors[:, None]).reshape(d[1].shape)
    else:
        mean = sum(d[1:]) / (len(d) - 1)
        value = np.asarray(sum((x - mean) ** 2 for x in d[1:]))
    return np.where(np.isnan(value), ALL_BITS, magnitude(value))


# --- sums ------------------------------------------------------------------------------------------------------------


def evaluate(total: Sum, inputs: Sequence[Array], tensor: Tensor, seed: int = 0) -> NDArray[np.float64]:
    """The sum, float64 in the shape of the tensor. A copy returns the input's values."""
    if isinstance(total, Combine):
        row = total.row()
        if row.is_copy:
            return inputs[row.pivot].astype(np.float64)
        used = row.inputs if total.base is None else tuple(i for i, _ in row.terms)
        return _plain(total.weights, total.base, used, inputs)
    if isinstance(total, GroupCombine):
        return _grouped(total, inputs)
    return _masked(total, inputs, tensor, seed)


def _plain(weights: Sequence[float], base: int | None, used: Sequence[int], inputs: Sequence[Array]) -> Array:
    if base is None:
        return np.asarray(sum(weights[i] * inputs[i].astype(np.float64) for i in used))
    p = inputs[base]
    return p.astype(np.float64) + sum(weights[i] * (inputs[i] - p).astype(np.float64) for i in used)


def _grouped(total: GroupCombine, inputs: Sequence[Array]) -> Array:
    x = np.stack([_rows(v) for v in inputs])
    w = np.array(total.weights).reshape(-1, len(inputs)).T  # [n, groups]
    assert w.shape == (len(inputs), x.shape[1 if total.per == "row" else 2])
    w = w[:, :, None] if total.per == "row" else w[:, None, :]
    if total.base is not None:
        p = x[total.base]
        y = p + sum(w[i] * _rows(inputs[i] - inputs[total.base]) for i in range(len(inputs)))
    else:
        y = np.sum(w * x, axis=0)
    return np.asarray(y).reshape(inputs[0].shape)


def _masked(total: MaskedCombine, inputs: Sequence[Array], tensor: Tensor, seed: int) -> Array:
    n, x0 = len(total.weights), inputs[0].astype(np.float64)
    d = deltas(inputs[:n])
    if total.importance is not None:
        g = [w * (inputs[f].astype(np.float64) + 1e-6) for w, f in zip(total.weights, total.importance, strict=True)]
        num, den = np.asarray(sum(a * b for a, b in zip(g, d, strict=True))), np.asarray(sum(g))
        return x0 + np.divide(num, den, out=np.zeros_like(num), where=den != 0)
    d = [np.where(np.isnan(v), v, np.clip(v, -total.limit, total.limit)) for v in d]
    parts = _parts(total, d, tensor, seed)
    step = _sum(total.weights, d, parts)
    if total.shares is not None:
        share = _sum(total.shares, [np.ones_like(v) for v in d], parts)
        share = np.where((share == 0) | (np.abs(share) < total.least_share), total.other_share, share)
        step = step / share
    if total.sole_weights is not None:
        one = np.sum(parts, axis=0) == 1
        step = np.where(one, _sum(total.sole_weights, d, parts), step)
    return x0 + step


def _sum(weights: Sequence[float], d: Sequence[Array], parts: Sequence[Array]) -> Array:
    """Of weights[i]*d[i] over those that take part: what does not is never multiplied."""
    return np.asarray(sum(np.where(m, w * v, 0.0) for w, v, m in zip(weights, d, parts, strict=True)))


def _parts(total: MaskedCombine, d: Sequence[Array], tensor: Tensor, seed: int) -> list[NDArray[np.bool_]]:
    """Where each input takes part: bool in the shape of d. The base, and an input that has only zeros, never does."""
    n = len(total.weights)
    lists = [v for v in (total.weights, total.sign_weights, total.shares, total.sole_weights) if v is not None]
    masks = total.masks or (Mask(),) * n
    parts = [np.zeros(d[0].shape, bool)]
    for i in range(1, n):
        read = any(v[i] != 0.0 for v in lists)
        parts.append(passes(masks[i], d[i], i, tensor, seed) if read else np.zeros(d[0].shape, bool))
    if total.score is not None:
        chosen = score(total.score, d) >= total.score.min_bits
        parts = [m & chosen for m in parts]
    if total.sign_weights is not None:
        minus = _sum(total.sign_weights, d, parts) < 0
        for i, v in enumerate(total.sign_weights):
            agrees = np.isnan(d[i]) | ((d[i] != 0) & ((np.signbit(v) ^ np.signbit(d[i])) == minus))
            parts[i] = parts[i] & agrees & (v != 0)
    return parts


# --- what tests compare ----------------------------------------------------------------------------------------------

# Of float64 against float64, of at most 100 elements. What two formulas do differently is how sums of up to 100 terms
# are ordered (100 * 2^-53 = 1e-14 of their magnitudes), and the way to an angle: an arccos of a cosine that is off by
# 1e-14, which at angles of at least 0.1 is 1e-13, and a division by a sine of at least 0.1. A factor of 10 is left.
TIGHT = 1e-11


def models(count: int, shape: tuple[int, ...] = (8, 9), *, seed: int = 0, spread: float = 1.0) -> list[np.ndarray]:
    """A random tensor and `count - 1` others, `spread` times another random tensor away."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=shape)
    return [first, *(first + spread * rng.normal(size=shape) for _ in range(count - 1))]


def close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.max(np.abs(got - want), initial=0.0) <= TIGHT * np.max(np.abs(want), initial=1.0)
