"""The end points of a path that a module walks: checkpoints and state dicts, as the pump reads them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from fastinterp.compute.dtypes import DType, parse_dtype
from fastinterp.engine.place import Step
from fastinterp.engine.rounds import Machine
from fastinterp.engine.sources import Operand, Sources
from fastinterp.errors import BackendError, ShapeError, UsageError
from fastinterp.files.checkpoint import Checkpoint, open_checkpoint
from fastinterp.steer.module import Mismatches, Weight, is_extra_state, matches, place_of
from fastinterp.steer.pristine import warn_unlike

End = str | os.PathLike[str] | Mapping[str, Any]
_ALIGN = 64  # bytes
_FROM_FILES = 64 << 10, 128 << 10  # bytes per read and write: what is read is still in the cache when it is combined
_FROM_MEMORY = 1 << 20, 1 << 20  # nothing is copied, and processors read ahead better in long runs


@dataclass(frozen=True)
class _Opened:
    """An end point. tensors: their dtypes and shapes by name; checkpoint or state dict: one of them is None."""

    label: str  # what messages call it; two may have the same
    tensors: Mapping[str, tuple[DType, tuple[int, ...]]]
    checkpoint: Checkpoint | None = None
    state: Mapping[str, Any] | None = None


class Memory:
    """One piece of memory that holds a copy of several tensors. Its bytes are not set."""

    def __init__(self, sizes: Mapping[Any, int]):
        import torch

        self._at: dict[Any, tuple[int, int]] = {}
        end = 0
        for key, nbytes in sizes.items():
            self._at[key] = end, nbytes
            end += -(-nbytes // _ALIGN) * _ALIGN
        pages = mmap.mmap(-1, max(1, end))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                pages.madvise(mmap.MADV_HUGEPAGE)  # a page fault for 2 MB, not for every 4 KB
        self._bytes = torch.frombuffer(pages, dtype=torch.uint8)

    def handle(self, key: Any) -> tuple[str, int, int]:
        """Of one tensor, as the pump takes it."""
        start, nbytes = self._at[key]
        return "memory", int(self._bytes.data_ptr()) + start, nbytes


class Ends:
    """The end points, open until `stack` closes, or in memory.

    ends      label -> checkpoint or state dict
    weights   those of the module that are walked
    layers    the pattern that chose them, or None
    resident  read checkpoints into memory now
    Raises: CheckpointError; ShapeError, with all that does not fit; UsageError.
    """

    def __init__(
        self, ends: Mapping[str, End], weights: Sequence[Weight], layers: Any, resident: bool, threads: int, isa: str,
        stack: ExitStack,
    ):  # fmt: skip
        self._isa, self._threads = isa, threads
        opened = [_opened(label, end) for label, end in ends.items()]
        self._check(opened, weights, layers)
        checkpoints = [end.checkpoint for end in opened if end.checkpoint is not None]
        warn_unlike(checkpoints, stacklevel=3)
        number = {id(c): i for i, c in enumerate(checkpoints)}
        reads = [
            (number[id(end.checkpoint)], end.checkpoint.tensors[name])
            for end in opened if end.checkpoint is not None
            for w in weights for name in w.names if name in end.tensors
        ]  # fmt: skip
        self._files = Sources(checkpoints, reads, stack)
        self.handles: list[Any] = list(self._files.fds)
        self._kept: list[Any] = []  # memory that handles point to
        self._at: list[tuple[Any, tuple[object, ...]]] = []  # tensors of others, and where they were
        found = [
            {
                name: self._operand(end, name, number, weights)
                for w in weights
                for name in w.names
                if name in end.tensors
            }
            for end in opened
        ]
        self._check_tied(found, weights)
        # Of each end, the operand of each weight.
        self.operands = [[own[next(n for n in w.names if n in own)] for w in weights] for own in found]
        if resident and self._files.fds:
            self._read(weights)
            self._files = Sources([], [], stack)

    def _check(self, opened: Sequence[_Opened], weights: Sequence[Weight], layers: Any) -> None:
        wrong = Mismatches()
        ours = {name for w in weights for name in w.names}
        for end in opened:
            own = {n: t for n, t in end.tensors.items() if t[0].merges or n in ours}
            if layers is not None:
                own = {n: t for n, t in own.items() if n in ours or matches([n], layers)}
            wrong.check(weights, end.label, own)
        wrong.check_contiguous(weights)
        wrong.refuse()

    def _operand(self, end: _Opened, name: str, number: Mapping[int, int], weights: Sequence[Weight]) -> Operand:
        if end.checkpoint is not None:
            return self._files.operand(number[id(end.checkpoint)], end.checkpoint.tensors[name])
        assert end.state is not None
        tensor = end.state[name].detach()
        if tensor.device.type != "cpu":
            raise BackendError(f"{name} of {end.label} is on {tensor.device}. Move it: .to('cpu')")
        size = tensor.numel() * tensor.element_size()
        start = place_of(tensor)[1]
        if size and not start:
            raise UsageError(f"{name} of {end.label} has no memory of its own ({tensor.layout}): make it dense")
        assert isinstance(start, int)
        ours = any(start < w.address + w.nbytes and w.address < start + size for w in weights)
        if ours or not tensor.is_contiguous() or tensor.is_neg():
            tensor = tensor.resolve_neg().contiguous()
            tensor = tensor.clone() if ours else tensor  # the module's own memory is what will be written
        return self.add(tensor, end.tensors[name][0])

    def add(self, tensor: Any, dtype: DType) -> Operand:
        """A tensor in memory, contiguous, as an operand."""
        self._kept.append(tensor)
        self._at.append((tensor, place_of(tensor)))
        self.handles.append(("memory", tensor.data_ptr(), tensor.numel() * tensor.element_size()))
        return len(self.handles) - 1, 0, dtype.code or 0

    def add_memory(self, memory: Memory, weights: Sequence[Weight]) -> list[Operand]:
        """Copies of the module's own tensors, as operands."""
        self._kept.append(memory)
        first = len(self.handles)
        self.handles += [memory.handle(w.name) for w in weights]
        return [(first + i, 0, (w.dtype.code if w.dtype else None) or 0) for i, w in enumerate(weights)]

    def refuse_changed(self) -> None:
        """Raises: CheckpointError, if a file is not what it was when it was opened; UsageError, if a state dict's
        tensors lie elsewhere or nowhere by now.
        """
        self._files.refuse_changed()
        if any(place_of(tensor) != at for tensor, at in self._at):
            raise UsageError("the tensors of a state dict were given other memory. Give the end points to another Live")

    def machine(self, sinks: list[Any]) -> Machine:
        """What runs steps from the end points into `sinks`."""
        read, write = _FROM_FILES if self._files.fds else _FROM_MEMORY
        settings = {
            "isa": self._isa, "sources": self.handles, "sinks": sinks, "threads": self._threads, "write_bytes": write,
            "read_bytes": read, "stochastic": False, "fp8_saturate": True, "prefetch": False, "stats_every": 0,
        }  # fmt: skip
        return Machine(settings, self._explained, 0, None, 1 << 60)  # scratch for memory is never touched

    def _explained(self, error: tuple[Any, ...], steps: Sequence[Step]) -> Exception:
        if error[0] == "differs":
            one, other = steps[error[1]].name.split("\0")
            return ShapeError(
                f"{one} and {other} are one tensor in the module, but differ in an end point. "
                "Untie them: tie_word_embeddings=False in the module's configuration",
                tensor=other,
            )
        return self._files.explained(error)

    def _check_tied(self, found: Sequence[Mapping[str, Operand]], weights: Sequence[Weight]) -> None:
        """Tensors that are one in the module must be one in every end point."""
        steps: list[Step] = []
        sinks: list[int] = []
        for own in found:
            for w in weights:
                first, *others = [n for n in w.names if n in own] or [w.name]
                for other in others:
                    if own[first] != own[other]:
                        nbytes = w.tensor.numel() * _width(own[first])
                        if own[first][2] != own[other][2]:
                            raise self._explained(("differs", 0, 1), [Step(f"{first}\0{other}", {}, 0)])
                        steps.append(_same(f"{first}\0{other}", [own[first], own[other]], len(sinks), nbytes))
                        sinks.append(nbytes)
        if steps:
            scratch = Memory(dict(enumerate(sinks)))
            self.machine([scratch.handle(i) for i in range(len(sinks))]).run(steps)

    def _read(self, weights: Sequence[Weight]) -> None:
        """Read what is in files into memory."""
        moved = [
            (k, i) for k, own in enumerate(self.operands) for i, o in enumerate(own) if o[0] < len(self._files.fds)
        ]
        size = {(k, i): weights[i].tensor.numel() * _width(self.operands[k][i]) for k, i in moved}
        memory = Memory(size)
        sinks = [memory.handle(key) for key in moved]
        steps = [_same("", [self.operands[k][i]], sink, size[k, i]) for sink, (k, i) in enumerate(moved)]
        self.machine(sinks).run(steps)
        self.refuse_changed()
        self._kept.append(memory)
        for (k, i), handle in zip(moved, sinks, strict=True):
            self.operands[k][i] = len(self.handles), 0, self.operands[k][i][2]
            self.handles.append(handle)


