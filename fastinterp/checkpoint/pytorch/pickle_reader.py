"""Reads a pickle without executing anything: containers, numbers and strings, and what the caller makes of names.

Opcodes: the comments of CPython's Lib/pickletools.py, of the protocols that torch.save can be asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from fastinterp.checkpoint.pytorch.pickle_machine import Calls, Foreign, Machine


def read_pickle(data: bytes, calls: Calls, file: str) -> Any:
    """The value of the pickle `data`, which is in `file`.

    Containers become dict, list, tuple; a set, and a key that is no plain value, a `Foreign`. Nothing recurses, and
    memory is bounded by the number of opcodes.
    Raises: CheckpointError, if it is damaged, too large, or has what is not read.
    """
    machine = Machine(data, calls, file)
    try:
        return machine.run(_OPCODES)
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, ValueError, TypeError, OverflowError) as error:
        what = type(error).__name__
        machine.fail(f"it is damaged at byte {machine.at} ({what})")


_U1, _U2, _U4, _U8, _I4, _F8 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<Q", "<i", ">d"))


def _constant(make: Callable[[], Any]) -> Callable[[Machine], None]:
    def step(r: Machine) -> None:
        r.stack.append(make())

    return step


def _plain(form: struct.Struct) -> Callable[[Machine], None]:
    """Pushes a number of a fixed size."""

    def step(r: Machine) -> None:
        r.stack.append(form.unpack_from(r.data, r.at)[0])
        r.at += form.size

    return step


def _counted(form: struct.Struct, decode: Callable[[bytes], Any]) -> Callable[[Machine], None]:
    """Pushes what `decode` makes of as many bytes as a number before them says."""

    def step(r: Machine) -> None:
        r.stack.append(decode(r.take(r.number(form))))

    return step


def _utf8(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _latin1(raw: bytes) -> str:
    return raw.decode("latin-1")


def _get(form: struct.Struct) -> Callable[[Machine], None]:
    def step(r: Machine) -> None:
        r.stack.append(r.memo[form.unpack_from(r.data, r.at)[0]])
        r.at += form.size

    return step


def _put(form: struct.Struct) -> Callable[[Machine], None]:
    def step(r: Machine) -> None:
        r.memo[form.unpack_from(r.data, r.at)[0]] = r.stack[-1]
        r.at += form.size

    return step


# By opcode.
_OPCODES: dict[int, Callable[[Machine], None]] = {
    0x80: lambda r: r.skip(1),  # PROTO
    0x95: lambda r: r.skip(8),  # FRAME
    ord("N"): _constant(lambda: None),
    0x88: _constant(lambda: True),
    0x89: _constant(lambda: False),
    ord(")"): _constant(tuple),
    ord("]"): _constant(list),
    ord("}"): _constant(dict),
    0x8F: _constant(lambda: Foreign("builtins.set")),  # EMPTY_SET
    ord("I"): Machine.text_number,
    ord("L"): Machine.text_long,
    ord("F"): lambda r: r.stack.append(float(r.line())),
    ord("J"): _plain(_I4),
    ord("K"): _plain(_U1),
    ord("M"): _plain(_U2),
    ord("G"): _plain(_F8),
    0x8A: lambda r: r.long(_U1),  # LONG1
    0x8B: lambda r: r.long(_I4),  # LONG4
    ord("S"): Machine.quoted,
    ord("V"): lambda r: r.stack.append(r.line().decode("raw-unicode-escape")),
    ord("X"): _counted(_U4, _utf8),
    0x8C: _counted(_U1, _utf8),  # SHORT_BINUNICODE
    0x8D: _counted(_U8, _utf8),  # BINUNICODE8
    ord("T"): _counted(_U4, _latin1),
    ord("U"): _counted(_U1, _latin1),
    ord("B"): _counted(_U4, bytes),
    ord("C"): _counted(_U1, bytes),
    0x8E: _counted(_U8, bytes),  # BINBYTES8
    0x96: _counted(_U8, bytes),  # BYTEARRAY8
    ord("("): Machine.mark,
    ord("0"): Machine.pop,
    ord("1"): Machine.pop_mark,
    ord("2"): Machine.duplicate,
    ord("t"): Machine.tuple_of_mark,
    ord("l"): Machine.list_of_mark,
    ord("d"): Machine.dict_of_mark,
    0x85: lambda r: r.tuple_of(1),
    0x86: lambda r: r.tuple_of(2),
    0x87: lambda r: r.tuple_of(3),
    0x91: Machine.frozen_set,
    ord("a"): Machine.append,
    ord("e"): Machine.appends,
    0x90: Machine.appends,  # ADDITEMS: a set is a Foreign
    ord("s"): Machine.set_item,
    ord("u"): Machine.set_items,
    ord("p"): lambda r: r.put(r.integer(r.line())),
    ord("q"): _put(_U1),
    ord("r"): _put(_U4),
    0x94: lambda r: r.put(len(r.memo)),  # MEMOIZE
    ord("g"): lambda r: r.get(r.integer(r.line())),
    ord("h"): _get(_U1),
    ord("j"): _get(_U4),
    ord("c"): Machine.global_name,
    0x93: Machine.stack_global,
    ord("R"): Machine.reduce,
    0x81: Machine.reduce,  # NEWOBJ: the same for values
    0x92: Machine.new_with_keywords,  # NEWOBJ_EX
    ord("b"): Machine.build,
    ord("i"): Machine.instance,
    ord("Q"): Machine.persistent,
}
