"""`check`, `explain`, `inspect` and `diff`: the commands that write nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from fastinterp.cli import options

if TYPE_CHECKING:
    from fastinterp.inspect.compare import Comparison, Difference

_MOST = 10  # tensors that diff lists without --all
_LISTED = 3  # names in a note


@click.command()
@options.recipe
@click.option("--strict", is_flag=True, help="Fail (exit code 2) if anything looks suspicious, too.")
@options.as_json
def check(recipe: str, strict: bool, as_json: bool) -> None:
    """Say all that is wrong with a recipe, and what looks suspicious.

    Reads headers and samples of the models and writes nothing. Exit code: 0, or that of the merge.

    \b
    Example:
      fastinterp check recipe.yml
    """
    from fastinterp.inspect.check import check as checked

    found = checked(recipe)
    if as_json:
        options.say_json(found.as_dict())
    else:
        options.say(str(found))
    click.get_current_context().exit(found.exit_code or (2 if strict and found.odd else 0))


@click.command()
@options.recipe
@options.threads
@options.max_shard_size
@options.max_memory
@click.option("--dtype", metavar="NAME", help="As of merge.")
@click.option("--rounding", type=click.Choice(["nearest", "stochastic"]), help="As of merge.")
@click.option("--seed", type=int, metavar="N", help="As of merge.")
@options.as_json
def explain(
    recipe: str,
    threads: int | None,
    max_shard_size: str,
    max_memory: str,
    dtype: str | None,
    rounding: str | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Say what a merge would read, compute and write.

    Reads headers only and writes nothing.

    \b
    Example:
      fastinterp explain recipe.yml
    """
    from fastinterp.arguments import size_of
    from fastinterp.inspect.explain import Explanation
    from fastinterp.plan.plan import plan_recipe

    plan = plan_recipe(recipe, max_shard_size, dtype, rounding, seed)
    explanation = Explanation(plan, threads, size_of(max_memory))
    if as_json:
        options.say_json(explanation.as_dict())
    else:
        options.say(str(explanation))


