"""What a merge will do, decided from headers alone: no tensor data is touched here.

A plan holds one or more outputs made from one read of the same inputs (a path of interpolations, say): for every
output tensor which inputs are read, with which coefficients, and where the result goes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastinterp._version import __version__
from fastinterp.compute.dtypes import DType
from fastinterp.compute.ops import MAX_OUTPUTS, NUMERICS, Row
from fastinterp.engine.companions import warnings_about
from fastinterp.engine.text import counted, size
from fastinterp.engine.vocabularies import Fitted, fit_models
from fastinterp.errors import ShapeError, UsageError
from fastinterp.files.checkpoint import Checkpoint, open_checkpoint
from fastinterp.files.embedding import named_as_embedding
from fastinterp.files.header import Entry
from fastinterp.files.layout import Layout, make_layout
from fastinterp.recipe.load import Recipe, same_model

_VOCABULARIES = (
    "The vocabularies differ in size: say which one the output has, `tokenizer_source: base` or "
    "`tokenizer_source: union`"
)
_SHOWN = 5  # differences that a message lists before it only counts them


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One output tensor.

    inputs   the checkpoints that are read, as indices into Plan.checkpoints, ascending
    entries  where each of them holds the tensor
    rows     one per output; their numbers count `inputs`. Empty if the tensor is not merged but must be the same in
             every input (integers, and floats that only a quantiser can read)
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    entries: tuple[Entry, ...]
    rows: tuple[Row, ...]

    @property
    def numel(self) -> int:
        return self.entries[0].numel


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first byte of data is read.

    recipes      one per output; they differ in coefficients only
    checkpoints  the models of the recipe, in its order
    origin       the checkpoint that configuration and tokenizer come from
    layouts      one per output: equal but for the metadata in their headers
    fitted       what becomes of the files beside the weights, where vocabularies or tied embeddings differ
    warnings     about the files beside the weights: what is copied, and may not fit
    """

    recipes: tuple[Recipe, ...]
    checkpoints: tuple[Checkpoint, ...]
    origin: Checkpoint
    tensors: tuple[PlannedTensor, ...]
    layouts: tuple[Layout, ...]
    fitted: Fitted
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Short: the fields hold every tensor and header."""
        return (
            f"<Plan: {self.recipes[0].method.name} of {counted(len(self.checkpoints), 'model')}, "
            f"{size(self.bytes_read)} read, {size(self.bytes_written)} written>"
        )

    @property
    def bytes_read(self) -> int:
        return sum(e.nbytes for t in self.tensors for e in t.entries)

    @property
    def bytes_written(self) -> int:
        """Of tensors. Headers and indexes are not counted: disk_bytes has them too."""
        return sum(layout.total_size for layout in self.layouts)

    @property
    def disk_bytes(self) -> int:
        return sum(layout.disk_bytes for layout in self.layouts)

    @property
    def inputs_read(self) -> tuple[int, ...]:
        """The checkpoints that any tensor is read from."""
        return tuple(sorted({i for t in self.tensors for i in t.inputs}))


def make_plan(recipes: Sequence[Recipe], *, max_shard_size: int) -> Plan:
    """Open the checkpoints' headers, see that they fit together, and lay out the output.

    recipes  1 to 16, with the same models, dtypes and rounding
    Raises: CheckpointError and ShapeError, if a checkpoint is damaged or does not fit the others; UsageError.
    """
    first = recipes[0]
    if len(recipes) > MAX_OUTPUTS:
        raise UsageError(f"one read can make at most {MAX_OUTPUTS} outputs, got {len(recipes)}")
    if any(r.models != first.models or r.dtype != first.dtype or r.out_dtype != first.out_dtype for r in recipes):
        raise UsageError("recipes that share one read must have the same models and dtypes")
    opened: dict[str, Checkpoint] = {}
    for name in (*first.models, first.origin):
        if not any(same_model(name, known) for known in opened):
            opened[name] = open_checkpoint(name)
    origin = next(c for name, c in opened.items() if same_model(name, first.origin))
    fitted = fit_models(first, [opened[name] for name in first.models], origin)
    checkpoints = fitted.models
    lead = checkpoints[first.base or 0]
    for other in checkpoints:
        _check_fit(lead, other)
    tensors = tuple(_planned(recipes, checkpoints, lead, origin, name) for name in lead.tensors)
    layouts = tuple(
        make_layout([(t.name, t.dtype, t.shape) for t in tensors], _metadata(recipe), max_shard_size)
        for recipe in recipes
    )
    warnings = (*fitted.warnings, *warnings_about(checkpoints, origin, fitted.tokenizer is not None))
    return Plan(tuple(recipes), checkpoints, origin, tensors, layouts, fitted, warnings)


def _planned(
    recipes: Sequence[Recipe], checkpoints: tuple[Checkpoint, ...], lead: Checkpoint, origin: Checkpoint, name: str
) -> PlannedTensor:
    recipe, kept = recipes[0], lead.tensors[name]
    if not kept.dtype.merges:
        inputs: tuple[int, ...] = tuple(range(len(checkpoints)))
        if recipe.integers is not None:
            inputs = (recipe.models.index(recipe.integers),)
        entries = tuple(checkpoints[i].tensors[name] for i in inputs)
        return PlannedTensor(name, kept.dtype, kept.shape, inputs, entries, ())
    # What is kept is the dtype of the model whose config.json is copied, which need not be merged itself.
    named = origin.tensors.get(name, kept).dtype
    dtype = recipe.out_dtype or recipe.dtype or (named if named.merges else kept.dtype)
    rows = [r.combine(name).row() for r in recipes]
    inputs = tuple(sorted({i for row in rows for i in row.inputs}))
    place = {checkpoint: i for i, checkpoint in enumerate(inputs)}
    renumbered = tuple(
        replace(row, pivot=place[row.pivot], terms=tuple((place[i], w) for i, w in row.terms)) for row in rows
    )
    entries = tuple(checkpoints[i].tensors[name] for i in inputs)
    return PlannedTensor(name, dtype, kept.shape, inputs, entries, renumbered)


def _check_fit(lead: Checkpoint, other: Checkpoint) -> None:
    """Both must have the same tensors, of the same shapes, and merge the same ones."""
    if other is lead:
        return
    only_lead = [n for n in lead.tensors if n not in other.tensors]
    only_other = [n for n in other.tensors if n not in lead.tensors]
    if only_lead or only_other:
        found = [
            f"{c.name} alone has {_listed(names)}" for c, names in ((lead, only_lead), (other, only_other)) if names
        ]
        raise ShapeError(
            f"the models have different tensors: {'; '.join(found)}. Only models of one architecture merge"
        )
    shapes, kinds, only_rows = [], [], True
    for name, a in lead.tensors.items():
        b = other.tensors[name]
        if a.shape != b.shape:
            shapes.append(f"{name} is {list(a.shape)} in {lead.name} but {list(b.shape)} in {other.name}")
            only_rows &= named_as_embedding(name) and a.shape[1:] == b.shape[1:]
        elif a.dtype != b.dtype and not (a.dtype.merges and b.dtype.merges):
            kinds.append(f"{name} is {a.dtype} in {lead.name} but {b.dtype} in {other.name}")
    if shapes:
        raise ShapeError(f"{_listed(shapes)}. {_VOCABULARIES if only_rows else 'Only tensors of the same shape merge'}")
    if kinds:
        raise ShapeError(f"{_listed(kinds)}. Only F64, F32, F16, BF16 and F8 tensors merge; others must agree")


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _metadata(recipe: Recipe) -> dict[str, str]:
    """The receipt that is stored in every output file: what was asked, and the coefficients that were used.

    `recipe` as it was given, with the merge's own `dtype`, `rounding` and `seed`, makes the same bytes again. Models
    are stored as the user named them. Time, output folder and threads are not, so that the same merge of the same
    names gives the same bytes everywhere.
    """
    asked, stored = recipe.combine(""), recipe.out_dtype or recipe.dtype
    receipt = {
        "fastinterp": __version__,
        "numerics": NUMERICS,
        "method": recipe.method.name,
        "models": recipe.models,
        "coefficients": {"weights": asked.weights, "base": asked.base, "sums_to_one": asked.sums_to_one},
        "dtype": None if stored is None else stored.name,
        "rounding": recipe.rounding,
        "seed": recipe.seed,
        "fp8_overflow": recipe.fp8_overflow,
        "recipe": recipe.text,
    }
    return {"format": "pt", "fastinterp": json.dumps(receipt, separators=(",", ":"))}
