"""The calls of a method that requests something of a tensor: what a plan knows of them before data is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec


class Program(msgspec.Struct, frozen=True, eq=False):
    """The calls of a method that requests something of a tensor, or whose sum is more than plain.

    calls   one per output: the method with all of its arguments
    reads   the expected reads: what each is for, and which of the tensor's inputs it reads. Answers may change them
    whole   whether a request is about the whole model
    method  its name
    name    of the tensor, under which random masks are drawn
    seeds   from which they are drawn, one per output
    """

    calls: tuple[Callable[[], Any], ...]
    reads: tuple[tuple[str, tuple[int, ...]], ...]
    whole: bool
    method: str
    name: str
    seeds: tuple[int, ...]
