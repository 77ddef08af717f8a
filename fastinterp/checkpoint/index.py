"""The index of a sharded checkpoint: which file holds which tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from fastinterp.checkpoint.file_kinds import KINDS
from fastinterp.checkpoint.header import MAX_HEADER
from fastinterp.checkpoint.names import is_plain, listing, quote
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.checkpoint.strict_json import parse_object
from fastinterp.errors import CheckpointError
from fastinterp.messages import listed


def read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index: tensor name -> plain name of a file of weights beside it.

    Raises: CheckpointError, naming the tensor, if it is damaged or leads out of the folder.
    """
    file = str(path)
    weight_map = parse_object(read_regular(file, MAX_HEADER).lstrip(), "the index", file).get("weight_map")
    if type(weight_map) is not dict:
        raise CheckpointError("the index has no `weight_map` object", file=file)
    for tensor, target in weight_map.items():
        where = f"`weight_map` puts tensor {quote(tensor)} into"
        if type(target) is not str:
            raise CheckpointError(f"{where} {quote(target)}, which is not a file name", file=file, tensor=tensor)
        # The name alone is judged: files in the Hub's cache are links that leave the folder, and are fine.
        if not is_plain(target):
            raise CheckpointError(
                f"{where} {quote(target)}: only a plain file name in the same folder is allowed",
                file=file,
                tensor=tensor,
            )
        if not target.endswith(tuple(KINDS)):
            what = f"expected a file of {listed(KINDS, 8)}"
            raise CheckpointError(f"{where} {quote(target)}: {what}", file=file, tensor=tensor)
    return weight_map


def index_remarks(
    index: str, weight_map: Mapping[str, str], found: Mapping[str, str], superseded: Collection[str]
) -> list[str]:
    """What was not read as the index says, but as transformers does: all tensors of all files that the index names,
    in the order of the files' names, so that of a tensor that is in several the last counts.

    found       tensor -> the file that it is read from
    superseded  tensors that an earlier file has, too
    """
    remarks: dict[str, list[str]] = {}
    for name, file in found.items():
        listed_in = weight_map.get(name)
        if name in superseded:
            against = f", although {quote(index)} says {quote(listed_in)}" if listed_in not in (file, None) else ""
            what = f"in {quote(file)} and in files before it: read from the last, as transformers does{against}"
        elif listed_in is None:
            what = f"not in {quote(index)}, but in {quote(file)}, which it names: read, as transformers does"
        elif listed_in != file:
            what = f"in {quote(file)}, not in {quote(listed_in)} as {quote(index)} says: read from there"
        else:
            continue
        remarks.setdefault(what, []).append(name)
    return [f"{listing(names)} {'is' if len(names) == 1 else 'are'} {what}" for what, names in remarks.items()]
