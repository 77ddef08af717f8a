"""`verify`: whether an output has the bytes that its receipt says, and that its recipe gives."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastinterp._version import __version__
from fastinterp.arguments import path_of, size_of
from fastinterp.backends.cpu import Progress
from fastinterp.checkpoint.checksum import UNKNOWN
from fastinterp.checkpoint.file_kinds import read_header
from fastinterp.checkpoint.remote import opened, read_up_to
from fastinterp.errors import CheckpointError, ShapeError, StorageError, UnreadableError, UsageError
from fastinterp.messages import counted, listed, plain, seconds, size
from fastinterp.methods import Method, given
from fastinterp.output.receipt import RECEIPT
from fastinterp.plan.given_sums import with_sums
from fastinterp.plan.plan import Plan
from fastinterp.presence import names_at
from fastinterp.progress import callback_of
from fastinterp.verification.checks import Checked, Finding, check_files, check_stated, narrowed
from fastinterp.verification.inputs import about_unknown_data, changed_inputs, which_changed
from fastinterp.verification.made_output import MadeOutput, open_output, refuse_numerics
from fastinterp.verification.models import ModelPlaces, elsewhere_lines, found_models, looked_at
from fastinterp.verification.pieces import Piece, pieces_of, sampled, whole_pieces
from fastinterp.verification.recipes import plan_again
from fastinterp.verification.recompute import Difference, Place, differences

_DIFFERENT, _NOT_KNOWN = 1, 3  # exit codes
_LISTED = 8  # findings in a summary


@dataclass(frozen=True)
class Verification:
    """What became of a verification.

    output       as it was named
    findings     files that are not what the receipt says; each has file, what and tensors
    differences  tensors that are not what the recipe gives, of those that were computed again; each has file, tensor,
                 element (the first that differs), elements (how many do) and compared
    files        number of files that were compared with checksums
    nbytes       bytes of these
    recomputed   bytes of the output that were computed again
    tensors      number of tensors that these belong to
    of           bytes of all tensors
    models       name in the receipt -> where the model was read, of those that were read elsewhere than it says
    receipt      whether the other files, too, could be compared: not, if a folder has no fastinterp_receipt.json
    unverified   why it was not computed again; empty, if it was, or was not asked for
    notes        for people
    wall_s       time that it took, seconds
    """

    output: str
    findings: tuple[Finding, ...] = ()
    differences: tuple[Difference, ...] = ()
    files: int = 0
    nbytes: int = 0
    recomputed: int = 0
    tensors: int = 0
    of: int = 0
    models: dict[str, str] = field(default_factory=dict)
    receipt: bool = True
    unverified: str = ""
    notes: tuple[str, ...] = ()
    wall_s: float = field(default=0.0, compare=False)

    @property
    def ok(self) -> bool:
        """Whether nothing differs, and all that was asked for was compared."""
        return not self.findings and not self.differences and not self.unverified

    @property
    def exit_code(self) -> int:
        """0 as it should be; 1 different; 3 not known, because it could not be computed again."""
        if self.findings or self.differences:
            return _DIFFERENT
        return _NOT_KNOWN if self.unverified else 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as --json prints them."""
        import msgspec

        plain_values: dict[str, Any] = msgspec.to_builtins(self)
        return {"ok": self.ok, "exit_code": self.exit_code, **plain_values}

    def __str__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """The result in a few lines of text."""
        lines = [f"{plain(self.output)}: {self._verdict()}"]
        lines += [f"  {plain(finding.file)}: {plain(finding.what)}" for finding in self.findings[:_LISTED]]
        lines += [f"  {plain(one.file)}: {plain(_described(one))}" for one in self.differences[:_LISTED]]
        left = len(self.findings[_LISTED:]) + len(self.differences[_LISTED:])
        lines += [f"  and {left} more"] if left else []
        lines += [f"  not computed again: {plain(self.unverified)}"] if self.unverified else []
        lines += elsewhere_lines(self.models)
        return "\n".join([*lines, *(f"  note: {plain(note)}" for note in self.notes)])

    def _verdict(self) -> str:
        again = (
            f"{size(self.recomputed)} of {counted(self.tensors, 'tensor')} computed again "
            f"({_percent(self.recomputed / max(1, self.of))} of the data)"
        )
        checked = f"{counted(self.files, 'file')}, {size(self.nbytes)}"
        if not self.files:
            checked = "no checksums, which its headers do not state"
        if self.findings:
            return f"different: {counted(len(self.findings), 'file')} of {checked}, not as written"
        if self.differences:
            differ = "differs" if len(self.differences) == 1 else "differ"
            first = f"{counted(len(self.differences), 'tensor')} {differ} from what the recipe gives"
            return f"different: {first}; {again}; the checksums of {checked}, are as they were written"
        if self.recomputed:
            same = "the same bytes" if self.receipt else "the same bytes of weights"
            return f"{same}: checksums of {checked}; {again}; {seconds(self.wall_s)}"
        of = "the receipt" if self.receipt else "their headers"
        return f"checksums of {checked}, are those of {of}; {seconds(self.wall_s)}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _described(one: Difference) -> str:
    if one.elements == 1:
        return f"{one.tensor}: 1 of {one.compared} elements that were compared differs, number {one.element}"
    return f"{one.tensor}: {one.elements} of {one.compared} elements that were compared differ, first {one.element}"


