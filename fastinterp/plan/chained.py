"""Recipes of several documents: the tensors of those above, made part of those below.

Nothing of a document above is written as a checkpoint. Its weighted sums become part of the sums that read them: their
coefficients are multiplied in float64. What cannot be expressed so is made tensor by tensor, in float32 (float64, if an
input is F64) or the dtype that the document names, and stored until the tensor that reads it is done (staged.py).
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.checkpoint.sidecar_files import copy_sidecars
from fastinterp.errors import RecipeError
from fastinterp.ops.combine import MAX_INPUTS, Combine, Row, check_coefficients
from fastinterp.ops.dtypes import DTYPES, DType
from fastinterp.plan.single import Document, Library, plan_document
from fastinterp.plan.single import found as found_model
from fastinterp.plan.tensors import MadeEntry, PlannedTensor
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.references import ModelRef
from fastinterp.tokenizer.embedding_rows import MappedEntry

Operand = tuple[int, Entry]  # number of a checkpoint, and a tensor there


class Chain(NamedTuple):
    """The last document, with those above in it.

    last         with the numbers of `checkpoints`
    checkpoints  the models of all documents, then side-cars and the documents above
    models       the names of those models
    warnings     about all documents
    folders      small files of documents above
    """

    last: Document
    checkpoints: tuple[Checkpoint, ...]
    models: tuple[str, ...]
    warnings: tuple[str, ...]
    folders: tuple[Folder, ...]


def plan_chain(above: Sequence[Recipe], last: Recipe, library: Library) -> Chain:
    """Raises: what make_plan raises."""
    numbers: dict[int, int] = {}  # id of a checkpoint -> its number
    checkpoints: list[Checkpoint] = []
    made: dict[str, Checkpoint] = {}
    warnings: list[str] = []
    folders: list[Folder] = []

    def number(checkpoint: Checkpoint) -> int:
        if id(checkpoint) not in numbers:
            numbers[id(checkpoint)] = len(checkpoints)
            checkpoints.append(checkpoint)
        return numbers[id(checkpoint)]

    def find(model: ModelRef) -> Checkpoint:
        return made.get(str(model)) or library.find(model)

    names: list[str] = []
    stored = [(recipe, m) for recipe in (*above, last) for m in recipe.models if recipe.made_by(m) is None]
    for recipe, model in stored:
        if number(found_model(recipe, library.find, model)) == len(names):  # else it is there under another name
            names.append(str(model))
    for recipe in (*above, last):
        _check_store(recipe, last)
        lead = recipe.base_model or recipe.models[0]
        document = plan_document([replace(recipe, origin=lead) if str(lead) in made else recipe], find)
        # `fitted` has replacements of some models: the numbers are those of what they replace.
        found = [number(find(m)) for m in (*recipe.models, *document.sidecars)]
        tensors = tuple(_resolved(t, found, len(names)) for t in document.tensors)
        document = replace(document, tensors=tensors)
        warnings += document.warnings
        if recipe is not last:
            checkpoint, folder = _checkpoint(recipe, document)
            folders += [] if folder is None else [folder]
            made[checkpoint.name] = checkpoint
            number(checkpoint)
    return Chain(document, tuple(checkpoints), tuple(names), tuple(dict.fromkeys(warnings)), tuple(folders))


def _check_store(recipe: Recipe, last: Recipe) -> None:
    """One run stores in one way."""
    for key in ("rounding", "fp8_overflow"):
        if getattr(recipe, key) != getattr(last, key):
            raise recipe.document.error(
                f"`{key}` is {getattr(recipe, key)!r} here and {getattr(last, key)!r} in the last document. All "
                "documents must have the same",
                f"$.{key}" if key in recipe.document.value else "$",
            )


# --- what a document makes, as the models of those below -------------------------------------------------------------


def _checkpoint(recipe: Recipe, document: Document) -> tuple[Checkpoint, Folder | None]:
    """What the document makes, and the folder of its small files, if it has one of its own."""
    name = recipe.name or ""
    named = recipe.out_dtype or recipe.dtype
    tensors: dict[str, Entry] = {}
    for t in document.tensors:
        if t.program is not None and t.program.whole:
            raise RecipeError(
                f"{t.program.method} looks at the whole model here, which only the last document can. Write {name!r} "
                "as a checkpoint of its own first, and name that",
                path="$.name",
                file=recipe.file,
            )
        kept = replace(t, dtype=(named or _wide(t)) if t.merged else t.dtype)
        folds = recipe.out_dtype is None or _is_copy(t)
        tensors[t.name] = MadeEntry(t.name, t.dtype, t.shape, 0, t.nbytes, 0, kept, named is None, folds)
    nbytes = sum(e.nbytes for e in tensors.values())
    folder = _small_files(recipe, document)
    root = document.origin.root if folder is None else folder.path
    return Checkpoint(name, root, (), tensors, nbytes, False, {}, (), False), folder


def _wide(t: PlannedTensor) -> DType:
    return DTYPES["F64" if any(e.dtype.name == "F64" for e in t.entries) else "F32"]


def _is_copy(t: PlannedTensor) -> bool:
    return len(t.rows) == 1 and t.rows[0].is_copy and t.dtype == t.entries[0].dtype


class Folder:
    """A temporary folder, which is gone when this object is."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="fastinterp-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _small_files(recipe: Recipe, document: Document) -> Folder | None:
    """A folder with a document's configuration and tokenizer; None: they are those of its origin."""
    root = document.origin.root
    copied = copy_sidecars(document.origin, recipe.out_dtype or recipe.dtype)
    files = document.fitted.sidecars(copied)
    if set(files) == set(copied) and all(isinstance(c, Path) and c.parent == root for c in files.values()):
        return None
    folder = Folder()
    for name, content in files.items():
        if isinstance(content, Path):
            os.symlink(os.path.abspath(content), folder.path / name)
        else:
            (folder.path / name).write_bytes(content)
    return folder


