"""Where the errors of a recipe go: the first one is raised, or all of them are collected."""

from __future__ import annotations

from types import TracebackType

from fastinterp.errors import RecipeError, ShapeError


class ErrorCollector:
    """A context manager round each thing that can be wrong by itself: `with collector:`.

    Without `collect` every exception passes through. With it, a RecipeError or ShapeError ends the block, is added to
    `errors`, and the code after the block runs: what the block would have set must have a value before.
    """

    def __init__(self, *, collect: bool = False):
        self.collect = collect
        self.errors: list[RecipeError | ShapeError] = []

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not self.collect or not isinstance(error, (RecipeError, ShapeError)):
            return False
        self.errors.append(error)
        return True
