"""Jobs: the state of one output tensor during execution. A job yields steps and takes their results. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from fastinterp.execute.jobs.tensor_io import TensorIO, TensorStep
from fastinterp.ops.combine import Row

if TYPE_CHECKING:
    from fastinterp.execute.jobs.densities import Density

# The sums of one output tensor as plain values (ops/plain_sums.py), those of the tensors of documents above that it
# depends on before its own; None for a sum without a plain form.
Coefficients = Sequence[Mapping[str, Any] | None]


class Stats(msgspec.Struct, frozen=True, gc=False):
    """The statistics of one output of a tensor: see RoundingEffect of report.py. All 0 of a copy."""

    sampled: int = 0
    changed: int = 0
    sum_pp: float = 0.0
    sum_dd: float = 0.0
    sum_od: float = 0.0
    nan_in: int = 0
    inf_in: int = 0
    nan_out: int = 0
    inf_out: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one step: its answer, None if it writes; and the statistics of each output that it wrote."""

    answer: Any
    stats: list[dict[str, Any]]


class Job:
    """The job of an output tensor whose weighted sums need no statistics: one step writes it.

    rows  the weighted sum of each output; none: all inputs must have the same bytes, which are copied

    `stats` has an entry per output when the job is done.
    """

    __slots__ = ("done", "io", "rows", "stats")

    def __init__(self, io: TensorIO, rows: Sequence[Row]):
        self.io, self.rows = io, tuple(rows)
        self.stats: Sequence[Stats] = ()
        self.done = False

    @property
    def cost(self) -> int:
        """Bytes of the inputs, if they will be read again later; else 0."""
        return 0

    @property
    def whole(self) -> bool:
        """Whether it waits for the answer to a request about the whole model."""
        return False

    @property
    def nbytes(self) -> int:
        """Size of all inputs in bytes."""
        return sum(self.io.nbytes)

    @property
    def last(self) -> Job | None:
        """The job that writes the output: this one, or the last stage of a chain once it has begun."""
        return self

    def steps(self) -> list[TensorStep]:
        """The steps of this tensor for the next round."""
        return [self.io.combine(self.rows, range(len(self.rows))) if self.rows else self.io.copy_equal()]

    def take(self, results: Sequence[Result]) -> None:
        """Take the result of each of `steps`."""
        self.stats, self.done = tuple(Stats(**one) for one in results[0].stats), True

    def reads(self, k: int) -> tuple[int, ...]:
        """Indices of the inputs that output k was computed from."""
        return self.rows[k].inputs if self.rows else tuple(range(len(self.io.operands)))

    def copies(self, k: int) -> bool:
        """Whether output k is a bitwise copy of an input."""
        return not self.rows or is_copy(self.io, self.rows[k])

    def densities(self, k: int) -> Mapping[int, Density]:
        """The density of each input of output k that thresholds mask."""
        return {}

    def coefficients(self, k: int) -> Coefficients | None:
        """The sum of output k, as it came from the data; None, if the recipe tells it without any."""
        return None


def is_copy(io: TensorIO, row: Row) -> bool:
    """Whether a weighted sum is a bitwise copy of an input."""
    one = io.operands[row.pivot]
    return row.is_copy and one.dtype == io.out_dtype and one.as_stored
