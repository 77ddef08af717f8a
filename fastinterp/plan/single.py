"""Plans one document of a recipe: its models, aligned with each other, and its tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

import msgspec
from msgspec.structs import replace

from fastinterp.errors import CheckpointError, UnreadableError
from fastinterp.messages import listed
from fastinterp.output.origin_files import OriginFiles, origin_files
from fastinterp.plan.compatibility import (
    compatibility_warnings,
    component_warnings,
    head_warnings,
    lost_tensors,
    lost_warnings,
    template_warnings,
)
from fastinterp.plan.converted import conversion_warnings
from fastinterp.plan.fit import check_cuts, other_sizes
from fastinterp.plan.models import Model, is_gguf
from fastinterp.plan.planned import PlannedTensor
from fastinterp.plan.quantised import about_configuration, refuse_differing, refuse_quantised
from fastinterp.plan.tensor_sets import with_names_of
from fastinterp.plan.tensors import complex_remarks, dtype_remarks, dtype_warnings, plan_tensors, sidecar_refs
from fastinterp.plan.vocabularies import AlignedModels, align_models
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.references import ModelRef, not_there
from fastinterp.recipe.targets import Assembly
from fastinterp.recipe.tensor_groups import missing_tensors

_LISTED = 5  # models in a remark before the rest is only counted


class Document(msgspec.Struct, frozen=True):
    """The plan of one document.

    origin    the checkpoint that configuration and tokenizer come from
    tensors   their inputs' checkpoints are indices into `checkpoints`
    sidecars  by the names that the recipe has
    remarks   what was left out, or made to fit, for people: see Plan
    files     what becomes of the files in the origin's folder
    """

    aligned: AlignedModels
    origin: Model
    tensors: tuple[PlannedTensor, ...]
    sidecars: dict[ModelRef, Model]
    warnings: tuple[str, ...]
    remarks: tuple[str, ...]
    files: OriginFiles

    @property
    def checkpoints(self) -> tuple[Model, ...]:
        return (*self.aligned.models, *self.sidecars.values())


def find_named(recipe: Recipe, find: Callable[[ModelRef], Model], model: ModelRef) -> Model:
    """The model that `find` returns for a name in a recipe.

    Raises: CheckpointError, with the place in the recipe, and where the model may be.
    """
    try:
        return find(model)
    except CheckpointError as error:
        document, name = recipe.document, error.file or ""
        if document.file is None or name not in model.names:  # a recipe that nobody wrote; a file of the model
            raise
        path = recipe.path_of(model)
        hint = "" if os.path.exists(os.path.expanduser(name)) else not_there(document, name, ())
        where = str(document.error("", path)).strip()
        kind = UnreadableError if isinstance(error, UnreadableError) else CheckpointError
        raise kind(f"{error.message}{hint} {where}", file=name, tensor=error.tensor) from error


def plan_document(recipes: Sequence[Recipe], find: Callable[[ModelRef], Model]) -> Document:
    """The plan of one document.

    recipes  as those of make_plan
    find     opens a model: the same object for the same model
    Raises: what make_plan raises.
    """
    first = recipes[0]
    models = [find_named(first, find, model) for model in first.models]
    origin = find_named(first, find, first.origin)
    _refuse_formats(first, (*models, origin))
    refuse_quantised(first, models)
    # Before any of them is read: changes are noticed from here on.
    files = origin_files(origin.root, origin.source, origin.left_out)
    aligned = align_models(first, models, origin)
    known = [c.tensors for c in aligned.models]
    sizes = other_sizes(aligned.models, first.base_index)
    assemblies = [
        Assembly(
            recipe,
            known,
            tensors=known,
            copied=aligned.copied,
            notes=aligned.notes,
            layouts=aligned.layouts,
            sizes=sizes,
        )
        for recipe in recipes
    ]
    layer_warnings: list[str] = []
    if assemblies[0].cuts:
        check_cuts(first, assemblies[0].cuts, assemblies[0].targets, aligned.models)
    if assemblies[0].counts:
        from fastinterp.plan.stacks import about_layers, counts_of

        aligned = replace(aligned, counts=counts_of(assemblies[0].counts, origin, aligned.models))
        layer_warnings, changed = about_layers(aligned.counts, origin, aligned.models)
        aligned = replace(aligned, about_config=tuple(changed))
    targets = [assembly.targets for assembly in assemblies]
    refuse_differing(targets[0], aligned.models)
    base = aligned.models[first.base_index]
    sidecars = {
        model: with_names_of(base, find_named(first, find, model)) for model in sidecar_refs(targets[0], first.method)
    }
    tensors = plan_tensors(recipes, targets, aligned.models, sidecars, origin, aligned.layouts)
    warnings = [
        *map(str, first.warnings),
        *dict.fromkeys(warning for model in models for warning in model.warnings),
        *aligned.warnings,
        *(aligned.layouts.values() if first.missing != "error" else ()),
        *compatibility_warnings(aligned.models, origin, aligned.tokenizer is not None, aligned.rows is not None),
        *_about_keys(first, aligned.models, origin),
    ]
    about = about_configuration(origin, tensors, first.quantize == "same")
    aligned = replace(aligned, numbers=about.folders)
    warnings += about.warnings
    if aligned.template is None and aligned.vocabulary is None:
        warnings += template_warnings(aligned.models, origin)
    warnings += head_warnings(origin, {t.name: t for t in tensors}, aligned.tied)
    left, made = assemblies[0].left if first.missing != "error" else {}, {t.name for t in tensors}
    own = next((model.tensors for model in aligned.models if model.root == origin.root), origin.tensors)
    lost = lost_tensors(origin, own, [name for name in left if name not in made], aligned.tied)
    warnings += lost_warnings(origin, {name: left[name] for name in lost}, made, base)
    warnings += component_warnings(aligned.models, origin)
    warnings += [*layer_warnings, *dtype_warnings(first, targets[0], origin)]
    warnings += conversion_warnings(tensors, [*aligned.models, *sidecars.values()])
    if first.filters:
        from fastinterp.recipe.check import filter_warnings

        warnings += [str(warning) for warning in filter_warnings(first, assemblies[0])]
    opened = (*models, origin, *sidecars.values())
    remarks = [remark for model in opened if model.checkpoint is not None for remark in model.checkpoint.remarks]
    remarks += [remark for model in opened for remark in model.remarks]
    if first.quantize == "none":
        remarks += [remark for model in opened for remark in model.as_numbers]
    remarks += [*aligned.remarks, *missing_tensors({n: m for n, m in left.items() if n not in lost}, made, base.name)]
    about_dtypes = [] if is_gguf(origin) else dtype_remarks(first, targets[0], aligned.models, origin)
    remarks += [*about_dtypes, *about.remarks, *complex_remarks(first, tensors)]
    together = _together(dict.fromkeys(remarks), [model.name for model in opened])
    return Document(aligned, origin, tensors, sidecars, tuple(warnings), together, files)


def _refuse_formats(recipe: Recipe, models: Sequence[Model]) -> None:
    """Raises: CheckpointError and UsageError, about GGUF models: see plan/gguf.py. models: the origin comes last"""
    if any(map(is_gguf, models)):
        from fastinterp.plan.gguf import refuse_keys, refuse_mixed

        refuse_mixed(models)
        refuse_keys(recipe, models[-1])


def _about_keys(recipe: Recipe, models: Sequence[Model], origin: Model) -> list[str]:
    """Warnings about the keys in the headers of GGUF models."""
    if not is_gguf(origin):
        return []
    from fastinterp.plan.gguf import gguf_warnings, place_warnings

    stacked = any(section.stacked for section in recipe.sections)
    return [*gguf_warnings(models, origin), *place_warnings(origin, stacked)]


def _together(remarks: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    """The remarks, those as one that say the same of several models: `names of ft1, ft2 follow base: ...`."""
    models: dict[tuple[str, str], list[str]] = {}
    for remark in remarks:
        for lead in ("left out of ", "names of ", ""):
            found = [name for name in names if remark.startswith((f"{lead}{name}: ", f"{lead}{name} follow "))]
            if found:
                name = max(found, key=len)
                models.setdefault((lead, remark.removeprefix(lead + name)), []).append(name)
                break
        else:
            models[remark, ""] = []
    return tuple(lead + listed(of, _LISTED) + rest for (lead, rest), of in models.items())
