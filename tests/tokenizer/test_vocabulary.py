"""Vocabularies read from tokenizer files, their union, and the tokenizer files of the output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from fastinterp.errors import CheckpointError
from fastinterp.tokenizer.chat_template import BUILTIN, most_common, template_of, with_template
from fastinterp.tokenizer.files import rowless, tokenizer_files
from fastinterp.tokenizer.vocabulary import Joined, Vocabulary, join, read_vocabulary, rows_of
from tests.support import tokens


def read(folder: Path, size: int = 1000) -> Vocabulary:
    return read_vocabulary(folder.name, folder, size)


def written(joined: Joined, folder: Path) -> Tokenizer:
    """The output's tokenizer, as the `tokenizers` library reads it."""
    folder.mkdir()
    for name, content in tokenizer_files(joined)[0].items():
        (folder / name).write_bytes(content.read_bytes() if isinstance(content, Path) else content)
    return tokens.load(folder)


def assert_ids(joined: Joined, made: Tokenizer) -> None:
    """Ids are what they were said to be, for every token and no other."""
    assert made.get_vocab() == dict(joined.ids)


def test_ids_added_tokens_and_settings(tmp_path):
    root = tokens.words(tmp_path / "a", ["<unk>", "cat", "dog"], ["<x>", tokens.special("<s>")])
    found = read(root)
    assert list(found.ids.items()) == [("<unk>", 0), ("cat", 1), ("dog", 2), ("<x>", 3), ("<s>", 4)]
    assert list(found.added) == ["<x>", "<s>"]
    assert found.added["<s>"]["special"] and not found.added["<x>"]["special"]
    assert (found.kind, found.stripped, found.size) == ("WordLevel", (), 1000)


def test_tokens_without_a_row_are_stripped(tmp_path):
    """Their entries, merges and added tokens leave the output's tokenizer, too."""
    root = tokens.bpe(tmp_path / "a", ["low lower lowest newer newest"] * 9, 280, ["<x>"])
    whole = read(root)
    last = max(whole.ids.values())
    cut = read(root, last - 1)
    assert cut.stripped == tuple(list(whole.ids)[-2:]) and "<x>" in cut.stripped
    joined = join(cut)
    assert joined.changed
    made = written(joined, tmp_path / "out")
    assert_ids(joined, made)
    assert made.get_vocab_size() == last - 1
    assert made.decode(made.encode("lower newest").ids) == "lower newest"
    assert "without embedding rows" in rowless(joined, [], True)[0]


def test_tokens_without_a_row_in_any_model_are_told(tmp_path):
    """Those that the output's vocabulary would have from it: all in a union, else those of the base."""
    base = read(tokens.words(tmp_path / "a", ["<unk>", "cat", "dog"]), 3)
    other = read(tokens.words(tmp_path / "b", ["<unk>", "cat", "dog", "owl"]), 2)
    (told,) = rowless(join(base, [other]), [other], union=True)
    assert told.startswith("b has 2 tokens without embedding rows, `dog`, `owl`: left out")
    (told,) = rowless(join(base), [other], union=False)
    assert told.startswith("b has 1 token without embedding rows, `dog`:")
    assert rowless(join(base), [base], union=True) == []


