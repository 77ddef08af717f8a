"""The stack machine of pickles, without what would execute something: values in, values out.

What a pickle names stays a name, and its calls are made by the caller (`Calls`), who knows a few.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

from fastinterp.checkpoint.names import quote
from fastinterp.errors import CheckpointError

_MAX_OPCODES = 4_000_000  # about 30 for each tensor
_MAX_NUMBER = 600  # bytes or digits
_KEYS = (str, int, float, bool, bytes, type(None))


class Named:
    """A class or function by its name, `torch.FloatStorage`. It is never imported."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class Foreign:
    """What stands for an object of a class that is not read, or for a value of no use here: name says which."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class Calls(Protocol):
    """What names, and calls of what they name, are in values. Each raises CheckpointError for what is not read."""

    def named(self, name: str) -> Any: ...
    def call(self, function: Any, args: tuple[Any, ...]) -> Any: ...
    def persistent(self, reference: Any) -> Any: ...


# Why an opcode is not read, for messages.
_WHY = {
    **dict.fromkeys((0x82, 0x83, 0x84), ": it stands for a class or function by a number of copyreg's"),
    ord("o"): ": it makes an object of a class",
    ord("P"): ": torch.save writes no such references",
    0x97: ": its data would be elsewhere",
    0x98: ": its data would be elsewhere",
}


class Machine:
    """The state of a pickle's stack machine.

    stack    values since the last mark; `marked` has those before it
    memo     values by the numbers that the pickle gives them
    """

    def __init__(self, data: bytes, calls: Calls, file: str):
        self.data, self.calls, self.file = data, calls, file
        self.at = 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.known: dict[str, Any] = {}

    def run(self, opcodes: Mapping[int, Callable[[Machine], None]]) -> Any:
        """The value at the end of the pickle. opcodes: the step of each."""
        data = self.data
        for _ in range(_MAX_OPCODES):
            opcode = data[self.at]
            self.at += 1
            if opcode == 46:  # STOP
                if self.marked or len(self.stack) != 1:
                    self.fail("it is damaged: values are left over")
                return self.stack[0]
            step = opcodes.get(opcode)
            if step is None:
                self.fail(f"opcode 0x{opcode:02x} at byte {self.at - 1} is not read{_WHY.get(opcode, '')}")
            step(self)
        return self.fail(f"it has more than the allowed {_MAX_OPCODES:,} opcodes")

    def fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"its pickle is not read: {what}", file=self.file)

    # --- pieces of the data

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) != count:
            self.fail(f"it ends within a value, at byte {len(self.data)}")
        self.at += count
        return piece

    def line(self) -> bytes:
        end = self.data.index(b"\n", self.at)
        piece = self.data[self.at : end]
        self.at = end + 1
        return piece

    def number(self, form: struct.Struct) -> Any:
        value = form.unpack_from(self.data, self.at)[0]
        self.at += form.size
        return value

    def integer(self, text: bytes) -> int:
        if len(text) > _MAX_NUMBER:
            self.fail(f"a number of {len(text)} digits")
        return int(text)

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    # --- opcodes that do more than push a value

    def skip(self, count: int) -> None:
        self.at += count

    def text_number(self) -> None:
        text = self.line()
        self.stack.append(text == b"01" if text in (b"00", b"01") else self.integer(text))

    def text_long(self) -> None:
        self.stack.append(self.integer(self.line().removesuffix(b"L")))

    def long(self, form: struct.Struct) -> None:
        count = self.number(form)
        if not 0 <= count <= _MAX_NUMBER:
            self.fail(f"a number of {count} bytes")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def quoted(self) -> None:
        text = self.line()
        if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
            self.fail("a string without quotes")
        self.stack.append(Foreign("a string of Python 2") if b"\\" in text else text[1:-1].decode("latin-1"))

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def duplicate(self) -> None:
        self.stack.append(self.stack[-1])

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.stack = self.marked.pop()

    def pop_mark(self) -> None:
        self.stack = self.marked.pop()

    def global_name(self) -> None:
        module = self.line().decode()
        self.push_named(f"{module}.{self.line().decode()}")

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            self.fail("a name that is no string")
        self.push_named(f"{module}.{name}")

    def push_named(self, name: str) -> None:
        if name not in self.known:
            self.known[name] = self.calls.named(name)
        self.stack.append(self.known[name])

    def reduce(self) -> None:
        args = self.stack.pop()
        if type(args) is not tuple:
            self.fail("a call whose arguments are no tuple")
        self.stack[-1] = self.calls.call(self.stack[-1], args)

    def new_with_keywords(self) -> None:
        self.stack.pop()
        self.reduce()

    def build(self) -> None:
        self.stack.pop()
        target = self.stack[-1]
        # Of a dict it is attributes, the `_metadata` of a state dict.
        if type(target) is not dict and type(target) is not Foreign:
            self.fail(f"it sets the state of {_kind(target)}")

    def instance(self) -> None:
        self.global_name()
        self.fail(f"it makes an object of {_kind(self.stack[-1])}")

    def persistent(self) -> None:
        self.stack[-1] = self.calls.persistent(self.stack[-1])

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items_of(self.stack[-1], [key, value])

    def set_items(self) -> None:
        items = self.since_mark()
        self.set_items_of(self.stack[-1], items)

    def set_items_of(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            self.fail("a key without a value")
        if type(target) is dict:
            target.update(zip(map(_key, items[::2]), items[1::2], strict=True))
        elif type(target) is not Foreign:
            self.fail(f"it sets items of {_kind(target)}")

    def append(self) -> None:
        value = self.stack.pop()
        self.extend(self.stack[-1], [value])

    def appends(self) -> None:
        items = self.since_mark()
        self.extend(self.stack[-1], items)

    def extend(self, target: Any, items: list[Any]) -> None:
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Foreign:
            self.fail(f"it appends to {_kind(target)}")

    def dict_of_mark(self) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.set_items_of(self.stack[-1], items)

    def frozen_set(self) -> None:
        self.since_mark()
        self.stack.append(Foreign("builtins.frozenset"))

    def list_of_mark(self) -> None:
        items = self.since_mark()
        self.stack.append(items)

    def tuple_of_mark(self) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def put(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def get(self, number: int) -> None:
        self.stack.append(self.memo[number])


def _key(value: Any) -> Any:
    """A key of a dict: itself, if it is a plain value. Others, tuples of tuples say, might take long to hash."""
    if type(value) in (Named, Foreign):
        return value
    return value if type(value) in _KEYS and (type(value) is not int or abs(value) < 2**63) else Foreign("a key")


def _kind(value: Any) -> str:
    if isinstance(value, Named):
        return quote(value.name)
    return f"a value of the kind {type(value).__name__.lower()}"
