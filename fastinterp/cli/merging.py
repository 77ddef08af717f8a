"""`merge` and `interpolate`: the commands that write checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastinterp.cli import OUTCOME, options

if TYPE_CHECKING:
    from fastinterp.engine.report import Report

_MANY = 1000  # steps of a range: far more than one read can make
_VISIBLE = 0.01  # an alpha that acts as one that is off by more than this share of it is worth a word


@click.command()
@click.argument("recipe")
@click.argument("out")
@options.output
def merge(recipe: str, out: str, quiet: bool, as_json: bool, **settings: Any) -> None:
    """Merge checkpoints as a recipe says.

    RECIPE is a YAML file, OUT a new folder. Each input byte is read once.

    \b
    Example:
      fastinterp merge recipe.yml merged/ --dtype bfloat16
    """
    from fastinterp.cli import progress
    from fastinterp.engine import run

    with _outcome_of([Path(out)]), progress.shown(quiet or as_json) as shown:
        report = run.merge(recipe, out, progress=shown, **settings)
    if as_json:
        options.say_json(report.as_dict())
    elif quiet:
        _warn([report])
    else:
        options.say(report.summary())


def _points(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[float]:
    """The numbers in `0.3` and `0:1:0.25` (first, last, step), in the order given."""
    from decimal import Decimal, InvalidOperation

    points: list[float] = []
    for value in values:
        try:
            # Decimal: 0:1:0.1 holds 0.3, not 0.30000000000000004.
            first, *rest = (Decimal(part.strip()) for part in value.split(":"))
            last, step = rest or (first, Decimal(1))
            count = int((last - first) / step) + 1 if last != first else 1
            if not 1 <= count <= _MANY:
                raise click.BadParameter(f"the range {value!r} has {max(0, count)} points", ctx, param)
            points += [float(first + k * step) for k in range(count)]
        except (InvalidOperation, ZeroDivisionError, ValueError, OverflowError):
            message = f"{value!r} is neither a number nor a range FIRST:LAST:STEP, as 0:1:0.25"
            raise click.BadParameter(message, ctx, param) from None
    return points


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--alpha", "points", callback=_points, multiple=True, required=True, metavar="ALPHA",
    help="0 is A, 1 is B; any number, or a range as 0:1:0.25. Give it several times for several outputs.",
)  # fmt: skip
@click.option("-o", "--out", required=True, metavar="DIR", help="Several outputs go to DIR/alpha_0.3 and so on.")
@click.option("--base", metavar="CKPT", help="Task vectors: base + (1 - alpha)*(A - base) + alpha*(B - base).")
@options.output
def interpolate(
    a: str, b: str, points: list[float], out: str, base: str | None, quiet: bool, as_json: bool,
    **settings: Any,
) -> None:  # fmt: skip
    """Walk the line from checkpoint A to B, and beyond.

    The output is A + alpha*(B - A). Several alphas are made from one read of A and B.

    \b
    Example:
      fastinterp interpolate model-a/ model-b/ --alpha 0.3 -o mixed/
      fastinterp interpolate model-a/ model-b/ --alpha -0.5 --alpha 0:1:0.25 --alpha 1.5 -o path/
    """
    from fastinterp.cli import progress
    from fastinterp.engine import run

    outs = [Path(out)] if len(points) == 1 else [Path(out) / run.point_name(p) for p in points]
    with _outcome_of(outs), progress.shown(quiet or as_json) as shown:
        reports = run.interpolate(a, b, points, out, base=base, progress=shown, **settings)
    acting = [_acts_as(p, r) if base is None else None for p, r in zip(points, reports, strict=True)]
    if as_json:
        found = zip(points, acting, reports, strict=True)
        options.say_json([{"alpha": p, "acts_as": x, **r.as_dict()} for p, x, r in found])
    elif quiet:
        _warn(reports)
    else:
        options.say("\n".join(_path_lines(points, acting, reports)))


@contextmanager
def _outcome_of(outs: Sequence[Path]) -> Iterator[None]:
    """When the run inside is interrupted, note which outputs were finished before that: weights appear last."""
    start = time.time()
    try:
        yield
    except KeyboardInterrupt:
        done = [str(o) for o in outs if any(p.stat().st_mtime >= start for p in o.glob("*.safetensors"))]
        said = f"finished before that: {', '.join(done)}" if done else "nothing was written"
        click.get_current_context().meta[OUTCOME] = [said]
        raise


def _acts_as(alpha: float, report: Report) -> float | None:
    """The alpha that the output's rounding made of `alpha`; None for copies."""
    strength = report.effect.strength
    return None if strength is None else alpha * strength


def _path_lines(points: Sequence[float], acting: Sequence[float | None], reports: Sequence[Report]) -> list[str]:
    """Alphas that act visibly as others are shown as such."""
    from fastinterp.engine.text import plain, size, table

    told = [
        f"{acts:.3g}" if acts is not None and abs(acts - alpha) > _VISIBLE * abs(alpha) else ""
        for alpha, acts in zip(points, acting, strict=True)
    ]
    if len(reports) == 1:
        return [reports[0].summary(), *(f"  alpha {points[0]:g} acts as {acts}" for acts in told if acts)]
    run = reports[0]
    lines = [f"{len(reports)} outputs from one read: {size(run.bytes_read)} read, {run.pace()}"]
    rows = [["alpha", "acts as" if any(told) else "", "changed", "|D|/|p|", "output"]]
    for alpha, acts, report in zip(points, told, reports, strict=True):
        effect = report.effect
        fraction, relative = effect.changed_fraction, effect.relative_change
        change = ["copy", ""] if fraction is None else [f"{fraction:.1%}", f"{relative or 0:.2e}"]
        rows.append([f"{alpha:g}", acts, *change, report.output])
    lines += table(rows, ">>>><")
    for report in reports:
        lines += [f"  {plain(report.output)}: {note}" for note in report.notes()]
    return lines


def _warn(reports: Sequence[Report]) -> None:
    for report in reports:
        for warning in report.warnings:
            click.echo(f"{report.output}: warning: {warning}", err=True)
