"""Names of tensors, grouped for messages: `first_stage_model.* (248 tensors)` instead of 248 names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from fastinterp.messages import listed, plain

_Side = tuple[str, str, Collection[str]]

_REASONS = 4  # remarks of one kind, above which they become one
_LISTED = 6  # groups in a message before the rest is only counted


class HasShape(Protocol):
    """A tensor whose shape is known."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def grouped(names: Iterable[str], others: Collection[str] = ()) -> str:
    """The names by what they have in common, the largest groups first.

    others  names that do not belong to them. A group is the shortest part of a name up to a dot with which none of
            these starts; groups that differ in one number are one: `model.layers.{0-31}.attn.inv_freq (32 tensors)`
    """
    starts = {start for name in others for start in _starts(name)}
    groups: dict[str, list[str]] = {}
    for name in names:
        group = next((start for start in _starts(name) if start not in starts), name)
        groups.setdefault(group, []).append(name)
    texts = [_text(keys, members) for keys, members in _by_number(groups)]
    return listed([plain(text) for _, text in sorted(texts, key=lambda pair: -pair[0])], _LISTED)


def different_tensors(
    ours: _Side, theirs: _Side, base: str, notes: Sequence[str] = (), layouts: Sequence[str] = (), sizes: str = ""
) -> str:
    """The message about two models, or layers, with different tensors.

    ours, theirs  name of the model, which layer of it (empty: all of it), names of the tensors
    base          the model from which `missing: base` copies
    notes         why a model lacks what it lacks
    layouts       about tensors that have other names in one of the models because their layout differs, and what to do:
                  what all models have is no reason to copy it from one
    sizes       that the tensors of both have other shapes, so that nothing would merge
    """
    if not set(ours[2]) & set(theirs[2]):
        return nothing_in_common(ours, theirs)
    sides = [
        f"{model} alone has {grouped(only, others)}{_in(layer)}"
        for (model, layer, names), others in ((ours, theirs[2]), (theirs, ours[2]))
        if (only := [name for name in names if name not in others])
    ]
    why = "".join(f". {note}" for note in (*notes, *layouts))
    if sizes and not layouts:
        return f"the models have different tensors: {'; '.join(sides)}. {sizes}"
    if layouts:
        return f"the models have different tensors: {'; '.join(sides)}{why}"
    return (
        f"the models have different tensors: {'; '.join(sides)}{why}. `missing: base` in the recipe (--missing base) "
        f"takes what not all have from {base} and leaves out what that lacks, `missing: skip` leaves out all of it, "
        "and `modules` merges parts of models"
    )


def nothing_in_common(ours: _Side, theirs: _Side) -> str:
    """The message about two models, or layers, without a common name. Arguments as of `different_tensors`."""
    sides = [f"{model} has {grouped(names) or 'none'}{_in(layer)}" for model, layer, names in (ours, theirs)]
    return (
        f"the models have no tensor name in common: {'; '.join(sides)}. They are different models, or other parts of "
        "one. Name two that belong together"
    )


def missing_tensors(left: Mapping[str, Collection[str]], made: Collection[str], base: str) -> tuple[str, ...]:
    """Remarks on tensors that not all models have in one shape.

    left  by name, which models lack it; none, if all have it, but not in one shape
    made  names of all tensors of the output
    base  the model from which those of them that are made are copied
    """
    rest = [name for name in made if name not in left]
    return tuple(
        f"{what}, because {why(lacking, names)}: {grouped(names, rest)}"
        for what, there in ((f"copied from {base}", True), ("left out", False))
        for lacking, names in _by_lacking({n: models for n, models in left.items() if (n in made) is there})
    )


def why(lacking: Collection[str], names: Collection[str]) -> str:
    """Why tensors are not merged: `ft lacks it`. lacking: the models without them"""
    it = "it" if len(names) == 1 else "them"
    if not lacking:
        return f"not all models have {it} in one shape"
    return f"{listed(lacking, 3)} {'lacks' if len(lacking) == 1 else 'lack'} {it}"


def _by_lacking(left: Mapping[str, Collection[str]]) -> list[tuple[tuple[str, ...], list[str]]]:
    """The names by the models that lack them; all together, if there are many such sets of models."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, models in left.items():
        groups.setdefault(tuple(models), []).append(name)
    return list(groups.items()) if len(groups) <= _REASONS else [((), list(left))]


def _in(layer: str) -> str:
    return f" in {layer}" if layer else ""


def _starts(name: str) -> list[str]:
    """`a.`, `a.b.`, `a.b.c` of `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[:i]) + "." for i in range(1, len(parts))] + [name]


def _by_number(groups: dict[str, list[str]]) -> list[tuple[list[str], list[str]]]:
    """(starts, names) of groups, those together whose starts differ in one number."""
    every: dict[tuple[str, ...], list[str]] = {}
    for start in groups:
        parts = start.split(".")
        numbered = [i for i, part in enumerate(parts) if part.isdecimal()]
        if numbered:
            parts[numbered[0]] = "\0"
        every.setdefault(tuple(parts), []).append(start)
    return [(starts, [name for start in starts for name in groups[start]]) for starts in every.values()]


def _text(starts: list[str], names: list[str]) -> tuple[int, str]:
    """(number of names, text) of one group."""
    if len(names) == 1:
        return 1, names[0]
    shown = names if len(starts) == len(names) else starts
    text = shown[0] if len(shown) == 1 else _numbered(shown)
    rest = "*" if text.endswith(".") else ""
    return len(names), f"{text}{rest} ({len(names):,} tensors)"


def _numbered(names: list[str]) -> str:
    """Names that differ in their first number as one: `h.{0-11}.bias`; `h.{0,2,5}.bias`, where some are not there."""
    parts = [name.split(".") for name in names]
    at = next(i for i, part in enumerate(parts[0]) if part.isdecimal())
    numbers = sorted({int(each[at]) for each in parts})
    whole = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
    text = f"{numbers[0]}-{numbers[-1]}" if whole else listed(map(str, numbers), _LISTED).replace(", ", ",")
    return ".".join([*parts[0][:at], f"{{{text}}}", *parts[0][at + 1 :]])
