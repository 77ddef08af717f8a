"""The work of a round for accelerators: steps cut into parts, parts put together into batches, and one queue of these.

All devices take from the queue, each when it has room, so that they share by their speed. A batch that a device could
not finish goes back, and is done by another one from its beginning.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastinterp.errors import BackendError
from fastinterp.execute.jobs.job import Result
from fastinterp.ops.dtypes import CODE_BYTES
from fastinterp.ops.steps import Step, Stored, SumStep, join_stats

ALIGN = 256  # bytes: where operands begin in a slot, as the widest loads of any device want it
_PARTS = 4096  # of a batch at most: a tensor of a few elements costs a batch no bytes, but time


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Some elements of an input or an output: where they are in a slot, and where in their source or sink; in bytes."""

    handle: int
    offset: int
    nbytes: int
    place: int


@dataclass(eq=False, slots=True)
class Part:
    """Elements first .. first + count of a step. Its own parts, if it was cut once more, answer for it together."""

    native: Step
    first: int
    count: int
    whole: Part | None = None
    parts: list[Part] = field(default_factory=list)
    result: Result | None = None

    @property
    def nbytes(self) -> int:
        """In a slot, all operands aligned."""
        return sum(aligned(self.count * width) for width in self.native.widths)

    def cut(self, most: int) -> list[Part]:
        """Parts of at most so many bytes each, or the smallest that there are. One: this part itself."""
        pieces = self.native.cut(max(1, most - ALIGN * len(self.native.widths)), self.count)
        if len(pieces) == 1:
            return [self]
        self.parts = [Part(self.native, self.first + first, count, self) for first, count in pieces]
        return self.parts

    def take(self, result: Result) -> None:
        """What came of it; the last part of a whole completes that."""
        self.result = result
        whole = self.whole
        if whole is not None:
            found = [part.result for part in whole.parts]
            if all(one is not None for one in found):
                whole.parts = []
                whole.take(joined(whole.native, [one for one in found if one is not None]))


def joined(native: Step, results: Sequence[Result]) -> Result:
    """What came of a step from what came of its parts, in order."""
    return Result(native.join([r.answer for r in results]), join_stats([r.stats for r in results]))


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


class Batch:
    """Parts that go through a device together, and where in a slot their operands are: inputs first, then outputs.

    input_bytes, nbytes  of a slot that the inputs take, and all operands
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = list(parts)
        self.inputs: list[list[SlotRange]] = []  # by part
        self.outputs: list[list[SlotRange]] = []
        at = 0
        for part in self.parts:
            stored = [operand for operand in part.native.inputs if isinstance(operand, Stored)]
            triples = [(operand.source, operand.offset, CODE_BYTES[operand.dtype]) for operand in stored]
            at = _lay_out(part, triples, at, self.inputs)
        self.input_bytes = at
        for part in self.parts:
            native, triples = part.native, []
            if isinstance(native, SumStep):
                places = zip(native.sinks, native.offsets, strict=True)
                triples = [(sink, offset, CODE_BYTES[native.out_dtype]) for sink, offset in places]
            at = _lay_out(part, triples, at, self.outputs)
        self.nbytes = at
        self.bytes_read = sum(o.nbytes for some in self.inputs for o in some)
        self.bytes_written = sum(o.nbytes for some in self.outputs for o in some)

    def split(self, most: int) -> list[Batch]:
        """Batches of at most so many bytes each; of more, if a part cannot be cut any further."""
        return batches((piece for part in self.parts for piece in part.cut(most)), most)


def _lay_out(part: Part, triples: Iterable[tuple[int, int, int]], at: int, found: list[list[SlotRange]]) -> int:
    """Add the operands of a part, each (handle, offset of the tensor, bytes of an element); returns the end."""
    own = []
    for handle, offset, width in triples:
        own.append(SlotRange(handle, offset + part.first * width, part.count * width, at))
        at += aligned(part.count * width)
    found.append(own)
    return at


def batches(parts: Iterable[Part], most: int) -> list[Batch]:
    """As few batches of at most so many bytes as their order allows, and at least a part in each."""
    return [Batch(group) for group in _groups(parts, most)]


def _groups(parts: Iterable[Part], most: int) -> Iterator[list[Part]]:
    group: list[Part] = []
    total = 0
    for part in parts:
        nbytes = part.nbytes
        if group and (total + nbytes > most or len(group) == _PARTS):
            yield group
            group, total = [], 0
        group.append(part)
        total += nbytes
    if group:
        yield group


class Work:
    """The batches of one round, for the threads of all devices. Everything here may be called by any thread.

    workers  devices that take part

    `error` is what stops the round: an exception, or a tuple as the pump's (_C.pyi).
    """

    def __init__(self, waiting: Sequence[Batch], workers: int):
        self.batches, self._every = len(waiting), tuple(waiting)
        self.bytes_read = self.bytes_written = 0  # of batches that are done
        self.error: BaseException | tuple[Any, ...] | None = None
        self.lost: list[str] = []  # of each device that was given up, why
        self._waiting = deque(waiting)
        self._left, self._workers, self._stopped = len(waiting), workers, False
        self._changed = threading.Condition()

    @property
    def stopped(self) -> bool:
        return self._stopped

    def take(self, most: int, ended: threading.Event) -> Batch | None:
        """A batch of at most so many bytes; waits for one while any other device could still hand one back.

        most   as many as `least` says, or more
        ended  whether the caller wants no more; `back` wakes those that wait after it is set
        None: there is nothing left to do, or all must stop.
        """
        with self._changed:
            while self._left and not self._stopped and not ended.is_set():
                if self._waiting:
                    batch = self._waiting.popleft()
                    if batch.nbytes <= most:
                        return batch
                    some = batch.split(most)
                    self._waiting.extendleft(reversed(some))
                    self._left += len(some) - 1
                    if some[0].nbytes > most:
                        raise ValueError(f"a part needs {some[0].nbytes} bytes, the slot has {most}")
                    continue
                self._changed.wait()
        return None

    def least(self) -> int:
        """Bytes of the largest part of the round, when all are cut as small as can be: a device needs as many."""
        return max((_smallest(part) for batch in self._every for part in batch.parts), default=0)

    def done(self, batch: Batch, results: Sequence[Result]) -> None:
        """All that it writes is written."""
        with self._changed:
            for part, result in zip(batch.parts, results, strict=True):
                part.take(result)
            self.bytes_read += batch.bytes_read
            self.bytes_written += batch.bytes_written
            self._left -= 1
            if not self._left:
                self._changed.notify_all()

    def back(self, batch: Batch) -> None:
        """It could not be done: whoever takes it next does all of it."""
        with self._changed:
            self._waiting.appendleft(batch)
            self._changed.notify_all()

    def leave(self, why: str) -> None:
        """A device is given up. With the last one the round ends."""
        with self._changed:
            self.lost.append(why)
            self._workers -= 1
            if not self._workers and self._left and self.error is None:
                self.error = BackendError(
                    f"no device is left to merge on: {'; '.join(self.lost)}. Use --device cpu, or a device with "
                    "nothing else on it"
                )
                self._stopped = True
            self._changed.notify_all()

    def fail(self, error: BaseException | tuple[Any, ...]) -> None:
        """Stop everything: no device could do better."""
        with self._changed:
            self.error = self.error or error
            self._stopped = True
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """True when everything is done, or must stop."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._left or self._stopped, seconds)


def _smallest(part: Part) -> int:
    """Bytes of the largest of the smallest parts that a part can be cut into; of the part, if it cannot be cut."""
    first, count = part.native.cut(1, part.count)[0]
    return Part(part.native, part.first + first, count).nbytes
