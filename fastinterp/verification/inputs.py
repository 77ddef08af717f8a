"""Whether the inputs of an output are still those that it was made of, as far as the receipt tells."""

from __future__ import annotations

from collections.abc import Iterator

from fastinterp.backends.cpu import Progress
from fastinterp.checkpoint import remote
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.execute.input_files import input_files
from fastinterp.messages import listed
from fastinterp.output.receipt import InputFile, ReceiptFile, hexadecimal
from fastinterp.plan.plan import Plan
from fastinterp.verification.checks import regions_of

_LISTED = 8  # inputs in a message


def changed_inputs(
    plan: Plan, said: dict[str, tuple[InputFile, ...]], whole: bool, threads: int | None, progress: Progress | None
) -> list[str]:
    """What differs between the inputs of a plan and those of a receipt, for people; nothing, if nothing does.

    whole  read all of the data of which the receipt has a checksum, instead of some pages
    Raises: StorageError, if a file cannot be read.
    """
    found = []
    now = input_files(plan)
    for name, files in said.items():
        if name not in now:
            found.append(f"{name} is not read by this recipe")
        elif what := _differs(now[name], files):
            found.append(f"{name}: {what}")
    if whole and not found:
        for model in plan.checkpoints:
            if model.checkpoint is not None:
                found += _whole(model.checkpoint, [f for files in said.values() for f in files], threads, progress)
    return list(dict.fromkeys(found))


def which_changed(plan: Plan, receipt: ReceiptFile | None, threads: int | None) -> str:
    """Which inputs of an output have changed since it was made, as far as the receipt tells; for people.

    Raises: StorageError, if a file cannot be read.
    """
    changed = [] if receipt is None else changed_inputs(plan, receipt.inputs, True, threads, None)
    if changed:
        return f"an input has changed since: {listed(changed, _LISTED)}"
    names = _names(plan)
    if len(names) == 1:
        return f"the data of an input has changed since: {names[0]}"
    return f"the data of an input has changed since: one of {listed(names, _LISTED)}, the receipt does not tell which"


def about_unknown_data(plan: Plan, receipt: ReceiptFile | None) -> list[str]:
    """A note about the inputs of whose data the receipt has no checksums; none, if it has all."""
    said = {} if receipt is None else receipt.inputs
    names = _names(plan) if not said else [
        name for name, files in said.items() if any(file.checksum is None for file in files)
    ]  # fmt: skip
    if not names:
        return []
    what = "sizes, headers and sixteen pages of each file were compared" if said else "nothing of them was compared"
    return [
        f"inputs: the receipt has no checksums of the data of {listed(names, _LISTED)}, so {what}. It has them of "
        "inputs of one file that fastinterp wrote"
    ]


def _names(plan: Plan) -> list[str]:
    """Of the models, as the receipt has them."""
    return [plan.shown.model(name) for name in plan.models]


def _differs(now: tuple[InputFile, ...], said: tuple[InputFile, ...]) -> str:
    if [f.name for f in now] != [f.name for f in said] and len(now) != len(said):
        return f"it has {len(now)} files of weights, and had {len(said)}"
    for one, other in zip(now, said, strict=True):
        if one.size != other.size:
            return f"{one.name} has {one.size} bytes, and had {other.size}"
        if one.header_xxh3 != other.header_xxh3:
            return f"the header of {one.name} is not the one that was read"
        if one.sample_xxh3 != other.sample_xxh3:
            return f"the data of {one.name} is not what was read"
        if one.version and other.version and one.version != other.version:
            return f"{one.name} is another version there ({one.version}) than the one that was read ({other.version})"
    return ""


def _whole(
    checkpoint: Checkpoint, said: list[InputFile], threads: int | None, progress: Progress | None
) -> Iterator[str]:  # fmt: skip
    for i, (path, (size, *_)) in enumerate(zip(checkpoint.files, checkpoint.stamps, strict=True)):
        stated = {f.checksum for f in said if f.size == size and f.name == path.name and f.checksum is not None}
        if not stated:
            continue
        remote.fetch([path])
        start = min((e.start for e in checkpoint.tensors.values() if e.file == i), default=size)
        if hexadecimal(sum(regions_of(path, start, size, threads, progress)) % 2**64) not in stated:
            yield f"the data of {path} has another checksum than the receipt says"
    for adapter in checkpoint.adapters:
        yield from _whole(adapter, said, threads, progress)
