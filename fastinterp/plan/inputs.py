"""Inputs of output tensors: an interface, and one class for each kind.

`TensorInput` is all that planning, running and reporting know of an input. Kinds: a tensor that a file holds, as it is
or as codes that a decoder turns into float32 (`StoredInput`); one that Python converts first (`ConvertedInput`); rows
that come from several places (`GatheredInput`); a tensor of a document above, which is in no file (`IntermediateInput`
of planned.py, where the output tensors are, too).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from msgspec.structs import replace

from fastinterp.checkpoint.gguf_types import BY_NAME
from fastinterp.checkpoint.header import Conversion
from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import F16, DType
from fastinterp.plan.low_rank import LowRankInput
from fastinterp.tokenizer.embedding_rows import RowMap

if TYPE_CHECKING:
    from fastinterp.ops.operands import Operand

ModelInput = tuple[int, "TensorInput"]  # number of its model in the plan, and a tensor of it


class OpenFiles(Protocol):
    """The files of inputs, open: each kind of input has its operand made in one of these ways."""

    def stored(self, tensor: StoredInput) -> Operand: ...
    def converted(self, tensor: ConvertedInput) -> Operand: ...
    def gathered(self, tensor: GatheredInput) -> Operand: ...
    def intermediate(self, tensor: TensorInput) -> Operand: ...


class TensorInput(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One tensor that is read: the interface. Every kind implements key, files and open, which raise here.

    dtype, shape  of its numbers, whatever stores them
    nbytes        that are read for all of it
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def key(self) -> Hashable:
        """Identity: inputs of one key are the same tensor, under whatever names."""
        raise NotImplementedError  # each kind of input has its own

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it is read from; none if it has to be made first."""
        raise NotImplementedError  # each kind of input has its own

    def open(self, files: OpenFiles) -> Operand:
        """The operand by which steps read it."""
        raise NotImplementedError  # each kind of input has its own

    @property
    def factor(self) -> bool:
        """Whether it belongs to an adapter that is built into its model: a factor of a product, which is not merged."""
        return False

    @property
    def quantised(self) -> str:
        """The format of quantised weights whose codes or scales it holds, which no decoder reads; empty: none."""
        return ""

    @property
    def decoded(self) -> bool:
        """Whether its numbers are decoded from codes, so that no dtype is its own."""
        return False

    @property
    def merges(self) -> bool:
        """Whether its elements are numbers that can be averaged. If not, it is copied, and equal in all models."""
        return self.dtype.merges and not self.quantised

    def describe(self) -> str:
        """Dtype and shape, for people: `BF16 [4, 2]`."""
        return f"{self.dtype} {list(self.shape)}"

    @property
    def kept_dtype(self) -> DType:
        """The dtype of an output tensor that keeps this one's."""
        return self.dtype

    @property
    def encoding(self) -> Encoding | None:
        """How its bytes in a file become numbers, if they are codes."""
        return None

    @property
    def codes(self) -> Encoding | None:
        """The same, if a copy may keep its bytes: nothing is added to what they stand for."""
        return None

    @property
    def form(self) -> TensorInput:
        """The tensor as whose kind an output is stored that keeps this one's: itself, if it is in a file."""
        return self

    @property
    def plain(self) -> StoredInput | None:
        """Itself, if its elements lie in a file one after the other, as `dtype` stores them; else None."""
        return None

    @property
    def blocks(self) -> StoredInput | None:
        """The blocks of a GGUF file that it is stored in, to be copied as they are; None, if it is stored otherwise."""
        return None

    @property
    def stored(self) -> StoredInput | None:
        """Itself, if one file holds it, whatever it is there; else None."""
        return None

    @property
    def adapted(self) -> bool:
        """Whether adapters add to it, so that it is computed."""
        return False

    @property
    def formula(self) -> str:
        """What adapters make of it, W, for people; empty, if none change it."""
        return ""

    @property
    def stored_rows(self) -> StoredInput | None:
        """Itself, if its rows lie in a file, as elements or as codes, so that those of others may stand beside them;
        else None.
        """
        return self.plain

    @property
    def moves_rows(self) -> bool:
        """Whether its rows come from several places: of another vocabulary than its file's, or of other tensors."""
        return False

    @property
    def converted_from(self) -> str | None:
        """How it is stored, if Python converts it into a temporary file first; None: it is read where it is."""
        return None

    def first_rows(self, count: int) -> TensorInput | None:
        """The first rows of it, along its first dimension, read where they are; None, if that is not possible."""
        return None

    # What only a tensor of a document above answers in another way.

    def origins(self, model: int) -> set[int]:
        """The models that it comes from in the end. model: the one that it is a tensor of."""
        return {model}

    def agreeing(self, model: int) -> list[ModelInput]:
        """The stored tensors that must have the same bytes in all models, where it is not merged but copied."""
        return [(model, self)]

    @property
    def weighted_sum(self) -> tuple[Row, list[ModelInput]] | None:
        """The sum of other inputs that it is, if that may become part of a sum that reads it."""
        return None

    def made_by(self, plan_of: Callable[[Any], Any]) -> TensorInput:
        """This input, where the plan of a tensor of a document above is `plan_of` it."""
        return self

    def as_read(self) -> TensorInput:
        """This input with the dtype and the bytes that it has when it is read."""
        return self