@click.command()
@click.argument("checkpoint")
@click.option("--all", "every", is_flag=True, help="List every tensor; layers of a kind share a line otherwise.")
@options.as_json
def inspect(checkpoint: str, every: bool, as_json: bool) -> None:
    """Show what a checkpoint holds, from its headers.

    CHECKPOINT is a folder, a .safetensors file, or a Hub id. Shown are files, tensors, dtypes, metadata, and what a
    merge noted of itself.

    \b
    Example:
      fastinterp inspect merged/
    """
    from fastinterp.checkpoint.open import open_checkpoint
    from fastinterp.inspect import describe as contents

    found = open_checkpoint(checkpoint)
    if as_json:
        options.say_json(contents.as_dict(found))
    else:
        options.say(contents.as_text(found, every=every))


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--all", "every", is_flag=True, help=f"List every tensor, not only the {_MOST} that differ most.")
@options.threads
@click.option("--plot", metavar="FILE", help="Draw the change of each kind of tensor by layer, as .png, .svg or .pdf.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@options.as_json
def diff(
    a: str, b: str, every: bool, threads: int | None, plot: str | None, quiet: bool, as_json: bool
) -> None:  # fmt: skip
    """Measure how checkpoint B differs from A.

    By layer and by tensor: |d|/|a| is the size of B - A relative to that of A, cosine that of the angle between A and
    B, changed the fraction of elements that differ.

    \b
    Example:
      fastinterp diff base/ fine-tune/
      fastinterp diff base/ fine-tune/ --plot change.png
    """
    from fastinterp.cli import progress
    from fastinterp.inspect.compare import compare

    if plot is not None:
        from fastinterp.paths.plot import check_figure

        check_figure(plot)  # first: what takes long comes after what may be refused
    with progress.shown(quiet or as_json) as shown:
        found = compare(a, b, threads=threads, progress=shown)
    if plot is not None:
        from fastinterp.paths.plot import plot_difference

        plot_difference(found, plot, f"{b} against {a}")
    if as_json:
        options.say_json({"a": a, "b": b, **_as_dict(found)})
    else:
        options.say(_as_text(found, every))


def _as_dict(found: Comparison) -> dict[str, Any]:
    return {
        "total": _values(found.total),
        "layers": {name: _values(d) for name, d in _layers(found).items()},
        "tensors": {name: _values(d) for name, d in found.tensors.items()},
        "only_a": found.only_a,
        "only_b": found.only_b,
        "shapes": found.shapes,
        "unmeasured": found.unmeasured,
        "kinds": found.kinds,
    }


def _values(d: Difference) -> dict[str, Any]:
    named = ("numel", "changed", "norm_a", "norm_delta", "dot_a_delta", "relative", "cosine", "changed_fraction")
    return {name: getattr(d, name) for name in named}


def _layers(found: Comparison) -> dict[str, Difference]:
    """One entry per layer (the name up to its first number), and per tensor that is in no layer, in natural order."""
    from fastinterp.inspect.compare import Difference
    from fastinterp.inspect.describe import natural

    groups: dict[str, list[Difference]] = {}
    for name in sorted(found.tensors, key=natural):
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
        groups.setdefault(".".join(parts[: at + 1]), []).append(found.tensors[name])
    return {name: Difference.total(some) for name, some in groups.items()}


def _as_text(found: Comparison, every: bool) -> str:
    from fastinterp.inspect.describe import natural
    from fastinterp.messages import counted, table

    head = ["|d|/|a|", "cosine", "changed", "elements"]
    layers = [_row(n, d) for n, d in _layers(found).items()]
    total = _row(f"all {counted(len(found.tensors), 'tensor')}", found.total)
    notes = _notes(found)
    lines = [*notes, *([""] if notes else []), *table([["layer", *head], *layers, total], "<>>>>", indent=0)]
    names = sorted(found.tensors, key=natural)
    if not every:
        differing = [n for n in names if found.tensors[n].changed]
        names = sorted(differing, key=lambda n: _rank(found.tensors[n]))[:_MOST]
    title = "tensor" if len(names) == len(found.tensors) else f"tensor, the {len(names)} that differ most"
    if names:
        lines += ["", *table([[title, *head], *(_row(n, found.tensors[n]) for n in names)], "<>>>>", indent=0)]
    return "\n".join(lines)


def _rank(d: Difference) -> float:
    """NaN first, then what differs most, relative to nothing included."""
    return -math.inf if not d.finite else -(math.inf if d.relative is None else d.relative)


def _notes(found: Comparison) -> list[str]:
    """What the table does not show."""
    from fastinterp.messages import counted

    notes = []
    for what, some in (("only in A", found.only_a), ("only in B", found.only_b)):
        if some:
            notes.append(f"{counted(len(some), 'tensor')} {what}: {_listed(some)}")
    kinds = {n: f"{n} ({a} in A, {b} in B)" for n, (a, b) in found.kinds.items()}
    dtypes = [kinds[n] for n in kinds if n not in found.shapes]
    if found.shapes:
        notes.append(
            f"{counted(len(found.shapes), 'tensor')} of different shapes: {_listed(kinds[n] for n in found.shapes)}"
        )
    if dtypes:
        notes.append(f"{counted(len(dtypes), 'tensor')} of different dtypes: {_listed(dtypes)}")
    if found.unmeasured:
        many = counted(len(found.unmeasured), "tensor")
        notes.append(f"{many} not of a dtype that merges, so not measured: {_listed(found.unmeasured)}")
    in_a = [n for n, d in found.tensors.items() if not math.isfinite(d.norm_a)]
    in_b = [n for n, d in found.tensors.items() if math.isfinite(d.norm_a) and not d.finite]
    for which, some in (("A", in_a), ("B", in_b)):
        if some:
            notes.append(f"{which} has NaN, Inf or squares beyond float64, first in {_listed(some[:1])}")
    if found.tensors and not found.total.changed:
        notes.append("A and B hold the same numbers" + (" in all tensors that were measured" if notes else ""))
    return notes


def _listed(names: Iterable[str]) -> str:
    from fastinterp.messages import WIDTH, fit, listed

    return listed((fit(name, WIDTH - 10) for name in names), _LISTED)


def _row(name: str, d: Difference) -> list[str]:
    return [
        name,
        "-" if d.relative is None else f"{d.relative:.3e}",
        "-" if d.cosine is None else f"{d.cosine:.6f}",
        "-" if d.changed_fraction is None else f"{d.changed_fraction:.2%}",
        f"{d.numel:,}",
    ]
