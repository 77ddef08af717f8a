"""Weighted sums of arrays in memory, the CPU's or an accelerator's: of numpy and torch, without copies."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from fastinterp.backends.cpu import combine
from fastinterp.backends.device import Piece
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.backends.torch_device import current_queue, one_place
from fastinterp.errors import ShapeError, UsageError
from fastinterp.ops import steps
from fastinterp.ops.combine import MAX_INPUTS, Combine, Row
from fastinterp.ops.dtypes import DType, parse_dtype

View = tuple[int, tuple[int, ...], DType]  # address, shape, dtype

_SUMMED = "float64, float32, float16, bfloat16 and float8 can be summed"


def weighted_sum(
    arrays: Sequence[Any],
    weights: Sequence[float],
    *,
    pivot: Any = None,
    out: Any = None,
    dtype: str | None = None,
    threads: int | None = None,
) -> Any:
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
    """
    if len(arrays) == 0 or len(arrays) != len(weights):
        raise UsageError(f"as many weights as arrays are needed, got {len(arrays)} arrays and {len(weights)} weights")
    given = [*arrays] if pivot is None else [pivot, *arrays]
    if len(given) > MAX_INPUTS:
        raise UsageError(f"at most {MAX_INPUTS} arrays can be summed at a time, pivot included, got {len(given)}")
    library = library_of(given[0])
    inputs = [library.own(x) for x in given]
    views = [library.view(x, f"array {i}") for i, x in enumerate(inputs)]
    for i, view in enumerate(views):
        if view[1] != views[0][1]:
            raise ShapeError(f"arrays differ in shape: {list(views[0][1])} and, for array {i}, {list(view[1])}")
    row = _row(weights, pivot is not None)
    if out is not None and dtype is not None:
        raise UsageError("give either `out` or `dtype`: out has a dtype of its own")
    kept = views[0][2] if dtype is None else _named(dtype)
    if kept is None:
        raise UsageError(f"unknown dtype {dtype!r}. Give a name, as 'float32'; {_SUMMED}")
    result = library.empty(inputs[0], kept) if out is None else library.own(out)
    target = library.view(result, "out", writable=True)
    if target[1] != views[0][1]:
        raise ShapeError(f"out has shape {list(target[1])}, the arrays have {list(views[0][1])}")
    _refuse_overlap(views, (target[0], target[2]), math.prod(target[1]))
    named = [*((f"array {i}", x) for i, x in enumerate(inputs)), ("out", result)]
    where = one_place([(name, library.place(x)) for name, x in named])
    _add_up(views, row, target, where, threads)
    return library.given(result, given[0]) if out is None else out


def _row(weights: Sequence[float], has_pivot: bool) -> Row:
    if any(isinstance(w, (bool, str, bytes)) or not hasattr(w, "__float__") for w in weights):
        raise UsageError(f"weights must be numbers, got {list(weights)}")
    values = tuple(float(w) for w in weights)
    if not all(abs(w) <= 3.4e38 for w in values):
        raise UsageError(f"weights must be finite float32 numbers, got {list(values)}")
    if not has_pivot and not any(values):
        raise UsageError("every weight is 0, so nothing would be summed")
    return (Combine((0.0, *values), base=0) if has_pivot else Combine(values)).row()


def _add_up(views: Sequence[View], row: Row, out: View, where: Any, threads: int | None) -> None:
    """Carry out a sum, or put it into the current stream of the device `where`."""
    numel = math.prod(out[1])
    if where is None:
        combine(
            [v[0] for v in views], [v[2].code or 0 for v in views], [row], [out[0]], out[2].code or 0, numel,
            stats_every=0, threads=cpu_threads(threads), isa=cpu_isa(),
        )  # fmt: skip
    elif numel:
        inputs = tuple(steps.Stored(i, 0, v[2].code or 0) for i, v in enumerate(views))
        step = steps.Combine(
            inputs=inputs, numel=numel, sinks=(0,), offsets=(0,), out_dtype=out[2].code or 0, rows=(row,)
        )
        piece = Piece(step=step, inputs=tuple(v[0] for v in views), outputs=(out[0],), numel=numel)
        current_queue(where).run([piece])


def library_of(x: Any) -> type[Numpy] | type[Torch]:
    """How arrays like `x` are looked at and made; what is no array at all is refused by its `view`."""
    if hasattr(x, "data_ptr"):
        return Torch
    if hasattr(x, "__dlpack__") and not hasattr(x, "__array_interface__"):
        return Exchanged
    return Numpy


def _named(dtype: object) -> DType | None:
    return parse_dtype(dtype) if isinstance(dtype, str) else None


def _refuse_overlap(views: Sequence[View], out: tuple[int, DType], numel: int) -> None:
    start, end = out[0], out[0] + numel * out[1].bits // 8
    for i, (address, _, dtype) in enumerate(views):
        if address < end and start < address + numel * dtype.bits // 8:
            raise UsageError(f"out overlaps array {i}: the sum would change its own input. Give another array")