# --- documents above in sums and requests ----------------------------------------------------------------------------


def _resolved(t: PlannedTensor, numbers: Sequence[int], models: int) -> PlannedTensor:
    """A tensor with the numbers of all checkpoints, and as little to be made before it as can be.

    models  how many checkpoints are models
    """
    operands = [(numbers[i], entry) for i, entry in zip(t.inputs, t.entries, strict=True)]
    if not t.merged:
        every = {_key(o): o for operand in operands for o in _agreeing(operand)}
        return _with(t, list(every.values()))
    if t.program is not None:
        return _with(t, [_plainest(operand) for operand in operands])
    row, used = _folded(t.rows[0], operands)
    if len(used) > MAX_INPUTS:
        row, used = t.rows[0], [_plainest(operand) for operand in operands]
    _, entry = used[0]
    if row.is_copy and isinstance(entry, MadeEntry) and _same_bytes(entry, t):
        return replace(entry.made, name=t.name, dtype=t.dtype, seeds=t.seeds)
    check_coefficients([row.total, *(w for _, w in row.terms)], t.name)
    return replace(_with(t, used), rows=(row,), sums=_sums(row, used, models), models=len(used))


def _with(t: PlannedTensor, operands: Sequence[Operand]) -> PlannedTensor:
    return replace(t, inputs=tuple(i for i, _ in operands), entries=tuple(entry for _, entry in operands))


def _agreeing(operand: Operand) -> list[Operand]:
    """The tensors that must be the same as one that is not merged."""
    entry = operand[1]
    return list(zip(entry.made.inputs, entry.made.entries, strict=True)) if isinstance(entry, MadeEntry) else [operand]


def _plainest(operand: Operand) -> Operand:
    """What a copy is a copy of; else what has to be made first."""
    number, entry = operand
    if not isinstance(entry, MadeEntry):
        return operand
    made = entry.made
    if entry.folds and made.rows and made.rows[0].is_copy:
        return made.inputs[0], made.entries[0]
    return number, entry.stored()


def _same_bytes(entry: MadeEntry, t: PlannedTensor) -> bool:
    """Whether a copy of it is what is made: nothing is rounded on the way, or only once to nearest."""
    return entry.made.program is not None and entry.free


def _folded(row: Row, operands: Sequence[Operand]) -> tuple[Row, list[Operand]]:
    """A sum with the sums of documents above in it: the pivot is that of the base, else of the first input."""
    found: dict[tuple[int, ...], tuple[Operand, list[float]]] = {}
    total_is_one = row.total == 1.0
    pivot: tuple[int, ...] | None = None
    for at, weight in _weights(row):
        number, entry = _plainest(operands[at])
        made = entry.made if isinstance(entry, MadeEntry) and entry.folds and entry.made.rows else None
        inner = [(0, 1.0)] if made is None else _weights(made.rows[0])
        total_is_one &= made is None or made.rows[0].total == 1.0
        for i, own in inner:
            operand = (number, entry) if made is None else (made.inputs[i], made.entries[i])
            key = _key(operand)
            pivot = key if pivot is None else pivot  # the first one: _weights begins with it
            found.setdefault(key, (operand, []))[1].append(weight * own)
    assert pivot is not None
    sums = {key: math.fsum(parts) for key, (_, parts) in found.items()}
    total = 1.0 if total_is_one else math.fsum(w for _, parts in found.values() for w in parts)
    keys = sorted((k for k in found if k == pivot or sums[k] != 0.0), key=lambda k: found[k][0][0])
    terms = tuple((at, sums[k]) for at, k in enumerate(keys) if k != pivot)
    return Row(keys.index(pivot), total, terms), [found[k][0] for k in keys]


def _weights(row: Row) -> list[tuple[int, float]]:
    """(input, coefficient) of a sum without a pivot; that of the pivot comes first."""
    return [(row.pivot, math.fsum((row.total, *(-w for _, w in row.terms)))), *row.terms]


def _sums(row: Row, used: Sequence[Operand], models: int) -> tuple[Combine, ...]:
    """The sum as a receipt has it: one weight per model; per input, if one model has several."""
    weights = {used[at][0]: w for at, w in _weights(row)}
    if len(weights) < len(used):
        return (Combine(tuple(w for _, w in sorted(_weights(row))), None, row.total == 1.0),)
    every = tuple(weights.get(i, 0.0) for i in range(models))
    return (Combine(every, None, row.total == 1.0),)


def _key(operand: Operand) -> tuple[int, ...]:
    """Operands of one key are the same tensor."""
    number, entry = operand
    if isinstance(entry, MadeEntry):
        return number, id(entry.made)
    rows = id(entry.rows) if isinstance(entry, MappedEntry) else 0
    return number, entry.file, entry.start, entry.nbytes, rows