def verify(
    output: str | os.PathLike[str],
    *,
    sample: float = 0.01,
    full: bool = False,
    inputs: bool = False,
    models: ModelPlaces | None = None,
    threads: int | None = None,
    max_memory: str | int = "512MB",
    progress: Progress | bool | None = None,
    methods: Sequence[Method] = (),
) -> Verification:
    """Compare an output with its receipt: its files with their checksums, and a sample of its data, or all of it, with
    what the recipe gives. Nothing is written.

    output  a folder or a file that fastinterp wrote
    sample  fraction of the data that is computed again, in blocks of all tensors; 0: only checksums are compared
    full    all of the data is computed again, and the coefficients from the data, too, instead of those of the receipt
    inputs  the data of inputs, too, is compared with the checksums that the receipt has of it
    models  where the models are, if they are not where the receipt says, or near the output: a folder that has them, or
            `NAME=PATH`, or several of both; or a mapping by name
    The other arguments are those of `merge`.

    Raises: CheckpointError, if it is no output of fastinterp, or unfinished; StorageError; UsageError.
    """
    start, shown = time.perf_counter(), callback_of(progress)
    fraction = _fraction(sample, full)
    made = open_output(path_of(output, "output"))
    checked = _check(made, threads, shown)
    with given(methods):
        result = _recompute(made, checked, fraction, full, inputs, models, threads, size_of(max_memory), shown)
    return _with(result, wall_s=time.perf_counter() - start)


def _fraction(sample: object, full: bool) -> float:
    if isinstance(sample, bool) or not isinstance(sample, (int, float)) or not 0.0 <= sample <= 1.0:
        raise UsageError(f"`sample` must be a fraction from 0 to 1, got {sample!r}")
    return 1.0 if full else float(sample)


def _with(result: Verification, **changes: Any) -> Verification:
    from dataclasses import replace

    return replace(result, **changes)


def _check(made: MadeOutput, threads: int | None, progress: Progress | None) -> Checked:
    if made.receipt is None:
        found = [check_stated(path, threads, progress) for path in made.weights]
        findings = tuple(finding for one in found for finding in one.findings)
        return Checked(findings, len(found), 0, sum(one.nbytes for one in found))
    return check_files(made.folder, made.receipt, threads, progress)


