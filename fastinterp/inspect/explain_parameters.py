"""What a recipe gives each parameter, which tensors it reaches, and how layers are put together; for `explain`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from fastinterp.messages import counted
from fastinterp.methods import shown
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.targets import Assembly
from fastinterp.recipe.values import Value

_SHOWN = 8  # of one kind, before the rest is only counted


def given(
    recipe: Recipe, names: Sequence[Collection[str]] | None, letters: Sequence[str] | None = None
) -> dict[str, Any]:
    """Plain values.

    names    of each of Recipe.models, those of its tensors; None: nothing is counted
    letters  what each of Recipe.models is called; None: x0, x1, ...

    parameters  one entry per value that stands in the recipe: parameter, of (the model as x0, x1, ... and the slice),
                path and cases: filter, value (a list of numbers is a gradient over the layers), and how many tensors it
                reaches, or None where it is the same for all
    defaults    what is not given
    slices      module, layers of the output (first, end) and of each source
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
    """What the letters of the method's formula stand for, as its docstring has it beside and below the formula."""
    lines = recipe.method.doc.splitlines()[2:]
    count = next((i for i, line in enumerate(lines) if not line.startswith("    ")), len(lines))
    found: list[str] = []
    for number, line in enumerate(lines[:count]):
        cells = re.split(r" {2,}", line.strip())
        deep = line.startswith(" " * 8)
        for cell in cells[number == 0 :]:
            if deep and found and not re.match(r"[\w|]+( =|:) ", cell):
                found[-1] += f" {cell}"
            else:
                found.append(cell)
    known = {p.name for p in recipe.method.parameters}
    body = "\n".join(lines[count:]).partition("\nReads:")[0]
    for name, text in re.findall(r"^(\S+(?:, \S+)*|\S+ \S+) {2,}(.*(?:\n .*)*)", body, re.MULTILINE):
        if not known.intersection(name.split(", ")) and not name.startswith("x"):
            found.append(f"{name}: {' '.join(text.split())}")
    return found


def presets_in_force(recipe: Recipe) -> list[str]:
    """`preset paper: ...`, what replaces parts of the formula, for every preset asked for that is not the default."""
    default = next((p.default for p in recipe.method.parameters if p.name == "preset"), None)
    every = (value for value, _ in _values(recipe, [str(model) for model in recipe.models]) if _name(value) == "preset")
    asked = dict.fromkeys(str(case) for value in every for _, case in value.cases if case != default)
    meaning = re.search(r"^preset +(.*(?:\n .*)*)", recipe.method.doc, re.MULTILINE)
    if not asked or meaning is None:
        return []
    parts = [part.partition(": ")[::2] for part in " ".join(meaning[1].split()).split("; ")]
    told = {name: text for names, text in parts for name in names.split(" and ") if text}
    like = {name: next((n for n in told if f"like {n}" in told.get(name, "")), None) for name in asked}
    return [
        f"preset {name}: {told.get(name, name)}{f' ({other}: {told[other]})' if other else ''}"
        for name, other in like.items()
    ]


def _values(recipe: Recipe, letters: Sequence[str]) -> Iterator[tuple[Value, str]]:
    """Every value once, by parameter, and whose it is."""
    found: dict[str, tuple[Value, str]] = {}
    for section in recipe.sections:
        for number, part in enumerate(section.parts, 1):
            module = "" if section.name is None else section.name or "everything"
            where = [module] * bool(module) + [f"slice {number}"] * section.stacked
            for source in part.sources:
                for value in source.own.values():
                    found.setdefault(value.path, (value, ", ".join([*where, letters[source.model]])))
            for value in (value for level in part.levels for value in level.values()):
                of = "" if value.path.startswith("$.parameters") else ", ".join(where)
                found.setdefault(value.path, (value, of))
    order = {p.name: i for i, p in enumerate(recipe.method.parameters)}
    return iter(sorted(found.values(), key=lambda pair: order[_name(pair[0])]))


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
                "filter": part,
                "value": list(case) if isinstance(case, tuple) else case,
                "tensors": None if whole or reached is None else reached[path],
            }
            for (part, case), path in zip(value.cases, value.paths, strict=True)
        ],
    }


def _slices(recipe: Recipe, letters: Sequence[str]) -> Iterator[dict[str, Any]]:
    for section in recipe.sections:
        start = 0
        for part in section.parts:
            length = part.sources[0].length
            if section.name is not None or section.stacked:
                yield {
                    "module": section.name,
                    "layers": [start, start + length] if section.stacked else None,
                    "sources": [{"model": letters[s.model], "layers": _span(s.layers)} for s in part.sources],
                    "copied": part.copies,
                }
            start += length


def _span(layers: tuple[int, int] | None) -> list[int] | None:
    return None if layers is None else list(layers)


def as_lines(found: dict[str, Any]) -> list[str]:
    """The same for people; lines may be long."""
    lines: dict[str, list[str]] = {}
    for entry in found["parameters"]:
        of = f"{entry['of']}: " if entry["of"] else ""
        lines.setdefault(entry["parameter"], []).append(of + ", ".join(map(_case, entry["cases"])))
    wide = max(map(len, lines), default=0)
    told = [f"{name:{wide}}  {_few(values)}" for name, values in lines.items()]
    if found["defaults"]:
        told.append("not given: " + ", ".join(f"{k} {_shown(v)}" for k, v in found["defaults"].items()))
    return told


def layer_lines(found: dict[str, Any]) -> list[str]:
    """How slices and modules are put together, for people."""
    lines = []
    for one in found["slices"][:_SHOWN]:
        name = "" if one["module"] is None else f"{one['module'] or 'everything'} "
        whole = f"{_range(one['layers'])} = " if one["layers"] else "= "
        sources = [s["model"] + (f" {_range(s['layers'])}" if s["layers"] else "") for s in one["sources"]]
        how = f"copied from {sources[0]}" if one["copied"] else ", ".join(sources)
        lines.append(f"{name}{whole}{how}")
    if len(found["slices"]) > _SHOWN:
        lines.append(f"and {counted(len(found['slices']) - _SHOWN, 'more slice')}; --json has them all")
    return lines


def _range(layers: Sequence[int]) -> str:
    """`0..7`, of [0, 8]."""
    first, end = layers
    return f"{first}" if end - first == 1 else f"{first}..{end - 1}"


def _case(case: dict[str, Any]) -> str:
    text = _shown(case["value"])
    if case["filter"] is not None:
        text = f"{case['filter']} {text}"
    elif case["tensors"] is not None:
        text = f"others {text}"
    return text if case["tensors"] is None else f"{text} ({counted(case['tensors'], 'tensor')})"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        numbers = [f"{number:g}" for number in value]
        span = f"{numbers[0]} to {numbers[1]}" if len(numbers) == 2 else f"[{', '.join(numbers)}]"
        return f"{span} over the layers"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else shown(value)


def _few(values: Sequence[str]) -> str:
    more = f"; and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return "; ".join(values[:_SHOWN]) + more
