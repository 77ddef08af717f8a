"""A recipe's parameters, matched with what its method declares: nothing unknown, nothing unused, nothing missing.

They stand on levels: at a model (or source of a slice), at a slice, at a module, at the top. The nearest one counts
whose value covers the tensor, then the method's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastinterp.errors import MethodError, RecipeError
from fastinterp.methods import Method, Parameter, Sidecar, clipped, shown, suggestion
from fastinterp.recipe.document import Document
from fastinterp.recipe.faults import Faults
from fastinterp.recipe.parts import Level, Part
from fastinterp.recipe.references import model_ref
from fastinterp.recipe.schema import known_parameters
from fastinterp.recipe.values import Place, Value, missing, parse

TOP = "$.parameters"


class Levels:
    """Reads the levels of one recipe, and knows in the end which values nothing uses.

    guessed  the method only stands for one that is not known: parameters of any method may be meant
    """

    def __init__(self, document: Document, method: Method, faults: Faults, *, guessed: bool = False):
        self.document, self.method, self.faults, self.guessed = document, method, faults, guessed
        self.declared = {p.name: p for p in method.parameters}
        self.read: dict[str, Level] = {}
        # Whether something was left out that may use a value, or be one; faults are gathered then.
        self.unsure = guessed

    def level(
        self, given: Mapping[str, Any] | None, path: str, *, own: bool = False, never: str | None = None
    ) -> Level:
        """The `parameters` at `path`.

        own    they belong to one model
        never  why none of them is used
        """
        found: Level = {}
        for name, value in (given or {}).items():
            if name in self.declared:  # what is wrong is there all the same
                found[name] = Value(((None, None),), f"{path}.{name}", (path,))
            else:
                self.unsure = True
            with self.faults:
                parsed = self._value(name, value, path, own, never)
                if parsed is not None:
                    found[name] = parsed
        self.read[path] = found
        return found

    def _value(self, name: str, given: Any, path: str, own: bool, never: str | None) -> Value | None:
        at = f"{path}.{name}"
        if name not in self.declared:
            known = known_parameters() if self.guessed else list(self.declared)
            if name in known:
                return None
            of = "" if self.guessed else f" of `{self.method.name}`"
            message = f"unknown parameter `{clipped(name)}`{of}{suggestion(name, known)}"
            raise self.document.error(message, path, at=at)
        parameter = self.declared[name]
        if own and not parameter.each:
            raise self.document.error(f"`{name}` is one value for the whole merge. Write it in {TOP}", path, at=at)
        if never is not None:
            raise self.document.error(f"`{name}` is never used here: {never}. Remove it", path, at=at)
        value = parse(self.document, parameter, given, at, self.faults)
        if parameter.kind is Sidecar and value is not None:
            for (_, sidecar), place in zip(value.cases, value.paths, strict=True):
                with self.faults:
                    model_ref(self.document, sidecar, place)
        return value

    def finish(self, parts: tuple[Part, ...]) -> None:
        """See that every value is used by some part, and that none that is needed is missing.

        Raises: RecipeError; MethodError, if a value is missing.
        """
        used: set[str] = set()
        for part in parts:
            for parameter in self.method.parameters:
                for i in _takers(part, parameter):
                    with self.faults:
                        self._follow(part, parameter, i, used)
        for path, level in self.read.items():
            for name, value in level.items():
                if value.path not in used and not self.unsure and not self._is_told(value.path):
                    with self.faults:
                        raise self._unused(name, path, parts)

    def _is_told(self, path: str) -> bool:
        """Whether something is wrong with the value already."""
        return any(error.path and path.startswith((error.path, error.path + ".")) for error in self.faults.found)

    def _follow(self, part: Part, parameter: Parameter, i: int | None, used: set[str]) -> None:
        """Mark what the parameter's values for source i of a part are taken from."""
        given = False
        for level in part.levels_of(i):
            value = level.get(parameter.name)
            if value is not None:
                given = True
                used.add(value.path)
                if value.matches_all:
                    return
        if parameter.required and not given and not self.unsure:
            needs = f"`{self.method.name}` needs the parameter `{parameter.name}`"
            if i is None:
                raise self.document.error(f"{needs}. Write it in {TOP}", at="$.merge_method", kind=MethodError)
            source = part.sources[i]
            raise self.document.error(f"{needs}, and {shown(str(source.ref))} has none", source.path, kind=MethodError)

    def _unused(self, name: str, path: str, parts: tuple[Part, ...]) -> RecipeError:
        if all(part.copies for part in parts):
            why = "one model alone is copied"
        elif path == TOP and all(part.path == "$.models" for part in parts):
            why = "every model has its own"
        else:
            why = "a value nearer to the models always goes before it, or nothing below it takes it"
        return self.document.error(f"`{name}` is never used here: {why}. Remove it", path, at=f"{path}.{name}")


