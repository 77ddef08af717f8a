"""Arrays of numpy, torch and libraries with DLPack in one interface: address, shape and dtype of each, and new ones."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from fastinterp.backends.torch_device import current_queue
from fastinterp.backends.waiting import wait
from fastinterp.errors import UsageError
from fastinterp.in_memory.allocate import numpy_dtype, torch_dtype
from fastinterp.ops.dtypes import DTYPES, DType, parse_dtype

MERGED_DTYPES = "float64, float32, float16, bfloat16 and float8 can be summed"  # for messages
_STORED = {d.library_name: d for d in DTYPES.values() if d.library_name}


def stored_dtype(x: Any) -> DType | None:
    """The dtype of an array of numpy or torch, merged or not; None: files have none of its name."""
    return _STORED.get(str(x.dtype).removeprefix("torch."))


class ArrayView(NamedTuple):
    """A contiguous array in memory. address: of its first element, on the host or on a device."""

    address: int
    shape: tuple[int, ...]
    dtype: DType


class NumpyArrays:
    """Numpy arrays, with ml_dtypes for those that numpy does not have."""

    @staticmethod
    def prepare(x: Any) -> Any:
        """An array of the caller's as the other functions take it."""
        return x

    @staticmethod
    def export(x: Any, like: Any) -> Any:
        """A new array as one of the caller's library. like: an array of the caller's."""
        return x

    @staticmethod
    def written(x: Any, out: Any) -> None:
        """Order what the caller's library does next after what was put into torch's current stream.

        x    what was written, as `prepare` made it of `out`, an array of the caller's
        """

    @staticmethod
    def device(x: Any) -> Any:
        """The torch.device that an array is on; None for the CPU."""
        return None

    @staticmethod
    def dtype(x: Any) -> DType | None:
        """The dtype of an array, or None if it does not merge."""
        return parse_dtype(x.dtype.name) if x.dtype.isnative else None

    @staticmethod
    def pairs(x: Any) -> Any:
        """An array of complex64 as float32 of one more dimension, of length 2, in the same memory."""
        return np.ascontiguousarray(x).view(np.float32).reshape(*x.shape, 2)

    @staticmethod
    def equal(x: Any, y: Any) -> bool:
        """Whether two arrays of any dtype hold the same bytes."""
        return x.dtype == y.dtype and x.shape == y.shape and bool(x.tobytes() == y.tobytes())

    @staticmethod
    def copy(x: Any) -> Any:
        return x.copy()

    @staticmethod
    def view(x: Any, name: str, writable: bool = False) -> ArrayView:
        """Address, shape and dtype. Raises: UsageError, if the array cannot be summed. name: what messages call it."""
        if not isinstance(x, np.ndarray):
            raise UsageError(f"{name} must be a numpy array like the first, got {type(x).__name__}")
        if isinstance(x, np.ma.MaskedArray):
            raise UsageError(f"{name} is masked, and masks are ignored. Use .filled(0), say")
        dtype = NumpyArrays.dtype(x)
        if dtype is None:
            raise UsageError(f"{name} has dtype {x.dtype}; {MERGED_DTYPES}")
        if not x.flags.c_contiguous:
            # To write into a copy would not help the caller.
            remedy = "Give a contiguous array" if writable else "Use numpy.ascontiguousarray"
            raise UsageError(f"{name} is not contiguous. {remedy}")
        if writable and not x.flags.writeable:
            raise UsageError(f"{name} is read-only")
        return ArrayView(x.ctypes.data, x.shape, dtype)

    @staticmethod
    def empty(like: Any, dtype: DType) -> Any:
        """A new array, uninitialised, of the shape of `like`."""
        return np.empty(like.shape, numpy_dtype(dtype))


