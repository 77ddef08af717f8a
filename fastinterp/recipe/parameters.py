"""A recipe's parameters, matched with what its method declares: nothing is unknown, and nothing missing. What is unused
is warned of, because recipes are written for one method and tried with others.

They stand on levels: at a model (or source of a slice), at a slice, at a module, at the top. The nearest one counts
whose value covers the tensor, then the method's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastinterp.errors import MethodError, RecipeError
from fastinterp.messages import clipped, shown, suggestion
from fastinterp.methods import Method, Parameter, Sidecar
from fastinterp.recipe.document import Document, ErrorCollector
from fastinterp.recipe.layers import LayerPosition
from fastinterp.recipe.merge_groups import Level, MergeGroup
from fastinterp.recipe.mergekit_options import instead_of_key
from fastinterp.recipe.references import model_ref
from fastinterp.recipe.schema import known_parameters
from fastinterp.recipe.values import Value, missing, parse

TOP = "$.parameters"


class Levels:
    """Reads the levels of one recipe, and finds the values that nothing uses.

    guessed  the method is a stand-in for an unknown one: parameters of any method may be meant
    read      path of each level that was read -> its values
    unsure    something was left out for an error: it may use a value, or be one
    warnings  values that nothing uses
    """

    def __init__(self, document: Document, method: Method, collector: ErrorCollector, *, guessed: bool = False):
        self.document, self.method, self.collector, self.guessed = document, method, collector, guessed
        self.declared = {p.name: p for p in method.parameters}
        self.read: dict[str, Level] = {}
        self.unsure = guessed
        self.warnings: list[RecipeError] = []

    def level(
        self, parameters: Mapping[str, Any] | None, path: str, *, per_model: bool = False, never: str | None = None
    ) -> Level:
        """The values of the `parameters` at `path`; one with an error is there all the same, as None.

        per_model  they belong to one model
        never      why none of them is used, or None
        """
        level: Level = {}
        for name, value in (parameters or {}).items():
            if name in self.declared and never is None:
                level[name] = Value(((None, None),), f"{path}.{name}", (path,))
            elif name not in known_parameters():
                self.unsure = True
            with self.collector:
                parsed = self._value(name, value, path, per_model, never)
                if parsed is not None:
                    level[name] = parsed
        self.read[path] = level
        return level

    def _value(self, name: str, value: Any, path: str, per_model: bool, never: str | None) -> Value | None:
        at = f"{path}.{name}"
        if name not in self.declared:
            if name in known_parameters():
                if not self.guessed:
                    self.warn(f"`{self.method.name}` has no parameter `{name}`: it is ignored", path, at)
                return None
            of = "" if self.guessed else f" of `{self.method.name}`"
            known = (
                known_parameters()
                if self.guessed
                else [p.name for p in self.declared.values() if p.each or not per_model]
            )
            instead = instead_of_key(name)
            message = f"unknown parameter `{clipped(name)}`{of}{f': {instead}' if instead else suggestion(name, known)}"
            raise self.document.error(message, path, at=at)
        parameter = self.declared[name]
        if per_model and not parameter.each:
            raise self.document.error(f"`{name}` is one value for the whole merge. Write it in {TOP}", path, at=at)
        if never is not None:
            self.warn(f"`{name}` is never used here: {never}", path, at)
            return None
        parsed = parse(self.document, parameter, value, at, self.collector)
        if parameter.kind is Sidecar and parsed is not None:
            for (_, sidecar), path_of_case in zip(parsed.cases, parsed.paths, strict=True):
                with self.collector:
                    model_ref(self.document, sidecar, path_of_case)
        return parsed

    def finish(self, groups: tuple[MergeGroup, ...]) -> None:
        """Check that every value is used by some group, and that none that is needed is missing.

        Raises: RecipeError; MethodError, if a value is missing.
        """
        used: set[str] = set()
        for group in groups:
            for parameter in self.method.parameters:
                for i in _takers(group, parameter):
                    with self.collector:
                        self._follow(group, parameter, i, used)
        for path, level in self.read.items():
            for name, value in level.items():
                if value.path not in used and not self.unsure and not self._has_error(value.path):
                    self._warn_unused(name, path, groups)

    def warn(self, message: str, path: str, at: str) -> None:
        """Note a value without effect."""
        self.warnings.append(self.document.error(message, path, at=at))

    def _has_error(self, path: str) -> bool:
        """Whether an error of the value at `path` was collected."""
        return any(
            isinstance(error, RecipeError) and error.path and path.startswith((error.path, f"{error.path}."))
            for error in self.collector.errors
        )

    def _follow(self, group: MergeGroup, parameter: Parameter, i: int | None, used: set[str]) -> None:
        """Mark what the parameter's values for source i of a group are taken from."""
        has_value = False
        for level in group.levels_of(i):
            value = level.get(parameter.name)
            if value is not None:
                has_value = True
                used.add(value.path)
                if value.matches_all:
                    return
        if parameter.required and not has_value and not self.unsure:
            needs = f"`{self.method.name}` needs the parameter `{parameter.name}`"
            if i is None:
                raise self.document.error(f"{needs}. Write it in {TOP}", at="$.merge_method", kind=MethodError)
            source = group.sources[i]
            raise self.document.error(f"{needs}, and {shown(str(source.ref))} has none", source.path, kind=MethodError)

    def _warn_unused(self, name: str, path: str, groups: tuple[MergeGroup, ...]) -> None:
        if all(group.copies for group in groups):
            why = "one model alone is copied"
        elif path == TOP and all(group.path == "$.models" for group in groups):
            why = "every model has its own"
        else:
            why = "a value nearer to the models always goes before it, or nothing below it takes it"
        self.warn(f"`{name}` is never used here: {why}", path, f"{path}.{name}")


