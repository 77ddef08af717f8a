"""What the model card of an output tells: formula, models with their parameters, rounding, the command."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastinterp.methods import Sidecar
from fastinterp.ops.dtypes import parse_stored
from fastinterp.output.model_card import Told
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.merge_groups import MergeGroup
from fastinterp.recipe.values import Value

if TYPE_CHECKING:
    from fastinterp.plan.planned import PlannedTensor

_MOST_ROWS = 200  # of models in slices, say
_Name = Callable[[str], str]


def told(
    recipe: Recipe, tensors: Sequence[PlannedTensor], max_shard_size: int | None, kept: Sequence[str],
    models: Sequence[str], name: _Name = str,
) -> Told:  # fmt: skip
    """Of one output.

    max_shard_size  as it was asked for
    kept            how much of the change rounding kept, once that is known, in sentences
    models          those of all documents, as cards call them: the table has those, too, that only earlier ones name
    name            what a card calls a model
    """
    stored = sorted({t.stored_as for t in tensors if t.merged})
    how = "to nearest even" if recipe.rounding == "nearest" else f"stochastic, seed {recipe.seed}"
    facts = [f"stored as {', '.join(stored)}, rounding {how}", *kept]
    if shared := _shared(recipe):
        facts.append(f"parameters of the whole merge: {shared}")
    if recipe.method.draws:
        facts.append(f"elements are dropped at random, seed {recipe.seed}")
    if recipe.coefficients is None:
        facts.append(f"the symbols of the formula: `fastinterp methods {recipe.method.name}`")
    summary = recipe.method.doc.partition("\n")[0].partition("     ")[0].rstrip(".")
    formula = recipe.formula().partition("\n")[0]
    rows = _rows(recipe, name)
    listed = {row[1] for row in rows}
    rows += [["", model, *[""] * (len(rows[0]) - 2)] for model in models if model not in listed]
    return Told(summary, formula, rows, tuple(facts), _command(recipe, max_shard_size))


def _rows(recipe: Recipe, name: _Name) -> list[list[str]]:
    """A table, its head first: symbol, model, module and layers where there are any, and its parameters."""
    each = [p.name for p in recipe.method.parameters if p.each]
    modules = any(section.name is not None for section in recipe.sections)
    layers = any(section.stacked for section in recipe.sections)
    rows = []
    for section in recipe.sections:
        for group in section.groups:
            for i, source in enumerate(group.sources):
                row = [f"x{source.model}", name(str(source.ref))]
                row += [section.name or ""] if modules else []
                row += [f"{source.layers[0]} to {source.layers[1] - 1}" if source.layers else ""] if layers else []
                base = group.has_base and i == 0
                rows.append([*row, *(_of_model(group, p, i, base, name) for p in each)])
    used = [p for k, p in enumerate(each) if any(row[len(row) - len(each) + k] for row in rows)]
    kept = [len(rows[0]) - len(each) + each.index(p) for p in used] if rows else []
    first = len(rows[0]) - len(each) if rows else 0
    head = ["", "model", *["module"] * modules, *["layers"] * layers, *used]
    short = [[*row[:first], *(row[k] for k in kept)] for row in rows]
    if len(short) > _MOST_ROWS:
        short = [*short[:_MOST_ROWS], ["", f"and {len(short) - _MOST_ROWS} more", *[""] * (len(head) - 2)]]
    return [head, *short]


def _of_model(group: MergeGroup, parameter: str, i: int, base: bool, name: _Name) -> str:
    """The value that a model has for a parameter; `base` for the first one of the base."""
    if base:
        return "base" if parameter == "weight" else ""
    if group.copies:
        return "copied" if parameter == "weight" else ""
    value = next((level[parameter] for level in group.levels_of(i) if parameter in level), None)
    return "" if value is None else _text(value, name)


def _shared(recipe: Recipe) -> str:
    """The parameters of the whole merge that the recipe sets, and the defaults of the others."""
    found = []
    for p in (p for p in recipe.method.parameters if not p.each):
        levels = (level for group in recipe.groups for level in group.levels if p.name in level)
        texts = list(dict.fromkeys(_text(level[p.name]) for level in levels))
        if texts:
            found.append(f"{p.name} {' or '.join(texts)}")
        elif p.default is not None:
            found.append(f"{p.name} {_word(p.default)} (default)")
    return ", ".join(found)


def _text(value: Value, name: _Name = str) -> str:
    cases = [(pattern, name(case) if isinstance(case, Sidecar) else _word(case)) for pattern, case in value.cases]
    if len(cases) == 1 and cases[0][0] is None:
        return cases[0][1]
    return ", ".join(f"{'others' if pattern is None else pattern} {word}" for pattern, word in cases)


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        numbers = [f"{number:g}" for number in value]
        return f"{' to '.join(numbers)} over the layers"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "nothing"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _command(recipe: Recipe, max_shard_size: int | None) -> str:
    """The command that makes the same weights of the recipe: with the options that replace something in it."""
    written = recipe.document.value
    options: list[str] = []
    stored, asked = recipe.out_dtype or recipe.dtype, written.get("out_dtype") or written.get("dtype")
    if stored is not None and parse_stored(str(asked)) != stored:
        options += ["--dtype", stored.library_name or stored.name.lower()]
    usual = {"rounding": "nearest", "seed": 0, "missing": "error", "channels": "same", "quantize": "none"}
    for key, default in usual.items():
        value = getattr(recipe, key)
        if value != written.get(key, default):
            options += [f"--{key}", str(value)]
    options += [] if max_shard_size is None else ["--max-shard-size", str(max_shard_size)]
    return shlex.join(["fastinterp", "merge", "recipe.yml", "OUT", *options])
