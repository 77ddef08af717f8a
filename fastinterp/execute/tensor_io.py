"""One tensor as the pump sees it: numbers of sources and sinks, places in them, and the steps that write it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastinterp.execute.sources import gathers
from fastinterp.ops.combine import Row, renumbered
from fastinterp.plan.inputs import Operand


@dataclass(frozen=True, slots=True)
class Step:
    """What the pump does for a tensor at a time.

    native  as the pump takes it
    nbytes  that it reads and writes for it
    held    bytes of its answer, or of weights by row or column, as far as they grow with the tensor
    """

    name: str
    native: dict[str, Any]
    nbytes: int
    held: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's inputs are and its outputs go.

    operands        of each input, as the sums number them
    nbytes          of each input
    out_dtype       dtype code of all outputs
    out_bytes       of one output
    sinks, offsets  one per output
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

    def asking(self, kind: str, inputs: Sequence[int], held: int = 0, **keys: Any) -> Step:
        """A step that reads these inputs and answers. held: bytes of that, and of what is made of it."""
        native = {"kind": kind, **self.reading(inputs), "numel": self.numel, **keys}
        return Step(self.name, native, sum(self.nbytes[i] for i in inputs), held)

    def writing(self, kind: str, inputs: Sequence[int], outputs: Sequence[int], held: int = 0, **keys: Any) -> Step:
        """A step that reads these inputs and writes these of the outputs. held: bytes of its weights."""
        native = {
            "kind": kind,
            **self.reading(inputs),
            "numel": self.numel,
            "sinks": [self.sinks[k] for k in outputs],
            "offsets": [self.offsets[k] for k in outputs],
            "out_dtype": self.out_dtype,
            **keys,
        }
        if self.keys:
            native["keys"] = [self.keys[k] for k in outputs]
        return Step(self.name, native, sum(self.nbytes[i] for i in inputs) + self.out_bytes * len(outputs), held)

    def reading(self, inputs: Sequence[int]) -> dict[str, Any]:
        """Which they are; and the length of a row, if rows of any of them are gathered."""
        operands = [self.operands[i] for i in inputs]
        return {"inputs": operands, "columns": self.columns} if gathers(operands) else {"inputs": operands}

    def combine(self, rows: Sequence[Row], outputs: Sequence[int]) -> Step:
        """The step that writes these outputs, each the sum that its row says."""
        inputs, rows = renumbered(rows)
        native = [(row.pivot, row.total, list(row.terms)) for row in rows]
        return self.writing("combine", inputs, outputs, rows=native)

    def same(self) -> Step:
        """The step that copies the bytes of the first input to all outputs, if they are those of every input."""
        outputs = range(len(self.sinks))
        step = self.writing("same", range(len(self.operands)), outputs)
        native = {k: v for k, v in step.native.items() if k not in ("out_dtype", "keys")}
        return Step(self.name, {**native, "numel": self.nbytes[0]}, step.nbytes)