class Numpy:
    """Numpy arrays, with ml_dtypes for those that numpy does not have."""

    @staticmethod
    def own(x: Any) -> Any:
        """The array as the other functions take it."""
        return x

    @staticmethod
    def given(x: Any, like: Any) -> Any:
        """A new array as its caller has them. like: one of the caller's."""
        return x

    @staticmethod
    def place(x: Any) -> Any:
        """The torch.device that it lies on, None for the CPU."""
        return None

    @staticmethod
    def dtype(x: Any) -> DType | None:
        """The dtype of an array, or None if it does not merge."""
        return parse_dtype(x.dtype.name) if x.dtype.isnative else None

    @staticmethod
    def same(x: Any, y: Any) -> bool:
        """Whether two arrays of any dtype hold the same bytes."""
        return x.dtype == y.dtype and x.shape == y.shape and bool(x.tobytes() == y.tobytes())

    @staticmethod
    def copy(x: Any) -> Any:
        return x.copy()

    @staticmethod
    def view(x: Any, name: str, writable: bool = False) -> View:
        """Address, shape and dtype of an array."""
        import numpy as np

        if not isinstance(x, np.ndarray):
            raise UsageError(f"{name} must be a numpy array like the first, got {type(x).__name__}")
        if isinstance(x, np.ma.MaskedArray):
            raise UsageError(f"{name} is masked, and masks are not looked at. Use .filled(0), say")
        found = Numpy.dtype(x)
        if found is None:
            raise UsageError(f"{name} has dtype {x.dtype}; {_SUMMED}")
        if not x.flags.c_contiguous:
            remedy = "Give a contiguous array" if writable else "Use numpy.ascontiguousarray"  # of a copy nobody knows
            raise UsageError(f"{name} is not contiguous. {remedy}")
        if writable and not x.flags.writeable:
            raise UsageError(f"{name} is read-only")
        return x.ctypes.data, x.shape, found

    @staticmethod
    def empty(like: Any, dtype: DType) -> Any:
        import numpy as np

        from fastinterp.in_memory.allocate import numpy_dtype

        return np.empty(like.shape, numpy_dtype(dtype))


class Torch:
    """Torch tensors, on the CPU or on a device with CUDA."""

    @staticmethod
    def own(x: Any) -> Any:
        return x

    @staticmethod
    def given(x: Any, like: Any) -> Any:
        return x

    @staticmethod
    def place(x: Any) -> Any:
        return None if x.device.type == "cpu" else x.device

    @staticmethod
    def dtype(x: Any) -> DType | None:
        """The dtype of a tensor, or None if it does not merge."""
        return parse_dtype(str(x.dtype))

    @staticmethod
    def same(x: Any, y: Any) -> bool:
        """Whether two tensors of any dtype are equal."""
        import torch

        return bool(x.dtype == y.dtype and torch.equal(x, y))

    @staticmethod
    def copy(x: Any) -> Any:
        return x.detach().clone()

    @staticmethod
    def view(x: Any, name: str, writable: bool = False) -> View:
        import torch

        if not isinstance(x, torch.Tensor):
            raise UsageError(f"{name} must be a torch tensor like the first, got {type(x).__name__}")
        found = Torch.dtype(x)
        if found is None:
            raise UsageError(f"{name} has dtype {x.dtype}; {_SUMMED}")
        if x.device.type not in ("cpu", "cuda"):
            raise UsageError(f"{name} is on {x.device}; only tensors on the CPU or on CUDA devices can be summed")
        if not x.is_contiguous():
            remedy = "Give a contiguous tensor" if writable else "Use .contiguous()"  # of a copy nobody knows
            raise UsageError(f"{name} is not contiguous. {remedy}")
        if x.is_neg():  # the sign is in the view, not in the memory
            raise UsageError(f"{name} is a negated view. {'Give another tensor' if writable else 'Use .resolve_neg()'}")
        if x.requires_grad and torch.is_grad_enabled():
            raise UsageError(
                f"{name} requires grad, and gets no gradient here. Use .detach() or torch.no_grad(); for gradients of "
                "weighted sums, fastinterp.integrations.torch_ops.weighted_sum"
            )
        return x.data_ptr(), tuple(x.shape), found

    @staticmethod
    def empty(like: Any, dtype: DType) -> Any:
        from fastinterp.in_memory.allocate import torch_dtype

        if hasattr(like, "new_empty"):  # on the same device
            return like.new_empty(like.shape, dtype=torch_dtype(dtype))
        import torch

        return torch.empty(like.shape, dtype=torch_dtype(dtype), device="cpu")


class Exchanged(Torch):
    """Arrays with `__dlpack__`. Their library orders what it has put in before torch's current stream."""

    @staticmethod
    def own(x: Any) -> Any:
        """Raises: UsageError, if torch does not take it."""
        try:
            import torch
        except ImportError:
            raise UsageError(f"{type(x).__name__} arrays are merged as torch tensors: pip install torch") from None
        if not hasattr(x, "__dlpack__"):
            raise UsageError(f"all must be arrays of one library, got {type(x).__name__}, which has no __dlpack__")
        try:
            return x if isinstance(x, torch.Tensor) else torch.from_dlpack(x)
        except (RuntimeError, BufferError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"torch does not take this {type(x).__name__} by DLPack: {reason}") from None

    @staticmethod
    def given(x: Any, like: Any) -> Any:
        """Raises: UsageError, if the library of `like` does not take arrays by DLPack."""
        if hasattr(like, "__array_namespace__"):
            library = like.__array_namespace__()
        else:
            library = sys.modules[type(like).__module__.partition(".")[0]]
        if not hasattr(library, "from_dlpack"):
            raise UsageError(f"{library.__name__} has no from_dlpack. Give `out`, or torch tensors")
        return library.from_dlpack(x)
