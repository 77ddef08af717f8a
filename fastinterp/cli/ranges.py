"""Parsers of option values: numbers `0.3`, lists `0,0.5,1`, ranges `0:1:0.25`, and named ones `formal=-1:1:0.5`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fastinterp.ops.combine import MAX_POINTS

if TYPE_CHECKING:
    from decimal import Decimal


def alphas(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[float]:
    """The numbers in `0.3`, `0,0.5,1` and `0:1:0.25` (first, last, step), in the order given."""
    return [number for value in values for number in numbers(ctx, param, value)]


def numbers(ctx: click.Context, param: click.Parameter, value: str) -> list[float]:
    """The numbers in one value: numbers and ranges, separated by commas. Those within rounding of 0 and 1 become these.

    Raises: BadParameter.
    """
    from fastinterp.arguments import snapped

    return [snapped(number) for part in value.split(",") for number in _range(ctx, param, part, value)]


def _range(ctx: click.Context, param: click.Parameter, part: str, value: str) -> list[float]:
    """The numbers of `part`, a number or a range. value: the whole text, for messages."""
    from decimal import Decimal

    try:
        # Decimal: 0:1:0.1 holds 0.3, not 0.30000000000000004.
        first, *rest = (Decimal(text.strip()) for text in part.split(":"))
        last, step = rest or (first, Decimal(1))
        if rest and not (max(abs(first), abs(last)) < 1e38 and step.is_finite()):
            raise ValueError
        problem = _range_problem(first, last, step)
        if not problem:
            return [float(first + k * step) for k in range(int((last - first) / step) + 1)]
    except (ArithmeticError, ValueError):
        of = "" if part == value else f" in {value!r}"
        problem = f"{part!r}{of} is neither a finite number nor a range FIRST:LAST:STEP, as 0:1:0.25"
    raise click.BadParameter(problem, ctx, param)


def named(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """The values of `NAME=VALUE`, given several times, by name."""
    items: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals or not name or not rest:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE", ctx, param)
        if name in items:
            raise click.BadParameter(f"{name!r} is repeated", ctx, param)
        items[name] = rest
    return items


def grids(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, list[float]]:
    """The numbers of `NAME=NUMBERS`, given several times, by name."""
    return {name: numbers(ctx, param, text) for name, text in named(ctx, param, values).items()}


def _range_problem(first: Decimal, last: Decimal, step: Decimal) -> str:
    """The error message about a range, with one that is valid; empty if it has at least one point and not too many."""
    from decimal import Decimal

    text, span = f"{first}:{last}:{step}", last - first
    if not step:
        return f"the step of {text} is 0"
    if span and (span > 0) != (step > 0):
        return f"the step must be {'positive' if span > 0 else 'negative'} here: {first}:{last}:{-step}"
    count = 1 + (span / step).to_integral_value("ROUND_FLOOR")
    if count <= MAX_POINTS:
        return ""
    least = abs(span) / (MAX_POINTS - 1)
    power = Decimal(10) ** least.adjusted()
    fits = next(k * power for k in (1, 2, 5, 10) if k * power >= least).copy_sign(span)
    instead = f"{first}:{last}:{fits.normalize():f}"
    return f"{text} has {count:.6g} points, but at most {MAX_POINTS} are possible. Use {instead}"
