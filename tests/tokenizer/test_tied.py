"""Tied embeddings, and what the output's config.json says of them and of the vocabulary."""

from __future__ import annotations

import json

import pytest

from fastinterp.errors import CheckpointError
from fastinterp.tokenizer.tied_embeddings import (
    Ties,
    config_changes,
    is_tied,
    says_tied,
    ties,
    vocab_size_of,
    with_changes,
)

EMBED, HEAD, OTHER = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
UNTIED, TIED = [EMBED, OTHER, HEAD], [EMBED, OTHER]


def test_all_tied_or_all_untied_stay_so():
    assert ties([TIED, TIED], [True, True]) == Ties(({}, {}), ())
    assert ties([UNTIED, UNTIED], [False, False]) == Ties(({}, {}), ())


def test_one_untied_model_unties_the_output():
    """A model without an output layer gives its embedding, unless its configuration says that this is not its head."""
    found = ties([TIED, UNTIED, TIED], [True, False, None])
    assert found.aliases == ({HEAD: EMBED}, {}, {HEAD: EMBED}) and found.guessed == ((2, HEAD),)
    found = ties([TIED, UNTIED], [False, False])
    assert found.aliases == ({}, {}) and found.absent == ((0, HEAD),)


def test_a_head_of_its_own_that_configurations_call_tied():
    """It is compared with the embedding: a copy is dropped where others lack it, and else it stays."""
    own = Ties(({}, {HEAD: EMBED}), trained=((0, HEAD),))
    assert ties([UNTIED, TIED], [True, True], lambda *_: False) == own
    assert ties([UNTIED, UNTIED], [True, True], lambda i, *_: i == 1) == Ties(({}, {}), trained=((0, HEAD),))
    assert ties([UNTIED, UNTIED], [False, False], lambda *_: pytest.fail("nothing to compare")) == Ties(({}, {}))


def test_the_copy_is_stored_and_the_embedding_is_not():
    """As programs write files that keep one name of two, the first by the alphabet."""
    assert ties([[HEAD, OTHER], TIED], [True, True]) == Ties(({EMBED: HEAD}, {}), (HEAD,))
    assert ties([[HEAD, OTHER], UNTIED], [True, False]).aliases == ({EMBED: HEAD}, {})
    encoder = "encoder.embed_tokens.weight"
    assert ties([[encoder], ["shared.weight"]], [None, None]) == Ties(({"shared.weight": encoder}, {}), (encoder,))


def test_what_an_absent_statement_means():
    assert [says_tied({"model_type": kind}) for kind in ("gpt2", "llama", "other")] == [True, False, None]
    assert says_tied({"model_type": "gpt2", "tie_word_embeddings": False}) is False
    assert says_tied({"model_type": "llama", "text_config": {"tie_word_embeddings": True}}) is True
    assert says_tied({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}) is False
    assert says_tied({}) is None


def test_head_that_a_tied_model_stores_all_the_same():
    """It counts as its embedding: beside a model without one it is dropped, beside one more it is merged."""
    assert ties([UNTIED, TIED], [True, True]) == Ties(({}, {}), (HEAD,))
    assert ties([UNTIED, UNTIED], [True, True]) == Ties(({}, {}), ())
    assert ties([UNTIED, UNTIED, TIED], [True, False, True]) == Ties(({}, {}, {HEAD: EMBED}), ())


def test_embedding_of_the_same_part_is_taken():
    """Of a model with several input embeddings."""
    full = ["vision.embed_tokens.weight", "language.embed_tokens.weight", "language.lm_head.weight"]
    assert ties([full[:2], full], [True, False]).aliases[0] == {full[2]: full[1]}


@pytest.mark.parametrize(
    ("head", "embed"),
    [
        ("lm_head.weight", "transformer.wte.weight"),
        ("embed_out.weight", "gpt_neox.embed_in.weight"),
        ("output.weight", "tok_embeddings.weight"),
        ("lm_head.weight", "shared.weight"),
        ("lm_head.weight", "transformer.word_embeddings.weight"),
    ],
)
def test_names_of_other_families(head, embed):
    assert ties([[embed], [embed, head]], [True, False]).aliases == ({head: embed}, {})
    assert is_tied([embed]) and not is_tied([embed, head])


def test_what_is_no_output_layer():
    """`output` deep in a layer, a bias, and models without an embedding."""
    names = [EMBED, "encoder.layer.0.output.weight", "lm_head.bias"]
    assert ties([[EMBED], names], [True, False]) == Ties(({}, {}), ())
    assert is_tied(names) and not is_tied(["unet.conv.weight"])
    assert ties([[OTHER], UNTIED], [False, False]).aliases == ({}, {})


def test_changes_of_a_flat_configuration():
    config = {"vocab_size": 10, "tie_word_embeddings": True, "eos_token_id": 2, "pad_token_id": None, "hidden_size": 4}
    assert config_changes(config) == {}
    assert config_changes(config, vocab_size=10, tied=True) == {}
    assert config_changes(config, vocab_size=12, tied=False) == {"vocab_size": 12, "tie_word_embeddings": False}
    special = {"eos_token_id": [3, 4], "pad_token_id": 5, "bos_token_id": 6, "hidden_size": 9}
    assert config_changes(config, special=special) == {"eos_token_id": [3, 4], "pad_token_id": 5}
    assert config_changes({}, vocab_size=3, tied=True) == {"vocab_size": 3, "tie_word_embeddings": True}


def test_changes_of_a_nested_configuration():
    """A key is set where it is; tie_word_embeddings everywhere."""
    config = {
        "text_config": {"vocab_size": 10, "eos_token_id": 1},
        "image_token_id": 7,
        "vision_config": {"vocab_size": 3},
    }
    special = {"text_config": {"eos_token_id": 2}, "image_token_id": 8}
    assert config_changes(config, vocab_size=12, tied=False, special=special) == {
        "text_config": {"vocab_size": 12, "tie_word_embeddings": False, "eos_token_id": 2},
        "tie_word_embeddings": False,
        "image_token_id": 8,
    }
    both = {"vocab_size": 10, "text_config": {"vocab_size": 10}}
    assert config_changes(both, vocab_size=11) == {"vocab_size": 11, "text_config": {"vocab_size": 11}}


def test_changes_are_written():
    config = {"a": 1, "text_config": {"b": 2, "vocab_size": 3}}
    raw = json.dumps(config).encode()
    assert with_changes(raw, {}) is raw
    found = json.loads(with_changes(raw, {"text_config": {"vocab_size": 4}, "tie_word_embeddings": True}))
    assert found == {"a": 1, "text_config": {"b": 2, "vocab_size": 4}, "tie_word_embeddings": True}


def test_vocab_size():
    assert vocab_size_of({"vocab_size": 5, "text_config": {"vocab_size": 6}}, "f") == 5
    assert vocab_size_of({"llm_config": {"vocab_size": 6}}, "f") == 6
    assert vocab_size_of({"vision_config": {"vocab_size": 6}}, "f") is None
    for wrong in (0, -1, 1.5, True, "5"):
        with pytest.raises(CheckpointError, match="f: `vocab_size` is"):
            vocab_size_of({"vocab_size": wrong}, "f")
