"""From the keys of a recipe to its sections, parts and sources: `models`, `slices`, `modules` and `base_model`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fastinterp.errors import MethodError
from fastinterp.methods import Method, shown
from fastinterp.recipe.document import Document
from fastinterp.recipe.faults import Faults
from fastinterp.recipe.parameters import TOP, Levels
from fastinterp.recipe.parts import Level, Part, Section, Source
from fastinterp.recipe.references import model_name, not_beside
from fastinterp.recipe.schema import Entry, Layers, Module, Reference, Slice, Wish, converted

T = TypeVar("T")

# What to take where a method takes fewer models than there are.
_FOR_MORE = {
    "passthrough": "`linear`, or `slices`",
    "slerp": "`multislerp`, `karcher`",
    "nuslerp": "`multislerp`, `karcher`",
    "expo": "`task_arithmetic`",
}


class Builder:
    """Reads what is to be merged out of one document.

    earlier     names of the documents above
    models      name of every model, as often as it is used listed once: the base first, if the method has one
    base_model  the recipe's, or None
    base        the same, if the method takes a base
    """

    def __init__(self, document: Document, wish: Wish, method: Method, earlier: Sequence[str], faults: Faults):
        self.document, self.wish, self.method, self.earlier, self.faults = document, wish, method, earlier, faults
        self.models: list[str] = []
        self.levels = Levels(document, method, faults)
        self.base_model: str | None = None
        if wish.base_model is not None:
            with faults:
                self.base_model = self._reference(wish.base_model, "$.base_model")
        self.base = self.base_model if method.base != "none" else None
        if self.base is not None:
            self._index(self.base)
        self.top: Level = self.levels.level(wish.parameters, TOP)

    def sections(self) -> tuple[Section, ...]:
        """Raises: RecipeError; MethodError, if the models do not suit the method."""
        found: tuple[Section, ...] = ()
        with self.faults:
            found = self._sections()
        if not found:
            self.levels.unsure = True
        if self.wish.modules is not None and self.base_model is not None:
            self._index(self.base_model)  # it has what no module names
        self.levels.finish(tuple(part for section in found for part in section.parts))
        return found

    def _sections(self) -> tuple[Section, ...]:
        wish = self.wish
        given = [key for key in ("models", "slices", "modules") if getattr(wish, key) is not None]
        if len(given) > 1:
            message = f"`{given[0]}` and `{given[1]}` exclude each other: give one of `models`, `slices`, `modules`"
            raise self.document.error(message, at=f"$.{given[1]}")
        if not given:
            message = "the key `models` is missing (or `slices`, or `modules`)"
            raise self.document.error(message)
        if wish.modules is None:
            return self._section(None, wish.models, wish.slices, (self.top,), "$")
        if not wish.modules:
            raise self.document.error("`modules` names no module", "$.modules")
        found: list[Section] = []
        for name, value in wish.modules.items():
            with self.faults:
                found += self._module(name, value)
        return tuple(found)

    def _module(self, name: str, value: Any) -> tuple[Section, ...]:
        path = f"$.modules.{name}"
        if not name.strip("."):
            raise self.document.error("the name of a module must not be empty", "$.modules", at=path)
        module = converted(self.document, value, Module, path, self.faults)
        if module is None:
            self.levels.unsure = True
            return ()
        if (module.models is None) == (module.slices is None):
            raise self.document.error("a module needs one of `models` and `slices`", path)
        own = self.levels.level(module.parameters, f"{path}.parameters")
        return self._section(name, module.models, module.slices, (own, self.top), path)

    def _section(
        self,
        name: str | None,
        models: list[Any] | None,
        slices: list[Any] | None,
        levels: tuple[Level, ...],
        path: str,
    ) -> tuple[Section, ...]:
        if slices is not None and not slices:
            raise self.document.error("`slices` lists no slice", f"{path}.slices")
        parts: list[Part | None] = []
        if models is not None:
            with self.faults:
                parts.append(self._whole(models, levels, f"{path}.models"))
        for i, value in enumerate(slices or ()):
            with self.faults:
                parts.append(self._slice(value, levels, f"{path}.slices[{i}]"))
        found = tuple(part for part in parts if part is not None)
        if len(found) < (1 if slices is None else len(slices)):
            self.levels.unsure = True
        return (Section(name, found, slices is not None, path),) if found else ()

    def _items(self, values: Sequence[Any], kind: type[T], path: str) -> list[tuple[T, str]]:
        """Each item of a list, and its path."""
        found = []
        for i, value in enumerate(values):
            item = converted(self.document, value, kind, f"{path}[{i}]", self.faults)
            if item is None:
                self.levels.unsure = True
            else:
                found.append((item, f"{path}[{i}]"))
        return found

    def _whole(self, values: list[Any], levels: tuple[Level, ...], path: str) -> Part | None:
        """Whole models: the base is one of them, listed or not."""
        if not values:
            raise self.document.error("`models` lists no model", path)
        entries = self._items(values, Entry, path)
        remedy = "List a model once, with the weights added up"
        listed = self._listed([(entry.model, at) for entry, at in entries], remedy)
        sources = [Source(i, self.models[i], None, {}, at) for i, (_, at) in zip(listed, entries, strict=True)]
        if self.base is not None and self._index(self.base) not in listed:
            sources.append(Source(self._index(self.base), self.base, None, {}, "$.base_model"))
        whole = len(entries) == len(values)
        return self._part(sources, [e.parameters for e, _ in entries], self.base, levels, path, whole=whole)

    def _slice(self, value: Any, levels: tuple[Level, ...], path: str) -> Part | None:
        """As many layers of each source. A base that is not among several sources has the same layers as they."""
        wish = converted(self.document, value, Slice, path, self.faults)
        if wish is None:
            self.levels.unsure = True
            return None
        if not wish.sources:
            raise self.document.error("`sources` lists no model", f"{path}.sources")
        own = self.levels.level(wish.parameters, f"{path}.parameters")
        base = self.base
        if wish.base_model is not None:
            base = self._reference(wish.base_model, f"{path}.base_model")
            if self.method.base == "none":
                message = f"`base_model` of a slice is never used here: `{self.method.name}` has no base. Remove it"
                raise self.document.error(message, path, at=f"{path}.base_model")
        entries = self._items(wish.sources, Layers, f"{path}.sources")
        remedy = "mergekit would drop one of them. Give it to another slice"
        listed = self._listed([(entry.model, at) for entry, at in entries], remedy)
        ranges = self._ranges(entries)
        sources = [
            Source(i, self.models[i], span, {}, at) for i, span, (_, at) in zip(listed, ranges, entries, strict=True)
        ]
        if base is not None and len(sources) > 1 and self._index(base) not in listed:
            if len(set(ranges)) > 1:
                message = f"it is not clear which layers of the base, {shown(base)}, belong here"
                message = f"{message}. List it among the sources, with its `layer_range`"
                raise self.document.error(message, path)
            sources.append(Source(self._index(base), base, ranges[0], {}, path))
        whole = len(entries) == len(wish.sources)
        return self._part(
            sources, [e.parameters for e, _ in entries], base, (own, *levels), path, sliced=True, whole=whole
        )

    def _part(
        self,
        sources: list[Source],
        given: Sequence[Mapping[str, Any] | None],
        base: str | None,
        levels: tuple[Level, ...],
        path: str,
        *,
        sliced: bool = False,
        whole: bool = True,
    ) -> Part:
        """The sources, the base first, with the parameters that stand at those that are listed.

        whole   none of them was left out for an error
        """
        at_base = None if base is None else self._index(base)
        alone = len(sources) == 1 and (sliced or path.startswith("$.modules."))
        copies = alone and (self.method.models[0] > 1 or at_base is not None)
        found = []
        for i, source in enumerate(sources):
            own: Level = {}
            if i < len(given):
                never = f"{shown(source.name)} is the base of the merge" if source.model == at_base else None
                never = f"{shown(source.name)} alone is copied" if copies else never
                own = self.levels.level(given[i], f"{source.path}.parameters", own=True, never=never)
            found.append(Source(source.model, source.name, source.layers, own, source.path))
        found.sort(key=lambda source: source.model != at_base)
        if not copies:
            if self.method.base == "required" and base is None and self.wish.base_model is None:
                what = "the model that the others were made from, or one of them"
                message = f"`{self.method.name}` needs the key `base_model`: {what}"
                raise self.document.error(message, at="$.merge_method", kind=MethodError)
            if whole:
                self._count(len(found), path)
        return Part(tuple(found), at_base is not None and not copies, levels, copies, path)

    def _count(self, n: int, path: str) -> None:
        low, high = self.method.models
        if not low <= n <= high:
            count = f"exactly {low}" if low == high else f"{low} to {high}"
            what = "model" if high == 1 else "models"
            of = "" if self.method.base == "none" else ", the base included"
            message = f"`{self.method.name}` takes {count} {what}{of}, got {n}"
            if n > high and self.method.name in _FOR_MORE:
                message += f". For more: {_FOR_MORE[self.method.name]}"
            raise self.document.error(message, path, kind=MethodError)

    def _listed(self, given: Sequence[tuple[str | Reference, str]], remedy: str) -> list[int]:
        """Indices of the models, each of them once."""
        first: dict[str, str] = {}
        found = []
        for reference, path in given:
            name = self._reference(reference, f"{path}.model")
            at = first.setdefault(os.path.normpath(name), path)
            if at != path:
                raise self.document.error(f"{shown(name)} is already listed as {at}. {remedy}", path)
            found.append(self._index(name))
        return found

    def _ranges(self, entries: Sequence[tuple[Layers, str]]) -> list[tuple[int, int]]:
        """The `layer_range` of each source: all of the same length."""
        found: list[tuple[int, int]] = []
        for source, path in entries:
            given, at = source.layer_range, f"{path}.layer_range"
            if len(given) != 2:
                raise self.document.error(f"`layer_range` is [first, end], got {shown(given)}", at)
            first, end = given
            if first < 0 or end < 0:
                message = f"`layer_range` counts from the first layer, 0; got {shown(given)}"
                raise self.document.error(f"{message}. Negative numbers have no meaning", at)
            if first >= end:
                raise self.document.error(f"`layer_range` [first, end) has no layer in it, got {shown(given)}", at)
            found.append((first, end))
            length = found[0][1] - found[0][0]
            if end - first != length:
                message = "the sources of a slice must have the same number of layers"
                raise self.document.error(f"{message}: {end - first} here, {length} in {entries[0][1]}", at)
        return found

    def _reference(self, given: str | Reference, path: str) -> str:
        name = model_name(self.document, given, path)
        if name not in self.earlier:
            not_beside(self.document, name, path)
        return name

    def _index(self, name: str) -> int:
        """Of the model in `models`, which gets it if it is new."""
        key = os.path.normpath(name)
        for i, known in enumerate(self.models):
            if os.path.normpath(known) == key:
                return i
        self.models.append(name)
        return len(self.models) - 1
