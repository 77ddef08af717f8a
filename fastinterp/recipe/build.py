"""From the keys of a recipe to its sections, parts and sources: `models`, `slices`, `modules` and `base_model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fastinterp.errors import MethodError
from fastinterp.methods import Method, shown
from fastinterp.recipe.document import Document
from fastinterp.recipe.faults import Faults
from fastinterp.recipe.parameters import TOP, Levels
from fastinterp.recipe.parts import Level, Part, Section, Source
from fastinterp.recipe.references import ModelRef, model_ref, refuse_beside
from fastinterp.recipe.schema import Entry, Layers, Module, Reference, Slice, Wish, converted

T = TypeVar("T")
Item = TypeVar("Item", Entry, Layers)

# Keys that say what is merged, and what is said of each where it is empty.
_EMPTY = {
    "models": "`models` lists no model. Write `- model: NAME` for each",
    "slices": "`slices` lists no slice. Write `- sources: [{model: NAME, layer_range: [0, 16]}]` for each",
    "modules": "`modules` names no module. Write `NAME: {models: [{model: NAME}]}` for each",
}


class Builder:
    """Reads what is to be merged out of one document.

    earlier     names of the documents above
    models      every model that is used, once: the base first, if the method has one
    base_model  the recipe's, or None
    base        the same, if the method takes a base
    """

    def __init__(
        self, document: Document, wish: Wish, method: Method, earlier: Sequence[str], faults: Faults, *,
        guessed: bool = False,
    ):  # fmt: skip
        """guessed: the method only stands for one that is not known"""
        self.document, self.wish, self.method, self.earlier, self.faults = document, wish, method, earlier, faults
        self.models: list[ModelRef] = []
        self.levels = Levels(document, method, faults, guessed=guessed)
        self.base_model: ModelRef | None = None
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
        given = [key for key in _EMPTY if getattr(wish, key) is not None]
        if len(given) > 1:
            with self.faults:
                message = f"`{given[0]}` and `{given[1]}` exclude each other: give one of `models`, `slices`, `modules`"
                raise self.document.error(message, at=f"$.{given[1]}")
        if not given:
            written = [key for key in _EMPTY if key in self.document.value]
            if any(self.document.value[key] is not None for key in written):
                return ()  # of a wrong type, which is an error already
            if written:
                raise self.document.error(_EMPTY[written[0]], f"$.{written[0]}")
            raise self.document.error("the key `models` is missing (or `slices`, or `modules`)")
        found: list[Section] = []
        if wish.models is not None or wish.slices is not None:
            with self.faults:
                found += self._section(None, wish.models, wish.slices, (self.top,), "$")
        if wish.modules is not None and not wish.modules:
            raise self.document.error(_EMPTY["modules"], "$.modules")
        for name, value in (wish.modules or {}).items():
            with self.faults:
                found += self._module(name, value)
        return tuple(found) if len(given) == 1 else ()

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
            raise self.document.error(_EMPTY["slices"], f"{path}.slices")
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
            raise self.document.error(_EMPTY["models"], path)
        entries = self._listed(self._items(values, Entry, path), "List a model once, with the weights added up")
        sources = [Source(i, self.models[i], None, {}, at) for i, _, at in entries]
        if self.base is not None and self._index(self.base) not in [i for i, _, _ in entries]:
            sources.append(Source(self._index(self.base), self.base, None, {}, "$.base_model"))
        whole = len(entries) == len(values)
        part = self._part(sources, [e.parameters for _, e, _ in entries], self.base, levels, path, whole=whole)
        return part if whole else None

    def _slice(self, value: Any, levels: tuple[Level, ...], path: str) -> Part | None:
        """As many layers of each source. A base that is not among several sources has the same layers as they."""
        wish = converted(self.document, value, Slice, path, self.faults)
        if wish is None:
            self.levels.unsure = True
            return None
        if not wish.sources:
            message = "`sources` lists no model. Write `- {model: NAME, layer_range: [0, 16]}` for each"
            raise self.document.error(message, f"{path}.sources")
        own = self.levels.level(wish.parameters, f"{path}.parameters")
        base = self.base
        if wish.base_model is not None:
            base = self._reference(wish.base_model, f"{path}.base_model")
            if self.method.base == "none":
                message = f"`base_model` of a slice is never used here: `{self.method.name}` has no base. Remove it"
                raise self.document.error(message, path, at=f"{path}.base_model")
        items = self._items(wish.sources, Layers, f"{path}.sources")
        ranges = {at: span for (_, at), span in zip(items, self._ranges(items), strict=True)}
        entries = self._listed(items, "mergekit would drop one of them. Give it to another slice")
        sources = [Source(i, self.models[i], ranges[at], {}, at) for i, _, at in entries]
        whole = len(entries) == len(wish.sources) and None not in ranges.values()
        if whole and base is not None and len(sources) > 1 and self._index(base) not in [i for i, _, _ in entries]:
            if len(set(ranges.values())) > 1:
                message = f"it is not clear which layers of the base, {shown(str(base))}, belong here"
                message = f"{message}. List it among the sources, with its `layer_range`"
                raise self.document.error(message, path)
            sources.append(Source(self._index(base), base, sources[0].layers, {}, path))
        given = [e.parameters for _, e, _ in entries]
        part = self._part(sources, given, base, (own, *levels), path, sliced=True, whole=whole)
        return part if whole else None

    def _part(
        self,
        sources: list[Source],
        given: Sequence[Mapping[str, Any] | None],
        base: ModelRef | None,
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
                never = f"{shown(str(source.ref))} is the base of the merge" if source.model == at_base else None
                never = f"{shown(str(source.ref))} alone is copied" if copies else never
                own = self.levels.level(given[i], f"{source.path}.parameters", own=True, never=never)
            found.append(Source(source.model, source.ref, source.layers, own, source.path))
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
            if n > high and self.method.for_more:
                message += f". For more: {self.method.for_more}"
            raise self.document.error(message, path, kind=MethodError)

    def _listed(self, items: Sequence[tuple[Item, str]], remedy: str) -> list[tuple[int, Item, str]]:
        """(index of the model, item, path) of each that names a model that no other does."""
        first: dict[ModelRef, str] = {}
        found = []
        for item, path in items:
            before = len(self.faults.found)
            with self.faults:
                model = self._reference(item.model, f"{path}.model")
                at = first.setdefault(model, path)
                if at != path:
                    raise self.document.error(f"{shown(str(model))} is already listed as {at}. {remedy}", path)
                found.append((self._index(model), item, path))
            if len(self.faults.found) > before:
                self.levels.unsure = True
                self.levels.level(item.parameters, f"{path}.parameters", own=True)
        return found

    def _ranges(self, entries: Sequence[tuple[Layers, str]]) -> list[tuple[int, int] | None]:
        """The `layer_range` of each source, all of the same length; None for those whose faults were gathered."""
        found: list[tuple[int, int] | None] = []
        lead: tuple[int, str] | None = None
        for source, path in entries:
            span: tuple[int, int] | None = None
            with self.faults:
                first, end = self._range(source.layer_range, f"{path}.layer_range")
                length, where = lead = lead or (end - first, path)
                if end - first != length:
                    message = "the sources of a slice must have the same number of layers"
                    raise self.document.error(
                        f"{message}: {shown(end - first)} here, {shown(length)} in {where}", f"{path}.layer_range"
                    )
                span = first, end
            found.append(span)
        return found

    def _range(self, given: list[int], at: str) -> tuple[int, int]:
        if len(given) != 2:
            raise self.document.error(f"`layer_range` is [first, end], got {shown(given)}", at)
        first, end = given
        if first < 0 or end < 0:
            message = f"`layer_range` counts from the first layer, 0; got {shown(given)}"
            raise self.document.error(f"{message}. Negative numbers have no meaning", at)
        if first >= end:
            raise self.document.error(f"`layer_range` [first, end) has no layer in it, got {shown(given)}", at)
        return first, end

    def _reference(self, written: str | Reference, path: str) -> ModelRef:
        model = model_ref(self.document, written, path)
        if str(model) not in self.earlier:
            refuse_beside(self.document, model, path)
        return model

    def _index(self, model: ModelRef) -> int:
        """Of the model in `models`, which gets it if it is new."""
        if model not in self.models:
            self.models.append(model)
        return self.models.index(model)
