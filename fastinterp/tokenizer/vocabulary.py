"""The vocabularies of models: which token has which id, read from the tokenizer's JSON files; and their union.

A tokenizer's own code is never run, and no tokenizer library is needed.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastinterp.checkpoint.names import listing, quote
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.checkpoint.sidecar_files import refuse_link
from fastinterp.checkpoint.strict_json import parse_object
from fastinterp.errors import CheckpointError
from fastinterp.presence import is_file, names_at

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCAB, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
MAX_TOKENIZER = 1 << 28  # bytes; the largest in use have about 40 million
MAX_TOKENS = 1 << 24

_KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_OTHERS = (".model", ".tiktoken", ".spm", "vocab.txt", "tekken.json")
_OUT_OF_RECIPE = (
    "`tokenizer` and `tokenizer_source` out of the recipe: tokenizer files are copied as they are, and `missing: base` "
    "also copies tensors that have other numbers of rows"
)
_CTC = ("CTC", "word_delimiter_token")  # in the class, or among the keys, of tokenizer_config.json


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The vocabulary of one model: its tokens and their ids.

    name      of the model, for messages
    root      its folder
    size      rows of its embeddings; tokens whose id is not below it have no row, and are left out of `ids`
    ids       token -> id, ascending by id
    added     those of `ids` that are matched in the text before the tokenizer's model sees it, with their settings
              (`special`, `normalized`, ...)
    stripped  tokens that are left out
    table     tokenizer.json, or what it would hold for a tokenizer of vocab.json and merges.txt
    config    tokenizer_config.json, or {}
    """

    name: str
    root: Path
    size: int
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, bool]]
    stripped: tuple[str, ...]
    table: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """`BPE`, `Unigram`, `WordPiece` or `WordLevel`."""
        return str(self.table["model"]["type"])


