"""Aligns models whose sets of tensors differ for reasons that do not matter: names, tied copies, recomputed buffers.

From names, shapes, dtypes and configurations; bytes are read of tensors that may be copies of each other, and only as
far as they are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from fastinterp.checkpoint.same_bytes import same_bytes
from fastinterp.messages import listed
from fastinterp.plan.inputs import StoredInput, TensorInput
from fastinterp.plan.models import Model
from fastinterp.recipe.tensor_groups import HasShape, grouped
from fastinterp.tokenizer.tied_embeddings import Ties, is_tied, says_tied, ties

Tensors = Mapping[str, TensorInput]

_COMPARED = 1 << 20  # bytes of a recomputed buffer, above which it is not compared with that of other models
_LISTED = 3  # names in a message before the rest is only counted


class NamedTensors(msgspec.Struct, frozen=True):
    """A model for alignment: its name in messages, its tensors, and its config.json; {} if it has none."""

    name: str
    tensors: Tensors
    config: Mapping[str, Any]


class AlignedSets(msgspec.Struct, frozen=True):
    """The tensors of models after alignment.

    tensors   of each model, by the names of the output
    copied    names of tensors of which one model's are taken as they are, and which; the others have none of them
    tied      the value that `tie_word_embeddings` of the output must have, if it is not the origin's; else None
    channels  (input channels of the origin's `conv_in`, those of the output's), where they differ; else None
    notes     by model: why a tensor that it lacks was not made from others, for the error about what it lacks
    layouts   by model: which of its tensors have another layout than the base's, which is not aligned, and what to do
    remarks   what was aligned, left out or kept, for people
    warnings  what may be wrong
    """

    tensors: tuple[Tensors, ...]
    copied: Mapping[str, int] = {}
    tied: bool | None = None
    channels: tuple[int, int] | None = None
    notes: Mapping[int, str] = {}
    layouts: Mapping[int, str] = {}
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def align_sets(
    models: Sequence[NamedTensors],
    merged: int,
    base: int,
    origin: int,
    *,
    stacked: bool = False,
    first_channels: bool = False,
    integers: int | None = None,
) -> AlignedSets:
    """Give models the same names for the same tensors, and leave out what each of them can do without.

    models  those that are merged, then others, whose names and output layers follow theirs
    merged  how many are merged
    base    index of the one whose names, and whose recomputed buffers, the output has
    origin  index of the one whose config.json is copied
    stacked the output has layers of several models one upon the other, so that no model's buffers fit all of them
    integers        index of the model whose integer tensors are taken; None: not said
    first_channels  convolutions of fewer input channels count as the widest model's in those that they lack
    Raises: CheckpointError and StorageError, if bytes that have to be compared cannot be read.
    """
    remarks: list[str] = []
    tensors = _same_names(models, merged, base, remarks)
    said = [says_tied(model.config) for model in models]
    found = ties(tensors[:merged], said[:merged], lambda i, a, b: _equal(tensors[i], a, b, said[i]))
    before = [set(t) for t in tensors]
    tensors = [_with(t, aliases, found.dropped) for t, aliases in zip(tensors[:merged], found.aliases, strict=True)] + [
        _with(t, ties([t, tensors[0]], [True, False]).aliases[0], found.dropped) for t in tensors[merged:]
    ]
    names = [model.name for model in models]
    remarks += _about_copies(found, before, names)
    remarks += _about_unsaid(found, models, said)
    if first_channels:
        tensors = _widened(tensors, merged, names, remarks)
    tensors, copied = _buffers(tensors, merged, None if stacked else base, names, remarks, integers)
    return AlignedSets(
        tuple(tensors),
        copied,
        _tied(tensors[0], models[origin].tensors, said[origin], said[:merged], found),
        _channels(models[origin].tensors, tensors[0]),
        _notes(found, names),
        _layouts(models[:merged], tensors[:merged], base),
        tuple(remarks),
        tuple(_about_heads(found, names, said)),
    )


# --- names -----------------------------------------------------------------------------------------------------------


def with_names_of(reference: Model, model: Model, remarks: list[str] | None = None) -> Model:
    """A model whose tensors have the names that the reference has for them; itself, if nothing has to change.

    remarks  to which what was done is added, for people
    """
    own, its = (NamedTensors(m.name, m.tensors, {}) for m in (model, reference))
    named = named_as(own, its, remarks)
    return model if named is model.tensors else replace(model, tensors=named)


def following(own: Mapping[str, HasShape], reference: Mapping[str, HasShape]) -> dict[str, str]:
    """The names of a model's tensors -> those that the reference has for them, without the recomputed buffers that are
    not there.
    """
    if own.keys() == reference.keys():
        return {name: name for name in own}
    from fastinterp.plan.tensor_names import match_names

    match = match_names(own, reference)
    names = {name: name for name in own} if match is None else match.names
    return {name: names[name] for name in own if names[name] in reference or not is_recomputed(name, own[name])}


def named_as(model: NamedTensors, reference: NamedTensors, remarks: list[str] | None = None) -> Tensors:
    """The tensors of a model under the names that the reference has for them; its own, if nothing explains others."""
    if model.tensors.keys() == reference.tensors.keys():
        return model.tensors
    from fastinterp.plan.tensor_names import match_names

    match = match_names(model.tensors, reference.tensors)
    if match is None:
        return model.tensors
    if remarks is not None:
        remarks.append(f"names of {model.name} follow {reference.name}: {', '.join(match.how)}")
    return {
        match.names[name]: tensor if match.names[name] == name else replace(tensor, name=match.names[name])
        for name, tensor in model.tensors.items()
    }


def _same_names(models: Sequence[NamedTensors], merged: int, base: int, remarks: list[str]) -> list[Tensors]:
    """The tensors of all models under the names of the base; as they are, if the merged models have the same."""
    reference = models[base]
    if all(model.tensors.keys() == reference.tensors.keys() for model in models[:merged]):
        return [model.tensors if i < merged else named_as(model, reference, remarks) for i, model in enumerate(models)]
    from fastinterp.plan.row_blocks import fused_as

    tensors = []
    for i, model in enumerate(models):
        named = model.tensors if i == base else named_as(model, reference, remarks)
        own, how = fused_as(named, reference.tensors)
        remarks += [f"{model.name}: {', '.join(how)}, as {reference.name} stores them"] if how else []
        tensors.append(own)
    return tensors


# --- tied copies -----------------------------------------------------------------------------------------------------


def _equal(tensors: Tensors, a: str, b: str, says: bool | None) -> bool:
    """Whether two tensors of a model have the same bytes. What is encoded, or in no file, is as its configuration says.

    Raises: CheckpointError and StorageError.
    """
    if tensors[a].key == tensors[b].key:
        return True
    if tensors[a].adapted or tensors[b].adapted:
        return False
    x, y = tensors[a].plain, tensors[b].plain
    return _same(x, y) if x is not None and y is not None else says is not False


def _same(a: StoredInput, b: StoredInput) -> bool:
    """Whether two stored tensors have the same dtype, shape and bytes. Raises: CheckpointError and StorageError."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return same_bytes((a.path, a.start, a.nbytes), (b.path, b.start, b.nbytes))


