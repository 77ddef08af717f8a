"""The tokenizer of the output, as files: those of the base, extended by the tokens that are new.

The rule: every token of the base keeps its id. New ordinary tokens become entries of the tokenizer's model, with what
makes them come out of text: their merges behind all of the base's (BPE), their scores (Unigram), nothing more
(WordPiece, WordLevel). So a BPE cuts text as the base's does, until none of its merges applies. New added tokens are
added tokens: their text is found before anything else. If the other model's tokenizer is of another kind, or prepares
text in another way, its ordinary tokens have ids and rows, but text may never lead to them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastinterp.checkpoint.names import listing, quote
from fastinterp.checkpoint.sidecar_files import is_tokenizer_file, refuse_link
from fastinterp.errors import CheckpointError
from fastinterp.messages import counted
from fastinterp.presence import is_file, names_at
from fastinterp.tokenizer.vocabulary import ADDED, MERGES, TOKENIZER, TOKENIZER_CONFIG, VOCAB, Joined, Vocabulary

# Files that other software reads instead of tokenizer.json, in formats that are not extended here.
_STALE = (".model", ".tiktoken", ".spm", "vocab.txt", "tekken.json", "bpe.codes")


def tokenizer_files(joined: Joined) -> tuple[dict[str, bytes | Path], list[str]]:
    """The tokenizer's files by name, each a path to copy or new content; and what the user should know of them.

    Raises: CheckpointError, if the base's cannot be extended, or one of them is a link out of its folder.
    """
    base = joined.base
    files: dict[str, bytes | Path] = {
        name: base.root / name for name in names_at(base.root) if is_tokenizer_file(name) and is_file(base.root / name)
    }
    for name in files:
        refuse_link(base.root, name)
    if not joined.changed:
        return files, []
    warnings = _warnings(joined)
    model = _model(joined)
    if TOKENIZER in files:
        files[TOKENIZER] = _json({**base.table, "added_tokens": _added_list(joined), "model": model})
    if VOCAB in files:
        files[VOCAB] = _json(model["vocab"])
    if MERGES in files:
        files[MERGES] = ("#version: 0.2\n" + "".join(f"{_line(m)}\n" for m in model["merges"])).encode()
    if TOKENIZER_CONFIG in files:
        files[TOKENIZER_CONFIG] = _json(_config(joined, TOKENIZER not in files), indent=2)
    if ADDED in files or (TOKENIZER not in files and MERGES in files):
        files[ADDED] = _json({t: i for t, i in joined.ids.items() if t in base.added or t in joined.added})
    stale = [n for n in files if n.endswith(_STALE)]
    for name in stale:
        del files[name]
    if stale:
        what = f"{listing(stale)} of {base.name}"
        warnings.append(f"the vocabulary changed, so {what} is left out: the tokenizer's JSON files have it all")
    return files, warnings


def rowless(joined: Joined, others: Sequence[Vocabulary], union: bool) -> list[str]:
    """Warnings of tokens that have no row in their model, so that it counts as one without them.

    others  the models beside joined.base; without `union`, what they have beyond its tokens is left out anyway
    """
    base, warnings = joined.base, []
    if base.stripped:
        warnings.append(
            f"{base.name} has {counted(len(base.stripped), 'token')} without embedding rows, "
            f"{listing(base.stripped)}: left out of the output's tokenizer"
        )
    for other in others:
        tokens = tuple(t for t in other.stripped if union or t in joined.ids)
        if tokens:
            warnings.append(
                f"{other.name} has {counted(len(tokens), 'token')} without embedding rows, {listing(tokens)}: left "
                "out, as if it did not have them"
            )
    return warnings


def _warnings(joined: Joined) -> list[str]:
    warnings = []
    base = joined.base
    for other in dict.fromkeys(joined.ordinary.values()):
        count = sum(v is other for v in joined.ordinary.values())
        if other.kind != base.kind:
            how = f"its tokenizer is {other.kind}, that of {base.name} {base.kind}"
        elif any(other.table.get(k) != base.table.get(k) for k in ("normalizer", "pre_tokenizer")):
            how = f"its tokenizer prepares text in another way than that of {base.name}"
        else:
            continue
        warnings.append(
            f"{counted(count, 'token')} of {other.name} get ids and rows, but {how}: text may never be encoded "
            "with them. `tokenizer_source: base` leaves them out"
        )
    return warnings


def _model(joined: Joined) -> dict[str, Any]:
    """`model` of tokenizer.json with all tokens in it, added ones too: only so is every id certain."""
    base = joined.base
    model = dict(base.table["model"])
    if base.kind == "Unigram":
        model["vocab"] = _scored(joined)
        return model
    model["vocab"] = dict(joined.ids)
    if base.kind == "BPE":
        model["merges"] = _merges(joined)
    return model


def _merges(joined: Joined) -> list[Any]:
    """The base's, less those of stripped tokens; then the others' that make a new token, in their order."""
    model = joined.base.table["model"]
    prefix = model.get("continuing_subword_prefix") or ""
    if type(prefix) is not str:
        raise CheckpointError("`model.continuing_subword_prefix` is no text", file=str(joined.base.root))
    pairs = [_pair(m, joined.base) for m in _merges_of(joined.base)]
    if joined.base.stripped:
        ids = joined.ids
        pairs = [(a, b) for a, b in pairs if a in ids and b in ids and a + b.removeprefix(prefix) in ids]
    known = set(pairs)
    for other in dict.fromkeys(v for v in joined.ordinary.values() if v.kind == "BPE"):
        for merge in _merges_of(other):
            pair = a, b = _pair(merge, other)
            new = a + b.removeprefix(prefix) in joined.ordinary and pair not in known
            if new and a in joined.ids and b in joined.ids:
                known.add(pair)
                pairs.append(pair)
    # Older files write a merge as one string, which newer software still reads; a space in a token forbids it.
    first = next(iter(_merges_of(joined.base)), None)
    if isinstance(first, str) and not any(" " in a or " " in b for a, b in pairs):
        return [f"{a} {b}" for a, b in pairs]
    return [[a, b] for a, b in pairs]


def _merges_of(vocabulary: Vocabulary) -> list[Any]:
    merges = vocabulary.table["model"].get("merges") or []
    if type(merges) is not list:
        raise CheckpointError("`model.merges` is not a list of merges", file=str(vocabulary.root))
    return merges


def _pair(merge: Any, vocabulary: Vocabulary) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if type(parts) is not list or len(parts) != 2 or not all(type(p) is str for p in parts):
        raise CheckpointError(f"{quote(merge)} is not a merge of two tokens", file=str(vocabulary.root))
    return parts[0], parts[1]


def _line(merge: Any) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _scored(joined: Joined) -> list[list[Any]]:
    """Tokens and scores in the order of the ids, which this kind does not store."""
    base = joined.base
    scores: dict[str, Any] = dict(base.table["model"]["vocab"])
    lowest = min((s for s in scores.values() if isinstance(s, (int, float))), default=0.0)
    for other in dict.fromkeys(joined.ordinary.values()):
        theirs = other.table["model"]["vocab"] if other.kind == "Unigram" else ()
        scores |= {token: score for token, score in theirs if joined.ordinary.get(token) is other}
    # Added tokens are found before scores count; tokens of other kinds of tokenizer have none.
    listed = [[token, scores.get(token, lowest)] for token in joined.ids]
    if len(listed) != joined.end or any(i != j for i, j in enumerate(joined.ids.values())):
        raise CheckpointError(
            f"the ids of {base.name} have gaps, which a Unigram tokenizer cannot have once tokens are added. Take its "
            "vocabulary as it is: `tokenizer_source: base`",
            file=str(base.root),
        )
    return listed


def _added_list(joined: Joined) -> list[dict[str, Any]]:
    """`added_tokens` of tokenizer.json: the base's as they are, then the new ones."""
    everything: Mapping[str, Mapping[str, bool]] = {**joined.base.added, **joined.added}
    return [{"id": i, "content": t, **everything[t]} for t, i in joined.ids.items() if t in everything]


def _config(joined: Joined, needed: bool) -> dict[str, Any]:
    """tokenizer_config.json; where it lists the added tokens, or only it can, the new ones are listed too."""
    config = dict(joined.base.config)
    if needed or "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {str(entry.pop("id")): entry for entry in _added_list(joined)}
    return config


def _json(value: Any, indent: int | None = None) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode()
