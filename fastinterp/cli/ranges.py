"""Numbers on the command line: `0.3`, ranges as `0:1:0.25`, and what is named, as `formal=-1:1:0.5`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fastinterp.compute.ops import MAX_OUTPUTS

if TYPE_CHECKING:
    from decimal import Decimal


def alphas(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[float]:
    """The numbers in `0.3` and `0:1:0.25` (first, last, step), in the order given."""
    return [number for value in values for number in numbers(ctx, param, value)]


def numbers(ctx: click.Context, param: click.Parameter, value: str, most: int = MAX_OUTPUTS) -> list[float]:
    """Those in one value.

    most  that a range may have
    """
    from decimal import Decimal

    try:
        # Decimal: 0:1:0.1 holds 0.3, not 0.30000000000000004.
        first, *rest = (Decimal(part.strip()) for part in value.split(":"))
        last, step = rest or (first, Decimal(1))
        if rest and not (max(abs(first), abs(last)) < 1e38 and step.is_finite()):
            raise ValueError
        problem = _range_problem(first, last, step, most)
        if not problem:
            return [float(first + k * step) for k in range(int((last - first) / step) + 1)]
    except (ArithmeticError, ValueError):
        problem = f"{value!r} is neither a number nor a range FIRST:LAST:STEP, as 0:1:0.25"
    raise click.BadParameter(problem, ctx, param)


def named(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """`NAME=VALUE`, several times."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals or not name or not rest:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE", ctx, param)
        if name in found:
            raise click.BadParameter(f"{name!r} is given twice", ctx, param)
        found[name] = rest
    return found


def grids(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, list[float]]:
    """`NAME=NUMBERS`, several times: numbers and ranges, commas between them."""
    given = named(ctx, param, values)
    return {name: [n for part in text.split(",") for n in numbers(ctx, param, part)] for name, text in given.items()}


def _range_problem(first: Decimal, last: Decimal, step: Decimal, most: int) -> str:
    """What is wrong with a range, and one that would do; nothing, if it has at least one point and not too many."""
    from decimal import Decimal

    text, span = f"{first}:{last}:{step}", last - first
    if not step:
        return f"the step of {text} is 0"
    if span and (span > 0) != (step > 0):
        return f"the step must be {'positive' if span > 0 else 'negative'} here: {first}:{last}:{-step}"
    count = 1 + (span / step).to_integral_value("ROUND_FLOOR")
    if count <= most:
        return ""
    least = abs(span) / (most - 1)
    power = Decimal(10) ** least.adjusted()
    fits = next(k * power for k in (1, 2, 5, 10) if k * power >= least).copy_sign(span)
    instead = f"{first}:{last}:{fits.normalize():f}"
    return f"{text} has {count:.6g} points, at most {most} fit one run. Write {instead}"