def _with(tensors: Tensors, aliases: Mapping[str, str], dropped: Sequence[str]) -> Tensors:
    """A model's tensors, with those that stand for copies that it lacks, and without the copies that are dropped."""
    if not aliases and not dropped:
        return tensors
    kept = {n: t for n, t in tensors.items() if n not in dropped}
    for name, source in aliases.items():
        tensor = tensors.get(source)
        while tensor is None:  # an alias of an alias
            source = aliases[source]
            tensor = tensors.get(source)
        if name not in dropped:
            kept[name] = replace(tensor, name=name)
    return kept


def _about_copies(found: Ties, before: Sequence[set[str]], names: Sequence[str]) -> Iterable[str]:
    for copy in found.dropped:
        having = [name for name, own in zip(names, before, strict=True) if copy in own]
        yield f"left out {copy} of {listed(having, _LISTED)}: it is a copy of another tensor that not all models store"


def _about_unsaid(found: Ties, models: Sequence[NamedTensors], said: Sequence[bool | None]) -> Iterable[str]:
    """Remarks on output layers that are no copies, where a config.json does not say whether they are."""
    unsaid = [(models[i].name, head) for i, head in found.trained if said[i] is None and models[i].config]
    for head in dict.fromkeys(head for _, head in unsaid):
        yield (
            f"config.json of {listed((name for name, own in unsaid if own == head), _LISTED)} does not say whether "
            f"{head} is the input embedding; it is not, so the output's says `tie_word_embeddings: false`"
        )


