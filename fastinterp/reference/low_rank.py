"""What adapters make of a tensor, in numpy: the definition of csrc/low_rank.cpp, rule 18 of docs/NUMERICS.md."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastinterp.reference.fma import fma32
from fastinterp.reference.groups import dot_columns, dot_rows

Floats = NDArray[np.float32]
_NAN = np.uint32(0x7FC00000).view(np.float32)


def add_product(w: Floats, left: Floats, right: Floats, scale: float) -> Floats:
    """w + scale * left @ right: y = fma(scale, t, w), where t = fma(left[:, k], right[k, :], t) over k, from +0.

    w: f32[rows, columns]. left: f32[rows, r]. right: f32[r, columns]. scale is rounded to float32.
    """
    t = np.zeros(w.shape, np.float32)
    for k in range(left.shape[1]):
        t = fma32(left[:, k : k + 1], right[k : k + 1], t)
    return canonical(fma32(np.float32(scale), t, w))


def with_magnitude(y: Floats, magnitude: Floats, per_row: bool) -> Floats:
    """y with each row, or column, brought to its magnitude: y * (magnitude / float32(sqrt(sum of squares))).

    The sums are those of rule 7 by row, or by column.
    """
    wide = y.astype(np.float64)
    squares = dot_rows(wide, wide) if per_row else dot_columns(wide, wide)
    with np.errstate(all="ignore"):
        factors = magnitude / np.sqrt(squares).astype(np.float32)
        return canonical(np.multiply(y, factors[:, None] if per_row else factors[None, :], dtype=np.float32))


def canonical(y: Floats) -> Floats:
    """y with every NaN as 7FC00000."""
    return np.where(np.isnan(y), _NAN, y)
