"""Plans a merge from headers alone: no tensor data is read here.

A plan holds one or more outputs made from one read of the same inputs (a path of interpolations, say): for every
output tensor which inputs are read, with which coefficients, and where the result goes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastinterp._version import __version__
from fastinterp.arguments import overridden, size_of
from fastinterp.checkpoint.layout import Layout, make_layout
from fastinterp.errors import UsageError
from fastinterp.messages import counted, size
from fastinterp.ops.combine import MAX_OUTPUTS, NUMERICS, Combine
from fastinterp.plan.inputs import PlannedTensor
from fastinterp.plan.models import Library, Model
from fastinterp.plan.single import plan_document
from fastinterp.plan.vocabularies import AlignedModels
from fastinterp.recipe.load import Recipe, load_recipes

Source = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]]
_MOST_BYTES = 64 << 10  # of coefficients in a receipt, which is in every file


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first byte of data is read.

    recipes      one per output; they differ in coefficients only
    checkpoints  the models of the recipe, in its order, then side-cars; of several documents, then those that are made
    origin       the checkpoint that configuration and tokenizer come from
    layouts      one per output: equal but for the metadata in their headers
    aligned      what becomes of the files beside the weights, where vocabularies or tied embeddings differ
    warnings     about the files beside the weights: what is copied, and may not fit; and about the recipe
    remarks      what was decided without being asked: files and tensors that were left out, names that were aligned
    models       the names of the first of the checkpoints: the models of all documents
    inputs       files and folders that an output must not touch
    above        the documents above
    folders      held as long as the plan is: they have the small files of documents above
    """

    recipes: tuple[Recipe, ...]
    checkpoints: tuple[Model, ...]
    origin: Model
    tensors: tuple[PlannedTensor, ...]
    layouts: tuple[Layout, ...]
    aligned: AlignedModels
    warnings: tuple[str, ...]
    remarks: tuple[str, ...]
    models: tuple[str, ...]
    inputs: tuple[Path, ...]
    above: tuple[Recipe, ...] = ()
    folders: tuple[object, ...] = ()

    def __repr__(self) -> str:
        """Short: the fields hold every tensor and header."""
        return (
            f"<Plan: {self.recipes[0].method.name} of {counted(len(self.checkpoints), 'model')}, "
            f"{size(self.bytes_read)} read, {size(self.bytes_written)} written>"
        )

    @property
    def bytes_read(self) -> int:
        """An estimate: the answers to a method's requests may lead to more or fewer reads."""
        return sum(stage.bytes_read for t in self.tensors for stage in t.stages)

    @property
    def bytes_made(self) -> int:
        """Bytes of tensors of the documents above that are stored until they are read."""
        return sum(stage.nbytes for t in self.tensors for stage in t.before)

    @property
    def bytes_written(self) -> int:
        """Bytes of tensors. Headers and indexes are not counted: disk_bytes has them too."""
        return sum(layout.total_size for layout in self.layouts)

    @property
    def disk_bytes(self) -> int:
        return sum(layout.disk_bytes for layout in self.layouts)


def make_plan(
    recipes: Sequence[Recipe], *, max_shard_size: int, above: Sequence[Recipe] = (), library: Library | None = None
) -> Plan:
    """Open the checkpoints' headers, see that they fit together, and lay out the output.

    recipes  1 to 16, with the same models, dtypes and rounding
    above    the documents above, if there are any; then `recipes` is the last document alone
    library  opens the checkpoints, and may have opened some already; None: a new one
    Raises: CheckpointError and ShapeError, if a checkpoint is damaged or does not fit the others; MethodError, if a
    method does not accept its models or parameters; RecipeError, if documents do not fit each other; UsageError.
    """
    first = recipes[0]
    if len(recipes) > MAX_OUTPUTS:
        raise UsageError(f"one read can make at most {MAX_OUTPUTS} outputs, got {len(recipes)}")
    if any(r.models != first.models or r.dtype != first.dtype or r.out_dtype != first.out_dtype for r in recipes):
        raise UsageError("recipes that share one read must have the same models and dtypes")
    library = library or Library()
    if above:
        from fastinterp.plan.chained import plan_chain

        last, checkpoints, names, warnings, remarks, folders = plan_chain(above, first, library)
    else:
        last = plan_document(recipes, library.find)
        checkpoints, names, folders = last.checkpoints, tuple(map(str, first.models)), ()
        warnings, remarks = last.warnings, last.remarks
    tensors = last.tensors
    layouts = tuple(
        make_layout([(t.name, t.dtype, t.shape) for t in tensors], _metadata(recipe, k, tensors, names), max_shard_size)
        for k, recipe in enumerate(recipes)
    )
    inputs = tuple(dict.fromkeys(path for m in library.opened if m.checkpoint for path in m.checkpoint.inputs))
    return Plan(
        tuple(recipes), checkpoints, last.origin, tensors, layouts, last.aligned, warnings, remarks, tuple(names),
        inputs, tuple(above), folders,
    )  # fmt: skip


