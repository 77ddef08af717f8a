"""Where the errors of a recipe go: the first one is raised, or all of them are gathered."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from fastinterp.errors import RecipeError, ShapeError


class Faults:
    """`with faults:` around each thing that can be wrong by itself. What it would have set must have a value before.

    found   the errors so far, if they are gathered; without `gather` they pass through. RecipeError and ShapeError
    """

    def __init__(self, *, gather: bool = False):
        self.gather = gather
        self.found: list[Any] = []

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not self.gather or not isinstance(error, (RecipeError, ShapeError)):
            return False
        self.found.append(error)
        return True