def _about_heads(found: Ties, names: Sequence[str], said: Sequence[bool | None]) -> Iterable[str]:
    """Warnings about output layers. said: what the models' configurations say of them"""
    trained = [(names[i], head) for i, head in found.trained if said[i]]
    for head in dict.fromkeys(head for _, head in trained):
        models = [name for name, own in trained if own == head]
        yield (
            f"{head} of {listed(models, _LISTED)} is not the input embedding, although config.json says that it is: it "
            "is kept, and the output's config.json says `tie_word_embeddings: false`"
        )
    for head in dict.fromkeys(head for _, head in found.guessed):
        models = [names[i] for i, name in found.guessed if name == head]
        yield (
            f"{listed(models, _LISTED)} has no {head}, and no config.json says whether it is tied: the input embedding "
            f"stands for it, beside a {head} that others trained. If that is wrong, write `missing: base`"
        )


def _notes(found: Ties, names: Sequence[str]) -> dict[int, str]:
    """By model, why something that it lacks was not made of what it has."""
    return {
        i: f"{names[i]} says `tie_word_embeddings: false` in its config.json, so that its input embedding does not "
        f"stand for the {head} that it lacks"
        for i, head in found.absent
    }


def _layouts(models: Sequence[NamedTensors], tensors: Sequence[Tensors], base: int) -> dict[int, str]:
    """By model, that its experts have another layout than the base's, and what to do."""
    from fastinterp.checkpoint.remedies import save_again
    from fastinterp.plan.row_blocks import has_other_experts

    layouts = {}
    for i, own in enumerate(tensors):
        if i != base and has_other_experts(own, tensors[base]):
            both = [models[base], models[i]]
            layouts[i] = (
                f"The matrices of experts are stored in another layout in {models[i].name} than in "
                f"{models[base].name}: fused in one of them, or transposed, so that rows do not follow rows. "
                + save_again([(model.name, model.config) for model in both])
            )
    return layouts


def _tied(
    out: Iterable[str], before: Iterable[str], origin_says: bool | None, says: Sequence[bool | None], found: Ties
) -> bool | None:
    """The value of the output's `tie_word_embeddings`, if it must differ from the origin's; else None.

    out          names of the output's tensors
    before       names of the origin's tensors
    origin_says  what the origin's config.json says
    says         what those of the models say
    """
    if is_tied(out):
        # Models that have no output layer by nature, encoders and classifiers, are not tied by that.
        made = bool(found.dropped) or all(one is True for one in says)
        return True if made and not is_tied(before) else None
    if found.trained or is_tied(before):
        return False
    # A configuration that says tied makes software ignore the output layer that is stored.
    return False if origin_says and not all(says) else None


# --- channels --------------------------------------------------------------------------------------------------------


def _widened(tensors: Sequence[Tensors], merged: int, names: Sequence[str], remarks: list[str]) -> list[Tensors]:
    """The models' tensors, where convolutions have as many input channels as the first of those that have most: what a
    model lacks is that one's, so that it does not move there.
    """
    from fastinterp.plan.row_blocks import other_channels, widened

    made: list[dict[str, TensorInput]] = [{} for _ in tensors]
    for name, first in tensors[0].items():
        having = [i for i in range(merged) if name in tensors[i]]
        if not any(other_channels(first.shape, tensors[i][name].shape) for i in having):
            continue
        widest = max(having, key=lambda i: tensors[i][name].shape[1:2])
        for i in having:
            wide = tensors[widest][name]
            if other_channels(tensors[i][name].shape, wide.shape):
                padded = widened(tensors[i][name], wide)
                if padded is not None:
                    made[i][name] = padded
                    count = tensors[i][name].shape[1]
                    remarks.append(
                        f"{name} of {names[i]} has {count} of {wide.shape[1]} input channels: it merges into the first "
                        f"{count}, and the others are those of {names[widest]}"
                    )
    return [{**own, **new} if new else own for own, new in zip(tensors, made, strict=True)]


