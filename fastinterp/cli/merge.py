"""`merge` and `interpolate`: the commands that write checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastinterp.cli import faults, grammar, options
from fastinterp.cli.blas import one_blas_thread
from fastinterp.cli.faults import OUTCOME, RECIPE_KEYS, told_together
from fastinterp.cli.ranges import alphas
from fastinterp.errors import CheckpointError, FastinterpError, OutputError, UsageError

if TYPE_CHECKING:
    from fastinterp.execute.report import Report
    from fastinterp.lora.report import AdapterReport

_OF_ADAPTERS = ("threads", "force", "durable", "progress")  # arguments of a merge of adapters
_OF_MODELS = {
    "device": "auto", "max_shard_size": None, "max_memory": "512MB", "rounding": None, "missing": None,
    "channels": None, "quantize": None, "keep_intermediates": None, "verify_kept": False, "stream": False,
    "read": "auto",
}  # fmt: skip
_MENDED = "it is in place now"  # of a message that says what became of an earlier run


@click.command()
@options.recipe
@click.argument("outs", nargs=-1, metavar="[OUT]")
@grammar.out_option("The output, in place of OUT.")
@click.option(
    "--keep-intermediates", metavar="DIR",
    help="Of several documents: write the others, too, each into a folder of its name in DIR.",
)  # fmt: skip
@options.push
@options.stream
@options.output
def merge(
    recipe: str, outs: tuple[str, ...], named_out: str | None, keep_intermediates: str | None, push_to: str | None,
    public: bool, quiet: bool,
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

    grammar.refuse_checkpoints("merge", recipe, outs)
    out = grammar.only_output(outs, named_out, "merge RECIPE")
    report: Report | AdapterReport
    me = options.rank()
    if me is None:
        one_blas_thread()  # of adapters
        keys = {name: settings.pop(name) for name in (*RECIPE_KEYS, "private")}
        with told_together(recipe, keys), outcome_of([Path(out)]), progress.shown(quiet or as_json) as shown:
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


@click.command(cls=grammar.Command)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.argument("outs", nargs=-1, metavar="[OUT]")
@click.option(
    "--alpha", "--alphas", "points", callback=alphas, multiple=True, required=True, metavar="ALPHA",
    help="Position on the line: 0 is A, 1 is B. A number, a list 0,0.5,1 or a range 0:1:0.25. Repeatable.",
)  # fmt: skip
@grammar.out_option("The output, in place of OUT.")
@click.option("--base", metavar="CKPT", help="Task vectors: base + (1 - alpha)*(A - base) + alpha*(B - base).")
@click.option("--integers", metavar="CKPT", help="Take integer tensors from CKPT. Default: they must be equal.")
@options.tokenizer_source
@options.push
@options.stream
@options.output
def interpolate(
    a: str, b: str, outs: tuple[str, ...], points: list[float], named_out: str | None, base: str | None,
    push_to: str | None, public: bool, quiet: bool,
    as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Interpolate between checkpoints A and B, or extrapolate.

    The output is A + alpha*(B - A): the folder OUT, or a file NAME.safetensors (GGUF: NAME.gguf). Of several alphas it
    is OUT/alpha_0.3 and so on, or NAME_alpha_0.3.safetensors; one read of A and B makes up to 256 of them.

    \b
    Example:
      fastinterp interpolate model-a/ model-b/ mixed/ --alpha 0.3
      fastinterp interpolate model-a/ model-b/ -o path/ --alpha -0.5,0:1:0.25,1.5
    """
    from fastinterp import api
    from fastinterp.cli import progress
    from fastinterp.messages import counted, plain
    from fastinterp.paths.points import point_name, point_path

    options.refuse_ranks("interpolate")
    out = grammar.only_output(outs, named_out, "interpolate A B --alpha ...")
    paths = [Path(out)] if len(points) == 1 else [point_path(out, point_name(p)) for p in points]
    models = [a, b] if base is None else [base, a, b]
    with (
        told_together(faults.of_models(models), settings),
        outcome_of(paths),
        progress.shown(quiet or as_json) as shown,
    ):
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
        older = _older_points(Path(out), paths) if len(paths) > 1 else 0
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
    """Context manager: if the run is interrupted or cannot write, note which of `outs` are in place for the message, or
    what is kept of them.
    """
    before = _in_place(outs)
    try:
        yield
    except (KeyboardInterrupt, FastinterpError) as error:
        note: str = getattr(error, "outcome", "")  # what is kept, to be resumed
        if not note and isinstance(error, (KeyboardInterrupt, OutputError)):
            done = [str(out) for out, files in _in_place(outs).items() if files - before.get(out, set())]
            note = f"finished before that: {', '.join(done)}" if done else _nothing(outs, error)
        if note and note not in str(error) and _MENDED not in str(error):
            click.get_current_context().meta[OUTCOME] = [note]
        raise


def _nothing(outs: Iterable[Path], error: BaseException) -> str:
    """What is said if no output is in place."""
    from fastinterp.checkpoint.journal_file import BEGIN, FINISHING, journal_path, state_of
    from fastinterp.checkpoint.names import names_file

    with suppress(OSError, CheckpointError):
        for out in outs:
            path = journal_path(out.parent, out.name) if names_file(str(out)) else journal_path(out)
            state = state_of(path)
            if state == BEGIN and isinstance(error, KeyboardInterrupt):
                return "nothing was written; the unfinished output of an earlier run is kept"
            if state == FINISHING:
                return "the output is complete, and the next run into it puts it in place: run this again"
    return "nothing was written"


def _in_place(outs: Iterable[Path]) -> dict[Path, set[tuple[int, int]]]:
    """The files of weights of outputs, by device and inode: times would tell nothing where a clock is wrong."""
    found: dict[Path, set[tuple[int, int]]] = {}
    with suppress(OSError, ValueError):  # a name that cannot be used, say: it is refused
        for out in outs:
            below = ("*.safetensors", "*/*.safetensors", "*.gguf")
            files = [out] if out.is_file() else [path for pattern in below for path in out.glob(pattern)]
            found[out] = {(info.st_dev, info.st_ino) for info in map(os.stat, files)}
    return found


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
    from fastinterp.execute.kept import VISIBLE
    from fastinterp.execute.report import COPIES
    from fastinterp.messages import plain, size, table
    from fastinterp.ops.combine import MAX_OUTPUTS

    if len(reports) == 1:
        return [reports[0].summary()]
    effective = [
        f"{acts:.3g}" if acts is not None and abs(acts - alpha) > VISIBLE * abs(alpha) else ""
        for alpha, acts in zip(points, acting, strict=True)
    ]
    run, reads = reports[0], -(-len(reports) // MAX_OUTPUTS)
    read = "one read" if reads == 1 else f"{reads} reads"
    lines = [f"{len(reports)} outputs from {read}: {size(run.bytes_read)} read, {run.pace()}"]
    rows = [["alpha", "acts as" if any(effective) else "", "changed", "relative change", "output"]]
    for alpha, acts, report in zip(points, effective, reports, strict=True):
        effect = report.effect
        fraction, relative = effect.changed_fraction, effect.relative_change
        change = (
            ["computed" if report.adapted else "copy", ""]
            if fraction is None
            else [f"{fraction:.1%}", f"{relative or 0:.1e}"]
        )
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
                options.tell(plain(f"{report.output}: warning: {warning}"))