class Encoding(msgspec.Struct, frozen=True):
    """The encoding of a stored tensor: how its bytes become float32 numbers.

    stored      the dtype of its codes
    kept_dtype  the dtype of an output tensor that keeps this one's
    decoder     its name in csrc/decoders/ and reference/decode.py
    companions  scales and the like, in the order in which the decoder takes them
    parameters  numbers that it takes
    codes       the name of the tensor of codes, and its shape
    beside      tensors that belong to the codes, too: scales of activations, descriptions
    format      for people: `fp8 with scales of blocks of 128 x 128`
    power_of_two  whether all scales are powers of two, whatever their dtype
    """

    stored: DType
    kept_dtype: DType
    decoder: str
    companions: tuple[StoredInput, ...]
    parameters: tuple[float, ...]
    codes: str = ""
    codes_shape: tuple[int, ...] = ()
    beside: tuple[StoredInput, ...] = ()
    format: str = ""
    power_of_two: bool = False


class StoredInput(TensorInput, frozen=True, eq=False):
    """A tensor in one file, from byte `start` on.

    encoding   None: its bytes are elements of `dtype`. Else they are codes, and dtype is F32
    low_rank   None: no adapter changes it. Else dtype is F32, whatever its bytes are
    kept       the dtype of an output tensor that keeps this one's, if that is not its own
    whole_of   the adapter that stores it whole, in place of the model's, for people; empty: it is the model's
    factor     whether it belongs to an adapter that is built into its model: a factor of a product
    """

    path: Path
    start: int
    encoding: Encoding | None = None
    quantised: str = ""
    factor: bool = False
    low_rank: LowRankInput | None = None
    kept: DType | None = None
    whole_of: str = ""

    @property
    def key(self) -> Hashable:
        added = None if self.low_rank is None else self.low_rank.key
        if self.encoding is None:
            return self.path, self.start, self.nbytes, self.dtype.name, added
        companions = tuple(companion.key for companion in self.encoding.companions)
        return self.path, self.start, self.nbytes, self.encoding.decoder, self.encoding.parameters, companions, added

    @property
    def files(self) -> tuple[Path, ...]:
        companions = () if self.encoding is None else self.encoding.companions
        added = () if self.low_rank is None else self.low_rank.tensors
        return tuple(dict.fromkeys((self.path, *(tensor.path for tensor in (*companions, *added)))))

    def open(self, files: OpenFiles) -> Operand:
        return files.stored(self)

    def describe(self) -> str:
        text = f"{self.dtype if self.low_rank is None else self.low_rank.stored} {list(self.shape)}"
        return text if self.encoding is None else f"{text} ({self.encoding.stored} with {self.encoding.decoder})"

    @property
    def decoded(self) -> bool:
        return self.encoding is not None

    @property
    def codes(self) -> Encoding | None:
        return self.encoding if self.low_rank is None else None

    @property
    def kept_dtype(self) -> DType:
        if self.kept is not None:
            return self.kept
        return self.dtype if self.encoding is None else self.encoding.kept_dtype

    @property
    def merges(self) -> bool:
        return self.dtype.merges and not self.quantised and not self.factor

    @property
    def plain(self) -> StoredInput | None:
        return self if self.encoding is None and self.low_rank is None else None

    @property
    def blocks(self) -> StoredInput | None:
        if self.encoding is None or self.encoding.stored.block is None or self.low_rank is not None:
            return None
        return replace(self, dtype=self.encoding.stored, encoding=None)

    @property
    def stored(self) -> StoredInput | None:
        return self

    @property
    def adapted(self) -> bool:
        return self.low_rank is not None

    @property
    def formula(self) -> str:
        whole = f"stored whole by the adapter ({self.whole_of})" if self.whole_of else ""
        if self.low_rank is None:
            return whole
        return f"{self.low_rank.formula()}, W {whole}" if whole else self.low_rank.formula()

    @property
    def stored_rows(self) -> StoredInput | None:
        return self if self.low_rank is None else None

    def first_rows(self, count: int) -> StoredInput | None:
        if self.low_rank is not None:
            return None
        return replace(self, shape=(count, *self.shape[1:]), nbytes=self.nbytes // self.shape[0] * count)


class ConvertedInput(TensorInput, frozen=True, eq=False):
    """A tensor in one file whose bytes there are not elements of `dtype` one after the other, and which no decoder
    reads: when a run opens its inputs, Python writes its elements into a temporary file.

    path, start  the file, and the first byte of the tensor
    conversion   how its bytes become elements
    factor       whether it belongs to an adapter that is built into its model
    """

    path: Path
    start: int
    conversion: Conversion
    factor: bool = False

    @property
    def key(self) -> Hashable:
        return self.path, self.start, self.nbytes, self.dtype.name, self.shape, self.conversion

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def open(self, files: OpenFiles) -> Operand:
        return files.converted(self)

    @property
    def converted_from(self) -> str | None:
        return self.conversion.stored_as or "with strides"

    @property
    def merges(self) -> bool:
        return self.dtype.merges and not self.factor

    def describe(self) -> str:
        stored = f" ({self.conversion.stored_as})" if self.conversion.stored_as else ""
        return f"{self.dtype} {list(self.shape)}{stored}"

    @property
    def kept_dtype(self) -> DType:
        return self.dtype if self.blocks is None else F16

    @property
    def blocks(self) -> StoredInput | None:
        kind = BY_NAME.get(self.conversion.stored_as)
        nbytes = None if kind is None or kind.dtype.block is None else kind.dtype.nbytes(self.numel)
        if kind is None or nbytes is None:
            return None
        return StoredInput(self.name, kind.dtype, self.shape, nbytes, self.path, self.start)


class GatheredInput(TensorInput, frozen=True, eq=False):
    """A tensor with rows, along its last dimension, from several: an embedding in the order of the output's vocabulary,
    where the sources are models; or one that is put together of others.

    model    index of its model in `sources`
    rows     where each row is from
    means    what rows of model len(sources) are: the rows, each (model, row), of which each is the mean
    sources  of each model, its tensor that corresponds; None: the model has none. Or the tensors it is put together of
    kept     the dtype of an output tensor that keeps this one's, where some are decoded; None: its own
    """

    model: int
    rows: RowMap
    means: tuple[tuple[tuple[int, int], ...], ...]
    sources: tuple[StoredInput | None, ...]
    kept: DType | None = None

    @property
    def models(self) -> list[int]:
        """The models that rows are read from, ascending; its own, even if no row is."""
        numbers = self.rows.models | {self.model}
        if len(self.sources) in numbers:
            numbers |= {model for rows in self.means for model, _ in rows}
        return sorted(numbers - {len(self.sources)})

    @property
    def key(self) -> Hashable:
        # Tied embeddings are one tensor in the file, and in this vocabulary; but beside models that are not tied, the
        # rows that they lack come from different tensors.
        return self.rows, self.model, tuple(None if source is None else source.key for source in self.sources)

    @property
    def files(self) -> tuple[Path, ...]:
        used = (source for i in self.models if (source := self.sources[i]) is not None)
        return tuple(dict.fromkeys(path for source in used for path in source.files))

    @property
    def decoded(self) -> bool:
        used = [source for i in self.models if (source := self.sources[i]) is not None]
        return bool(used) and all(source.decoded for source in used)

    @property
    def kept_dtype(self) -> DType:
        return self.kept or self.dtype

    def open(self, files: OpenFiles) -> Operand:
        return files.gathered(self)

    @property
    def moves_rows(self) -> bool:
        return True
