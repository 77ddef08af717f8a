"""Jobs: the state of one output tensor during execution. A job yields steps and takes their results. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastinterp.execute.jobs.tensor_io import TensorIO, TensorStep
from fastinterp.ops.combine import Row

if TYPE_CHECKING:
    from fastinterp.execute.jobs.densities import Density


@dataclass(frozen=True, slots=True)
class Result:
    """Of one step: its answer, or None if it writes; and the statistics of each output that it wrote."""

    answer: Any
    stats: list[dict[str, float]]


class Job:
    """An output tensor whose sums need no statistics: one step writes it.

    rows  one per output, or none: all inputs must have the same bytes

    `stats` has an entry per output when it is done.
    """

    cost = 0  # bytes of the inputs, if they will be read again
    whole = False  # whether it waits for an answer about the whole model

    def __init__(self, place: TensorIO, rows: Sequence[Row]):
        self.place, self.rows = place, tuple(rows)
        self.stats: list[dict[str, float]] = []
        self.done = False

    @property
    def nbytes(self) -> int:
        """Of the inputs."""
        return sum(self.place.nbytes)

    @property
    def last(self) -> Job | None:
        """The job that writes the output, if it has come to that."""
        return self

    def steps(self) -> list[TensorStep]:
        """What the next round is to do for this tensor."""
        place = self.place
        return [place.combine(self.rows, range(len(self.rows))) if self.rows else place.same()]

    def take(self, results: Sequence[Result]) -> None:
        """What came of each of `steps`."""
        self.stats, self.done = results[0].stats, True

    def reads(self, k: int) -> tuple[int, ...]:
        """The inputs that output k was made of."""
        return self.rows[k].inputs if self.rows else tuple(range(len(self.place.operands)))

    def copies(self, k: int) -> bool:
        """Whether output k has the bytes of an input."""
        return not self.rows or is_copy(self.place, self.rows[k])

    def densities(self, k: int) -> Mapping[int, Density]:
        """Of inputs of which thresholds keep a part in output k."""
        return {}


def is_copy(place: TensorIO, row: Row) -> bool:
    """Whether a sum has the bytes of an input."""
    return row.is_copy and place.operands[row.pivot].dtype == place.out_dtype