def _metadata(recipe: Recipe, k: int, tensors: Sequence[PlannedTensor], models: Sequence[str]) -> dict[str, str]:
    """The receipt that is stored in every output file: the recipe, and the coefficients that were used.

    `recipe` as it was given, with the merge's own `dtype`, `rounding`, `seed`, `missing` and `channels`, makes the same
    bytes again. Models are stored as the user named them. Time, output folder and threads are not, so that the same
    merge of the same names gives the same bytes everywhere.
    """
    stored = recipe.out_dtype or recipe.dtype
    receipt = {
        "fastinterp": __version__,
        "numerics": NUMERICS,
        "method": recipe.method.name,
        "models": models,
        "coefficients": _coefficients(k, tensors),
        "dtype": None if stored is None else stored.name,
        "rounding": recipe.rounding,
        "seed": recipe.seed,
        "fp8_overflow": recipe.fp8_overflow,
        "recipe": recipe.text,
    }
    receipt |= {} if recipe.missing == "error" else {"missing": recipe.missing}
    receipt |= {} if recipe.channels == "same" else {"channels": recipe.channels}
    return {"format": "pt", "fastinterp": json.dumps(receipt, separators=(",", ":"))}


def _coefficients(k: int, tensors: Sequence[PlannedTensor]) -> dict[str, Any] | list[dict[str, Any]] | str:
    """Those of output k: one set for all tensors, or several, each with its tensors; or why they are not there.

    The header is laid out before any data is read, so only coefficients that need no statistics can be in it.
    """
    if any(t.program is not None or t.before for t in tensors):
        return "left out: they come from the data, or differ by element. The recipe gives them again"
    sets: dict[Combine, list[str]] = {}
    for t in tensors:
        if t.sums:
            sets.setdefault(t.sums[k], []).append(t.name)
    weights = [{"weights": c.weights, "base": c.base, "sums_to_one": c.sums_to_one} for c in sets]
    if len(weights) <= 1:
        return weights[0] if weights else []
    named = [{**one, "tensors": names} for one, names in zip(weights, sets.values(), strict=True)]
    if len(json.dumps(named)) > _MOST_BYTES:
        return f"left out: {len(sets)} sets of them are too many. The recipe gives them again"
    return named


def plan_recipe(
    recipe: Source, max_shard_size: str | int, dtype: object, rounding: object, seed: object, missing: object = None,
    channels: object = None,
) -> Plan:  # fmt: skip
    """The plan of one recipe, of one or more documents. Arguments and errors as of `merge`."""
    *above, last = _documents(recipe, dtype, rounding, seed, missing, channels)
    return make_plan([last], max_shard_size=size_of(max_shard_size), above=above)


def plan_documents(
    recipe: Source, max_shard_size: str | int, dtype: object, rounding: object, seed: object, missing: object = None,
    channels: object = None,
) -> list[Plan]:  # fmt: skip
    """A plan for each document of a recipe, the last for that which is written. Arguments and errors as of `merge`."""
    every = _documents(recipe, dtype, rounding, seed, missing, channels)
    return [make_plan([one], max_shard_size=size_of(max_shard_size), above=every[:i]) for i, one in enumerate(every)]


def _documents(
    recipe: Source, dtype: object, rounding: object, seed: object, missing: object, channels: object
) -> list[Recipe]:
    *above, last = load_recipes(recipe)
    changed = overridden(last, dtype, rounding, seed, missing, channels)
    if above:
        above = [overridden(r, None, None, None, missing, channels) for r in above]
        # They were stored as the last one is, and are; a seed that all have in common is replaced in all.
        if rounding is not None:
            above = [replace(r, rounding=changed.rounding) if r.rounding == last.rounding else r for r in above]
        above = [replace(r, seed=changed.seed) if r.seed == last.seed else r for r in above]
    return [*above, changed]
