"""The accelerator on which a torch tensor lies, and the queue that torch's current stream is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastinterp.backends.registry import DeviceSpec, find_devices
from fastinterp.errors import UsageError

if TYPE_CHECKING:
    from fastinterp.backends.device import Device, Queue

_opened: dict[int, Device] = {}


def device_of(where: Any) -> Device:
    """The device that a torch.device on CUDA names, with the kernels that `--device cuda` uses.

    Raises: BackendError, if neither can be used.
    """
    number = _number(where)
    if number not in _opened:
        _opened[number] = _open(number)
    return _opened[number]


def current_queue(where: Any) -> Queue:
    """What torch's current stream on that device is: work that is put in comes after all that torch has put in."""
    return device_of(where).queue(_stream(_number(where)))


def capturing(where: Any) -> bool:
    """Whether work on that device goes into a CUDA graph now, so that nothing can be waited for."""
    return where is not None and _captures()


def free_bytes(where: Any) -> int:
    """Memory of that device that can still be had, what torch keeps for later included."""
    return device_of(where).free_bytes() + _spare(_number(where))


def memory(where: Any, nbytes: int, left: int = 0) -> Any:
    """u8[nbytes] on that device, or None if it has no room for it, or less than `left` bytes besides."""
    if free_bytes(where) < nbytes + left:
        return None
    import torch

    try:
        return _bytes(nbytes, where)
    except torch.OutOfMemoryError:  # there is room, but in parts
        return None


def pinned(nbytes: int) -> Any:
    """u8[nbytes] of the host, which kernels reach by its address, and which copies do not go round. None: no room."""
    try:
        return _bytes(nbytes, None)
    except RuntimeError:
        return None


def one_place(tensors: list[tuple[str, Any]]) -> Any:
    """The torch.device of all tensors, None for the CPU; tensors are given with what messages call them.

    Raises: UsageError, which names two of them, if they are not on one device.
    """
    first, place = tensors[0] if tensors else ("", None)
    for name, where in tensors[1:]:
        if where != place:
            raise UsageError(
                f"{first} is on {place or 'cpu'}, but {name} on {where or 'cpu'}. All must be on one device. "
                f"Use .to({str(place or 'cpu')!r})"
            )
    return place


def _number(where: Any) -> int:
    return _current() if where.index is None else int(where.index)


def _open(number: int) -> Device:
    # AMD's GPUs are "cuda" in torch, too: those are Triton's, since CUDA's kernels find none.
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
