"""Text forms of the models of a recipe."""

from __future__ import annotations

from collections.abc import Iterable

from fastinterp.recipe.references import ModelRef


def texts(models: Iterable[ModelRef]) -> tuple[str, ...]:
    """As the user wrote them, without what makes two of them equal."""
    return tuple(str(model) for model in models)
