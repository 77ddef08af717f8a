"""Many weighted sums of arrays in memory in one call, also such that replace one of their inputs: running averages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from fastinterp.backends.cpu import combine
from fastinterp.backends.device import Piece
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.backends.torch_device import current_queue
from fastinterp.errors import UsageError
from fastinterp.in_memory.arrays import ArrayView
from fastinterp.ops import operands, steps
from fastinterp.ops.combine import Combine, Row

_PIECE = 1 << 19  # elements that a thread takes at a time: any cuts give the same bytes
_SERIAL = 1 << 19  # elements of all sums below which threads take longer to start than to work


class WeightedSum(NamedTuple):
    """inputs: contiguous arrays of one shape; out: another of that shape, or one of the inputs, which is replaced."""

    inputs: tuple[ArrayView, ...]
    row: Row
    out: ArrayView


def run_sums(sums: Sequence[WeightedSum], device: Any, threads: int | None) -> None:
    """Compute sums of which none reads or writes what another writes: rounded to nearest, as `weighted_sum`.

    device   the torch.device of all arrays, None for the CPU. There everything is put into torch's current stream
    threads  of the CPU; None: one per CPU, at most 32
    Raises: BackendError.
    """
    sums = [one for one in sums if _numel(one.out)]
    if device is not None:
        if sums:
            current_queue(device).run([_launched(one) for one in sums])
        return
    count, isa = cpu_threads(threads), cpu_isa()
    numels = [_numel(one.out) for one in sums]
    pieces = _pieces(sums, isa)
    if count == 1 or sum(numels) < _SERIAL:
        _run(pieces)
        return
    listed = iter([*pieces])  # all threads take from it: the interpreter lets one of them at a time
    with ThreadPoolExecutor(count - 1, "fastinterp") as pool:
        helpers = [pool.submit(_run, listed) for _ in range(count - 1)]
        _run(listed)
        for helper in helpers:
            helper.result()


def lerp_in_place(
    targets: Sequence[ArrayView],
    others: Sequence[ArrayView],
    weights: Sequence[float],
    device: Any,
    threads: int | None,
) -> None:
    """targets[i] += weights[i] * (others[i] - targets[i]), the bytes of `weighted_sum` with targets[i] as the pivot.

    targets  contiguous arrays that overlap nothing else; none is listed twice
    others   as many of the same shapes, of any dtypes that merge
    weights  finite numbers, one for each pair. 0 leaves a target as it is, 1 copies the other
    Raises: UsageError; others and arguments as of `run_sums`.
    """
    _refuse_overlap(targets, others)
    run_sums(
        [
            WeightedSum((target, other), Combine((0.0, float(weight)), base=0).row(), target)
            for target, other, weight in zip(targets, others, weights, strict=True)
            if weight != 0
        ],
        device,
        threads,
    )


def _numel(view: ArrayView) -> int:
    return math.prod(view.shape)


def _run(pieces: Iterator[tuple[Any, ...]]) -> None:
    for inputs, codes, row, out, code, numel, isa in pieces:
        # Not stored around the caches: such loops store before they have looked at all of their inputs.
        combine(inputs, codes, [row], [out], code, numel, stats_every=0, threads=1, isa=isa, streamed=False)


def _pieces(sums: Sequence[WeightedSum], isa: str) -> Iterator[tuple[Any, ...]]:
    for inputs, row, out in sums:
        codes = [x.dtype.code or 0 for x in inputs]
        numel = _numel(out)
        for first in range(0, numel, _PIECE):
            at = [_address(x, first) for x in inputs]
            yield at, codes, row, _address(out, first), out.dtype.code or 0, min(_PIECE, numel - first), isa


def _address(view: ArrayView, element: int) -> int:
    return view.address + element * view.dtype.bits // 8


def _launched(one: WeightedSum) -> Piece:
    inputs = tuple(operands.Stored(i, 0, x.dtype.code or 0) for i, x in enumerate(one.inputs))
    numel = _numel(one.out)
    step = steps.Combine(
        inputs=inputs, numel=numel, sinks=(0,), offsets=(0,), out_dtype=one.out.dtype.code or 0, rows=(one.row,)
    )
    return Piece(step=step, inputs=tuple(x.address for x in one.inputs), outputs=(one.out.address,), numel=numel)


def _refuse_overlap(targets: Sequence[ArrayView], others: Sequence[ArrayView]) -> None:
    """Raises: UsageError, if a target shares memory with another array: the order of the sums would matter."""
    spans: list[tuple[int, int, int, int]] = []  # first byte, end, 0 for targets and 1 for others, index
    for kind, views in enumerate((targets, others)):
        for i, x in enumerate(views):
            size = _numel(x) * x.dtype.bits // 8
            spans += [(x.address, x.address + size, kind, i)] if size else []
    spans.sort()
    # The furthest end so far of targets, and of all arrays, with whose it is.
    ends = {True: (0, ""), False: (0, "")}
    for start, end, kind, i in spans:
        name = f"{'tensor' if kind else 'average'} {i}"
        before, label = ends[bool(kind)]  # a target may overlap nothing, another array may overlap no target
        if start < before:
            raise UsageError(f"{name} shares memory with {label}. Give tied tensors once, and copies of others")
        for key in (True, False) if not kind else (False,):
            ends[key] = max(ends[key], (end, name))
