"""Drives one tensor's method generator: requests in, answers back, final sum out. No I/O.

Imported only for methods that make requests, or that return more than plain weighted sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

from fastinterp.errors import MethodError
from fastinterp.ops.combine import Combine, check_coefficients
from fastinterp.ops.masked import measured_inputs, read_inputs
from fastinterp.ops.requests import (
    Divergence,
    GroupCombine,
    MaskedCombine,
    Measure,
    Measured,
    MeasuredGroups,
    MeasuredMasked,
    MeasureMasked,
    Request,
    Select,
    Selected,
    Sum,
)

_MOST_REQUESTS = 64  # that a dry run follows: plausible answers may make a method repeat itself


class MethodRun:
    """One tensor's method, called for each output. Equal requests are made once, and answered to all who made them.

    calls     one per output: the method with all of its arguments. Returns a sum, or a generator of requests
    seeds     one per output: requests that draw random numbers are equal only under equal seeds
    selected  per output, each answered Select with its answer

    Raises: MethodError with the tensor's name, here and from `answer`.
    """

    def __init__(self, name: str, calls: Sequence[Callable[[], Any]], seeds: Sequence[int]):
        self.name, self.seeds = name, tuple(seeds)
        self._sums: dict[int, Sum] = {}
        self.selected: list[list[tuple[Select, Any]]] = [[] for _ in calls]
        self._generators: list[Generator[Request, Any, Sum] | None] = [None] * len(calls)
        self._pending: list[Request | None] = [None] * len(calls)
        for k, call in enumerate(calls):
            result = self._call(call)
            if isinstance(result, Generator):
                self._generators[k] = result
                self._advance(k, partial(next, result))
            else:
                self._finish(k, result)

    @property
    def requests(self) -> list[tuple[Request, int]]:
        """The requests without an answer, each with its seed, in the order of the outputs."""
        pending = zip(self._pending, self.seeds, strict=True)
        return list(dict.fromkeys((request, seed) for request, seed in pending if request is not None))

    @property
    def sums(self) -> list[Sum]:
        """The sums that the method has returned, in the order of the outputs: one for each when the run has ended."""
        return [self._sums[k] for k in sorted(self._sums)]

    def clear(self) -> None:
        """Free the sums, and the answers that led to them."""
        self._sums.clear()
        self.selected.clear()

    @property
    def ended(self) -> bool:
        return not any(request is not None for request in self._pending)

    def answer(self, answers: Mapping[tuple[Request, int], Any]) -> None:
        """answers  one for each of `requests`"""
        for k, (request, seed) in enumerate(zip(list(self._pending), self.seeds, strict=True)):
            generator = self._generators[k]
            if request is not None and generator is not None:
                answer = answers[request, seed]
                if isinstance(request, Select):
                    self.selected[k].append((request, answer))
                self._advance(k, partial(generator.send, answer))

    def _advance(self, k: int, resume: Callable[[], Any]) -> None:
        """Run the method of output k to its next request, or to its sum."""
        try:
            self._pending[k] = self._call(resume)
        except StopIteration as end:
            self._pending[k] = self._generators[k] = None
            self._finish(k, end.value)

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except MethodError as error:
            named = self.name in error.message
            raise MethodError(error.message if named else f"{self.name}: {error.message}") from None

    def _finish(self, k: int, result: Sum) -> None:
        _check(result, self.name)
        self._sums[k] = result


def _check(result: Sum, name: str) -> None:
    """Raises: MethodError, if float32 cannot hold a coefficient."""
    if isinstance(result, Combine):
        check_coefficients([result.row().total, *result.weights], name)
    elif isinstance(result, GroupCombine):
        check_coefficients(result.weights, name)
        if result.base is None and not result.sums_to_one:
            check_coefficients(result.totals, name)
    else:
        used = (result.weights, result.sign_weights, result.shares, result.sole_weights)
        check_coefficients((w for some in used if some is not None for w in some), name)


def inputs_of(request: Request | Sum, n: int) -> tuple[int, ...]:
    """The inputs that are read for a request or a sum, ascending. n: those of the method, side-cars not counted."""
    if isinstance(request, Combine):
        return request.row().inputs
    if isinstance(request, MaskedCombine):
        return tuple(read_inputs(request))
    if isinstance(request, MeasureMasked):
        return tuple(measured_inputs(request))
    if isinstance(request, GroupCombine):
        return tuple(sorted({*request.used, *(() if request.base is None else (request.base,))}))
    if isinstance(request, Divergence) or (
        isinstance(request, Select) and request.score is not None and request.score.kind == "divergence"
    ):
        return 0, 1
    if isinstance(request, Select) and request.score is None:
        return tuple(sorted({0, *(i for i, _ in request.ranks)}))
    return tuple(range(n))


def foreseen_reads(
    run: MethodRun, n: int, shape: tuple[int, ...]
) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], bool]:
    """The reads of a tensor: for what, and of which inputs. Requests get plausible answers, so no data is read.

    run  at its start; it is used up
    Returns the reads, and whether a request is about the whole model.
    """
    reads: list[tuple[str, tuple[int, ...]]] = []
    whole = False
    try:
        while not run.ended and len(reads) < _MOST_REQUESTS:
            for request, _ in run.requests:
                read = (_NAMES[type(request)], inputs_of(request, n))
                reads += [read] * (_passes(request, shape) if isinstance(request, Select) else 1)
                whole |= isinstance(request, Select) and request.whole
            run.answer({(r, seed): _plausible(r, n, shape) for r, seed in run.requests})
    except MethodError:
        return (*reads, ("combine", tuple(range(n)))), whole  # the plausible answers do not suit the method
    kinds: dict[type, set[int]] = {}
    for result in run.sums:
        kinds.setdefault(type(result), set()).update(inputs_of(result, n))
    return (*reads, *(("combine", tuple(sorted(inputs))) for inputs in kinds.values())), whole


def _passes(request: Select, shape: tuple[int, ...]) -> int:
    """A sample, which costs little, tells where a second pass must look; small tensors have no sample."""
    from fastinterp.ops.select import sample_every

    numel = math.prod(shape)
    return 1 if sample_every(numel, [k if request.nonzero else k / numel for _, k in request.ranks]) > 1 else 2


_NAMES = {Measure: "measure", MeasureMasked: "measure", Divergence: "divergence", Select: "select"}


def _plausible(request: Request, n: int, shape: tuple[int, ...]) -> Any:
    """An answer as models that are near each other would give it."""
    numel = math.prod(shape)
    if isinstance(request, Measure):
        columns = shape[-1] if len(shape) > 1 else numel
        groups = {"tensor": 1, "row": math.prod(shape[:-1]), "column": columns}[request.per]
        one = _near(n, numel // max(1, groups), 1e-4 if request.deltas else 1.0, request.deltas)
        if request.per == "tensor":
            return one
        return MeasuredGroups(tuple(tuple((x,) for x in row) for row in one.gram))  # one for all: many would take long
    if isinstance(request, MeasureMasked):
        masks = request.masks[1:]
        share = [0.0, *(0.0 if m is None else m.probability if m.min_bits == 0 else 0.5 * m.probability for m in masks)]
        sizes = (0.0, *(0.0 if m is None else 0.01 * numel for m in masks))
        counts = tuple(round(s * numel) for s in share)
        part = tuple(s * x for s, x in zip(share, sizes, strict=True))
        return MeasuredMasked(sizes, part, counts, tuple(k // 2 for k in counts), tuple(0.01 * x for x in part))
    if isinstance(request, Divergence):
        return (1e-3,)
    total = 1.0 if request.nonzero else float(max(numel, *(k for _, k in request.ranks)))
    return tuple(
        Selected(0x3C000000 - int(0x1000000 * k / total), math.ceil(k / total * numel)) for _, k in request.ranks
    )


def _near(n: int, numel: int, scale: float, deltas: bool) -> Measured:
    """A measure of models whose deltas are small against the first. scale: mean square of an element or delta."""

    def product(i: int, j: int) -> float:
        size = 1.0 if deltas and i == j == 0 else scale
        return numel * size * (1.0 + 0.01 * i if i == j else 0.1 if deltas else 0.9)

    gram = tuple(tuple(product(min(i, j), max(i, j)) for j in range(n)) for i in range(n))
    return Measured(gram, tuple(0.8 * math.sqrt(numel * gram[i][i]) for i in range(n)), (numel,) * n)
