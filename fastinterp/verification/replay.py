"""`replay`: an output made again from its receipt."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from fastinterp.arguments import path_of, size_of
from fastinterp.backends.cpu import Progress
from fastinterp.checkpoint.checksum import stated_checksum
from fastinterp.checkpoint.file_kinds import read_header
from fastinterp.checkpoint.names import GGUF, WEIGHTS, is_relative, names_file, quote
from fastinterp.checkpoint.regular_file import pieces_of
from fastinterp.checkpoint.sidecar_files import refuse_link
from fastinterp.errors import CheckpointError, FastinterpError, UsageError
from fastinterp.execute.checksums import small_file
from fastinterp.execute.report import Report
from fastinterp.execute.to_files import write_outputs
from fastinterp.messages import listed, plain
from fastinterp.methods import Method, given
from fastinterp.output.address import uploads
from fastinterp.output.receipt import RECEIPT
from fastinterp.plan.given_sums import with_sums
from fastinterp.presence import file_size
from fastinterp.progress import callback_of
from fastinterp.recipe.load import Recipe
from fastinterp.verification.inputs import which_changed
from fastinterp.verification.made_output import MadeOutput, open_output, refuse_numerics
from fastinterp.verification.models import ModelPlaces, elsewhere_lines, found_models, looked_at
from fastinterp.verification.recipes import plan_again


class Replay(msgspec.Struct, frozen=True):
    """What became of a replay.

    report       of the merge
    differences  files of the new output whose bytes are not those of the receipt, relative to its folder
    changed      which inputs have changed since, for people, if weights differ
    models       name in the receipt -> where the model was read, of those that were read elsewhere than it says
    """

    report: Report
    differences: tuple[str, ...] = ()
    changed: str = ""
    models: dict[str, str] = {}

    @property
    def same(self) -> bool:
        """Whether the new output has the bytes that the receipt says."""
        return not self.differences

    @property
    def exit_code(self) -> int:
        """0 the same bytes; 1 others."""
        return 0 if self.same else 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as --json prints them."""
        return {
            "same": self.same, "differences": list(self.differences), "changed": self.changed, "models": self.models,
            "report": self.report.as_dict(),
        }  # fmt: skip

    def summary(self) -> str:
        """The report in a few lines of text, and whether the bytes are those of the receipt."""
        report = "\n".join([self.report.summary(), *elsewhere_lines(self.models)])
        if self.same:
            return f"{report}\n  the checksums are those of the receipt"
        if weights := self._weights:
            what = f"different from the receipt: {listed(weights, 5)}, because {plain(self.changed)}"
        else:
            what = f"the weights are those of the receipt, but not all other files: {listed(self.differences, 5)}"
        return f"{report}\n  {what}"

    @property
    def _weights(self) -> list[str]:
        """The files of weights among the differences."""
        return [name for name in self.differences if name.endswith((WEIGHTS, GGUF))]

    def __str__(self) -> str:
        return self.summary()


@uploads
def replay(
    output: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    models: ModelPlaces | None = None,
    device: str = "auto",
    threads: int | None = None,
    max_memory: str | int = "512MB",
    force: bool = False,
    durable: bool = False,
    read: str = "auto",
    progress: Progress | bool | None = None,
    methods: tuple[Method, ...] = (),
) -> Replay:
    """Make an output again from its receipt: the same bytes, if the models have theirs.

    output  a folder or a file that fastinterp wrote
    out     a new folder, or a new file, as `output` is one
    models  where the models are, if they are not where the receipt says, or near the output: a folder that has them, or
            `NAME=PATH`, or several of both; or a mapping by name
    The other arguments are those of `merge`.

    Coefficients that came from the data are those of the receipt, where it has them.
    Raises: what `merge` does; CheckpointError, if `output` has no receipt, or a model is not found.
    """
    source, target = path_of(output, "output"), path_of(out, "out")
    with given(methods):
        made = open_output(source)
        if names_file(target) != made.ending:
            kind = f"one file: give a name that ends in {quote(made.ending)}" if made.ending else "a folder: name one"
            raise UsageError(f"{quote(source)} is {kind}. Got {quote(target)}")
        refuse_numerics(made.told, made.name)
        places = found_models(made, models)
        plan = plan_again(made, places, partial(looked_at, made, models))
        if made.receipt is not None:
            plan = with_sums(plan, made.receipt.coefficients, str(made.folder / RECEIPT))
        edit_files = partial(_as_listed, made) if made.receipt is not None else None
        (report,) = write_outputs(
            [plan], [[target]], device=device, threads=threads, max_memory=size_of(max_memory), force=force,
            durable=durable, read=read, progress=callback_of(progress), edit_files=edit_files,
        )  # fmt: skip
    try:
        result = Replay(report, _differences(made, open_output(target)), models=places)
        if result._weights:
            result = structs.replace(result, changed=which_changed(plan, made.receipt, threads))
        return result
    except FastinterpError as error:
        error.outcome = "the output is complete, but is not compared with the receipt"  # type: ignore[attr-defined]
        raise


def _as_listed(made: MadeOutput, recipe: Recipe, files: dict[str, bytes | Path]) -> None:
    """Make the small files of the new output those that the receipt lists: without others, as options of other programs
    leave out; with a copy of the recipe, as mergekit's programs write it, or of what is beside the receipt.
    """
    assert made.receipt is not None
    for name in files.keys() - made.receipt.files.keys():
        del files[name]
    text = made.told.recipe.encode("utf-8", "surrogatepass")
    for name in made.receipt.files.keys() - files.keys():
        if small_file([text]) == made.receipt.files[name]:
            files[name] = text
        elif is_relative(name) and _is_unchanged(made, name):
            files[name] = made.folder / name


def _is_unchanged(made: MadeOutput, name: str) -> bool:
    """Whether a small file of the output is there, and is what the receipt says."""
    assert made.receipt is not None
    try:
        refuse_link(made.folder, name)
        path = made.folder / name
        return (
            file_size(path) == made.receipt.files[name].size
            and small_file(pieces_of(str(path))) == made.receipt.files[name]
        )
    except CheckpointError:
        return False


def _differences(made: MadeOutput, again: MadeOutput) -> tuple[str, ...]:
    """The files of which checksums that receipts have differ, by name."""
    if made.receipt is None or again.receipt is None:
        own, other = ([stated_checksum(read_header(p, 0).metadata) for p in m.weights] for m in (made, again))
        return tuple(str(p) for p, a, b in zip(again.weights, own, other, strict=True) if a != b)
    weights = {n: f.checksum for n, f in made.receipt.weights.items()}
    now = {n: f.checksum for n, f in again.receipt.weights.items()}
    small, others = made.receipt.files, again.receipt.files
    names = [*sorted({*weights, *now}), *sorted({*small, *others})]
    return tuple(n for n in names if weights.get(n) != now.get(n) or small.get(n) != others.get(n))
