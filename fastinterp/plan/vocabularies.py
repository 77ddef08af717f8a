"""Models made to fit each other where their vocabularies differ, or some tie their embeddings, before a plan is made.

What comes out are checkpoints whose tensors have the names and shapes of the output's. Nothing is read but headers and
the small files beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinterp.checkpoint.header import MAX_HEADER, Entry
from fastinterp.checkpoint.names import listing
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.checkpoint.sidecar_files import is_tokenizer_file
from fastinterp.checkpoint.strict_json import parse_object
from fastinterp.errors import CheckpointError
from fastinterp.messages import fit
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.references import ModelRef
from fastinterp.tokenizer.embedding_rows import (
    MappedEntry,
    RowPlan,
    RowWish,
    embeddings,
    mapped,
    plan_rows,
    rows_found,
    wished_row,
)
from fastinterp.tokenizer.tied_embeddings import config_changes, is_tied, ties, vocab_size_of, with_changes

if TYPE_CHECKING:
    from fastinterp.recipe.targets import LayerCount
    from fastinterp.tokenizer.vocabulary import Vocabulary

_CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Fitted:
    """What becomes of models and of the files beside the weights.

    models      those that are merged, with the tensors that are read as theirs
    tokenizer   the output's tokenizer files by name; None: those of the origin
    template    the output's chat template; None: the one that is in those files
    rows        of the output's embeddings; None: as in the origin
    tied        whether the output has no output layer of its own; None: as the origin's configuration says
    source      whose vocabulary the output has, for people; None: the origin's as it is
    vocabulary  the folder of the model whose vocabulary the output has, if that is not the origin
    counts      stacks of which the output has other layers than its inputs
    """

    models: tuple[Checkpoint, ...]
    tokenizer: Mapping[str, bytes | Path] | None = None
    template: str | None = None
    rows: int | None = None
    tied: bool | None = None
    vocabulary: Path | None = None
    source: str | None = None
    warnings: tuple[str, ...] = ()
    counts: tuple[LayerCount, ...] = ()

    def sidecars(self, files: Mapping[str, bytes | Path]) -> dict[str, bytes | Path]:
        """The output's small files, from those of the origin.

        Raises: CheckpointError, if one that has to change is damaged.
        """
        found = dict(files)
        if self.tokenizer is not None:
            found = {n: c for n, c in found.items() if not is_tokenizer_file(n)} | dict(self.tokenizer)
        if self.template is not None:
            from fastinterp.tokenizer.chat_template import with_template

            found = with_template(found, self.template)
        if self.rows is not None or self.tied is not None or self.vocabulary is not None:
            for name in _CONFIGS:
                if name in found:
                    found[name] = self._config(name, found[name])
        if self.counts and "config.json" in found:
            found["config.json"] = self._layered(found["config.json"])
        return found

    def _layered(self, content: bytes | Path) -> bytes | Path:
        """config.json with the number of layers that the output has."""
        from fastinterp.recipe.layer_config import config_of_layers

        file = "config.json" if isinstance(content, bytes) else str(content)
        raw = content if isinstance(content, bytes) else read_regular(file, MAX_HEADER)
        new, changes = config_of_layers(parse_object(raw.lstrip(), "the model configuration", file), self.counts)
        return (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode() if changes else content

    def uncounted(self, origin: Checkpoint) -> list[str]:
        """Warnings of stacks whose layers the configuration does not count, so that it stays as it is."""
        from fastinterp.recipe.layer_config import config_of_layers

        config = _table(origin.root / "config.json")
        return [
            f"config.json does not say how many layers {count.prefix} has: there were {count.before}, the output has "
            f"{len(count.layers)}. Write it there, as the software that loads the model wants it"
            for count in self.counts
            if config and not config_of_layers(config, [count])[1]
        ]

    def _config(self, name: str, content: bytes | Path) -> bytes | Path:
        file = name if isinstance(content, bytes) else str(content)
        raw = content if isinstance(content, bytes) else read_regular(file, MAX_HEADER)
        table = parse_object(raw.lstrip(), "the model configuration", file)
        special = {} if self.vocabulary is None else _table(self.vocabulary / name)
        if name == "config.json":
            changes = config_changes(table, vocab_size=self.rows, tied=self.tied, special=special)
        else:
            changes = config_changes(table, special=special)
        return with_changes(raw, changes, file) if changes else content


def fit_models(recipe: Recipe, models: Sequence[Checkpoint], origin: Checkpoint) -> Fitted:
    """Give every model the output layer and the vocabulary that the recipe asks for, or that the others have.

    Raises: CheckpointError, if a tokenizer or configuration that has to be read is missing or damaged; ShapeError, if
    rows of embeddings cannot be moved.
    """
    known = [*models, *([] if any(m is origin for m in models) else [origin])]
    configs = [_config(m, recipe.tokenizer is not None) for m in known]
    tie = ties([m.tensors for m in models], [_says_tied(c) for c in configs[: len(models)]])
    tensors = [_fitted(m, own, tie.dropped) for m, own in zip(models, tie.aliases, strict=True)]
    for other in known[len(models) :]:  # a base that is not merged may give rows, those of its output layer too
        own = ties([other.tensors, tensors[0]], [True, False]).aliases[0]
        tensors.append(_fitted(other, own, tie.dropped))
    says_tied = _says_tied(configs[_index(known, ModelRef.of(origin.name))])
    fitted = Fitted(
        tuple(_with(m, t) for m, t in zip(models, tensors, strict=False)),
        template=_template(recipe, models),
        tied=_tied(tensors[0], origin.tensors, says_tied, configs[: len(models)]),
    )
    return fitted if recipe.tokenizer is None else _with_vocabulary(recipe, fitted, known, tensors, configs)


def _fitted(model: Checkpoint, aliases: Mapping[str, str], dropped: Sequence[str]) -> dict[str, Entry]:
    kept = {n: e for n, e in model.tensors.items() if n not in dropped}
    return kept | {n: replace(model.tensors[source], name=n) for n, source in aliases.items()}


def _with_vocabulary(
    recipe: Recipe, fitted: Fitted, known: Sequence[Checkpoint], tensors: list[dict[str, Entry]],
    configs: Sequence[Mapping[str, Any]],
) -> Fitted:  # fmt: skip
    """`fitted` with the vocabulary that the recipe asks for."""
    from fastinterp.tokenizer.files import rowless, tokenizer_files
    from fastinterp.tokenizer.vocabulary import join, read_vocabulary, rows_of

    wish, merged = recipe.tokenizer, len(fitted.models)
    assert wish is not None
    sizes = [_rows(m, t, c) for m, t, c in zip(known, tensors, configs, strict=True)]
    vocabularies = [read_vocabulary(m.name, m.root, size) for m, size in zip(known, sizes, strict=True)]
    origin = _index(known, recipe.origin)
    lead = origin if wish.model is None else _index(known, wish.model)
    others = [v for i, v in enumerate(vocabularies) if i != lead] if wish.source == "union" else []
    extra = [
        (t.text, vocabularies[_index(known, t.source.model)] if t.source and t.source.model else None)
        for t in wish.tokens
    ]
    joined = join(vocabularies[lead], others, extra)
    size = rows_of(joined, sizes[lead], wish.pad_to_multiple_of)
    plan = plan_rows(
        joined, vocabularies, merged, size, base=_base(recipe, origin),
        wishes=_wishes(recipe, known, vocabularies), keep_padding=wish.pad_to_multiple_of is None,
    )  # fmt: skip
    files, warnings = tokenizer_files(joined)
    beside = [v for i, v in enumerate(vocabularies) if i != lead]
    warnings = [*rowless(joined, beside, wish.source == "union"), *warnings]
    if plan.zeros:
        warnings.append(
            f"no model has a row for {len(plan.zeros)} tokens, {listing(plan.zeros)}: their embeddings are zeros. Say "
            "where from: `tokenizer: {tokens: ...}`"
        )
    _moved(plan, tensors, known, sizes)
    return replace(
        fitted,
        models=tuple(_with(m, t) for m, t in zip(fitted.models, tensors, strict=False)),
        tokenizer=files,
        rows=None if size == sizes[origin] else size,
        source=f"{'union, with the ids of ' if wish.source == 'union' else 'that of '}{known[lead].name}, {size} rows",
        vocabulary=None if lead == origin else known[lead].root,
        warnings=tuple(warnings),
    )


def _moved(plan: RowPlan, tensors: list[dict[str, Entry]], known: Sequence[Checkpoint], sizes: Sequence[int]) -> None:
    """Replace the embeddings of the models that are merged by their mapped ones."""
    names = [m.name for m in known]
    found = [set(embeddings(t, size)) for t, size in zip(tensors, sizes, strict=True)]
    places = [
        {n: (m.files[e.file] if m.files else m.root, e) for n, e in t.items()}
        for m, t in zip(known, tensors, strict=True)
    ]
    for i in range(len(plan.maps)):
        for name in found[i]:
            sources = [p[name] if name in own else None for p, own in zip(places, found, strict=True)]
            tensors[i][name] = entry = mapped(name, i, plan, sources, names)
            if isinstance(entry, MappedEntry) and (made := [names[k] for k in entry.models if not known[k].files]):
                raise CheckpointError(
                    f"rows of {listing(made)}, which a document above makes, would have to be moved into another "
                    "vocabulary here. Ask for the vocabulary there, or write it as a checkpoint of its own first",
                    tensor=name,
                )


def _wishes(recipe: Recipe, known: Sequence[Checkpoint], models: Sequence[Vocabulary]) -> dict[str, RowWish]:
    found: dict[str, RowWish] = {}
    missing = []
    for token in recipe.tokenizer.tokens if recipe.tokenizer else ():
        source = token.source
        if source is None:
            continue
        if source.model is None:
            found[token.text] = RowWish(None, force=token.force)
            continue
        model = _index(known, source.model)
        which = source.token_id if source.token_id is not None else source.token or token.text
        try:
            found[token.text] = RowWish(model, wished_row(models, model, which, token.text), token.force)
        except CheckpointError as error:
            missing.append(str(error))
    if missing:
        raise CheckpointError("; ".join(missing))
    return found


def _base(recipe: Recipe, origin: int) -> int | None:
    """Index of the base model among those known, or None: methods without a base may name one for its rows."""
    value = recipe.document.value
    named = isinstance(value, dict) and value.get("base_model") is not None
    return recipe.base if recipe.base is not None else origin if named else None


def _index(known: Sequence[Checkpoint], model: ModelRef) -> int:
    return [ModelRef.of(checkpoint.name) for checkpoint in known].index(model)


def _rows(model: Checkpoint, tensors: Mapping[str, Entry], config: Mapping[str, Any]) -> int:
    """Rows of a model's embeddings: as its configuration says, if there are such, else as the input embedding has."""
    size = vocab_size_of(config, str(model.root / "config.json"))
    if size is None or not embeddings(tensors, size):
        size = rows_found(tensors)
    if size is None:
        raise CheckpointError(
            f"{model.name} has no embedding that is known by its name, so no rows can follow a vocabulary. Leave "
            "`tokenizer` and `tokenizer_source` out of the recipe"
        )
    return size


