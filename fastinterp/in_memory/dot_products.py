"""Dot products of tensors in memory: the gradient of a weighted sum with respect to its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastinterp.backends.cpu import Handle, PumpOptions, survey
from fastinterp.backends.device import Piece
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.backends.torch_device import capturing, common_device, current_queue
from fastinterp.backends.waiting import wait
from fastinterp.errors import BackendError, ShapeError, StorageError
from fastinterp.in_memory.arrays import ArrayView, TorchTensors
from fastinterp.ops.operands import Stored
from fastinterp.ops.steps import Answer, Measure

_GROUP = 4  # arrays measured together: with more, products among themselves would cost more than reading `of` again
_BYTES = 1 << 20


def dots(of: Any, arrays: Sequence[Any], threads: int | None = None) -> list[float]:
    """The dot products <of, x> for each x of `arrays`, in float64 and in the order of rule 7 of docs/NUMERICS.md.

    of, arrays  contiguous torch tensors that merge, of one shape, on one device. The results of a device are waited for
    threads     of the CPU; None: one per CPU, at most 32

    Raises: UsageError, ShapeError, BackendError.
    """
    labelled = [("the first", of), *((f"array {i}", x) for i, x in enumerate(arrays))]
    device = common_device([(name, TorchTensors.device(x)) for name, x in labelled])
    view, *views = [TorchTensors.view(x, name) for name, x in labelled]
    for i, other in enumerate(views):
        if other[1] != view[1]:
            raise ShapeError(f"arrays differ in shape: {list(view[1])} and, for array {i}, {list(other[1])}")
    numel = int(of.numel())
    if not numel:
        return [0.0] * len(views)
    groups = [[view, *views[k : k + _GROUP]] for k in range(0, len(views), _GROUP)]
    answers = _on_device(device, groups, numel) if device is not None else _on_cpu(groups, numel, threads)
    # The upper triangle row by row: its first row has the products with `of`, beginning with its own.
    return [
        float(x)
        for group, (sums, _) in zip(groups, answers, strict=True)
        for x in memoryview(sums).cast("B").cast("d")[1 : len(group)]
    ]


def _measure(group: Sequence[ArrayView], numel: int, first: int = 0) -> Measure:
    """The Gram matrix of arrays that are sources from number `first` on."""
    inputs = tuple(Stored(first + i, 0, view.dtype.code or 0) for i, view in enumerate(group))
    return Measure(inputs=inputs, numel=numel)


def _on_device(device: Any, groups: Sequence[Sequence[ArrayView]], numel: int) -> list[Answer]:
    if capturing(device):
        raise BackendError(f"products on {device} are answers that a CUDA graph cannot wait for. Measure them outside")
    queue = current_queue(device)
    pieces = [
        Piece(step=_measure(group, numel), inputs=tuple(view.address for view in group), numel=numel)
        for group in groups
    ]
    pending = queue.run(pieces)
    wait(queue.record())
    return [answer.answer() for answer in pending]


def _on_cpu(groups: Sequence[Sequence[ArrayView]], numel: int, threads: int | None) -> list[Answer]:
    sources: list[Handle] = []
    steps = []
    for group in groups:
        steps.append(_measure(group, numel, len(sources)))
        sources += [("memory", view.address, numel * view.dtype.bits // 8) for view in group]
    options = PumpOptions(isa=cpu_isa(), threads=cpu_threads(threads), write_bytes=_BYTES, read_bytes=_BYTES)
    return survey(sources, steps, options, lambda error: StorageError(f"the run stopped: {error}"))
