"""The storage dtypes, named as in safetensors. A leaf: imports nothing of fastinterp.

A new dtype touches this table and csrc/dtypes.h.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    name: str  # safetensors tag
    bits: int  # per element; 4 and 6 occur
    code: int | None = None  # its number in csrc/dtypes.h; None: stored and copied, never merged

    @property
    def merges(self) -> bool:
        """True for the floating dtypes that the kernels widen and narrow."""
        return self.code is not None

    def nbytes(self, numel: int) -> int | None:
        """Bytes of `numel` packed elements, or None if they do not fill whole bytes."""
        bits = self.bits * numel
        return None if bits % 8 else bits // 8

    def __str__(self) -> str:
        return self.name


F64, F32, F16, BF16 = DType("F64", 64, 0), DType("F32", 32, 1), DType("F16", 16, 2), DType("BF16", 16, 3)
F8_E4M3, F8_E5M2 = DType("F8_E4M3", 8, 4), DType("F8_E5M2", 8, 5)

DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        F64, F32, F16, BF16, F8_E4M3, F8_E5M2,
        DType("BOOL", 8), DType("U8", 8), DType("I8", 8), DType("U16", 16), DType("I16", 16), DType("U32", 32),
        DType("I32", 32), DType("U64", 64), DType("I64", 64), DType("C64", 64), DType("F8_E8M0", 8), DType("F4", 4),
        DType("F6_E2M3", 6), DType("F6_E3M2", 6), DType("F8_E4M3FNUZ", 8), DType("F8_E5M2FNUZ", 8),
    )
}  # fmt: skip

# Bytes of an element, by the code of its dtype: of those that merge.
CODE_BYTES = tuple(d.bits // 8 for d in sorted((d for d in DTYPES.values() if d.merges), key=lambda d: d.code or 0))

# What recipes and command lines may call a dtype, beside its tag in either case.
_ALIASES = {
    "float64": F64, "double": F64, "float32": F32, "float": F32, "float16": F16, "half": F16, "fp16": F16,
    "bfloat16": BF16, "fp32": F32, "float8_e4m3fn": F8_E4M3, "float8_e5m2": F8_E5M2,
}  # fmt: skip


def parse_dtype(text: str) -> DType | None:
    """The merging dtype called `text` (`bf16`, `BF16`, `bfloat16`, `torch.bfloat16`), or None."""
    name = text.strip().removeprefix("torch.")
    found = _ALIASES.get(name.lower()) or DTYPES.get(name.upper())
    return found if found and found.merges else None
