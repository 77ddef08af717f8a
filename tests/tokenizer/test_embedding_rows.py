"""Which tensors are embeddings, and where each of their rows is from when vocabularies change."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fastinterp.checkpoint.header import Entry
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import BF16
from fastinterp.tokenizer.embedding_rows import (
    PADDING,
    ZEROS,
    RowPlan,
    RowSource,
    embedding_row_count,
    embeddings,
    pack,
    plan_rows,
    row_of,
    split,
)
from fastinterp.tokenizer.vocabulary import Vocabulary, join


def vocabulary(tokens: str | dict[str, int], size: int | None = None, name: str = "m") -> Vocabulary:
    """Of the words in `tokens`, ids in their order; `size` rows if there are more."""
    ids = {t: i for i, t in enumerate(tokens.split())} if isinstance(tokens, str) else tokens
    table = {"model": {"type": "WordLevel", "vocab": ids}}
    return Vocabulary(name, Path(), len(ids) if size is None else size, ids, {}, (), table, {})


def shown(plan: RowPlan, model: int) -> list[Any]:
    """Codes as (model, row), the models of a mean, or the names of those that are neither."""
    found: list[Any] = []
    for code in plan.maps[model].codes:
        of, row = split(code)
        if code < 0:
            found.append({ZEROS: "zeros", PADDING: "padding"}[code])
        else:
            found.append(list(plan.means[row]) if of == plan.models else (of, row))
    return found


def union(*models: Vocabulary, base: int | None = 0, **more: Any) -> RowPlan:
    joined = join(models[0], models[1:])
    return plan_rows(joined, models, len(models), more.pop("size", joined.end), base=base, **more)


def entry(name: str, *shape: int) -> Entry:
    return Entry(name, BF16, shape, 0, 0, 0)


# --- which tensors ---------------------------------------------------------------------------------------------------


def test_embeddings_of_many_families():
    """Llama, GPT-2, NeoX, BLOOM, T5, Mamba, Phi's bias, Falcon, consolidated Llama, CLIP's text."""
    yes = [
        entry("model.embed_tokens.weight", 50, 8), entry("lm_head.weight", 50, 8), entry("lm_head.bias", 50),
        entry("transformer.wte.weight", 50, 8), entry("gpt_neox.embed_in.weight", 50, 8), entry("shared.weight", 50, 8),
        entry("transformer.word_embeddings.weight", 50, 8), entry("embed_out.weight", 50, 8),
        entry("backbone.embeddings.weight", 50, 8), entry("tok_embeddings.weight", 50, 8), entry("output.weight", 50),
        entry("text_model.embeddings.token_embedding.weight", 50, 8), entry("cls.predictions.decoder.weight", 50, 8),
    ]  # fmt: skip
    no = [
        entry("transformer.wpe.weight", 64, 8), entry("model.layers.0.mlp.up_proj.weight", 50, 8),
        entry("model.embed_tokens_per_layer.weight", 50, 8), entry("lm_head.scale", 1),
        entry("vision.embeddings.x", 9, 8), entry("decoder.weight", 49, 8), entry("head.weight", 50, 8, 2),
        entry("weight", 50, 8),
    ]  # fmt: skip
    tensors = {e.name: e for e in yes + no}
    assert embeddings(tensors, 50) == tuple(e.name for e in yes)
    assert embeddings(tensors, 51) == ()


def test_rows_without_a_configuration():
    """Those of the input embedding, as its name tells."""
    tensors = {e.name: e for e in (entry("lm_head.weight", 51, 8), entry("a.embed_tokens.weight", 50, 8))}
    assert embedding_row_count(tensors) == 50
    assert embeddings(tensors, None) == ("a.embed_tokens.weight",)
    assert embedding_row_count({"x.weight": entry("x.weight", 50, 8)}) is None


# --- rows ------------------------------------------------------------------------------------------------------------


def test_same_vocabularies_keep_their_rows():
    plan = union(vocabulary("a b c", 5), vocabulary("a b c", 5), size=5)
    assert [m.is_own(i, 5) for i, m in enumerate(plan.maps)] == [True, True]
    assert not plan.maps[1].is_own(1, 4) and not plan.maps[1].is_own(0, 5)


def test_order_of_tokens_is_followed():
    plan = union(vocabulary("a b c"), vocabulary("c a b"))
    assert shown(plan, 0) == [(0, 0), (0, 1), (0, 2)]
    assert shown(plan, 1) == [(1, 1), (1, 2), (1, 0)]


def test_fallbacks():
    """a: all have it. b: base and one. c: the base alone. d: two others. e: one other."""
    base, x, y = vocabulary("a b c"), vocabulary("a b d"), vocabulary("a d e")
    plan = union(base, x, y)
    mean = [(1, 2), (2, 1)]
    assert shown(plan, 0) == [(0, 0), (0, 1), (0, 2), mean, (2, 2)]
    assert shown(plan, 1) == [(1, 0), (1, 1), (0, 2), (1, 2), (2, 2)]
    assert shown(plan, 2) == [(2, 0), (0, 1), (0, 2), (2, 1), (2, 2)]
    assert plan.zeros == () and len(plan.means) == 1


def test_without_a_base_the_mean_counts():
    """b is in the first two models only: the third gets their mean."""
    plan = union(vocabulary("a b"), vocabulary("b a"), vocabulary("a"), base=None)
    assert shown(plan, 2) == [(2, 0), [(0, 1), (1, 0)]]


def test_token_of_no_model_is_zeros():
    """As a vocabulary of a model that is not merged makes them: its rows do not count."""
    other, x, y = vocabulary("a n"), vocabulary("a"), vocabulary("a")
    plan = plan_rows(join(other), [x, y, other], 2, 2, base=None)
    assert (shown(plan, 0), shown(plan, 1), plan.zeros) == ([(0, 0), "zeros"], [(1, 0), "zeros"], ("n",))


def test_base_that_is_not_merged_counts():
    base, x = vocabulary("a n"), vocabulary("a")
    assert shown(plan_rows(join(base), [x, base], 1, 2, base=1), 0) == [(0, 0), (1, 1)]


def test_vocabulary_of_one_model_drops_what_it_does_not_have():
    x, y = vocabulary("a b c"), vocabulary("c x a")
    plan = plan_rows(join(y), [x, y], 2, 3, base=0)
    assert shown(plan, 0) == [(0, 2), (1, 1), (0, 0)]
    assert shown(plan, 1) == [(1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize("force", [False, True])
def test_chosen_rows(force):
    """For models without the token, or with force for all; `t` is token 2 of the first and unknown to the second."""
    x, y = vocabulary("a b t"), vocabulary("a b")
    for source, want in ((RowSource(None, force=force), "zeros"), (RowSource(1, 0, force), (1, 0))):
        plan = union(x, y, chosen={"t": source})
        assert shown(plan, 0)[2] == (want if force else (0, 2))
        assert shown(plan, 1)[2] == want
        assert plan.zeros == ()


def test_chosen_token_that_no_model_has():
    x, y = vocabulary("a b"), vocabulary("a b")
    joined = join(x, [y], [("t", None)])
    plan = plan_rows(joined, [x, y], 2, 3, base=0, chosen={"t": RowSource(1, 1)})
    assert shown(plan, 0) == [(0, 0), (0, 1), (1, 1)] and plan.zeros == ()
    assert plan_rows(joined, [x, y], 2, 3, base=0).zeros == ("t",)


def test_kept_padding_is_the_models_own_or_the_bases():
    """The row that is padding in one model may be a token in another: then it is not its padding."""
    x, y, z = vocabulary("a b", 4), vocabulary("b a c", 4), vocabulary("a b")
    plan = plan_rows(join(x), [x, y, z], 3, 4, base=0)
    assert shown(plan, 0) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert shown(plan, 1) == [(1, 1), (1, 0), (0, 2), (1, 3)]
    assert shown(plan, 2) == [(2, 0), (2, 1), (0, 2), (0, 3)]


def test_new_tokens_take_the_place_of_padding():
    plan = union(vocabulary("a", 4), vocabulary("a n"), size=4)
    assert shown(plan, 0) == [(0, 0), (1, 1), (0, 2), (0, 3)]


def test_padding_to_a_multiple_is_a_mean():
    plan = union(vocabulary("a b", 4), vocabulary("a b", 4), size=4, keep_padding=False)
    assert shown(plan, 0) == [(0, 0), (0, 1), "padding", "padding"]


def test_gap_in_the_ids_is_padding():
    x = vocabulary({"a": 0, "c": 2}, 3)
    for keep, want in ((True, (0, 1)), (False, "padding")):
        plan = plan_rows(join(x), [x], 1, 3, base=0, keep_padding=keep)
        assert shown(plan, 0) == [(0, 0), want, (0, 2)]


def test_two_tokens_of_one_id():
    """The first names the row, in models that have the other, too."""
    x, y = vocabulary({"a": 0, "b": 0}, 1), vocabulary("b a")
    assert shown(plan_rows(join(x), [x, y], 2, 1, base=0), 1) == [(1, 1)]


def test_row_ofs():
    models = [vocabulary("a b", 4, name="models/x")]
    assert row_of(models, 0, "b", "t") == 1
    assert row_of(models, 0, 3, "t") == 3
    with pytest.raises(CheckpointError, match="models/x has no token `c`, which `tokens` names as the source of `t`"):
        row_of(models, 0, "c", "t")
    with pytest.raises(CheckpointError, match=r"has no row 4 \(it has 4\)"):
        row_of(models, 0, 4, "t")


def test_codes():
    assert split(pack(63, 2**40 - 1)) == (63, 2**40 - 1)
    assert split(pack(0, 0)) == (0, 0)


def test_large_union_is_planned_at_once():
    """Three vocabularies of 100 000 tokens, half of them shared: a bound that only a quadratic plan breaks."""
    models = [
        vocabulary({f"t{i if i < 50_000 else (k, i)}": i for i in range(100_000)}, name=f"m{k}") for k in range(3)
    ]
    start = time.perf_counter()
    plan = union(*models)
    assert plan.size == 200_000
    assert time.perf_counter() - start < 10
