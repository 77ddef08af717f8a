"""Vocabularies of CTC tokenizers (wav2vec2), and of kinds that are not read: remedies are followed literally."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import fastinterp
from fastinterp.errors import CheckpointError, ShapeError

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "|"]


def speech(folder: Path, letters: str, seed: int) -> str:
    """A small wav2vec2 with a head of these letters."""
    folder.mkdir()
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tf.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    config = tf.Wav2Vec2Config(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    tf.Wav2Vec2ForCTC(config).save_pretrained(folder)
    return str(folder)


def linear(*models: str, **keys: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": m} for m in models], "parameters": {"weight": 1}, **keys}


def test_letters_find_their_rows(tmp_path: Path):
    """Heads of letters in another order, and of other letters, are aligned; transformers loads model and tokenizer."""
    a, b = speech(tmp_path / "a", "abcde", 0), speech(tmp_path / "b", "edcfgh", 1)
    with pytest.raises(ShapeError, match="`tokenizer_source: union`"):
        fastinterp.merge(linear(a, b), tmp_path / "out")
    fastinterp.merge(linear(a, b, tokenizer_source="union"), tmp_path / "out")
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert isinstance(tokenizer, tf.Wav2Vec2CTCTokenizer)
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate([*SPECIAL, *"abcdefgh"])}
    assert tokenizer.decode([5, 5, 0, 6, 4, 12]) == "ab h"
    model, info = tf.Wav2Vec2ForCTC.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and model.config.vocab_size == 13
    heads = [load_file(Path(m) / "model.safetensors")["lm_head.weight"] for m in (a, b)]
    made = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(made[7], (heads[0][7] + heads[1][7]) / 2)  # c
    torch.testing.assert_close(made[9], (heads[0][9] + heads[1][5]) / 2)  # e
    torch.testing.assert_close(made[0], (heads[0][0] + heads[1][0]) / 2)
    assert "added_tokens.json" not in [p.name for p in (tmp_path / "out").iterdir()]


def test_several_languages(tmp_path: Path):
    """A vocabulary for each language is not joined; the remedy works."""
    a, b = speech(tmp_path / "a", "abcde", 0), speech(tmp_path / "b", "edcfgh", 1)
    for folder in (a, b):
        file = Path(folder, "vocab.json")
        file.write_text(json.dumps({"eng": json.loads(file.read_text()), "fra": {"<pad>": 0}}))
    with pytest.raises(CheckpointError) as error:
        fastinterp.merge(linear(a, b, tokenizer_source="union"), tmp_path / "out")
    assert "vocab.json holds several vocabularies, `eng`, `fra`, one for each language. Leave `tokenizer` and" in (
        str(error.value)
    )
    fastinterp.merge(linear(a, b, missing="base"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "vocab.json").read_text())["fra"] == {"<pad>": 0}
    _, info = tf.Wav2Vec2ForCTC.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.slow
def test_a_tokenizer_without_its_json_file(tmp_path: Path):
    """The command that the error prints writes tokenizer.json."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog"]
    folders = []
    for i, more in enumerate(([], ["bird"])):
        config = tf.BertConfig(
            vocab_size=len(words + more), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, max_position_embeddings=16,
        )  # fmt: skip
        folder = tmp_path / f"model {i}"
        tf.BertForMaskedLM(config).save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(words + more))
        folders.append(str(folder))
    recipe = linear(*folders, tokenizer_source="union")
    for path in folders:
        with pytest.raises(CheckpointError) as error:
            fastinterp.merge(recipe, tmp_path / "out")
        assert error.value.file == path and "only `vocab.txt`" in str(error.value)
        command = re.search(r"python -c (.*)\. Or leave", str(error.value))
        assert command is not None
        subprocess.run([sys.executable, "-c", *shlex.split(command[1])], check=True, capture_output=True)
    fastinterp.merge(recipe, tmp_path / "out")
    _, info = tf.BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("bird") == 7