def _takers(group: MergeGroup, parameter: Parameter) -> tuple[int | None, ...]:
    """The sources that take a value of the parameter: all sources but the base, or (None) the group as a whole."""
    if group.copies:
        return ()
    return tuple(range(group.has_base, len(group.sources))) if parameter.each else (None,)


class Resolver:
    """The values of all parameters of a group, tensor by tensor."""

    def __init__(self, document: Document, method: Method, group: MergeGroup):
        self.document, self.method, self.group = document, method, group
        self._uses: dict[Any, int] = {}
        self._takers = [(p, i) for p in method.parameters for i in _takers(group, p)]
        self._by_cases: dict[Any, dict[str, Any]] = {}
        self._by_values: dict[str, dict[str, Any]] = {}
        self._constant: dict[str, Any] | None = None
        if group.is_constant:
            self._constant = self.parameters("", ("",) * len(group.sources), None)

    def parameters(self, out: str, inputs: tuple[str, ...], position: LayerPosition | None) -> dict[str, Any]:
        """Keyword -> value, or a tuple with one value per source other than the base. Equal ones are the same object.

        out       name of the output tensor: what filters of a parameter for the whole merge look at
        inputs    its names in the sources: what those of a parameter per model look at
        position  of its layer, where gradients are read; None: it is in no layer
        Raises: MethodError, if a parameter without a default has no value for it.
        """
        if self._constant is not None:
            return self._constant
        picked = tuple(self._pick(p, i, out if i is None else inputs[i]) for p, i in self._takers)
        self._uses[picked] = self._uses.get(picked, 0) + 1
        resolved = self._by_cases.get((picked, position))
        if resolved is None:
            values: dict[str, Any] = {}
            for (p, i), case in zip(self._takers, picked, strict=True):
                value = p.default if case is None else case[0].pick(case[1], position)
                values[p.keyword] = value if i is None else (*values.get(p.keyword, ()), value)
            # repr: 1 and True are equal, and so are 0.0 and -0.0
            resolved = self._by_cases[picked, position] = self._by_values.setdefault(repr(values), values)
        return resolved

    def resolved(self) -> list[dict[str, Any]]:
        """Every different result of `parameters` so far, once."""
        return list(self._by_values.values())

    def reached(self) -> dict[str, int]:
        """Path of each case that any tensor got its value from, and how many did; 1, if the group is constant."""
        counts: dict[str, int] = {}
        for picked, count in self._uses.items():
            for path in {case[0].paths[case[1]] for case in picked if case is not None}:
                counts[path] = counts.get(path, 0) + count
        return counts

    def _pick(self, parameter: Parameter, i: int | None, name: str) -> tuple[Value, int] | None:
        """The value that covers a tensor, and which of its cases; None for the default."""
        nearest = None
        for level in self.group.levels_of(i):
            value = level.get(parameter.name)
            nearest = nearest or value
            if value is not None and (index := value.case(name)) is not None:
                if why := value.refusal(index):
                    raise self.document.error(f"{why} ({shown(name)})", value.paths[index])
                return value, index
        if parameter.required:
            raise missing(self.document, parameter.name, name, nearest)
        return None
