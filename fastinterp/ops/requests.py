"""Requests of merge methods beside a plain weighted sum: statistics of the inputs, and sums with masks.

Plain values, a leaf. A method is a generator: it yields Measure, MeasureMasked, Divergence or Select, each a read of
the inputs, is sent the answer, and returns the sum that is to be streamed. Apart from combine.py, because the linear
methods, which return a Combine only, need none of this and start sooner without it.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastinterp.ops.combine import Combine, GroupRow, Row

Per = Literal["tensor", "row", "column"]


ALL_BITS = 0x7FFFFFFF  # the largest magnitude as float32 bits, NaN included


@dataclass(frozen=True, slots=True)
class Mask:
    """The elements of a delta that take part in a merge: those that pass every test. Rule 10 of docs/NUMERICS.md.

    min_bits, max_bits  bounds of the magnitude's bits as float32 (an F64 delta is rounded to it), both included
    probability         that a random mask keeps an element, 0..1; 1 draws nothing
    rank_slope          the probability runs from probability - rank_slope for the smallest magnitude of a row (the last
                        dimension) to probability + rank_slope for the largest, linear in the rank; equal magnitudes
                        share their mean rank
    """

    min_bits: int = 0
    max_bits: int = ALL_BITS
    probability: float = 1.0
    rank_slope: float = 0.0

    @property
    def keeps_all(self) -> bool:
        return self == Mask()

    @property
    def is_random(self) -> bool:
        return self.probability < 1.0 or self.rank_slope != 0.0


@dataclass(frozen=True, slots=True)
class Score:
    """A number >= 0 for every element, shared by all models; elements with float32 bits below `min_bits` are dropped.

    kind      "variance": sum_i (d_i - mean)^2 over the models, d_i = x_i - x_0
              "divergence": |d_1| * factors[row]
    factors   f32[rows] of "divergence", as bytes: rows may be many
    """

    kind: Literal["variance", "divergence"]
    factors: bytes = b""
    min_bits: int = 0


# --- requests before the sum: each is one read of the inputs that it names -------------------------------------------


@dataclass(frozen=True, slots=True)
class Measure:
    """Request for a Gram matrix, L1 norms and counts: of the n inputs, or with `deltas` of x_0 and of x_i - x_0.

    per   "tensor": the answer is Measured. Else it is MeasuredGroups: "row", with a group per row, that is per index of
          all dimensions but the last; "column", per index of the last dimension. A 1-d or 0-d tensor is one row; each
          of its elements is a column
    """

    deltas: bool = False
    per: Per = "tensor"


@dataclass(frozen=True, slots=True)
class Measured:
    """The answer to Measure of the tensor.

    gram   f64[n][n], symmetric: gram[i][j] = <v_i, v_j>
    l1     f64[n], sum of |v_i|
    nonzero  elements that are not 0, NaN included
    """

    gram: tuple[tuple[float, ...], ...]
    l1: tuple[float, ...]
    nonzero: tuple[int, ...]

    def norm(self, i: int) -> float:
        return math.sqrt(self.gram[i][i])


@dataclass(frozen=True, slots=True)
class MeasuredGroups:
    """The answer to Measure by row or by column, in columns with a number per group, since groups may be many.

    gram   gram[i][j] is f64[groups], <v_i, v_j> of each; symmetric
    """

    gram: tuple[tuple[Sequence[float], ...], ...]


@dataclass(frozen=True, slots=True)
class MeasureMasked:
    """Request for statistics of masked deltas x_i - x_0. masks[0] is that of the base, and is ignored.

    masks        None: that input is not measured, and not read; with a score every input needs a mask
    score        drops elements of all models, as in MaskedCombine
    l1, squares  whether the answer has the L1 norms, and the squares: each costs time. Else they are 0
    """

    masks: tuple[Mask | None, ...]
    score: Score | None = None
    l1: bool = True
    squares: bool = True


@dataclass(frozen=True, slots=True)
class MeasuredMasked:
    """The answer to MeasureMasked, per input; 0 for the base, input 0, and for inputs that were not measured.

    l1         sum of |d_i|
    masked_l1  sum of |d_i| over the elements that pass the mask
    count      number of elements that pass the mask
    shared     number of those that pass the mask of at least one other model, too
    squares    sum of d_i^2 over the elements that pass the mask
    """

    l1: tuple[float, ...]
    masked_l1: tuple[float, ...]
    count: tuple[int, ...]
    shared: tuple[int, ...]
    squares: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Divergence:
    """Request for f64[rows]: sum over the last dimension of p*log(p/q).

    p = softmax(x_1) + 1e-8, q = softmax(x_0) + 1e-8, in float64
    """


@dataclass(frozen=True, slots=True)
class Select:
    """Request for order statistics: the k-th largest magnitude, exactly.

    ranks     (input, k): of |x_input - x_0| as float32, 1 <= k <= the number of elements. With a score, input is 0, and
              it is the k-th largest score. The answer is a tuple of Selected, one per rank
    score     whose values are ranked instead of the deltas; its `min_bits` is ignored
    nonzero   k is a fraction of the values that are not 0: rank floor(k * count); min_bits = ALL_BITS + 1, if that is 0
    whole     of the whole model: all merged tensors as one vector, k at most Tensor.model_numel
    """

    ranks: tuple[tuple[int, float], ...]
    score: Score | None = None
    nonzero: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Selected:
    """The answer for one rank.

    min_bits  float32 bits of the k-th largest; a mask with this bound keeps all elements that equal it
    count     number of values that are at least as large
    """

    min_bits: int
    count: int

    @property
    def value(self) -> float:
        return float(struct.unpack("<f", struct.pack("<I", self.min_bits))[0])


@dataclass(frozen=True, slots=True)
class GroupCombine:
    """A weighted sum whose weights differ by row or by column. Otherwise as Combine.

    weights      f64[groups * n], group by group: rows may be many, so this is a buffer and not tuples
    n            the number of inputs
    base         as in Combine
    sums_to_one  as in Combine, for every group
    """

    weights: array[float]
    n: int
    per: Literal["row", "column"]
    base: int | None = None
    sums_to_one: bool = False

    @property
    def used(self) -> list[int]:
        """The inputs that have a weight in any group."""
        return [i for i in range(self.n) if any(self.weights[i :: self.n])]

    @property
    def totals(self) -> array[float]:
        """f64[groups], the sums of the weights."""
        columns = [self.weights[i :: self.n] for i in range(self.n)]
        return array("d", map(math.fsum, zip(*columns, strict=True)))

    def row(self) -> GroupRow | Row:
        """What the kernels execute: rule 11 of docs/NUMERICS.md.

        An input whose weight is 0 in every group is not read. The pivot is the base, else the first input that is read.
        If all groups are the same copy, or have no weight at all, the row is that of Combine.
        Raises: ValueError, if the base has a weight, or a group lacks one.
        """
        groups, rest = divmod(len(self.weights), self.n)
        if rest:
            raise ValueError("every group needs a weight for each input")
        used = self.used
        if self.base is not None and self.base in used:
            raise ValueError("the base carries no weight")
        if not used:
            return Row(0, 0.0) if self.base is None else Row(self.base)
        lone = used[0]
        one_total = self.base is not None or self.sums_to_one
        if len(used) == 1 and self.weights[lone :: self.n].count(1.0) == groups:
            return Row(lone)
        pivot = lone if self.base is None else self.base
        terms = tuple(i for i in used if i != pivot)
        totals = array("d", (1.0,)) * groups if one_total else self.totals
        weights = array("d", bytes(8 * groups * len(terms)))
        for k, i in enumerate(terms):
            weights[k :: len(terms)] = self.weights[i :: self.n]
        return GroupRow(pivot, totals, terms, weights)


@dataclass(frozen=True, slots=True)
class MaskedCombine:
    """out = x_0 + step, element by element, from the deltas d_i = x_i - x_0 of those models that take part in it.

    Input i takes part where d_i passes masks[i], the element passes the score, and, with `sign_weights`, its sign was
    elected: the sign of sum_i sign_weights[i]*d_i over the inputs that pass, 0 counting as plus, must be that of
    sign_weights[i]*d_i, and d_i not 0. Then

        step = sum_i weights[i]*d_i          over those that take part, by fma in float32, in order, from +0
        step = step / sum_i shares[i]        if there are `shares`; a sum that is 0, or whose magnitude is below
                                             `least_share`, counts as `other_share`
        step = sole_weights[i]*d_i           instead, if there are `sole_weights` and only one takes part

    weights     f64[n]; weights[0], of the base, is 0. Each tuple has one entry per input; that of the base is ignored
    masks       None: all
    limit       d_i is first limited to -limit..limit
    importance  inputs whose elements are further factors: weights[i] becomes weights[i] * (x_importance[i] + 1e-6), and
                the sum of these divides. Then input 0 has a weight and an importance, too. With neither masks,
                sign_weights, shares nor sole_weights
    """

    weights: tuple[float, ...]
    masks: tuple[Mask, ...] | None = None
    sign_weights: tuple[float, ...] | None = None
    shares: tuple[float, ...] | None = None
    least_share: float = 0.0
    other_share: float = 1.0
    sole_weights: tuple[float, ...] | None = None
    limit: float = math.inf
    score: Score | None = None
    importance: tuple[int, ...] | None = None


Request = Measure | MeasureMasked | Divergence | Select
Sum = Combine | GroupCombine | MaskedCombine
Steps = Generator[Request, Any, Sum]  # of a method with statistics: it yields requests and returns the sum
