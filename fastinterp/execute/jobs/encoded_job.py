"""Jobs of output tensors that are stored as codes and scales: their sums are encoded, and copies keep stored bytes.

Imported only where a plan has such tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from msgspec.structs import replace

from fastinterp.execute.jobs.job import Coefficients, Job, Result
from fastinterp.execute.jobs.tensor_io import TensorIO, TensorStep
from fastinterp.ops.combine import renumbered
from fastinterp.ops.dtypes import F8_E4M3
from fastinterp.ops.operands import Operand, Stored
from fastinterp.ops.steps import Combine, CopyEqual, LargestMagnitudes, SumStep, WritingStep

if TYPE_CHECKING:
    from fastinterp.execute.jobs.densities import Density
    from fastinterp.plan.output_encoding import OutputEncoding

Places = Sequence[tuple[int, int]]  # (sink, offset)
_BYTES = F8_E4M3.kernel_code  # of a dtype of one byte: what is only copied


class EncodedJob(Job):
    """The job of an output tensor that is encoded, around the job that sums it as float32.

    job       its sinks and offsets are those of the codes
    encoding  how sums become codes
    scales    where the scales of each output go: a place for each of the encoding's
    """

    def __init__(self, job: Job, io: TensorIO, encoding: OutputEncoding, scales: Sequence[Places]):
        self._job, self.io, self._encoding = job, io, encoding
        self.stats, self.done = (), False
        self._scales = dict(zip(zip(io.sinks, io.offsets, strict=True), scales, strict=True))
        pairs = zip(io.operands, encoding.alike, strict=True)
        self._alike = [operand for operand, alike in pairs if alike]
        self._writers: list[_Writer] = []
        self._measured = False
        self._copied: set[tuple[int, int]] = set()  # the codes of outputs that are copies

    @property
    def cost(self) -> int:
        return self.nbytes if self._encoding.measures and not self._measured else self._job.cost

    @property
    def whole(self) -> bool:
        return self._job.whole

    @property
    def nbytes(self) -> int:
        return self._job.nbytes

    @property
    def last(self) -> Job | None:
        return self._job.last

    def steps(self) -> list[TensorStep]:
        if not self._writers:
            steps = self._job.steps()
            if not all(isinstance(step.native, WritingStep) for step in steps):
                return steps
            self._writers = [_Writer(step, self._encoding, self._scales, self._alike) for step in steps]
            self._copied = {at for writer in self._writers for at in writer.copied}
        if self._encoding.measures and not self._measured:
            surveys = [writer.survey() for writer in self._writers if writer.sums is not None]
            if surveys:
                return surveys
        self._measured = True
        return [step for writer in self._writers for step in writer.steps()]

    def take(self, results: Sequence[Result]) -> None:
        if not self._writers:
            self._job.take(results)
            return
        left = iter(results)
        if not self._measured:
            for writer in self._writers:
                if writer.sums is not None:
                    writer.measured(next(left))
            self._measured = True
            return
        self._job.take([writer.result(left) for writer in self._writers])
        self.stats, self.done = self._job.stats, self._job.done

    def reads(self, k: int) -> tuple[int, ...]:
        return self._job.reads(k)

    def copies(self, k: int) -> bool:
        return (self.io.sinks[k], self.io.offsets[k]) in self._copied

    def densities(self, k: int) -> Mapping[int, Density]:
        return self._job.densities(k)

    def coefficients(self, k: int) -> Coefficients | None:
        return self._job.coefficients(k)


class _Writer:
    """The steps that write what one step of sums would write, encoded.

    sums    the step for those outputs that are no copies of codes, None if all are
    copied  the places of the codes of the others
    """

    def __init__(
        self,
        step: TensorStep,
        encoding: OutputEncoding,
        scales: Mapping[tuple[int, int], Places],
        alike: Sequence[Operand],
    ):
        native = step.native
        if not isinstance(native, SumStep):
            raise TypeError(f"sums are encoded, and {native.kind} makes none")
        self._step, self._encoding, self._outputs = step, encoding, len(native.sinks)
        self._copies: list[TensorStep] = []
        self.copied: list[tuple[int, int]] = []
        summed = list(range(self._outputs))
        places = list(zip(native.sinks, native.offsets, strict=True))
        if isinstance(native, Combine):
            for k, row in enumerate(native.rows):
                of = native.inputs[row.pivot]
                if row.is_copy and any(of is operand for operand in alike) and isinstance(of, Stored):
                    summed.remove(k)
                    self.copied.append(places[k])
                    self._copies += self._copy(of, places[k], scales[places[k]])
            if summed and self.copied:
                inputs, rows = renumbered([native.rows[k] for k in summed])
                native = replace(native, rows=rows, inputs=tuple(native.inputs[i] for i in inputs))
        self._summed = summed
        self.sums: SumStep | None = None
        if summed:
            if encoding.encoder is None:
                raise TypeError(f"there is no encoder of {encoding.format}")
            encoder = replace(encoding.encoder, scales=tuple(chain.from_iterable(scales[places[k]] for k in summed)))
            sinks, offsets = zip(*(places[k] for k in summed), strict=True)
            self.sums = replace(native, sinks=sinks, offsets=offsets, keys=(), encoder=encoder)

    def _copy(self, of: Stored, codes: tuple[int, int], scales: Places) -> list[TensorStep]:
        """Copies of the codes and the scales of an operand, as they are stored."""
        assert of.decoder is not None
        _, dtype, shape = self._encoding.codes
        numel = 1
        for size in shape:
            numel *= size
        pieces = [(of.source, of.offset, dtype.nbytes(numel) or 0, codes)]
        companions = zip(of.decoder.companions, scales, strict=True)
        pieces += [(source, offset, nbytes, place) for (source, offset, nbytes), place in companions]
        return [
            TensorStep(
                self._step.name,
                CopyEqual(inputs=(Stored(source, offset, _BYTES),), numel=nbytes, sinks=(sink,), offsets=(at,)),
                2 * nbytes,
            )
            for source, offset, nbytes, (sink, at) in pieces
        ]

    def survey(self) -> TensorStep:
        """The step that measures the largest magnitudes of the sums."""
        assert self.sums is not None
        native = LargestMagnitudes(
            inputs=self.sums.inputs, numel=self.sums.numel, columns=self.sums.columns, of=self.sums
        )
        return TensorStep(self._step.name, native, self._step.nbytes)

    def measured(self, result: Result) -> None:
        """Take the result of `survey`."""
        assert self.sums is not None
        assert self.sums.encoder is not None
        self.sums = replace(self.sums, encoder=replace(self.sums.encoder, magnitudes=tuple(result.answer[0])))

    def steps(self) -> list[TensorStep]:
        return [*([] if self.sums is None else [replace_native(self._step, self.sums)]), *self._copies]

    def result(self, results: object) -> Result:
        """The result of the step of sums, from those of `steps`."""
        stats: list[dict[str, float]] = [{} for _ in range(self._outputs)]
        left = iter(results)  # type: ignore[call-overload]
        if self.sums is not None:
            for k, one in zip(self._summed, next(left).stats, strict=True):
                stats[k] = one
        for _ in self._copies:
            next(left)
        return Result(None, stats)


def replace_native(step: TensorStep, native: SumStep) -> TensorStep:
    """The step with another native one."""
    return TensorStep(step.name, native, step.nbytes, step.held)
