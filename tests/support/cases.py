"""The one table of dtypes x N x K x sizes x misalignments x inputs that tests and benchmarks share.

Everything about a case follows from its fields, and its inputs from its id, so `-k ID` runs the same case anywhere.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinterp.ops.combine import Combine, Row, philox_key
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, MERGING, DType
from fastinterp.reference import combine as reference

GUARD = 128  # bytes on either side of a buffer: two of the widest vectors
ALPHAS = (0.3, 0.0, 1.0, 0.5, -0.25, 1.5, 0.9, 0.1, 2.0, 0.7, 0.25, 0.75, 0.6, -1.0, 0.4, 0.05)  # of a sweep, up to 16


@dataclass(frozen=True, slots=True)
class Case:
    """One combine: its operands, its rows, and how it rounds."""

    in_dtypes: tuple[DType, ...]  # repeated to n inputs: a mixture takes them in turn
    out_dtype: DType
    n: int
    k: int
    numel: int
    offset: int  # bytes; 0: everything is aligned. See misalignment()
    fill: str
    rows_kind: str
    rounding: str = "nearest"
    fp8_overflow: str = "saturate"

    def __str__(self) -> str:
        ins = "+".join(d.name.lower() for d in self.in_dtypes)
        out = "" if self.in_dtypes == (self.out_dtype,) else f"-to-{self.out_dtype.name.lower()}"
        text = f"combine-{ins}{out}-n{self.n}-k{self.k}-{self.numel}-off{self.offset}-{self.fill}-{self.rows_kind}"
        stochastic = "-stochastic" if self.rounding == "stochastic" else ""
        return text + stochastic + ("-nonfinite" if self.fp8_overflow == "nonfinite" else "")

    @property
    def id(self) -> str:
        return str(self)

    @property
    def dtypes(self) -> list[DType]:
        """The dtype of each of the n inputs."""
        return list(itertools.islice(itertools.cycle(self.in_dtypes), self.n))

    @property
    def bytes(self) -> int:
        """Bytes that a perfect implementation reads and writes: each input that a row reads once, each output once."""
        read = {i for row in self.rows() for i in row.inputs}
        return (sum(self.dtypes[i].bits for i in read) + self.k * self.out_dtype.bits) * self.numel // 8

    @property
    def stats_every(self) -> int:
        """1, 2 or 3, so that chunks of the tensor are sampled and skipped."""
        return 1 + zlib.crc32(self.id.encode()) % 3

    @property
    def keys(self) -> list[int]:
        """Philox keys, one per row."""
        return [philox_key(7, 0, f"{self.id}.{j}") for j in range(self.k)]

    def misalignment(self, index: int) -> int:
        """Bytes from a 64-byte boundary to input `index`, or to output `index - n`: odd offsets differ in each."""
        return self.offset * (2 * index + 1) % 64

    def rows(self) -> list[Row]:
        """k rows of the case's kind, no two alike where n allows."""
        return [_ROWS[self.rows_kind](self.n, j) for j in range(self.k)]

    def inputs(self) -> list[NDArray[np.uint8]]:
        """The raw inputs: uint8[nbytes] each, aligned, read only."""
        return list(_inputs(self))

    def reference(self) -> tuple[list[NDArray[Any]], list[reference.Stats | None]]:
        """The outputs and the statistics that every backend must return."""
        return reference.combine(
            self.inputs(),
            self.dtypes,
            self.rows(),
            self.out_dtype,
            rounding=self.rounding,
            keys=self.keys,
            fp8_overflow=self.fp8_overflow,
            stats_every=self.stats_every,
        )


@lru_cache(maxsize=4)  # tests of one case on every backend follow each other
def _inputs(case: Case) -> tuple[NDArray[np.uint8], ...]:
    rng = np.random.default_rng(zlib.crc32(case.id.encode()))
    made = [fill(case.fill, dtype, case.numel, i, rng).view(np.uint8) for i, dtype in enumerate(case.dtypes)]
    for raw in made:
        raw.flags.writeable = False
    return tuple(made)


# --- rows ------------------------------------------------------------------------------------------------------------


def _pair(n: int, t: float) -> Row:
    """From the first input to the last."""
    weights = [0.0] * n
    weights[0] += 1.0 - t
    weights[-1] += t
    return Combine(tuple(weights), sums_to_one=True).row()


