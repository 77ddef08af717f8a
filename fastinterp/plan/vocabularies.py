"""Alignment of models whose vocabularies differ, or of which some tie their embeddings, before a plan is made.

The results are models whose tensors have the names and shapes of the output's. Read are headers, the small files beside
them, and tensors that may be copies of each other (tensor_sets.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from fastinterp.checkpoint.header import MAX_HEADER
from fastinterp.checkpoint.names import listing
from fastinterp.checkpoint.quantisation_config import HF_QUANT_CONFIG, MISTRAL_CONFIG, without_quantisation
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.checkpoint.sidecar_files import CONFIG, is_tokenizer_file, read_config
from fastinterp.checkpoint.strict_json import parse_object
from fastinterp.errors import CheckpointError, ShapeError, UnreadableError
from fastinterp.messages import counted, fit
from fastinterp.plan.inputs import GatheredInput, TensorInput
from fastinterp.plan.models import Model
from fastinterp.plan.tensor_sets import NamedTensors, align_sets
from fastinterp.presence import is_file
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.references import ModelRef
from fastinterp.tokenizer.embedding_rows import (
    RowPlan,
    RowSource,
    embedding_row_count,
    embeddings,
    plan_rows,
    row_of,
)
from fastinterp.tokenizer.tied_embeddings import config_changes, vocab_size_of, with_changes

if TYPE_CHECKING:
    from fastinterp.recipe.targets import LayerCount
    from fastinterp.tokenizer.vocabulary import Vocabulary

_CONFIGS = (CONFIG, "generation_config.json")


class AlignedModels(msgspec.Struct, frozen=True):
    """Models with the names and shapes of the output, and what the files beside the weights have to say.

    models      those that are merged, with the tensors that are read as theirs
    tokenizer   the output's tokenizer files by name; None: those of the origin
    template    the output's chat template; None: the one that is in those files
    rows        of the output's embeddings; None: as in the origin
    tied        whether the output has no output layer of its own; None: as the origin's configuration says
    source      whose vocabulary the output has, for people; None: the origin's as it is
    vocabulary  the folder of the model whose vocabulary the output has, if that is not the origin
    remarks     what was done to make the models fit each other, for people: nothing to worry about
    channels    of the origin's first convolution and of the output's, where they differ
    copied      names of tensors of which one model's are taken as they are, and which
    notes       by model: why a tensor that it lacks was not made from others
    layouts     by model: which tensors have another layout than the base's, and what to do
    counts      stacks of which the output has other layers than its inputs
    about_config  remarks on what becomes of config.json
    numbers     folders whose configuration says that weights are quantised, where the output has none that are
    """

    models: tuple[Model, ...]
    tokenizer: Mapping[str, bytes | Path] | None = None
    template: str | None = None
    rows: int | None = None
    tied: bool | None = None
    vocabulary: Path | None = None
    source: str | None = None
    warnings: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    copied: Mapping[str, int] = {}
    channels: tuple[int, int] | None = None
    notes: Mapping[int, str] = {}
    layouts: Mapping[int, str] = {}
    counts: tuple[LayerCount, ...] = ()
    numbers: tuple[str, ...] = ()
    about_config: tuple[str, ...] = ()

    def sidecars(self, files: Mapping[str, bytes | Path]) -> dict[str, bytes | Path]:
        """The output's small files, from those of the origin.

        Raises: CheckpointError, if one that has to change is damaged.
        """
        changed = dict(files)
        if self.tokenizer is not None:
            changed = {n: c for n, c in changed.items() if not is_tokenizer_file(n)} | dict(self.tokenizer)
        if self.template is not None:
            from fastinterp.tokenizer.chat_template import with_template

            changed = with_template(changed, self.template)
        if self.rows is not None or self.tied is not None or self.vocabulary is not None:
            for name in _CONFIGS:
                if name in changed:
                    changed[name] = self._config(name, changed[name])
        if self.channels is not None and CONFIG in changed:
            changed[CONFIG] = self._widened(changed[CONFIG], *self.channels)
        if self.counts and CONFIG in changed:
            from fastinterp.plan.stacks import layered_config, layered_quantisation

            changed[CONFIG] = layered_config(changed[CONFIG], self.counts, self.models)
            if HF_QUANT_CONFIG in changed:
                changed[HF_QUANT_CONFIG] = layered_quantisation(changed[HF_QUANT_CONFIG], self.counts)
        for folder in self.numbers:
            start = f"{folder}/" if folder else ""
            changed.pop(start + HF_QUANT_CONFIG, None)
            for name in (start + CONFIG, start + MISTRAL_CONFIG):
                if name in changed:
                    changed[name] = self._unquantised(name, changed[name])
        return changed

    def _unquantised(self, name: str, content: bytes | Path) -> bytes | Path:
        """A configuration without what it says of quantised weights."""
        file = name if isinstance(content, bytes) else str(content)
        raw = content if isinstance(content, bytes) else read_regular(file, MAX_HEADER)
        config = parse_object(raw.lstrip(), "the model configuration", file)
        new = without_quantisation(config)
        return content if new == config else (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode()

    def _widened(self, content: bytes | Path, before: int, after: int) -> bytes | Path:
        """config.json with the number of input channels that the output has."""
        file = CONFIG if isinstance(content, bytes) else str(content)
        raw = content if isinstance(content, bytes) else read_regular(file, MAX_HEADER)
        table = parse_object(raw.lstrip(), "the model configuration", file)
        return with_changes(raw, {"in_channels": after}, file) if table.get("in_channels") == before else content

    def _config(self, name: str, content: bytes | Path) -> bytes | Path:
        file = name if isinstance(content, bytes) else str(content)
        raw = content if isinstance(content, bytes) else read_regular(file, MAX_HEADER)
        table = parse_object(raw.lstrip(), "the model configuration", file)
        special = {} if self.vocabulary is None else _table(self.vocabulary / name)
        if name == CONFIG:
            changes = config_changes(table, vocab_size=self.rows, tied=self.tied, special=special)
        else:
            changes = config_changes(table, special=special)
        return with_changes(raw, changes, file) if changes else content


def align_models(recipe: Recipe, models: Sequence[Model], origin: Model) -> AlignedModels:
    """Give every model the names, the output layer and the vocabulary that the recipe names, or that the others have.

    Raises: CheckpointError, if a tokenizer or configuration that has to be read is missing or damaged; ShapeError, if
    rows of embeddings cannot be moved.
    """
    known = [*models, *([] if any(m is origin for m in models) else [origin])]
    configs = [_config(m, recipe.tokenizer is not None) for m in known]
    sets = align_sets(
        [NamedTensors(m.name, m.tensors, config) for m, config in zip(known, configs, strict=True)],
        len(models), recipe.base_index, _index(known, ModelRef.of(origin.name)),
        stacked=any(section.stacked for section in recipe.sections), first_channels=recipe.channels == "first",
        integers=None if recipe.integers is None or recipe.sections[0].name else recipe.models.index(recipe.integers),
    )  # fmt: skip
    aligned = AlignedModels(
        tuple(_with(m, t) for m, t in zip(models, sets.tensors, strict=False)),
        template=_template(recipe, models),
        tied=sets.tied,
        warnings=sets.warnings,
        remarks=sets.remarks,
        copied=sets.copied,
        channels=sets.channels,
        notes=sets.notes,
        layouts=sets.layouts,
    )
    if recipe.tokenizer is None:
        return _truncated(aligned, origin, configs) if recipe.truncate_embeddings else aligned
    if recipe.truncate_embeddings:
        ignored = (
            "`truncate_embeddings` does nothing beside `tokenizer_source` or `tokenizer`: rows are matched by token"
        )
        aligned = replace(aligned, warnings=(*aligned.warnings, ignored))
    return _with_vocabulary(recipe, aligned, known, [dict(t) for t in sets.tensors], configs)


def _truncated(aligned: AlignedModels, origin: Model, configs: Sequence[Mapping[str, Any]]) -> AlignedModels:
    """The aligned models, with as many rows in their embeddings as the smallest of them has."""
    from fastinterp.plan.truncation import truncate

    tensors = [m.tensors for m in aligned.models]
    sizes = [_known_rows(m, m.tensors, c) for m, c in zip(aligned.models, configs, strict=False)]
    cut = truncate(aligned.models, tensors, sizes, origin)
    models = tuple(_with(m, t) for m, t in zip(aligned.models, cut.tensors, strict=True))
    return replace(aligned, models=models, rows=cut.rows, warnings=(*aligned.warnings, *cut.warnings))


def _with_vocabulary(
    recipe: Recipe, aligned: AlignedModels, known: Sequence[Model], tensors: list[dict[str, TensorInput]],
    configs: Sequence[Mapping[str, Any]],
) -> AlignedModels:  # fmt: skip
    """The aligned models, with the vocabulary that the recipe names."""
    from fastinterp.tokenizer.files import rowless, tokenizer_files
    from fastinterp.tokenizer.vocabulary import join, read_vocabulary, rows_of

    spec, merged = recipe.tokenizer, len(aligned.models)
    assert spec is not None
    sizes = [_rows(m, t, c) for m, t, c in zip(known, tensors, configs, strict=True)]
    vocabularies = [read_vocabulary(m.name, m.root, size) for m, size in zip(known, sizes, strict=True)]
    origin = _index(known, recipe.origin)
    lead = origin if spec.model is None else _index(known, spec.model)
    others = [v for i, v in enumerate(vocabularies) if i != lead] if spec.source == "union" else []
    extra = [
        (t.text, vocabularies[_index(known, t.source.model)] if t.source and t.source.model else None)
        for t in spec.tokens
    ]
    joined = join(vocabularies[lead], others, extra)
    size = rows_of(joined, sizes[lead], spec.pad_to_multiple_of)
    plan = plan_rows(
        joined, vocabularies, merged, size, base=_base(recipe, origin),
        chosen=_chosen_rows(recipe, known, vocabularies), keep_padding=spec.pad_to_multiple_of is None,
    )  # fmt: skip
    files, warnings = tokenizer_files(joined)
    beside = [v for i, v in enumerate(vocabularies) if i != lead]
    warnings = [*rowless(joined, beside, spec.source == "union"), *warnings]
    if plan.zeros:
        warnings.append(
            f"no model has a row for {counted(len(plan.zeros), 'token')}, {listing(plan.zeros)}: zeros instead. Say "
            "where from: `tokenizer: {tokens: ...}`"
        )
    _moved(plan, tensors, known, sizes)
    return replace(
        aligned,
        models=tuple(_with(m, t) for m, t in zip(aligned.models, tensors, strict=False)),
        tokenizer=files,
        rows=None if size == sizes[origin] else size,
        source=f"{'union, with the ids of ' if spec.source == 'union' else 'that of '}{known[lead].name}, {size} rows",
        vocabulary=None if lead == origin else known[lead].root,
        warnings=(*aligned.warnings, *warnings),
    )


def _moved(plan: RowPlan, tensors: list[dict[str, TensorInput]], known: Sequence[Model], sizes: Sequence[int]) -> None:
    """Replace the embeddings of the models that are merged by those in the output's vocabulary."""
    embedded = [set(embeddings(t, size)) for t, size in zip(tensors, sizes, strict=True)]
    before = [dict(t) for t in tensors]
    for i in range(len(plan.maps)):
        for name in embedded[i]:
            sources = [t[name] if name in names else None for t, names in zip(before, embedded, strict=True)]
            tensors[i][name] = _gathered(name, i, plan, sources, known)


