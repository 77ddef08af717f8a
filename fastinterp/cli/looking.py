"""`explain`, `inspect` and `diff`: the commands that write nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fastinterp.cli import options

if TYPE_CHECKING:
    from fastinterp.engine.compare import Comparison, Difference

_MOST = 10  # tensors that diff lists without --all


@click.command()
@click.argument("recipe")
@options.threads
@options.max_shard_size
@options.max_memory
@options.as_json
def explain(recipe: str, threads: int | None, max_shard_size: str, max_memory: str, as_json: bool) -> None:
    """Say what a merge would read, compute and write.

    Reads headers only and writes nothing.

    \b
    Example:
      fastinterp explain recipe.yml
    """
    from fastinterp.compute.backends import cpu_threads
    from fastinterp.engine import explain as explained
    from fastinterp.engine import run
    from fastinterp.engine.schedule import make_window
    from fastinterp.files.layout import parse_size

    plan = run.explain(recipe, max_shard_size=max_shard_size)
    window = make_window(plan, cpu_threads(threads), parse_size(max_memory))
    if as_json:
        options.say_json(explained.as_dict(plan, window))
    else:
        options.say(explained.as_text(plan, window))


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
    from fastinterp.engine import contents
    from fastinterp.files.checkpoint import open_checkpoint

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
@click.option("--quiet", is_flag=True, help="Show no progress.")
@options.as_json
def diff(a: str, b: str, every: bool, threads: int | None, quiet: bool, as_json: bool) -> None:
    """Measure how checkpoint B differs from A.

    By layer and by tensor: |d|/|a| is the size of B - A relative to that of A, cosine that of the angle between A and
    B, changed the fraction of elements that differ.

    \b
    Example:
      fastinterp diff base/ fine-tune/
    """
    from fastinterp.cli import progress
    from fastinterp.engine.compare import compare

    with progress.shown(quiet or as_json) as shown:
        found = compare(a, b, threads=threads, progress=shown)
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
    }


def _values(d: Difference) -> dict[str, Any]:
    named = ("numel", "changed", "norm_a", "norm_delta", "dot_a_delta", "relative", "cosine", "changed_fraction")
    return {name: getattr(d, name) for name in named}


def _layers(found: Comparison) -> dict[str, Difference]:
    """One entry per layer (the name up to its first number), and per tensor that is in no layer, in natural order."""
    from fastinterp.engine.compare import Difference
    from fastinterp.engine.contents import natural

    groups: dict[str, list[Difference]] = {}
    for name in sorted(found.tensors, key=natural):
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
        groups.setdefault(".".join(parts[: at + 1]), []).append(found.tensors[name])
    return {name: Difference.total(some) for name, some in groups.items()}


def _as_text(found: Comparison, every: bool) -> str:
    from fastinterp.engine.contents import natural
    from fastinterp.engine.text import WIDTH, counted, fit, table

    head = ["|d|/|a|", "cosine", "changed", "elements"]
    layers = [_row(n, d) for n, d in _layers(found).items()]
    total = _row(f"all {counted(len(found.tensors), 'tensor')}", found.total)
    lines = table([["layer", *head], *layers, total], "<>>>>", indent=0)
    names = sorted(found.tensors, key=natural)
    if not every:
        names = sorted(names, key=lambda n: -(found.tensors[n].relative or 0.0))[:_MOST]
    title = "tensor" if len(names) == len(found.tensors) else f"tensor, the {len(names)} that differ most"
    if names:
        lines += ["", *table([[title, *head], *(_row(n, found.tensors[n]) for n in names)], "<>>>>", indent=0)]
    left_out = {
        "only in A": found.only_a,
        "only in B": found.only_b,
        "of different shapes": found.shapes,
        "not of a dtype that merges, so not measured": found.unmeasured,
    }
    for what, some in left_out.items():
        if some:
            lines.append(fit(f"{counted(len(some), 'tensor')} {what}: {', '.join(some)}", WIDTH))
    return "\n".join(lines)


def _row(name: str, d: Difference) -> list[str]:
    return [
        name,
        "-" if d.relative is None else f"{d.relative:.3e}",
        "-" if d.cosine is None else f"{d.cosine:.6f}",
        "-" if d.changed_fraction is None else f"{d.changed_fraction:.2%}",
        f"{d.numel:,}",
    ]
