"""`inspect`: the contents of a checkpoint, from its headers, as plain values and as text."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from fastinterp.checkpoint import remote
from fastinterp.checkpoint.formats import EncodedTensor, encoded_tensors
from fastinterp.checkpoint.gguf_types import stored
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.checkpoint.quantised import quantised_in
from fastinterp.checkpoint.strict_json import parse_json
from fastinterp.errors import CheckpointError
from fastinterp.messages import WIDTH, counted, fit, plain, size, table

_NUMBER = re.compile(r"(?<=\.)\d{1,18}(?=\.|$)|^\d{1,18}(?=\.)")  # a part of a dotted name that is a number
_RECEIPT = "fastinterp"  # key of the receipt in the metadata of merged files
_RANGES = 4  # ranges of numbers in a pattern, before the rest is only counted


@dataclass(frozen=True)
class Pattern:
    """Tensors of one dtype and shape whose names differ in numbers only."""

    name: str  # `model.layers.{0..21}.mlp.up_proj.weight`
    dtype: str
    shape: tuple[int, ...]
    count: int
    nbytes: int  # of all of them


def as_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    """Plain values, as --json prints them."""
    entries, adapter = _sorted(checkpoint), checkpoint.adapter
    quantised, taken, decoded = _quantised(checkpoint)
    numbers = [e for e in entries if (e.dtype.merges or e.dtype.block) and e.name not in taken]
    counts = [0] * len(checkpoint.files)
    for e in entries:
        counts[e.file] += 1
    return {
        "name": checkpoint.name,
        "files": [
            {"path": _place(checkpoint, p), "bytes": stamp[0], "tensors": counts[i]}
            for i, (p, stamp) in enumerate(zip(checkpoint.files, checkpoint.stamps, strict=True))
        ],
        "index": checkpoint.index,
        "bytes": checkpoint.nbytes,
        "parameters": decoded + sum(e.numel for e in numbers),
        "dtypes": _dtypes(entries),
        "adapter": None if adapter is None else adapter.as_dict(),
        "quantised": quantised,
        "metadata": checkpoint.metadata,
        "receipt": receipt(checkpoint),
        "tensors": [
            {
                "name": e.name,
                "dtype": e.dtype.name,
                "shape": list(e.shape),
                "bytes": e.nbytes,
                "file": os.path.relpath(checkpoint.files[e.file], checkpoint.root),
                "offset": e.start,
            }
            for e in entries
        ],
    }


def _place(checkpoint: Checkpoint, path: Path) -> str:
    """Where a file is: its path, or its address."""
    found = None if checkpoint.site is None else remote.find(path)
    return str(path) if found is None else found.name


def as_text(checkpoint: Checkpoint, *, every: bool = False, whole: bool = False) -> str:
    """The same as text.

    every  a line for each tensor, instead of one for those whose names differ in numbers only
    whole  names of tensors are not cut to fit into a line
    """
    values = as_dict(checkpoint)
    lines = [
        f"{plain(checkpoint.name)}: {values['parameters']:,} parameters in "
        f"{counted(len(values['tensors']), 'tensor')}, {size(values['bytes'])}"
    ]
    if checkpoint.adapter is not None:
        lines += [f"{'has built in: ' if checkpoint.adapter.whole else ''}{checkpoint.adapter.describe()}"]
    for found in values["quantised"]:
        lines += [_about_quantised(found)]
    lines += ["dtypes"]
    dtypes = [
        [d["dtype"], counted(d["tensors"], "tensor"), f"{d['elements']:,} elements", size(d["bytes"])]
        for d in values["dtypes"]
    ]
    lines += table(dtypes, "<>>>")
    lines += ["files, named by an index" if values["index"] else "files"]
    lines += table([[f["path"], counted(f["tensors"], "tensor"), size(f["bytes"])] for f in values["files"]], "<>>")
    lines += _metadata_lines(values)
    lines += ["tensors"]
    if every:
        rows = [[t["name"], t["dtype"], str(t["shape"]), size(t["bytes"])] for t in values["tensors"]]
        return "\n".join([*lines, *table(rows, "<<<>", whole=whole)])
    rows = [
        [p.name, p.dtype, str(list(p.shape)), f"x{p.count}" if p.count > 1 else "", size(p.nbytes)]
        for p in patterns(_sorted(checkpoint))
    ]
    return "\n".join([*lines, *table(rows, "<<<>>", whole=whole)])


def _quantised(checkpoint: Checkpoint) -> tuple[list[dict[str, Any]], set[str], int]:
    """(formats of quantised tensors, names of the stored tensors that are decoded, how many numbers that makes)."""
    fault = None
    try:
        encoded = encoded_tensors(checkpoint)
    except CheckpointError as error:  # a scale that is missing, say: everything else is shown
        encoded, fault = [], str(error)
    groups: dict[tuple[str, str, str], list[EncodedTensor]] = {}
    for one in encoded:
        if one.codes.dtype.block is not None:  # of a GGUF file: its dtype says it
            continue
        scales = ", ".join(_companion(one, e) for e in one.companions)
        groups.setdefault((one.format, one.codes.dtype.name, scales), []).append(one)
    found = [
        {"format": form, "tensors": len(of), "read": True, "codes": codes, "scales": scales}
        for (form, codes, scales), of in groups.items()
    ]
    taken = {e.name for one in encoded for e in one.stored}
    others = Counter(q.format for q in quantised_in(checkpoint, taken))
    found += [{"format": form, "tensors": n, "read": False, "fault": fault} for form, n in others.items()]
    return found, taken, sum(math.prod(one.shape) for one in encoded)


def _companion(encoded: EncodedTensor, entry: Entry) -> str:
    """`weight_scale_inv F32`."""
    start = 0
    while start < len(encoded.name) and entry.name.startswith(encoded.name[: start + 1]):
        start += 1
    start = entry.name.rfind(".", 0, start) + 1
    return f"{entry.name[start:]} {entry.dtype}"


def _about_quantised(found: Mapping[str, Any]) -> str:
    line = f"quantised: {found['format']}, {counted(found['tensors'], 'tensor')}"
    if found["read"]:
        return f"{line} of {found['codes']} with {found['scales']}, read as numbers"
    return f"{line}; {plain(found['fault'])}" if found["fault"] else line


def receipt(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The receipt that a merge wrote into the metadata, or None. It is as trustworthy as the file."""
    try:
        value = parse_json(checkpoint.metadata.get(_RECEIPT, "").encode(errors="replace"), "the receipt", "")
    except CheckpointError:
        return None
    return value if isinstance(value, dict) else None


