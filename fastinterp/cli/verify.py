"""`verify` and `replay`: outputs checked against their receipts, and made again from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from fastinterp.cli import grammar, options
from fastinterp.cli.merge import outcome_of, warn


def _fraction(ctx: click.Context, param: click.Parameter, text: str) -> float:
    """`1%` or `0.01`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text, re.ASCII)
    value = float(found[1]) / (100.0 if found[2] else 1.0) if found else -1.0
    if not 0.0 <= value <= 1.0:
        raise click.BadParameter(f"{text!r} is no fraction: write 1%, or 0.01", ctx, param)
    return value


_models = click.option(
    "--models",
    multiple=True,
    metavar="PLACE",
    help="Where the models are: a folder that has them, or NAME=PATH for one. Default: where the receipt says, or near "
    "the output. Repeatable.",
)


@click.command()
@click.argument("output")
@click.option(
    "--sample",
    callback=_fraction,
    default="1%",
    show_default=True,
    metavar="PART",
    help="How much of the data is computed again, in blocks of all tensors. 0: only checksums are compared.",
)
@click.option("--full", is_flag=True, help="Compute all of the data again, and coefficients from the data, too.")
@click.option("--inputs", is_flag=True, help="Read the inputs' data, too, where the receipt has checksums of it.")
@_models
@options.threads
@options.max_memory
@options.offline
@options.quiet
@options.as_json
@click.pass_context
def verify(
    ctx: click.Context, /, output: str, models: tuple[str, ...], quiet: bool, as_json: bool, **settings: Any
) -> None:  # fmt: skip
    """Compare an output with its receipt and its recipe.

    OUTPUT is a folder or a file that fastinterp wrote; or a folder of several, as `sweep` writes. All files are
    compared with their checksums, then a sample of the data is computed again from the models and compared. Exit code
    1: something differs; 3: it is no output of fastinterp, or its models are not there.

    \b
    Example:
      fastinterp verify merged/
      fastinterp verify merged/ --full --models /data/models
    """
    from fastinterp.cli import progress
    from fastinterp.verification.made_output import several_in
    from fastinterp.verification.verify import verify as run

    several = several_in(output)
    with progress.shown(quiet or as_json) as shown:
        names = several or [output]
        results = [run(name, models=models or None, progress=shown, **settings) for name in names]
    if as_json:
        options.say_json([r.as_dict() for r in results] if several else results[0].as_dict())
    else:
        for result in results:
            if not quiet or not result.ok:
                options.say(result.summary())
    ctx.exit(next((code for code in (1, 3) if any(r.exit_code == code for r in results)), 0))


@click.command()
@click.argument("output")
@click.argument("outs", nargs=-1, metavar="[NEW]")
@grammar.out_option("The new output, in place of NEW.", metavar="NEW")
@_models
@options.device
@options.threads
@options.max_memory
@options.read
@options.force
@options.durable
@options.offline
@options.quiet
@options.as_json
@click.pass_context
def replay(
    ctx: click.Context, /, output: str, outs: tuple[str, ...], named_out: str | None, models: tuple[str, ...],
    quiet: bool, as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Make an output again from its receipt: the same bytes.

    OUTPUT is a folder or a file that fastinterp wrote, of which only the receipt is read; NEW a new folder, or a new
    file, if OUTPUT is one. Exit code 1: the new output differs
    from the receipt, because an input has changed since.

    \b
    Example:
      fastinterp replay merged/ again/
      fastinterp replay merged/ again/ --models ft1=/data/ft1
    """
    from fastinterp.cli import progress
    from fastinterp.verification.replay import replay as run

    options.refuse_ranks("replay")
    out = grammar.only_output(outs, named_out, "replay OUTPUT")
    with outcome_of([Path(out)]), progress.shown(quiet or as_json) as shown:
        result = run(output, out, models=models or None, progress=shown, **settings)
    if as_json:
        options.say_json({"ok": result.same, **result.as_dict()})
    elif quiet:
        warn([result.report])
    else:
        options.say(result.summary())
    ctx.exit(result.exit_code)
