"""Tokenizers for tests, made with the `tokenizers` library, which reads what fastinterp writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers


def words(folder: Path, vocab: Sequence[str], added: Sequence[str | AddedToken] = ()) -> Path:
    """A WordLevel tokenizer: token i is vocab[i]; added ones follow."""
    made = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocab)}, unk_token=vocab[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _saved(folder, made, added)


def bpe(folder: Path, texts: Sequence[str], size: int, added: Sequence[str | AddedToken] = ()) -> Path:
    """A byte-level BPE, trained on `texts`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    return _saved(folder, made, added)


def unigram(folder: Path, vocab: Sequence[tuple[str, float]], added: Sequence[str | AddedToken] = ()) -> Path:
    made = Tokenizer(models.Unigram(list(vocab), unk_id=0))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _saved(folder, made, added)


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def table(folder: Path, name: str = "tokenizer.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text("utf-8"))


def _saved(folder: Path, made: Tokenizer, added: Sequence[str | AddedToken]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.add_tokens(list(added))
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
