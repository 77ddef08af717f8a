"""The recipe of an output, from its receipt, with the models where they are now."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastinterp.checkpoint.names import shell_word
from fastinterp.errors import CheckpointError, RecipeError, UnreadableError
from fastinterp.messages import clipped
from fastinterp.plan.plan import Plan, documents, make_plan
from fastinterp.recipe.document import from_text
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.references import ModelRef
from fastinterp.recipe.renaming import ShownNames, renamed
from fastinterp.recipe.shown_names import used_paths
from fastinterp.verification.made_output import MadeOutput, Told


def named_paths(told: Told, name: str) -> list[str]:
    """The paths of all models, adapters and side-cars that the recipe names, as the receipt has them."""
    return used_paths(_recipes(told, {}, name))


def plan_again(made: MadeOutput, places: Mapping[str, str], looked_at: Callable[[str], str]) -> Plan:
    """The plan of the merge that made an output.

    places     path in the receipt -> where that is now
    looked_at  tells where a path was looked for, for people
    Raises: what make_plan does; CheckpointError, if the receipt is damaged.
    """
    told = made.told
    recipes = _recipes(told, places, made.name)
    try:
        return _plan(made, recipes)
    except CheckpointError as error:
        known = error.file is None or isinstance(error, UnreadableError)
        if known or error.file not in used_paths(recipes) or os.path.exists(error.file):
            raise
        where = f"If it is a folder or a file, say where it is: --models {shell_word(error.file)}=PATH"
        looked = f"Looked at: {looked_at(error.file)}"
        raise CheckpointError(f"{error.message.rstrip('. ')}. {where}. {looked}", file=error.file) from None


def _plan(made: MadeOutput, recipes: Sequence[Recipe]) -> Plan:
    told = made.told
    return make_plan(recipes[-1:], max_shard_size=told.max_shard_size, above=recipes[:-1], one_file=made.ending)


def _recipes(told: Told, places: Mapping[str, str], name: str) -> list[Recipe]:
    def place(text: str) -> str:
        ref = ModelRef.of(text)
        if not any(path in places for path in (ref.path, *(a.path for a in ref.adapters))):
            return text
        adapters = [(a, places.get(a.path, a.path)) for a in ref.adapters]
        own = places.get(ref.path, ref.path)
        text = own if ref.revision is None else f"{own}@{ref.revision}"
        return "+".join((text, *(str(type(a)(path, a.revision, a.scale)) for a, path in adapters)))

    values = [renamed(value, place) for value in _values(told)]
    options = (told.dtype, told.rounding, told.seed, told.missing, told.channels, told.quantize)
    try:
        recipes = documents(values, *options)
        if told.document is not None:
            recipes = _up_to(recipes, told.document)
    except RecipeError as error:
        raise CheckpointError(f"the recipe in its receipt cannot be used: {error}", file=name) from None
    names = ShownNames({there: path for path, there in places.items()}, told.private)
    cut = told.truncate_embeddings  # as an option of mergekit's, which the text of the recipe does not have
    return [
        replace(
            one, text=told.recipe, names=names, private=told.private,
            truncate_embeddings=cut or one.truncate_embeddings,
        )
        for one in recipes
    ]  # fmt: skip


def _up_to(recipes: Sequence[Recipe], document: str) -> list[Recipe]:
    """The documents up to the one of this name, which is the one that was written."""
    for i, recipe in enumerate(recipes):
        if recipe.name == document:
            return [*recipes[: i + 1]]
    raise RecipeError(f"there is no document `{clipped(document)}`")


def _values(told: Told) -> list[Any]:
    try:
        return [document.value for document in from_text(told.recipe)]
    except RecipeError as error:
        raise CheckpointError(f"the recipe in its receipt is damaged: {error}") from None
