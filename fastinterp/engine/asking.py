"""Tensors whose methods ask before they sum, and sums by group and with masks: their requests as steps of the pump.

Imported only where a plan has such tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, overload

from fastinterp.compute.masked import kept_step, masked_step, read_inputs, terms
from fastinterp.compute.ops import Combine, Row
from fastinterp.compute.requests import (
    Divergence,
    GroupCombine,
    Kept,
    MaskedCombine,
    Measure,
    Measured,
    MeasureKept,
    Request,
    Select,
)
from fastinterp.engine.conversation import Conversation, inputs_of
from fastinterp.engine.place import Place, Step
from fastinterp.engine.rounds import Job, Result, is_copy

Probes = Generator[Step, Any, Any]  # steps, sent their answers one by one; returns the answer to a request


class Asking(Job):
    """A tensor that asks, and is written when all of its answers are in.

    n      inputs of the method; side-cars are behind them
    calls  as in Conversation
    """

    def __init__(self, place: Place, n: int, calls: Sequence[Callable[[], Any]]):
        super().__init__(place, ())
        self.n = n
        self._talk = Conversation(place.name, calls, place.seeds)
        self._answers: dict[tuple[Request, int], Any] = {}
        self._probing: dict[tuple[Request, int], tuple[Probes, Step]] = {}
        self._written: list[tuple[int, ...]] = []
        self._begin()

    @property
    def cost(self) -> int:  # type: ignore[override]
        return sum(step.nbytes for _, step in self._probing.values())

    @property
    def whole(self) -> bool:  # type: ignore[override]
        return not self._talk.ended and not self._probing

    @property
    def whole_requests(self) -> list[Select]:
        """The requests about the whole model that have no answer yet."""
        return [r for r, seed in self._talk.requests if _is_whole(r) and (r, seed) not in self._answers]

    def answer(self, request: Select, answer: Any) -> None:
        """The answer to one of `whole_requests`."""
        for asked in self._talk.requests:
            if asked[0] == request:
                self._answers[asked] = answer
        self._go_on()

    def steps(self) -> list[Step]:
        if not self._talk.ended:
            return [step for _, step in self._probing.values()]
        groups = _groups(self.place, self._talk.sums)
        self._written = [outputs for outputs, _ in groups]
        return [step for _, step in groups]

    def take(self, results: Sequence[Result]) -> None:
        if self._talk.ended:
            found = {k: stats for ks, r in zip(self._written, results, strict=True) for k, stats in zip(ks, r.stats, strict=True)}
            self.stats, self.done = [found[k] for k in range(len(found))], True
            return
        for (asked, (probes, _)), result in zip(list(self._probing.items()), results, strict=True):
            try:
                self._probing[asked] = probes, probes.send(result.answer)
            except StopIteration as end:
                del self._probing[asked]
                self._answers[asked] = end.value
        self._go_on()

    def reads(self, k: int) -> tuple[int, ...]:
        asked = self._talk.sums[k]
        return () if asked is None else inputs_of(asked, self.n)

    def copies(self, k: int) -> bool:
        asked = self._talk.sums[k]
        row = None if asked is None else _row(asked)
        return isinstance(row, Row) and is_copy(self.place, row)

    def _begin(self) -> None:
        for request, seed in self._talk.requests:
            if not _is_whole(request):
                probes = _probes(request, self.place, self.n, seed)
                self._probing[request, seed] = probes, next(probes)

    def _go_on(self) -> None:
        """Let the method have its answers when all of them are there."""
        if not self._talk.ended and all(asked in self._answers for asked in self._talk.requests):
            self._talk.answer(self._answers)
            self._answers.clear()
            self._begin()


def _is_whole(request: Request) -> bool:
    return isinstance(request, Select) and request.whole


# --- what is asked ---------------------------------------------------------------------------------------------------


def _probes(request: Request, place: Place, n: int, seed: int) -> Probes:
    inputs = inputs_of(request, n)
    if isinstance(request, Measure):
        kind = "measure_deltas" if request.deltas else "measure"
        if request.per == "tensor":
            return (yield from _one(place.asking(kind, inputs), lambda answer: _measured(answer, n)[0]))
        step = place.asking(kind, inputs, per=request.per, columns=place.columns)
        return (yield from _one(step, lambda answer: _measured(answer, n)))
    if isinstance(request, MeasureKept):
        keeps = kept_step(request, name=place.name, seed=seed)
        return (yield from _one(place.asking("kept", inputs, keeps=keeps, columns=place.columns), _kept))
    if isinstance(request, Divergence):
        step = place.asking("divergence", inputs, columns=place.columns)
        return (yield from _one(step, lambda answer: tuple(_flat(answer))))
    raise NotImplementedError(request)


def _one(step: Step, told: Callable[[Any], Any]) -> Probes:
    return told((yield step))


class _measured(Sequence[Measured]):  # noqa: N801
    pass


# --- what is written -------------------------------------------------------------------------------------------------
