"""Weighted sums of arrays in memory, the CPU's or a device's, without copies of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

from fastinterp.backends.cpu import SumRow, combine
from fastinterp.backends.device import Piece
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.backends.torch_device import common_device, current_queue
from fastinterp.errors import ShapeError, UsageError
from fastinterp.in_memory.arrays import MERGED_DTYPES, ArrayView, library_of
from fastinterp.in_memory.plain_sums import plain_sum
from fastinterp.messages import counted
from fastinterp.ops import operands, steps
from fastinterp.ops.combine import MAX_INPUTS, Combine, Row
from fastinterp.ops.dtypes import DType, parse_dtype

_LISTS, _NUMBERS = (list, tuple), {float, int}
Array = TypeVar("Array")  # of numpy, torch, or another library: the result has the type of the inputs


def weighted_sum(
    arrays: Sequence[Array],
    weights: Sequence[float],
    *,
    pivot: Array | None = None,
    out: Array | None = None,
    dtype: str | None = None,
    threads: int | None = None,
) -> Array:
    """sum_i weights[i] * arrays[i], or with a pivot p: p + sum_i weights[i] * (arrays[i] - p).

    arrays   1 to 64 contiguous arrays of one shape, each float64, float32, float16, bfloat16, float8_e4m3fn or
             float8_e5m2: numpy arrays (the last three as ml_dtypes has them) or torch tensors, not both; or what has
             `__dlpack__`, as cupy's. All on one device: the CPU, or one with CUDA
    weights  finite numbers, one per array. An array whose weight is 0 is not read
    pivot    an array like them: the base that differences are taken from, so that rounding touches only the change
    out      where the result goes: contiguous, writable, overlapping none of the arrays. None: a new array
    dtype    of a new array: a name. None: that of the pivot, else of the first array
    threads  of the CPU; None: one per CPU, at most 32

    On a device the sum is put into torch's current stream, and not waited for: it may be captured in a CUDA graph.

    Arithmetic is float32 (float64 if an array that is read is float64), with one rounding, to nearest even, at the
    store: the numeric contract of docs/NUMERICS.md. Returns `out` or the new array, of the same library as the input.
    Raises: UsageError, ShapeError, BackendError.

    >>> import fastinterp, numpy
    >>> x, y = numpy.float32([1, 2]), numpy.float32([3, 5])
    >>> fastinterp.weighted_sum([x, y], [0.75, 0.25])
    array([1.5 , 2.75], dtype=float32)
    >>> fastinterp.weighted_sum([y], [0.5], pivot=x)  # halfway from x to y
    array([2. , 3.5], dtype=float32)
    """
    if dtype is None:
        done = _plain_sum(arrays, weights, pivot, out, threads)
        if done is not None:
            return done  # type: ignore[no-any-return]
    if len(arrays) == 0 or len(arrays) != len(weights):
        raise UsageError(
            f"each array needs a weight, got {counted(len(arrays), 'array')} and {counted(len(weights), 'weight')}"
        )
    terms = [*arrays] if pivot is None else [pivot, *arrays]
    if len(terms) > MAX_INPUTS:
        raise UsageError(f"at most {MAX_INPUTS} arrays can be summed at a time, pivot included, got {len(terms)}")
    library = library_of(terms[0])
    inputs = [library.prepare(x) for x in terms]
    views = [library.view(x, f"array {i}") for i, x in enumerate(inputs)]
    shape = views[0].shape
    for i, view in enumerate(views):
        if view.shape != shape:
            raise ShapeError(f"arrays differ in shape: {list(shape)} and, for array {i}, {list(view.shape)}")
    row = _row(weights, pivot is not None)
    if out is not None and dtype is not None:
        raise UsageError("give either `out` or `dtype`: out has a dtype of its own")
    out_dtype = views[0].dtype if dtype is None else _named(dtype)
    if out_dtype is None:
        raise UsageError(f"unknown dtype {dtype!r}. Give a name, as 'float32'; {MERGED_DTYPES}")
    result = library.empty(inputs[0], out_dtype) if out is None else library.prepare(out)
    target = library.view(result, "out", writable=True)
    if target.shape != shape:
        raise ShapeError(f"out has shape {list(target.shape)}, the arrays have {list(shape)}")
    _refuse_overlap(views, target)
    labelled = [*((f"array {i}", x) for i, x in enumerate(inputs)), ("out", result)]
    device = common_device([(label, library.device(x)) for label, x in labelled])
    _compute(views, row, target, device, threads)
    if out is not None:
        library.written(result, out)
    return library.export(result, terms[0]) if out is None else out


def _plain_sum(arrays: Sequence[Any], weights: Sequence[float], pivot: Any, out: Any, threads: int | None) -> Any:
    """The sum of plain arrays, whose checks cost more than small sums. None: look at all arguments."""
    listed = type(arrays) in _LISTS and type(weights) in _LISTS and 0 < len(arrays) == len(weights) < MAX_INPUTS
    if not listed or not {*map(type, weights)} <= _NUMBERS:
        return None
    row = _sum_row(tuple(weights), pivot is not None)
    return plain_sum(arrays if pivot is None else [pivot, *arrays], row, out, threads)


def _row(weights: Sequence[float], has_pivot: bool) -> Row:
    if any(isinstance(w, (bool, str, bytes)) or not hasattr(w, "__float__") for w in weights):
        raise UsageError(f"weights must be numbers, got {list(weights)}")
    try:
        values = tuple(float(w) for w in weights)
    except OverflowError:  # a whole number beyond float64
        values = (math.inf,)
    if not all(abs(w) <= 3.4e38 for w in values):
        raise UsageError(f"weights must be finite float32 numbers, got {list(values)}")
    if not has_pivot and not any(values):
        raise UsageError("every weight is 0, so nothing would be summed")
    return (Combine((0.0, *values), base=0) if has_pivot else Combine(values)).row()


@lru_cache(maxsize=256)
def _sum_row(weights: tuple[float, ...], has_pivot: bool) -> SumRow:
    return SumRow(_row(weights, has_pivot), len(weights) + has_pivot)


def _compute(views: Sequence[ArrayView], row: Row, out: ArrayView, device: Any, threads: int | None) -> None:
    """Compute a sum on the CPU, or put it into the current stream of a device."""
    numel = math.prod(out.shape)
    if device is None:
        combine(
            [v.address for v in views], [v.dtype.code or 0 for v in views], [row], [out.address], out.dtype.code or 0,
            numel, stats_every=0, threads=cpu_threads(threads), isa=cpu_isa(),
        )  # fmt: skip
    elif numel:
        inputs = tuple(operands.Stored(i, 0, v.dtype.code or 0) for i, v in enumerate(views))
        step = steps.Combine(
            inputs=inputs, numel=numel, sinks=(0,), offsets=(0,), out_dtype=out.dtype.code or 0, rows=(row,)
        )
        piece = Piece(step=step, inputs=tuple(v.address for v in views), outputs=(out.address,), numel=numel)
        current_queue(device).run([piece])


def _named(dtype: object) -> DType | None:
    return parse_dtype(dtype) if isinstance(dtype, str) else None


def _refuse_overlap(views: Sequence[ArrayView], out: ArrayView) -> None:
    numel = math.prod(out.shape)
    end = out.address + numel * out.dtype.bits // 8
    for i, view in enumerate(views):
        if view.address < end and out.address < view.address + numel * view.dtype.bits // 8:
            raise UsageError(f"out overlaps array {i}: the sum would change its own input. Give another array")
