"""The storage dtypes, named as in safetensors: one row has all that is to know of one. A leaf: imports nothing.

A new dtype touches this table, csrc/dtypes.h and the tables of kernels that CONTRIBUTING.md names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Layout:
    """How a floating dtype lays out its bits: 1 sign bit, exponent bits, `mantissa` bits."""

    bits: int
    mantissa: int
    bias: int
    largest: int  # code of the largest finite value; the next code is Inf (E4M3: NaN)
    nan: int  # code of the one NaN that is stored

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def infinite(self) -> int:
        """Code of Inf; of the largest finite value where there is none."""
        return self.largest if self.nan == self.largest + 1 else self.largest + 1


@dataclass(frozen=True, slots=True)
class DType:
    """One storage dtype.

    name          its safetensors tag
    bits          per element; 4 and 6 occur. 0, if elements are stored in blocks
    code          its number in csrc/dtypes.h; None: stored and copied, never merged
    library_name  in torch and in config.json; empty: they have no such dtype
    in_numpy      whether numpy has it under that name; else ml_dtypes does, if there is a name
    layout        of those that merge
    block         (elements, bytes) of a block of neighbouring elements, of those that are stored so: in GGUF files
    """

    name: str
    bits: int
    code: int | None = None
    library_name: str = field(default="", compare=False)
    in_numpy: bool = field(default=False, compare=False)
    layout: Layout | None = field(default=None, compare=False)
    block: tuple[int, int] | None = None

    @property
    def merges(self) -> bool:
        """True for the floating dtypes that the kernels widen and narrow."""
        return self.code is not None

    @property
    def is_complex(self) -> bool:
        """True for pairs of float32 numbers: weighted sums with real weights are those of the numbers."""
        return self.name == "C64"

    @property
    def kernel_code(self) -> int:
        """The code of the dtype that kernels see: that of F32 for its pairs; 0, if they only copy bytes."""
        return 1 if self.is_complex else self.code or 0

    def nbytes(self, numel: int) -> int | None:
        """Bytes of `numel` packed elements, or None if they do not fill whole bytes, or blocks."""
        if self.block is not None:
            elements, nbytes = self.block
            return None if numel % elements else numel // elements * nbytes
        bits = self.bits * numel
        return None if bits % 8 else bits // 8

    def __str__(self) -> str:
        return self.name


F64 = DType("F64", 64, 0, "float64", True, Layout(64, 52, 1023, 0x7FEFFFFFFFFFFFFF, 0x7FF8000000000000))
F32 = DType("F32", 32, 1, "float32", True, Layout(32, 23, 127, 0x7F7FFFFF, 0x7FC00000))
F16 = DType("F16", 16, 2, "float16", True, Layout(16, 10, 15, 0x7BFF, 0x7E00))
BF16 = DType("BF16", 16, 3, "bfloat16", False, Layout(16, 7, 127, 0x7F7F, 0x7FC0))
F8_E4M3 = DType("F8_E4M3", 8, 4, "float8_e4m3fn", False, Layout(8, 3, 7, 0x7E, 0x7F))
F8_E5M2 = DType("F8_E5M2", 8, 5, "float8_e5m2", False, Layout(8, 2, 15, 0x7B, 0x7E))

Q8_0 = DType("Q8_0", 0, block=(32, 34))  # of GGUF files: int8 codes behind an F16 scale

DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        *(F64, F32, F16, BF16, F8_E4M3, F8_E5M2),
        DType("BOOL", 8, None, "bool", True),
        DType("U8", 8, None, "uint8", True),
        DType("I8", 8, None, "int8", True),
        DType("U16", 16, None, "uint16", True),
        DType("I16", 16, None, "int16", True),
        DType("U32", 32, None, "uint32", True),
        DType("I32", 32, None, "int32", True),
        DType("U64", 64, None, "uint64", True),
        DType("I64", 64, None, "int64", True),
        DType("C64", 64, None, "complex64", True),
        DType("F8_E8M0", 8, None, "float8_e8m0fnu"),
        DType("F8_E4M3FNUZ", 8, None, "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 8, None, "float8_e5m2fnuz"),
        *(DType("F4", 4), DType("F6_E2M3", 6), DType("F6_E3M2", 6)),
    )
}
MERGING = tuple(d for d in DTYPES.values() if d.merges)  # in the order of their codes
CODE_BYTES = tuple(d.bits // 8 for d in MERGING)  # of an element, by code

DTYPE_NAMES = tuple(d.library_name for d in MERGING)  # for messages

# What recipes and command lines may call a dtype, beside its tag in either case.
_ALIASES = {d.library_name: d for d in MERGING} | {
    "double": F64, "float": F32, "fp32": F32, "half": F16, "fp16": F16,
}  # fmt: skip


def promoted(dtypes: Iterable[DType]) -> DType:
    """The smallest dtype that holds the values of all of these merging dtypes: what torch promotes them to.

    torch promotes no float8; two kinds of them are held by bfloat16, and one of them by every wider dtype.
    """
    kinds = set(dtypes)
    if len(kinds) == 1:
        return kinds.pop()
    if F64 in kinds:
        return F64
    return F32 if F32 in kinds or {F16, BF16} <= kinds else F16 if F16 in kinds else BF16


def parse_dtype(text: str) -> DType | None:
    """The merging dtype called `text` (`bf16`, `BF16`, `bfloat16`, `torch.bfloat16`), or None."""
    name = text.strip().removeprefix("torch.")
    dtype = _ALIASES.get(name.lower()) or DTYPES.get(name.upper())
    return dtype if dtype and dtype.merges else None


def parse_stored(text: str) -> DType | None:
    """The dtype called `text` in which outputs are stored: a merging one, or `q8_0`, which GGUF files have; or None."""
    return Q8_0 if text.strip().upper() == Q8_0.name else parse_dtype(text)
