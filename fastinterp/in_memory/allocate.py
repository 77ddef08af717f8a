"""New tensors in memory, torch's or numpy's, of every dtype that a checkpoint may have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from fastinterp.errors import UsageError
from fastinterp.ops.dtypes import DType

Framework = Literal["torch", "numpy"]
Make = Callable[[DType, tuple[int, ...]], tuple[Any, int]]  # -> the tensor, and the address of its first byte

_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64", "C64": "complex64",
}  # fmt: skip
_NUMPY = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16",
    "I16": "int16", "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64", "C64": "complex64",
}  # fmt: skip
_ML_DTYPES = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def maker(framework: str) -> Make:
    """A function that makes tensors of a library: uninitialised, contiguous, in the CPU's memory.

    Raises: UsageError, if the library is not installed. The function raises it where the library has no such dtype.
    """
    if framework == "torch":
        try:
            import torch
        except ImportError:
            raise UsageError(
                "torch is not installed: pip install torch, or ask for framework='numpy' (sweep --framework numpy)"
            ) from None

        def with_torch(dtype: DType, shape: tuple[int, ...]) -> tuple[Any, int]:
            tensor = torch.empty(shape, dtype=torch_dtype(dtype), device="cpu")
            return tensor, tensor.data_ptr()

        return with_torch
    if framework == "numpy":

        def with_numpy(dtype: DType, shape: tuple[int, ...]) -> tuple[Any, int]:
            array = np.empty(shape, numpy_dtype(dtype))
            return array, array.ctypes.data

        return with_numpy
    raise UsageError(f"framework must be torch or numpy, got {framework!r}")


def torch_dtype(dtype: DType) -> Any:
    """The torch.dtype of a storage dtype.

    Raises: UsageError, if torch has none.
    """
    import torch

    torch_dtype = getattr(torch, _TORCH.get(dtype.name, ""), None)
    if torch_dtype is None:
        raise UsageError(f"torch has no dtype for {dtype}, so such tensors cannot be loaded. Merge them to files")
    return torch_dtype


def numpy_dtype(dtype: DType) -> Any:
    """What numpy takes as the dtype of arrays of a storage dtype.

    Raises: UsageError, if neither numpy nor ml_dtypes has one.
    """
    if dtype.name in _NUMPY:
        return _NUMPY[dtype.name]
    try:
        import ml_dtypes
    except ImportError:
        raise UsageError(
            f"numpy has no {dtype}: pip install ml_dtypes, or ask for dtype='float32' (--dtype float32)"
        ) from None
    numpy_dtype = getattr(ml_dtypes, _ML_DTYPES.get(dtype.name, ""), None)
    if numpy_dtype is None:
        raise UsageError(f"numpy has no dtype for {dtype}, so such tensors cannot be loaded. Merge them to files")
    return numpy_dtype