def _average(n: int, j: int) -> Row:
    kept = n - j % n  # of n, n - 1, ... inputs
    return Combine((0.0,) * (n - kept) + (1.0 / kept,) * kept, sums_to_one=True).row()


def _delta(n: int, j: int) -> Row:
    """base + 0.6 d1 - 0.3 d2 + 0.6 d3 ..., the base moving with j."""
    base = j % n
    weights = (0.0 if i == base else (0.6, -0.3)[(i - base - 1) % n % 2] * (1 + j) for i in range(n))
    return Combine(tuple(weights), base=base).row()


def _scaled(n: int, j: int) -> Row:
    """Rows whose total is not 1: sums, a difference (total 0), a plain product, and a total that only rounds to 1."""
    weights = [(0.75, -0.4, 1.3, 0.2)[(i + j) % 4] for i in range(n)]
    if j % 4 == 1:
        weights = [(-1.0) ** i for i in range(n)]
    row = Combine(tuple(weights)).row()
    if j % 4 >= 2:
        return Row(j % n, 1.0 + 2.0**-40 if j % 4 == 2 else -0.7)
    return row


_ROWS = {
    "average": _average,
    "interpolate": lambda n, j: _pair(n, 0.3 + 0.05 * j),
    "extrapolate": lambda n, j: _pair(n, 1.5 + 0.25 * j),
    "delta": _delta,
    "scaled": _scaled,
    "copy": lambda n, j: Row(j % n),
    "nothing": lambda n, j: Row(j % n, 0.0),
    "sweep": lambda n, j: _pair(n, ALPHAS[j]),
}


# --- inputs ----------------------------------------------------------------------------------------------------------


def fill(kind: str, dtype: DType, numel: int, index: int, rng: np.random.Generator) -> NDArray[Any]:
    """Codes of input `index`: unsigned integers[numel] of the dtype's width. See _FILLS for the kinds."""
    codes = _FILLS[kind](dtype, numel, index, rng)
    return codes.astype(np.uint64).astype(f"u{dtype.bits // 8}")


def _code(x: NDArray[Any], dtype: DType) -> NDArray[np.uint64]:
    return reference.narrow(np.asarray(x, np.float64), dtype).astype(np.uint64)


def _spread(dtype: DType) -> float:
    """Standard deviation of weights: that of real models, but inside the normal range of E4M3."""
    return 1.0 if dtype.bits == 8 else 0.02


def _normal(dtype: DType, numel: int, index: int, rng: np.random.Generator) -> NDArray[np.uint64]:
    return _code(rng.normal(0, _spread(dtype), numel), dtype)


def _common(dtype: DType, numel: int) -> NDArray[np.float64]:
    """What the inputs of `close` and `opposite` have in common."""
    return np.random.default_rng(numel).normal(0, _spread(dtype), numel)


def _close(dtype: DType, numel: int, index: int, rng: np.random.Generator) -> NDArray[np.uint64]:
    """Fine-tunes: at most one code away from the common weights."""
    codes = _code(_common(dtype, numel), dtype)
    steps = rng.integers(-1, 2, numel) if index else np.zeros(numel, np.int64)
    magnitude = codes & np.uint64(reference.FORMATS[dtype].sign - 1)
    return np.where(magnitude > 0, codes + steps.astype(np.uint64), codes)


def _opposite(dtype: DType, numel: int, index: int, rng: np.random.Generator) -> NDArray[np.uint64]:
    return _code(_common(dtype, numel) * (-1.0) ** index, dtype)


def _signs(dtype: DType, numel: int, rng: np.random.Generator) -> NDArray[np.uint64]:
    return np.where(rng.integers(0, 2, numel) > 0, np.uint64(reference.FORMATS[dtype].sign), np.uint64(0))


def _zeros(dtype: DType, numel: int, index: int, rng: np.random.Generator) -> NDArray[np.uint64]:
    return _signs(dtype, numel, rng)


def _sparse(codes: NDArray[np.uint64], dtype: DType, rng: np.random.Generator) -> NDArray[np.uint64]:
    """For F64, where the reference is slow beyond the middle range: `codes` in 1 element of 16, else small values."""
    if dtype is not F64:
        return codes
    keep = np.arange(codes.size) % 16 == 0
    return np.where(keep, codes, _code(rng.normal(0, 1e-200, codes.size), dtype))


def _subnormal(dtype: DType, numel: int, index: int, rng: np.random.Generator) -> NDArray[np.uint64]:
    bits = rng.integers(0, 1 << reference.FORMATS[dtype].mantissa, numel, dtype=np.uint64)
    return _sparse(bits | _signs(dtype, numel, rng), dtype, rng)


