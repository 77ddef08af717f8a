"""Recipes of several documents, and what they want of tokenizer and chat template."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from fastinterp.errors import RecipeError
from fastinterp.recipe.load import load_recipe, load_recipes
from fastinterp.recipe.references import ModelRef
from fastinterp.recipe.tokenizer import ChatTemplate, TokenizerSpec, TokenSource, TokenSpec
from tests.support.references import texts

PAIR = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tokenizer_source: union\n", TokenizerSpec("union")),
        ("tokenizer_source: base\nbase_model: c\n", TokenizerSpec("base", ModelRef("c"))),
        ("tokenizer_source: ./b/\n", TokenizerSpec("model", ModelRef("b"))),
        ("tokenizer_source: {model: b}\n", TokenizerSpec("model", ModelRef("b"))),
        ("tokenizer: {}\n", TokenizerSpec("union")),
        (
            "tokenizer: {source: {model: {path: b}}, pad_to_multiple_of: 64}\n",
            TokenizerSpec("model", ModelRef("b"), (), 64),
        ),
        (
            "tokenizer:\n  source: union\n  tokens:\n    <|im_start|>: {source: b}\n"
            "    <|eot_id|>: {source: a, force: true}\n    <new>:\n    zero: {source: {kind: zero}}\n"
            "    like: {source: {kind: model_token, model: a, token: 'x.[1]'}}\n"
            "    id: {source: {kind: model_token, model: {model: b}, token_id: 7}}\n    long: {source: {model: b}}\n",
            TokenizerSpec(
                "union",
                None,
                (
                    TokenSpec("<|im_start|>", TokenSource(ModelRef("b"))),
                    TokenSpec("<|eot_id|>", TokenSource(ModelRef("a")), force=True),
                    TokenSpec("<new>"),
                    TokenSpec("zero", TokenSource()),
                    TokenSpec("like", TokenSource(ModelRef("a"), token="x.[1]")),
                    TokenSpec("id", TokenSource(ModelRef("b"), token_id=7)),
                    TokenSpec("long", TokenSource(ModelRef("b"))),
                ),
            ),
        ),
    ],
)
def test_tokenizer(text, expected):
    assert load_recipe(PAIR + text).tokenizer == expected


def test_chat_template():
    jinja = "{% for message in messages %}{{ message.content }}{% endfor %}"
    for text, expected in [
        ("auto", ChatTemplate("auto")),
        ("chatml", ChatTemplate("named", "chatml")),
        (f"'{jinja}'", ChatTemplate("jinja", jinja)),
    ]:
        assert load_recipe(f"{PAIR}chat_template: {text}\n").chat_template == expected
    assert load_recipe(PAIR).chat_template is None
    assert load_recipe(PAIR).tokenizer is None


# several documents

CHAIN = """\
name: first
merge_method: linear
base_model: origin
models: [{model: a}, {model: b}]
parameters: {weight: 1}
---
name: second
merge_method: task_arithmetic
base_model: first
models: [{model: c}]
parameters: {weight: 1}
---
merge_method: slerp
base_model: second
models: [{model: first}]
parameters: {t: 0.5}
"""


def test_several_documents():
    first, second, last = load_recipes(CHAIN)
    assert [r.name for r in (first, second, last)] == ["first", "second", None]
    assert (texts(second.models), second.earlier, str(second.origin)) == (("first", "c"), {"first": 0}, "origin")
    assert (texts(last.models), last.earlier, str(last.origin)) == (
        ("second", "first"),
        {"second": 1, "first": 0},
        "origin",
    )
    assert {r.text for r in (first, second, last)} == {CHAIN}
    again = load_recipes([r.document.value for r in (first, second, last)])
    assert [r.models for r in again] == [r.models for r in (first, second, last)]
    assert [r.models for r in load_recipes(again[-1].text)] == [r.models for r in again]
    assert texts(load_recipes("---\n" + PAIR + "---\n")[0].models) == ("a", "b")
    assert load_recipes(PAIR + "name: alone\n")[0].name == "alone"


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
@pytest.mark.parametrize("named", [False, True])
def test_documents_in_any_order(order, named):
    """The one without a name is what is written; or that which no other uses."""
    parts = CHAIN.split("---\n")
    parts[2] = ("name: last\n" if named else "") + parts[2]
    loaded = load_recipes("---\n".join(parts[i] for i in order))
    assert [r.name for r in loaded] == ["first", "second", "last" if named else None]
    assert [r.earlier for r in loaded] == [{}, {"first": 0}, {"second": 1, "first": 0}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            CHAIN.replace("name: second\n", ""),
            "the key `name` is missing: every document but the last needs one that those after it use"
            " - at $ (merge.yml:6)",
        ),
        (
            CHAIN.replace("name: second", "name: first"),
            "the name 'first' is already taken in line 1 - at $.name (merge.yml:7)",
        ),
        (
            CHAIN.replace("models: [{model: c}]", "models: [{model: second}]"),
            "'second' is the name of this document itself - at $.models[0].model (merge.yml:10)",
        ),
        (
            CHAIN.replace("{model: b}", "{model: second}"),
            "'first' is the name of a document (line 1) that builds on this one - at $.base_model (merge.yml:9)",
        ),
        (
            CHAIN.replace("base_model: second", "base_model: x"),
            "'second' is never used by another document. Only one is written: that without a name, or the last"
            " - at $.name (merge.yml:7)",
        ),
        (
            CHAIN.replace("weight: 1}\n---\nmerge", "wieght: 1}\n---\nmerge"),
            "unknown parameter `wieght` of `task_arithmetic`, did you mean `weight`? - at $.parameters (merge.yml:11)",
        ),
        (
            CHAIN.replace("name: first", "name: ''"),
            "the name of a document must not be empty - at $.name (merge.yml:1)",
        ),
    ],
)
def test_bad_documents(text, message):
    with pytest.raises(RecipeError) as error:
        load_recipes(text, file="merge.yml")
    assert str(error.value) == message


def test_a_name_of_a_document_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder beside the recipe that is called like a document above is not looked at."""
    (tmp_path / "there" / "first").mkdir(parents=True)
    (tmp_path / "there" / "merge.yml").write_text(CHAIN)
    monkeypatch.chdir(tmp_path)
    assert len(load_recipes("there/merge.yml")) == 3