def patterns(entries: Iterable[Entry]) -> list[Pattern]:
    """Entries grouped by name, numbers aside, and by dtype and shape; in the order of the first of each."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[Entry]] = {}
    for e in entries:
        groups.setdefault((_NUMBER.sub("{}", e.name), e.dtype.name, e.shape), []).append(e)
    return [
        Pattern(_pattern([e.name for e in group]), dtype, shape, len(group), sum(e.nbytes for e in group))
        for (_, dtype, shape), group in groups.items()
    ]


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 10 after layer 9.

    Numbers are compared by their count of digits first: Python converts no thousands of digits to int.
    """
    key = []
    for part in name.split("."):
        digits = part.lstrip("0")
        key.append((0, len(digits), digits) if part.isdecimal() else (1, 0, part))
    return key


def _sorted(checkpoint: Checkpoint) -> list[Entry]:
    return sorted(map(stored, checkpoint.tensors.values()), key=lambda e: natural(e.name))


def _pattern(names: list[str]) -> str:
    columns = zip(*(_NUMBER.findall(name) for name in names), strict=True)
    numbers = iter([sorted({int(n) for n in column}) for column in columns])
    return _NUMBER.sub(lambda _: _ranges(next(numbers)), names[0])


def _ranges(numbers: list[int]) -> str:
    """`{0..21}`, `{0..3,7}`, or a single number."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    if len(runs) > _RANGES:
        return f"{{{numbers[0]}..{numbers[-1]}: {len(numbers)} of them}}"
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) + "}"


def _dtypes(entries: list[Entry]) -> list[dict[str, Any]]:
    totals: dict[str, dict[str, Any]] = {}
    for e in entries:
        total = totals.setdefault(e.dtype.name, {"dtype": e.dtype.name, "tensors": 0, "elements": 0, "bytes": 0})
        total["tensors"] += 1
        total["elements"] += e.numel
        total["bytes"] += e.nbytes
    return sorted(totals.values(), key=lambda d: -d["bytes"])


def _metadata_lines(values: dict[str, Any]) -> list[str]:
    receipt, lines = values["receipt"], []
    for key, value in values["metadata"].items():
        if receipt is None or key != _RECEIPT:
            lines.append(fit(f"  {key}: {value}", WIDTH))
    lines = ["metadata", *lines] if lines else []
    if receipt is not None:
        lines.append("receipt of the merge")
        for key, value in receipt.items():
            if key == "recipe" and isinstance(value, str):
                lines += ["  recipe:", *(f"    {plain(line)}" for line in value.rstrip().split("\n"))]
            elif isinstance(value, str) and " " in value:  # a sentence
                lines += wrap(plain(f"{key}: {value}"), WIDTH, initial_indent="  ", subsequent_indent="    ")
            else:
                lines.append(fit(f"  {key}: {value if isinstance(value, str) else json.dumps(value)}", WIDTH))
    return lines
