"""What the method says about one tensor: its requests, and in the end its sums. Pure: nothing is read here.

Imported only for methods that ask, or that want more than plain weighted sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

from fastinterp.errors import MethodError
from fastinterp.ops.combine import Combine, check_coefficients
from fastinterp.ops.masked import kept_inputs, read_inputs
from fastinterp.ops.requests import (
    Divergence,
    GroupCombine,
    Kept,
    MaskedCombine,
    Measure,
    Measured,
    MeasureKept,
    Request,
    Select,
    Selected,
    Sum,
)

_FORESEEN = 64  # requests that a dry run follows: answers that are made up may lead in circles


class Conversation:
    """One tensor's method, called for each output. Equal requests are made once, and answered to all who made them.

    calls  one per output: the method with all of its arguments, which answers with a sum, or the generator that asks
    seeds  one per output: requests that draw random numbers are equal only under equal seeds

    Raises: MethodError with the tensor's name, here and from `answer`.
    """

    def __init__(self, name: str, calls: Sequence[Callable[[], Any]], seeds: Sequence[int]):
        self.name, self.seeds = name, tuple(seeds)
        self._sums: dict[int, Sum] = {}
        self.selected: list[list[tuple[Select, Any]]] = [[] for _ in calls]  # per output, what it was told
        self._steps: list[Generator[Request, Any, Sum] | None] = [None] * len(calls)
        self._now: list[Request | None] = [None] * len(calls)
        for k, call in enumerate(calls):
            said = self._said(call)
            if isinstance(said, Generator):
                self._steps[k] = said
                self._go_on(k, partial(next, said))
            else:
                self._end(k, said)

    @property
    def requests(self) -> list[tuple[Request, int]]:
        """What is asked now, each with its seed, in the order of the outputs."""
        asked = zip(self._now, self.seeds, strict=True)
        return list(dict.fromkeys((request, seed) for request, seed in asked if request is not None))

    @property
    def sums(self) -> list[Sum]:
        """One per output; all of them only when the conversation has ended."""
        return [self._sums[k] for k in sorted(self._sums)]

    def forget(self) -> None:
        """Let go of the sums, and what led to them."""
        self._sums.clear()
        self.selected.clear()

    @property
    def ended(self) -> bool:
        return not any(request is not None for request in self._now)

    def answer(self, answers: Mapping[tuple[Request, int], Any]) -> None:
        """answers  one for each of `requests`."""
        for k, (request, seed) in enumerate(zip(list(self._now), self.seeds, strict=True)):
            steps = self._steps[k]
            if request is not None and steps is not None:
                answer = answers[request, seed]
                if isinstance(request, Select):
                    self.selected[k].append((request, answer))
                self._go_on(k, partial(steps.send, answer))

    def _go_on(self, k: int, go: Callable[[], Any]) -> None:
        try:
            self._now[k] = self._said(go)
        except StopIteration as end:
            self._now[k] = self._steps[k] = None
            self._end(k, end.value)

    def _said(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except MethodError as error:
            named = self.name in error.message
            raise MethodError(error.message if named else f"{self.name}: {error.message}") from None

    def _end(self, k: int, asked: Sum) -> None:
        _check(asked, self.name)
        self._sums[k] = asked


def _check(asked: Sum, name: str) -> None:
    if isinstance(asked, Combine):
        check_coefficients([asked.row().total, *asked.weights], name)
    elif isinstance(asked, GroupCombine):
        check_coefficients(asked.weights, name)
        if asked.base is None and not asked.sums_to_one:
            check_coefficients(asked.totals, name)
    else:
        used = (asked.weights, asked.votes, asked.shares, asked.alone)
        check_coefficients((w for some in used if some is not None for w in some), name)


def inputs_of(asked: Request | Sum, n: int) -> tuple[int, ...]:
    """The inputs that are read for a request or a sum, ascending. n: those of the method, side-cars not counted."""
    if isinstance(asked, Combine):
        return asked.row().inputs
    if isinstance(asked, MaskedCombine):
        return tuple(read_inputs(asked))
    if isinstance(asked, MeasureKept):
        return tuple(kept_inputs(asked))
    if isinstance(asked, GroupCombine):
        return tuple(sorted({*asked.used, *(() if asked.base is None else (asked.base,))}))
    if isinstance(asked, Divergence) or (
        isinstance(asked, Select) and asked.score is not None and asked.score.kind == "divergence"
    ):
        return 0, 1
    if isinstance(asked, Select) and asked.score is None:
        return tuple(sorted({0, *(i for i, _ in asked.ranks)}))
    return tuple(range(n))


def foresee(talk: Conversation, n: int, shape: tuple[int, ...]) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], bool]:
    """The reads of a tensor: for what, and of which inputs. With answers that are made up, so no data is touched.

    talk  at its start; it is used up
    Returns the reads, and whether something is asked about the whole model.
    """
    reads: list[tuple[str, tuple[int, ...]]] = []
    whole = False
    try:
        while not talk.ended and len(reads) < _FORESEEN:
            for request, _ in talk.requests:
                found = (_NAMES[type(request)], inputs_of(request, n))
                reads += [found] * (_passes(request, shape) if isinstance(request, Select) else 1)
                whole |= isinstance(request, Select) and request.whole
            talk.answer({(r, seed): _made_up(r, n, shape) for r, seed in talk.requests})
    except MethodError:
        return (*reads, ("combine", tuple(range(n)))), whole  # what is wrong are the answers
    kinds: dict[type, set[int]] = {}
    for asked in talk.sums:
        kinds.setdefault(type(asked), set()).update(inputs_of(asked, n))
    return (*reads, *(("combine", tuple(sorted(inputs))) for inputs in kinds.values())), whole


def _passes(request: Select, shape: tuple[int, ...]) -> int:
    """A sample, which costs little, tells where a second pass must look; small tensors have no sample."""
    from fastinterp.ops.select import sample_every

    numel = math.prod(shape)
    return 1 if sample_every(numel, [k if request.nonzero else k / numel for _, k in request.ranks]) > 1 else 2


_NAMES = {Measure: "measure", MeasureKept: "measure", Divergence: "divergence", Select: "select"}


def _made_up(request: Request, n: int, shape: tuple[int, ...]) -> Any:
    """An answer as models that are near each other would give it."""
    numel = math.prod(shape)
    if isinstance(request, Measure):
        columns = shape[-1] if len(shape) > 1 else numel
        groups = {"tensor": 1, "row": math.prod(shape[:-1]), "column": columns}[request.per]
        one = _near(n, numel // max(1, groups), 1e-4 if request.deltas else 1.0, request.deltas)
        return one if request.per == "tensor" else [one]  # one group for all of them: many would take long
    if isinstance(request, MeasureKept):
        keeps = request.keeps[1:]
        share = [0.0, *(0.0 if k is None else k.chance if k.least == 0 else 0.5 * k.chance for k in keeps)]
        sizes = (0.0, *(0.0 if k is None else 0.01 * numel for k in keeps))
        kept = tuple(round(s * numel) for s in share)
        part = tuple(s * x for s, x in zip(share, sizes, strict=True))
        return Kept(sizes, part, kept, tuple(k // 2 for k in kept), tuple(0.01 * x for x in part))
    if isinstance(request, Divergence):
        return (1e-3,)
    total = 1.0 if request.nonzero else float(max(numel, *(k for _, k in request.ranks)))
    return tuple(
        Selected(0x3C000000 - int(0x1000000 * k / total), math.ceil(k / total * numel)) for _, k in request.ranks
    )


def _near(n: int, numel: int, scale: float, deltas: bool) -> Measured:
    def product(i: int, j: int) -> float:
        own = 1.0 if deltas and i == j == 0 else scale
        return numel * own * (1.0 + 0.01 * i if i == j else 0.1 if deltas else 0.9)

    gram = tuple(tuple(product(min(i, j), max(i, j)) for j in range(n)) for i in range(n))
    return Measured(gram, tuple(0.8 * math.sqrt(numel * gram[i][i]) for i in range(n)), (numel,) * n)
