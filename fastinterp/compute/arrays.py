"""Weighted sums of arrays in memory: numpy arrays and torch CPU tensors, without copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastinterp import _C
from fastinterp.compute.backends import cpu_isa, cpu_threads
from fastinterp.compute.dtypes import DType, parse_dtype
from fastinterp.compute.ops import MAX_INPUTS, Combine
from fastinterp.errors import ShapeError, UsageError

_SUMMED = "float64, float32, float16, bfloat16 and float8 can be summed"
_NUMPY_TYPESTR = {"<f8": "F64", "<f4": "F32", "<f2": "F16"}


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
             float8_e5m2: numpy arrays (the last three as ml_dtypes has them) or torch CPU tensors, not both
    weights  finite numbers, one per array. An array whose weight is 0 is not read
    pivot    an array like them: the base that differences are taken from, so that rounding touches only the change
    out      where the result goes: contiguous, writable, overlapping none of the arrays. None: a new array
    dtype    of a new array: a name. None: that of the pivot, else of the first array

    Arithmetic is float32 (float64 if an array that is read is float64), with one rounding, to nearest even, at the
    store: the numeric contract of docs/NUMERICS.md. Returns `out` or the new array, of the same library as the input.
    Raises: UsageError, ShapeError.
    """
    if len(arrays) == 0 or len(arrays) != len(weights):
        raise UsageError(f"as many weights as arrays are needed, got {len(arrays)} arrays and {len(weights)} weights")
    inputs = [*arrays] if pivot is None else [pivot, *arrays]
    if len(inputs) > MAX_INPUTS:
        raise UsageError(f"at most {MAX_INPUTS} arrays can be summed at a time, pivot included, got {len(inputs)}")
    library = library_of(inputs[0])
    views = [library.view(x, f"array {i}") for i, x in enumerate(inputs)]
    for i, view in enumerate(views):
        if view[1] != views[0][1]:
            raise ShapeError(f"arrays differ in shape: {list(views[0][1])} and, for array {i}, {list(view[1])}")
    if any(isinstance(w, (bool, str, bytes)) or not hasattr(w, "__float__") for w in weights):
        raise UsageError(f"weights must be numbers, got {list(weights)}")
    values = tuple(float(w) for w in weights)
    if not all(abs(w) <= 3.4e38 for w in values):
        raise UsageError(f"weights must be finite float32 numbers, got {list(values)}")
    if pivot is None and not any(values):
        raise UsageError("every weight is 0, so nothing would be summed")
    row = (Combine(values) if pivot is None else Combine((0.0, *values), base=0)).row()
    if out is not None and dtype is not None:
        raise UsageError("give either `out` or `dtype`: out has a dtype of its own")
    kept = views[0][2]
    if out is None:
        wanted = kept if dtype is None else _named(dtype)
        if wanted is None:
            raise UsageError(f"unknown dtype {dtype!r}. Give a name, as 'float32'; {_SUMMED}")
        out = library.empty(inputs[0], wanted)
    address, shape, out_dtype = library.view(out, "out", writable=True)
    if shape != views[0][1]:
        raise ShapeError(f"out has shape {list(shape)}, the arrays have {list(views[0][1])}")
    numel = 1
    for n in shape:
        numel *= n
    _refuse_overlap(views, (address, out_dtype), numel)
    _C.combine(
        [v[0] for v in views], [v[2].code or 0 for v in views], [(row.pivot, row.total, list(row.terms))], [address],
        out_dtype.code or 0, numel, stats_every=0, threads=cpu_threads(threads), isa=cpu_isa(),
    )  # fmt: skip
    return out


def library_of(x: Any) -> type[Numpy] | type[Torch]:
    """How arrays like `x` are looked at and made; what is no array at all is refused by its `view`."""
    return Torch if hasattr(x, "data_ptr") else Numpy


def _named(dtype: object) -> DType | None:
    return parse_dtype(dtype) if isinstance(dtype, str) else None


def _refuse_overlap(views: list[tuple[int, Any, DType]], out: tuple[int, DType], numel: int) -> None:
    start, end = out[0], out[0] + numel * out[1].bits // 8
    for i, (address, _, dtype) in enumerate(views):
        if address < end and start < address + numel * dtype.bits // 8:
            raise UsageError(f"out overlaps array {i}: the sum would change its own input. Give another array")


class Numpy:
    """Numpy arrays, with ml_dtypes for those that numpy does not have."""

    @staticmethod
    def dtype(x: Any) -> DType | None:
        """The dtype of an array, or None if it does not merge."""
        return parse_dtype(_NUMPY_TYPESTR.get(x.dtype.str, x.dtype.name)) if x.dtype.isnative else None

    @staticmethod
    def same(x: Any, y: Any) -> bool:
        """Whether two arrays of any dtype hold the same bytes."""
        return x.dtype == y.dtype and x.shape == y.shape and bool(x.tobytes() == y.tobytes())

    @staticmethod
    def copy(x: Any) -> Any:
        return x.copy()

    @staticmethod
    def view(x: Any, name: str, writable: bool = False) -> tuple[int, tuple[int, ...], DType]:
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
            raise UsageError(f"{name} is not contiguous. Use numpy.ascontiguousarray")
        if writable and not x.flags.writeable:
            raise UsageError(f"{name} is read-only")
        return x.ctypes.data, x.shape, found

    @staticmethod
    def empty(like: Any, dtype: DType) -> Any:
        import numpy as np

        plain = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
        if dtype.name in plain:
            return np.empty(like.shape, plain[dtype.name])
        try:
            import ml_dtypes
        except ImportError:
            raise UsageError(f"numpy has no {dtype}: pip install ml_dtypes, or ask for float32") from None
        extra = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
        return np.empty(like.shape, extra[dtype.name])


class Torch:
    """Torch tensors on the CPU."""

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
    def view(x: Any, name: str, writable: bool = False) -> tuple[int, tuple[int, ...], DType]:
        import torch

        if not isinstance(x, torch.Tensor):
            raise UsageError(f"{name} must be a torch tensor like the first, got {type(x).__name__}")
        found = Torch.dtype(x)
        if found is None:
            raise UsageError(f"{name} has dtype {x.dtype}; {_SUMMED}")
        if x.device.type != "cpu":
            raise UsageError(f"{name} is on {x.device}; only CPU tensors can be summed")
        if not x.is_contiguous():
            raise UsageError(f"{name} is not contiguous. Use .contiguous()")
        if x.is_neg():  # the sign is in the view, not in the memory
            raise UsageError(f"{name} is a negated view. Use .resolve_neg()")
        if x.requires_grad and torch.is_grad_enabled():
            raise UsageError(f"{name} requires grad, and gets no gradient here. Use .detach() or torch.no_grad()")
        return x.data_ptr(), tuple(x.shape), found

    @staticmethod
    def empty(like: Any, dtype: DType) -> Any:
        import torch

        names = {
            "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
            "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        }  # fmt: skip
        return torch.empty(like.shape, dtype=names[dtype.name], device="cpu")
