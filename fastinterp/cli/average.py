"""`average`: the command that averages the checkpoints of a training run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastinterp.cli import faults, grammar, options
from fastinterp.cli.faults import told_together
from fastinterp.cli.merge import outcome_of, warn
from fastinterp.errors import UsageError
from fastinterp.paths.average import WEIGHT_NAMES
from fastinterp.presence import exists
from fastinterp.urls import is_url

_NAMED = 8  # checkpoints in a message


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@click.option(
    "-o", "--out", metavar="OUT", help="Output folder, or file NAME.safetensors (GGUF: NAME.gguf). Always needed."
)
@click.option(
    "--weights", type=click.Choice(WEIGHT_NAMES), default="uniform", show_default=True,
    help="uniform: the mean. ema: decay^age over the sum of these, age 0 the newest, which counts most. Others: those "
    "that stand for a learning rate that decays so; of 1-sqrt the oldest counts most, cosine those in the middle, "
    "linear all the same.",
)  # fmt: skip
@click.option(
    "--decay",
    type=float,
    metavar="B",
    help="Of --weights ema: the weight of each over that of the next newer. Default: 0.9.",
)
@click.option("--last", type=int, metavar="K", help="Only the K newest.")
@click.option(
    "--in-order", is_flag=True, help="Take them as given, oldest first. Default: by the numbers in the names."
)
@options.tokenizer_source
@options.push
@options.stream
@options.output
def average(
    checkpoints: tuple[str, ...], out: str | None, push_to: str | None, public: bool, quiet: bool, as_json: bool,
    **settings: Any,
) -> None:  # fmt: skip
    """Average the checkpoints of a training run.

    Each CHECKPOINT is a folder or a file of weights, or a pattern of such ('run/checkpoint-*'), 2 to 64 of them, whose
    names differ in their step numbers. The output has configuration and tokenizer of the newest, which is also what
    `base` stands for.

    \b
    Example:
      fastinterp average run/checkpoint-* -o averaged/
      fastinterp average run/checkpoint-* -o averaged/ --weights 1-sqrt --last 8
    """
    from fastinterp import api
    from fastinterp.cli import progress
    from fastinterp.messages import plain
    from fastinterp.paths.average import average_of

    options.refuse_ranks("average")
    if out is None:
        raise UsageError(_without_output(checkpoints))
    out = grammar.output_of(out)
    chosen = {name: settings.pop(name) for name in ("weights", "decay", "last", "in_order", "tokenizer_source")}
    found = average_of(checkpoints, **chosen)
    models = faults.of_models(found.checkpoints)
    with told_together(models, settings), outcome_of([Path(out)]), progress.shown(quiet or as_json) as shown:
        upload = options.upload(push_to, public, out, settings["force"])
        report = api.merge(found.recipe, out, progress=shown, **settings)
    address = options.uploaded(upload)
    rows = list(zip(found.checkpoints, found.weights, strict=True))
    if as_json:
        weights = [{"checkpoint": checkpoint, "weight": weight} for checkpoint, weight in rows]
        options.say_json({"weights": weights, **report.as_dict(), **({"uploaded": address} if address else {})})
    elif quiet:
        warn([report])
    else:
        lines = [f"  {weight:.4f}  {plain(checkpoint)}" for checkpoint, weight in rows]
        lines += [f"  uploaded: {address}"] if address else []
        options.say("\n".join([report.summary(), "weights, oldest first:", *lines]))


def _without_output(checkpoints: Sequence[str]) -> str:
    """What is said if -o is missing: the last of the arguments may be meant."""
    *models, last = checkpoints
    if not models or exists(last) or any(c in last for c in "*?[") or is_url(last):
        models, last = list(checkpoints), "OUT"
    names = shlex.join(models) if len(models) <= _NAMED else "CHECKPOINT..."
    return f"the output is not named. Write it as -o OUT: fastinterp average {names} -o {shlex.quote(last)}"
