"""The operations that methods request, as plain values. A leaf: imports nothing of fastinterp but its errors.

Every method comes down to `combine`: read each input once, write weighted sums of them. This module also
holds the rules of the numeric contract that are decided before any element is touched: which input is the
pivot, which inputs are not read at all, and what is a copy.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from fastinterp.errors import MethodError

NUMERICS = 1  # version of the numeric contract; changing any output bit bumps it
MAX_INPUTS, MAX_OUTPUTS = 64, 256  # of one combine; the same numbers stand in csrc/ops.h
LARGEST = (2.0 - 2.0**-23) * 2.0**127  # of float32: coefficients are rounded to it before they reach a kernel
MAX_POINTS = 4096  # of a path that is walked at once: each MAX_OUTPUTS of them take one read


@dataclass(frozen=True, slots=True)
class Combine:
    """A weighted sum of the inputs, as a method returns it.

    weights     f64[n], one per input, in recipe order
    base        index of the base, or None. With a base the sum is out = x_b + sum_i weights[i] * (x_i - x_b), and
                weights[base] must be 0. Without: out = sum_i weights[i] * x_i
    sums_to_one the weights were normalised: their sum is 1 by definition, whatever their rounding says
    pivot       without a base: the input that is the pivot, if it has a weight. None: the first that has one. What is
                rounded is x_i - x_pivot, so of inputs of very different lengths it is to be the shortest
    """

    weights: tuple[float, ...]
    base: int | None = None
    sums_to_one: bool = False
    pivot: int | None = None

    def row(self) -> Row:
        """What the kernels execute: rules 2 and 3 of docs/NUMERICS.md.

        An input of weight 0 is not read; a lone input of weight 1 is copied; the pivot is the base, else `pivot`, else
        the first input that is read. If all weights are 0 and there is no base, the sum is 0 times the first input: +0
        where that is finite. Methods for which this is a mistake say so themselves.
        """
        used = [(i, w) for i, w in enumerate(self.weights) if w != 0.0]
        if self.base is not None:
            if self.weights[self.base] != 0.0:
                raise ValueError("the base carries no weight")
            if not used:
                return Row(self.base)
            if len(used) == 1 and used[0][1] == 1.0:
                return Row(used[0][0])
            return Row(self.base, 1.0, tuple(used))
        if not used:
            return Row(0, 0.0)
        pivot = used[0][0] if self.pivot is None or self.weights[self.pivot] == 0.0 else self.pivot
        total = 1.0 if self.sums_to_one else math.fsum(self.weights)
        return Row(pivot, total, tuple((i, w) for i, w in used if i != pivot))


@dataclass(frozen=True, slots=True)
class Row:
    """One output of a combine: out = total * p + sum_k weight_k * (x_k - p), with p the pivot.

    No terms and a total of 1 is a copy of the pivot: bit for bit when the dtypes agree. No terms and a total of 0 makes
    zeros: +0 for every finite element of the pivot, NaN for the others.
    """

    pivot: int
    total: float = 1.0
    terms: tuple[tuple[int, float], ...] = ()  # (input, weight), in recipe order; never the pivot, never weight 0

    @property
    def is_copy(self) -> bool:
        return not self.terms and self.total == 1.0

    @property
    def inputs(self) -> tuple[int, ...]:
        """The inputs that are read, in ascending order."""
        return tuple(sorted({self.pivot, *[i for i, _ in self.terms]}))


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One output of a combine by groups: out = totals[g] * p + sum_k weights[g][k] * (x_k - p), g the element's group.

    Never a copy. totals f64[groups]; inputs the terms' inputs, in recipe order, never the pivot; weights
    f64[groups * len(inputs)], group by group. Buffers of float64, which the pump takes as they are.
    """

    pivot: int
    totals: Sequence[float]
    inputs: tuple[int, ...]
    weights: Sequence[float]


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a method may know of the tensor that it merges.

    layer, layers  index of its layer and their number, or None and 0 if it is in no layer
    model_numel    elements of all merged tensors of the model
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    layers: int = 0
    model_numel: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """All dimensions but the last, multiplied; 1 for 0-d and 1-d tensors."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """The last dimension: the length of a row; 1 for 0-d tensors."""
        return self.shape[-1] if self.shape else 1


def philox_key(seed: int, stream: int, name: str) -> int:
    """The 64-bit Philox key of one tensor: the same for any order of tensors, blocks, threads and devices.

    seed    0 .. 2**64 - 1, as in the recipe
    stream  0 for rounding at the store; 1 + i for the random mask of model i
    name    of the output tensor
    """
    import hashlib  # here, because only stochastic rounding and random masks pay for it

    text = seed.to_bytes(8, "little") + stream.to_bytes(4, "little") + name.encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def renumbered(rows: Iterable[Row]) -> tuple[tuple[int, ...], tuple[Row, ...]]:
    """The inputs that any of the rows reads, ascending, and the rows with indices among these as inputs."""
    return _renumbered(tuple(rows))


@lru_cache(maxsize=64)  # most tensors of a model have the sums of the one before
def _renumbered(rows: tuple[Row, ...]) -> tuple[tuple[int, ...], tuple[Row, ...]]:
    inputs = tuple(sorted({i for row in rows for i in row.inputs}))
    at = {i: k for k, i in enumerate(inputs)}
    moved = (replace(row, pivot=at[row.pivot], terms=tuple((at[i], w) for i, w in row.terms)) for row in rows)
    return inputs, tuple(moved)


def check_coefficients(values: Iterable[float], name: str) -> None:
    """See that float32 can hold the coefficients of a sum.

    Raises: MethodError with the tensor's name, if it cannot, or if they are no numbers.
    """
    if isinstance(values, array) and sum(map(abs, values)) <= LARGEST:
        return  # they are many, and so small that even their sum is not beyond it
    for value in values:
        if not abs(value) <= LARGEST:
            why = "is no number" if math.isnan(value) else "is beyond float32's 3.4e38"
            remedy = "Change the parameters, or look for NaN and Inf in the models"
            raise MethodError(f"a coefficient of {name} {why}: {value:g}. {remedy}")