def _huge(dtype: DType, numel: int, index: int, rng: np.random.Generator) -> NDArray[np.uint64]:
    """The top two binades, so that sums overflow the storage dtype or the compute dtype."""
    fmt = reference.FORMATS[dtype]
    below = rng.integers(0, 2 << fmt.mantissa, numel, dtype=np.uint64)
    return _sparse((np.uint64(fmt.largest) - below) | _signs(dtype, numel, rng), dtype, rng)


def _patterns(dtype: DType, numel: int, index: int, rng: np.random.Generator) -> NDArray[np.uint64]:
    """All codes of 8- and 16-bit dtypes, in another order for each input; special values and random bits of the others.

    The step is odd, so that 65536 elements hold every 16-bit code exactly once.
    """
    e = np.arange(numel, dtype=np.uint64)
    if dtype.bits <= 16:
        return (e * np.uint64(1 + 2 * 77 * index) + np.uint64(12345 * index)) & np.uint64((1 << dtype.bits) - 1)
    fmt = reference.FORMATS[dtype]
    inf, one = fmt.largest + 1, fmt.bias << fmt.mantissa
    smallest = 1 << fmt.mantissa
    # The last two of the first line: a quiet NaN with a payload, and a signalling one.
    special = [0, 1, smallest - 1, smallest, one, one + 1, fmt.largest, fmt.largest - 1, inf, fmt.nan | 5, inf | 1]
    for small in (F16, BF16, F8_E4M3, F8_E5M2):  # where the small dtypes overflow and underflow: one code around
        codes = np.array([1, 1 << reference.FORMATS[small].mantissa, reference.FORMATS[small].largest])
        value = reference.widen(codes.astype(f"u{small.bits // 8}").view(np.uint8), small).astype(np.float64)
        special += [int(c) + d for c in _code(value * 1.5, dtype) for d in (-1, 0, 1)]
        special += [int(c) + d for c in _code(value * 0.5, dtype) for d in (-1, 0, 1)]
    table = np.array(special, np.uint64)[rng.integers(0, len(special), numel)] ^ _signs(dtype, numel, rng)
    noise = rng.integers(0, 1 << 63, numel, dtype=np.uint64) >> np.uint64(64 - dtype.bits)
    codes = np.where(e % np.uint64(32) < 16, table, noise ^ _signs(dtype, numel, rng))
    return _sparse(codes, dtype, rng)


_FILLS = {
    "normal": _normal,
    "patterns": _patterns,
    "close": _close,
    "opposite": _opposite,
    "zeros": _zeros,
    "subnormal": _subnormal,
    "huge": _huge,
}


# --- buffers ---------------------------------------------------------------------------------------------------------


class Guarded:
    """A buffer with sentinel bytes on both sides, `misalignment` bytes off a 64-byte boundary.

    view: uint8[nbytes], filled with a byte pattern of its own, so that elements never written show.
    """

    def __init__(self, nbytes: int, misalignment: int) -> None:
        self._all = np.full(nbytes + 2 * GUARD + 64, 0xA5, np.uint8)
        self._start = GUARD + (misalignment - self._all.ctypes.data) % 64
        self.view = self._all[self._start : self._start + nbytes]
        self.view[:] = 0x5B

    @property
    def address(self) -> int:
        return self._all.ctypes.data + self._start

    @property
    def whole(self) -> NDArray[np.uint8]:
        """The buffer with what lies around it."""
        return self._all

    def intact(self) -> bool:
        """Nothing was written beside the buffer."""
        end = self._start + self.view.size
        return bool((self._all[: self._start] == 0xA5).all() and (self._all[end:] == 0xA5).all())


def guarded(case: Case) -> tuple[list[Guarded], list[Guarded]]:
    """The case's inputs, filled, and its outputs: every one guarded, and misaligned on purpose."""
    inputs = []
    for i, raw in enumerate(case.inputs()):
        inputs.append(Guarded(raw.size, case.misalignment(i)))
        inputs[-1].view[:] = raw
    size = case.numel * case.out_dtype.bits // 8
    return inputs, [Guarded(size, case.misalignment(case.n + j)) for j in range(case.k)]


# --- the table -------------------------------------------------------------------------------------------------------