class TorchTensors:
    """Torch tensors, on the CPU or on a device with CUDA."""

    @staticmethod
    def prepare(x: Any) -> Any:
        return x

    @staticmethod
    def export(x: Any, like: Any) -> Any:
        return x

    @staticmethod
    def written(x: Any, out: Any) -> None:
        pass

    @staticmethod
    def device(x: Any) -> Any:
        return None if x.device.type == "cpu" else x.device

    @staticmethod
    def dtype(x: Any) -> DType | None:
        """The dtype of a tensor, or None if it does not merge."""
        return parse_dtype(str(x.dtype))

    @staticmethod
    def pairs(x: Any) -> Any:
        import torch

        return torch.view_as_real(x.resolve_conj().contiguous())

    @staticmethod
    def equal(x: Any, y: Any) -> bool:
        """Whether two tensors of any dtype hold the same bytes."""
        import torch

        if x.dtype != y.dtype or x.shape != y.shape:
            return False
        x, y = (t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (x, y))
        return bool(torch.equal(x, y))

    @staticmethod
    def copy(x: Any) -> Any:
        return x.detach().clone()

    @staticmethod
    def view(x: Any, name: str, writable: bool = False) -> ArrayView:
        import torch

        if not isinstance(x, torch.Tensor):
            raise UsageError(f"{name} must be a torch tensor like the first, got {type(x).__name__}")
        dtype = TorchTensors.dtype(x)
        if dtype is None:
            raise UsageError(f"{name} has dtype {x.dtype}; {MERGED_DTYPES}")
        if x.device.type not in ("cpu", "cuda"):
            raise UsageError(f"{name} is on {x.device}; only tensors on the CPU or on CUDA devices can be summed")
        if not x.is_contiguous():
            remedy = "Give a contiguous tensor" if writable else "Use .contiguous()"
            raise UsageError(f"{name} is not contiguous. {remedy}")
        if x.is_neg():  # the sign is in the view, not in the memory
            raise UsageError(f"{name} is a negated view. {'Give another tensor' if writable else 'Use .resolve_neg()'}")
        if x.requires_grad and torch.is_grad_enabled():
            raise UsageError(
                f"{name} requires grad, and gets no gradient here. Use .detach() or torch.no_grad(); for gradients of "
                "weighted sums, fastinterp.integrations.torch_ops.weighted_sum"
            )
        try:
            address, numel = x.data_ptr(), x.numel()
        except RuntimeError:  # inside of torch.func.vmap
            address, numel = 0, 1
        if not address and numel:  # its storage was let go, as FSDP does, or it stands for a tensor that is traced
            raise UsageError(f"{name} has no memory of its own that holds its elements. Give a dense tensor that has")
        return ArrayView(address, tuple(x.shape), dtype)

    @staticmethod
    def empty(like: Any, dtype: DType) -> Any:
        if hasattr(like, "new_empty"):  # on the same device
            return like.new_empty(like.shape, dtype=torch_dtype(dtype))
        import torch

        return torch.empty(like.shape, dtype=torch_dtype(dtype), device="cpu")


class DLPackArrays(TorchTensors):
    """Arrays of any library with `__dlpack__`, exchanged as torch tensors.

    An exchange orders streams: what gives an array before the current stream of what takes it. So the library has done
    what it had put in before torch's current stream goes on; and comes after that stream when it gets the result.
    """

    @staticmethod
    def prepare(x: Any) -> Any:
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
    def export(x: Any, like: Any) -> Any:
        """Raises: UsageError, if the library of `like` does not take arrays by DLPack."""
        library = _namespace(like)
        if not hasattr(library, "from_dlpack"):
            raise UsageError(f"{library.__name__} has no from_dlpack. Give `out`, or torch tensors")
        return library.from_dlpack(x)

    @staticmethod
    def written(x: Any, out: Any) -> None:
        """Raises: BackendError, if the library takes no arrays, and what was put in fails, which is waited for then."""
        if x is out or x.device.type == "cpu":
            return
        library = _namespace(out)
        if hasattr(library, "from_dlpack"):
            library.from_dlpack(x)
        else:
            wait(current_queue(x.device).record())


def _namespace(x: Any) -> Any:
    """The module with the functions of an array's library."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    return sys.modules[type(x).__module__.partition(".")[0]]


Library = type[NumpyArrays] | type[TorchTensors]


def library_of(x: Any) -> Library:
    """The library that `x` belongs to. Anything that is no array is refused later, by `view`."""
    if hasattr(x, "data_ptr"):
        return TorchTensors
    if hasattr(x, "__dlpack__") and not hasattr(x, "__array_interface__"):
        return DLPackArrays
    return NumpyArrays
