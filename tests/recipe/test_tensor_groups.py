"""Names of tensors in messages: by what they have in common."""

from __future__ import annotations

import pytest

from fastinterp.recipe.tensor_groups import different_tensors, grouped, missing_tensors

LAYERS = [f"model.layers.{i}.{part}.weight" for i in range(12) for part in ("q_proj", "k_proj")]


@pytest.mark.parametrize(
    ("names", "others", "text"),
    [
        ([f"vae.{i}.w" for i in range(248)] + ["ema.decay"], LAYERS, "vae.* (248 tensors), ema.decay"),
        ([f"model.layers.{i}.inv_freq" for i in range(12)], LAYERS, "model.layers.{0-11}.inv_freq (12 tensors)"),
        (LAYERS[20:], LAYERS[:20], "model.layers.{10,11}.* (4 tensors)"),
        ([f"model.layers.{i}.mlp.{e}.w" for i in (0, 2, 5) for e in (0, 1)], LAYERS,
         "model.layers.{0,2,5}.mlp.* (6 tensors)"),
        (["a", "b.c"], [], "a, b.c"),
        ([], LAYERS, ""),
        ([f"{x}.w" for x in "abcdefgh"], [], "a.w, b.w, c.w, d.w, e.w, f.w and 2 more"),
    ],
)  # fmt: skip
def test_groups(names, others, text):
    assert grouped(names, others) == text


def test_models_without_a_common_name_say_so():
    text = different_tensors(("a", "", LAYERS), ("b", "", ["x.y", "x.z"]), "a")
    assert text == (
        "the models have no tensor name in common: a has model.* (24 tensors); b has x.* (2 tensors). They are "
        "different models, or other parts of one. Name two that belong together"
    )


def test_what_became_of_tensors_that_not_all_have():
    made = ["m.a", "m.b", "vae.x"]
    assert missing_tensors({"vae.x": (), "ema.y": ()}, made, "base") == (
        "copied from base, because not all models have it in one shape: vae.x",
        "left out, because not all models have it in one shape: ema.y",
    )
    left = {"vae.x": ("ft",), "vae.y": ("ft",), "ema.y": ("base", "b"), "ema.z": ()}
    assert missing_tensors(left, [*made, "vae.y"], "base") == (
        "copied from base, because ft lacks them: vae.* (2 tensors)",
        "left out, because base, b lack it: ema.y",
        "left out, because not all models have it in one shape: ema.z",
    )
    assert missing_tensors({f"ema.{i}": (f"ft{i}",) for i in range(5)}, made, "base") == (
        "left out, because not all models have them in one shape: ema.* (5 tensors)",
    )
