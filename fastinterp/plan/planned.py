"""Output tensors of a plan, and those of documents above as inputs of others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from fastinterp.ops.combine import Combine, Row
from fastinterp.ops.dtypes import DType
from fastinterp.plan.inputs import ModelInput, OpenFiles, TensorInput
from fastinterp.plan.program import Program

if TYPE_CHECKING:
    from fastinterp.ops.operands import Operand
    from fastinterp.plan.output_encoding import OutputEncoding


class PlannedTensor(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One output tensor.

    inputs       what is read. Inputs of a program are all that its method sees, in its order, side-cars last
    checkpoints  of each input the index of its model in Plan.checkpoints
    rows         weighted sums of the inputs, one per output. None for a program, and none if the tensor is not merged
                 but must be the same in every input (integers, and floats that only a quantiser can read)
    program      the requests of the method, where `rows` are not all
    model_count  how many of the inputs are models that the method merges; the others are side-cars
    sums         what the method returned, one per output, where `rows` come from it
    seeds        of the store's rounding, one per output
    form         the tensor whose dtype it keeps, if it is merged
    encoding     how it is stored as codes; dtype is F32 then. None: as elements of its dtype
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    checkpoints: tuple[int, ...]
    inputs: tuple[TensorInput, ...]
    rows: tuple[Row, ...]
    program: Program | None = None
    model_count: int = 0
    sums: tuple[Combine, ...] = ()
    seeds: tuple[int, ...] = ()
    form: TensorInput | None = None
    encoding: OutputEncoding | None = None

    @property
    def numel(self) -> int:
        return self.inputs[0].numel

    @property
    def pairs(self) -> list[ModelInput]:
        """Each input with the index of its model."""
        return list(zip(self.checkpoints, self.inputs, strict=True))

    @property
    def merged(self) -> bool:
        return bool(self.rows) or self.program is not None

    @property
    def reads(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The reads, in order: what each is for, and which of `inputs` it reads."""
        reads = (("combine", tuple(range(len(self.inputs)))),) if self.program is None else self.program.reads
        if self.encoding is None or not self.encoding.measures or self.copies_codes:
            return reads
        return (*reads[:-1], ("magnitudes", reads[-1][1]), reads[-1])

    @property
    def copies_codes(self) -> bool:
        """Whether all outputs are copies of the codes and scales of an input."""
        alike = () if self.encoding is None else self.encoding.alike
        return bool(self.rows) and bool(alike) and all(row.is_copy and alike[row.pivot] for row in self.rows)

    @property
    def entries(self) -> tuple[tuple[str, DType, tuple[int, ...]], ...]:
        """The tensors of the file: name, dtype and shape of each."""
        return ((self.name, self.dtype, self.shape),) if self.encoding is None else self.encoding.entries

    @property
    def stored_as(self) -> str:
        """For people: its dtype, or the format of its codes."""
        return self.dtype.name if self.encoding is None else self.encoding.format or self.encoding.codes[1].name

    @property
    def bytes_read(self) -> int:
        if self.program is None and self.encoding is None:
            return sum([tensor.nbytes for tensor in self.inputs])
        return sum(self.inputs[i].nbytes for _, inputs in self.reads for i in inputs)

    @property
    def nbytes(self) -> int:
        """Bytes of one output."""
        return self.dtype.nbytes(self.numel) or 0 if self.encoding is None else self.encoding.nbytes

    @property
    def before(self) -> tuple[PlannedTensor, ...]:
        """The tensors of documents above that have to be made before this one, each once, in an order that works."""
        for tensor in self.inputs:
            if isinstance(tensor, IntermediateInput):  # few are
                return tuple({id(t): t for tensor in self.inputs for t in stages_of(tensor)}.values())
        return ()

    @property
    def stages(self) -> tuple[PlannedTensor, ...]:
        """The tensors that are computed before it, and this one."""
        return (*self.before, self)

    def origins(self, read: Iterable[int]) -> set[int]:
        """The models that these of its inputs come from in the end; side-cars left out."""
        models: set[int] = set()
        for at in read:
            if at < self.model_count:
                models |= self.inputs[at].origins(self.checkpoints[at])
        return models


class IntermediateInput(TensorInput, frozen=True, eq=False):
    """A tensor of a document above: it is in no file, and is made when it is needed.

    tensor  how it is made, with the dtype in which it is stored until it is read
    free    that document says nothing of its dtype
    folds   its coefficients may become part of those of others, so that it need not be stored
    """

    tensor: PlannedTensor
    free: bool
    folds: bool

    @property
    def key(self) -> Hashable:
        return id(self.tensor)

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def open(self, files: OpenFiles) -> Operand:
        return files.intermediate(self)

    @property
    def quantised(self) -> str:
        return "" if self.tensor.merged else self.tensor.inputs[0].quantised

    @property
    def form(self) -> TensorInput:
        return self if self.tensor.form is None else self.tensor.form.form

    def origins(self, model: int) -> set[int]:
        return self.tensor.origins(range(self.tensor.model_count))

    def agreeing(self, model: int) -> list[ModelInput]:
        return self.tensor.pairs

    @property
    def weighted_sum(self) -> tuple[Row, list[ModelInput]] | None:
        if not self.folds or not self.tensor.rows:
            return None
        return self.tensor.rows[0], self.tensor.pairs

    def made_by(self, plan_of: Callable[[Any], Any]) -> TensorInput:
        return replace(self, tensor=plan_of(self.tensor))

    def as_read(self) -> TensorInput:
        return replace(self, dtype=self.tensor.dtype, nbytes=self.tensor.nbytes)


def stages_of(tensor: TensorInput) -> tuple[PlannedTensor, ...]:
    """The tensors that have to be made before an input can be read, in an order that works; none, if it is stored."""
    return tensor.tensor.stages if isinstance(tensor, IntermediateInput) else ()


def direct_of(tensor: TensorInput) -> PlannedTensor | None:
    """The plan of a copy of an input that is made without storing it first; None if the copy has to read it."""
    if not isinstance(tensor, IntermediateInput):
        return None
    # Its bytes are the same then: nothing is rounded on the way, or only once to nearest.
    return tensor.tensor if tensor.free and tensor.tensor.program is not None else None
