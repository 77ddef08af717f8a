"""Dot products of arrays in memory: what a gradient with respect to the weights of a sum consists of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastinterp.backends.cpu import Handle, PumpOptions, survey
from fastinterp.backends.device import Piece
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.backends.torch_device import capturing, current_queue, one_place
from fastinterp.errors import BackendError, ShapeError, StorageError
from fastinterp.in_memory.weighted_sum import Torch, View
from fastinterp.ops.steps import Answer, Measure, Stored

_AT_A_TIME = 4  # of the arrays: more would cost more products among themselves than another read of `of`
_BYTES = 1 << 20


def dots(of: Any, arrays: Sequence[Any], threads: int | None = None) -> list[float]:
    """<of, x> for each x of `arrays`, in float64 and in the order of rule 7 of docs/NUMERICS.md.

    of, arrays  contiguous torch tensors that merge, of one shape, on one device. On a device the answer is waited for
    threads     of the CPU; None: one per CPU, at most 32

    Raises: UsageError, ShapeError, BackendError.
    """
    named = [("the first", of), *((f"array {i}", x) for i, x in enumerate(arrays))]
    where = one_place([(name, Torch.place(x)) for name, x in named])
    view, *views = [Torch.view(x, name) for name, x in named]
    for i, other in enumerate(views):
        if other[1] != view[1]:
            raise ShapeError(f"arrays differ in shape: {list(view[1])} and, for array {i}, {list(other[1])}")
    numel = int(of.numel())
    if not numel:
        return [0.0] * len(views)
    groups = [[view, *views[k : k + _AT_A_TIME]] for k in range(0, len(views), _AT_A_TIME)]
    answers = _there(where, groups, numel) if where is not None else _here(groups, numel, threads)
    # The upper triangle row by row: its first row has the products with `of`, beginning with its own.
    return [
        float(x)
        for group, (sums, _) in zip(groups, answers, strict=True)
        for x in memoryview(sums).cast("B").cast("d")[1 : len(group)]
    ]


def _measure(group: Sequence[View], numel: int, first: int = 0) -> Measure:
    """Of arrays that are sources from number `first` on."""
    inputs = tuple(Stored(first + i, 0, view[2].code or 0) for i, view in enumerate(group))
    return Measure(inputs=inputs, numel=numel)


def _there(where: Any, groups: Sequence[Sequence[View]], numel: int) -> list[Answer]:
    if capturing(where):
        raise BackendError(f"products on {where} are answers that a CUDA graph cannot wait for. Measure them outside")
    queue = current_queue(where)
    pieces = [
        Piece(step=_measure(group, numel), inputs=tuple(view[0] for view in group), numel=numel) for group in groups
    ]
    pending = queue.run(pieces)
    queue.record().wait()
    return [found.answer() for found in pending]


def _here(groups: Sequence[Sequence[View]], numel: int, threads: int | None) -> list[Answer]:
    sources: list[Handle] = []
    steps = []
    for group in groups:
        steps.append(_measure(group, numel, len(sources)))
        sources += [("memory", view[0], numel * view[2].bits // 8) for view in group]
    options = PumpOptions(isa=cpu_isa(), threads=cpu_threads(threads), write_bytes=_BYTES, read_bytes=_BYTES)
    return survey(sources, steps, options, lambda error: StorageError(f"the run stopped: {error}"))