def _takers(part: Part, parameter: Parameter) -> tuple[int | None, ...]:
    """Who takes a value of the parameter: all sources but the base, or (None) the part as a whole."""
    if part.copies:
        return ()
    return tuple(range(part.has_base, len(part.sources))) if parameter.each else (None,)


class Resolver:
    """The values of all parameters of a part, tensor by tensor."""

    def __init__(self, document: Document, method: Method, part: Part):
        self.document, self.method, self.part = document, method, part
        self._uses: dict[Any, int] = {}
        self._takers = [(p, i) for p in method.parameters for i in _takers(part, p)]
        self._by_cases: dict[Any, dict[str, Any]] = {}
        self._by_values: dict[str, dict[str, Any]] = {}
        self._constant: dict[str, Any] | None = None
        if part.is_constant:
            self._constant = self.parameters("", ("",) * len(part.sources), None)

    def parameters(self, out: str, inputs: tuple[str, ...], place: Place | None) -> dict[str, Any]:
        """Keyword -> value, or a tuple with one value per source other than the base. Equal ones are the same object.

        out     name of the output tensor: what filters of a parameter for the whole merge look at
        inputs  its names in the sources: what those of a parameter per model look at
        Raises: MethodError, if a parameter without a default has no value for it.
        """
        if self._constant is not None:
            return self._constant
        picked = tuple(self._pick(p, i, out if i is None else inputs[i]) for p, i in self._takers)
        self._uses[picked] = self._uses.get(picked, 0) + 1
        found = self._by_cases.get((picked, place))
        if found is None:
            values: dict[str, Any] = {}
            for (p, i), case in zip(self._takers, picked, strict=True):
                value = p.default if case is None else case[0].pick(case[1], place)
                values[p.keyword] = value if i is None else (*values.get(p.keyword, ()), value)
            # repr: 1 and True are equal, and so are 0.0 and -0.0
            found = self._by_cases[picked, place] = self._by_values.setdefault(repr(values), values)
        return found

    def resolved(self) -> list[dict[str, Any]]:
        """Every different result of `parameters` so far, once."""
        return list(self._by_values.values())

    def reached(self) -> dict[str, int]:
        """Path of each case that any tensor got its value from, and how many did; 1, if the part is constant."""
        found: dict[str, int] = {}
        for picked, count in self._uses.items():
            for path in {case[0].paths[case[1]] for case in picked if case is not None}:
                found[path] = found.get(path, 0) + count
        return found

    def _pick(self, parameter: Parameter, i: int | None, name: str) -> tuple[Value, int] | None:
        """The value that covers a tensor, and which of its cases; None for the default."""
        nearest = None
        for level in self.part.levels_of(i):
            value = level.get(parameter.name)
            nearest = nearest or value
            if value is not None and (index := value.case(name)) is not None:
                return value, index
        if parameter.required:
            raise missing(self.document, parameter.name, name, nearest)
        return None
