"""The tensors of a module: those whose names start as it is called in a recipe."""

from __future__ import annotations

from collections.abc import Collection

from fastinterp.messages import listed

_LISTED = 5  # names in a message before the rest is only counted
# mergekit's names for parts of vision-language models, and how their tensors start in checkpoints.
_ALIASES = {
    "text_decoder": ("language_model", "text_model", "model.layers", "model.embed_tokens", "model.norm", "lm_head"),
    "multi_modal_projector": ("multi_modal_projector", "mm_projector", "visual.merger"),
    "vision_tower": ("vision_tower", "visual", "vision_model"),
}


def module_tensors(module: str, names: Collection[str]) -> list[str]:
    """The names that start with `module.` or `model.module.`; all of them for mergekit's `default`. The name of a
    pipeline's component is that of a module, too: `unet` has the names that start with `unet/`.

    Where there are none, the three names that mergekit has for parts of vision-language models stand for what these are
    called in checkpoints, the first that is there; a text_decoder has the head, too.
    """
    if module == "default":
        return list(names)
    tensors = _starting((module,), names)
    if tensors or module not in _ALIASES:
        return tensors
    if module != "text_decoder":
        return next((tensors for start in _ALIASES[module] if (tensors := _starting((start,), names))), [])
    return _starting(_ALIASES[module], names)


def no_tensor(module: str | None, names: Collection[str]) -> str:
    """The message about a module that has none of the tensors called `names`; None: the whole model."""
    if module is None:
        return "the models have no tensors"
    starts = {name.split(".")[0].split("/")[0]: None for name in names}
    return f"no tensor's name starts with the module's, `{module}`. They start with {listed(starts, _LISTED)}"


def _starting(starts: tuple[str, ...], names: Collection[str]) -> list[str]:
    bare = [start.rstrip("./") for start in starts]
    prefixes = (*(f"{lead}{start}." for start in bare for lead in ("", "model.")), *(f"{start}/" for start in bare))
    return [name for name in names if name.startswith(prefixes)]
