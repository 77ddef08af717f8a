"""`explain`: the parameters of a recipe with the tensors that each value applies to, its layers, and its formula."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from fastinterp.recipe.blocks import ForeignBlock
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.targets import Assembly
from fastinterp.recipe.values import Value


def parameters_in_force(
    recipe: Recipe, names: Sequence[Collection[str]] | None, letters: Sequence[str] | None = None
) -> dict[str, Any]:
    """Plain values:

    parameters  one entry per value in the recipe: parameter, of (the model as x0, x1, ... and the slice), path, and
                cases: filter, value (a list of numbers is a gradient over the layers), and the number of tensors that
                it applies to, or None where it is the same for all
    defaults    the parameters that the recipe does not have
    slices      module, layers of the output (first, end) and of each source

    names    the tensor names of each of Recipe.models; None: tensors are not counted
    letters  the symbol of each of Recipe.models; None: x0, x1, ...
    """
    letters = letters or [f"x{i}" for i in range(len(recipe.models))]
    reached: Counter[str] | None = None
    if names is not None:
        reached = Counter()
        for resolver in Assembly(recipe, names).resolvers:
            reached.update(resolver.reached())
    entries = [_entry(value, of, reached) for value, of in _values(recipe, letters)]
    named = {entry["parameter"] for entry in entries}
    return {
        "parameters": entries,
        "defaults": {
            p.name: p.default for p in recipe.method.parameters if p.name not in named and p.default is not None
        },
        "slices": list(_slices(recipe, letters)),
    }


def symbols(recipe: Recipe) -> list[str]:
    """The meaning of the symbols in the method's formula, from its docstring: beside and below the formula."""
    lines = recipe.method.doc.splitlines()[2:]
    count = next((i for i, line in enumerate(lines) if not line.startswith("    ")), len(lines))
    meanings: list[str] = []
    for number, line in enumerate(lines[:count]):
        cells = re.split(r" {2,}", line.strip())
        deep = line.startswith(" " * 8)
        for cell in cells[number == 0 :]:
            if deep and meanings and not re.match(r"[\w|]+( =|:) ", cell):
                meanings[-1] += f" {cell}"
            else:
                meanings.append(cell)
    known = {p.name for p in recipe.method.parameters}
    body = "\n".join(lines[count:]).partition("\nReads:")[0]
    for name, text in re.findall(r"^(\S+(?:, \S+)*|\S+ \S+) {2,}(.*(?:\n .*)*)", body, re.MULTILINE):
        if not known.intersection(name.split(", ")) and not name.startswith("x"):
            meanings.append(f"{name}: {' '.join(text.split())}")
    return meanings


def presets_in_force(recipe: Recipe) -> list[str]:
    """`preset paper: ...`: how each preset in the recipe changes the formula, that of the default left out."""
    default = next((p.default for p in recipe.method.parameters if p.name == "preset"), None)
    every = (value for value, _ in _values(recipe, [str(model) for model in recipe.models]) if _name(value) == "preset")
    presets = dict.fromkeys(str(case) for value in every for _, case in value.cases if case != default)
    meaning = re.search(r"^preset +(.*(?:\n .*)*)", recipe.method.doc, re.MULTILINE)
    if not presets or meaning is None:
        return []
    parts = [part.partition(": ")[::2] for part in " ".join(meaning[1].split()).split("; ")]
    changes = {name: text for names, text in parts for name in names.split(" and ") if text}
    like = {name: next((n for n in changes if f"like {n}" in changes.get(name, "")), None) for name in presets}
    return [
        f"preset {name}: {changes.get(name, name)}{f' ({other}: {changes[other]})' if other else ''}"
        for name, other in like.items()
    ]


def _values(recipe: Recipe, letters: Sequence[str]) -> Iterator[tuple[Value, str]]:
    """Every value of the recipe once, in the order of the method's parameters, and what it belongs to."""
    values: dict[str, tuple[Value, str]] = {}
    for section in recipe.sections:
        for number, group in enumerate(section.groups, 1):
            module = "" if section.name is None else section.name or "everything"
            where = [module] * bool(module) + [f"slice {number}"] * section.stacked
            for source in group.sources:
                for value in source.parameters.values():
                    values.setdefault(value.path, (value, ", ".join([*where, letters[source.model]])))
            for value in (v for level in group.levels for v in level.values()):
                of = "" if value.path.startswith("$.parameters") else ", ".join(where)
                values.setdefault(value.path, (value, of))
    order = {p.name: i for i, p in enumerate(recipe.method.parameters)}
    return iter(sorted(values.values(), key=lambda pair: order[_name(pair[0])]))


def _name(value: Value) -> str:
    return value.path.rpartition(".")[2]


def _entry(value: Value, of: str, reached: Counter[str] | None) -> dict[str, Any]:
    whole = value.cases[0][0] is None
    return {
        "parameter": _name(value),
        "of": of,
        "path": value.path,
        "cases": [
            {
                "filter": None if part is None else str(part),
                "value": list(case) if isinstance(case, tuple) else case,
                "tensors": None if whole or reached is None else reached[path],
            }
            for (part, case), path in zip(value.cases, value.paths, strict=True)
            if not isinstance(part, ForeignBlock)
        ],
    }


def _slices(recipe: Recipe, letters: Sequence[str]) -> Iterator[dict[str, Any]]:
    for section in recipe.sections:
        start = 0
        for group in section.groups:
            length = group.sources[0].length
            if section.name is not None or section.stacked:
                yield {
                    "module": section.name,
                    "layers": [start, start + length] if section.stacked else None,
                    "sources": [{"model": letters[s.model], "layers": _span(s.layers)} for s in group.sources],
                    "copied": group.copies,
                }
            start += length


def _span(layers: tuple[int, int] | None) -> list[int] | None:
    return None if layers is None else list(layers)