def _gathered(
    name: str, model: int, plan: RowPlan, sources: Sequence[TensorInput | None], models: Sequence[Model]
) -> TensorInput:
    """The embedding of one model in the output's vocabulary; as it is, if nothing changes.

    sources  of each model, its tensor of this name, or None
    Raises: ShapeError, if rows cannot be moved: they are of different lengths, or not of floats; CheckpointError, if
    they are not stored as rows.
    """
    tensor, rows = sources[model], plan.maps[model]
    assert tensor is not None
    if rows.is_own(model, tensor.shape[0]):
        return tensor
    if not tensor.merges:
        raise ShapeError(
            f"{name} of {models[model].name} is {tensor.dtype}, whose rows cannot follow another vocabulary. Convert "
            "it to BF16 first, or leave `tokenizer` out of the recipe",
            tensor=name,
        )
    shape, nbytes = (plan.size, *tensor.shape[1:]), tensor.nbytes // tensor.shape[0] * plan.size
    if not nbytes:
        return replace(tensor, shape=shape, nbytes=0)
    stored = tuple(None if source is None else source.stored_rows for source in sources)
    kept = tensor.kept_dtype if tensor.decoded else None
    nbytes = nbytes if kept is None else (tensor.dtype.nbytes(tensor.numel) or 0) // tensor.shape[0] * plan.size
    gathered = GatheredInput(name, tensor.dtype, shape, nbytes, model, rows, plan.means, stored, kept)
    for i in gathered.models:
        source = sources[i]
        if source is None or source.shape[1:] != tensor.shape[1:] or not source.merges:
            raise ShapeError(
                f"{name} of {models[model].name} needs rows of {models[i].name}, where it is "
                f"{'missing' if source is None else source.describe()}; here it is {tensor.describe()}. Only models of "
                "one architecture share embeddings",
                tensor=name,
            )
    unreadable = [i for i in gathered.models if stored[i] is None]
    above = [models[i].name for i in unreadable if models[i].checkpoint is None]
    if above:
        raise CheckpointError(
            f"rows of {listing(above)}, which a document above makes, would have to be moved into another vocabulary "
            "here. Ask for the vocabulary there, or write it as a checkpoint of its model first",
            tensor=name,
        )
    adapted = [models[i].name for i in unreadable if (one := sources[i]) is not None and one.adapted]
    if adapted:
        raise CheckpointError(
            f"an adapter changes {name} of {listing(adapted)}: its rows cannot be moved into another vocabulary. Merge "
            "the adapter into its model first, by `merge_method: passthrough` of it alone, or leave `tokenizer` out of "
            "the recipe",
            tensor=name,
        )
    if unreadable:
        raise CheckpointError(
            f"{name} of {listing([models[i].name for i in unreadable])} is not stored as rows: they cannot be moved "
            "into another vocabulary. Convert it to BF16 first, or leave `tokenizer` out of the recipe",
            tensor=name,
        )
    return gathered


