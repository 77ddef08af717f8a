"""`check`, `explain`, `inspect` and `diff`: commands that write nothing."""

from __future__ import annotations

import sys

import click

from fastinterp.cli import grammar, options
from fastinterp.cli.faults import told_together
from fastinterp.errors import ShapeError


@click.command()
@options.recipe
@click.option("--strict", is_flag=True, help="Exit with code 2 if there are warnings.")
@options.offline
@options.as_json
def check(recipe: str, strict: bool, as_json: bool) -> None:
    """Report all errors of a recipe and its models, and warnings.

    Reads headers, scales of quantised weights and samples of the models, and writes nothing. The exit code is that
    which `merge` would have.

    \b
    Example:
      fastinterp check recipe.yml
    """
    from fastinterp.inspect.check import check as checked

    grammar.refuse_checkpoints("check", recipe)
    result = checked(recipe)
    if as_json:
        options.say_json(result.as_dict())
    else:
        options.say(str(result))
    click.get_current_context().exit(result.exit_code or (2 if strict and result.warnings else 0))


@click.command()
@options.recipe
@options.threads
@options.max_shard_size
@options.max_memory
@click.option("--dtype", metavar="NAME", help="As for merge.")
@click.option("--rounding", type=click.Choice(["nearest", "stochastic"]), help="As for merge.")
@click.option("--seed", type=int, metavar="N", help="As for merge.")
@options.missing
@options.channels
@options.quantize
@options.offline
@options.as_json
def explain(
    recipe: str,
    threads: int | None,
    max_shard_size: str | None,
    max_memory: str,
    dtype: str | None,
    rounding: str | None,
    seed: int | None,
    missing: str | None,
    channels: str | None,
    quantize: str | None,
    as_json: bool,
) -> None:
    """Describe what a merge would read, compute and write.

    Reads headers, and of the weights only what may be a copy of another tensor; writes nothing.

    \b
    Example:
      fastinterp explain recipe.yml
    """
    from fastinterp.api import explanation_of
    from fastinterp.arguments import size_of
    from fastinterp.plan.plan import documents

    grammar.refuse_checkpoints("explain", recipe)
    keys = {"dtype": dtype, "rounding": rounding, "seed": seed, "missing": missing, "channels": channels}
    with told_together(recipe, keys | {"quantize": quantize}):
        recipes = documents(recipe, dtype, rounding, seed, missing, channels, quantize)
        explanation = explanation_of(recipes, max_shard_size, threads, size_of(max_memory))
    if as_json:
        options.say_json(explanation.as_dict())
    else:
        options.say(str(explanation))


@click.command()
@click.argument("checkpoint")
@click.option("--all", "every", is_flag=True, help="List every tensor. Default: a line for each kind.")
@options.offline
@options.as_json
def inspect(checkpoint: str, every: bool, as_json: bool) -> None:
    """Show the contents of a checkpoint, from its headers.

    Of what fastinterp wrote a part of the data is compared with its checksums: `fastinterp verify` compares all of it.

    CHECKPOINT is a folder, a file of weights (.safetensors, .gguf, .bin, .pt, .pth, .ckpt), or a Hub id; adapters may
    stand behind it, as in MODEL+LORA: then it says what they change, and shows the model and each of them. Shows files,
    tensors, dtypes, metadata, and the receipt of the merge that wrote it.

    \b
    Example:
      fastinterp inspect merged/
    """
    from fastinterp.checkpoint import remote
    from fastinterp.checkpoint.open import open_checkpoint
    from fastinterp.execute.torn import refuse_torn
    from fastinterp.inspect import describe
    from fastinterp.recipe.references import ModelRef

    if ModelRef.of(checkpoint).adapters:
        from fastinterp.execute.damaged import refuse_damaged
        from fastinterp.inspect.describe_adapted import adapted_as_dict, adapted_as_text
        from fastinterp.plan.models import open_model

        with remote.headers_only():
            model = open_model(checkpoint)
        refuse_damaged([model])
        if as_json:
            options.say_json(adapted_as_dict(model))
        else:
            options.say(adapted_as_text(model, every=every))
        return
    opened = open_checkpoint(checkpoint)
    refuse_torn(opened, sampled=1)
    if as_json:
        options.say_json(describe.as_dict(opened))
    else:
        options.say(describe.as_text(opened, every=every, whole=options.columns(sys.stdout) is None))


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--all", "every", is_flag=True, help="List every tensor. Default: the 10 that differ most.")
@options.threads
@click.option("--plot", metavar="FILE", help="Plot the relative change by layer to FILE: .png, .svg or .pdf.")
@click.option("--quiet", is_flag=True, help="Do not show progress.")
@options.offline
@options.as_json
def diff(
    a: str, b: str, every: bool, threads: int | None, plot: str | None, quiet: bool, as_json: bool
) -> None:  # fmt: skip
    """Measure how checkpoint B differs from A.

    For each layer and tensor: |d|/|a|, the norm of d = B - A relative to that of A; the cosine similarity of A and B;
    and the fraction of elements that differ. Exit code 3: they have no tensor that can be compared.

    \b
    Example:
      fastinterp diff base/ fine-tune/
      fastinterp diff base/ fine-tune/ --plot change.png
    """
    from fastinterp.cli import progress
    from fastinterp.inspect.compare import compare
    from fastinterp.inspect.compare_text import as_dict, as_text

    if plot is not None:
        from fastinterp.paths.plot import check_figure

        check_figure(plot)  # before the measurement, which takes long
    with progress.shown(quiet or as_json) as shown:
        comparison = compare(a, b, threads=threads, progress=shown)
    if plot is not None:
        from fastinterp.paths.plot import plot_difference

        plot_difference(comparison, plot, f"{b} against {a}")
    if as_json and comparison.tensors:
        options.say_json({"a": a, "b": b, **as_dict(comparison)})
    elif not as_json:
        options.say(as_text(comparison, every=every, whole=options.columns(sys.stdout) is None))
    if not comparison.tensors:
        raise ShapeError(f"nothing was compared: no tensor of {a} can be measured against one of {b}")
