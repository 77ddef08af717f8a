"""Recipes with other names for their models: those that receipts and model cards show."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from fastinterp.errors import RecipeError
from fastinterp.recipe.document import as_yaml, from_text
from fastinterp.recipe.references import ModelRef

# Keys whose values are words, whatever models are called.
_WORDS = {"merge_method", "name", "dtype", "out_dtype", "rounding", "missing", "channels", "quantize", "out", "filter"}
_LONGEST = 4096  # characters of a path
_AROUND = r"(?<![\w./~-]){}(?![\w-]|/\w|\.\w)"  # a path as a whole, not the start or the end of another one


class ShownNames(msgspec.Struct, frozen=True):
    """The names that are shown, by the path as the recipe has it. Paths that are missing are shown as they are.

    values_only  recipes are shown as their values alone, without comments
    """

    names: Mapping[str, str]
    values_only: bool = False

    def model(self, text: str) -> str:
        """A model in its text form, `path@revision+adapter:0.5`, with the names that are shown."""
        paths = paths_in(text)
        return self._replaced(text) if any(path in self.names for path in paths) else text

    def recipe(self, text: str) -> str:
        """The text of a recipe, with the names that are shown."""
        if not self.names and not self.values_only:
            return text
        try:
            values = [document.value for document in from_text(text)]
            wanted = [renamed(value, self.model) for value in values]
            replaced = self._replaced(text)
            if not self.values_only and [document.value for document in from_text(replaced)] == wanted:
                return replaced
        except RecipeError:
            return self._replaced(text)
        return as_yaml(wanted)

    def _replaced(self, text: str) -> str:
        for path in sorted(self.names, key=len, reverse=True):
            shown = self.names[path]
            text = re.sub(_AROUND.format(re.escape(path)), lambda _, shown=shown: shown, text)  # type: ignore[misc]
        return text


def strings(value: Any) -> Iterator[str]:
    """All strings in the values of a recipe that may name a model: one line, no longer than a path."""
    if isinstance(value, str):
        if "\n" not in value and len(value) < _LONGEST:
            yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def renamed(value: Any, name: Callable[[str], str]) -> Any:
    """The values of a recipe with `name` of all `strings` in it."""
    if isinstance(value, str):
        return name(value) if "\n" not in value and len(value) < _LONGEST else value
    if isinstance(value, list):
        return [renamed(item, name) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: item if key in _WORDS else renamed(item, name) for key, item in value.items()}


def paths_in(text: str) -> list[str]:
    """The paths of a model in its text form: its own, and those of its adapters."""
    if "/" not in text and "+" not in text and "@" not in text and ":" not in text:
        return [text]
    ref = ModelRef.of(text)
    return [ref.path, *(adapter.path for adapter in ref.adapters)]


def is_absolute(path: str) -> bool:
    return os.path.isabs(path) or path.startswith("~")


def shortened(names: Sequence[str]) -> list[str]:
    """Models in their text form, as receipts name them."""
    shown = ShownNames(short_names([path for name in names for path in paths_in(name)]))
    return [shown.model(name) for name in names]


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Absolute path -> its last part, with as many before it as tell it from all others."""
    normal = {path: os.path.normpath(path) for path in paths}
    absolute = {path: [part for part in normal[path].split("/") if part] for path in normal if is_absolute(path)}
    taken = {os.path.normpath(path) for path in normal if path not in absolute}
    shown: dict[str, str] = {}
    for path, parts in absolute.items():
        others = [p for other, p in absolute.items() if normal[other] != normal[path]]
        for count in range(1, len(parts) + 1):
            name = "/".join(parts[-count:])
            if name not in taken and not any(p[-count:] == parts[-count:] for p in others):
                break
        shown[path] = name if parts else path
    return shown