def _chosen_rows(recipe: Recipe, known: Sequence[Model], models: Sequence[Vocabulary]) -> dict[str, RowSource]:
    """The rows of tokens that the recipe names, by token."""
    chosen: dict[str, RowSource] = {}
    errors = []
    for token in recipe.tokenizer.tokens if recipe.tokenizer else ():
        source = token.source
        if source is None:
            continue
        if source.model is None:
            chosen[token.text] = RowSource(None, force=token.force)
            continue
        model = _index(known, source.model)
        which = source.token_id if source.token_id is not None else source.token or token.text
        try:
            chosen[token.text] = RowSource(model, row_of(models, model, which, token.text), token.force)
        except CheckpointError as error:
            errors.append(str(error))
    if errors:
        raise CheckpointError("; ".join(errors))
    return chosen


def _base(recipe: Recipe, origin: int) -> int | None:
    """Index of the base model among those known, or None: methods without a base may name one for its rows."""
    value = recipe.document.value
    named = isinstance(value, dict) and value.get("base_model") is not None
    return recipe.base if recipe.base is not None else origin if named else None


def _index(known: Sequence[Model], model: ModelRef) -> int:
    return [ModelRef.of(checkpoint.name) for checkpoint in known].index(model)


def _rows(model: Model, tensors: Mapping[str, TensorInput], config: Mapping[str, Any]) -> int:
    """As `_known_rows`. Raises: CheckpointError, if they are not known."""
    size = _known_rows(model, tensors, config)
    if size is None:
        raise CheckpointError(
            f"{model.name} has no embedding that is known by its name, so no rows can follow a vocabulary. Leave "
            "`tokenizer` and `tokenizer_source` out of the recipe"
        )
    return size


