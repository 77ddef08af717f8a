"""Merges of several documents: what is folded and what is made, byte for byte; and what is read and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastinterp
from fastinterp.errors import RecipeError, UsageError
from fastinterp.execute.jobs.chained_job import ScratchFile
from fastinterp.ops.dtypes import BF16, F32
from fastinterp.output.receipt import RECEIPT
from tests.support.checkpoints import (
    assert_same,
    family,
    floats,
    moved,
    read,
    receipt,
    recipe,
    saved,
    weights,
)


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    return saved(tmp_path / "in", family(3))


@pytest.fixture
def llamas(tmp_path: Path) -> list[str]:
    """Three fine-tunes of one model with four layers, bf16."""
    shapes = {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,)}
    for i in range(4):
        shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (24, 16), f"model.layers.{i}.norm.weight": (16,)}
    base = {name: weights(seed, BF16, shape) for seed, (name, shape) in enumerate(shapes.items())}
    tunes = [{n: moved(t, 100 * i + k) for k, (n, t) in enumerate(base.items())} for i in range(3)]
    return saved(tmp_path / "in", tunes)


def models(*names: str, **parameters: Any) -> list[dict[str, Any]]:
    return [{"model": name, **({"parameters": parameters} if parameters else {})} for name in names]


def one_by_one(documents: list[dict[str, Any]], folder: Path, **keys: Any) -> tuple[Path, Any]:
    """Every document as a merge of its own, the earlier ones stored in float32: what a chain must be equal to."""
    there: dict[str, str] = {}
    for i, document in enumerate(documents):
        text = json.dumps({k: v for k, v in document.items() if k != "name"})
        for name, path in there.items():
            text = text.replace(f'"{name}"', json.dumps(path))
        last = i == len(documents) - 1
        values = json.loads(text) if last else {"dtype": "float32"} | json.loads(text)
        report = fastinterp.merge(values, folder / str(i), **(keys if last else {}))
        there[document.get("name", "")] = str(folder / str(i))
    return folder / str(len(documents) - 1), report


def chain(documents: list[dict[str, Any]], out: Path, **keys: Any) -> Any:
    """The merge, with bytes read as `explain` foresees them."""
    report = fastinterp.merge(documents, out, **keys)
    plan = fastinterp.explain(documents, **keys)
    assert report.bytes_read == plan.bytes_read
    assert report.bytes_written == plan.bytes_written
    return report


def test_sums_of_sums_are_one_sum(tmp_path, three):
    """0.5 * (0.25 a + 0.75 b) + 0.5 c: one pass, and the same bytes as the sum with these coefficients."""
    a, b, c = three
    documents = [
        {
            "name": "first",
            "merge_method": "linear",
            "models": [*models(a, weight=0.25), *models(b, weight=0.75)],
            "dtype": "bfloat16",
        },
        recipe("linear", ["first", c], parameters={"weight": 0.5}, dtype="bfloat16"),
    ]
    one = recipe("linear", three, weights=[0.125, 0.375, 0.5], dtype="bfloat16")
    report = chain(documents, tmp_path / "out")
    fastinterp.merge(one, tmp_path / "one")
    assert_same(read(tmp_path / "one"), read(tmp_path / "out"))
    assert report.bytes_read == fastinterp.explain(one).bytes_read
    assert report.inputs == 3
    found = receipt(tmp_path / "out")
    assert found["models"] == [Path(name).name for name in three]
    assert found["coefficients"] == {"weights": [0.125, 0.375, 0.5], "base": None, "sums_to_one": True}
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"| `{Path(name).name}` |" in card for name in three)
    text = str(fastinterp.explain(documents))
    assert "out = 0.5*x3 + 0.5*x2" in text and "x3 = 0.25*x0 + 0.75*x1, first" in text and "made" not in text


def test_task_vectors_of_a_sum(tmp_path, llamas):
    """The base of the base is the pivot, and a gradient makes coefficients of each tensor's own."""
    a, b, c = llamas
    documents = [
        {"name": "up", "merge_method": "task_arithmetic", "base_model": a, "models": models(b, weight=[0.0, 0.8])},
        {"name": "more", "merge_method": "task_arithmetic", "base_model": "up", "models": models(c, weight=0.5)},
        {"merge_method": "passthrough", "models": models("more")},
    ]
    chain(documents, tmp_path / "out", dtype="float32")
    plan = fastinterp.explain(documents)
    assert plan.bytes_made == 0
    rows = {t.name: t for t in plan.tensors}
    for layer, weight in enumerate((0.0, 0.8 / 3, 1.6 / 3, 0.8)):
        row = rows[f"model.layers.{layer}.norm.weight"].rows[0]
        assert (row.pivot, row.total) == (0, 1.0)
        assert [w for _, w in row.terms] == pytest.approx([weight * 0.5, 0.5] if weight else [0.5], rel=1e-15)
    made, one = read(tmp_path / "out"), [read(Path(m)) for m in llamas]
    for name, t in made.items():
        layer = int(name.split(".")[2]) if "layers" in name else 0
        x, y, z = (floats(m[name]) for m in one)
        up = x + 0.8 / 3 * layer * (y - x)
        np.testing.assert_allclose(floats(t), up + 0.5 * (z - up), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_cannot_be_folded_is_made_first(tmp_path, dtype):
    """slerp of a sum and a slerp: the same bytes as of float32 checkpoints; what is made is read again, and counted."""
    finite = [{n: t for n, t in model.items() if not n.startswith("patterns")} for model in family(3)]
    a, b, c = saved(tmp_path / "in", finite)
    documents: list[dict[str, Any]] = [
        {"name": "sum", "merge_method": "linear", "models": models(a, b, weight=1.0)},
        {"name": "arc", "merge_method": "slerp", "base_model": a, "models": models(c), "parameters": {"t": 0.4}},
        {"merge_method": "slerp", "base_model": "sum", "models": models("arc"), "parameters": {"t": 0.5}},
    ]
    want = read(one_by_one(documents, tmp_path / "apart", dtype=dtype)[0])
    wide = "model.layers.2.v.weight"  # made in float64, which float32 checkpoints cannot hold
    for threads in (1, 3):
        report = fastinterp.merge(documents, tmp_path / "out", force=True, threads=threads, dtype=dtype)
        got = read(tmp_path / "out")
        assert_same({n: t for n, t in want.items() if n != wide}, {n: t for n, t in got.items() if n != wide})
    plan = fastinterp.explain(documents)
    assert plan.bytes_made > 0 and report.bytes_read == plan.bytes_read
    assert report.inputs == 3
    found = plan.tensors[[t.name for t in plan.tensors].index("model.embed_tokens.weight")]
    assert [t.dtype for t in found.before] == [F32, F32]
    assert found.bytes_read == 4 * 4 * 97 * 64  # measured and combined, both in float32
    assert [t.bytes_read for t in found.before] == [2 * 2 * 97 * 64, 4 * 2 * 97 * 64]
    assert "x3 = sum: " in str(plan) and "x4 = arc: " in str(plan) and "in a temporary file" in str(plan)
    assert not [
        p for p in (tmp_path / "out").iterdir() if p.suffix not in (".safetensors", ".md") and p.name != RECEIPT
    ]


def test_random_keeps_and_stacks_above(tmp_path, llamas):
    """Layers of a merge that draws random numbers, stacked anew, are those of that merge: no number is drawn anew."""
    a, b, c = llamas
    documents: list[dict[str, Any]] = [
        {
            "name": "drop",
            "merge_method": "dare_ties",
            "base_model": a,
            "seed": 7,
            "models": models(b, c, weight=0.5, density=0.5),
        },
        {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": "drop", "layer_range": r}]} for r in ([0, 3], [1, 4])],
        },
    ]
    report = chain(documents, tmp_path / "out")
    assert fastinterp.explain(documents).bytes_made == 0, "a copy of what a method makes is made in its place"
    apart = {**documents[0], "dtype": "bfloat16"}
    fastinterp.merge({k: v for k, v in apart.items() if k != "name"}, tmp_path / "drop")
    made = read(tmp_path / "drop")
    want = {n: t for n, t in made.items() if ".layers." not in n}
    for to, layer in enumerate((0, 1, 2, 1, 2, 3)):
        for part in ("mlp.up_proj", "norm"):
            want[f"model.layers.{to}.{part}.weight"] = made[f"model.layers.{layer}.{part}.weight"]
    assert_same(want, read(tmp_path / "out"))
    assert report.inputs == 3


def test_a_named_dtype(tmp_path, llamas):
    """`out_dtype` above rounds what is made there, folded or not; `dtype` only what is stored."""
    a, b, c = llamas
    for key, method in (("out_dtype", "linear"), ("dtype", "slerp"), ("dtype", "linear")):
        first: dict[str, Any] = {"name": "first", "merge_method": "linear", "models": models(a, b, weight=1.0)}
        last = {"merge_method": method, "models": models("first", c), "parameters": {"weight": 1.0}}
        if method == "slerp":
            last |= {"base_model": "first", "models": models(c), "parameters": {"t": 0.5}}
        documents = [first | {key: "float16"}, last]
        out = tmp_path / f"{key}{method}"
        chain(documents, out, dtype="float32")
        folds = (key, method) == ("dtype", "linear")
        assert (fastinterp.explain(documents).bytes_made == 0) is folds
        if not folds:
            assert_same(read(one_by_one(documents, tmp_path / f"{key}{method}1", dtype="float32")[0]), read(out))


def test_intermediates_are_kept(tmp_path, llamas):
    """Each in a folder of its name, with what a merge of its own writes; in whatever order they stand."""
    a, b, c = llamas
    first = {"name": "first", "merge_method": "linear", "models": models(a, b, weight=1.0)}
    last = {"merge_method": "slerp", "base_model": "first", "models": models(c), "parameters": {"t": 0.5}}
    kept = tmp_path / "kept"
    fastinterp.merge([last, first], tmp_path / "out", keep_intermediates=kept)
    fastinterp.merge([first, last], tmp_path / "want")
    fastinterp.merge({k: v for k, v in first.items() if k != "name"}, tmp_path / "alone")
    assert_same(read(tmp_path / "want"), read(tmp_path / "out"))
    assert_same(read(tmp_path / "alone"), read(kept / "first"))
    with pytest.raises(UsageError, match="the document 'a/b' has no name for a folder"):
        fastinterp.merge(
            [first | {"name": "a/b"}, last | {"base_model": "a/b"}], tmp_path / "x", keep_intermediates=kept
        )


def test_the_whole_model(tmp_path, llamas):
    """Requests about the whole model see what documents above made; above, they are refused."""
    a, b, c = llamas
    paper = {"density": 0.3, "weight": 1.0, "preset": "paper"}
    documents: list[dict[str, Any]] = [
        {"name": "arc", "merge_method": "slerp", "base_model": b, "models": models(c), "parameters": {"t": 0.5}},
        {"merge_method": "ties", "base_model": a, "models": models("arc", b), "parameters": paper, "dtype": "bfloat16"},
    ]
    chain_out = tmp_path / "out"
    fastinterp.merge(documents, chain_out)
    assert_same(read(one_by_one(documents, tmp_path / "apart")[0]), read(chain_out))
    turned = [
        {"name": "trim", "merge_method": "ties", "base_model": a, "models": models(b, c), "parameters": paper},
        {"merge_method": "linear", "models": models("trim", a, weight=1.0)},
    ]
    with pytest.raises(RecipeError, match="ties looks at the whole model here, which only the last document can"):
        fastinterp.merge(turned, tmp_path / "no")


def test_side_cars_from_above(tmp_path, llamas):
    a, b, c = llamas
    documents: list[dict[str, Any]] = [
        {"name": "importance", "merge_method": "linear", "models": models(a, c, weight=1.0)},
        {
            "merge_method": "fisher",
            "models": [
                {"model": a, "parameters": {"weight": 1.0, "fisher": "importance"}},
                {"model": b, "parameters": {"weight": 1.0, "fisher": c}},
            ],
        },
    ]
    chain(documents, tmp_path / "out")
    assert_same(read(one_by_one(documents, tmp_path / "apart")[0]), read(tmp_path / "out"))


def test_integers(tmp_path, three):
    """They must agree in all models of all documents, or those of the one are taken that a document names."""
    documents = [
        {"name": "first", "merge_method": "linear", "models": models(three[0], three[1], weight=1.0)},
        recipe("linear", ["first", three[2]], parameters={"weight": 1.0}),
    ]
    plan = fastinterp.explain(documents)
    found = {t.name: t for t in plan.tensors}
    assert found["ids"].checkpoints == (0, 1, 2)
    documents[0]["integers"] = three[1]
    documents[1]["integers"] = "first"
    assert {t.name: t for t in fastinterp.explain(documents).tensors}["ids"].checkpoints == (1,)


def test_one_way_of_storing(tmp_path, llamas):
    documents = [
        {
            "name": "first",
            "merge_method": "linear",
            "models": models(*llamas[:2], weight=1.0),
            "rounding": "stochastic",
        },
        recipe("linear", ["first", llamas[2]], parameters={"weight": 1.0}),
    ]
    with pytest.raises(RecipeError, match="`rounding` is 'stochastic' here and 'nearest' in the last document"):
        fastinterp.merge(documents, tmp_path / "out")
    fastinterp.merge(documents, tmp_path / "out", rounding="stochastic")


def test_inputs_above_are_not_replaced(tmp_path, llamas):
    documents = [
        {"name": "first", "merge_method": "linear", "models": models(*llamas[:2], weight=1.0)},
        recipe("linear", ["first", llamas[2]], parameters={"weight": 1.0}),
    ]
    for path in llamas:
        with pytest.raises(fastinterp.FastinterpError, match="input"):
            fastinterp.merge(documents, path, force=True)


def test_room_is_used_again(tmp_path, llamas, monkeypatch):
    """The temporary file is no larger than what is made at a time, and is gone at the end."""
    from fastinterp.execute import rounds

    monkeypatch.setattr(rounds, "ROUND_BYTES", 1)
    sizes: list[int] = []
    free = ScratchFile.free

    def noted(self: ScratchFile, some: Any) -> None:
        sizes.append(self.size)
        free(self, some)

    monkeypatch.setattr(ScratchFile, "free", noted)
    a, b, c = llamas
    documents: list[dict[str, Any]] = [
        {"name": "sum", "merge_method": "linear", "models": models(a, b, weight=1.0)},
        {"merge_method": "slerp", "base_model": "sum", "models": models(c), "parameters": {"t": 0.5}},
    ]
    chain(documents, tmp_path / "out")
    assert len(sizes) == 10
    assert sizes[-1] <= 3 * 4096, "the largest tensor takes 2.5 KiB"
