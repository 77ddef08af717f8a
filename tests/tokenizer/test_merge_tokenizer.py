"""Merges of models whose vocabularies differ, or of which some tie their embeddings, loaded with transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fastinterp
from fastinterp.errors import CheckpointError, ShapeError
from fastinterp.ops.dtypes import BF16, F16, F32, F64, DType
from tests.support import tokens
from tests.support.checkpoints import Tensor, assert_same, floats, read, recipe, tensor, write, write_file

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama(folder: Path, seed: int, rows: int, tied: bool = False) -> Path:
    """A tiny Llama beside the tokenizer that is in `folder`."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def three(tmp_path) -> list[str]:
    """Llamas with words of their own, in orders of their own: `cat` and `<unk>` are shared by all, `dog` by two."""
    base = tokens.words(tmp_path / "base", ["<unk>", "cat", "dog", "own0"])
    one = tokens.words(tmp_path / "one", ["<unk>", "own1", "cat", "dog", "pair"], [tokens.special("<|im_start|>")])
    two = tokens.words(tmp_path / "two", ["<unk>", "pair", "cat"], ["<two>"])
    return [str(llama(f, i, n)) for i, (f, n) in enumerate(((base, 4), (one, 6), (two, 4)))]


def embedding(folder: str | Path, name: str = EMBED) -> np.ndarray:
    """The rows, float64."""
    found = read(Path(folder))[name]
    return floats(found).reshape(found.shape)


def row(folder: str | Path, text: str, name: str = EMBED) -> np.ndarray:
    return embedding(folder, name)[tokens.load(Path(folder)).token_to_id(text)]


def merged(tmp_path: Path, models: Sequence[str], **keys: Any) -> tuple[Path, Any]:
    """The average of the models."""
    out = tmp_path / "out"
    report = fastinterp.merge(recipe("linear", list(models), weights=[1.0] * len(models), **keys), out)
    return out, report


