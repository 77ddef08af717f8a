"""Quantised weights in a merge: several models that have them are refused, unless codes and scales are equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastinterp.checkpoint.quantisation_config import declared_method
from fastinterp.checkpoint.quantised import QuantisedTensor, quantised_in
from fastinterp.checkpoint.same_bytes import same_bytes
from fastinterp.checkpoint.sidecar_files import CONFIG
from fastinterp.errors import CheckpointError
from fastinterp.messages import counted, listed
from fastinterp.plan.inputs import TensorInput
from fastinterp.plan.models import Model
from fastinterp.plan.planned import PlannedTensor
from fastinterp.presence import is_file
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.module_tensors import module_tensors
from fastinterp.recipe.targets import Target

_SAMPLE = 64 << 10  # bytes that are compared of each tensor, before data is read
_LISTED = 3  # names in a message before the rest is only counted
_REASON = "Codes mean nothing without their scales, and are not merged"


def quantised_error(models: Iterable[Model], reason: str = _REASON) -> CheckpointError:
    """The error of a merge that would change quantised weights: which models have them, in which format, what to do.

    models  of the merge; some of them are quantised
    """
    groups: dict[tuple[str, int], list[tuple[Model, list[QuantisedTensor]]]] = {}
    for model in {id(m): m for m in models}.values():
        found = _found(model)
        if found:
            groups.setdefault((found[0].format, len(found)), []).append((model, found))
    facts, remedies = [], []
    for some in groups.values():
        model, found = some[0]
        facts.append(_fact([m.name for m, _ in some], found))
        remedies.append(_command(model, found))
    known = [text for text in dict.fromkeys(remedies) if text]
    convert = f", or de-quantise them first, {'; '.join(known)}" if known else ""
    return CheckpointError(
        f"{'; '.join(facts)}. {reason}. Merge the models from before they were quantised{convert}",
        tensor=next((found[0].codes for some in groups.values() for _, found in some), None),
    )


def quantised_arrays(models: Sequence[tuple[str, Sequence[QuantisedTensor]]]) -> CheckpointError:
    """The same of state dicts in memory, each with what messages call it and its quantised tensors."""
    facts = "; ".join(_fact([label], found) for label, found in models)
    return CheckpointError(f"{facts}. {_REASON}. Merge state dicts of the models from before they were quantised")


def _fact(names: Sequence[str], found: Sequence[QuantisedTensor]) -> str:
    are = "is" if len(names) == 1 else "are"
    return f"{listed(names, _LISTED)} {are} quantised ({found[0].format}): {_example(found)}"


def _found(model: Model) -> list[QuantisedTensor]:
    if model.checkpoint is not None:
        every = quantised_in(model.checkpoint)
        return [q for q in every if (t := model.tensors.get(q.codes)) is None or t.quantised]
    return [QuantisedTensor(t.quantised, name, ()) for name, t in model.tensors.items() if t.quantised]


def _example(found: Sequence[QuantisedTensor]) -> str:
    first = next((q for q in found if q.companions), found[0])
    beside = f" with {first.companions[0].rpartition('.')[2]}" if first.companions else ""
    return f"{counted(len(found), 'tensor')}, as {first.codes}{beside}"


def _command(model: Model, found: Sequence[QuantisedTensor]) -> str:
    checkpoint = model.checkpoint
    if checkpoint is None:
        return ""
    from fastinterp.checkpoint.dequantising import command

    return command(found[0].format, checkpoint.root)


def refuse_quantised(recipe: Recipe, models: Sequence[Model]) -> None:
    """Raises: CheckpointError, if models that the recipe merges with each other have different quantised tensors, or
    one has some that are decoded beside some that are not.

    models  those of the recipe, as they were opened
    """
    refuse_half_decoded(models)
    for section in recipe.sections:
        for group in section.groups:
            merged = [models[source.model] for source in group.sources]
            if len(merged) < 2 or group.copies:
                continue
            kinds = [_kinds(model, section.name) for model in merged]
            different = any(k != kinds[0] for k in kinds[1:])
            if any(kinds) and (not all(kinds) if section.stacked else different):
                raise quantised_error(merged)


def refuse_half_decoded(models: Iterable[Model]) -> None:
    """Raises: CheckpointError, if a model has tensors that are decoded, and codes that are not: no configuration could
    tell of both.
    """
    for model in models:
        some = next((t.name for t in model.tensors.values() if t.decoded), None)
        if some is not None and any(t.quantised for t in model.tensors.values()):
            raise quantised_error([model], f"Others of its tensors are de-quantised, as {some}, and these cannot be")


def _kinds(model: Model, module: str | None) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """The format, dtype and shape of the quantised tensors of a model, or of a module of it."""
    every = [t for t in model.tensors.values() if t.quantised]
    if module is not None and every:
        inside = set(module_tensors(module, list(model.tensors)))
        every = [t for t in every if t.name in inside]
    return {t.name: (t.quantised, t.dtype.name, t.shape) for t in every}


def refuse_differing(targets: Sequence[Target], models: Sequence[Model]) -> None:
    """Raises: CheckpointError, if a tensor would be made of quantised ones that differ; StorageError.

    Reads the first bytes of each: the models of a merge that differ in their codes differ there. The run compares all.
    """
    for target in targets:
        inputs = [models[i].tensors[name] for i, name in target.inputs]
        if len(inputs) > 1 and any(t.quantised for t in inputs):
            kinds = {(t.quantised, t.dtype.name, t.shape) for t in inputs}
            if len(kinds) > 1 or not agree(inputs, _SAMPLE):
                raise quantised_error(models[i] for i, _ in target.inputs)


def refuse_models(models: Sequence[Model]) -> None:
    """The same of whole models, all of whose tensors are merged with each other."""
    refuse_half_decoded(models)
    kinds = [_kinds(model, None) for model in models]
    for name in kinds[0] if all(k == kinds[0] for k in kinds) else ():
        if not agree([m.tensors[name] for m in models], _SAMPLE):
            raise quantised_error(models)
    if any(k != kinds[0] for k in kinds):
        raise quantised_error(models)


def agree(inputs: Sequence[TensorInput], limit: int | None = None) -> bool:
    """Whether tensors of one dtype and shape are equal, as far as they are stored in files.

    limit  bytes that are compared from the start; None: all
    Raises: CheckpointError, StorageError.
    """
    stored = {t.key: t for one in inputs for _, part in one.agreeing(0) if (t := part.plain) is not None}
    places = [(t.path, t.start, t.nbytes if limit is None else min(t.nbytes, limit)) for t in stored.values()]
    return all(same_bytes(places[0], place) for place in places[1:])


class AboutConfiguration(NamedTuple):
    """What becomes of what configurations say of quantised weights.

    folders   those of components whose configuration says that there are some, where the output has none
    remarks   on these, for people
    warnings  about codes in the output of which no configuration tells
    """

    folders: tuple[str, ...]
    remarks: tuple[str, ...]
    warnings: tuple[str, ...]


def about_configuration(origin: Model, tensors: Sequence[PlannedTensor], same: bool) -> AboutConfiguration:
    """What the configurations of the origin and of its components say, beside what is written.

    same  whether tensors are quantised anew, as the origin has them
    """
    folders, remarks = [], []
    formats = {t.name: t.inputs[0].quantised for t in tensors if not t.merged and t.inputs[0].quantised}
    forms = {t.name: t.form.form.encoding for t in tensors if same and t.form is not None}
    formats |= {name: form.format for name, form in forms.items() if form is not None}
    parts = [("", "")] if origin.source is None else [(part.folder, part.prefix) for part in origin.source.parts]
    known = False
    for folder, prefix in parts:
        said = declared_method(origin.root / folder)
        known |= bool(said)
        if said and not any(name.startswith(prefix) for name in formats):
            folders.append(folder)
            what = f"{prefix}{CONFIG} of {origin.name} says that weights are quantised ({said})"
            remarks.append(f"{what}, and those here are not: left out")
    own = same or any(t.quantised for t in origin.tensors.values())
    if not formats or known or own or not is_file(origin.root / CONFIG):
        return AboutConfiguration(tuple(folders), tuple(remarks), ())
    warning = (
        f"the output has quantised weights ({', '.join(sorted({*formats.values()}))}), and {CONFIG} of {origin.name}, "
        "which it gets, does not say so: software may take codes for weights. Copy `quantization_config` from the "
        "model's"
    )
    return AboutConfiguration(tuple(folders), tuple(remarks), (warning,))
