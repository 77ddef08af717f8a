"""Dot products of tensors in memory: the gradient of a weighted sum with respect to its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastinterp.backends.cpu import Pump, watch
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.backends.torch_device import capturing, current_queue, one_place
from fastinterp.errors import BackendError, ShapeError, StorageError
from fastinterp.in_memory.arrays import TorchTensors

_AT_A_TIME = 4  # of the arrays: more would cost more products among themselves than another read of `of`
_BYTES = 1 << 20


def dots(of: Any, arrays: Sequence[Any], threads: int | None = None) -> list[float]:
    """<of, x> for each x of `arrays`, in float64 and in the order of rule 7 of docs/NUMERICS.md.

    of, arrays  contiguous torch tensors that merge, of one shape, on one device. On a device the answer is waited for
    threads     of the CPU; None: one per CPU, at most 32

    Raises: UsageError, ShapeError, BackendError.
    """
    labelled = [("the first", of), *((f"array {i}", x) for i, x in enumerate(arrays))]
    where = one_place([(name, TorchTensors.device(x)) for name, x in labelled])
    view, *views = [TorchTensors.view(x, name) for name, x in labelled]
    for i, other in enumerate(views):
        if other[1] != view[1]:
            raise ShapeError(f"arrays differ in shape: {list(view[1])} and, for array {i}, {list(other[1])}")
    numel = int(of.numel())
    if not numel:
        return [0.0] * len(views)
    groups = [[view, *views[k : k + _AT_A_TIME]] for k in range(0, len(views), _AT_A_TIME)]
    inputs = [[(v[0], v[2].code or 0) for v in group] for group in groups]
    answers = _there(where, inputs, numel) if where is not None else _here(inputs, numel, threads)
    # The upper triangle row by row: its first row has the products with `of`, beginning with its own.
    return [
        float(x)
        for group, (sums, _) in zip(groups, answers, strict=True)
        for x in memoryview(sums).cast("B").cast("d")[1 : len(group)]
    ]


def _there(where: Any, groups: Sequence[Sequence[tuple[int, int]]], numel: int) -> list[Any]:
    if capturing(where):
        raise BackendError(f"products on {where} are answers that a CUDA graph cannot wait for. Measure them outside")
    queue = current_queue(where)
    pending = queue.run([{"kind": "measure", "inputs": list(group), "numel": numel, "first": 0} for group in groups])
    queue.record().wait()
    return [answer.answer() for answer in pending]


def _here(groups: Sequence[Sequence[tuple[int, int]]], numel: int, threads: int | None) -> list[Any]:
    width = (8, 4, 2, 2, 1, 1)  # bytes by dtype code
    sources: list[tuple[str, int, int]] = []
    steps = []
    for group in groups:
        steps.append({"kind": "measure", "numel": numel,
                      "inputs": [(len(sources) + i, 0, code) for i, (_, code) in enumerate(group)]})  # fmt: skip
        sources += [("memory", address, numel * width[code]) for address, code in group]
    pump = Pump(
        cpu_isa(), sources, [], steps, threads=cpu_threads(threads), write_bytes=_BYTES, read_bytes=_BYTES,
        stochastic=False, fp8_saturate=True, prefetch=False, stats_every=0,
    )  # fmt: skip
    watch(pump, 0, None)
    if pump.error() is not None:
        raise StorageError(f"the run stopped: {pump.error()}")
    return pump.answers()
