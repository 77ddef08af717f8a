"""The end points of a path: state dicts in memory, or checkpoints, read from their files again for every point."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from fastinterp.checkpoint.open import changed_since
from fastinterp.errors import CheckpointError, StorageError, UsageError
from fastinterp.execute.sources import Sources, storage
from fastinterp.in_memory.allocate import torch_dtype
from fastinterp.in_memory.merge import StoredTensor
from fastinterp.messages import plain
from fastinterp.ops.dtypes import DType, parse_dtype
from fastinterp.plan.compatibility import unlike
from fastinterp.plan.inputs import TensorInput
from fastinterp.plan.models import Model, open_model
from fastinterp.torch_models.module_tensors import is_extra_state

_CHUNK = 8 << 20  # bytes that are compared at a time

Facts = Mapping[str, tuple[DType, tuple[int, ...]]]


class End:
    """One end point, never written to.

    name   what it is called in reports
    state  the state dict, or None for a checkpoint, of which only headers are read
    """

    def __init__(self, given: str | os.PathLike[str] | Mapping[str, Any], what: str):
        self.checkpoint: Model | None = None
        self.state: Mapping[str, Any] | None = None
        if isinstance(given, Mapping):
            self.name, self.state = what, given
        elif isinstance(given, (str, os.PathLike)):
            self.name = os.fspath(given)
            self.checkpoint = open_model(self.name)
            _check_torch(self.checkpoint)
        else:
            raise UsageError(f"`{what}` must be a checkpoint's path or a state dict, got {type(given).__name__}")

    def facts(self) -> Facts:
        """Dtype and shape of each tensor, extra state left out. Raises: UsageError, if one is no torch tensor."""
        if self.checkpoint is not None:
            return {name: (entry.dtype, entry.shape) for name, entry in self.checkpoint.tensors.items()}
        found = {}
        for name, x in (self.state or {}).items():
            if is_extra_state(name):
                continue
            if not hasattr(x, "data_ptr"):
                raise UsageError(f"{name} must be a torch tensor, to be put into a module, got {type(x).__name__}")
            dtype = parse_dtype(str(x.dtype)) or DType(str(x.dtype).removeprefix("torch."), 8)
            found[name] = dtype, tuple(x.shape)
        return found

    def refuse_changed(self) -> None:
        """Raises: StorageError, if a file is no longer what it was when it was opened."""
        changed = changed_since(self.checkpoint.checkpoint) if self.checkpoint and self.checkpoint.checkpoint else []
        if changed:
            raise StorageError(f"{changed[0]} was changed while the path was walked. Evaluate it again")


def warn_unlike(checkpoints: Sequence[Model], stacklevel: int) -> None:
    """Warn of what the user should know of the models, as a merge of them would. The first is what others differ from.

    stacklevel  1: the caller's line is named
    """
    for warning in unlike(checkpoints) if checkpoints else ():
        warnings.warn(plain(warning), stacklevel=stacklevel + 1)


@contextmanager
def opened(ends: Sequence[End]) -> Iterator[tuple[list[Mapping[str, Any]], Sources]]:
    """The tensors of each end, and the open files that those of checkpoints are read from.

    No file is mapped: one that shrinks under a mapping kills the process.
    Raises: StorageError, CheckpointError.
    """
    checkpoints = [end.checkpoint for end in ends if end.checkpoint is not None]
    reads = [entry for checkpoint in checkpoints for entry in checkpoint.tensors.values()]
    with ExitStack() as stack:
        files = Sources([c.checkpoint for c in checkpoints if c.checkpoint is not None], reads, stack)
        yield [end.state or _stored(end.checkpoint, files) for end in ends], files


def same(x: Any, y: Any, files: Sources) -> bool:
    """Whether two tensors of one end hold the same bytes."""
    if (x.dtype, tuple(x.shape)) != (y.dtype, tuple(y.shape)):
        return False
    if isinstance(x, StoredTensor) and isinstance(y, StoredTensor):
        size = x.dtype.nbytes(math.prod(x.shape)) or 0
        return all(
            _read(files, x.source, x.start + at, min(_CHUNK, size - at))
            == _read(files, y.source, y.start + at, min(_CHUNK, size - at))
            for at in range(0, size, _CHUNK)
        )
    import torch

    if x.data_ptr() == y.data_ptr() and x.stride() == y.stride():
        return True
    return bool(torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (x, y))))


def _stored(checkpoint: Model | None, files: Sources) -> dict[str, Any]:
    """Floating tensors stay where they are; the others, which are copied, are few, and are read."""
    found: dict[str, Any] = {}
    for name, entry in checkpoint.tensors.items() if checkpoint else ():
        source, start, _ = files.operand(entry)
        if entry.dtype.merges:
            found[name] = StoredTensor(source, start, entry.shape, entry.dtype)
        else:
            found[name] = _whole(files, source, start, entry)
    return found


def _whole(files: Sources, source: int, start: int, entry: TensorInput) -> Any:
    import torch

    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
    data = _read(files, source, start, entry.nbytes)
    return torch.frombuffer(data, dtype=torch_dtype(entry.dtype)).view(entry.shape)


def _read(files: Sources, source: int, start: int, nbytes: int) -> bytearray:
    """Raises: StorageError; CheckpointError, if the file ends before."""
    data = bytearray(nbytes)
    done = 0
    with storage(files.paths[source]):
        while done < nbytes:
            count = os.preadv(files.fds[source], [memoryview(data)[done:]], start + done)
            if not count:
                raise files.explained(("read", source, 0, start, nbytes, done))
            done += count
    return data


def _check_torch(checkpoint: Model) -> None:
    """Raises: UsageError, without torch; CheckpointError, if torch has not one of the dtypes."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UsageError(
            "a path between checkpoints needs torch: pip install torch. Without it, give state dicts of numpy arrays"
        ) from None
    for name, entry in checkpoint.tensors.items():
        try:
            torch_dtype(entry.dtype)
        except UsageError:
            where = str(entry.files[0])
            raise CheckpointError(
                f"{name} is of dtype {entry.dtype}, which torch has not", file=where, tensor=name
            ) from None
