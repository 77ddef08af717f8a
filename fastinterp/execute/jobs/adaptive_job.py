"""Jobs of tensors whose methods request statistics before they sum, and steps of sums by group and with masks.

Imported only where a plan has such tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from fastinterp.backends import cpu
from fastinterp.execute.jobs.densities import Density, densities
from fastinterp.execute.jobs.job import Coefficients, Job, Result, Stats, is_copy
from fastinterp.execute.jobs.tensor_io import TensorIO, TensorStep
from fastinterp.ops import steps
from fastinterp.ops.combine import GroupRow, Row
from fastinterp.ops.dtypes import F64
from fastinterp.ops.masked import (
    Precomputed,
    filled_masks,
    mask_tests,
    masked_output,
    measured_masked,
    read_inputs,
    score_of,
    terms,
)
from fastinterp.ops.plain_sums import plain_sum
from fastinterp.ops.requests import (
    Divergence,
    GroupCombine,
    Mask,
    MaskedCombine,
    Measure,
    Measured,
    MeasuredGroups,
    MeasureMasked,
    Request,
    Select,
    Sum,
)
from fastinterp.ops.select import Coarse, Fine, elements_read, selecting
from fastinterp.ops.select import step as histogram_step
from fastinterp.ops.steps import MaskFill, MaskPlace
from fastinterp.plan.method_run import MethodRun, inputs_of

_T = TypeVar("_T")
RequestSteps = Generator[TensorStep, Any, Any]  # steps, sent their answers one by one; returns the answer to a request
MASK_BYTES = 64 << 20  # masks of one tensor that are held for its sum; where they are larger, the sum draws them again
Masks = dict[tuple[int, Mask, int], MaskPlace]  # by input, mask and seed


class AdaptiveJob(Job):
    """The job of an output tensor whose method requests statistics of its inputs: it is written after the answers.

    n            number of inputs of the method; those of side-cars follow them
    calls        as in MethodRun
    name, seeds  random masks are drawn from them: the tensor's name, and a seed per output
    fills_masks  store the masks that statistics compute, for the sum
    """

    def __init__(
        self, io: TensorIO, n: int, calls: Sequence[Callable[[], Any]], name: str, seeds: Sequence[int],
        fills_masks: bool = True,
    ):  # fmt: skip
        super().__init__(io, ())
        self.n, self._name, self._seeds = n, name, seeds
        self._run = MethodRun(name, calls, seeds)
        self._answers: dict[tuple[Request, int], Any] = {}
        self._surveys: dict[tuple[Request, int], tuple[RequestSteps, TensorStep]] = {}
        self._written: list[tuple[int, ...]] = []
        # Per output: the inputs it reads, whether it is a copy, and the densities of its inputs.
        self._effects: list[tuple[tuple[int, ...], bool, dict[int, Density]]] = []
        self._plain: list[dict[str, Any] | None] = []
        # Masks that statistics have filled; None: they fill none.
        self._masks: Masks | None = {} if fills_masks else None
        self._begin()

    @property
    def cost(self) -> int:
        return 0 if self._run.ended else sum(self.io.nbytes)

    @property
    def whole(self) -> bool:
        return not self._run.ended and not self._surveys

    @property
    def whole_requests(self) -> list[Select]:
        """The requests about the whole model that have no answer yet."""
        unanswered = (r for r, seed in self._run.requests if (r, seed) not in self._answers)
        return [r for r in unanswered if isinstance(r, Select) and r.whole]

    def answer(self, request: Select, answer: Any) -> None:
        """The answer to one of `whole_requests`."""
        for key in self._run.requests:
            if key[0] == request:
                self._answers[key] = answer
        self._advance()

    def steps(self) -> list[TensorStep]:
        if not self._run.ended:
            return [step for _, step in self._surveys.values()]
        sums = self._run.sums
        rows = [_row(total) for total in sums]
        # Recorded now, because sums by row are large: they are not held until the end.
        self._effects = [
            (
                inputs_of(total, self.n),
                isinstance(row, Row) and is_copy(self.io, row),
                densities(total, selected, self.io.numel),
            )
            for row, total, selected in zip(rows, sums, self._run.selected, strict=True)
        ]
        self._plain = [plain_sum(total) for total in sums]
        writers = _writers(self.io, rows, sums, self._name, self._seeds, self._masks or {})
        self._written = [outputs for outputs, _ in writers]
        return [step for _, step in writers]

    def take(self, results: Sequence[Result]) -> None:
        if self._run.ended:
            pairs = zip(self._written, results, strict=True)
            by_output = {k: stats for outputs, r in pairs for k, stats in zip(outputs, r.stats, strict=True)}
            self.stats, self.done = tuple(Stats(**by_output[k]) for k in sorted(by_output)), True
            self._run.clear()
            self._masks = None
            return
        for (key, (survey, _)), result in zip(list(self._surveys.items()), results, strict=True):
            try:
                self._surveys[key] = survey, survey.send(result.answer)
            except StopIteration as end:
                del self._surveys[key]
                self._answers[key] = end.value
        self._advance()

    def reads(self, k: int) -> tuple[int, ...]:
        return self._effects[k][0]

    def copies(self, k: int) -> bool:
        return self._effects[k][1]

    def densities(self, k: int) -> Mapping[int, Density]:
        return self._effects[k][2]

    def coefficients(self, k: int) -> Coefficients | None:
        return [self._plain[k]]

    def _begin(self) -> None:
        for request, seed in self._run.requests:
            if not _is_whole(request):
                survey = _survey(request, self.io, self.n, self._name, seed, self._masks)
                self._surveys[request, seed] = survey, next(survey)

    def _advance(self) -> None:
        """Send the method its answers once all of them are there."""
        if not self._run.ended and all(key in self._answers for key in self._run.requests):
            self._run.answer(self._answers)
            self._answers.clear()
            self._begin()


def _is_whole(request: Request) -> bool:
    return isinstance(request, Select) and request.whole


# --- statistics ------------------------------------------------------------------------------------------------------


def select_whole(
    request: Select, jobs: Sequence[AdaptiveJob], run: Callable[[Sequence[TensorStep]], list[Result]], most: int
) -> Any:
    """The answer to a request about the whole model: each pass reads all tensors, whose counts are added.

    run   runs steps
    most  bytes of answers that may be held at a time, before their counts are added
    """
    passes = selecting(request, sum(job.io.numel for job in jobs))
    try:
        counting = next(passes)
        while True:
            total: Sequence[Any] = ()
            at_a_time = max(1, most // (16 * counting.bins))
            for first in range(0, len(jobs), at_a_time):
                some = jobs[first : first + at_a_time]
                for result in run([_histogram(request, counting, job.io, job.n) for job in some]):
                    total = _added(total, result.answer)
            counting = passes.send(total)
    except StopIteration as end:
        return end.value


def _added(total: Sequence[Any], more: Sequence[Any]) -> Sequence[Any]:
    """The counts of `total` and `more`, added up in place in one of them."""
    for one, other in zip(total, more, strict=True) if total else ():
        one.add(other)
    return total or more


def _survey(request: Request, io: TensorIO, n: int, name: str, seed: int, masks: Masks | None) -> RequestSteps:
    """The steps that answer one request. The masks that they fill are added to `masks`, for the sums."""
    inputs = inputs_of(request, n)
    operands = io.inputs(inputs)
    if isinstance(request, Measure):
        measure = steps.Measure(
            inputs=operands, numel=io.numel, columns=io.columns, deltas=request.deltas, per=request.per
        )
        if request.per == "tensor":
            return _measured(n, (yield io.reading(measure, inputs)))
        groups = io.columns if request.per == "column" else io.numel // max(1, io.columns)
        held = 2 * 8 * groups * (n * (n + 1) // 2 + 2 * n)  # sums and counts, native and in Python; weights need less
        return _measured_groups(n, (yield io.reading(measure, inputs, held)))
    if isinstance(request, MeasureMasked):
        step, filled = _masked_stats(request, io, inputs, name, seed, masks is not None)
        sums, counts = yield step
        if masks is not None:
            tests = enumerate(request.masks)
            masks |= {(i, mask, seed): filled[i] for i, mask in tests if i in filled and mask is not None}
        return measured_masked(request, _flat(sums, "d").tolist(), _flat(counts, "q").tolist())
    if isinstance(request, Divergence):
        held = 3 * 8 * (io.numel // max(1, io.columns))  # in the pump, in Python, and the factors of a score
        divergence = steps.Divergence(inputs=operands, numel=io.numel, columns=io.columns)
        return _flat((yield io.reading(divergence, inputs, held))[0], "d")
    return (yield from _selected(request, io, n))


def _masked_stats(
    request: MeasureMasked, io: TensorIO, inputs: Sequence[int], name: str, seed: int, fills_masks: bool
) -> tuple[TensorStep, dict[int, MaskPlace]]:
    """The step that answers the request, and by input the mask that it fills; none, if the masks are too large to hold.

    None in float64 either: the sum may read fewer inputs than this step, and compute in another dtype.
    """
    indices = filled_masks(request)
    count = max(indices.values()) + 1
    wide = any(operand.dtype == F64.code for operand in io.operands)
    fills = None
    if fills_masks and count and not wide and count * io.numel <= 8 * MASK_BYTES:
        fills = MaskFill(cpu.Masks(count, io.numel), tuple(indices.values()))
    native = steps.MaskedStats(
        inputs=io.inputs(inputs), numel=io.numel, columns=io.columns,
        tests=mask_tests(request, name=name, seed=seed), score=score_of(request.score), l1=request.l1,
        squares=request.squares, fills=fills,
    )  # fmt: skip
    if fills is None:
        return io.reading(native, inputs), {}
    filled = {i: MaskPlace(fills.masks, k) for i, k in indices.items() if k >= 0}
    return io.reading(native, inputs, fills.masks.nbytes), filled


def _selected(request: Select, io: TensorIO, n: int) -> RequestSteps:
    """The steps of the histogram passes that answer a request about one tensor."""
    passes = selecting(request, io.numel)
    try:
        counting = next(passes)
        while True:
            counting = passes.send((yield _histogram(request, counting, io, n)))
    except StopIteration as end:
        return end.value


def _histogram(request: Select, counting: Coarse | Fine, io: TensorIO, n: int) -> TensorStep:
    """The step of one pass."""
    native = histogram_step(request, counting, io.operands[:n], io.numel, io.columns)
    share = elements_read(counting, io.numel) / max(1, io.numel)
    read = range(n) if request.score else {0, *counting.vectors}
    nbytes = round(share * sum(io.nbytes[i] for i in read))
    return TensorStep(io.name, native, nbytes, 16 * counting.bins)


def _measured(n: int, answer: tuple[Any, Any]) -> Measured:
    """The measurements of a tensor. answer: as `_measured_groups` has it, of one group."""
    sums = _flat(answer[0], "d").tolist()
    return Measured(_square(n, sums), tuple(sums[-n:]), tuple(_flat(answer[1], "q").tolist()))


def _measured_groups(n: int, answer: tuple[Any, Any]) -> MeasuredGroups:
    """The measurements of all groups of a tensor.

    answer  f64[groups * (n * (n + 1) / 2 + n)] and i64[groups * n], as the pump returns them
    """
    sums, pairs = _flat(answer[0], "d"), n * (n + 1) // 2
    return MeasuredGroups(_square(n, [array("d", sums[k :: pairs + n].tobytes()) for k in range(pairs)]))


def _square(n: int, triangle: Sequence[_T]) -> tuple[tuple[_T, ...], ...]:
    """A symmetric matrix of its upper triangle, row by row."""
    pairs = iter(triangle)
    upper = {(i, j): next(pairs) for i in range(n) for j in range(i, n)}
    return tuple(tuple(upper[min(i, j), max(i, j)] for j in range(n)) for i in range(n))


def _flat(values: Any, code: str) -> memoryview[Any]:
    """A buffer of any shape as a memoryview of one dimension."""
    flat: memoryview[Any] = memoryview(values).cast("B").cast(code)  # type: ignore[call-overload]
    return flat


# --- sums ------------------------------------------------------------------------------------------------------------


def _row(total: Sum) -> Row | GroupRow | MaskedCombine:
    """A sum in the form that kernels execute: as a plain weighted sum or a copy where it is one."""
    if isinstance(total, MaskedCombine):
        return total if terms(total) else Row(0)
    return total.row()


def _writers(
    io: TensorIO,
    rows: Sequence[Row | GroupRow | MaskedCombine],
    sums: Sequence[Sum],
    name: str,
    seeds: Sequence[int],
    masks: Precomputed,
) -> list[tuple[tuple[int, ...], TensorStep]]:
    """The steps that write all outputs, one for each kind of sum, each with the outputs that it writes."""
    plain: dict[int, Row] = {}
    groups: dict[Literal["row", "column"], dict[int, GroupRow]] = {}
    masked: dict[int, MaskedCombine] = {}
    for k, (row, total) in enumerate(zip(rows, sums, strict=True)):
        if isinstance(row, MaskedCombine):
            masked[k] = row
        elif isinstance(row, GroupRow):
            per = total.per if isinstance(total, GroupCombine) else "row"
            groups.setdefault(per, {})[k] = row
        else:
            plain[k] = row
    writers: list[tuple[tuple[int, ...], TensorStep]] = []
    if plain:
        writers.append((tuple(plain), io.combine([*plain.values()], plain)))
    writers += [(tuple(by_output), _group_writer(io, per, by_output)) for per, by_output in groups.items()]
    if masked:
        writers.append((tuple(masked), _masked_writer(io, masked, name, seeds, masks)))
    return writers


def _group_writer(io: TensorIO, per: Literal["row", "column"], rows: Mapping[int, GroupRow]) -> TensorStep:
    """The step of weighted sums by row or by column. rows: by output."""
    inputs = sorted({i for row in rows.values() for i in (row.pivot, *row.inputs)})
    at = {i: k for k, i in enumerate(inputs)}
    sinks, offsets, keys = io.locations(rows)
    native = steps.GroupCombine(
        inputs=io.inputs(inputs), numel=io.numel, columns=io.columns, sinks=sinks, offsets=offsets,
        out_dtype=io.out_dtype, keys=keys, per=per,
        rows=tuple(
            GroupRow(at[row.pivot], row.totals, tuple(at[i] for i in row.inputs), row.weights) for row in rows.values()
        ),
    )  # fmt: skip
    return io.writing(native, inputs, sum(8 * (len(row.totals) + len(row.weights)) for row in rows.values()))


def _masked_writer(
    io: TensorIO, sums: Mapping[int, MaskedCombine], name: str, seeds: Sequence[int], masks: Precomputed
) -> TensorStep:
    """The step of sums with masks. sums: by output."""
    inputs = sorted({i for one in sums.values() for i in read_inputs(one)})
    sinks, offsets, keys = io.locations(sums)
    native = steps.MaskedSum(
        inputs=io.inputs(inputs), numel=io.numel, columns=io.columns, sinks=sinks, offsets=offsets,
        out_dtype=io.out_dtype, keys=keys,
        outputs=tuple(
            masked_output(one, name=name, seed=seeds[k], inputs=inputs, precomputed=masks) for k, one in sums.items()
        ),
    )  # fmt: skip
    # Bytes of the masks that wait for the sum, without the scratch of the pump.
    held = sum({id(one.masks): one.masks.nbytes for one in masks.values()}.values())
    return io.writing(native, inputs, held)
