"""Builds sections, merge groups and sources from a recipe's keys `models`, `slices`, `modules` and `base_model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fastinterp.errors import MethodError
from fastinterp.messages import shown
from fastinterp.methods import Method
from fastinterp.recipe.document import Document, ErrorCollector
from fastinterp.recipe.merge_groups import Level, MergeGroup, MergeSource, Section
from fastinterp.recipe.parameters import TOP, Levels
from fastinterp.recipe.references import UNCHANGED, ModelRef, model_ref, refuse_beside
from fastinterp.recipe.schema import ModelItem, ModuleItem, RawRecipe, Reference, SliceItem, SourceItem, Unchecked

T = TypeVar("T")
Item = TypeVar("Item", ModelItem, SourceItem)

# Keys that say what is merged, and the message where one is empty.
_EMPTY = {
    "models": "`models` lists no model. Write `- model: NAME` for each",
    "slices": "`slices` lists no slice. Write `- sources: [{model: NAME, layer_range: [0, 16]}]` for each",
    "modules": "`modules` names no module. Write `NAME: {models: [{model: NAME}]}` for each",
}


class Builder:
    """Builds the sections of one document, and the list of its models.

    earlier     names of the documents above
    models      every model that is used, once: the base first, if the method has one
    base_model  the recipe's, or None
    base        the same, if the method takes a base
    levels      the parameters that were read
    """

    def __init__(
        self, document: Document, raw: RawRecipe, method: Method, earlier: Sequence[str], collector: ErrorCollector, *,
        guessed: bool = False,
    ):  # fmt: skip
        """guessed: the method is a stand-in for an unknown one"""
        self.document, self.raw, self.method, self.earlier, self.collector = document, raw, method, earlier, collector
        self.models: list[ModelRef] = []
        self._numbers: dict[ModelRef, int] = {}  # of each of them
        self.levels = Levels(document, method, collector, guessed=guessed)
        self.base_model: ModelRef | None = None
        if raw.base_model is not None:
            with collector:
                self.base_model = self._reference(raw.base_model, "$.base_model")
        self.base = self.base_model if method.base != "none" else None
        if raw.out == "lora" and raw.base_model is None and method.base == "required" and not method.walks:
            self.base = UNCHANGED
        if self.base is not None:
            self._index(self.base)
        self.top: Level = self.levels.level(raw.parameters, TOP)

    def sections(self) -> tuple[Section, ...]:
        """Raises: RecipeError; MethodError, if the models do not suit the method."""
        sections: tuple[Section, ...] = ()
        with self.collector:
            sections = self._sections()
        if not sections:
            self.levels.unsure = True
        if (self.raw.modules is not None or self.raw.missing == "base") and self.base_model is not None:
            self._index(self.base_model)  # it has what no module names, or not all models have
        self.levels.finish(tuple(group for section in sections for group in section.groups))
        return sections

    def _sections(self) -> tuple[Section, ...]:
        raw = self.raw
        keys = [key for key in _EMPTY if getattr(raw, key) is not None]
        if len(keys) > 1:
            with self.collector:
                message = f"`{keys[0]}` and `{keys[1]}` exclude each other: give one of `models`, `slices`, `modules`"
                raise self.document.error(message, at=f"$.{keys[1]}")
        if not keys:
            written = [key for key in _EMPTY if key in self.document.value]
            if any(self.document.value[key] is not None for key in written):
                return ()  # of a wrong type, which is an error already
            if written:
                raise self.document.error(_EMPTY[written[0]], f"$.{written[0]}")
            raise self.document.error("the key `models` is missing (or `slices`, or `modules`)")
        sections: list[Section] = []
        if raw.models is not None or raw.slices is not None:
            with self.collector:
                sections += self._section(None, raw.models, raw.slices, (self.top,), "$")
        if raw.modules is not None and not raw.modules:
            raise self.document.error(_EMPTY["modules"], "$.modules")
        for name, part in (raw.modules or {}).items():
            with self.collector:
                sections += self._module(name, part)
        return tuple(sections) if len(keys) == 1 else ()

    def _module(self, name: str, part: Unchecked[ModuleItem]) -> tuple[Section, ...]:
        path = part.path
        if not name.strip("./"):
            raise self.document.error("the name of a module must not be empty", "$.modules", at=path)
        module = self._checked(part)
        if module is None:
            return ()
        if (module.models is None) == (module.slices is None):
            raise self.document.error("a module needs one of `models` and `slices`", path)
        level = self.levels.level(module.parameters, f"{path}.parameters")
        return self._section(name, module.models, module.slices, (level, self.top), path)

    def _section(
        self,
        name: str | None,
        models: Sequence[Unchecked[ModelItem]] | None,
        slices: Sequence[Unchecked[SliceItem]] | None,
        levels: tuple[Level, ...],
        path: str,
    ) -> tuple[Section, ...]:
        if slices is not None and not slices:
            raise self.document.error(_EMPTY["slices"], f"{path}.slices")
        groups: list[MergeGroup | None] = []
        if models is not None:
            with self.collector:
                groups.append(self._whole_models(models, levels, f"{path}.models"))
        for part in slices or ():
            with self.collector:
                groups.append(self._slice(part, levels))
        built = tuple(group for group in groups if group is not None)
        if len(built) < (1 if slices is None else len(slices)):
            self.levels.unsure = True
        return (Section(name, built, slices is not None, path),) if built else ()

    def _items(self, parts: Sequence[Unchecked[T]]) -> list[tuple[T, str]]:
        """(item, path) of each part of a list that has a value."""
        checked = [(self._checked(part), part.path) for part in parts]
        return [(item, path) for item, path in checked if item is not None]

    def _checked(self, part: Unchecked[T]) -> T | None:
        """The value of a part, its errors reported. Without one, the parameters of the recipe are not all known."""
        value = part.checked(self.collector)
        if value is None:
            self.levels.unsure = True
        return value

    def _whole_models(
        self, parts: Sequence[Unchecked[ModelItem]], levels: tuple[Level, ...], path: str
    ) -> MergeGroup | None:
        """Whole models: the base is one of them, listed or not."""
        if not parts:
            raise self.document.error(_EMPTY["models"], path)
        listed = self._each_model_once(self._items(parts), "List a model once, with the weights added up")
        sources = [MergeSource(i, self.models[i], None, {}, at) for i, _, at in listed]
        if self.base is not None and self._index(self.base) not in [i for i, _, _ in listed]:
            sources.append(MergeSource(self._index(self.base), self.base, None, {}, "$.base_model"))
        whole = len(listed) == len(parts)
        group = self._group(sources, [item.parameters for _, item, _ in listed], self.base, levels, path, whole=whole)
        return group if whole else None

    def _slice(self, part: Unchecked[SliceItem], levels: tuple[Level, ...]) -> MergeGroup | None:
        """As many layers of each source. A base that is not among several sources has the same layers as they."""
        raw, path = self._checked(part), part.path
        if raw is None:
            return None
        if not raw.sources:
            message = "`sources` lists no model. Write `- {model: NAME, layer_range: [0, 16]}` for each"
            raise self.document.error(message, f"{path}.sources")
        level = self.levels.level(raw.parameters, f"{path}.parameters")
        if raw.residual_weight is not None:
            self.levels.warn("`residual_weight` has no effect, in mergekit neither", path, f"{path}.residual_weight")
        base = self.base
        if raw.base_model is not None:
            base = self._reference(raw.base_model, f"{path}.base_model")
            if self.method.base == "none":
                message = f"`base_model` of a slice is never used here: `{self.method.name}` has no base. Remove it"
                raise self.document.error(message, path, at=f"{path}.base_model")
        items = self._items(raw.sources)
        ranges = {at: span for (_, at), span in zip(items, self._ranges(items), strict=True)}
        listed = self._each_model_once(items, "mergekit would drop one of them. Give it to another slice")
        sources = [MergeSource(i, self.models[i], ranges[at], {}, at) for i, _, at in listed]
        whole = len(listed) == len(raw.sources) and None not in ranges.values()
        if whole and base is not None and len(sources) > 1 and self._index(base) not in [i for i, _, _ in listed]:
            if len(set(ranges.values())) > 1:
                message = f"it is not clear which layers of the base, {shown(str(base))}, belong here"
                message = f"{message}. List it among the sources, with its `layer_range`"
                raise self.document.error(message, path)
            sources.append(MergeSource(self._index(base), base, sources[0].layers, {}, path))
        parameters = [item.parameters for _, item, _ in listed]
        group = self._group(sources, parameters, base, (level, *levels), path, sliced=True, whole=whole)
        return group if whole else None

    def _group(
        self,
        sources: list[MergeSource],
        parameters: Sequence[Mapping[str, Any] | None],
        base: ModelRef | None,
        levels: tuple[Level, ...],
        path: str,
        *,
        sliced: bool = False,
        whole: bool = True,
    ) -> MergeGroup:
        """The sources, the base first, with their own parameters.

        parameters  of those sources that are listed: the first ones
        whole       no source was left out for an error
        """
        at_base = None if base is None else self._index(base)
        is_single = len(sources) == 1 and (sliced or path.startswith("$.modules."))
        copies = is_single and (self.method.models[0] > 1 or at_base is not None)
        complete = []
        for i, source in enumerate(sources):
            level: Level = {}
            if i < len(parameters):
                never = f"{shown(str(source.ref))} is the base of the merge" if source.model == at_base else None
                never = f"{shown(str(source.ref))} alone is copied" if copies else never
                level = self.levels.level(parameters[i], f"{source.path}.parameters", per_model=True, never=never)
            complete.append(MergeSource(source.model, source.ref, source.layers, level, source.path))
        complete.sort(key=lambda source: source.model != at_base)
        if not copies:
            if self.method.base == "required" and base is None and self.raw.base_model is None:
                what = "the model that the others were made from, or one of them"
                message = f"`{self.method.name}` needs the key `base_model`: {what}"
                raise self.document.error(message, at="$.merge_method", kind=MethodError)
            if whole:
                self._check_count(len(complete), path)
        return MergeGroup(tuple(complete), at_base is not None and not copies, levels, copies, path)

    def _check_count(self, n: int, path: str) -> None:
        low, high = self.method.models
        if not low <= n <= high:
            count = f"exactly {low}" if low == high else f"{low} to {high}"
            what = "model" if high == 1 else "models"
            of = "" if self.method.base == "none" else ", the base included"
            message = f"`{self.method.name}` takes {count} {what}{of}, got {n}"
            if n > high and self.method.for_more:
                message += f". For more: {self.method.for_more}"
            raise self.document.error(message, path, kind=MethodError)

    def _each_model_once(self, items: Sequence[tuple[Item, str]], remedy: str) -> list[tuple[int, Item, str]]:
        """(index of the model, item, path) of each that names a model that no other does."""
        first: dict[ModelRef, str] = {}
        listed = []
        for item, path in items:
            before = len(self.collector.errors)
            with self.collector:
                model = self._reference(item.model, f"{path}.model")
                at = first.setdefault(model, path)
                if at != path:
                    raise self.document.error(f"{shown(str(model))} is already listed as {at}. {remedy}", path)
                listed.append((self._index(model), item, path))
            if len(self.collector.errors) > before:
                self.levels.unsure = True
                self.levels.level(item.parameters, f"{path}.parameters", per_model=True)
        return listed

    def _ranges(self, items: Sequence[tuple[SourceItem, str]]) -> list[tuple[int, int] | None]:
        """The `layer_range` of each source, all of the same length; None for those whose error was collected."""
        ranges: list[tuple[int, int] | None] = []
        lead: tuple[int, str] | None = None
        for source, path in items:
            span: tuple[int, int] | None = None
            with self.collector:
                first, end = self._range(source.layer_range, f"{path}.layer_range")
                length, where = lead = lead or (end - first, path)
                if end - first != length:
                    message = "the sources of a slice must have the same number of layers"
                    raise self.document.error(
                        f"{message}: {shown(end - first)} here, {shown(length)} in {where}", f"{path}.layer_range"
                    )
                span = first, end
            ranges.append(span)
        return ranges

    def _range(self, numbers: list[int], path: str) -> tuple[int, int]:
        if len(numbers) != 2:
            raise self.document.error(f"`layer_range` is [first, end], got {shown(numbers)}", path)
        first, end = numbers
        if first < 0 or end < 0:
            message = f"`layer_range` counts from the first layer, 0; got {shown(numbers)}"
            raise self.document.error(f"{message}. Negative numbers have no meaning", path)
        if first > end:
            raise self.document.error(f"`layer_range` [first, end) ends before it begins, got {shown(numbers)}", path)
        return first, end

    def _reference(self, written: str | Reference, path: str) -> ModelRef:
        model = model_ref(self.document, written, path)
        if str(model) not in self.earlier:
            refuse_beside(self.document, model, path)
        return model

    def _index(self, model: ModelRef) -> int:
        """The index of the model in `models`, to which it is added if it is new."""
        number = self._numbers.setdefault(model, len(self.models))
        if number == len(self.models):
            self.models.append(model)
        return number