def assert_runs(folder: Path, texts: Sequence[str]) -> None:
    """transformers loads it, its tokenizer has an id below the number of rows for each text, and it generates."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        assert ids.shape == (1, 1) and int(ids[0, 0]) < model.config.vocab_size
        assert tokenizer.decode(ids[0]) == text
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        assert made.shape[1] >= 2
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size


def test_union(tmp_path, three):
    """Rows of shared tokens are averaged, those of one model are its own; `pair` is in two, not in the base."""
    out, _ = merged(tmp_path, three, tokenizer_source="union", base_model=three[0])
    made = tokens.load(out)
    order = ["<unk>", "cat", "dog", "own0", "own1", "pair", "<|im_start|>", "<two>"]
    assert [made.id_to_token(i) for i in range(made.get_vocab_size())] == order
    for name in (EMBED, HEAD):
        assert embedding(out, name).shape == (8, 16)
        base, one, two = three
        want = {
            "cat": sum(row(m, "cat", name) for m in three) / 3,
            "dog": (row(base, "dog", name) * 2 + row(one, "dog", name)) / 3,
            "own0": row(base, "own0", name),
            "own1": row(one, "own1", name),
            "pair": (row(one, "pair", name) + row(two, "pair", name)) / 2,
            "<two>": row(two, "<two>", name),
        }
        for text, expected in want.items():
            np.testing.assert_allclose(row(out, text, name), expected, rtol=0, atol=1e-8, err_msg=text)
    assert_runs(out, order[1:])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 8


def test_base(tmp_path, three):
    """Rows of tokens that the base does not have are gone."""
    out, _ = merged(tmp_path, three, tokenizer_source="base", base_model=three[0])
    asked = recipe("linear", three, weights=[1.0] * 3, tokenizer_source="base", base_model=three[0])
    assert f"vocabulary: that of {three[0]}, 4 rows" in " ".join(str(fastinterp.explain(asked)).split())
    assert (out / "tokenizer.json").read_bytes() == Path(three[0], "tokenizer.json").read_bytes()
    assert embedding(out).shape == (4, 16)
    np.testing.assert_allclose(row(out, "cat"), sum(row(m, "cat") for m in three) / 3, atol=1e-8)
    np.testing.assert_array_equal(row(out, "own0"), row(three[0], "own0"))
    assert_runs(out, ["cat", "dog", "own0"])


def test_vocabulary_of_another_model(tmp_path, three):
    """Its files are copied, and its ids of special tokens come into config.json."""
    config = json.loads(Path(three[1], "config.json").read_text()) | {"eos_token_id": 5}
    Path(three[1], "config.json").write_text(json.dumps(config))
    Path(three[1], "chat_template.jinja").write_text("{{ messages }}")
    out, _ = merged(tmp_path, three, tokenizer_source=three[1], base_model=three[0])
    assert (out / "tokenizer.json").read_bytes() == Path(three[1], "tokenizer.json").read_bytes()
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    found = json.loads((out / "config.json").read_text())
    assert (found["vocab_size"], found["eos_token_id"]) == (6, 5)
    np.testing.assert_array_equal(row(out, "own1"), row(three[1], "own1"))
    assert_runs(out, ["own1", "<|im_start|>"])


def test_tokens(tmp_path, three):
    """Forced rows, rows of another token and by id, zeros, and a token that no model has."""
    listed = {
        "cat": {"source": three[2], "force": True},
        "dog": {"source": {"kind": "zero"}},
        "pair": {"source": {"kind": "model_token", "model": three[0], "token": "own0"}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": three[1], "token_id": 2}},
        "<none>": {},
    }
    out, report = merged(
        tmp_path, three, base_model=three[0], tokenizer={"source": "union", "tokens": listed, "pad_to_multiple_of": 16}
    )
    np.testing.assert_array_equal(row(out, "cat"), row(three[2], "cat"))
    np.testing.assert_allclose(row(out, "dog"), (row(three[0], "dog") + row(three[1], "dog")) / 3, atol=1e-8)
    np.testing.assert_array_equal(row(out, "pair"), row(three[0], "own0"))
    np.testing.assert_array_equal(row(out, "<new>"), row(three[1], "cat"))
    assert not row(out, "<none>").any()
    assert any("no model has a row for 1 token, `<none>`: zeros instead" in w for w in report.warnings)
    whole = embedding(out)
    assert whole.shape == (16, 16)
    for padding in whole[10:]:
        np.testing.assert_allclose(padding, whole[:10].mean(axis=0), atol=1e-7)
    assert_runs(out, ["cat", "<new>", "<none>"])


def test_task_vectors_of_new_tokens(tmp_path, three):
    """With a base, a token that it lacks has its row in the base, too: so its task vector is 0."""
    out = tmp_path / "out"
    asked = recipe("task_arithmetic", three[1:], weights=[0.5, 0.5], base_model=three[0], tokenizer_source="union")
    fastinterp.merge(asked, out)
    np.testing.assert_array_equal(row(out, "own1"), row(three[1], "own1"))
    np.testing.assert_allclose(row(out, "cat"), (row(three[1], "cat") + row(three[2], "cat")) / 2, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "count", "keys"),
    [
        ("slerp", 2, {"parameters": {"t": 0.3}}),
        ("nuslerp", 2, {"parameters": {"weight": 1.0, "nuslerp_flatten": False}}),
        ("model_stock", 3, {"parameters": {"filter_wise": True}}),
        ("dare_linear", 3, {"parameters": {"weight": 0.5, "density": 0.5}}),
    ],
)
def test_methods_that_ask_see_the_moved_rows(tmp_path, three, method, count, keys):
    """The same bytes as from models whose embeddings were moved beforehand, which a merge of one model does."""
    models = three[:count]
    asked = recipe(method, models[1:], base_model=models[0], **keys)
    if method == "nuslerp":
        asked = recipe(method, models, **keys)
    moved = []
    for k, model in enumerate(models):
        out = tmp_path / f"moved{k}"
        weights = [float(m == model) for m in models]
        fastinterp.merge(recipe("linear", models, weights=weights, base_model=models[0], tokenizer_source="union"), out)
        moved.append(str(out))
    text = json.dumps(asked)
    for model, other in zip(models, moved, strict=True):
        text = text.replace(json.dumps(model), json.dumps(other))
    fastinterp.merge(json.loads(text), tmp_path / "want")
    fastinterp.merge(asked | {"tokenizer_source": "union"}, tmp_path / "got")
    assert_same(read(tmp_path / "want"), read(tmp_path / "got"))


def test_different_vocabularies_without_a_tokenizer_key_are_refused(tmp_path, three):
    """Each remedy is followed, also from the commands without recipes; `base` is the first model, if none is named."""
    with pytest.raises(ShapeError, match="`tokenizer_source: union` or `tokenizer_source: base` in the recipe, --tok"):
        merged(tmp_path, three)
    for source, rows in (("union", 8), ("base", 4), (three[1], 6)):
        a, _ = merged(tmp_path / f"merge {rows}", three, tokenizer_source=source)
        assert embedding(a).shape[0] == rows
        assert_runs(a, ["cat"])
    first, second = three[:2]
    with pytest.raises(ShapeError, match="`tokenizer_source='union'` or `tokenizer_source='base'`"):
        fastinterp.interpolate(first, second, 0.5, tmp_path / "refused")
    fastinterp.interpolate(first, second, 0.5, tmp_path / "line", tokenizer_source="union")
    fastinterp.sweep(first, second, [0.5], tmp_path / "sweep", tokenizer_source="union")
    want = {t: (row(first, t) + row(second, t)) / 2 for t in ("cat", "dog")} | {"own0": row(first, "own0")}
    for out in (tmp_path / "line", tmp_path / "sweep" / "alpha_0.5"):
        for token, values in want.items():
            np.testing.assert_allclose(row(out, token), values, atol=1e-7)


def test_chat_templates(tmp_path, three):
    for model, template in zip(three, ("a", "{{ b }}", "{{ b }}"), strict=True):
        Path(model, "chat_template.jinja").write_text(template)
    out, _ = merged(tmp_path, three, tokenizer_source="union", chat_template="auto")
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == "{{ b }}"
    fastinterp.merge(recipe("linear", three[:1], weights=[1.0], chat_template="chatml"), tmp_path / "named")
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "named")
    talk = made.apply_chat_template([{"role": "user", "content": "cat"}], tokenize=False, add_generation_prompt=True)
    assert talk == "<|im_start|>user\ncat<|im_end|>\n<|im_start|>assistant\n"


def test_padded_vocabularies_stay_padded(tmp_path):
    """As without the key: the models' own rows behind the tokens are merged, nothing is moved."""
    models = [str(llama(tokens.words(tmp_path / n, ["<unk>", "cat"]), i, 7)) for i, n in enumerate("ab")]
    out, _ = merged(tmp_path, models, tokenizer_source="union")
    plain = tmp_path / "plain"
    fastinterp.merge(recipe("linear", models, weights=[1.0, 1.0]), plain)
    np.testing.assert_array_equal(embedding(out), embedding(plain))
    assert (out / "config.json").read_bytes() == (plain / "config.json").read_bytes()
    shrunk, _ = merged(tmp_path / "x", models, tokenizer={"pad_to_multiple_of": 1})
    np.testing.assert_array_equal(embedding(shrunk), embedding(plain)[:2])
    assert_runs(shrunk, ["cat"])


