"""The weights files of a plan's outputs: names, shards, and the metadata in their headers, the receipt among it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastinterp._version import __version__
from fastinterp.checkpoint.checksum import KEY as CHECKSUM
from fastinterp.checkpoint.checksum import UNKNOWN
from fastinterp.checkpoint.formats.encoded import start_of
from fastinterp.checkpoint.formats.said import METADATA, layers_of
from fastinterp.checkpoint.names import GGUF, listing
from fastinterp.checkpoint.open import Component
from fastinterp.errors import UsageError
from fastinterp.messages import listed
from fastinterp.ops.combine import NUMERICS, Combine
from fastinterp.output.layout import Layout, joined, make_layout
from fastinterp.output.stems import MODEL, stem_of
from fastinterp.plan.models import Model, is_gguf
from fastinterp.plan.planned import PlannedTensor
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.renaming import ShownNames

SHARD_BYTES = 5 * 10**9  # of tensor data in one file, where the origin has several
_MOST_BYTES = 64 << 10  # of coefficients in a receipt, which is in every file
RECEIPT_KEY = "fastinterp"  # in the metadata of headers
# Entries of the header that are not true of other weights: hashes of the data, the format of quantised weights.
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_QUANTISED = (METADATA, "quantization_format")
_SHOWN = 5  # names in a remark, before the rest is only counted


class Outputs:
    """Lays out the weights of one or several outputs of a plan.

    origin    the model whose file names, number of files and header metadata the outputs have
    models    all models that are merged
    tensors   of every output, in its order
    stacked   an output may have other layers than the origin, or in another order
    remarks   which entries of the header metadata differ or are left out
    """

    def __init__(
        self, origin: Model, models: Sequence[Model], tensors: Sequence[PlannedTensor], stacked: bool = False
    ):  # fmt: skip
        self._tensors, self._origin, self._stacked = tensors, origin, stacked
        self._parts: dict[str, Component] = {}
        for model in (origin, *models):
            for part in model.source.parts if model.source is not None else ():
                self._parts.setdefault(part.folder, part)
        quantised = any(i.quantised for t in tensors for i in t.inputs) or any(t.encoding for t in tensors)
        self._untrue = {RECEIPT_KEY, CHECKSUM, *_HASHES, *(() if quantised else _QUANTISED)}
        if is_gguf(origin):
            from fastinterp.output.gguf_layout import left_out

            self._untrue.update(key for part in self._parts.values() for key in left_out(part.checkpoint.metadata))
        self.remarks = (*self._differing(origin, models), *self._left_out())

    def layout(self, metadata: dict[str, str], max_shard_size: int | None, one_file: str) -> Layout:
        """metadata: of this output alone; the origin's goes before it.

        max_shard_size  None: one file where the origin has one, else shards of 5 GB
        one_file        how its name ends, if the output is one file; empty: it is a folder
        Raises: OutputError, as make_layout does; UsageError, if it cannot be one file.
        """
        if one_file == GGUF or is_gguf(self._origin):
            from fastinterp.plan import gguf_output

            gguf_output.refuse_ending(one_file, self._origin)
            return gguf_output.layout(self._origin, self._tensors, metadata[RECEIPT_KEY], max_shard_size, self._stacked)
        groups: dict[str, list[PlannedTensor]] = {}
        for t in self._tensors:
            groups.setdefault(self._folder(t.name), []).append(t)
        if one_file and len(groups) > 1:
            raise UsageError(
                f"the output has {len(groups)} components, {listing(groups)}, each with files of its own, but one file "
                "was named. Name a folder"
            )
        layouts = []
        for folder, tensors in groups.items():
            part = self._parts.get(folder)
            limit = max_shard_size
            if limit is None:
                limit = SHARD_BYTES if part is not None and len(part.checkpoint.files) > 1 and not one_file else 1 << 62
            carried = {} if part is None else self._carried(part)
            whole = {"format": "pt", **carried, **metadata, CHECKSUM: UNKNOWN}
            stem = MODEL if part is None else stem_of(part.checkpoint)
            beside = {name: t.entries[0][0] for t in tensors for name, _, _ in t.entries[1:]}
            shapes = [entry for t in tensors for entry in t.entries]
            layouts.append(make_layout(shapes, whole, limit, stem, folder, beside))
        layout = joined(layouts)
        if one_file and len(layout.files) > 1:
            raise UsageError(
                f"the output is one file, but --max-shard-size {max_shard_size} makes {len(layout.files)} of it. "
                "Leave that out, or name a folder"
            )
        return layout

    def _folder(self, tensor: str) -> str:
        """The folder of the component that a tensor belongs to."""
        if len(self._parts) == 1 and "" in self._parts:
            return ""
        return max((p.folder for p in self._parts.values() if tensor.startswith(p.prefix)), key=len, default="")

    def _carried(self, part: Component) -> dict[str, str]:
        carried = {k: v for k, v in part.checkpoint.metadata.items() if k not in self._untrue and _is_text(k + v)}
        if self._stacked and (described := layers_of(part)) and METADATA in carried:
            carried[METADATA] = json.dumps({**json.loads(carried[METADATA]), "layers": self._layers(part, described)})
        return carried

    def _layers(self, part: Component, described: Mapping[str, Any]) -> dict[str, Any]:
        """What ComfyUI's metadata says of the layers of the origin, by the names of modules in the output."""
        layers = {}
        for t in self._tensors:
            form = t.inputs[0] if t.form is None else t.form.form
            own, module = (start_of(name)[len(part.prefix) :].rstrip(".") for name in (form.name, t.name))
            if own in described and t.name.startswith(part.prefix):
                layers[module] = described[own]
        return layers

    def _left_out(self) -> list[str]:
        names = dict.fromkeys(
            key
            for part in self._parts.values()
            for key, value in part.checkpoint.metadata.items()
            if key not in (RECEIPT_KEY, CHECKSUM) and (key in self._untrue or not _is_text(key + value))
        )
        what = "header metadata that is left out, since it would not be true of the output"
        return [f"{what}: {listed(names, len(_HASHES + _QUANTISED))}"] if names else []

    def _differing(self, origin: Model, models: Sequence[Model]) -> list[str]:
        """Entries of the header that another model has otherwise, or alone."""
        remarks = []
        for model in models:
            if model.source is None or model.source is origin.source:
                continue
            differing: set[str] = set()
            alone: set[str] = set()
            for part in model.source.parts:
                ours = self._parts[part.folder].checkpoint.metadata
                for key, value in part.checkpoint.metadata.items():
                    if key not in self._untrue and ours.get(key) != value:
                        (differing if key in ours else alone).add(part.prefix + key)
            told = [f"differ from those of {origin.name}: {listed(sorted(differing), _SHOWN)}"] if differing else []
            told += [f"are in no header of {origin.name}: {listed(sorted(alone), _SHOWN)}"] if alone else []
            if told:
                remarks.append(
                    f"the output has the header metadata of {origin.name}; entries of {model.name} "
                    f"{'; others '.join(told)}"
                )
        return remarks


