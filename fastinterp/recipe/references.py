"""Models as recipes name them: path or Hub id, revision, adapters. Parsed and compared here only; opened elsewhere."""

from __future__ import annotations

import os

import msgspec

from fastinterp.messages import shown
from fastinterp.recipe.document import Document
from fastinterp.recipe.schema import ModelPath, Reference


class ModelRef(msgspec.Struct, frozen=True, eq=False):
    """A model as a recipe names it: a value. str() is its text form, which messages, receipts and model cards show.

    path      a folder, a .safetensors file or a Hub id, as it was written
    revision  of a Hub id; None: its default branch
    adapters  of the model, in the order in which they are added; always empty, as `+` is refused

    Two are equal, if their text forms are the same normalised path: `models/a` and `./models/a/` are.
    """

    path: str
    revision: str | None = None
    adapters: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> ModelRef:
        """The model of a text form: `path` or `path@revision`."""
        path, at, revision = text.rpartition("@")
        return cls(path, revision) if at else cls(text)

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return "+".join((f"{self.path}{revision}", *self.adapters))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelRef) and os.path.normpath(str(self)) == os.path.normpath(str(other))

    def __hash__(self) -> int:
        return hash(os.path.normpath(str(self)))


def model_ref(document: Document, written: str | Reference, path: str) -> ModelRef:
    """The model that a recipe names at `path`, by its text form or by the long form `{model: {path, revision}}`.

    Raises: RecipeError, if the name is empty, has an adapter or more than one revision.
    """
    if isinstance(written, Reference):
        if isinstance(written.model, str):
            return model_ref(document, written.model, f"{path}.model")
        return _of_long_form(document, written.model, f"{path}.model")
    if not written.strip():
        raise document.error("the name of a model must not be empty", path)
    instead = "If it belongs to the path, write `{model: {path: ...}}` for the name"
    if "+" in written:
        raise document.error(f"a LoRA behind `+` is not supported yet: merge it into its model first. {instead}", path)
    if written.count("@") > 1:
        raise document.error(f"{shown(written)} has more than one `@`. {instead}", path)
    return ModelRef.of(written)


def _of_long_form(document: Document, written: ModelPath, path: str) -> ModelRef:
    if not written.path.strip() or written.revision == "":
        raise document.error("`path` and `revision` must not be empty", path)
    return ModelRef(written.path, written.revision)


def refuse_beside(document: Document, model: ModelRef, path: str) -> None:
    """Relative paths start at the current folder, as mergekit's do: say so where the recipe's folder was meant.

    Raises: RecipeError, if there is such a folder beside the recipe, and none where the name says.
    """
    name, folder = str(model), os.path.dirname(document.file or "")
    beside = os.path.join(folder, name)
    if folder and not os.path.isabs(name) and os.path.exists(beside) and not os.path.exists(name):
        raise document.error(
            f"there is no {shown(name)} in the current folder, where relative paths start, but there is one beside the "
            f"recipe. Write '{beside}', or run in '{folder}'",
            path,
        )
