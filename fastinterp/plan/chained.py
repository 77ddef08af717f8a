"""Plans recipes of several documents: tensors of those above become part of those below.

Nothing of a document above is written as a checkpoint. Its weighted sums become part of the sums that read them: their
coefficients are multiplied in float64. What cannot be expressed so is made tensor by tensor, in float32 (float64, if an
input is F64) or the dtype that the document names, and stored until the tensor that reads it is done: see
execute/jobs/chained_job.py.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from msgspec import structs

from fastinterp.checkpoint.sidecar_files import content_of
from fastinterp.errors import RecipeError
from fastinterp.ops.combine import MAX_INPUTS, Combine, Row, check_coefficients
from fastinterp.ops.dtypes import DTYPES, DType
from fastinterp.plan.inputs import ModelInput, TensorInput
from fastinterp.plan.models import Library, Model
from fastinterp.plan.planned import IntermediateInput, PlannedTensor, direct_of
from fastinterp.plan.single import Document, find_named, plan_document
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.references import ModelRef


class Chain(NamedTuple):
    """The last document, with those above in it.

    last         with the numbers of `checkpoints`
    checkpoints  the models of all documents, then side-cars and the documents above
    models       the names of those models
    warnings     about all documents
    remarks      on all documents
    folders      small files of documents above
    """

    last: Document
    checkpoints: tuple[Model, ...]
    models: tuple[str, ...]
    warnings: tuple[str, ...]
    remarks: tuple[str, ...]
    folders: tuple[Folder, ...]


def plan_chain(above: Sequence[Recipe], last: Recipe, library: Library) -> Chain:
    """Plan all documents as one. Raises: what make_plan raises."""
    numbers: dict[int, int] = {}  # id of a checkpoint -> its number
    checkpoints: list[Model] = []
    made: dict[str, Model] = {}
    warnings: list[str] = []
    remarks: list[str] = []
    folders: list[Folder] = []

    def number(checkpoint: Model) -> int:
        if id(checkpoint) not in numbers:
            numbers[id(checkpoint)] = len(checkpoints)
            checkpoints.append(checkpoint)
        return numbers[id(checkpoint)]

    def find(model: ModelRef) -> Model:
        return made.get(str(model)) or library.find(model)

    names: list[str] = []
    stored = [(recipe, m) for recipe in (*above, last) for m in recipe.models if recipe.made_by(m) is None]
    for recipe, model in stored:
        if number(find_named(recipe, library.find, model)) == len(names):  # else it is there under another name
            names.append(str(model))
    for recipe in (*above, last):
        _check_store(recipe, last)
        lead = recipe.base_model or recipe.models[0]
        document = plan_document([replace(recipe, origin=lead) if str(lead) in made else recipe], find)
        # `aligned` has replacements of some models: the numbers are those of what they replace.
        read = [number(find(m)) for m in (*recipe.models, *document.sidecars)]
        tensors = tuple(_resolved(t, read, len(names)) for t in document.tensors)
        document = structs.replace(document, tensors=tensors)
        warnings += document.warnings
        remarks += document.remarks
        if recipe is not last:
            checkpoint, folder = made_by(recipe, document)
            folders += [] if folder is None else [folder]
            made[checkpoint.name] = checkpoint
            number(checkpoint)
    return Chain(
        document, tuple(checkpoints), tuple(names), tuple(dict.fromkeys(warnings)), tuple(dict.fromkeys(remarks)),
        tuple(folders),
    )  # fmt: skip


def _check_store(recipe: Recipe, last: Recipe) -> None:
    """Raises: RecipeError, if documents round differently: one run stores in one way."""
    for key in ("rounding", "fp8_overflow"):
        if getattr(recipe, key) != getattr(last, key):
            raise recipe.document.error(
                f"`{key}` is {getattr(recipe, key)!r} here and {getattr(last, key)!r} in the last document. All "
                "documents must have the same",
                f"$.{key}" if key in recipe.document.value else "$",
            )


# --- what a document makes, as the models of those below -------------------------------------------------------------


def made_by(recipe: Recipe, document: Document) -> tuple[Model, Folder | None]:
    """The output of the document as a model, and the folder of its small files, if it needs one."""
    name = recipe.name or ""
    named = recipe.out_dtype or recipe.dtype
    named = None if named is not None and named.block else named
    tensors: dict[str, TensorInput] = {}
    for t in document.tensors:
        if t.program is not None and t.program.whole:
            raise RecipeError(
                f"{t.program.method} looks at the whole model here, which only the last document can. Write {name!r} "
                "as a checkpoint of its own first, and name that",
                path="$.name",
                file=recipe.file,
            )
        planned = structs.replace(t, dtype=(named or _wide(t)) if t.merged and not t.dtype.is_complex else t.dtype)
        folds = recipe.out_dtype is None or _is_copy(t)
        tensors[t.name] = IntermediateInput(t.name, t.dtype, t.shape, t.nbytes, planned, named is None, folds)
    folder = _small_files(recipe, document)
    root = document.origin.root if folder is None else folder.path
    left_out = {} if folder is None else document.files.left_out
    made = Model(name, root, tensors, origin=document.origin.source, left_out=left_out, beside=document.origin.beside)
    return made, folder


def _wide(t: PlannedTensor) -> DType:
    return DTYPES["F64" if any(e.dtype.name == "F64" for e in t.inputs) else "F32"]


def _is_copy(t: PlannedTensor) -> bool:
    return len(t.rows) == 1 and t.rows[0].is_copy and t.dtype == t.inputs[0].dtype


class Folder:
    """A temporary folder, which is gone when this object is."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="fastinterp-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _small_files(recipe: Recipe, document: Document) -> Folder | None:
    """A folder with a document's configuration and tokenizer; None: they are those of its origin."""
    files = document.aligned.sidecars(document.files.contents(recipe.out_dtype or recipe.dtype))
    if files == document.files.copied:
        return None
    folder = Folder()
    for name, content in files.items():
        path = folder.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content_of(content))
    return folder