def _channels(origin: Tensors, out: Tensors) -> tuple[int, int] | None:
    """(input channels of the origin's first convolution, those of the output's), if they differ."""
    for name, tensor in origin.items():
        other = out.get(name) if name.endswith("conv_in.weight") and len(tensor.shape) == 4 else None
        if other is not None and other.shape[:1] == tensor.shape[:1] and other.shape[1:2] != tensor.shape[1:2]:
            return tensor.shape[1], other.shape[1]
    return None


# --- recomputed buffers ----------------------------------------------------------------------------------------------


def is_recomputed(name: str, tensor: HasShape) -> bool:
    """Whether a tensor is a buffer that software makes anew when it loads a model: by its name and shape."""
    parts = name.rsplit(".", 2)
    last, parent, shape = parts[-1], parts[-2] if len(parts) > 1 else "", tensor.shape
    if last in _ALWAYS:
        return True
    if last in _ROWS_OF_NUMBERS:
        return len(shape) in (1, 2) and (len(shape) == 1 or shape[0] == 1)
    if last == "bias":  # a causal mask, not a vector that was trained
        return parent in _ATTENTION and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    if last == "masked_bias":
        return parent in _ATTENTION and math.prod(shape) == 1
    return last == "attn_mask" and len(shape) in (2, 3) and shape[-1] == shape[-2]


_ALWAYS = frozenset((
    "inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "freqs_cis", "relative_position_index",
    "relative_coords_table",
))  # fmt: skip
_ROWS_OF_NUMBERS = frozenset(("position_ids", "token_type_ids"))
_ATTENTION = frozenset(("attn", "attention", "self_attn", "self_attention"))


def _buffers(
    tensors: Sequence[Tensors], merged: int, base: int | None, names: Sequence[str], remarks: list[str],
    integers: int | None,
) -> tuple[list[Tensors], dict[str, int]]:  # fmt: skip
    """(the models' tensors, recomputed buffers that not all have alike with the model whose are copied).

    base      index of the model whose buffers are taken; None: they are left out
    integers  index of the one whose integers are; None: the base's
    """
    every: dict[str, None] = {}
    for own in tensors[:merged]:
        every |= dict.fromkeys(name for name, tensor in own.items() if is_recomputed(name, tensor))
    differing = [name for name in every if not _alike(name, tensors[:merged])]
    if not differing:
        return list(tensors), {}
    copied: dict[str, int] = {}
    for name in differing if base is not None else ():
        whole = any(name in own and not own[name].merges for own in tensors[:merged])
        homes = [i for i in (integers if whole else None, base) if i is not None and name in tensors[i]]
        if homes:
            copied[name] = homes[0]
    left_out = [name for name in differing if name not in copied]
    rest = [name for own in tensors for name in own if name not in every]
    for home in sorted(set(copied.values())):
        some = [name for name, i in copied.items() if i == home]
        remarks.append(f"taken from {names[home]}, because software computes them: {grouped(some, rest)}")
    if left_out:
        remarks.append(f"left out, because software computes them: {grouped(left_out, rest)}")
    gone = set(differing)
    return [
        {n: t for n, t in own.items() if n not in gone or copied.get(n) == i} if gone & own.keys() else own
        for i, own in enumerate(tensors)
    ], copied


def _alike(name: str, tensors: Sequence[Tensors]) -> bool:
    """Whether all models have a buffer, of the same dtype and shape; and of the same bytes, if that is soon known."""
    first = tensors[0].get(name)
    if first is None:
        return False
    for own in tensors[1:]:
        other = own.get(name)
        if other is None or (other.dtype, other.shape) != (first.dtype, first.shape):
            return False
        x, y = first.plain, other.plain
        if x is not None and y is not None and x.nbytes <= _COMPARED and not _same(x, y):
            return False
    return True
