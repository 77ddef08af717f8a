"""The models that sliders interpolate: a base and a model for each direction, from a recipe or from names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastinterp.checkpoint.names import PICKLES, WEIGHTS
from fastinterp.errors import UsageError
from fastinterp.paths.report import PathReport
from fastinterp.presence import is_folder
from fastinterp.recipe.load import load_recipe
from fastinterp.urls import is_url

ALPHA = "alpha"


@dataclass(frozen=True)
class Sliders:
    """Models of a path: weights = base + sum over directions of value * (model - base).

    models  by name of direction
    start   initial values of the sliders, by name of direction
    """

    base: str
    models: Mapping[str, str]
    start: Mapping[str, float]

    @staticmethod
    def of(models: Sequence[str], base: str | None, added: Mapping[str, str]) -> Sliders:
        """From the command's arguments: two checkpoints, or one recipe, or a base with named directions.

        Raises: UsageError; RecipeError and CheckpointError, of the recipe.
        """
        if added or base is not None:
            if models or base is None or not added:
                raise UsageError("give two checkpoints, or a recipe, or --base with --add NAME=CHECKPOINT")
            return Sliders(base, added, dict.fromkeys(added, 0.0))
        if len(models) == 2:
            return Sliders(models[0], {ALPHA: models[1]}, {ALPHA: 0.5})
        if len(models) == 1:
            return _of_recipe(models[0])
        raise UsageError(f"two checkpoints or one recipe can be explored, got {len(models)} arguments")


def _of_recipe(source: str) -> Sliders:
    if is_url(source) or is_folder(os.path.expanduser(source)) or source.endswith((WEIGHTS, *PICKLES)):
        raise UsageError(f"{source} is one checkpoint, and a path has two ends. Name the other, too, or give a recipe")
    recipe = load_recipe(source)
    coefficients = recipe.coefficients
    if coefficients is None or (coefficients.base is None and not coefficients.sums_to_one):
        raise UsageError(
            f"{recipe.file or 'the recipe'} is no sum of whole models with one weight each, as linear and "
            "task_arithmetic are, so there are no straight lines to move along. Merge it, and explore the line from "
            "its base to the result"
        )
    origin = 0 if coefficients.base is None else coefficients.base
    others = [i for i in range(len(recipe.models)) if i != origin]
    models = [str(model) for model in recipe.models]
    names = _names([models[i] for i in others])
    return Sliders(
        models[origin],
        {name: models[i] for name, i in zip(names, others, strict=True)},
        {name: coefficients.weights[i] for name, i in zip(names, others, strict=True)},
    )


def _names(models: Sequence[str]) -> list[str]:
    """Short names for models, all different: the last part of a path, as an identifier of Python."""
    names: list[str] = []
    for model in models:
        last = os.path.basename(os.path.normpath(model)).split("@")[0]
        last = os.path.splitext(last)[0] if last.endswith((WEIGHTS, *PICKLES)) else last
        name = re.sub(r"\W+", "_", last).strip("_") or "model"
        name = f"_{name}" if name[0].isdecimal() else name
        number = 2
        stem = name
        while name in names:
            name, number = f"{stem}_{number}", number + 1
        names.append(name)
    return names


def read_report(file: str, sliders: Sliders) -> PathReport:
    """A report whose directions are the sliders'. Raises: UsageError, StorageError."""
    report = PathReport.from_json(file)
    if not set(report.directions) <= set(sliders.models):
        raise UsageError(
            f"{file} has the directions {', '.join(report.directions)}, but the sliders are {', '.join(sliders.models)}"
        )
    return report