def _recompute(
    made: MadeOutput,
    checked: Checked,
    fraction: float,
    full: bool,
    inputs: bool,
    models: ModelPlaces | None,
    threads: int | None,
    max_memory: int,
    progress: Progress | None,
) -> Verification:
    """The result: what was checked, and what is computed again."""
    alone, no_receipt = _without_receipt(made)
    result = Verification(
        made.name, checked.findings, files=checked.weights + checked.others, nbytes=checked.nbytes, receipt=not alone,
        notes=no_receipt,
    )  # fmt: skip
    if not fraction and not inputs:
        return result
    try:
        refuse_numerics(made.told, made.name)
        places = found_models(made, models)
        result = _with(result, models=places)
        plan = plan_again(made, places, partial(looked_at, made, models))
        result = _with(result, notes=(*result.notes, *(about_unknown_data(plan, made.receipt) if inputs else ())))
        changed = [] if made.receipt is None else changed_inputs(plan, made.receipt.inputs, inputs, threads, progress)
    except (CheckpointError, ShapeError, StorageError) as error:
        return _with(result, unverified=str(error))
    if changed:
        return _with(result, unverified=f"inputs have changed since: {listed(changed, _LISTED)}")
    if not fraction:
        return result
    file = str(made.folder / RECEIPT)
    if not full and made.receipt is not None:
        plan = with_sums(plan, made.receipt.coefficients, file)
    where, headers, notes = _places(plan, made)
    notes = (*result.notes, *notes)
    pieces = [piece for piece in _pieces(plan, checked, fraction) if piece.names <= where.keys()]
    known = {finding.file for finding in checked.findings}
    headers = [finding for finding in headers if finding.file not in known]
    if not pieces:
        return _with(result, findings=(*checked.findings, *headers), notes=notes)
    try:
        found = differences(
            plan, pieces, where, made.folder, threads=threads, max_memory=max_memory, progress=progress
        )  # fmt: skip
    except (CheckpointError, ShapeError, StorageError) as error:
        return _with(result, unverified=str(error), notes=notes)
    if found and not checked.findings:
        notes = (*notes, _why(made, plan, threads))
    own = [narrowed(finding, [d.tensor for d in found if d.file == finding.file]) for finding in checked.findings]
    return _with(
        result, findings=(*own, *headers), differences=tuple(found), notes=notes,
        recomputed=sum(piece.nbytes for piece in pieces), tensors=len({piece.of.name for piece in pieces}),
        of=sum(t.nbytes for t in plan.tensors),
    )  # fmt: skip


def _without_receipt(made: MadeOutput) -> tuple[bool, tuple[str, ...]]:
    """Whether an output is a folder without the file of its receipt, and a note that says so."""
    if made.receipt is not None or made.file:
        return False, ()
    others = sorted({n for n in names_at(made.folder) if not n.startswith(".")} - {path.name for path in made.weights})
    what = f", and not the files beside them: {listed(others, _LISTED)}" if others else ""
    return True, (f"{RECEIPT} is missing, so only the weights were compared, with what their headers say{what}",)


def _why(made: MadeOutput, plan: Plan, threads: int | None) -> str:
    """What it means that data is as it was written, and not what the recipe gives."""
    version = "" if made.told.fastinterp == __version__ else f", or version {made.told.fastinterp} computed otherwise"
    return (
        f"the files are as they were written, so {which_changed(plan, made.receipt, threads)}{version}: "
        "`fastinterp replay` makes the output of the inputs as they are now"
    )


def _pieces(plan: Plan, checked: Checked, fraction: float) -> list[Piece]:
    """What is computed: where files are damaged, their tensors there, to tell which ones."""
    damaged = [tensor for finding in checked.findings for tensor in finding.tensors]
    if damaged:
        return pieces_of(plan, damaged)
    return whole_pieces(plan.tensors) if fraction >= 1 else sampled(plan, fraction)


def _places(plan: Plan, made: MadeOutput) -> tuple[dict[str, Place], list[Finding], tuple[str, ...]]:
    """Where each tensor is in the files, what is wrong with their headers, and notes."""
    places: dict[str, Place] = {}
    findings: list[Finding] = []
    notes: list[str] = []
    (layout,) = plan.layouts
    for file in layout.files:
        path = made.path if made.file else made.folder / file.name
        try:
            header = read_header(path, 0)
        except UnreadableError:
            raise
        except CheckpointError as error:
            findings.append(Finding(file.name, str(error)))
            continue
        with opened(str(path)) as stream:
            own = read_up_to(stream, path, 0, len(file.header))
        at, length = file.checksum_at, len(UNKNOWN)
        if at is not None:
            own = own[:at] + file.header[at : at + length] + own[at + length :]
        if own != file.header:
            if made.told.fastinterp != __version__:
                notes.append(f"version {made.told.fastinterp} made it, and this is {__version__}: its headers say so")
            else:
                findings.append(Finding(file.name, "its header is not the one that the recipe gives"))
            prefix = os.path.dirname(file.name)
            found = {f"{prefix}/{e.name}" if prefix else e.name: e.start for e in header.entries}
            places |= {name: Place(path, found.get(name, offset)) for name, offset in file.places.items()}
            continue
        places |= {name: Place(path, offset) for name, offset in file.places.items()}
    return places, findings, tuple(dict.fromkeys(notes))
