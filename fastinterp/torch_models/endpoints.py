"""The end points of a path: checkpoints on disk and state dicts in memory, which are read and never written to."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec.structs import replace as struct_replace

from fastinterp.backends.cpu import Handle, PumpOptions
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.checkpoint.open import changed_since, refuse_components
from fastinterp.errors import UsageError
from fastinterp.execute.damaged import refuse_damaged
from fastinterp.execute.jobs.tensor_io import TensorStep
from fastinterp.execute.rounds import PumpExecutor
from fastinterp.execute.sources import Sources, storage
from fastinterp.in_memory.allocate import torch_dtype
from fastinterp.in_memory.arrays import stored_dtype
from fastinterp.in_memory.inputs import ArrayHeader, StoredTensor
from fastinterp.messages import plain
from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import CODE_BYTES, DType, parse_dtype
from fastinterp.ops.operands import Stored
from fastinterp.ops.steps import Combine
from fastinterp.plan.compatibility import path_warnings
from fastinterp.plan.inputs import TensorInput
from fastinterp.plan.models import Model as StoredModel
from fastinterp.plan.models import open_model
from fastinterp.plan.tensor_sets import following, is_recomputed
from fastinterp.recipe.tensor_groups import HasShape
from fastinterp.torch_models.module_tensors import TensorSpec, Weight, equal_bytes, is_extra_state, tied_error

Model = Annotated[
    str | os.PathLike[str] | Mapping[str, Any],
    """A model of a path: a checkpoint's place (see `Checkpoint`), or a state dict.

    A state dict maps names to tensors, as `module.state_dict()` returns it: torch tensors on one device, for
    `fastinterp.path` numpy arrays, too. Its tensors are read at every point, not copied: leave them as they are.
    """,
]
_CHUNK = 8 << 20  # bytes that are compared at a time


@dataclass(frozen=True, eq=False)
class Endpoint:
    """One model of a path: the headers of a checkpoint, or a state dict.

    label       what messages and reports call it: a checkpoint as the user named it, a state dict by its role
    checkpoint  None for a state dict. Its tensors stay on disk
    state       tensors by name; empty for a checkpoint
    """

    label: str
    checkpoint: StoredModel | None
    state: Mapping[str, Any]

    @staticmethod
    def of(model: Model | None, role: str) -> Endpoint:
        """role: `base`, say. Raises: UsageError, if the model is neither; CheckpointError."""
        if isinstance(model, Mapping):
            return Endpoint(role, None, model)
        if not isinstance(model, (str, os.PathLike)):
            raise UsageError(f"{role} must be a checkpoint's path or a state dict, got {type(model).__name__}")
        name = os.fspath(model)
        opened = open_model(name)
        if opened.checkpoint is not None:
            refuse_components(opened.checkpoint)
        return Endpoint(name, opened, {})

    def following(self, reference: Mapping[str, HasShape]) -> Endpoint:
        """This end point. Its tensors have the names of the reference, where a prefix or the like differs, and buffers
        that software computes are left out where the reference lacks them.
        """
        return self._renamed(following(self.shapes(), reference))

    def without(self, names: Collection[str]) -> Endpoint:
        """This end point, without some of its tensors."""
        return self._renamed({name: name for name in self.shapes() if name not in names})

    def shapes(self) -> Mapping[str, HasShape]:
        """Its tensors, as far as they have a shape: what a state dict may have beside them is left out."""
        if self.checkpoint is not None:
            return self.checkpoint.tensors
        state: Mapping[Any, Any] = self.state
        return {n: x for n, x in state.items() if isinstance(n, str) and hasattr(x, "shape")}

    def _renamed(self, names: Mapping[str, str]) -> Endpoint:
        """names: of the tensors that stay -> their new ones"""
        own = self.shapes()
        if names.keys() == own.keys() and all(name == new for name, new in names.items()):
            return self
        if self.checkpoint is None:
            state = {names.get(n, n): x for n, x in self.state.items() if n in names or n not in own}
            return replace(self, state=state)
        tensors = self.checkpoint.tensors
        named = {new: tensors[n] if n == new else struct_replace(tensors[n], name=new) for n, new in names.items()}
        return replace(self, checkpoint=struct_replace(self.checkpoint, tensors=named))

    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of each tensor, extra state left out. Raises: UsageError, if one is no torch tensor."""
        if self.checkpoint is not None:
            return {name: (entry.dtype, entry.shape) for name, entry in self.checkpoint.tensors.items()}
        specs: dict[str, TensorSpec] = {}
        for name, x in self.state.items():
            if is_extra_state(name):
                continue
            if not hasattr(x, "data_ptr"):
                raise UsageError(f"{name} of {self.label} must be a torch tensor, got {type(x).__name__}")
            dtype = parse_dtype(str(x.dtype)) or DType(str(x.dtype).removeprefix("torch."), 8)
            specs[name] = dtype, tuple(x.shape)
        return specs

    def headers(self) -> dict[str, ArrayHeader]:
        """Dtype and shape of those tensors of a state dict whose dtype files have."""
        tensors = {n: x for n, x in self.state.items() if hasattr(x, "dtype") and hasattr(x, "shape")}
        known = ((name, x, stored_dtype(x)) for name, x in tensors.items())
        return {name: ArrayHeader(dtype, tuple(x.shape)) for name, x, dtype in known if dtype is not None}

    def changed_files(self) -> list[Path]:
        """The files that were changed, replaced or removed since their headers were read."""
        checkpoint = None if self.checkpoint is None else self.checkpoint.checkpoint
        return [] if checkpoint is None else changed_since(checkpoint)


