"""Merges of GGUF models: which models fit each other, and what differs in the keys of their headers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

from fastinterp.checkpoint import remedies
from fastinterp.checkpoint.gguf_keys import GgufHeader
from fastinterp.checkpoint.names import listing, quote
from fastinterp.errors import CheckpointError, ShapeError, UsageError
from fastinterp.messages import fit, listed
from fastinterp.plan.models import Model, is_gguf
from fastinterp.recipe.load import Recipe

_MOST = 3  # lines of a kind, and names in a line, before the rest is only counted
# Keys of which two models of one kind may have different values without a word.
_MAY_DIFFER = re.compile(
    r"general\..*|split\..*|quantize\..*|tokenizer\.chat_template.*|fastinterp|[^.]+\.context_length"
)
# Keys by which llama.cpp knows from the place of a layer what it does.
_BY_PLACE = re.compile(r".*(?:leading_dense|nextn|interval|interleave|pattern|shared_kv|_step).*")


def refuse_mixed(models: Iterable[Model]) -> None:
    """Raises: CheckpointError, if some models are in GGUF and others are not; or if the package gguf is missing that
    turns blocks of some of them into numbers.
    """
    every = list({id(m): m for m in models}.values())
    inside = [m for m in every if is_gguf(m)]
    if not inside:
        return
    outside = [m for m in every if not is_gguf(m)]
    if outside:
        command = remedies.from_gguf(inside[0].root, inside[0].files[0].name) if inside[0].files else ""
        raise CheckpointError(
            f"{inside[0].name} is in GGUF, and {outside[0].name} is not. They are not merged: tensors have other names "
            f"there, and rows of q and k another order. Convert one of them first: {outside[0].name} with llama.cpp's "
            f"convert_hf_to_gguf.py; or {inside[0].name}, if it is a language model, with transformers 5 and the "
            f"package gguf: {command}; then name NEW"
        )
    for model in inside:
        entries = () if model.checkpoint is None else model.checkpoint.tensors.values()
        kinds = {entry.conversion.stored_as for entry in entries if entry.conversion is not None}
        if kinds and find_spec("gguf") is None:
            raise CheckpointError(
                f"tensors of {', '.join(sorted(kinds))} are read with the package gguf, which is not installed: `pip "
                "install gguf`, or `pip install fastinterp[gguf]`",
                file=model.name,
            )


def refuse_keys(recipe: Recipe, origin: Model) -> None:
    """Raises: UsageError, if a recipe asks of GGUF models what is not done with them."""
    for key, value in (("tokenizer", recipe.tokenizer), ("chat_template", recipe.chat_template)):
        if value is not None:
            raise UsageError(
                f"`{key}`{' (or `tokenizer_source`)' if key == 'tokenizer' else ''} is not possible with GGUF models: "
                f"the output has the vocabulary and the chat template of {origin.name}. Leave it out; or merge the "
                "models in safetensors, and convert the output with llama.cpp's convert_hf_to_gguf.py"
            )


def gguf_warnings(models: Sequence[Model], origin: Model) -> list[str]:
    """Warnings about keys of the headers in which models differ: those of `origin` are the output's.

    Raises: ShapeError, if models have another architecture.
    """
    ours = header_of(origin)
    groups: dict[str, list[str]] = {}
    for model in models:
        theirs = header_of(model)
        if theirs.architecture != ours.architecture:
            raise ShapeError(
                f"{origin.name} has the architecture {quote(ours.architecture)} (`general.architecture`), and "
                f"{model.name} {quote(theirs.architecture)}: only models of one architecture are merged"
            )
        differing = _differing(ours, theirs)
        if differing and model.name != origin.name:
            groups.setdefault(listed(differing, _MOST), []).append(model.name)
    lines = [
        f"keys of {origin.name} and of {listed(names, _MOST)} differ: {keys}; the output gets {origin.name}'s. "
        "See that the models belong together, and that every token has the same id in all"
        for keys, names in groups.items()
    ]
    return lines[:_MOST] + ([f"and {len(lines) - _MOST} more like the last"] if len(lines) > _MOST else [])


def header_of(model: Model) -> GgufHeader:
    assert model.source is not None
    assert model.source.gguf is not None
    return model.source.gguf


def _differing(ours: GgufHeader, theirs: GgufHeader) -> list[str]:
    """`llama.rope.freq_base 10000.0 and 500000.0` for each key that is in both, or in one of them."""
    lines = []
    for key in dict.fromkeys((*ours.keys, *theirs.keys)):
        a, b = ours.keys.get(key), theirs.keys.get(key)
        if _MAY_DIFFER.fullmatch(key) or (a is not None and b is not None and a.raw == b.raw):
            continue
        x, y = ("nothing" if one is None else fit(one.describe(), 40) for one in (a, b))
        lines.append(f"{key} {x} and {y}" if x != y else f"{key} ({x})")
    return lines


def place_warnings(origin: Model, stacked: bool) -> list[str]:
    """Warnings about keys by which llama.cpp tells layers apart by their place, where layers are moved."""
    if not stacked:
        return []
    header = header_of(origin)
    own = [key for key in header.keys if key.startswith(f"{header.architecture}.")]
    found = [key for key in own if _BY_PLACE.fullmatch(key) and header.value(key)]
    if not found:
        return []
    return [
        f"{listing(found)} of {origin.name} say what layers do by their place, and layers were moved: see that they "
        "fit the output"
    ]
