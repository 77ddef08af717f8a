"""Weighted sums of small arrays at the cost of a call: plain ones are looked at by the compiled code alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastinterp.backends.cpu import PlainSums, SumRow
from fastinterp.backends.registry import cpu_threads
from fastinterp.in_memory.allocate import numpy_dtype, torch_dtype
from fastinterp.ops.dtypes import DTYPES


class _Library(NamedTuple):
    """A library whose arrays the compiled code reads."""

    sums: PlainSums
    empty_like: Callable[[Any], Any]
    records: Callable[[], bool]  # whether autograd does


def plain_sum(arrays: Sequence[Any], row: SumRow, out: Any = None, threads: int | None = None) -> Any:
    """A weighted sum, as `weighted_sum` makes it: `out`, else a new array of the dtype of the first.

    arrays   1 to 64 objects, of which nothing is known
    row      of as many inputs
    threads  None: one per CPU, at most 32

    None, with nothing written: they are no numpy arrays and no torch tensors on the CPU, of types of their own, not
    contiguous, differ in shape, are empty, share memory with `out`, or autograd follows them. Whoever calls looks why.
    Raises: BackendError.
    """
    library = _known.get(type(arrays[0])) or _library(type(arrays[0]))
    if library is None:
        return None
    target = library.empty_like(arrays[0]) if out is None else out
    count = cpu_threads if threads is None else cpu_threads(threads)
    return target if library.sums.sum(arrays, row, target, count, library.records()) else None


_known: dict[type, _Library] = {}  # of torch: its types are there when a tensor is


def _library(kind: type) -> _Library | None:
    if kind is np.ndarray:
        return _numpy("ml_dtypes" in sys.modules)
    if kind.__module__.startswith("torch") and "torch" in sys.modules:
        _known.update(_torch())
    return _known.get(kind)


@cache
def _numpy(ml_dtypes: bool) -> _Library:
    codes = {np.dtype(numpy_dtype(d)): d.code for d in DTYPES.values() if d.merges and (d.in_numpy or ml_dtypes)}
    return _Library(PlainSums((np.ndarray,), codes, tensors=False), np.empty_like, bool)


def _torch() -> dict[type, _Library]:
    import torch

    codes = {torch_dtype(d): d.code for d in DTYPES.values() if d.merges}
    types = (torch.Tensor, torch.nn.Parameter)
    library = _Library(PlainSums(types, codes, tensors=True), torch.empty_like, torch.is_grad_enabled)
    return dict.fromkeys(types, library)
