"""Steps: what a backend does with one tensor, as frozen typed values. Planning makes them, kernels read them.

The pump takes a step as it is, and an accelerator a piece of one (`Piece` in backends/device.py). One parser in C++,
csrc/binding/parse.cpp, reads the attributes of these classes for both. A class also says where its tensor may be cut,
and how the answers of the parts become that of the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec
from msgspec.structs import replace

from fastinterp._C import fold
from fastinterp.ops.contract import BLOCK_ROWS, CHUNK, STRIP
from fastinterp.ops.dtypes import CODE_BYTES
from fastinterp.ops.operands import Encoder, Gathered, Operand

if TYPE_CHECKING:
    from fastinterp._C import Counts, Masks
    from fastinterp.ops.combine import GroupRow, Row

WORDS = 1 << 32  # values of a random number: an element passes where it is below a limit of 0..WORDS
Per = Literal["tensor", "row", "column"]
# What a step answers: sums f64[...] and counts i64[...]; of a histogram counts for each bracket; None if it writes.
Answer = Any


# --- parts of steps --------------------------------------------------------------------------------------------------


class MaskTest(msgspec.Struct, frozen=True):
    """The test of a mask, for every element of a delta: its magnitude, as float32 bits, must be in min_bits..max_bits.

    And its random number must be below a limit of 0..WORDS, which runs from `low_limit` for the smallest magnitude of a
    row to `high_limit` for the largest. A limit of WORDS draws nothing.

    key  of the random numbers: Philox
    """

    min_bits: int
    max_bits: int
    low_limit: int = WORDS
    high_limit: int = WORDS
    key: int = 0

    @property
    def is_random(self) -> bool:
        return self.low_limit < WORDS

    @property
    def by_rank(self) -> bool:
        """Whether the limit depends on the rank in the row."""
        return min(self.low_limit, WORDS) != min(self.high_limit, WORDS)


class Score(msgspec.Struct, frozen=True):
    """A number for every element; where it is below `min_bits` (float32 bits), the element is dropped from all deltas.

    kind     "variance" of the deltas; or "divergence": the first delta's magnitude, times a factor per row
    factors  float32[rows of the tensor], for a divergence
    """

    kind: Literal["variance", "divergence"]
    min_bits: int
    factors: bytes = b""


class MaskPlace(msgspec.Struct, frozen=True):
    """One mask of a tensor's masks, computed by masked statistics."""

    masks: Masks
    index: int


class MaskedTerm(msgspec.Struct, frozen=True, kw_only=True):
    """One delta of a masked sum, from the base. Numbers that the output does not use are 0.

    importance        input whose elements are a further factor of the weight; -1: none
    precomputed_mask  the elements that pass `test`, if they are computed already
    """

    input: int
    weight: float
    sign_weight: float
    share: float
    sole_weight: float
    importance: int
    test: MaskTest
    precomputed_mask: MaskPlace | None = None


class MaskedOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One output of a masked sum: rule 14 of docs/NUMERICS.md, and MaskedCombine, which it comes from.

    elects_signs, divides, has_sole_weights  whether the terms' sign_weight, share, sole_weight count
    """

    base: int
    terms: tuple[MaskedTerm, ...]
    elects_signs: bool
    divides: bool
    has_sole_weights: bool
    least_share: float
    other_share: float
    limit: float
    score: Score | None


class MaskFill(msgspec.Struct, frozen=True):
    """Masks that masked statistics fill; places: which of them for each input, -1 for none."""

    masks: Masks
    places: tuple[int, ...]


class Bracket(msgspec.Struct, frozen=True):
    """Magnitudes low..high (float32 bits) of the delta of an input, counted in bins (magnitude - low) >> shift."""

    input: int
    low: int
    high: int
    shift: int


# --- steps -----------------------------------------------------------------------------------------------------------


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What is done with one tensor.

    inputs   operands, as the step numbers them
    numel    elements of the tensor
    columns  elements of a row; 0 where nothing looks at rows or columns, and nothing is gathered
    """

    kind: ClassVar[str]
    inputs: tuple[Operand, ...]
    numel: int
    columns: int = 0

    @property
    def element_bytes(self) -> int:
        """Bytes of an element in all inputs and outputs together."""
        return sum(self.widths)

    @property
    def widths(self) -> list[int]:
        """Bytes of an element of each input, then of each output."""
        return [CODE_BYTES[operand.dtype] for operand in self.inputs]

    @property
    def gathers(self) -> bool:
        return any(operand.gathered for operand in self.inputs)

    @property
    def decodes(self) -> bool:
        """Whether an input is more than its stored bytes: decoded, or with adapters."""
        return any(
            bool(o.decoders) if isinstance(o, Gathered) else (o.decoder or o.low_rank) is not None for o in self.inputs
        )

    @property
    def encodes(self) -> bool:
        """Whether its outputs are codes."""
        return False

    @property
    def by_rank(self) -> bool:
        """Whether it has random masks whose limits depend on ranks: those look at whole rows."""
        return False

    def grain(self) -> tuple[int, bool]:
        """The least length of a part in elements; whether it must be that times a power of two, so that sums fold."""
        return CHUNK, False

    def cut(self, most: int, numel: int | None = None) -> list[tuple[int, int]]:
        """Parts of the tensor, (first element, elements), in order; one of 0 elements, if there are none.

        most   bytes of all operands of a part together: it has as many elements as fit, but a grain at least
        numel  of what is cut; None: all of the tensor
        """
        numel = self.numel if numel is None else numel
        fitting = max(1, most // self.element_bytes)
        grain, doubles = self.grain()
        count = max(1, fitting // grain)
        if doubles:
            count = 1 << count.bit_length() - 1
        length = count * grain
        return [(first, min(length, numel - first)) for first in range(0, numel, length)] or [(0, 0)]

    def join(self, answers: Sequence[Answer]) -> Answer:
        """The answer of the step from those of its parts, in order. Raises: ValueError, if answers differ in length."""
        return answers[0] if len(answers) == 1 else fold(list(answers))


class WritingStep(Step, frozen=True, kw_only=True):
    """A step that writes: sinks by their numbers and byte offsets in them, one of each per output."""

    sinks: tuple[int, ...]
    offsets: tuple[int, ...]

    def join(self, answers: Sequence[Answer]) -> Answer:
        return None


class SumStep(WritingStep, frozen=True, kw_only=True):
    """A step that writes sums.

    out_dtype  code of the dtype of all outputs; of F32, if they are encoded
    keys       Philox keys of the store, one per output; none where rounding is to nearest
    encoder    None: outputs are elements of `out_dtype`
    """

    out_dtype: int
    keys: tuple[int, ...] = ()
    encoder: Encoder | None = None

    @property
    def encodes(self) -> bool:
        return self.encoder is not None

    @property
    def widths(self) -> list[int]:
        return [*super().widths, *[CODE_BYTES[self.out_dtype]] * len(self.sinks)]


class CopyEqual(WritingStep, frozen=True, kw_only=True):
    """Copy the first input's bytes to all outputs, if they are those of every input. numel, columns: in bytes."""

    kind = "copy_equal"

    @property
    def widths(self) -> list[int]:
        return [1] * (len(self.inputs) + len(self.sinks))


class Combine(SumStep, frozen=True, kw_only=True):
    """Weighted sums with one weight per input: `rows` has one per output."""

    kind = "combine"
    rows: tuple[Row, ...]


class GroupCombine(SumStep, frozen=True, kw_only=True):
    """Weighted sums with a weight per row or column: `rows` has one per output."""

    kind = "group_combine"
    per: Literal["row", "column"]
    rows: tuple[GroupRow, ...]


class MaskedSum(SumStep, frozen=True, kw_only=True):
    """Sums of what masks leave of deltas: `outputs` has one per output."""

    kind = "masked_sum"
    outputs: tuple[MaskedOutput, ...]

    @property
    def by_rank(self) -> bool:
        return any(term.test.by_rank for output in self.outputs for term in output.terms)

    def with_filled_masks(self) -> MaskedSum:
        """The step without masks that nobody has filled, as when an accelerator has done the tensor's statistics: what
        they would hold is drawn again, with the same result.
        """
        if all(_is_filled(term) for output in self.outputs for term in output.terms):
            return self

        def filled(output: MaskedOutput) -> MaskedOutput:
            terms = (term if _is_filled(term) else replace(term, precomputed_mask=None) for term in output.terms)
            return replace(output, terms=tuple(terms))

        return replace(self, outputs=tuple(map(filled, self.outputs)))


def _is_filled(term: MaskedTerm) -> bool:
    return term.precomputed_mask is None or term.precomputed_mask.masks.filled


class LargestMagnitudes(Step, frozen=True, kw_only=True):
    """The largest magnitudes of sums that are encoded with one scale for each matrix: nothing is written.

    of  the step that will write them, with the same inputs

    Answers with float32 numbers, for each output those of its matrices; and with no counts.
    """

    kind = "largest_magnitudes"
    of: SumStep

    @property
    def encodes(self) -> bool:
        return True


class Measure(Step, frozen=True, kw_only=True):
    """The Gram matrix, L1 norms and counts of nonzero elements: of the inputs, or of their deltas from the first.

    Answers, for the tensor or for each of its rows or columns, with the upper triangle of the matrix row by row, then
    the norms; and with the counts.
    """

    kind = "measure"
    deltas: bool = False
    per: Per = "tensor"

    def grain(self) -> tuple[int, bool]:
        if self.per == "row":
            return self.columns, False
        return (BLOCK_ROWS * self.columns if self.per == "column" else CHUNK), True

    def join(self, answers: Sequence[Answer]) -> Answer:
        return _chained(answers) if self.per == "row" and len(answers) > 1 else super().join(answers)


class MaskedStats(Step, frozen=True, kw_only=True):
    """Statistics of masked deltas from the first input.

    tests        one per input; that of the first is not looked at
    l1, squares  which sums are wanted; the others are 0
    fills        masks that the pump fills with the elements that pass; accelerators do not

    Answers with the L1 norm of each delta, 0 for the first input, then of its masked elements, then the sum of squares
    of these; and with how many elements pass each mask, then how many of them pass the mask of another delta, too.
    """

    kind = "masked_stats"
    tests: tuple[MaskTest, ...]
    score: Score | None
    l1: bool
    squares: bool
    fills: MaskFill | None = None

    @property
    def by_rank(self) -> bool:
        return any(test.by_rank for test in self.tests[1:])

    def grain(self) -> tuple[int, bool]:
        return CHUNK, True


class Histogram(Step, frozen=True, kw_only=True):
    """How many magnitudes lie where: Counts for each bracket.

    every  strip s of the tensor, STRIP elements, is looked at iff s % every == 0
    score  what is ranked instead of deltas; the brackets' inputs are ignored then
    """

    kind = "histogram"
    brackets: tuple[Bracket, ...]
    every: int = 1
    score: Score | None = None

    def grain(self) -> tuple[int, bool]:
        return STRIP, False

    def join(self, answers: Sequence[Answer]) -> Answer:
        """Counts are added to the first part's."""
        wholes: Sequence[Counts] = answers[0]
        for more in answers[1:]:
            for whole, part in zip(wholes, more, strict=True):
                whole.add(part)
        return wholes


class Divergence(Step, frozen=True, kw_only=True):
    """How far the softmax of the second input's rows is from that of the first's: one number per row, and no counts."""

    kind = "divergence"

    def grain(self) -> tuple[int, bool]:
        return self.columns, False

    def join(self, answers: Sequence[Answer]) -> Answer:
        return _chained(answers) if len(answers) > 1 else answers[0]


def _chained(answers: Sequence[Answer]) -> Answer:
    """Of parts that are whole rows: one behind the other."""
    reals, counts = zip(*answers, strict=True)
    return memoryview(b"".join(reals)).cast("d"), memoryview(b"".join(counts)).cast("q")


def join_stats(stats: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """The statistics of a step's outputs from those of its parts: counts and sums add. Empty, if it answers."""
    names = dict.fromkeys(chain.from_iterable(stats[0]))
    return [{name: sum(part[name] for part in parts) for name in names} for parts in zip(*stats, strict=True)]
