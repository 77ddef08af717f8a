"""The tensors of end points as operands of the pump and of kernels: read from files each time, or held in memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from fastinterp.backends.cpu import Handle, PreparedSums, PumpOptions, SourceHandle, memory_address
from fastinterp.backends.torch_device import current_queue, device_of, memory, pinned
from fastinterp.errors import BackendError, UsageError
from fastinterp.execute.device.resident import ResidentExecutor
from fastinterp.execute.device.streamed import StreamedExecutor
from fastinterp.execute.jobs.tensor_io import TensorIO, TensorStep
from fastinterp.execute.rounds import PumpExecutor
from fastinterp.execute.sources import Sources
from fastinterp.in_memory.inputs import StoredTensor
from fastinterp.ops.combine import MAX_INPUTS
from fastinterp.ops.dtypes import CODE_BYTES, DType
from fastinterp.ops.operands import Operand, Stored
from fastinterp.ops.steps import CopyEqual
from fastinterp.torch_models.endpoints import Endpoint, Endpoints, copy_by_kernel
from fastinterp.torch_models.memory_block import MemoryBlock
from fastinterp.torch_models.module_tensors import Weight, address_of, addresses_of

_LEFT = 1 << 30  # bytes of a device that are left to what the module computes
_FROM_FILES = 64 << 10, 128 << 10  # bytes per read and write: what is read is still in the cache when it is combined
_FROM_MEMORY = 1 << 20, 1 << 20  # nothing is copied, and processors read ahead better in long runs


class EndpointOperands:
    """The tensors of end points that a module's weights are computed from.

    models    the end points, which fit the module
    weights   of the module that are set, floating ones
    resident  read checkpoints into memory now: that of the module's device, if there is room. Else their files stay
              open until `stack` closes
    device    the torch.device of the module, None for the CPU

    operands  [end point][weight]; sources are numbers of handles
    handles   files and memory that operands are in, as the pump's sources
    Raises: CheckpointError; StorageError; ShapeError, if tied tensors differ; UsageError; BackendError.
    """

    def __init__(
        self, models: Sequence[Endpoint], weights: Sequence[Weight], *, resident: bool, threads: int, isa: str,
        stack: ExitStack, device: Any = None,
    ):  # fmt: skip
        self._isa, self.threads, self.device = isa, threads, device
        endpoints = Endpoints(models, stack, {name for w in weights for name in w.names})
        self._files = endpoints.files
        self.handles: list[SourceHandle] = list(self._files.handles)
        self._held: list[Any] = []  # memory that handles point to
        self._tensors: list[Any] = []  # of the caller's state dicts
        self._addresses: list[int] = []  # where they were
        self.operands: list[list[Stored]] = []
        for model in models:
            tensors = endpoints.tensors(model)
            if model.checkpoint is None:
                for name, x in tensors.items():
                    self._check_reachable(x, f"{name} of {model.label}")
            endpoints.check_tied(model, tensors, weights)
            specs = model.specs()
            names = [next(name for name in w.names if name in tensors) for w in weights]
            found = [tensors[name] for name in names]
            if device is not None:  # whose kernels decode nothing
                found = [endpoints.whole(x) if isinstance(x, StoredTensor) and x.operand else x for x in found]
            self.operands.append(
                [self._operand(x, specs[name][0], weights) for x, name in zip(found, names, strict=True)]
            )
        if resident and (device is not None or self._files.handles) and self._read(weights):
            self._files = Sources([], [], stack)

    def _check_reachable(self, tensor: Any, label: str) -> None:
        if tensor.device.type != "cpu" and tensor.device != self.device:
            where = self.device or "cpu"
            raise BackendError(f"{label} is on {tensor.device}, the module on {where}. Move it: .to({str(where)!r})")
        if tensor.numel() and not address_of(tensor):
            raise UsageError(f"{label} has no memory of its own ({tensor.layout}): make it dense")

    def _operand(self, tensor: Any, dtype: DType, weights: Sequence[Weight]) -> Stored:
        if isinstance(tensor, StoredTensor):
            return tensor.operand or Stored(tensor.source, tensor.start, dtype.code or 0)
        tensor = tensor.detach()
        start, size = address_of(tensor), tensor.numel() * tensor.element_size()
        overlaps = any(start < w.address + w.nbytes and w.address < start + size for w in weights)
        if overlaps or not tensor.is_contiguous() or tensor.is_neg():
            tensor = tensor.resolve_neg().contiguous()
            tensor = tensor.clone() if overlaps else tensor  # the module's own memory is what will be written
        self._tensors.append(tensor)
        self._addresses.append(address_of(tensor))
        return self.add(tensor, dtype)

    def add(self, tensor: Any, dtype: DType) -> Stored:
        """A contiguous tensor in memory as an operand."""
        kind = "memory" if tensor.device.type == "cpu" else "device"
        self.handles.append((kind, tensor.data_ptr(), tensor.numel() * tensor.element_size()))
        return Stored(len(self.handles) - 1, 0, dtype.code or 0)

    def add_block(self, block: MemoryBlock, weights: Sequence[Weight]) -> list[Stored]:
        """Copies of the module's own weights, by their names in `block`, as operands."""
        self._held.append(block)
        first = len(self.handles)
        self.handles += [block.handle(w.name) for w in weights]
        return [Stored(first + i, 0, (w.dtype.code if w.dtype else None) or 0) for i, w in enumerate(weights)]

    def refuse_changed(self) -> None:
        """Raises: CheckpointError, if a file is not what it was when it was opened; UsageError, if a state dict's
        tensors are at other addresses, or have no memory by now.
        """
        self.refuse_changed_files()
        if addresses_of(self._tensors) != self._addresses:
            raise UsageError("the tensors of a state dict were given other memory. Give the end points to another Live")

    def refuse_changed_files(self) -> None:
        """The same for files alone: after they were read, when addresses are of no use any more."""
        self._files.refuse_changed("it is no longer what Live opened: it was changed or removed. Make a new Live")

    @property
    def all_on_device(self) -> bool:
        """Whether kernels of the module's device reach all operands where they are."""
        return self.device is not None and all(self._on_device(o) for model in self.operands for o in model)

    def prepared(self, places: Sequence[TensorIO], sinks: Sequence[Handle]) -> PreparedSums | None:
        """The sums of each tensor's operands, each into its first sink, of which only the row is to be told.

        None, if not all operands are plain elements in memory that the CPU reaches, or a sum has too many to be one.
        """
        if any(len(io.operands) > MAX_INPUTS for io in places):  # of which a row reads some
            return None
        sums = []
        for io in places if self.device is None else ():
            arrays = [array for o in io.operands if (array := self._array(o)) is not None]
            if len(arrays) < len(io.operands):
                return None
            sums.append((arrays, (memory_address(sinks[io.sinks[0]]), io.out_dtype), io.numel))
        return PreparedSums(sums, self._isa) if self.device is None else None

    def executor(self, sinks: Sequence[Handle]) -> PumpExecutor | StreamedExecutor:
        """The executor that runs steps from the end points into `sinks`."""
        if self.device is None:
            return self._pumped(sinks)
        return StreamedExecutor(current_queue(self.device), self.handles, sinks, self._pumped)

    def resident(self, sinks: Sequence[Handle]) -> ResidentExecutor:
        """The executor of a device, from the end points that its kernels reach."""
        return ResidentExecutor(device_of(self.device), current_queue(self.device), self.handles, sinks)

    def _pumped(self, sinks: Sequence[Handle]) -> PumpExecutor:
        """The executor of the CPU, from the end points that it reaches."""
        read, write = _FROM_FILES if self._files.handles else _FROM_MEMORY
        sources = [("memory", 0, 0) if _is_device(handle) else handle for handle in self.handles]
        options = PumpOptions(isa=self._isa, threads=self.threads, write_bytes=write, read_bytes=read)
        # Scratch for memory is never touched.
        return PumpExecutor(sources, sinks, options, self._explained, 0, None, 1 << 60)

    def _array(self, operand: Operand) -> tuple[int, int] | None:
        """Address and dtype code of an operand that is plain elements in memory; None of others."""
        if not isinstance(operand, Stored) or operand.decoder is not None or operand.low_rank is not None:
            return None
        handle = self.handles[operand.source]
        return (memory_address(handle) + operand.offset, operand.dtype) if isinstance(handle, tuple) else None

    def _on_device(self, operand: Stored) -> bool:
        return _is_device(self.handles[operand.source])

    def _explained(self, error: tuple[Any, ...], steps: Sequence[TensorStep]) -> Exception:
        return self._files.explained(error)

    def copy(self, operands: Sequence[Stored], sinks: Sequence[Handle], sizes: Sequence[int]) -> None:
        """Copy the bytes of operands into sinks, one into each. sizes: in bytes."""
        places = [(o, i, n) for i, (o, n) in enumerate(zip(operands, sizes, strict=True)) if n]
        if places:
            self.executor(sinks).run([self._copied(o, i, n) for o, i, n in places])

    def _copied(self, operand: Stored, sink: int, nbytes: int) -> TensorStep:
        plain = operand.decoder is None and operand.low_rank is None
        return (_copy if plain and self.device is None else copy_by_kernel)(operand, sink, nbytes)

    def _read(self, weights: Sequence[Weight]) -> bool:
        """Read what is in files into memory, and what the module's device does not reach into its memory.

        Returns whether there was room.
        """
        files = len(self._files.handles)
        moved = [
            (k, i) for k, model in enumerate(self.operands) for i, o in enumerate(model)
            if (o.source < files if self.device is None else not self._on_device(o))
        ]  # fmt: skip
        sizes = {(k, i): weights[i].tensor.numel() * _width(self.operands[k][i]) for k, i in moved}
        block = MemoryBlock(sizes) if self.device is None else self.device_block(sizes)
        if block is None:
            return False
        sinks = [block.handle(key) for key in moved]
        self.copy([self.operands[k][i] for k, i in moved], sinks, [sizes[key] for key in moved])
        self.refuse_changed()
        self._held.append(block)
        for (k, i), handle in zip(moved, sinks, strict=True):
            self.operands[k][i] = Stored(len(self.handles), 0, self.operands[k][i].dtype)
            self.handles.append(handle)
        return True

    def device_block(self, sizes: Mapping[Any, int]) -> MemoryBlock | None:
        """Memory of the module's device, else of the host where kernels reach it; None, if there is neither."""
        room = MemoryBlock.room(sizes)
        block = memory(self.device, room, _LEFT)
        if block is None:
            block = pinned(room)
            how = "not at all: files are read at every `set`" if block is None else "in pinned memory of the host"
            warnings.warn(
                f"{self.device} has no room for {room} bytes of end points and of the module's own weights, so they "
                f"are held {how}. With fewer tensors (`layers`) or end points, `set` is faster",
                stacklevel=5,
            )
        return None if block is None else MemoryBlock(sizes, block)


def _is_device(handle: SourceHandle) -> bool:
    return isinstance(handle, tuple) and handle[0] == "device"


def _copy(operand: Stored, sink: int, nbytes: int) -> TensorStep:
    """The pump's step that copies bytes."""
    return TensorStep("", CopyEqual(inputs=(operand,), numel=nbytes, sinks=(sink,), offsets=(0,)), nbytes * 2)


def _width(operand: Stored) -> int:
    return CODE_BYTES[operand.dtype]
