"""Jobs of tensors whose methods request statistics before they sum, and steps of sums by group and with masks.

Imported only where a plan has such tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal, overload

from fastinterp.backends import cpu
from fastinterp.execute.jobs.densities import Density, densities
from fastinterp.execute.jobs.job import Job, Result, is_copy
from fastinterp.execute.jobs.tensor_io import TensorIO, TensorStep
from fastinterp.ops import steps
from fastinterp.ops.combine import GroupRow, Row
from fastinterp.ops.dtypes import F64
from fastinterp.ops.masked import (
    Precomputed,
    filled_masks,
    kept_of,
    kept_tests,
    masked_output,
    read_inputs,
    score_of,
    terms,
)
from fastinterp.ops.requests import (
    Divergence,
    GroupCombine,
    Keep,
    MaskedCombine,
    Measure,
    Measured,
    MeasureKept,
    Request,
    Select,
    Sum,
)
from fastinterp.ops.steps import MaskFill, MaskPlace
from fastinterp.plan.method_run import MethodRun, inputs_of

_AT_A_TIME = 1024  # groups whose numbers are Python's at a time
RequestSteps = Generator[TensorStep, Any, Any]  # steps, sent their answers one by one; returns the answer to a request
MASK_BYTES = 64 << 20  # of one tensor that wait for its sum; more are found again
Masks = dict[tuple[int, Keep, int], MaskPlace]  # by input, keep and seed


class AdaptiveJob(Job):
    """An output tensor whose method requests statistics of its inputs: it is written when all answers are there.

    n            inputs of the method; side-cars are behind them
    calls        as in MethodRun
    name, seeds  random keeps are drawn from them: the tensor's name, and a seed per output
    notes        let the pump note what surveys find to be kept, in masks for the sum
    """

    def __init__(
        self, io: TensorIO, n: int, calls: Sequence[Callable[[], Any]], name: str, seeds: Sequence[int],
        notes: bool = True,
    ):  # fmt: skip
        super().__init__(io, ())
        self.n, self._name, self._seeds = n, name, seeds
        self._run = MethodRun(name, calls, seeds)
        self._answers: dict[tuple[Request, int], Any] = {}
        self._probing: dict[tuple[Request, int], tuple[RequestSteps, TensorStep]] = {}
        self._written: list[tuple[int, ...]] = []
        # Per output: what it reads, whether it copies, and what thresholds keep of its inputs.
        self._effects: list[tuple[tuple[int, ...], bool, dict[int, Density]]] = []
        # Masks that statistics have filled; None if they do not.
        self._masks: Masks | None = {} if notes else None
        self._begin()

    @property
    def cost(self) -> int:  # type: ignore[override]
        return 0 if self._run.ended else sum(self.io.nbytes)

    @property
    def whole(self) -> bool:  # type: ignore[override]
        return not self._run.ended and not self._probing

    @property
    def whole_requests(self) -> list[Select]:
        """The requests about the whole model that have no answer yet."""
        asked = (r for r, seed in self._run.requests if (r, seed) not in self._answers)
        return [r for r in asked if isinstance(r, Select) and r.whole]

    def answer(self, request: Select, answer: Any) -> None:
        """The answer to one of `whole_requests`."""
        for asked in self._run.requests:
            if asked[0] == request:
                self._answers[asked] = answer
        self._go_on()

    def steps(self) -> list[TensorStep]:
        if not self._run.ended:
            return [step for _, step in self._probing.values()]
        sums = self._run.sums
        rows = [_row(asked) for asked in sums]
        # Noted now, because sums by row are large: they are not held until the end.
        self._effects = [
            (
                inputs_of(asked, self.n),
                isinstance(row, Row) and is_copy(self.io, row),
                densities(asked, told, self.io.numel),
            )
            for row, asked, told in zip(rows, sums, self._run.selected, strict=True)
        ]
        writers = _writers(self.io, rows, sums, self._name, self._seeds, self._masks or {})
        self._written = [outputs for outputs, _ in writers]
        return [step for _, step in writers]

    def take(self, results: Sequence[Result]) -> None:
        if self._run.ended:
            pairs = zip(self._written, results, strict=True)
            found = {k: stats for outputs, r in pairs for k, stats in zip(outputs, r.stats, strict=True)}
            self.stats, self.done = [found[k] for k in sorted(found)], True
            self._run.clear()
            self._masks = None
            return
        for (asked, (probes, _)), result in zip(list(self._probing.items()), results, strict=True):
            try:
                self._probing[asked] = probes, probes.send(result.answer)
            except StopIteration as end:
                del self._probing[asked]
                self._answers[asked] = end.value
        self._go_on()

    def reads(self, k: int) -> tuple[int, ...]:
        return self._effects[k][0]

    def copies(self, k: int) -> bool:
        return self._effects[k][1]

    def densities(self, k: int) -> Mapping[int, Density]:
        return self._effects[k][2]

    def _begin(self) -> None:
        for request, seed in self._run.requests:
            if not _is_whole(request):
                probes = _probes(request, self.io, self.n, self._name, seed, self._masks)
                self._probing[request, seed] = probes, next(probes)

    def _go_on(self) -> None:
        """Let the method have its answers when all of them are there."""
        if not self._run.ended and all(asked in self._answers for asked in self._run.requests):
            self._run.answer(self._answers)
            self._answers.clear()
            self._begin()


def _is_whole(request: Request) -> bool:
    return isinstance(request, Select) and request.whole


# --- what is asked ---------------------------------------------------------------------------------------------------


def asked_of_all(
    request: Select, jobs: Sequence[AdaptiveJob], run: Callable[[Sequence[TensorStep]], list[Result]], most: int
) -> Any:
    """Answer a request about the whole model: each pass goes over all tensors, whose counts are added.

    run   carries out steps
    most  bytes of answers at a time: they hold many counts until they are added
    """
    from fastinterp.ops.select import selecting

    passes = selecting(request, sum(job.io.numel for job in jobs))
    try:
        asked = next(passes)
        while True:
            total: Sequence[Any] = ()
            at_a_time = max(1, most // (16 * asked.bins))
            for first in range(0, len(jobs), at_a_time):
                some = jobs[first : first + at_a_time]
                for result in run([_histogram(request, asked, job.io, job.n) for job in some]):
                    total = _added(total, result.answer)
            asked = passes.send(total)
    except StopIteration as end:
        return end.value


def _added(total: Sequence[Any], more: Sequence[Any]) -> Sequence[Any]:
    for one, other in zip(total, more, strict=True) if total else ():
        one.add(other)
    return total or more


def _probes(request: Request, io: TensorIO, n: int, name: str, seed: int, masks: Masks | None) -> RequestSteps:
    """The steps that answer one request. Masks that they fill, for the sums, are added to `masks`."""
    inputs = inputs_of(request, n)
    operands = io.inputs(inputs)
    if isinstance(request, Measure):
        measure = steps.Measure(
            inputs=operands, numel=io.numel, columns=io.columns, deltas=request.deltas, per=request.per
        )
        if request.per == "tensor":
            return Groups(n, (yield io.reading(measure, inputs)))[0]
        groups = io.columns if request.per == "column" else io.numel // max(1, io.columns)
        held = 2 * 8 * groups * (n * (n + 1) // 2 + 2 * n)  # sums and counts, there and here; weights need less
        return Groups(n, (yield io.reading(measure, inputs, held)))
    if isinstance(request, MeasureKept):
        step, filled = _kept(request, io, inputs, name, seed, masks is not None)
        sums, counts = yield step
        if masks is not None:
            kept = enumerate(request.keeps)
            masks |= {(i, keep, seed): filled[i] for i, keep in kept if i in filled and keep is not None}
        return kept_of(request, _flat(sums, "d").tolist(), _flat(counts, "q").tolist())
    if isinstance(request, Divergence):
        held = 3 * 8 * (io.numel // max(1, io.columns))  # there, here, and the factors of a score
        divergence = steps.Divergence(inputs=operands, numel=io.numel, columns=io.columns)
        return _flat((yield io.reading(divergence, inputs, held))[0], "d")
    return (yield from _selected(request, io, n))


def _kept(
    request: MeasureKept, io: TensorIO, inputs: Sequence[int], name: str, seed: int, notes: bool
) -> tuple[TensorStep, dict[int, MaskPlace]]:
    """The step that answers the request, and by input the mask that it fills, if they are no burden to hold.

    In float64 the sum may compute with other deltas than the survey, which reads every input that is asked about.
    """
    places = filled_masks(request)
    count = max(places.values()) + 1
    wide = any(operand.dtype == F64.code for operand in io.operands)
    fills = None
    if notes and count and not wide and count * io.numel <= 8 * MASK_BYTES:
        fills = MaskFill(cpu.Masks(count, io.numel), tuple(places.values()))
    native = steps.MaskedStats(
        inputs=io.inputs(inputs), numel=io.numel, columns=io.columns,
        tests=kept_tests(request, name=name, seed=seed), score=score_of(request.score), l1=request.l1,
        squares=request.squares, fills=fills,
    )  # fmt: skip
    if fills is None:
        return io.reading(native, inputs), {}
    filled = {i: MaskPlace(fills.masks, k) for i, k in places.items() if k >= 0}
    return io.reading(native, inputs, fills.masks.nbytes), filled


def _selected(request: Select, io: TensorIO, n: int) -> RequestSteps:
    from fastinterp.ops.select import selecting

    passes = selecting(request, io.numel)
    try:
        asked = next(passes)
        while True:
            asked = passes.send((yield _histogram(request, asked, io, n)))
    except StopIteration as end:
        return end.value


def _histogram(request: Select, asked: Any, io: TensorIO, n: int) -> TensorStep:
    """The step of one pass; `asked` is a Coarse or Fine of ops/select.py."""
    from fastinterp.ops.select import elements_read, step

    native = step(request, asked, io.operands[:n], io.numel, io.columns)
    share = elements_read(asked, io.numel) / max(1, io.numel)
    read = range(n) if request.score else {0, *asked.vectors}
    nbytes = round(share * sum(io.nbytes[i] for i in read))
    return TensorStep(io.name, native, nbytes, 16 * asked.bins)


class Groups(Sequence[Measured]):
    """What the pump measured: one Measured per group, made when it is looked at, since rows may be many.

    answer  f64[groups * (n * (n + 1) / 2 + n)] and i64[groups * n], as the pump has them
    """

    def __init__(self, n: int, answer: tuple[Any, Any]):
        self._n, self._sums, self._nonzero = n, _flat(answer[0], "d"), _flat(answer[1], "q")
        triangle = iter(range(n * (n + 1) // 2))
        places = [[0] * n for _ in range(n)]
        for i in range(n):
            for j in range(i, n):
                places[i][j] = places[j][i] = next(triangle)
        self._rows = [itemgetter(*row) if n > 1 else itemgetter(slice(1)) for row in places]

    def __len__(self) -> int:
        return len(self._nonzero) // self._n

    @overload
    def __getitem__(self, at: int) -> Measured: ...
    @overload
    def __getitem__(self, at: slice) -> list[Measured]: ...
    def __getitem__(self, at: int | slice) -> Measured | list[Measured]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return next(self._from(at % len(self), 1))

    def __iter__(self) -> Iterator[Measured]:
        for first in range(0, len(self), _AT_A_TIME):
            yield from self._from(first, _AT_A_TIME)

    def _from(self, first: int, count: int) -> Iterator[Measured]:
        """So many groups from the first on, or as many as there are."""
        n, rows = self._n, self._rows
        width = n * (n + 1) // 2 + n
        sums = iter(self._sums[first * width : (first + count) * width].tolist())
        nonzero = iter(self._nonzero[first * n : (first + count) * n].tolist())
        for own, counts in zip(zip(*[sums] * width, strict=True), zip(*[nonzero] * n, strict=True), strict=True):
            yield Measured(tuple([row(own) for row in rows]), own[-n:], counts)


def _flat(values: Any, code: str) -> memoryview[Any]:
    """A buffer of any shape as one dimension."""
    flat: memoryview[Any] = memoryview(values).cast("B").cast(code)  # type: ignore[call-overload]
    return flat


# --- what is written -------------------------------------------------------------------------------------------------


def _row(asked: Sum) -> Row | GroupRow | MaskedCombine:
    """What the kernels execute: sums that come to a plain one, or to a copy, as such."""
    if isinstance(asked, MaskedCombine):
        return asked if terms(asked) else Row(0)
    return asked.row()


def _writers(
    io: TensorIO,
    rows: Sequence[Row | GroupRow | MaskedCombine],
    sums: Sequence[Sum],
    name: str,
    seeds: Sequence[int],
    masks: Precomputed,
) -> list[tuple[tuple[int, ...], TensorStep]]:
    """The steps that write all outputs, one for each kind of sum, and which outputs each of them writes."""
    plain: dict[int, Row] = {}
    groups: dict[Literal["row", "column"], dict[int, GroupRow]] = {}
    masked: dict[int, MaskedCombine] = {}
    for k, (row, asked) in enumerate(zip(rows, sums, strict=True)):
        if isinstance(row, MaskedCombine):
            masked[k] = row
        elif isinstance(row, GroupRow):
            per = asked.per if isinstance(asked, GroupCombine) else "row"
            groups.setdefault(per, {})[k] = row
        else:
            plain[k] = row
    writers: list[tuple[tuple[int, ...], TensorStep]] = []
    if plain:
        writers.append((tuple(plain), io.combine([*plain.values()], plain)))
    writers += [(tuple(own), _group_writer(io, per, own)) for per, own in groups.items()]
    if masked:
        writers.append((tuple(masked), _masked_writer(io, masked, name, seeds, masks)))
    return writers


def _group_writer(io: TensorIO, per: Literal["row", "column"], rows: Mapping[int, GroupRow]) -> TensorStep:
    """rows: by number of the output."""
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
    """sums: by number of the output."""
    inputs = sorted({i for one in sums.values() for i in read_inputs(one)})
    sinks, offsets, keys = io.locations(sums)
    native = steps.MaskedSum(
        inputs=io.inputs(inputs), numel=io.numel, columns=io.columns, sinks=sinks, offsets=offsets,
        out_dtype=io.out_dtype, keys=keys,
        outputs=tuple(
            masked_output(one, name=name, seed=seeds[k], inputs=inputs, precomputed=masks) for k, one in sums.items()
        ),
    )  # fmt: skip
    # What waits for the sum; the pump's own scratch is not in it.
    held = sum({id(one.masks): one.masks.nbytes for one in masks.values()}.values())
    return io.writing(native, inputs, held)
