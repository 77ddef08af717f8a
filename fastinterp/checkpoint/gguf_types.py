"""The types of tensors in GGUF files: numbers, names, and how many elements are stored in how many bytes."""

from __future__ import annotations

import msgspec

from fastinterp.checkpoint.header import Entry
from fastinterp.ops.dtypes import DTYPES, DType


class GgufType(msgspec.Struct, frozen=True):
    """One type.

    number       in the file
    dtype        of a tensor: one of safetensors' where elements are stored as there, else one of blocks
    decoder      that of csrc/decoders/ which reads its blocks; empty: there is none
    convertible  whether the package gguf turns its blocks into numbers
    """

    number: int
    dtype: DType
    decoder: str = ""
    convertible: bool = False

    @property
    def name(self) -> str:
        return self.dtype.name

    @property
    def block(self) -> tuple[int, int]:
        """(elements, bytes) of a block; of one element, where there are no blocks."""
        return self.dtype.block or (1, self.dtype.bits // 8)


def _blocks(
    number: int, name: str, elements: int, nbytes: int, decoder: str = "", convertible: bool = True
) -> GgufType:  # fmt: skip
    return GgufType(number, DType(name, 0, block=(elements, nbytes)), decoder, convertible)


_PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}

TYPES: dict[int, GgufType] = {number: GgufType(number, DTYPES[name]) for number, name in _PLAIN.items()} | {
    t.number: t
    for t in (
        _blocks(2, "Q4_0", 32, 18, "q4_0"),
        _blocks(3, "Q4_1", 32, 20, "q4_1"),
        _blocks(6, "Q5_0", 32, 22, "q5_0"),
        _blocks(7, "Q5_1", 32, 24, "q5_1"),
        _blocks(8, "Q8_0", 32, 34, "q8_0"),
        _blocks(9, "Q8_1", 32, 36, convertible=False),
        _blocks(10, "Q2_K", 256, 84, "q2_k"),
        _blocks(11, "Q3_K", 256, 110, "q3_k"),
        _blocks(12, "Q4_K", 256, 144, "q4_k"),
        _blocks(13, "Q5_K", 256, 176, "q5_k"),
        _blocks(14, "Q6_K", 256, 210, "q6_k"),
        _blocks(15, "Q8_K", 256, 292, convertible=False),
        _blocks(16, "IQ2_XXS", 256, 66),
        _blocks(17, "IQ2_XS", 256, 74),
        _blocks(18, "IQ3_XXS", 256, 98),
        _blocks(19, "IQ1_S", 256, 50),
        _blocks(20, "IQ4_NL", 32, 18, "iq4_nl"),
        _blocks(21, "IQ3_S", 256, 110),
        _blocks(22, "IQ2_S", 256, 82),
        _blocks(23, "IQ4_XS", 256, 136, "iq4_xs"),
        _blocks(29, "IQ1_M", 256, 56),
        _blocks(34, "TQ1_0", 256, 54),
        _blocks(35, "TQ2_0", 256, 66),
        _blocks(39, "MXFP4", 32, 17, "gguf_mxfp4"),
        _blocks(40, "NVFP4", 64, 36),
        _blocks(41, "Q1_0", 128, 18),
    )
}
BY_NAME = {t.name: t for t in TYPES.values()}


def stored(entry: Entry) -> Entry:
    """A tensor that is converted from blocks, as it is in its file; any other one itself."""
    kind = None if entry.conversion is None else BY_NAME.get(entry.conversion.stored_as)
    nbytes = None if kind is None else kind.dtype.nbytes(entry.numel)
    if kind is None or nbytes is None:
        return entry
    return msgspec.structs.replace(entry, dtype=kind.dtype, nbytes=nbytes, conversion=None)


# Types that llama.cpp had once: their numbers are not used again.
REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
REMOVED |= {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
