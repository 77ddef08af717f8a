"""The numeric contract in numpy, continued: order statistics of magnitudes. Rule 15 of docs/NUMERICS.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastinterp.ops.dtypes import DType
from fastinterp.ops.requests import ALL_BITS, Select, Selected
from fastinterp.reference.combine import Array
from fastinterp.reference.masked import columns_of, deltas, magnitudes, scores


def select(
    inputs: Sequence[Array], dtypes: Sequence[DType], request: Select, shape: Sequence[int]
) -> tuple[Selected, ...]:
    """The k-th largest of |x_i - x_0|, or of a score, for every rank of a request: by sorting.

    inputs  uint8[nbytes] each, any alignment, `dtypes` theirs, of a tensor of `shape`; input 0 is the base

    `request.whole` has no meaning here: see `ranked` and `pick`, of which this is the composition.
    Raises: ValueError, if a rank is none of the tensor's.
    """
    values = ranked(inputs, dtypes, request, shape)
    return tuple(pick(v, k, request.nonzero) for v, (_, k) in zip(values, request.ranks, strict=True))


@np.errstate(all="ignore")
def ranked(inputs: Sequence[Array], dtypes: Sequence[DType], request: Select, shape: Sequence[int]) -> list[Array]:
    """The values that each rank is taken of, as float32 bits: u32[numel] each. Of a whole model, concatenate tensors'.

    Every NaN is ALL_BITS, above all else. Whether another input is F64 changes nothing: the float64 difference of two
    float32, rounded to float32, is their float32 difference.
    """
    d = deltas(inputs, dtypes)
    if request.score is not None:
        return [scores(d, request.score, columns_of(shape))] * len(request.ranks)
    if any(not 1 <= i < len(inputs) for i, _ in request.ranks):
        raise ValueError(f"a rank is of an input from 1 to {len(inputs) - 1}, got {[i for i, _ in request.ranks]}")
    return [magnitudes(d[i - 1]) for i, _ in request.ranks]


def pick(values: Array, k: float, nonzero: bool) -> Selected:
    """The k-th largest of u32[numel], and how many are at least as large.

    nonzero  k is a fraction of the values that are not 0
    """
    rank = math.floor(k * int(np.count_nonzero(values))) if nonzero else int(k)
    if rank == 0 and nonzero:
        return Selected(ALL_BITS + 1, 0)
    if not 1 <= rank <= values.size:
        raise ValueError(f"rank {k} of {values.size} elements")
    least = int(np.sort(values)[values.size - rank])
    return Selected(least, int(np.count_nonzero(values >= least)))
