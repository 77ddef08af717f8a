"""Tensors of checkpoints as float32 arrays, and their way into a file: read by the pump, whatever form they have."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fastinterp.backends.cpu import Handle, Progress, Pump, PumpOptions, survey, watch
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.errors import OutputError, ShapeError
from fastinterp.execute.damaged import refuse_damaged
from fastinterp.execute.jobs.tensor_io import TensorIO
from fastinterp.execute.sources import Sources, remedy
from fastinterp.lora.algebra import Array
from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import F32, DType
from fastinterp.ops.steps import Answer, Measure
from fastinterp.plan.inputs import TensorInput
from fastinterp.plan.models import Model

COPY = Row(0)  # the first tensor as it is


class TensorReader:
    """The files of tensors, open for reading until `stack` closes.

    models   models whose checkpoints must not change meanwhile
    inputs   every tensor that will be read
    threads  of the CPU; None: one per CPU, at most 32
    Raises: StorageError, BackendError, UsageError; its methods also CheckpointError, if a file was truncated.
    """

    def __init__(
        self, models: Iterable[Model], inputs: Iterable[TensorInput], stack: ExitStack, threads: int | None = None
    ):
        models = list(models)
        refuse_damaged(models)
        self._sources = Sources(models, inputs, stack)
        self._options = PumpOptions(isa=cpu_isa(), threads=cpu_threads(threads), prefetch=not self._sources.cached())

    def floats(self, inputs: Sequence[TensorInput], row: Row = COPY) -> Array:
        """f32[shape]: a weighted sum of tensors of one shape, by rules 1 to 4 of docs/NUMERICS.md."""
        out = np.empty(inputs[0].shape, np.float32)
        if out.size:
            self._run(inputs, (row,), F32, ("memory", out.ctypes.data, out.nbytes), 0, Path("memory"))
        return out

    def write(
        self, inputs: Sequence[TensorInput], row: Row | None, dtype: DType, fd: int, offset: int, path: Path
    ) -> None:
        """Write a tensor to a place in a file.

        row   a weighted sum of the inputs, rounded to `dtype`; None: the bytes of the first input, if all have the same
        path  of the file, for messages
        Raises: OutputError; ShapeError, if bytes differ.
        """
        self._run(inputs, () if row is None else (row,), dtype, fd, offset, path)

    def measured(self, pairs: Sequence[Sequence[TensorInput]], progress: Progress | None = None) -> list[Answer]:
        """Of each pair the sums of `Measure` (ops/steps.py): deltas from the first."""
        steps = [
            Measure(inputs=tuple(map(self._sources.operand, pair)), numel=pair[0].numel, deltas=True) for pair in pairs
        ]
        total = sum(x.nbytes for pair in pairs for x in pair)
        return survey(self._sources.handles, steps, self._options, self._sources.explained, total, progress)

    def refuse_changed(self) -> None:
        """Raises: CheckpointError, if a file has changed since its header was read."""
        self._sources.refuse_changed()

    def _run(
        self,
        inputs: Sequence[TensorInput],
        rows: tuple[Row, ...],
        dtype: DType,
        sink: Handle,
        offset: int,
        path: Path,
    ) -> None:
        """One step. rows: none copies the bytes of the first input, if all have the same"""
        io = TensorIO(
            name=inputs[0].name,
            shape=inputs[0].shape,
            operands=tuple(map(self._sources.operand, inputs)),
            nbytes=tuple(x.nbytes for x in inputs),
            out_dtype=dtype.kernel_code,
            out_bytes=dtype.nbytes(inputs[0].numel) or 0 if rows else inputs[0].nbytes,
            sinks=(0,),
            offsets=(offset,),
            keys=(),
        )
        step = io.combine(rows, (0,)) if rows else io.copy_equal()
        pump = Pump(self._sources.handles, [sink], [step.native], self._options)
        watch(pump, 0, None)
        error: tuple[Any, ...] | None = pump.error()
        if error is not None and error[0] == "write":
            code = error[2]
            raise OutputError(f"{path}: {os.strerror(code)}, writing at {error[3]}{remedy(code)}")
        if error is not None and error[0] == "differs":
            raise ShapeError(
                f"{inputs[0].name} is not the same in all adapters, and their weights do not add up to 1: without the "
                "base its sum is not known",
                tensor=inputs[0].name,
            )
        if error is not None:
            raise self._sources.explained(error)
