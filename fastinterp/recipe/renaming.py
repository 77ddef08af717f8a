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
# What stands around a path that is the start or the end of another one.
_BEFORE, _BEHIND = re.compile(r"[\w./~-]"), re.compile(r"[\w-]|/\w|\.\w")


class ShownNames(msgspec.Struct, frozen=True):
    """The names that are shown, by the path as the recipe has it. Paths that are missing are shown as they are.

    values_only  recipes are shown as their values alone, without comments
    """

    names: Mapping[str, str]
    values_only: bool = False

    def model(self, text: str) -> str:
        """A model in its text form, `path@revision+adapter:0.5`, with the names that are shown."""
        return self._replaced(text, [path for path in paths_in(text) if path in self.names])

    def recipe(self, text: str) -> str:
        """The text of a recipe, with the names that are shown."""
        if not self.names and not self.values_only:
            return text
        try:
            values = [document.value for document in from_text(text)]
            wanted = [renamed(value, self.model) for value in values]
            replaced = self._replaced(text, self.names)
            if not self.values_only and [document.value for document in from_text(replaced)] == wanted:
                return replaced
        except RecipeError:
            return self._replaced(text, self.names)
        return as_yaml(wanted)

    def _replaced(self, text: str, paths: Iterable[str]) -> str:
        for path in sorted(paths, key=len, reverse=True):
            text = _with_path(text, path, self.names[path])
        return text


def _with_path(text: str, path: str, shown: str) -> str:
    """The text with another name for a path, where that stands as a whole. No expression with the path in it: of
    thousands of models, each would be compiled, and tried at every character.
    """
    parts, done, at = [], 0, text.find(path)
    while at >= 0:
        end = at + len(path)
        if not _BEFORE.match(text[max(0, at - 1) : at]) and not _BEHIND.match(text, end):
            parts += [text[done:at], shown]
            done = end
        else:
            end = at + 1
        at = text.find(path, max(end, at + 1))
    return "".join([*parts, text[done:]])


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
    ends: dict[str, int] = {}  # the last parts -> how many paths end so
    for parts in {normal[path]: parts for path, parts in absolute.items()}.values():
        for count in range(1, len(parts) + 1):
            name = "/".join(parts[-count:])
            ends[name] = ends.get(name, 0) + 1
    shown: dict[str, str] = {}
    for path, parts in absolute.items():
        for count in range(1, len(parts) + 1):
            name = "/".join(parts[-count:])
            if name not in taken and ends[name] == 1:
                break
        shown[path] = name if parts else path
    return shown
