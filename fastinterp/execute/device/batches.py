"""The work of a round on accelerators: steps cut into parts, parts grouped into batches, and one queue of batches.

All devices take batches from the queue, each when it has a free slot, so that faster devices do more. A batch that a
device could not finish goes back into the queue, and another device runs it from its beginning.
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
from fastinterp.ops.operands import Stored
from fastinterp.ops.steps import Step, SumStep, join_stats

ALIGN = 256  # bytes: alignment of operands in a slot, for the widest loads of any device
_PARTS = 4096  # in a batch at most: a tensor of a few elements has few bytes, but takes time


@dataclass(frozen=True, slots=True)
class SlotRange:
    """A range of bytes of an input or output: at `offset` of source or sink `handle`, at `slot_offset` in a slot."""

    handle: int
    offset: int
    nbytes: int
    slot_offset: int


@dataclass(eq=False, slots=True)
class Part:
    """Elements [first, first + count) of a step. A part that is cut again gets its result from its own parts."""

    native: Step
    first: int
    count: int
    whole: Part | None = None
    parts: list[Part] = field(default_factory=list)
    result: Result | None = None

    @property
    def nbytes(self) -> int:
        """Size in a slot, with all operands aligned."""
        return sum(aligned(self.count * width) for width in self.native.widths)

    def cut(self, most: int) -> list[Part]:
        """Cut into parts of at most `most` bytes each, or the smallest possible. A single part is this one."""
        pieces = self.native.cut(max(1, most - ALIGN * len(self.native.widths)), self.count)
        if len(pieces) == 1:
            return [self]
        self.parts = [Part(self.native, self.first + first, count, self) for first, count in pieces]
        return self.parts

    def take(self, result: Result) -> None:
        """Take the result; the last part of a whole completes the whole."""
        self.result = result
        whole = self.whole
        if whole is not None:
            results = [part.result for part in whole.parts]
            if all(one is not None for one in results):
                whole.parts = []
                whole.take(joined(whole.native, [one for one in results if one is not None]))


def joined(native: Step, results: Sequence[Result]) -> Result:
    """The result of a step from the results of its parts, in order."""
    return Result(native.join([r.answer for r in results]), join_stats([r.stats for r in results]))


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


class Batch:
    """Parts that run on a device together, and the layout of their operands in a slot: inputs first, then outputs.

    input_bytes, nbytes  size of the inputs, and of all operands, in a slot
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
                locations = zip(native.sinks, native.offsets, strict=True)
                triples = [(sink, offset, CODE_BYTES[native.out_dtype]) for sink, offset in locations]
            at = _lay_out(part, triples, at, self.outputs)
        self.nbytes = at
        self.bytes_read = sum(o.nbytes for some in self.inputs for o in some)
        self.bytes_written = sum(o.nbytes for some in self.outputs for o in some)

    def split(self, most: int) -> list[Batch]:
        """Batches of at most `most` bytes each; of more, if a part cannot be cut any further."""
        return batches((piece for part in self.parts for piece in part.cut(most)), most)


def _lay_out(part: Part, triples: Iterable[tuple[int, int, int]], at: int, ranges: list[list[SlotRange]]) -> int:
    """Add the operands of a part, each (handle, offset of the tensor, bytes of an element); returns the end."""
    of_part = []
    for handle, offset, width in triples:
        of_part.append(SlotRange(handle, offset + part.first * width, part.count * width, at))
        at += aligned(part.count * width)
    ranges.append(of_part)
    return at


def batches(parts: Iterable[Part], most: int) -> list[Batch]:
    """Batches of consecutive parts, each of at most `most` bytes, or of one part."""
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
    """The batches of one round, shared by the threads of all devices. All methods are thread-safe.

    workers  number of devices that take part
    or_cpu   that none of them is left is no error: the round ends with what is done

    `error` is the error that stopped the round: an exception, or an error tuple of the pump (_C.pyi).
    """

    def __init__(self, waiting: Sequence[Batch], workers: int, *, or_cpu: bool = False):
        self.batches, self._every = len(waiting), tuple(waiting)
        self.bytes_read = self.bytes_written = 0  # of batches that are done
        self.error: BaseException | tuple[Any, ...] | None = None
        self.lost: list[str] = []  # the reason for each device that failed
        self._waiting = deque(waiting)
        self._left, self._workers, self._stopped, self._or_cpu = len(waiting), workers, False, or_cpu
        self._changed = threading.Condition()

    @property
    def stopped(self) -> bool:
        return self._stopped

    def take(self, most: int, ended: threading.Event) -> Batch | None:
        """A batch of at most `most` bytes; waits while another device might still give one back.

        most   as many as `least` says, or more
        ended  set when the caller takes no more batches; `give_back` wakes those that wait
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
        """The smallest slot size, in bytes, that fits every part of the round after cutting: a device needs as much."""
        return max((_smallest(part) for batch in self._every for part in batch.parts), default=0)

    def done(self, batch: Batch, results: Sequence[Result]) -> None:
        """Record a batch whose outputs are all written."""
        with self._changed:
            for part, result in zip(batch.parts, results, strict=True):
                part.take(result)
            self.bytes_read += batch.bytes_read
            self.bytes_written += batch.bytes_written
            self._left -= 1
            if not self._left:
                self._changed.notify_all()

    def give_back(self, batch: Batch) -> None:
        """Put an unfinished batch back: the next device runs all of it."""
        with self._changed:
            self._waiting.appendleft(batch)
            self._changed.notify_all()

    def leave(self, why: str) -> None:
        """Remove a device that failed. The round ends with the last one."""
        with self._changed:
            self.lost.append(why)
            self._workers -= 1
            if not self._workers and self._left and self.error is None:
                if not self._or_cpu:
                    self.error = BackendError(
                        f"no device is left to merge on: {'; '.join(self.lost)}. Use --device cpu (in Python "
                        "device='cpu'), or a device with nothing else on it"
                    )
                self._stopped = True
            self._changed.notify_all()

    def fail(self, error: BaseException | tuple[Any, ...]) -> None:
        """Stop the round with an error that no other device could avoid."""
        with self._changed:
            self.error = self.error or error
            self._stopped = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Stop the round: `take` returns None from now on."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait at most so long. True when everything is done, or the round has stopped."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._left or self._stopped, seconds)


def _smallest(part: Part) -> int:
    """Bytes of the first of the smallest parts that a part can be cut into; it is the largest of them."""
    first, count = part.native.cut(1, part.count)[0]
    return Part(part.native, part.first + first, count).nbytes