def _known_rows(model: Model, tensors: Mapping[str, TensorInput], config: Mapping[str, Any]) -> int | None:
    """Rows of a model's embeddings: as its configuration says, if there are such, else as the input embedding has."""
    size = vocab_size_of(config, str(model.root / CONFIG))
    return embedding_row_count(tensors) if size is None or not embeddings(tensors, size) else size


def _template(recipe: Recipe, models: Sequence[Model]) -> str | None:
    """The chat template that the recipe names; None: that of the tokenizer files."""
    spec = recipe.chat_template
    if spec is None:
        return None
    from fastinterp.tokenizer.chat_template import BUILTIN, most_common, template_of

    if spec.kind == "auto":
        return most_common([template_of(m.root) for m in models])
    return BUILTIN[spec.text] if spec.kind == "named" else spec.text


def _config(model: Model, needed: bool) -> dict[str, Any]:
    """config.json, or {} if there is none; also if it is damaged and not needed, of which others warn."""
    try:
        return read_config(model.root) or {}
    except UnreadableError:
        raise
    except CheckpointError:
        if needed:
            raise
        return {}


def _table(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no such file."""
    if not is_file(path):
        return {}
    return parse_object(read_regular(str(path), MAX_HEADER).lstrip(), f"`{fit(path.name, 40)}`", str(path))


def _with(model: Model, tensors: Mapping[str, TensorInput]) -> Model:
    """`model` itself, if these are its tensors; so that it is still known as the same."""
    return model if tensors == model.tensors else replace(model, tensors=dict(tensors))
