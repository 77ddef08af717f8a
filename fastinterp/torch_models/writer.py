"""Writes weighted sums of end points into the tensors of a module."""

from __future__ import annotations

from collections.abc import Sequence

from fastinterp.backends.cpu import Handle, SumRow
from fastinterp.backends.device import PreparedSums as DeviceSums
from fastinterp.backends.torch_device import current_queue, device_of
from fastinterp.execute.jobs.tensor_io import TensorIO
from fastinterp.ops.combine import Row, renumbered
from fastinterp.torch_models.endpoint_operands import EndpointOperands


class ModuleWriter:
    """Writes one sum for all tensors of a module.

    operands  what the sums read
    places    TensorIO of the module's tensors, whose sinks are numbers of `sinks`
    """

    def __init__(self, operands: EndpointOperands, places: Sequence[TensorIO], sinks: Sequence[Handle]):
        self._operands, self._sinks = operands, sinks
        self._places = [io for io in places if io.numel]
        self._all_on_device = operands.all_on_device
        self._prepared = operands.prepared(self._places, sinks)
        self._on_device: dict[tuple[int, ...], DeviceSums] = {}  # sums by the inputs that they read

    def write(self, row: Row) -> None:
        """Write the same sum of each tensor's operands. On a device that has them all it is one launch, which is not
        waited for, and little work for the host: at 4 TB/s a model takes milliseconds.
        """
        if self._prepared is not None:
            if self._places:
                self._prepared.run(SumRow(row, len(self._places[0].operands)), self._operands.threads)
            return
        if not self._all_on_device:
            self._operands.executor(self._sinks).run([io.combine([row], [0]) for io in self._places])
            return
        if not self._places:
            return
        inputs, (renumbered_row,) = renumbered([row])
        if inputs not in self._on_device:
            pieces = self._operands.resident(self._sinks).pieces([io.combine([row], [0]) for io in self._places])
            self._on_device[inputs] = device_of(self._operands.device).prepare(pieces)
        self._on_device[inputs].run(current_queue(self._operands.device), renumbered_row)