def _is_text(text: str) -> bool:
    """Whether it can be stored: JSON has escapes for what is no Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def commits_of(models: Iterable[Model]) -> dict[str, str]:
    """The commits of the models, and adapters on them, that come from the Hub, by their names."""
    every = [c for m in models if m.checkpoint is not None for c in (m.checkpoint, *m.checkpoint.adapters)]
    return {c.snapshot.name: c.snapshot.commit for c in every if c.snapshot is not None}


def receipt(
    recipe: Recipe,
    k: int,
    tensors: Sequence[PlannedTensor],
    models: Sequence[str],
    names: ShownNames,
    max_shard_size: int | None = None,
    commits: Mapping[str, str] = {},
) -> dict[str, str]:
    """The receipt that is stored in every output file: the recipe, and the coefficients that were used.

    `recipe` as it was given, with the merge's own `dtype`, `rounding`, `seed`, `missing`, `channels`, `quantize` and
    `max_shard_size`, makes the same bytes again. Models are stored as the user named them, absolute paths by their last
    parts. Time, output folder and threads are not, so that the same merge of the same names gives the same bytes
    everywhere.

    commits  of models from the Hub, by their names
    """
    stored = recipe.out_dtype or recipe.dtype
    content = {
        "fastinterp": __version__,
        "numerics": NUMERICS,
        "method": recipe.method.name,
        "models": [names.model(model) for model in models],
        "coefficients": _coefficients(k, tensors),
        "dtype": None if stored is None else stored.name,
        "rounding": recipe.rounding,
        "seed": recipe.seed,
        "fp8_overflow": recipe.fp8_overflow,
        "recipe": names.recipe(recipe.text),
    }
    content |= {"commits": dict(sorted(commits.items()))} if commits else {}
    content |= {"private": True} if recipe.private else {}
    content |= {} if recipe.name is None else {"document": recipe.name}
    content |= {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    content |= {} if recipe.missing == "error" else {"missing": recipe.missing}
    content |= {} if recipe.channels == "same" else {"channels": recipe.channels}
    content |= {"truncate_embeddings": True} if recipe.truncate_embeddings else {}
    content |= {} if recipe.quantize == "none" else {"quantize": recipe.quantize}
    return {RECEIPT_KEY: json.dumps(content, separators=(",", ":"))}


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
