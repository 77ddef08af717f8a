"""The keys in the header of a GGUF file, with their values."""

from __future__ import annotations

import struct

import msgspec

# Types of values, by their number in the file.
U32, STRING, ARRAY, U64 = 4, 8, 9, 10
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")


class KeyValue(msgspec.Struct, frozen=True):
    """A key of the header with its value.

    kind     type of the value; of an array, ARRAY
    element  type of an array's elements; of anything else, its own type
    count    elements of an array; 1 of anything else
    raw      the value as the file has it, its type included: the same bytes mean the same in any file
    """

    key: str
    kind: int
    element: int
    count: int
    raw: bytes

    @property
    def value(self) -> int | float | bool | str | None:
        """The value; None of an array."""
        if self.kind == ARRAY:
            return None
        if self.kind == STRING:
            return self.raw[12:].decode(errors="replace")
        number: int | float | bool = struct.unpack_from(SCALARS[self.kind], self.raw, 4)[0]
        return number

    def numbers(self) -> tuple[int | float | bool, ...] | None:
        """The elements of an array of numbers; None of anything else."""
        if self.kind != ARRAY or self.element == STRING:
            return None
        return struct.unpack_from(f"<{self.count}{SCALARS[self.element][1]}", self.raw, 16)

    def describe(self) -> str:
        """The value for people; of an array, its length and type."""
        value = self.value
        if value is not None:
            return str(value)
        numbers = self.numbers() if self.count <= 8 else None
        return f"{self.count} x {_NAMES[self.element]}" if numbers is None else str(list(numbers))


class GgufHeader(msgspec.Struct, frozen=True):
    """What the header of a GGUF file says beside the tensors.

    keys       by name, in the order of the file
    alignment  of the data section and of every tensor in it, bytes
    """

    version: int
    keys: dict[str, KeyValue]
    alignment: int

    def value(self, key: str) -> int | float | bool | str | None:
        """The value of a key that is no array; None, if there is none."""
        found = self.keys.get(key)
        return None if found is None else found.value

    @property
    def architecture(self) -> str:
        return str(self.value("general.architecture") or "")

    def metadata(self) -> dict[str, str]:
        """The keys with their values for people."""
        return {key: found.describe() for key, found in self.keys.items()}
