"""Tied embeddings: an output layer without weights of its own is the input embedding. Found from names alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from fastinterp.checkpoint.strict_json import parse_object
from fastinterp.errors import CheckpointError

# The last part but one of a name, in the order in which they are looked for. `output` counts as `output.weight` only.
_OUT = ("lm_head", "embed_out", "output")
_IN = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared")
_TEXT = ("text_config", "llm_config", "language_config")  # where models of several parts describe their language model


class Ties(msgspec.Struct, frozen=True):
    """Output layers of models that are tied, where others are not.

    aliases  per model: tensors that it does not have, and what to read instead
    dropped  output layers that some models store though they are tied, and others do not: the output has none
    """

    aliases: tuple[Mapping[str, str], ...]
    dropped: tuple[str, ...]


def ties(models: Sequence[Iterable[str]], says_tied: Sequence[bool]) -> Ties:
    """Which tensors stand for absent output layers.

    models     the names of each model's tensors
    says_tied  whether its config.json sets `tie_word_embeddings`

    The output is untied if any input is: a model without the output layer that an untied one has gives its input
    embedding for it. An output layer that all store is merged as it is. One that only tied models store, and not all of
    them, is dropped. With several input embeddings the one is taken whose name starts most like the output layer's.
    """
    names = [list(m) for m in models]
    heads = [n for n in dict.fromkeys(n for m in names for n in m) if _is_head(n)]
    everywhere = {h for h in heads if all(h in m for m in names)}
    untied = {h for h in heads if any(h in m and not tied for m, tied in zip(names, says_tied, strict=True))}
    aliases: list[dict[str, str]] = []
    for model in names:
        inputs = [n for kind in _IN for n in model if _module(n) == kind and n.endswith(".weight")]
        absent = [h for h in heads if h in untied and h not in model]
        aliases.append({h: max(inputs, key=partial(_common, h)) for h in absent if inputs})
    return Ties(tuple(aliases), tuple(h for h in heads if h not in everywhere | untied))


def is_tied(names: Iterable[str]) -> bool:
    """Whether a model has an input embedding, and no output layer of its own."""
    every = list(names)
    return any(_module(n) in _IN and n.endswith(".weight") for n in every) and not any(map(_is_head, every))


def config_changes(
    config: Mapping[str, Any], *, vocab_size: int | None = None, tied: bool | None = None,
    special: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The keys of a config.json that have to change, nested as there; {} if none does.

    vocab_size  rows of the output's embeddings; None: unchanged
    tied        whether the output has no output layer of its own; None: unchanged
    special     config.json of the model whose vocabulary the output has, if that is another: its `..._token_id` and
                `..._token_index` take the place of those that are there

    A key is set where it is: at the top, in text_config (llm_config, language_config), or in both. `vocab_size` that is
    nowhere is set at the top; `tie_word_embeddings` goes to both, because it depends on the model what its absence
    means.
    """
    changes: dict[str, Any] = {}
    nested = {k: config[k] for k in _TEXT if isinstance(config.get(k), dict)}
    wanted = {} if vocab_size is None else {"vocab_size": vocab_size}
    anywhere = any("vocab_size" in part for part in (config, *nested.values()))
    for name, part in (("", config), *nested.items()):
        new = {k: v for k, v in wanted.items() if k in part or (not anywhere and not name)}
        if tied is not None:
            new["tie_word_embeddings"] = tied
        other = (special or {}).get(name, {}) if name else special or {}
        if isinstance(other, Mapping):
            new |= {k: other[k] for k in part if k.endswith(("_token_id", "_token_index")) and k in other}
        new = {k: v for k, v in new.items() if k not in part or part[k] != v}
        if new and name:
            changes[name] = new
        else:
            changes |= new
    return changes


def with_changes(config: bytes, changes: Mapping[str, Any], file: str = "config.json") -> bytes:
    """`config` with the changes in it; the bytes come back untouched if there are none."""
    if not changes:
        return config
    table = parse_object(config.lstrip(), "the model configuration", file)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(table.get(key), dict):
            table[key].update(value)
        else:
            table[key] = value
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()


def vocab_size_of(config: Mapping[str, Any], file: str) -> int | None:
    """`vocab_size` at the top or of the language model, or None.

    Raises: CheckpointError, if it is no number of tokens.
    """
    for part in (config, *(config.get(k) for k in _TEXT)):
        size = part.get("vocab_size") if isinstance(part, Mapping) else None
        if size is not None:
            if type(size) is not int or size < 1:
                raise CheckpointError(f"`vocab_size` is {size!r}, expected a whole number above 0", file=file)
            return size
    return None


def _is_head(name: str) -> bool:
    kind = _module(name)
    return name.endswith(".weight") and kind in _OUT and (kind != "output" or name == "output.weight")


def _module(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else ""


def _common(a: str, b: str) -> int:
    """Leading parts of two names that agree."""
    count = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        count += 1
    return count
