"""`sweep`: many points of a path from one read of the models."""

from __future__ import annotations

import gc
import glob
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from fastinterp.checkpoint.names import names_file
from fastinterp.cli import faults, grammar, options, ranges
from fastinterp.cli.faults import told_together
from fastinterp.cli.merge import outcome_of, warn
from fastinterp.errors import UsageError
from fastinterp.messages import counted, plain, size, table

if TYPE_CHECKING:
    from fastinterp.paths.points import Point


@click.command(cls=grammar.Command)
@click.argument("names", nargs=-1, metavar="[A B] [OUT]")
@click.option(
    "--alphas", "--alpha", callback=ranges.alphas, multiple=True, metavar="ALPHAS",
    help="Points from A (0) to B (1), and beyond: -0.5:1.5:0.1, or 0,0.5,1. Repeatable.",
)  # fmt: skip
@grammar.out_option("The output, in place of OUT.")
@click.option("--base", metavar="CKPT", help="Start of the directions; with A and B: base + (1-alpha)*(A-base) + ...")
@click.option("--add", callback=ranges.named, multiple=True, metavar="NAME=CKPT", help="A direction from the base.")
@click.option(
    "--grid", callback=ranges.grids, multiple=True, metavar="NAME=POINTS",
    help="Distances in that direction: 0:1:0.25, or 0,0.5,1.",
)  # fmt: skip
@click.option(
    "--method", metavar="NAME", help="A method instead of the straight line: slerp, ties, ... (fastinterp methods)."
)
@click.option(
    "--parameter",
    "parameters",
    callback=ranges.named,
    multiple=True,
    metavar="NAME=VALUE",
    help="A parameter of the method.",
)
@click.option("--integers", metavar="CKPT", help="Take integer tensors from CKPT. Default: they must be equal.")
@options.tokenizer_source
@click.option("--virtual", is_flag=True, help="Write only a recipe per point, for fastinterp.load.")
@click.option(
    "--in-memory", metavar="MODULE:FUNCTION",
    help="Write nothing: call function(point, tensors) for each point, and print what it returns.",
)  # fmt: skip
@click.option(
    "--framework", type=click.Choice(["torch", "numpy"]), default="torch", show_default=True,
    help="Library of the tensors that --in-memory passes on.",
)  # fmt: skip
@options.output
def sweep(
    names: tuple[str, ...], named_out: str | None, in_memory: str | None, parameters: dict[str, str], quiet: bool,
    as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Merge at many points of a path, reading the models once.

    Points are on the line from A to B, and beyond; or on a grid of directions from a base. Outputs are the folders
    OUT/alpha_0.3, or OUT/pos_0.25_formal_-1; for a file NAME.safetensors (GGUF: NAME.gguf) NAME_alpha_0.3.safetensors.

    \b
    Example:
      fastinterp sweep model-a/ model-b/ path/ --alphas -0.5:1.5:0.1
      fastinterp sweep grid/ --base base/ --add pos=P/ --add formal=F/ \\
        --grid pos=0:1:0.25 --grid formal=-1:1:0.5
    """
    from fastinterp.cli import progress
    from fastinterp.paths.sweep import sweep as run_sweep

    options.refuse_ranks("sweep")
    ends, outs = (names[:2], names[2:]) if not settings["add"] or len(names) > 1 else ((), names)
    a, b = (*ends, None, None)[:2]
    out = None
    if in_memory is None or outs or named_out is not None:
        out = grammar.only_output(outs, named_out, "sweep A B --alphas ...")
    if not settings["alphas"]:
        settings["alphas"] = None
    if in_memory is not None:
        settings["max_memory"] = _unless_default("max_memory", settings["max_memory"])
    settings["parameters"] = {name: _value(text) for name, text in parameters.items()}
    callback = None
    if in_memory is not None:
        gc.enable()  # the function may leave garbage at every point
        callback = _callback(_function(in_memory), in_memory, as_json)
    models = [name for name in (settings["base"], a, b, *settings["add"].values()) if name is not None]
    of_models = faults.of_models(models) if models else None
    with (
        told_together(of_models, settings),
        outcome_of([] if out is None else _Folders(out)),
        progress.shown(quiet or as_json) as shown,
    ):
        points = run_sweep(a, b, out=out, in_memory=callback, progress=shown, **settings)
    if as_json:
        options.say_json([_as_dict(point) for point in points])
    elif quiet:
        warn([point.report for point in points if point.report is not None])
    else:
        options.say("\n".join(_lines(points, settings["virtual"])))


class _Folders(Iterable[Path]):
    """The outputs of a sweep, listed at each iteration: subfolders, or files, which are not known before it."""

    def __init__(self, folder: str):
        self._folder = Path(folder)

    def __iter__(self) -> Iterator[Path]:
        if names_file(str(self._folder)):
            return iter(sorted(self._folder.parent.glob(f"{glob.escape(self._folder.stem)}_*{self._folder.suffix}")))
        return iter(sorted(p for p in self._folder.glob("*") if p.is_dir()))


def _unless_default(name: str, value: Any) -> Any:
    """The value of an option, or None if it is the default."""
    source = click.get_current_context().get_parameter_source(name)
    return None if source is click.core.ParameterSource.DEFAULT else value


def _value(text: str) -> Any:
    """A parameter's value as in recipes: JSON, or else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _function(argument: str) -> Callable[..., Any]:
    """The function of `MODULE:FUNCTION`; the module may be in the current folder. Raises: UsageError."""
    from importlib import import_module

    module, colon, name = argument.partition(":")
    if not colon or not module or not name:
        raise UsageError(f"--in-memory takes MODULE:FUNCTION, got {argument!r}")
    sys.path.insert(0, "")
    try:
        function: object = getattr(import_module(module), name, None)
    except ImportError as error:
        raise UsageError(f"--in-memory {argument}: {error}") from None
    if not callable(function):
        raise UsageError(f"--in-memory {argument}: {module} has no function {name}")
    return function


def _callback(function: Callable[..., Any], argument: str, as_json: bool) -> Callable[[Point, dict[str, Any]], Any]:
    """Calls `function` and returns its result in Python's own types. For JSON other types are refused at once.

    argument  of --in-memory, for messages
    The callback raises UsageError, also if the function raises anything, whose traceback is printed.
    """

    def call(point: Point, tensors: dict[str, Any]) -> Any:
        try:
            result = function(point, tensors)
        except Exception as error:  # any: it is the user's own
            options.tell("".join(traceback.format_exception(error.with_traceback(_below(error)))).rstrip())
            what = f"{type(error).__name__}: {error}".rstrip(": ")
            raise UsageError(f"--in-memory {argument} raised {what} at {point.name}") from None
        try:
            return _python(result)
        except TypeError as error:
            if as_json:
                raise UsageError(
                    f"--in-memory {argument} returned {error} at {point.name}, which JSON does not have. Return "
                    "numbers, text, lists or mappings of them by name"
                ) from None
            return result

    return call


def _below(error: Exception) -> TracebackType | None:
    """The traceback from the user's function on."""
    return error.__traceback__ and error.__traceback__.tb_next


def _python(value: Any) -> Any:
    """A result with numbers of numpy and torch as Python's. Raises: TypeError, which names a type that JSON lacks."""
    if isinstance(value, float):
        return float(value)  # numpy.float64 is one
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise TypeError(f"a mapping with the key {wrong[0]!r}"[:100])
        return {key: _python(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_python(one) for one in value]
    count = getattr(value, "numel", lambda: getattr(value, "size", None))()
    if hasattr(value, "item") and count == 1:
        return _python(value.item())
    shape = getattr(value, "shape", None)
    suffix = "" if shape is None else f" of shape {list(shape)}"
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__}{suffix}")


def _as_dict(point: Point) -> dict[str, Any]:
    """A point as plain values, for JSON."""
    path = None if point.path is None else str(point.path)
    plain: dict[str, Any] = {"name": point.name, "at": dict(point.at), "acts_as": point.acts_as, "path": path}
    if point.report is not None:
        plain["report"] = point.report.as_dict()
    return plain if point.result is None else {**plain, "result": point.result}


def _lines(points: Sequence[Point], virtual: bool) -> list[str]:
    """What the command prints: a row per point, notes that all points share, and the warnings of each."""
    if virtual:
        folder = "" if points[0].path is None else str(points[0].path.parent)
        return [
            f"{counted(len(points), 'recipe')} in {plain(folder)}: give one to `fastinterp merge` or fastinterp.load"
        ]
    reports = [point.report for point in points if point.report is not None]
    run = reports[0]
    written = points[0].path is not None
    pace = run.pace() if written else "in memory"
    lines = [f"{counted(len(points), 'output')}: {size(run.bytes_read)} read, {pace}"]
    names = list(points[0].at)
    rows = [[*names, "acts as", "changed", "relative change", "output" if written else "result"]]
    for point, report in zip(points, reports, strict=True):
        effect = report.effect
        fraction, relative = effect.changed_fraction, effect.relative_change
        change = (
            ["computed" if report.adapted else "copy", ""]
            if fraction is None
            else [f"{fraction:.1%}", f"{relative or 0:.1e}"]
        )
        effective = " ".join(f"{distance:.3g}" for distance in (point.acts_as or {}).values())
        shown = str(point.path) if written else str(point.result)
        rows.append([*(f"{distance:g}" for distance in point.at.values()), effective, *change, shown])
    lines += table(rows, ">" * (len(names) + 3) + "<")
    shared = [note for note in reports[0].notes() if all(note in r.notes() for r in reports)]
    lines += [f"  {note}" for note in shared]
    for point, report in zip(points, reports, strict=True):
        lines += [f"  {point.name}: {note}" for note in report.notes() if note not in shared and "warning" in note]
    return lines