def test_tied_and_untied(tmp_path):
    """The output is untied, and the tied model's output layer is its embedding."""
    tied = str(llama(tokens.words(tmp_path / "a", ["<unk>", "cat"]), 1, 2, tied=True))
    untied = str(llama(tokens.words(tmp_path / "b", ["<unk>", "cat"]), 2, 2))
    assert HEAD not in read(Path(tied)) and HEAD in read(Path(untied))
    for k, models in enumerate(([tied, untied], [untied, tied])):
        out, _ = merged(tmp_path / str(k), models)
        np.testing.assert_allclose(embedding(out, HEAD), (embedding(tied) + embedding(untied, HEAD)) / 2, atol=1e-8)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        assert_runs(out, ["cat"])
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()


def test_tied_stay_tied(tmp_path):
    """Also with different vocabularies."""
    a = str(llama(tokens.words(tmp_path / "a", ["<unk>", "cat"]), 1, 2, tied=True))
    b = str(llama(tokens.words(tmp_path / "b", ["<unk>", "dog", "cat"]), 2, 3, tied=True))
    out, _ = merged(tmp_path, [a, b], tokenizer_source="union")
    assert HEAD not in read(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert_runs(out, ["cat", "dog"])


def test_tied_and_untied_of_different_vocabularies(tmp_path):
    a = str(llama(tokens.words(tmp_path / "a", ["<unk>", "cat"]), 1, 2, tied=True))
    b = str(llama(tokens.words(tmp_path / "b", ["<unk>", "dog", "cat"]), 2, 3))
    out, _ = merged(tmp_path, [a, b], tokenizer_source="union")
    np.testing.assert_allclose(row(out, "cat", HEAD), (row(a, "cat") + row(b, "cat", HEAD)) / 2, atol=1e-8)
    np.testing.assert_array_equal(row(out, "dog", HEAD), row(b, "dog", HEAD))
    assert_runs(out, ["cat", "dog"])


def test_output_layer_of_a_tied_model_beside_untied_ones(tmp_path):
    """What a tied model lacks comes from the others' output layers, not from their embeddings."""
    a = str(llama(tokens.words(tmp_path / "a", ["<unk>", "cat", "own"]), 1, 3))
    b = str(llama(tokens.words(tmp_path / "b", ["<unk>", "dog", "cat"]), 2, 3))
    tied = str(llama(tokens.words(tmp_path / "c", ["<unk>", "cat"]), 3, 2, tied=True))
    out, _ = merged(tmp_path, [a, b, tied], tokenizer_source="union")
    for name in (EMBED, HEAD):
        np.testing.assert_array_equal(row(out, "own", name), row(a, "own", name))
        np.testing.assert_array_equal(row(out, "dog", name), row(b, "dog", name))


# --- the rows themselves, without transformers -----------------------------------------------------------------------


def plain(folder: Path, words: Sequence[str], values: Any, dtype: DType, rows: int | None = None) -> str:
    """A model of one embedding, whose row i is all values[i]."""
    tokens.words(folder, words)
    array = np.repeat(np.asarray(values, np.float64)[:, None], 3, axis=1)
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(values)}))
    write(folder, {EMBED: tensor(array, dtype)})
    return str(folder)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_rows_of_other_dtypes_are_rounded(tmp_path, dtype):
    """Row `b` of an F32 model in an embedding of each dtype, and the mean of two rows."""
    a = plain(tmp_path / "a", ["<unk>"], [1.0], dtype)
    b = plain(tmp_path / "b", ["<unk>", "b"], [1.0, 1.2345678], F32)
    out, _ = merged(tmp_path, [a, b], tokenizer_source="union", out_dtype="float64")
    own = floats(tensor([floats(tensor([1.2345678], F32))], dtype))[0]
    np.testing.assert_allclose(embedding(out)[1], (own + np.float32(1.2345678)) / 2, rtol=1e-7)


