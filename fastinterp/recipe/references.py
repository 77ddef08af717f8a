"""References to models: `path`, `name@revision`, and the long forms. Nothing is opened."""

from __future__ import annotations

import os

from fastinterp.methods import shown
from fastinterp.recipe.document import Document
from fastinterp.recipe.schema import Place, Reference


def model_name(document: Document, given: str | Reference, path: str) -> str:
    """A model reference as one string: a path or Hub id, with `@revision` if there is one."""
    if isinstance(given, Reference):
        return _placed(document, given.model, f"{path}.model")
    if not given.strip():
        raise document.error("the name of a model must not be empty", path)
    instead = "If it belongs to the path, write `{model: {path: ...}}` for the name"
    if "+" in given:
        raise document.error(f"a LoRA behind `+` is not supported yet: merge it into its model first. {instead}", path)
    if given.count("@") > 1:
        raise document.error(f"{shown(given)} has more than one `@`. {instead}", path)
    return given


def _placed(document: Document, given: str | Place, path: str) -> str:
    if isinstance(given, str):
        return model_name(document, given, path)
    if not given.path.strip() or given.revision == "":
        raise document.error("`path` and `revision` must not be empty", path)
    return given.path if given.revision is None else f"{given.path}@{given.revision}"


def same_model(a: str, b: str) -> bool:
    """Whether two names in a recipe are the same model: `models/a` and `./models/a/` are."""
    return os.path.normpath(a) == os.path.normpath(b)


def not_beside(document: Document, name: str, path: str) -> None:
    """Relative paths start at the current folder, as mergekit's do: say so where the recipe's folder was meant.

    Raises: RecipeError, if there is such a folder beside the recipe, and none where the name says.
    """
    folder = os.path.dirname(document.file or "")
    beside = os.path.join(folder, name)
    if folder and not os.path.isabs(name) and os.path.exists(beside) and not os.path.exists(name):
        raise document.error(
            f"there is no {shown(name)} in the current folder, where relative paths start, but there is one beside the "
            f"recipe. Write '{beside}', or run in '{folder}'",
            path,
        )
