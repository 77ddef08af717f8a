"""How much of a change the rounding of the output kept, in words, and what the numbers of a recipe act as after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastinterp.recipe.load import Recipe

VISIBLE = 0.01  # difference of a strength from 1 above which it is told what the numbers act as
_LISTED = 3  # numbers that are told one by one


def kept(strength: float, sampled: bool) -> str:
    """`rounding kept 24 % of the change (sampled)`; `rounding made the change 1.25 times as large`.

    strength  as of RoundingEffect
    sampled   whether it was measured on a part of the elements
    """
    larger = f"{strength:.3g}"
    more = float(larger) > 1
    what = f"made the change {larger} times as large" if more else f"kept {100 * strength:.3g} % of the change"
    return f"rounding {what}{' (sampled)' if sampled else ''}"


def asked_of(recipe: Recipe, shown: Callable[[str], str] = str) -> dict[str, float]:
    """The numbers of a recipe in proportion to which the output differs from the model that changes are measured from,
    by name; none, where there are no such numbers, or where rounding is stochastic, which is right on average.

    shown  what a model is called
    """
    if recipe.rounding == "stochastic":
        return {}
    if recipe.coefficients is not None:
        row = recipe.coefficients.row()
        return (
            {f"weight of {shown(str(recipe.models[i]))}": weight for i, weight in row.terms} if row.total == 1.0 else {}
        )
    given = recipe.parameters or {}
    name = "t" if recipe.method.walks else "lambda"
    value = given.get(name)
    return {name: value} if isinstance(value, float) else {}


def acting(asked: Mapping[str, float], strength: float | None) -> dict[str, float]:
    """What the numbers act as, if that is visibly something else."""
    if strength is None or abs(strength - 1.0) <= VISIBLE:
        return {}
    return {name: value * strength for name, value in asked.items() if value}


def acting_lines(asked: Mapping[str, float], strength: float | None) -> list[str]:
    """`alpha 0.25 acts as 0.06`, a line for each number; one line, if there are many."""
    effective = acting(asked, strength)
    if len(effective) > _LISTED:
        return [f"each weight acts as if it were multiplied by {strength:.3g}"]
    return [_line(name, asked[name], value) for name, value in effective.items()]


def _line(name: str, value: float, effective: float) -> str:
    word, of, model = name.partition(" of ")
    return f"{word} {value:.6g}{of}{model} acts as {effective:.3g}"
