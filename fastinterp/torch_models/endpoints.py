"""The end points of a path that a module walks: checkpoints and state dicts, as the pump reads them."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from fastinterp.backends.torch_device import current_queue, device_of, memory, pinned
from fastinterp.errors import BackendError, ShapeError, UsageError
from fastinterp.execute.device.resident import ResidentMachine
from fastinterp.execute.device.streamed import StreamedMachine
from fastinterp.execute.rounds import Machine
from fastinterp.execute.sources import Sources
from fastinterp.execute.tensor_io import Step
from fastinterp.ops.dtypes import DType, parse_dtype
from fastinterp.plan.inputs import Operand
from fastinterp.plan.models import Model, open_model
from fastinterp.torch_models.module_tensors import Mismatches, Weight, address_of, is_extra_state, matches
from fastinterp.torch_models.path_endpoints import warn_unlike

End = str | os.PathLike[str] | Mapping[str, Any]
_ALIGN = 64  # bytes
_LEFT = 1 << 30  # bytes of a device that are left to what the module computes
_FROM_FILES = 64 << 10, 128 << 10  # bytes per read and write: what is read is still in the cache when it is combined
_FROM_MEMORY = 1 << 20, 1 << 20  # nothing is copied, and processors read ahead better in long runs


@dataclass(frozen=True)
class _Opened:
    """An end point. tensors: their dtypes and shapes by name; checkpoint or state dict: one of them is None."""

    label: str  # what messages call it; two may have the same
    tensors: Mapping[str, tuple[DType, tuple[int, ...]]]
    checkpoint: Model | None = None
    state: Mapping[str, Any] | None = None


class Memory:
    """One piece of memory that holds a copy of several tensors. Its bytes are not set."""

    def __init__(self, sizes: Mapping[Any, int], kind: str = "memory", block: Any = None):
        """block  u8[room(sizes)], of memory that kernels reach if `kind` is "device"; None: new, the host's"""
        self._at: dict[Any, tuple[int, int]] = {}
        end = 0
        for key, nbytes in sizes.items():
            self._at[key] = end, nbytes
            end += -(-nbytes // _ALIGN) * _ALIGN
        self._kind, self._bytes = kind, _pages(end) if block is None else block

    @staticmethod
    def room(sizes: Mapping[Any, int]) -> int:
        """Bytes for all of them."""
        return max(1, sum(-(-nbytes // _ALIGN) * _ALIGN for nbytes in sizes.values()))

    def handle(self, key: Any) -> tuple[str, int, int]:
        """Of one tensor, as the machines take it."""
        start, nbytes = self._at[key]
        return self._kind, int(self._bytes.data_ptr()) + start, nbytes


def _pages(nbytes: int) -> Any:
    import torch

    pages = mmap.mmap(-1, max(1, nbytes))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)  # a page fault for 2 MB, not for every 4 KB
    return torch.frombuffer(pages, dtype=torch.uint8)


class Ends:
    """The end points, open until `stack` closes, or in memory.

    ends      label -> checkpoint or state dict
    weights   those of the module that are walked
    layers    the pattern that chose them, or None
    resident  read checkpoints into memory now: that of the module's device, if there is room
    where     the torch.device of the module, None for the CPU
    Raises: CheckpointError; ShapeError, with all that does not fit; UsageError; BackendError.
    """

    def __init__(
        self, ends: Mapping[str, End], weights: Sequence[Weight], layers: Any, resident: bool, threads: int, isa: str,
        stack: ExitStack, where: Any = None,
    ):  # fmt: skip
        self._isa, self._threads, self.where = isa, threads, where
        opened = [_opened(label, end) for label, end in ends.items()]
        self._check(opened, weights, layers)
        checkpoints = [end.checkpoint for end in opened if end.checkpoint is not None]
        warn_unlike(checkpoints, stacklevel=3)
        reads = [
            end.checkpoint.tensors[name]
            for end in opened if end.checkpoint is not None
            for w in weights for name in w.names if name in end.tensors
        ]  # fmt: skip
        self._files = Sources([c.checkpoint for c in checkpoints if c.checkpoint is not None], reads, stack)
        self.handles: list[Any] = list(self._files.fds)
        self._kept: list[Any] = []  # memory that handles point to
        self._at: list[tuple[Any, int]] = []  # tensors of others, and where they were
        self._lying: dict[int, Any] = {}  # the same by the number of their source
        found = [
            {name: self._operand(end, name, weights) for w in weights for name in w.names if name in end.tensors}
            for end in opened
        ]
        self._check_tied(found, weights)
        # Of each end, the operand of each weight.
        self.operands = [[own[next(n for n in w.names if n in own)] for w in weights] for own in found]
        if resident and (where is not None or self._files.fds) and self._read(weights):
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

    def _operand(self, end: _Opened, name: str, weights: Sequence[Weight]) -> Operand:
        if end.checkpoint is not None:
            return self._files.operand(end.checkpoint.tensors[name])
        assert end.state is not None
        tensor = end.state[name].detach()
        if tensor.device.type != "cpu" and tensor.device != self.where:
            where = self.where or "cpu"
            raise BackendError(
                f"{name} of {end.label} is on {tensor.device}, the module on {where}. Move it: .to({str(where)!r})"
            )
        size = tensor.numel() * tensor.element_size()
        start = address_of(tensor)
        if size and not start:
            raise UsageError(f"{name} of {end.label} has no memory of its own ({tensor.layout}): make it dense")
        ours = any(start < w.address + w.nbytes and w.address < start + size for w in weights)
        if ours or not tensor.is_contiguous() or tensor.is_neg():
            tensor = tensor.resolve_neg().contiguous()
            tensor = tensor.clone() if ours else tensor  # the module's own memory is what will be written
        return self.add(tensor, end.tensors[name][0])

    def add(self, tensor: Any, dtype: DType) -> Operand:
        """A tensor in memory, contiguous, as an operand."""
        self._kept.append(tensor)
        self._at.append((tensor, address_of(tensor)))
        self._lying[len(self.handles)] = tensor
        kind = "memory" if tensor.device.type == "cpu" else "device"
        self.handles.append((kind, tensor.data_ptr(), tensor.numel() * tensor.element_size()))
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
        self._files.refuse_changed("it is no longer what Live opened: it was changed or removed. Make a new Live")
        if any(address_of(tensor) != at for tensor, at in self._at):
            raise UsageError("the tensors of a state dict were given other memory. Give the end points to another Live")

    @property
    def all_on_device(self) -> bool:
        """Whether kernels reach all of them where they are."""
        return self.where is not None and all(self._reached(o) for own in self.operands for o in own)

    def machine(self, sinks: list[Any]) -> Machine | StreamedMachine:
        """What runs steps from the end points into `sinks`."""
        if self.where is None:
            return self._pumped(sinks)
        return StreamedMachine(current_queue(self.where), self.handles, sinks, self._pumped)

    def resident(self, sinks: list[Any]) -> ResidentMachine:
        """The same, from what kernels reach."""
        return ResidentMachine(device_of(self.where), current_queue(self.where), self.handles, sinks)

    def _pumped(self, sinks: list[Any]) -> Machine:
        """What the CPU does, from what it reaches."""
        read, write = _FROM_FILES if self._files.fds else _FROM_MEMORY
        sources = [("memory", 0, 0) if _is_device(handle) else handle for handle in self.handles]
        settings = {
            "isa": self._isa, "sources": sources, "sinks": sinks, "threads": self._threads, "write_bytes": write,
            "read_bytes": read, "stochastic": False, "fp8_saturate": True, "prefetch": False, "stats_every": 0,
        }  # fmt: skip
        return Machine(settings, self._explained, 0, None, 1 << 60)  # scratch for memory is never touched

    def _reached(self, operand: Operand) -> bool:
        return _is_device(self.handles[operand[0]])

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
                        if self._reached(own[first]) or self._reached(own[other]):
                            self._compare(first, other, own)
                            continue
                        steps.append(_same(f"{first}\0{other}", [own[first], own[other]], len(sinks), nbytes))
                        sinks.append(nbytes)
        if steps:
            scratch = Memory(dict(enumerate(sinks)))
            self._pumped([scratch.handle(i) for i in range(len(sinks))]).run(steps)

    def _compare(self, first: str, other: str, own: Mapping[str, Operand]) -> None:
        """The same for two tensors of a state dict of which one is on a device."""
        import torch

        tensors = [self._lying[own[name][0]].reshape(-1).view(torch.uint8) for name in (first, other)]
        if not torch.equal(*(tensors if all(x.device == self.where for x in tensors) else (x.cpu() for x in tensors))):
            raise self._explained(("differs", 0, 1), [Step(f"{first}\0{other}", {}, 0)])

    def _read(self, weights: Sequence[Weight]) -> bool:
        """Read what is in files into memory, and what the module's device does not reach into its memory.

        Returns whether there was room.
        """
        files = len(self._files.fds)
        moved = [
            (k, i) for k, own in enumerate(self.operands) for i, o in enumerate(own)
            if (o[0] < files if self.where is None else not self._reached(o))
        ]  # fmt: skip
        size = {(k, i): weights[i].tensor.numel() * _width(self.operands[k][i]) for k, i in moved}
        held = Memory(size) if self.where is None else self.placed(size)
        if held is None:
            return False
        sinks = [held.handle(key) for key in moved]
        copy(self, [self.operands[k][i] for k, i in moved], sinks, [size[key] for key in moved])
        self.refuse_changed()
        self._kept.append(held)
        for (k, i), handle in zip(moved, sinks, strict=True):
            self.operands[k][i] = len(self.handles), 0, self.operands[k][i][2]
            self.handles.append(handle)
        return True

    def placed(self, size: Mapping[Any, int]) -> Memory | None:
        """Memory of the module's device, else of the host where kernels reach it; None, if there is neither."""
        room = Memory.room(size)
        block = memory(self.where, room, _LEFT)
        if block is None:
            block = pinned(room)
            how = "not at all: files are read at every `set`" if block is None else "in pinned memory of the host"
            warnings.warn(
                f"{self.where} has no room for {room} bytes of end points and of the module's own weights, so they are "
                f"held {how}. With fewer tensors (`layers`) or end points, `set` is faster",
                stacklevel=5,
            )
        return None if block is None else Memory(size, "device", block)


def copy(ends: Ends, sources: Sequence[Operand], sinks: list[Any], sizes: Sequence[int]) -> None:
    """Copy the bytes of operands into sinks, one into each."""
    places = [(o, i, n) for i, (o, n) in enumerate(zip(sources, sizes, strict=True)) if n]
    if ends.where is None:
        ends.machine(sinks).run([_same("", [o], i, n) for o, i, n in places])
    elif places:  # by kernels
        ends.machine(sinks).run([
            Step("", {"kind": "combine", "inputs": [o], "rows": [(0, 1.0, [])], "numel": n // _width(o), "sinks": [i],
                      "offsets": [0], "out_dtype": o[2]}, 2 * n)
            for o, i, n in places
        ])  # fmt: skip


def _is_device(handle: Any) -> bool:
    return isinstance(handle, tuple) and handle[0] == "device"


def _same(name: str, operands: Sequence[Operand], sink: int, nbytes: int) -> Step:
    native = {"kind": "same", "inputs": list(operands), "numel": nbytes, "sinks": [sink], "offsets": [0]}
    return Step(name, native, nbytes * 2)


def _width(operand: Operand) -> int:
    return (8, 4, 2, 2, 1, 1)[operand[2]]


def _opened(label: str, end: End) -> _Opened:
    if not isinstance(end, Mapping):
        if not isinstance(end, (str, os.PathLike)):
            raise UsageError(f"{label} must be a checkpoint or a state dict, got {type(end).__name__}")
        checkpoint = open_model(os.fspath(end))
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
