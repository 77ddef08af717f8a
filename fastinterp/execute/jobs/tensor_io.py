"""The operands and outputs of one tensor as backends address them, and the steps that read or write it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from fastinterp.ops import steps
from fastinterp.ops.combine import Row, renumbered
from fastinterp.ops.operands import Operand


@dataclass(frozen=True, slots=True)
class TensorStep:
    """A step of one tensor, with its cost.

    name    name of the tensor
    native  the step in the form that backends take
    nbytes  bytes that it reads and writes
    held    bytes of its answer, or of weights by row or column, as far as they grow with the tensor
    """

    name: str
    native: steps.Step
    nbytes: int
    held: int = 0


class TensorIO(msgspec.Struct, frozen=True, gc=False):
    """The input operands and the output locations of one tensor.

    operands        one per input, in the order in which sums number them
    nbytes          size of each input in bytes
    out_dtype       dtype code of all outputs
    out_bytes       size of one output in bytes
    sinks, offsets  index of the sink and byte offset in it, one per output
    keys            Philox keys of the store, one per output; none where rounding is to nearest
    """

    name: str
    shape: tuple[int, ...]
    operands: tuple[Operand, ...]
    nbytes: tuple[int, ...]
    out_dtype: int
    out_bytes: int
    sinks: tuple[int, ...]
    offsets: tuple[int, ...]
    keys: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Length of a row: the last dimension. A 0-d or 1-d tensor is one row."""
        return self.shape[-1] if len(self.shape) > 1 else self.numel

    def inputs(self, numbers: Iterable[int]) -> tuple[Operand, ...]:
        """The operands of these inputs."""
        return tuple(self.operands[i] for i in numbers)

    def reading(self, native: steps.Step, inputs: Iterable[int], held: int = 0) -> TensorStep:
        """A step that reads these inputs and answers. held: bytes of the answer, and of what is computed from it."""
        return TensorStep(self.name, native, sum(self.nbytes[i] for i in inputs), held)

    def writing(self, native: steps.WritingStep, inputs: Iterable[int], held: int = 0) -> TensorStep:
        """A step that reads these inputs and writes outputs. held: bytes of its weights."""
        nbytes = sum(self.nbytes[i] for i in inputs) + self.out_bytes * len(native.sinks)
        return TensorStep(self.name, native, nbytes, held)

    def locations(self, outputs: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Sinks, offsets and keys of these outputs."""
        numbers = tuple(outputs)
        sinks, offsets = tuple(self.sinks[k] for k in numbers), tuple(self.offsets[k] for k in numbers)
        return sinks, offsets, tuple(self.keys[k] for k in numbers) if self.keys else ()

    def combine(self, rows: Sequence[Row], outputs: Iterable[int]) -> TensorStep:
        """The step that writes these outputs, each the weighted sum of its row."""
        inputs, rows = renumbered(rows)
        sinks, offsets, keys = self.locations(outputs)
        native = steps.Combine(
            inputs=self.inputs(inputs), numel=self.numel, columns=self.columns, sinks=sinks, offsets=offsets,
            out_dtype=self.out_dtype, keys=keys, rows=rows,
        )  # fmt: skip
        return self.writing(native, inputs)

    def copy_equal(self) -> TensorStep:
        """The step that copies the bytes that all inputs have in common to all outputs, and fails if they differ."""
        size = self.nbytes[0]
        native = steps.CopyEqual(
            inputs=self.operands, numel=size, columns=self.columns * (size // max(1, self.numel)), sinks=self.sinks,
            offsets=self.offsets,
        )  # fmt: skip
        return self.writing(native, range(len(self.operands)))
