"""Names of models in receipts and model cards: as the recipe has them, but without the folders of this machine."""

from __future__ import annotations

from collections.abc import Sequence

from fastinterp.recipe.load import Recipe
from fastinterp.recipe.references import UNCHANGED
from fastinterp.recipe.renaming import ShownNames, is_absolute, paths_in, short_names, strings


def shown_names(recipes: Sequence[Recipe]) -> ShownNames:
    """The names for the documents of a recipe: of an absolute path its last part, with as many before it as tell it
    from others; of private recipes `model-1`, `model-2` and so on, in the order of the models.
    """
    given = next((recipe.names for recipe in recipes if recipe.names is not None), None)
    if given is not None:
        return given
    texts = list(dict.fromkeys(text for recipe in recipes for text in strings(recipe.document.value)))
    paths = list(dict.fromkeys(path for text in texts for path in paths_in(text)))
    if not recipes[-1].private:
        return ShownNames(short_names(paths))
    every = dict.fromkeys([*used_paths(recipes), *(path for path in paths if is_absolute(path))])
    return ShownNames({path: f"model-{i}" for i, path in enumerate(every, 1)}, values_only=True)


def used_paths(recipes: Sequence[Recipe]) -> list[str]:
    """The paths of all models, adapters and side-cars of the documents of a recipe, each once, as they are written."""
    made = {recipe.name for recipe in recipes if recipe.name is not None}
    refs = [ref for r in recipes for ref in (*r.models, *([r.base_model] if r.base_model else []), *r.sidecars)]
    refs = [ref for ref in refs if str(ref) not in made and ref is not UNCHANGED]
    return list(dict.fromkeys(path for ref in refs for path in (ref.path, *(a.path for a in ref.adapters))))
