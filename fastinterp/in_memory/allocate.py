"""New tensors in memory, torch's or numpy's, of every dtype that a checkpoint may have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from fastinterp.errors import UsageError
from fastinterp.ops.dtypes import DType

Framework = Literal["torch", "numpy"]
Make = Callable[[DType, tuple[int, ...]], tuple[Any, int]]  # -> the tensor, and the address of its first byte


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

    torch_type = getattr(torch, dtype.library_name, None) if dtype.library_name else None
    if torch_type is None:
        raise UsageError(f"torch has no dtype for {dtype}, so such tensors cannot be loaded. Merge them to files")
    return torch_type


def numpy_dtype(dtype: DType) -> Any:
    """The numpy.dtype of a storage dtype, or what numpy takes as one.

    Raises: UsageError, if numpy has none, or only with ml_dtypes, which is not installed.
    """
    if dtype.in_numpy:
        return dtype.library_name
    try:
        import ml_dtypes
    except ImportError:
        raise UsageError(
            f"numpy has no {dtype}: pip install ml_dtypes, or ask for dtype='float32' (--dtype float32)"
        ) from None
    numpy_type = getattr(ml_dtypes, dtype.library_name, None) if dtype.library_name else None
    if numpy_type is None:
        raise UsageError(f"numpy has no dtype for {dtype}, so such tensors cannot be loaded. Merge them to files")
    return numpy_type