def test_same_bytes_for_any_piece(tmp_path, monkeypatch):
    """How much is gathered at a time is not seen in the output, nor where runs of rows end."""
    from fastinterp.execute import gather_rows as gather

    rng = np.random.default_rng(5)
    names = [f"t{i}" for i in range(300)]
    models = []
    for k in range(3):
        own = list(rng.permutation(names)[: 150 + 30 * k])
        models.append(plain(tmp_path / f"m{k}", ["<unk>", *own], rng.normal(size=len(own) + 1 + k), BF16))
    found = []
    for piece in (1, 50, 2 << 20):
        monkeypatch.setattr(gather, "_PIECE", piece)
        out, _ = merged(tmp_path / str(piece), models, tokenizer={"pad_to_multiple_of": 64})
        found.append(read(out)[EMBED].raw.tobytes())
    assert found[0] == found[1] == found[2]


def test_only_what_no_file_holds_is_made(tmp_path):
    """Rows of models of the same dtype are read where they are; a mean, a converted row and padding are made, once."""
    import contextlib

    from fastinterp.execute.gather_rows import gather
    from fastinterp.plan.inputs import GatheredInput
    from fastinterp.plan.plan import make_plan
    from fastinterp.recipe.load import load_recipe

    a = plain(tmp_path / "a", ["<unk>", "a"], [1.0, 2.0], F32)
    b = plain(tmp_path / "b", ["<unk>", "p", "b"], [3.0, 4.0, 5.0], F32)
    c = plain(tmp_path / "c", ["p", "c"], [6.0, 7.0], F16)
    asked = load_recipe(recipe("linear", [a, b, c], weights=[1, 1, 1], tokenizer={"pad_to_multiple_of": 4}))
    [embedded] = make_plan([asked], max_shard_size=1 << 30).tensors
    first = embedded.inputs[0]
    assert isinstance(first, GatheredInput) and first.shape == (8, 3)
    with contextlib.ExitStack() as stack:
        found = gather(first, tmp_path, stack)
        assert [(source.path.parent.name, rows) for source, rows in found.parts] == [("a", 2), ("b", 3)]
        assert found.rows is not None and found.computed is not None
        # <unk> a | p: the mean of b's and c's | b | c, converted | three rows of padding
        assert found.rows.tolist() == [0, 1, 5, 4, 6, 7, 8, 9]
        made = np.frombuffer(os.pread(found.computed, 1000, 0), np.float32).reshape(-1, 3)[:, 0]
        assert made.tolist() == [5.0, 7.0, 20 / 5, 4.0, 4.0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_biases_follow_the_vocabulary(tmp_path):
    """A tensor of one dimension with a value per token."""
    a = plain(tmp_path / "a", ["<unk>", "a"], [1.0, 2.0], F32)
    b = plain(tmp_path / "b", ["<unk>", "b"], [3.0, 4.0], BF16)
    for folder, values, dtype in ((a, [1.0, 2.0], F32), (b, [3.0, 4.0], BF16)):
        path = Path(folder, "model.safetensors")
        write_file(path, {EMBED: read(Path(folder))[EMBED], "lm_head.bias": tensor(values, dtype)})
    out, _ = merged(tmp_path, [a, b], tokenizer_source="union")
    assert floats(read(out)["lm_head.bias"]).tolist() == [2.0, 2.0, 4.0] == embedding(out)[:, 0].tolist()


def test_model_that_is_cut_while_its_rows_are_made(tmp_path, monkeypatch):
    from fastinterp.execute import gather_rows as gather

    a = plain(tmp_path / "a", ["<unk>"], [1.0], F32)
    b = plain(tmp_path / "b", ["<unk>", "b"], [1.0, 2.0], F16)
    whole = gather._RowReader.__init__

    def cut(self: Any, *args: Any) -> None:
        whole(self, *args)
        os.truncate(Path(b, "model.safetensors"), 100)

    monkeypatch.setattr(gather._RowReader, "__init__", cut)
    with pytest.raises(CheckpointError, match="bytes are left at byte"):
        merged(tmp_path, [a, b], tokenizer_source="union")
    assert not (tmp_path / "out").exists()


def test_integer_embeddings_are_refused(tmp_path):
    a = plain(tmp_path / "a", ["<unk>"], [1.0], F32)
    b = plain(tmp_path / "b", ["<unk>", "b"], [1.0, 2.0], F32)
    from fastinterp.ops.dtypes import DTYPES

    for folder, rows in ((a, 1), (b, 2)):
        write_file(
            Path(folder, "model.safetensors"), {EMBED: Tensor(DTYPES["I8"], (rows, 2), np.zeros(rows * 2, np.uint8))}
        )
    with pytest.raises(ShapeError, match="whose rows cannot follow another vocabulary"):
        merged(tmp_path, [a, b], tokenizer_source="union")


def test_different_widths_are_refused(tmp_path):
    a = plain(tmp_path / "a", ["<unk>"], [1.0], F32)
    b = plain(tmp_path / "b", ["<unk>", "b"], [1.0, 2.0], F32)
    write_file(Path(b, "model.safetensors"), {EMBED: tensor(np.zeros((2, 4)), F32)})
    with pytest.raises(ShapeError, match="Only models of one architecture share embeddings"):
        merged(tmp_path, [a, b], tokenizer_source="union")


def test_model_without_a_known_embedding_is_refused(tmp_path):
    a = plain(tmp_path / "a", ["<unk>"], [1.0], F32)
    write_file(Path(a, "model.safetensors"), {"x.weight": tensor(np.zeros((1, 4)), F32)})
    with pytest.raises(CheckpointError, match="no embedding that is known by its name"):
        merged(tmp_path, [a], tokenizer_source="union")


def test_one_file_names_the_files_that_it_needs(tmp_path, three):
    """Those of the origin do not fit another vocabulary: nobody is invited to copy them."""
    out = tmp_path / "one.safetensors"
    report = fastinterp.merge(
        recipe("linear", three, weights=[1.0] * 3, tokenizer_source="union", base_model=three[0]), out
    )
    (warning,) = [w for w in report.warnings if "needs files of its own" in w]
    assert "tokenizer.json (8 rows)" in warning and "config.json (vocab_size 8)" in warning
    assert "give the output the name of a folder" in warning
    (note,) = [r for r in report.remarks if "the output is one file" in r]
    assert "tokenizer.json" not in note and " config.json" not in note and "generation_config.json" in note


def test_one_file_with_other_layers(tmp_path, three):
    slices = [{"sources": [{"model": three[0], "layer_range": [0, 2]}]}] * 2
    made = {"slices": slices, "merge_method": "passthrough", "dtype": "float32"}
    report = fastinterp.merge(made, tmp_path / "one.safetensors")
    (warning,) = [w for w in report.warnings if "needs files of its own" in w]
    assert "config.json (num_hidden_layers 4" in warning and "tokenizer.json" not in warning
    assert not any("config.json changed" in remark for remark in report.remarks)
    folder = fastinterp.merge(made, tmp_path / "folder")
    assert any("config.json changed for the layers" in remark for remark in folder.remarks)
    assert not any("needs files of its own" in warning for warning in folder.warnings)


def test_one_file_that_needs_no_files_of_its_own(tmp_path, three):
    """A dtype alone is no reason: transformers reads the weights all the same."""
    made = recipe("linear", three[:1], weights=[1.0], out_dtype="bfloat16")
    report = fastinterp.merge(made, tmp_path / "one.safetensors")
    assert not any("needs files of its own" in warning for warning in report.warnings)
    assert any("config.json" in r and "the output is one file" in r for r in report.remarks)