_MIXTURES = ((BF16, F32), (F16, BF16), (F32, F64), (BF16, F8_E4M3), (F8_E5M2, F16, F64))
_AXES: dict[str, tuple[Any, ...]] = {
    "in_dtypes": tuple((d,) for d in MERGING) + _MIXTURES,
    "out_dtype": MERGING,
    "n": (1, 2, 3, 5, 64),
    "k": (1, 2, 3, 16),
    "numel": (0, 1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 16383, 16384, 16385),
    "offset": (0, 1, 2, 3, 5, 32),
    "fill": tuple(_FILLS),
    "rows_kind": tuple(_ROWS),
    "rounding": ("nearest", "stochastic"),
    "fp8_overflow": ("saturate", "nonfinite"),
}
_FEWEST = {"interpolate": 2, "extrapolate": 2, "sweep": 2, "delta": 3}  # inputs that give a kind of rows its sense


def _pairs(case: Case) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """All pairs of axis values that a case covers."""
    return set(itertools.combinations([(axis, getattr(case, axis)) for axis in _AXES], 2))


def _possible(values: dict[str, Any]) -> Case:
    """The case nearest to `values` that makes sense and is small enough for a slow reference."""
    v = dict(values)
    v["n"] = max(v["n"], _FEWEST.get(v["rows_kind"], 1), len(v["in_dtypes"]))
    if v["numel"] > 1000:
        v["n"], v["k"] = min(v["n"], 3), min(v["k"], 2)
    if v["out_dtype"].bits != 8:
        v["fp8_overflow"] = "saturate"
    return Case(**v)


def _pairwise(cases: list[Case]) -> list[Case]:
    """`cases`, and more until every pair of axis values that is possible occurs: greedy, and always the same."""
    done: set[Any] = set().union(*map(_pairs, cases))
    for (axis, other), start in zip(itertools.combinations(_AXES, 2), itertools.count()):
        for turn, (a, b) in enumerate(itertools.product(_AXES[axis], _AXES[other])):
            if ((axis, a), (other, b)) in done:
                continue
            # Start anywhere, then let each axis in turn take the value that covers most.
            values = {name: _AXES[name][(start + turn) % len(_AXES[name])] for name in _AXES} | {axis: a, other: b}
            for name, choices in _AXES.items():
                if name not in (axis, other):
                    options = [values | {name: choice} for choice in choices]
                    values = max(options, key=lambda o: len(_pairs(_possible(o)) - done))
            case = _possible(values)
            if getattr(case, axis) == a and getattr(case, other) == b:
                cases.append(case)
                done |= _pairs(case)
    return cases


def _chosen() -> list[Case]:
    """Cases that stand for a promise by themselves: all 16-bit patterns, every pair of dtypes, sizes beyond a chunk."""
    cases = []
    for dtype, kind in itertools.product((BF16, F16), ("interpolate", "copy", "scaled")):
        cases.append(Case((dtype,), dtype, 2, 1, 65536, 3, "patterns", kind))
    for dtype, out in itertools.product((BF16, F16), (F32, F8_E4M3, F8_E5M2)):
        cases.append(Case((dtype,), out, 1, 1, 65536, 0, "patterns", "copy"))
    cases += [Case((d,), d, 2, 1, 65536, 1, "patterns", "extrapolate", "stochastic") for d in (BF16, F16)]
    for (i, dtype), (j, out) in itertools.product(enumerate(MERGING), enumerate(MERGING)):
        kind, policy = list(_ROWS)[(i + j) % len(_ROWS)], "nonfinite" if out.bits == 8 and i % 2 else "saturate"
        cases.append(Case((dtype,), out, 3, 1, 4099, 3, "patterns", kind, "nearest", policy))
        cases.append(Case((dtype,), out, 2, 1, 4099, 1, "patterns", "interpolate", "stochastic", policy))
    cases += [Case((d,), d, 4, 1, 16385, 3, "patterns", "average") for d in MERGING]
    cases += [Case((d,), d, 3, 2, 257, 0, "close", "delta") for d in MERGING]
    cases.append(Case((BF16,), BF16, 2, 1, 100003, 1, "close", "interpolate"))
    cases.append(Case((BF16, F32), BF16, 3, 1, 100003, 2, "normal", "average", "stochastic"))
    cases.append(Case((BF16,), F8_E4M3, 2, 2, 100003, 3, "normal", "sweep"))
    cases.append(Case((F32,), F32, 2, 1, 100003, 5, "huge", "extrapolate"))
    return cases


CASES = _pairwise(_chosen())
