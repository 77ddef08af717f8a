"""The device of a torch tensor, torch's current stream as a queue, and memory that torch allocates."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fastinterp.backends.registry import DeviceSpec, find_devices
from fastinterp.errors import UsageError

if TYPE_CHECKING:
    from fastinterp.backends.device import Device, Queue

_opened: dict[int, Device] = {}


def is_followed(tensors: Iterable[Any]) -> bool:
    """Whether autograd follows any of these arrays, of any library."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in tensors)


def device_of(where: Any) -> Device:
    """The Device of a torch.device, with the backend that `--device cuda` chooses.

    Raises: BackendError, if none can be used.
    """
    number = _number(where)
    if number not in _opened:
        _opened[number] = _open(number)
    return _opened[number]


def current_queue(where: Any) -> Queue:
    """Torch's current stream on that device as a queue: its work comes after all that torch has enqueued."""
    return device_of(where).queue(_stream(_number(where)))


def capturing(where: Any) -> bool:
    """Whether torch is capturing a CUDA graph on that device, so that nothing can be waited for."""
    return where is not None and _captures()


def free_bytes(where: Any) -> int:
    """Free bytes of that device, those that torch has reserved but not allocated included."""
    return device_of(where).free_bytes() + _spare(_number(where))


def memory(where: Any, nbytes: int, left: int = 0) -> Any:
    """u8[nbytes] on that device; None, if it does not fit with `left` bytes to spare."""
    if free_bytes(where) < nbytes + left:
        return None
    import torch

    try:
        return _bytes(nbytes, where)
    except torch.OutOfMemoryError:  # there is enough memory, but fragmented
        return None


def pinned(nbytes: int) -> Any:
    """u8[nbytes] of pinned host memory, which kernels access by address. None, if it cannot be allocated."""
    try:
        return _bytes(nbytes, None)
    except RuntimeError:
        return None


def common_device(tensors: list[tuple[str, Any]]) -> Any:
    """The torch.device that all tensors are on, None for the CPU. tensors: (name in messages, torch.device or None).

    Raises: UsageError, which names two of them, if they are on different devices.
    """
    first, device = tensors[0] if tensors else ("", None)
    for name, where in tensors[1:]:
        if where != device:
            raise UsageError(
                f"{first} is on {device or 'cpu'}, but {name} on {where or 'cpu'}. All must be on one device. "
                f"Use .to({str(device or 'cpu')!r})"
            )
    return device


def _number(where: Any) -> int:
    return _current() if where.index is None else int(where.index)


def _open(number: int) -> Device:
    # AMD's GPUs are "cuda" in torch, too: those get the Triton backend, since fastinterp._cuda finds no device.
    return find_devices(DeviceSpec("cuda", (number,)))[0]


def _bytes(nbytes: int, where: Any) -> Any:
    import torch

    if where is None:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return torch.empty(nbytes, dtype=torch.uint8, device=where)


def _current() -> int:
    import torch

    return int(torch.cuda.current_device())


def _stream(number: int) -> int:
    import torch

    return int(torch.cuda.current_stream(number).cuda_stream)


def _captures() -> bool:
    import torch

    return bool(torch.cuda.is_current_stream_capturing())


def _spare(number: int) -> int:
    import torch

    return int(torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number))