def test_unchanged_files_are_copied(tmp_path):
    """Not even written anew: other files of the tokenizer stay, too."""
    root = tokens.words(tmp_path / "a", ["<unk>", "cat"])
    (root / "tokenizer.model").write_bytes(b"sentencepiece")
    (root / "config.json").write_text("{}")
    files, warnings = tokenizer_files(join(read(root), [read(root)]))
    assert warnings == []
    assert files == {n: root / n for n in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")}


def test_order_of_the_union(tmp_path):
    """The base's ids stay; then ordinary tokens of the others, then added ones, each in the order of models and ids."""
    a = tokens.words(tmp_path / "a", ["<unk>", "cat"], ["<a>"])
    b = tokens.words(tmp_path / "b", ["<unk>", "emu", "cat", "bee"], ["<b>", "<a>"])
    c = tokens.words(tmp_path / "c", ["<unk>", "fox", "emu"], ["<c>", "<b>"])
    joined = join(read(a), [read(b), read(c)], [("<w>", None), ("cat", None)])
    want = ["<unk>", "cat", "<a>", "emu", "bee", "fox", "<b>", "<c>", "<w>"]
    assert list(joined.ids) == want
    assert list(joined.ids.values()) == list(range(len(want)))
    made = written(joined, tmp_path / "out")
    assert_ids(joined, made)
    for text in want[1:]:
        assert made.encode(f"cat {text} emu").ids == [1, joined.ids[text], 3]


def test_first_definition_of_an_added_token_wins(tmp_path):
    a = tokens.words(tmp_path / "a", ["<unk>"])
    b = tokens.words(tmp_path / "b", ["<unk>"], [tokens.special("<x>")])
    c = tokens.words(tmp_path / "c", ["<unk>"], [AddedToken("<x>", lstrip=True, special=False)])
    assert join(read(a), [read(b), read(c)]).added["<x>"]["special"]
    assert join(read(a), [read(c), read(b)]).added["<x>"]["lstrip"]


def test_token_that_is_ordinary_here_and_added_there(tmp_path):
    """It becomes an added one, once."""
    a = tokens.words(tmp_path / "a", ["<unk>"])
    b = tokens.words(tmp_path / "b", ["<unk>", "<x>"])
    c = tokens.words(tmp_path / "c", ["<unk>"], [tokens.special("<x>")])
    joined = join(read(a), [read(b), read(c)])
    assert (dict(joined.ids), list(joined.added), list(joined.ordinary)) == ({"<unk>": 0, "<x>": 1}, ["<x>"], [])


def test_chosen_token_takes_the_settings_of_its_source(tmp_path):
    a = tokens.words(tmp_path / "a", ["<unk>"])
    b = read(tokens.words(tmp_path / "b", ["<unk>"], [tokens.special("<x>")]))
    joined = join(read(a), (), [("<x>", b), ("<y>", b), ("<z>", None)])
    assert [joined.added[t]["special"] for t in ("<x>", "<y>", "<z>")] == [True, False, False]
    assert written(joined, tmp_path / "out").encode("<z><y>").ids == [3, 2]


def test_union_of_bpe_encodes_new_words(tmp_path):
    """The other's merges come after the base's, whose own words are cut as before."""
    a = tokens.bpe(tmp_path / "a", ["low lower lowest"] * 9, 270)
    b = tokens.bpe(tmp_path / "b", ["quiz quizzical"] * 9, 270, [tokens.special("<q>")])
    joined = join(read(a), [read(b)])
    made, old = written(joined, tmp_path / "out"), tokens.load(a)
    assert_ids(joined, made)
    assert "quiz" in joined.ordinary
    assert made.encode("quiz").ids == [joined.ids["quiz"]]
    assert made.encode("lower lowest").ids == old.encode("lower lowest").ids
    assert made.encode("<q>low").tokens == ["<q>", *old.encode("low").tokens]
    assert made.decode(made.encode("lower quizzical").ids) == "lower quizzical"


def test_merges_written_as_text_stay_text(tmp_path):
    a = tokens.bpe(tmp_path / "a", ["low lower"] * 9, 262)
    table = tokens.table(a)
    table["model"]["merges"] = [" ".join(m) for m in table["model"]["merges"]]
    (a / "tokenizer.json").write_text(json.dumps(table))
    b = tokens.bpe(tmp_path / "b", ["quiz"] * 9, 262)
    written(join(read(a), [read(b)]), tmp_path / "out")
    assert all(isinstance(m, str) for m in tokens.table(tmp_path / "out")["model"]["merges"])
    assert tokens.load(tmp_path / "out").encode("quiz").tokens == tokens.load(b).encode("quiz").tokens


def test_union_of_unigram_keeps_scores_and_ids(tmp_path):
    """Ids are places in a list there: the base's added tokens get one, so that new ordinary tokens can follow."""
    a = tokens.unigram(tmp_path / "a", [("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], [tokens.special("<s>")])
    b = tokens.unigram(tmp_path / "b", [("<unk>", 0.0), ("ab", -1.5), ("c", -3.0)])
    joined = join(read(a), [read(b)])
    made = written(joined, tmp_path / "out")
    assert_ids(joined, made)
    assert dict(joined.ids) == {"<unk>": 0, "a": 1, "b": 2, "<s>": 3, "ab": 4, "c": 5}
    assert made.encode("abc<s>a").tokens == ["ab", "c", "<s>", "a"]
    assert tokens.table(tmp_path / "out")["model"]["vocab"][4] == ["ab", -1.5]


def test_tokenizers_of_different_kinds_are_warned_of(tmp_path):
    a = tokens.bpe(tmp_path / "a", ["low lower"] * 9, 262)
    b = tokens.words(tmp_path / "b", ["<unk>", "zebra"], ["<b>"])
    joined = join(read(a), [read(b)])
    assert_ids(joined, written(joined, tmp_path / "out"))
    [warning] = tokenizer_files(joined)[1]
    assert warning.startswith("2 tokens of b get ids and rows, but its tokenizer is WordLevel, that of a BPE")


def test_plain_vocabulary_and_merges(tmp_path):
    """vocab.json and merges.txt without tokenizer.json are extended as such, with added tokens beside them."""
    for name, text in (("a", "low lower"), ("b", "quiz quizzical")):
        made = tokens.load(tokens.bpe(tmp_path / name, [text] * 9, 266, [f"<{name}>"]))
        made.model.save(str(tmp_path / name))
        (tmp_path / name / "tokenizer.json").unlink()
        (tmp_path / name / "added_tokens.json").write_text(json.dumps({f"<{name}>": made.token_to_id(f"<{name}>")}))
    joined = join(read(tmp_path / "a"), [read(tmp_path / "b")])
    files = tokenizer_files(joined)[0]
    assert sorted(files) == ["added_tokens.json", "merges.txt", "tokenizer_config.json", "vocab.json"]
    content = {n: c if isinstance(c, bytes) else c.read_bytes() for n, c in files.items()}
    assert json.loads(content["vocab.json"]) == dict(joined.ids)
    assert list(json.loads(content["added_tokens.json"])) == ["<a>", "<b>"]
    listed = json.loads(content["tokenizer_config.json"])["added_tokens_decoder"]
    assert {k: v["content"] for k, v in listed.items()} == {str(joined.ids[t]): t for t in ("<a>", "<b>")}
    merges = content["merges.txt"].decode().split("\n")[1:-1]
    own = (tmp_path / "a" / "merges.txt").read_text().split("\n")[1:-1]
    assert merges[: len(own)] == own and len(merges) > len(own)


def test_added_tokens_of_the_configuration_count(tmp_path):
    root = tokens.words(tmp_path / "a", ["<unk>", "cat"])
    config = {"added_tokens_decoder": {"2": {"content": "<x>", "special": True}, "0": {"content": "<unk>"}}}
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    found = read(root)
    assert dict(found.ids) == {"<unk>": 0, "cat": 1, "<x>": 2}
    other = tokens.words(tmp_path / "b", ["<unk>"], ["<y>"])
    files = tokenizer_files(join(found, [read(other)]))[0]
    assert isinstance(files["tokenizer_config.json"], bytes)
    assert sorted(json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]) == ["0", "2", "3"]


def test_formats_that_are_not_extended_are_left_out(tmp_path):
    a = tokens.words(tmp_path / "a", ["<unk>"])
    (a / "tokenizer.model").write_bytes(b"sentencepiece")
    b = tokens.words(tmp_path / "b", ["<unk>", "cat"])
    files, [warning] = tokenizer_files(join(read(a), [read(b)]))
    assert "tokenizer.model" not in files and "tokenizer.model" in warning


@pytest.mark.parametrize(
    ("end", "padded", "multiple", "rows"),
    [(3, 3, None, 3), (3, 8, None, 8), (9, 8, None, 9), (3, 8, 1, 3), (3, 8, 4, 4), (8, 3, 4, 8)],
)
def test_rows_of_the_output(tmp_path, end, padded, multiple, rows):
    """Padding is kept, unless a multiple is asked for."""
    root = tokens.words(tmp_path / "a", [f"t{i}" for i in range(end)])
    assert rows_of(join(read(root)), padded, multiple) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "[]", "must start with"),
        ("tokenizer.json", '{"model": 1}', "no `model` object"),
        ("tokenizer.json", '{"model": {"type": "X", "vocab": {}}}', "`model.type` is `X`"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": []}}', "not an object of tokens and ids"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}}}', "names `a` twice"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}}}', "token `a` has the id `-1`"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": true}}}', "token `a` has the id `True`"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 99999999999}}}', "expected a whole number"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"\\ud800": 0}}}', "not valid Unicode"),
        ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": [["a"]]}}', "not a list of tokens and scores"),
        ("tokenizer.json", '{"added_tokens": [1], "model": {"type": "BPE", "vocab": {}}}', "not a list of tokens"),
        ("vocab.json", '{"a": 0}', "but neither merges.txt nor"),
        ("tokenizer.model", "x", "only `tokenizer.model`, so its vocabulary is not known"),
        ("other", "x", "no tokenizer.json, so"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError) as error:
        read(tmp_path)
    assert message in str(error.value)


