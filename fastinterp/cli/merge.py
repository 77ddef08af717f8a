"""`merge` and `interpolate`: the commands that write checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastinterp.cli import OUTCOME, options
from fastinterp.cli.blas import one_blas_thread
from fastinterp.cli.ranges import alphas
from fastinterp.errors import FastinterpError, OutputError, UsageError

if TYPE_CHECKING:
    from fastinterp.execute.report import Report
    from fastinterp.lora.report import AdapterReport

_RECIPE_KEYS = ("dtype", "rounding", "seed", "missing", "channels", "quantize")  # options that replace a recipe's keys
_OF_ADAPTERS = ("threads", "force", "durable", "progress")  # arguments of a merge of adapters
_OF_MODELS = {
    "device": "auto", "max_shard_size": None, "max_memory": "512MB", "rounding": None, "missing": None,
    "channels": None, "quantize": None, "keep_intermediates": None, "verify_kept": False, "stream": False,
}  # fmt: skip
_VISIBLE = 0.01  # relative difference of an effective alpha from the alpha, above which it is shown


@click.command()
@options.recipe
@click.argument("out")
@click.option(
    "--keep-intermediates", metavar="DIR",
    help="Of several documents: write the others, too, each into a folder of its name in DIR.",
)  # fmt: skip
@options.push
@options.stream
@options.output
def merge(
    recipe: str, out: str, keep_intermediates: str | None, push_to: str | None, public: bool, quiet: bool,
    as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Merge checkpoints according to a recipe.

    RECIPE is a YAML file, or - for stdin; OUT a new folder, or a new file, NAME.safetensors (GGUF: NAME.gguf). Each
    input byte is read once, and once more for each statistic that the method needs: see `fastinterp methods NAME`.
    Processes started by torchrun or srun share the work: each writes a part of the output files. With `out: lora` in
    the recipe the models are LoRA adapters, and so is the output: options about memory, files and devices have no
    effect then.

    \b
    Example:
      fastinterp merge recipe.yml merged/ --dtype bfloat16
      torchrun --nproc-per-node=4 -m fastinterp merge recipe.yml merged/
    """
    from fastinterp import api
    from fastinterp.cli import progress
    from fastinterp.plan.plan import documents

    report: Report | AdapterReport
    me = options.rank()
    if me is None:
        one_blas_thread()  # of adapters
        with outcome_of([Path(out)]), progress.shown(quiet or as_json) as shown:
            keys = {name: settings.pop(name) for name in _RECIPE_KEYS}
            recipes = documents(recipe, **keys)
            upload = options.upload(push_to, public, out, settings["force"])
            settings |= {"progress": shown, "keep_intermediates": keep_intermediates}
            if api.merges_adapters(recipes):
                report = api.merge_adapter_document(recipes[0], out, **_of_adapters(settings | keys))
            else:
                report = api.merge_documents(recipes, out, **settings)
        address = options.uploaded(upload)
    else:
        if push_to is not None or public:
            options.refuse_ranks("merge --push-to")
        if settings.pop("stream"):
            options.refuse_ranks("merge --stream")
        address = ""
        if keep_intermediates is not None:
            options.refuse_ranks("merge --keep-intermediates")
        from fastinterp.execute.distributed import merge as distributed

        with resumable(Path(out)), progress.shown(quiet or as_json or me.rank > 0) as shown:
            shared = distributed.merge(recipe, out, me, progress=shown, **settings)
        if shared is None:
            return  # rank 0 prints the report
        report = shared
    if as_json:
        options.say_json(report.as_dict() | ({"uploaded": address} if address else {}))
    elif quiet:
        warn([report])
    else:
        options.say("\n".join([report.summary(), *([f"  uploaded: {address}"] if address else [])]))


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--alpha", "points", callback=alphas, multiple=True, required=True, metavar="ALPHA",
    help="Position on the line: 0 is A, 1 is B. A number, a list 0,0.5,1 or a range 0:1:0.25. Repeatable.",
)  # fmt: skip
@click.option(
    "-o", "--out", required=True, metavar="DIR",
    help="Output folder, or file NAME.safetensors (GGUF: NAME.gguf); of several outputs, DIR/alpha_0.3 or "
    "NAME_alpha_0.3.safetensors.",
)  # fmt: skip
@click.option("--base", metavar="CKPT", help="Task vectors: base + (1 - alpha)*(A - base) + alpha*(B - base).")
@click.option("--integers", metavar="CKPT", help="Take integer tensors from CKPT. Default: they must be equal.")
@options.tokenizer_source
@options.push
@options.stream
@options.output
def interpolate(
    a: str, b: str, points: list[float], out: str, base: str | None, push_to: str | None, public: bool, quiet: bool,
    as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Interpolate between checkpoints A and B, or extrapolate.

    The output is A + alpha*(B - A). One read of A and B makes up to 256 outputs.

    \b
    Example:
      fastinterp interpolate model-a/ model-b/ --alpha 0.3 -o mixed/
      fastinterp interpolate model-a/ model-b/ --alpha -0.5 --alpha 0:1:0.25 --alpha 1.5 -o path/
    """
    from fastinterp import api
    from fastinterp.cli import progress
    from fastinterp.messages import counted, plain
    from fastinterp.paths.points import point_name, point_path

    options.refuse_ranks("interpolate")
    outs = [Path(out)] if len(points) == 1 else [point_path(out, point_name(p)) for p in points]
    with outcome_of(outs), progress.shown(quiet or as_json) as shown:
        if push_to is not None and len(points) > 1:
            raise UsageError("--push-to uploads one model: give one --alpha")
        upload = options.upload(push_to, public, out, settings["force"])
        reports = api.interpolate(a, b, points, out, base=base, progress=shown, **settings)
    address = options.uploaded(upload)
    acting = [_acts_as(p, r) if base is None else None for p, r in zip(points, reports, strict=True)]
    if as_json:
        rows = zip(points, acting, reports, strict=True)
        uploaded = {"uploaded": address} if address else {}
        options.say_json([{"alpha": p, "acts_as": x, **r.as_dict(), **uploaded} for p, x, r in rows])
    elif quiet:
        warn(reports)
    else:
        lines = _path_lines(points, acting, reports)
        older = _older_points(Path(out), outs) if len(outs) > 1 else 0
        if older:
            lines.append(f"  not changed: {counted(older, 'older alpha_* folder')} in {plain(out)}")
        if address:
            lines.append(f"  uploaded: {address}")
        options.say("\n".join(lines))


def _of_adapters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a merge of adapters. Raises: UsageError, if there are options that are about models only."""
    given = [f"--{name.replace('_', '-')}" for name, default in _OF_MODELS.items() if settings[name] != default]
    if given:
        are = "is" if len(given) == 1 else "are"
        raise UsageError(
            f"the recipe merges adapters (`out: lora`), and {', '.join(given)} {are} about models. Leave that out"
        )
    return {name: settings[name] for name in _OF_ADAPTERS}


@contextmanager
def outcome_of(outs: Iterable[Path]) -> Iterator[None]:
    """Context manager: if the run is interrupted or cannot write, note which of `outs` are complete for the message, or
    what is kept of them.
    """
    start = time.time()
    try:
        yield
    except (KeyboardInterrupt, FastinterpError) as error:
        done = [str(o) for o in outs if any(p.stat().st_mtime >= start for p in _weights(o))]
        note: str = getattr(error, "outcome", "")  # what is kept, to be resumed
        if not note and isinstance(error, (KeyboardInterrupt, OutputError)):
            note = f"finished before that: {', '.join(done)}" if done else "nothing was written"
        if note and note not in str(error):
            click.get_current_context().meta[OUTCOME] = [note]
        raise


def _weights(out: Path) -> list[Path]:
    """The weights of an output that is in place."""
    return [out] if out.is_file() else [*out.glob("*.safetensors"), *out.glob("*/*.safetensors"), *out.glob("*.gguf")]


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Context manager: if a merge of several processes fails, note the complete files, with which it can be resumed."""
    from fastinterp.output.shared_folder import complete_files

    try:
        yield
    except (KeyboardInterrupt, FastinterpError):
        done = complete_files(out)
        if done:
            click.get_current_context().meta[OUTCOME] = [
                f"{done} complete files are kept: run the same merge again to resume"
            ]
        raise


def _acts_as(alpha: float, report: Report) -> float | None:
    """The effective alpha after the rounding of the output; None for copies."""
    strength = report.effect.strength
    return None if strength is None else alpha * strength


def _path_lines(points: Sequence[float], acting: Sequence[float | None], reports: Sequence[Report]) -> list[str]:
    """The text about one or several outputs, with effective alphas where they differ from the alphas."""
    from fastinterp.execute.report import COPIES
    from fastinterp.messages import plain, size, table
    from fastinterp.ops.combine import MAX_OUTPUTS

    effective = [
        f"{acts:.3g}" if acts is not None and abs(acts - alpha) > _VISIBLE * abs(alpha) else ""
        for alpha, acts in zip(points, acting, strict=True)
    ]
    if len(reports) == 1:
        return [reports[0].summary(), *(f"  alpha {points[0]:g} acts as {acts}" for acts in effective if acts)]
    run, reads = reports[0], -(-len(reports) // MAX_OUTPUTS)
    read = "one read" if reads == 1 else f"{reads} reads"
    lines = [f"{len(reports)} outputs from {read}: {size(run.bytes_read)} read, {run.pace()}"]
    rows = [["alpha", "acts as" if any(effective) else "", "changed", "relative change", "output"]]
    for alpha, acts, report in zip(points, effective, reports, strict=True):
        effect = report.effect
        fraction, relative = effect.changed_fraction, effect.relative_change
        change = ["copy", ""] if fraction is None else [f"{fraction:.1%}", f"{relative or 0:.1e}"]
        rows.append([f"{alpha:g}", acts, *change, report.output])
    lines += table(rows, ">>>><")
    every = [r.notes() for r in reports]
    lines += [f"  {note}" for note in every[0] if _shared(note, every)]
    for report, notes in zip(reports, every, strict=True):
        lines += [f"  {plain(report.output)}: {n}" for n in notes if n != COPIES and not _shared(n, every)]
    return lines


def _older_points(out: Path, outs: Sequence[Path]) -> int:
    return len([p for p in out.glob("alpha_*") if p.is_dir() and p not in outs])


def _shared(note: str, every: Sequence[Sequence[str]]) -> bool:
    """Whether all outputs have the note, so that it is printed once."""
    return all(note in notes for notes in every)


def warn(reports: Sequence[Report | AdapterReport]) -> None:
    from fastinterp.messages import plain

    every = [r.warnings for r in reports]
    for report in reports:
        for warning in report.warnings:
            if report is reports[0] or not _shared(warning, every):
                click.echo(plain(f"{report.output}: warning: {warning}"), err=True)
