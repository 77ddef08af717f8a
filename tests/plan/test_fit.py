"""Models that do not fit together: slices of other sizes or vocabularies in one stack, whole models of other sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fastinterp
from fastinterp.errors import ShapeError
from fastinterp.ops.dtypes import F32
from tests.support import tokens
from tests.support.checkpoints import read, weights, write

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model(
    folder: Path, seed: int, *, rows: int = 30, hidden: int = 8, inner: int = 12, layers: int = 4, wide: int = 0
) -> str:
    """A Llama. wide: so many of its first layers have a wider MLP"""
    shapes: dict[str, tuple[int, ...]] = {EMBED: (rows, hidden)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (hidden,),
            f"model.layers.{i}.self_attn.q_proj.weight": (hidden, hidden),
            f"model.layers.{i}.self_attn.q_norm.weight": (4,),
            f"model.layers.{i}.mlp.up_proj.weight": (2 * inner if i < wide else inner, hidden),
        }
    shapes |= {"model.norm.weight": (hidden,), HEAD: (rows, hidden)}
    write(folder, {name: weights(seed + k, F32, shape) for k, (name, shape) in enumerate(shapes.items())})
    config = {
        "model_type": "llama", "vocab_size": rows, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def stack(*slices: tuple[str, int, int], **keys: Any) -> dict[str, Any]:
    sources = [{"sources": [{"model": m, "layer_range": [first, end]}]} for m, first, end in slices]
    return {"merge_method": "passthrough", "slices": sources, **keys}


def refused(recipe: dict[str, Any], out: Path) -> str:
    """The error of merge, which explain and check report, too."""
    with pytest.raises(ShapeError) as caught:
        fastinterp.merge(recipe, out)
    with pytest.raises(ShapeError) as explained:
        fastinterp.explain(recipe)
    assert [error.message for error in fastinterp.check(recipe).errors] == [str(caught.value)] == [str(explained.value)]
    assert not out.exists()
    return str(caught.value)


# --- slices ----------------------------------------------------------------------------------------------------------


def test_slices_of_other_vocabularies(tmp_path):
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 50, rows=32)
    for first, last in ((a, b), (b, a)):
        said = refused(stack((first, 0, 3), (last, 1, 4)), tmp_path / "out")
        rows = {a: 30, b: 32}
        assert said.startswith(
            f"{EMBED} comes from {first} and has {rows[first]} rows, but {HEAD} comes from {last} and has {rows[last]}."
        )
    # The remedy where the models have no tokenizer.
    assert refused(stack((a, 0, 3), (b, 1, 4)), tmp_path / "out").endswith(
        f"The vocabularies differ in size: take both from one model, for example end with a slice of {a} with "
        "`layer_range: [0, 0]`"
    )
    fastinterp.merge(stack((a, 0, 3), (b, 1, 4), (a, 0, 0)), tmp_path / "ended")
    made, x, y = read(tmp_path / "ended"), read(Path(a)), read(Path(b))
    assert made[HEAD].raw.tobytes() == x[HEAD].raw.tobytes() and made[EMBED].raw.tobytes() == x[EMBED].raw.tobytes()
    up = "mlp.up_proj.weight"
    assert made[f"model.layers.3.{up}"].raw.tobytes() == y[f"model.layers.1.{up}"].raw.tobytes()
    assert f"begin with a slice of {b} with" in refused(stack((a, 0, 3), (b, 1, 4), base_model=b), tmp_path / "out")
    fastinterp.merge(stack((b, 0, 0), (a, 0, 3), (b, 1, 4), base_model=b), tmp_path / "begun")
    assert {read(tmp_path / "begun")[name].shape[0] for name in (EMBED, HEAD)} == {32}


def test_slices_of_other_vocabularies_with_tokenizers(tmp_path):
    a, b = model(tmp_path / "a", 1, rows=3), model(tmp_path / "b", 50, rows=4)
    tokens.words(Path(a), ["<unk>", "cat", "dog"])
    tokens.words(Path(b), ["<unk>", "cat", "dog", "emu"])
    recipe = stack((a, 0, 3), (b, 1, 4))
    assert refused(recipe, tmp_path / "out").endswith(
        "The vocabularies differ in size: say which one the output has, `tokenizer_source: union` or "
        "`tokenizer_source: base` in the recipe"
    )
    for source, rows in (("union", 4), ("base", 3)):
        fastinterp.merge({**recipe, "tokenizer_source": source}, tmp_path / source)
        assert {read(tmp_path / source)[name].shape[0] for name in (EMBED, HEAD)} == {rows}


@pytest.mark.parametrize(
    ("other", "says"), [({"hidden": 16}, "hidden_size 8 and 16"), ({"inner": 20}, "intermediate_size 12 and 20")]
)
def test_slices_of_other_sizes(tmp_path, other, says):
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 50, **other)
    for slices in (
        [(a, 0, 3), (b, 1, 4)],
        [(a, 0, 0), (b, 0, 4)],
        [(b, 0, 4), (a, 0, 0)],
        [(a, 0, 1), (a, 1, 2), (b, 3, 4)],
    ):
        said = refused(stack(*slices), tmp_path / "out")
        assert "layers of these models do not fit into one stack" in said and a in said and b in said
        assert slices[0][0] == b or f"({says}" in said
    assert "model.layers.N.mlp.up_proj.weight is [" in said


def test_layers_that_differ_within_a_model_are_stacked(tmp_path):
    a, b = model(tmp_path / "a", 1, wide=1), model(tmp_path / "b", 50)
    for i, (x, y) in enumerate(((a, a), (a, b), (b, a))):
        fastinterp.merge(stack((x, 0, 3), (y, 1, 4)), tmp_path / f"out {i}")
    assert read(tmp_path / "out 1")["model.layers.0.mlp.up_proj.weight"].shape == (24, 8)


# --- whole models ----------------------------------------------------------------------------------------------------


def average(*models: str, **keys: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in models], **keys}


def test_whole_models_of_other_sizes(tmp_path):
    """`missing` is not offered: nothing would be merged but vectors of the length of a head."""
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 50, hidden=16)
    said = refused(average(a, b), tmp_path / "out")
    assert said.endswith("These are models of different sizes (hidden_size 8 and 16), which do not merge")
    assert "missing" not in said
    Path(a, "config.json").unlink()
    said = refused(average(a, b), tmp_path / "out")
    assert said.endswith("These are models of different sizes, which do not merge")


def test_whole_models_of_other_sizes_and_numbers_of_layers(tmp_path):
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 50, hidden=16, layers=6)
    with pytest.raises(ShapeError) as caught:
        fastinterp.merge(average(a, b), tmp_path / "out")
    said = str(caught.value)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert "alone has model.layers.{4,5}.* (8 tensors)" in said and "missing" not in said
    assert said.endswith(
        f"What both have is of other shapes: {q} is [8, 8] in {a} but [16, 16] in {b}. These are models of different "
        "sizes (hidden_size 8 and 16), which do not merge"
    )


def test_missing_is_offered_where_matrices_are_of_one_shape(tmp_path):
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 50, inner=20)
    assert "`missing: base` in the recipe" in refused(average(a, b), tmp_path / "out")
    fastinterp.merge(average(a, b, missing="base"), tmp_path / "out")
    deep = model(tmp_path / "deep", 50, layers=5)
    with pytest.raises(ShapeError, match="`missing: base` in the recipe"):
        fastinterp.merge(average(a, deep), tmp_path / "other")
    fastinterp.merge(average(a, deep, missing="base"), tmp_path / "other")


# --- missing: skip ---------------------------------------------------------------------------------------------------


def test_a_warning_about_tensors_that_software_will_make_up(tmp_path):
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 50, rows=32)
    recipe = average(a, b, missing="skip")
    report = fastinterp.merge(recipe, tmp_path / "out")
    (warning,) = [w for w in report.warnings if "random numbers" in w]
    assert warning == (
        f"left out, because not all models have them in one shape: {EMBED}, {HEAD}. config.json, copied from {a}, "
        "describes a model that has them, so software that loads the output puts random numbers there. `missing: base` "
        f"(--missing base) copies them from {a} instead"
    )
    assert not any("left out" in remark for remark in report.remarks)
    assert warning in [w.message for w in fastinterp.check(recipe).warnings]
    report = fastinterp.merge(average(a, b, missing="base"), tmp_path / "copied")
    assert not any("random numbers" in w for w in report.warnings) and EMBED in read(tmp_path / "copied")


def test_layers_that_one_model_lacks(tmp_path):
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 50, layers=3)
    report = fastinterp.merge(average(a, b, missing="skip"), tmp_path / "out")
    (warning,) = [w for w in report.warnings if "random numbers" in w]
    assert warning.startswith(f"left out, because {b} lacks them: model.layers.3.* (4 tensors). config.json")
    # The other way round the configuration has no such layer.
    report = fastinterp.merge(average(b, a, missing="skip"), tmp_path / "fewer")
    assert not any("random numbers" in w for w in report.warnings)
    assert f"left out, because {b} lacks them: model.layers.3.* (4 tensors)" in report.remarks


def test_moving_averages_and_files_without_a_configuration_stay_notes(tmp_path):
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 50)
    with_ema = {**read(Path(a)), "model_ema.decay": weights(9, F32, (3,)), "vae.conv.weight": weights(9, F32, (3,))}
    write(Path(a), with_ema)
    report = fastinterp.merge(average(a, b, missing="skip"), tmp_path / "out")
    (warning,) = [w for w in report.warnings if "random numbers" in w]
    assert f"{b} lacks it: vae." in warning and "ema" not in warning
    assert f"left out, because {b} lacks it: model_ema.decay" in report.remarks
    Path(a, "config.json").unlink()
    report = fastinterp.merge(average(a, b, missing="skip"), tmp_path / "bare")
    assert not any("random numbers" in w for w in report.warnings)