# --- chat templates --------------------------------------------------------------------------------------------------


def test_templates_are_found_where_transformers_looks(tmp_path):
    assert template_of(tmp_path) is None
    (tmp_path / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert template_of(tmp_path) == "processor"
    listed = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    assert template_of(tmp_path) == "plain"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert template_of(tmp_path) == "file"


def test_most_common_template():
    assert most_common([None, "b", "a", "a"]) == "a"
    assert most_common(["b", "a", None]) == "b"
    assert most_common([None, None]) is None


def test_template_is_stored_in_every_place(tmp_path):
    root = tokens.words(tmp_path / "a", ["<unk>"])
    (root / "chat_template.json").write_text('{"chat_template": "old"}')
    files = with_template({n: root / n for n in ("tokenizer_config.json", "chat_template.json")}, "new {{ é }}")
    assert files["chat_template.jinja"] == "new {{ é }}".encode()
    for name in ("tokenizer_config.json", "chat_template.json"):
        content = files[name]
        assert isinstance(content, bytes) and json.loads(content)["chat_template"] == "new {{ é }}"
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 64  # type: ignore[arg-type]


_TALK = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("alpaca", "S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Response:\n"),
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        ("exaone", "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n[|assistant|]"),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "U<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] S\n\nU [/INST] A</s>"),
    ],
)
def test_well_known_templates(name, text):
    """Rendered by the library that transformers uses."""
    from jinja2 import Environment

    assert sorted(BUILTIN) == ["alpaca", "chatml", "exaone", "llama3", "mistral"]
    template = Environment().from_string(BUILTIN[name])
    assert template.render(messages=_TALK, bos_token="<s>", eos_token="</s>", add_generation_prompt=True) == text
