"""`truncate_embeddings: true`: tensors with a row per token are cut to the rows that all models have.

A row counts as the same token in all models, whatever it is: right where the larger models only have padding, or
tokens of their own, behind the vocabulary that all share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from fastinterp.checkpoint.names import listing
from fastinterp.checkpoint.sidecar_files import json_or_empty
from fastinterp.errors import CheckpointError, ShapeError
from fastinterp.messages import counted, listed
from fastinterp.plan.encoded_rows import rows_of
from fastinterp.plan.inputs import TensorInput
from fastinterp.plan.models import Model
from fastinterp.tokenizer.embedding_rows import embedding_row_count, embeddings

_LISTED = 5  # tensors, or tokens, in a warning before the rest is only counted


class Truncated(msgspec.Struct, frozen=True):
    """The models' tensors, cut.

    rows      of the input embedding that is left; None: nothing was cut
    """

    tensors: tuple[Mapping[str, TensorInput], ...]
    rows: int | None = None
    warnings: tuple[str, ...] = ()


def truncate(
    models: Sequence[Model], tensors: Sequence[Mapping[str, TensorInput]], sizes: Sequence[int | None], origin: Model
) -> Truncated:
    """Cut the tensors with a row per token, each to the fewest rows that a model has of it.

    models   those that are merged, and their aligned tensors
    sizes    of each the rows that its configuration says its embeddings have; None: as the input embedding has
    origin   the model whose tokenizer and configuration the output has

    A tensor is one with a row per token if it is one of `embedding_rows.embeddings` in any of the models.
    Raises: ShapeError, if it differs in other dimensions, too; CheckpointError, if it cannot be cut.
    """
    names = dict.fromkeys(name for t, size in zip(tensors, sizes, strict=True) for name in embeddings(t, size))
    cut = [dict(t) for t in tensors]
    said = []
    for name in names:
        having = [i for i, t in enumerate(tensors) if name in t]
        shapes = [tensors[i][name].shape for i in having]
        rows = min(shape[0] if shape else 0 for shape in shapes)
        if all(shape[:1] == (rows,) for shape in shapes):
            continue
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise ShapeError(
                f"{name} is {_each(models, having, [str(list(s)) for s in shapes])}: `truncate_embeddings` cuts rows, "
                "but the rows are of different lengths. These are models of different sizes, which do not merge",
                tensor=name,
            )
        for i in having:
            cut[i][name] = _first_rows(name, tensors[i][name], rows, models[i])
        said.append(f"{name} to {rows} ({_each(models, having, [str(shape[0]) for shape in shapes])})")
    if not said:
        return Truncated(tuple(tensors))
    left = min(filter(None, map(embedding_row_count, cut)), default=None)
    warnings = [
        f"rows cut by `truncate_embeddings`: {listed(said, _LISTED)}. This is right only if a row is of the same token "
        "in all models; `tokenizer_source: base` matches rows by token",
        *(_rowless(origin, left) if left is not None else ()),
    ]
    return Truncated(tuple(cut), left, tuple(warnings))


def _each(models: Sequence[Model], having: Sequence[int], what: Sequence[str]) -> str:
    """`10 in large, 8 in small`."""
    return listed([f"{text} in {models[i].name}" for i, text in zip(having, what, strict=True)], _LISTED)


def _first_rows(name: str, tensor: TensorInput, rows: int, model: Model) -> TensorInput:
    """The first rows of a tensor: read where they are stored."""
    stored = tensor.stored_rows
    if tensor.shape[0] == rows:
        first: TensorInput | None = tensor
    elif stored is not None and stored.decoded:  # its scales are cut, too
        first = rows_of(stored, 0, rows)
    else:
        first = tensor.first_rows(rows)
    if first is None:
        why = "a document above makes it" if model.checkpoint is None else "it is not stored as rows of numbers"
        raise CheckpointError(
            f"{name} of {model.name} cannot be cut to {rows} rows: {why}. Write that model as a checkpoint of its own "
            "first",
            tensor=name,
        )
    return first


def _rowless(origin: Model, rows: int) -> list[str]:
    """Warnings of tokens that the output's tokenizer and configuration name, and that have no row."""
    from fastinterp.tokenizer.vocabulary import read_vocabulary

    warnings = []
    try:
        tokens = read_vocabulary(origin.name, origin.root, rows).stripped
    except CheckpointError:  # there is none, or it is in another format
        tokens = ()
    if tokens:
        warnings.append(
            f"the tokenizer of {origin.name} has {counted(len(tokens), 'token')} without a row in the output, "
            f"{listing(tokens)}: software fails on text with them"
        )
    for file in ("config.json", "generation_config.json"):
        ids = {
            key: value
            for key, value in json_or_empty(origin.root / file).items()
            if key.endswith("_token_id") and any(type(i) is int and i >= rows for i in _numbers(value))
        }
        if ids:
            pairs = listed([f"{key}: {value}" for key, value in ids.items()], _LISTED)
            warnings.append(f"{file} of {origin.name} names tokens without a row in the output: {pairs}")
    return warnings


def _numbers(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else [value]
