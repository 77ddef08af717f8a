"""Jobs of tensors that depend on tensors of earlier recipe documents, which are computed first, into a temporary file.

Imported only where a plan has such tensors.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinterp.checkpoint.regular_file import close
from fastinterp.errors import OutputError
from fastinterp.execute.jobs.job import Coefficients, Job, Result
from fastinterp.execute.jobs.tensor_io import TensorStep
from fastinterp.execute.sources import Sources, storage
from fastinterp.ops.operands import Operand, Stored
from fastinterp.plan.inputs import ConvertedInput, GatheredInput, StoredInput, TensorInput
from fastinterp.plan.planned import PlannedTensor

if TYPE_CHECKING:
    from fastinterp.execute.jobs.densities import Density

_ALIGN = 4096  # bytes

# Makes the job of a tensor: from the operand of each input, and its offset in the temporary file; None: in the output.
Make = Callable[[PlannedTensor, Callable[[TensorInput], Operand], int | None], Job]


class ScratchFile:
    """An unnamed temporary file, open until `stack` closes. Freed space is used again, so that it stays small.

    never_free    space is never reused
    source, sink  its indices among the sources and among the sinks
    """

    def __init__(self, folder: Path, stack: ExitStack, never_free: bool):
        with storage(folder, OutputError), tempfile.TemporaryFile(dir=folder) as file:
            self.fd = os.dup(file.fileno())
        stack.callback(close, self.fd, folder)
        self.never_free = never_free
        self.source = self.sink = -1
        self.size = 0
        self._free: list[tuple[int, int]] = []  # (size, offset)

    def take(self, nbytes: int) -> tuple[int, int]:
        """Allocate space, as (size, offset): the smallest free extent that fits, else at the end of the file."""
        size = -(-nbytes // _ALIGN) * _ALIGN
        fitting = [extent for extent in self._free if extent[0] >= size]
        if not fitting:
            self.size += size
            return size, self.size - size
        extent = min(fitting)
        self._free.remove(extent)
        return extent

    def free(self, extents: Sequence[tuple[int, int]]) -> None:
        if not self.never_free:
            self._free += extents


class ChainedJob(Job):
    """An output tensor and the intermediate tensors that it depends on: one stage after the other.

    stages  the tensors in the order in which they are computed; the last one is written to the output
    """

    def __init__(self, stages: Sequence[PlannedTensor], scratch: ScratchFile, sources: Sources, make: Make):
        self.stats, self.done = (), False
        self._cost = sum(entry.nbytes for stage in stages for entry in stage.inputs)
        self._waiting = list(stages)
        self._scratch, self._sources, self._make = scratch, sources, make
        self._extents: dict[
            Hashable, tuple[int, int]
        ] = {}  # id of an intermediate tensor -> (size, offset) in the file
        self._sums: list[Mapping[str, Any] | None] = []  # of the stages that are done
        self.now: Job | None = None

    @property
    def cost(self) -> int:
        return self._cost if self.now is None else self.now.cost

    @property
    def nbytes(self) -> int:
        return self._cost

    @property
    def whole(self) -> bool:
        return self.now is not None and self.now.whole

    @property
    def last(self) -> Job | None:
        return self.now if not self._waiting else None

    def steps(self) -> list[TensorStep]:
        return self._current().steps()

    def take(self, results: Sequence[Result]) -> None:
        job = self._current()
        job.take(results)
        if not job.done:
            return
        if self._waiting:
            self._sums += job.coefficients(0) or [None]
            self._current(job)
            return
        self.stats, self.done = job.stats, True
        self._scratch.free(list(self._extents.values()))

    def reads(self, k: int) -> tuple[int, ...]:
        return self._current().reads(k)

    def copies(self, k: int) -> bool:
        return self._current().copies(k)

    def densities(self, k: int) -> Mapping[int, Density]:
        return self._current().densities(k)

    def coefficients(self, k: int) -> Coefficients | None:
        own = self._current().coefficients(k)
        if own is None and not any(self._sums):
            return None
        return [*self._sums, *(own or [None])]

    def _current(self, ended: Job | None = None) -> Job:
        """The job of the current stage; of the next one, if `ended` is the current job."""
        if self.now is None or self.now is ended:
            stage = self._waiting.pop(0)
            offset = None
            if self._waiting:
                self._extents[id(stage)] = self._scratch.take(stage.nbytes)
                offset = self._extents[id(stage)][1]
            self.now = self._make(stage, self._operand, offset)
        return self.now

    def _operand(self, tensor: TensorInput) -> Operand:
        return tensor.open(self)

    # OpenFiles: how inputs are opened.

    def stored(self, tensor: StoredInput) -> Operand:
        return self._sources.operand(tensor)

    def converted(self, tensor: ConvertedInput) -> Operand:
        return self._sources.operand(tensor)

    def gathered(self, tensor: GatheredInput) -> Operand:
        return self._sources.operand(tensor)

    def intermediate(self, tensor: TensorInput) -> Operand:
        return Stored(self._scratch.source, self._extents[tensor.key][1], tensor.dtype.kernel_code)
