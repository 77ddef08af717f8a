"""One document of a recipe, planned: its models made to fit each other, and its tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fastinterp.checkpoint.open import Checkpoint, open_checkpoint
from fastinterp.errors import CheckpointError, StorageError
from fastinterp.plan.compatibility import warnings_about
from fastinterp.plan.tensors import PlannedTensor, foreign_dtypes, plan_tensors, sidecar_refs
from fastinterp.plan.vocabularies import Fitted, fit_models
from fastinterp.recipe.chain import not_there
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.references import ModelRef
from fastinterp.recipe.targets import Assembly


@dataclass(frozen=True)
class Document:
    """A document by itself.

    origin    the checkpoint that configuration and tokenizer come from
    tensors   whose inputs are numbers in `checkpoints`
    sidecars  by the names that the recipe has
    """

    fitted: Fitted
    origin: Checkpoint
    tensors: tuple[PlannedTensor, ...]
    sidecars: dict[ModelRef, Checkpoint]
    warnings: tuple[str, ...]

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (*self.fitted.models, *self.sidecars.values())


class Library:
    """Checkpoints by the models of recipes. Each is opened once, and so is each that cannot be."""

    def __init__(self) -> None:
        self._opened: dict[ModelRef, Checkpoint] = {}
        self._errors: dict[ModelRef, CheckpointError | StorageError] = {}

    def find(self, model: ModelRef) -> Checkpoint:
        """Raises: CheckpointError and StorageError, the same one each time."""
        if model in self._errors:
            raise self._errors[model]
        if model not in self._opened:
            try:
                self._opened[model] = open_checkpoint(str(model))
            except (CheckpointError, StorageError) as error:
                self._errors[model] = error
                raise
        return self._opened[model]

    @property
    def opened(self) -> tuple[Checkpoint, ...]:
        return tuple(self._opened.values())


def found(recipe: Recipe, find: Callable[[ModelRef], Checkpoint], model: ModelRef) -> Checkpoint:
    """What `find` returns for a model that a recipe names.

    Raises: CheckpointError, with the place in the recipe, and where the model may be.
    """
    try:
        return find(model)
    except CheckpointError as error:
        document, name = recipe.document, str(model)
        if document.file is None or error.file != name:  # a recipe that nobody wrote; a file of the model
            raise
        path = recipe.place_of(model)
        hint = "" if os.path.exists(os.path.expanduser(name)) else not_there(document, name, ())
        where = str(document.error("", path)).strip()
        raise CheckpointError(f"{error.message}{hint} {where}", file=name, tensor=error.tensor) from error


def plan_document(recipes: Sequence[Recipe], find: Callable[[ModelRef], Checkpoint]) -> Document:
    """What a document makes, of what.

    recipes  as those of make_plan
    find     the checkpoint of a name: the same object for the same model
    Raises: what make_plan raises.
    """
    first = recipes[0]
    models = [found(first, find, model) for model in first.models]
    origin = found(first, find, first.origin)
    fitted = fit_models(first, models, origin)
    assemblies = [Assembly(recipe, [c.tensors for c in fitted.models]) for recipe in recipes]
    fitted = replace(fitted, counts=tuple(assemblies[0].counts))
    points = [assembly.targets for assembly in assemblies]
    sidecars = {model: found(first, find, model) for model in sidecar_refs(points[0], first.method)}
    tensors = plan_tensors(recipes, points, fitted.models, sidecars, origin)
    warnings = [*fitted.warnings, *warnings_about(fitted.models, origin, fitted.tokenizer is not None)]
    warnings += fitted.uncounted(origin) if fitted.counts else []
    warnings += foreign_dtypes(first, points[0], origin)
    if first.filters:
        from fastinterp.recipe.check import unmatched

        warnings += [str(finding) for finding in unmatched(first, assemblies[0])]
    return Document(fitted, origin, tensors, sidecars, tuple(warnings))