def not_in_all(own: Mapping[str, HasShape], models: Sequence[Endpoint]) -> frozenset[str]:
    """The names of buffers that software computes, among those of a module or an end point, that some of the models
    lack: nothing can be interpolated there, and nothing needs to be.
    """
    return frozenset(
        name for name, x in own.items() if is_recomputed(name, x) and any(name not in m.shapes() for m in models)
    )


class Endpoints:
    """Several end points, the files of the checkpoints among them open for reading until `stack` closes.

    names  of the tensors that will be read: only their files are opened. None: all

    Files are read with pread, never mapped: where a file shrinks under a mapping, the process is killed.
    Raises: StorageError, if a file cannot be opened.
    """

    def __init__(self, models: Sequence[Endpoint], stack: ExitStack, names: Collection[str] | None = None):
        checkpoints = [model.checkpoint for model in models if model.checkpoint is not None]
        self._names = names
        reads = [tensor for c in checkpoints for name, tensor in c.tensors.items() if self._wanted(name)]
        refuse_damaged(checkpoints)
        self.files = Sources(checkpoints, reads, stack)

    def _wanted(self, name: str) -> bool:
        return self._names is None or name in self._names

    def tensors(self, model: Endpoint) -> dict[str, Any]:
        """The tensors of one end point by name.

        Those of a state dict are its own. Of a checkpoint a floating tensor is a `StoredTensor`, read where it is used;
        others are few, and are read now.
        Raises: StorageError, CheckpointError.
        """
        if model.checkpoint is None:
            return {name: x for name, x in model.state.items() if self._wanted(name)}
        return {name: self._stored(tensor) for name, tensor in model.checkpoint.tensors.items() if self._wanted(name)}

    def read(self, model: Endpoint) -> dict[str, Any]:
        """The tensors of one end point by name, as torch tensors in memory. Raises: StorageError, CheckpointError."""
        tensors = self.tensors(model).items()
        return {name: self.whole(x) if isinstance(x, StoredTensor) else x for name, x in tensors}

    def _stored(self, tensor: TensorInput) -> Any:
        operand = self.files.operand(tensor)
        assert isinstance(operand, Stored)  # rows are gathered for recipes alone
        more = operand if operand.decoder is not None or operand.low_rank is not None else None
        stored = StoredTensor(operand.source, operand.offset, tensor.shape, tensor.dtype, more)
        return stored if tensor.merges else self.whole(stored)

    def check_tied(self, model: Endpoint, tensors: Mapping[str, Any], weights: Sequence[Weight]) -> None:
        """Raises: ShapeError, if tensors that are one in the module differ in the end point `model`."""
        for weight in weights:
            first, *others = [name for name in weight.names if name in tensors] or [weight.name]
            for other in others:
                if not self._equal(tensors[first], tensors[other]):
                    raise tied_error(first, other, f"differ in {model.label}")

    def _equal(self, x: Any, y: Any) -> bool:
        """Whether two tensors of one end point hold the same bytes."""
        if (x.dtype, tuple(x.shape)) != (y.dtype, tuple(y.shape)):
            return False
        if not isinstance(x, StoredTensor) or not isinstance(y, StoredTensor):
            return equal_bytes(x, y)
        if x.operand is not None or y.operand is not None:
            return x.operand == y.operand or equal_bytes(self.whole(x), self.whole(y))
        nbytes = x.dtype.nbytes(math.prod(x.shape)) or 0
        chunks = [(at, min(_CHUNK, nbytes - at)) for at in range(0, nbytes, _CHUNK)]
        return (x.source, x.start) == (y.source, y.start) or all(
            self._read(x.source, x.start + at, n) == self._read(y.source, y.start + at, n) for at, n in chunks
        )

    def whole(self, stored: StoredTensor) -> Any:
        """The tensor, read into a torch tensor in the CPU's memory."""
        import torch

        nbytes = stored.dtype.nbytes(math.prod(stored.shape))
        if not nbytes:
            return torch.empty(stored.shape, dtype=torch_dtype(stored.dtype))
        if stored.operand is not None:
            made = torch.empty(stored.shape, dtype=torch_dtype(stored.dtype))
            step = copy_by_kernel(stored.operand, 0, nbytes)
            options = PumpOptions(isa=cpu_isa(), threads=cpu_threads(None))
            sinks: list[Handle] = [("memory", made.data_ptr(), nbytes)]
            PumpExecutor(self.files.handles, sinks, options, self._explained, 0, None).run([step])
            return made
        data = self._read(stored.source, stored.start, nbytes)
        return torch.frombuffer(data, dtype=torch_dtype(stored.dtype)).view(stored.shape)

    def _explained(self, error: tuple[Any, ...], steps: Sequence[TensorStep]) -> Exception:
        return self.files.explained(error)

    def _read(self, source: int, start: int, nbytes: int) -> bytearray:
        """Raises: StorageError; CheckpointError, if the file ends before."""
        data = bytearray(nbytes)
        done = 0
        if (elsewhere := self.files.elsewhere(source)) is not None:
            elsewhere.read_into(memoryview(data), start)
            return data
        fd = self.files.handles[source]
        assert isinstance(fd, int)
        with storage(self.files.paths[source]):
            while done < nbytes:
                count = os.preadv(fd, [memoryview(data)[done:]], start + done)
                if not count:
                    raise self.files.explained(("read", source, 0, start, nbytes, done))
                done += count
        return data


def copy_by_kernel(operand: Stored, sink: int, nbytes: int) -> TensorStep:
    """The step of a copy for kernels, which combine elements: a sum of one tensor, in its dtype."""
    step = Combine(
        inputs=(operand,), numel=nbytes // CODE_BYTES[operand.dtype], sinks=(sink,), offsets=(0,),
        out_dtype=operand.dtype, rows=(Row(0),),
    )  # fmt: skip
    return TensorStep("", step, nbytes * 2)


def warn_unlike(models: Sequence[Endpoint], stacklevel: int) -> None:
    """Warn where tokenizers of the checkpoints differ from the first's, as a merge would.

    stacklevel  1: the caller's line is named
    """
    checkpoints = [model.checkpoint for model in models if model.checkpoint is not None]
    for warning in path_warnings(checkpoints) if checkpoints else ():
        warnings.warn(plain(warning), stacklevel=stacklevel + 1)