def _template(recipe: Recipe, models: Sequence[Checkpoint]) -> str | None:
    wish = recipe.chat_template
    if wish is None:
        return None
    from fastinterp.tokenizer.chat_template import BUILTIN, most_common, template_of

    if wish.kind == "auto":
        return most_common([template_of(m.root) for m in models])
    return BUILTIN[wish.text] if wish.kind == "named" else wish.text


def _tied(
    out: Mapping[str, Entry], origin: Mapping[str, Entry], says_tied: bool, configs: Sequence[Mapping[str, Any]]
) -> bool | None:
    """What the output's configuration has to say instead of what the origin's says, or None."""
    if is_tied(out) != is_tied(origin):
        return is_tied(out)
    # A configuration that says tied makes software ignore the output layer that is stored.
    return False if says_tied and not is_tied(out) and not all(map(_says_tied, configs)) else None


def _says_tied(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config")
    return config.get("tie_word_embeddings") is True or (
        isinstance(text, Mapping) and text.get("tie_word_embeddings") is True
    )


def _config(model: Checkpoint, needed: bool) -> dict[str, Any]:
    """config.json, or {} if there is none; also if it is damaged and not needed, of which others warn."""
    try:
        return _table(model.root / "config.json")
    except CheckpointError:
        if needed:
            raise
        return {}


def _table(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no such file."""
    if not path.is_file():
        return {}
    return parse_object(read_regular(str(path), MAX_HEADER).lstrip(), f"`{fit(path.name, 40)}`", str(path))


def _with(model: Checkpoint, tensors: Mapping[str, Entry]) -> Checkpoint:
    """`model` itself, if these are its tensors; so that it is still known as the same."""
    return model if tensors == model.tensors else replace(model, tensors=dict(tensors))