@dataclass(frozen=True, eq=False)
class Joined:
    """The vocabulary of the output: that of `base`, every token at its id, and after it what is new.

    ids       token -> id, ascending by id
    ordinary  new tokens of the tokenizer's model, and the vocabulary that each is from
    added     new added tokens, with their settings
    """

    base: Vocabulary
    ids: Mapping[str, int]
    ordinary: Mapping[str, Vocabulary]
    added: Mapping[str, Mapping[str, bool]]

    @property
    def changed(self) -> bool:
        return bool(self.ordinary or self.added or self.base.stripped)

    @property
    def end(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1


def read_vocabulary(name: str, root: Path, size: int) -> Vocabulary:
    """The vocabulary of the model `name`, whose files are in `root` and whose embeddings have `size` rows.

    Reads tokenizer.json, else vocab.json and merges.txt, or the vocab.json alone of a CTC tokenizer (wav2vec2: its
    tokens are letters); tokens may also be added by tokenizer_config.json and added_tokens.json.
    Raises: CheckpointError, if there is no such file, or one is damaged.
    """
    config = _object(root / TOKENIZER_CONFIG) if is_file(root / TOKENIZER_CONFIG) else {}
    if is_file(root / TOKENIZER):
        table = _object(root / TOKENIZER)
        file = str(root / TOKENIZER)
    elif is_file(root / VOCAB):
        table = _plain_files(root, config)
        file = str(root / VOCAB)
    else:
        others = [name for name in names_at(root) if name.endswith(_OTHERS)]
        present = f", only {listing(others)}" if others else ""
        raise CheckpointError(
            f"the folder has no {TOKENIZER}{present}, so its vocabulary is not known. {_remedy(root, bool(others))}",
            file=str(root),
        )
    ids = _model_ids(table, file)
    added = _added_tokens(table, config, root, ids, file)
    _check_ids(ids, file)
    ordered = dict(sorted(ids.items(), key=lambda pair: pair[1]))
    stripped = tuple(token for token, i in ordered.items() if i >= size)
    for token in stripped:
        del ordered[token]
        added.pop(token, None)
    return Vocabulary(name, root, size, ordered, added, stripped, table, config)


def join(
    base: Vocabulary, others: Iterable[Vocabulary] = (), extra: Sequence[tuple[str, Vocabulary | None]] = ()
) -> Joined:
    """The union: the tokens of `base` at their ids, then those of `others` that are new.

    extra  tokens that must be there, and a model whose settings they have if it knows them as added tokens

    New ids start behind the largest of the base. First come the ordinary tokens, model by model and in the order of
    their ids; then the added tokens in the same order; then `extra`, as added tokens. The first definition wins.
    """
    ids = dict(base.ids)
    ordinary: dict[str, Vocabulary] = {}
    added: dict[str, Mapping[str, bool]] = {}
    for other in others:
        for token in (t for t in other.ids if t not in ids):
            if token in other.added:
                added.setdefault(token, other.added[token])
            else:
                ordinary.setdefault(token, other)
    for token in added:
        ordinary.pop(token, None)  # ordinary in one model, added in another: matched in the text, it is always found
    for token, model in extra:
        if token not in ids and token not in ordinary:
            known = {} if model is None else model.added.get(token, {})
            added.setdefault(token, known or _settings({}, special=False))
    start = max(ids.values(), default=-1) + 1
    ids |= {token: i for i, token in enumerate([*ordinary, *added], start)}
    return Joined(base, ids, ordinary, added)


def rows_of(joined: Joined, padded: int, multiple: int | None) -> int:
    """Rows of the output's embeddings.

    padded    rows of the base's: they may be more than its tokens, and are kept
    multiple  round the tokens up to a multiple of this instead
    """
    if multiple is None:
        return max(joined.end, padded)
    return -(-joined.end // multiple) * multiple


def _object(path: Path) -> dict[str, Any]:
    refuse_link(path.parent, path.name)
    return parse_object(read_regular(str(path), MAX_TOKENIZER).lstrip(), f"{quote(path.name)}", str(path))


def _remedy(root: Path, files: bool = True) -> str:
    """What to do about a vocabulary that cannot be read; `files`: those of another kind of tokenizer are there."""
    code = (
        f"from transformers import AutoTokenizer as T; T.from_pretrained({str(root)!r}).save_pretrained({str(root)!r})"
    )
    write = (
        f"Write one with the transformers library, if it has a fast tokenizer for this model (.model files need the "
        f"packages sentencepiece and protobuf): python -c {shlex.quote(code)}. Or leave"
    )
    return f"{write if files else 'Leave'} {_OUT_OF_RECIPE}"


def _plain_files(root: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """vocab.json, with merges.txt or alone, as the tokenizer.json that it stands for."""
    vocab = _object(root / VOCAB)
    if not is_file(root / MERGES):
        if _CTC[0] in str(config.get("tokenizer_class")) or _CTC[1] in config:
            if any(type(value) is dict for value in vocab.values()):
                raise CheckpointError(
                    f"{VOCAB} holds several vocabularies, {listing(list(vocab))}, one for each language. "
                    f"{_remedy(root, files=False)}",
                    file=str(root / VOCAB),
                )
            return {"added_tokens": [], "model": {"type": "WordLevel", "vocab": vocab}}
        raise CheckpointError(
            f"the folder has {VOCAB}, but neither {MERGES} nor {TOKENIZER}. {_remedy(root)}", file=str(root)
        )
    refuse_link(root, MERGES)
    try:
        text = read_regular(str(root / MERGES), MAX_TOKENIZER).decode()
    except UnicodeDecodeError:
        raise CheckpointError("the merges are not UTF-8", file=str(root / MERGES)) from None
    merges = [line for line in text.split("\n") if line.strip() and not line.startswith("#version")]
    return {"added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": merges}}


def _model_ids(table: dict[str, Any], file: str) -> dict[str, int]:
    """token -> id of the tokenizer's model."""
    model = table.get("model")
    if type(model) is not dict:
        raise CheckpointError("it has no `model` object", file=file)
    vocab = model.get("vocab")
    if "type" not in model:  # older files leave it out
        guess = "Unigram" if type(vocab) is list else "BPE" if "merges" in model else "WordPiece"
        model["type"] = guess if guess != "WordPiece" or "max_input_chars_per_word" in model else "WordLevel"
    if model["type"] not in _KINDS:
        raise CheckpointError(
            f"`model.type` is {quote(model['type'])}, expected one of {listing(_KINDS, 4)}. Leave {_OUT_OF_RECIPE}",
            file=file,
        )
    if model["type"] != "Unigram":
        if type(vocab) is not dict:
            raise CheckpointError("`model.vocab` is not an object of tokens and ids", file=file)
        return dict(vocab)
    if type(vocab) is not list or not all(type(x) is list and len(x) == 2 and type(x[0]) is str for x in vocab):
        raise CheckpointError("`model.vocab` is not a list of tokens and scores", file=file)
    return {token: i for i, (token, _) in enumerate(vocab)}


def _added_tokens(
    table: dict[str, Any], config: dict[str, Any], root: Path, ids: dict[str, int], file: str
) -> dict[str, Mapping[str, bool]]:
    """The added tokens with their settings, from every file that may hold some; their ids go into `ids`."""
    added: dict[str, Mapping[str, bool]] = {}
    listed = table.get("added_tokens") or []
    if type(listed) is not list or not all(type(t) is dict and type(t.get("content")) is str for t in listed):
        raise CheckpointError("`added_tokens` is not a list of tokens", file=file)
    for entry in listed:
        ids.setdefault(entry["content"], entry.get("id"))
        added[entry["content"]] = _settings(entry)
    decoder = config.get("added_tokens_decoder") or {}
    where = str(root / TOKENIZER_CONFIG)
    if type(decoder) is not dict:
        raise CheckpointError("`added_tokens_decoder` is not an object", file=where)
    for key, entry in decoder.items():
        token = entry.get("content") if type(entry) is dict else None
        if type(token) is not str or not key.isdecimal() or len(key) > 10:
            raise CheckpointError(f"`added_tokens_decoder` has the entry {quote(key)}, which is no token", file=where)
        ids.setdefault(token, int(key))
        added.setdefault(token, _settings(entry))
    legacy = _object(root / ADDED) if is_file(root / ADDED) else {}
    for token, number in legacy.items():
        ids.setdefault(token, number)
        added.setdefault(token, _settings({}, special=False))
    return added


def _settings(entry: Mapping[str, Any], **instead: bool) -> dict[str, bool]:
    """How an added token is matched. Not normalised unless it says so: then exactly its text is found."""
    return {flag: bool(entry.get(flag, False)) for flag in _FLAGS} | instead


def _check_ids(ids: Mapping[str, int], file: str) -> None:
    try:
        "".join(ids).encode()
    except UnicodeEncodeError:
        raise CheckpointError("a token is not valid Unicode: half of a surrogate pair", file=file) from None
    for token, number in ids.items():
        if type(number) is not int or not 0 <= number < MAX_TOKENS:
            raise CheckpointError(
                f"token {quote(token)} has the id {quote(number)}, expected a whole number in 0..{MAX_TOKENS - 1}",
                file=file,
            )