# --- documents above in sums and requests ----------------------------------------------------------------------------


def _resolved(t: PlannedTensor, numbers: Sequence[int], models: int) -> PlannedTensor:
    """A tensor with the numbers of all checkpoints, and as little to be made before it as can be.

    models  how many checkpoints are models
    """
    inputs = [(numbers[i], entry) for i, entry in t.pairs]
    if not t.merged:
        every = {_key(i): i for model, entry in inputs for i in entry.agreeing(model)}
        return _with(t, list(every.values()))
    if t.program is not None:
        return _with(t, [_plainest(i) for i in inputs])
    row, used = _folded(t.rows[0], inputs)
    if len(used) > MAX_INPUTS:
        row, used = t.rows[0], [_plainest(i) for i in inputs]
    direct = direct_of(used[0][1]) if row.is_copy else None
    if direct is not None:
        return structs.replace(direct, name=t.name, dtype=t.dtype, seeds=t.seeds, form=t.form)
    check_coefficients([row.total, *(w for _, w in row.terms)], t.name)
    return structs.replace(_with(t, used), rows=(row,), sums=_sums(row, used, models), model_count=len(used))


def _with(t: PlannedTensor, inputs: Sequence[ModelInput]) -> PlannedTensor:
    return structs.replace(t, checkpoints=tuple(i for i, _ in inputs), inputs=tuple(tensor for _, tensor in inputs))


def _plainest(one: ModelInput) -> ModelInput:
    """The input that a copy is of; else the tensor as it is stored when it has been made."""
    model, entry = one
    summed = entry.weighted_sum
    if summed is not None and summed[0].is_copy:
        return summed[1][0]
    return model, entry.as_read()


def _folded(row: Row, inputs: Sequence[ModelInput]) -> tuple[Row, list[ModelInput]]:
    """A sum with the sums of documents above in it: the pivot is that of the base, else of the first input."""
    used: dict[Hashable, tuple[ModelInput, list[float]]] = {}
    total_is_one = row.total == 1.0
    pivot: Hashable = None
    for at, weight in _weights(row):
        plainest = _plainest(inputs[at])
        inner, parts = plainest[1].weighted_sum or (Row(0, 1.0, ()), [plainest])
        total_is_one &= inner.total == 1.0
        for i, inner_weight in _weights(inner):
            key = _key(parts[i])
            pivot = key if pivot is None else pivot  # the first one: _weights begins with it
            used.setdefault(key, (parts[i], []))[1].append(weight * inner_weight)
    sums = {key: math.fsum(weights) for key, (_, weights) in used.items()}
    total = 1.0 if total_is_one else math.fsum(w for _, weights in used.values() for w in weights)
    keys = sorted((k for k in used if k == pivot or sums[k] != 0.0), key=lambda k: used[k][0][0])
    terms = tuple((at, sums[k]) for at, k in enumerate(keys) if k != pivot)
    return Row(keys.index(pivot), total, terms), [used[k][0] for k in keys]


def _weights(row: Row) -> list[tuple[int, float]]:
    """(input, coefficient) of a sum without a pivot; that of the pivot comes first."""
    return [(row.pivot, math.fsum((row.total, *(-w for _, w in row.terms)))), *row.terms]


def _sums(row: Row, used: Sequence[ModelInput], models: int) -> tuple[Combine, ...]:
    """The sum as a receipt has it: one weight per model; per input, if one model has several."""
    weights = {used[at][0]: w for at, w in _weights(row)}
    if len(weights) < len(used):
        return (Combine(tuple(w for _, w in sorted(_weights(row))), None, row.total == 1.0),)
    every = tuple(weights.get(i, 0.0) for i in range(models))
    return (Combine(every, None, row.total == 1.0),)


def _key(one: ModelInput) -> Hashable:
    """Inputs of one key are the same tensor."""
    return one[0], one[1].key