def copy(ends: Ends, sources: Sequence[Operand], sinks: list[Any], sizes: Sequence[int]) -> None:
    """Copy the bytes of operands into sinks, one into each."""
    ends.machine(sinks).run([_same("", [o], i, n) for i, (o, n) in enumerate(zip(sources, sizes, strict=True))])


def _same(name: str, operands: Sequence[Operand], sink: int, nbytes: int) -> Step:
    native = {"kind": "same", "inputs": list(operands), "numel": nbytes, "sinks": [sink], "offsets": [0]}
    return Step(name, native, nbytes * 2)


def _width(operand: Operand) -> int:
    return (8, 4, 2, 2, 1, 1)[operand[2]]


def _opened(label: str, end: End) -> _Opened:
    if not isinstance(end, Mapping):
        if not isinstance(end, (str, os.PathLike)):
            raise UsageError(f"{label} must be a checkpoint or a state dict, got {type(end).__name__}")
        checkpoint = open_checkpoint(os.fspath(end))
        own = {name: (e.dtype, e.shape) for name, e in checkpoint.tensors.items()}
        return _Opened(checkpoint.name, own, checkpoint)
    import torch

    found = {}
    for name, tensor in end.items():
        if is_extra_state(name):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(f"{name} of {label} must be a torch tensor, got {type(tensor).__name__}")
        dtype = parse_dtype(str(tensor.dtype)) or DType(str(tensor.dtype).removeprefix("torch."), 8)
        found[name] = dtype, tuple(tensor.shape)
    return _Opened(label, found, None, end)
