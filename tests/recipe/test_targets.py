"""Which tensors a recipe makes, of which inputs, with which parameters: from names alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest

from fastinterp.errors import RecipeError, ShapeError
from fastinterp.recipe.layer_config import config_of_layers
from fastinterp.recipe.load import load_recipe
from fastinterp.recipe.targets import Assembly, LayerCount, Target, targets
from tests.support import architectures as arch
from tests.support.references import texts

STACK = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
"""


def made(recipe: str, *names: Collection[str]) -> dict[str, Target]:
    return {t.name: t for t in targets(load_recipe(recipe), names)}


def refused(recipe: str, *names: Collection[str]) -> str:
    with pytest.raises(RecipeError) as error:
        targets(load_recipe(recipe, file="merge.yml"), names)
    return str(error.value)


def test_whole_models():
    """Every tensor of the lead model, in its order, from all of them; equal parameters are one object."""
    recipe = load_recipe(
        "merge_method: task_arithmetic\nbase_model: c\nmodels: [{model: a}]\nparameters: {weight: 2}\n"
    )
    found = targets(recipe, [arch.llama(), arch.llama()[::-1]])
    assert [t.name for t in found] == arch.llama()
    assert {t.inputs for t in found} == {((0, t.name), (1, t.name)) for t in found}
    assert len({id(t.parameters) for t in found}) == 1
    assert found[0].parameters == {"weight": (2.0,), "normalize": False, "lambda_": 1.0, "int8_mask": False}
    assert {t.name: (t.layer, t.layers) for t in found if "q_proj" in t.name or "norm.w" in t.name} == {
        **{f"model.layers.{i}.self_attn.q_proj.weight": (i, 4) for i in range(4)},
        **{f"model.layers.{i}.input_layernorm.weight": (i, 4) for i in range(4)},
        **{f"model.layers.{i}.post_attention_layernorm.weight": (i, 4) for i in range(4)},
        "model.norm.weight": (None, 0),
    }
    assert all(t.has_base and not t.copies for t in found)


def test_models_that_differ():
    recipe = load_recipe("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n")
    with pytest.raises(ShapeError) as error:
        targets(recipe, [arch.llama(), arch.llama(tied=True)])
    assert str(error.value) == (
        "the models have different tensors: a alone has lm_head.weight. `missing: base` in the recipe (--missing base) "
        "takes what not all have from a and leaves out what that lacks, `missing: skip` leaves out all of it, and "
        "`modules` merges parts of models"
    )


def test_stacking():
    """Layers are numbered anew; what comes before them is the first slice's, what comes after them the last's."""
    found = made(STACK, arch.llama(), arch.llama(5))
    assert list(found) == arch.llama(6)
    assert found["model.embed_tokens.weight"].inputs == ((0, "model.embed_tokens.weight"),)
    assert found["model.norm.weight"].inputs == ((1, "model.norm.weight"),)
    assert found["lm_head.weight"].inputs == ((1, "lm_head.weight"),)
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert [found[name.format(i)].inputs for i in range(6)] == [
        *(((0, name.format(i)),) for i in (0, 1, 2)),
        *(((1, name.format(i)),) for i in (1, 2, 3)),
    ]
    assert [(t.layer, t.layers) for t in found.values() if "q_proj" in t.name] == [(i, 6) for i in range(6)]
    assembly = Assembly(load_recipe(STACK), [arch.llama(), arch.llama(5)])
    assert assembly.counts == [LayerCount("model.layers", 4, (0, 1, 2, 1, 2, 3), (0, 0, 0, 1, 1, 1), (4, 5))]


def test_one_model_many_times():
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"  - sources: [{{model: a, layer_range: [{a}, {a + 2}]}}]\n" for a in (0, 1, 2)
    )
    assert texts(load_recipe(text).models) == ("a",)
    assert list(made(text, arch.gpt2())) == arch.gpt2(6)


def test_a_slice_of_all_layers_changes_no_count():
    text = "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 4]}]\n"
    assert Assembly(load_recipe(text), [arch.llama()]).counts == []


def test_slices_of_several_sources_with_a_base():
    """A base that no slice lists has the same layers as the others; a lone source is copied."""
    text = (
        "merge_method: ties\nbase_model: base\nparameters: {weight: 1}\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 1]}]\n"
        "  - sources: [{model: a, layer_range: [1, 3]}, {model: b, layer_range: [1, 3]}]\n"
        "  - sources: [{model: a, layer_range: [3, 4]}, {model: base, layer_range: [2, 3]}]\n"
    )
    recipe = load_recipe(text)
    assert texts(recipe.models) == ("base", "a", "b")
    found = made(text, arch.llama(), arch.llama(), arch.llama())
    name = "model.layers.{}.mlp.up_proj.weight"
    assert [tuple((i, n) for i, n in found[name.format(k)].inputs) for k in range(4)] == [
        ((1, name.format(0)),),
        tuple((i, name.format(1)) for i in (0, 1, 2)),
        tuple((i, name.format(2)) for i in (0, 1, 2)),
        ((0, name.format(2)), (1, name.format(3))),
    ]
    assert [found[name.format(k)].copies for k in range(4)] == [True, False, False, False]
    assert [found[name.format(k)].parameters.get("weight") for k in range(4)] == [None, (1.0, 1.0), (1.0, 1.0), (1.0,)]
    assert [i for i, _ in found["model.embed_tokens.weight"].inputs] == [1]
    assert [i for i, _ in found["lm_head.weight"].inputs] == [0, 1]


def test_gradients_count_the_layers_of_their_slice():
    text = "merge_method: slerp\nbase_model: a\nparameters: {t: [0, 1]}\nslices:\n" + "".join(
        f"  - sources: [{{model: a, layer_range: [{a}, {b}]}}, {{model: b, layer_range: [{a}, {b}]}}]\n"
        for a, b in ((0, 3), (3, 4))
    )
    found = made(text, arch.llama(), arch.llama())
    layer = "model.layers.{}.mlp.up_proj.weight"
    assert [found[layer.format(i)].parameters["t"] for i in range(4)] == [0.0, 0.5, 1.0, 1.0]
    assert found["model.embed_tokens.weight"].parameters["t"] == 0.0
    assert found["lm_head.weight"].parameters["t"] == 0.0  # the first number, although its slice has one layer


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (arch.llama(5), {"model.layers.0.": 0.0, "model.layers.1.": 0.25, "model.layers.4.": 1.0, "lm_head": 0.0}),
        (arch.llama(1), {"model.layers.0.": 1.0, "model.norm": 0.0}),
        (arch.gemma3_vision(3, 5), {"language_model.model.layers.1.": 0.5, "layers.4.": 1.0, "projector": 0.0}),
        (arch.t5(3), {"encoder.block.1.": 0.5, "decoder.block.2.": 1.0, "shared": 0.0, "final_layer_norm": 0.0}),
        (arch.flux(2, 3), {"double_blocks.1.": 1.0, "single_blocks.1.": 0.5, "_in": 0.0}),
        (arch.mixtral(3, 4), {"layers.1.": 0.5, "layers.2.block_sparse_moe.experts.0.": 1.0}),
    ],
    ids=["llama", "one layer", "gemma3", "t5", "flux", "mixtral"],
)
def test_gradients_over_whole_models(names, values):
    """Each stack by itself; what is in none gets the first number, and so does no tensor of a layer beside layer 0."""
    text = "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: [0, 1]}\n"
    found = made(text, names, names)
    for part, value in values.items():
        assert {t.parameters["t"] for t in found.values() if part in t.name} == {value}, part


def test_filters_look_at_the_input_or_at_the_output():
    """Per-model values at the input's name, those of the whole merge at the output's."""
    text = (
        "merge_method: task_arithmetic\nbase_model: a\nslices:\n"
        + "".join(
            f"  - sources: [{{model: a, layer_range: [{k}, {k + 1}]}}, {{model: b, layer_range: [{k + 1}, {k + 2}]}}]\n"
            for k in (2, 0)
        )
        + "parameters:\n  weight: [{filter: layers.3., value: 3}, {filter: layers.1., value: 5}, {value: 0.5}]\n"
        "  lambda: [{filter: layers.0., value: 7}]\n"
    )
    found = made(text, arch.llama(), arch.llama())
    layer = "model.layers.{}.mlp.up_proj.weight"
    assert [found[layer.format(i)].parameters["weight"] for i in (0, 1)] == [(3.0,), (5.0,)]
    assert [found[layer.format(i)].parameters["lambda_"] for i in (0, 1)] == [7.0, 1.0]
    assert found["lm_head.weight"].parameters["weight"] == (0.5,)


def test_precedence():
    """Source, then slice, then module, then top, then default: the first that covers the tensor."""
    text = """\
merge_method: task_arithmetic
base_model: a
modules:
  vision_tower: {models: [{model: a}, {model: b}]}
  multi_modal_projector: {models: [{model: b}], parameters: {normalize: true}}
  language_model:
    parameters: {weight: [{filter: o_proj, value: 3}], lambda: [{filter: k_proj, value: 30}]}
    slices:
      - parameters: {weight: [{filter: k_proj, value: 2}], lambda: [{filter: q_proj, value: 20}]}
        sources:
          - {model: a, layer_range: [0, 3]}
          - {model: b, layer_range: [0, 3], parameters: {weight: [{filter: q_proj, value: 1}]}}
parameters:
  weight: 4
"""
    names = arch.gemma3_vision()
    found = made(text, names, names)
    start = "language_model.model.layers.1.self_attn."
    at = {p: found[f"{start}{p}_proj.weight"].parameters for p in "qkov"}
    assert {p: (at[p]["weight"], at[p]["lambda_"]) for p in "qkov"} == {
        "q": ((1.0,), 20.0), "k": ((2.0,), 30.0), "o": ((3.0,), 1.0), "v": ((4.0,), 1.0),
    }  # fmt: skip
    assert found["multi_modal_projector.mm_soft_emb_norm.weight"].parameters["normalize"] is True
    assert found["vision_tower.vision_model.post_layernorm.weight"].parameters["normalize"] is False
    assert set(found) == set(names)


MODULES = """\
merge_method: passthrough
modules:
  text_decoder:
    slices:
      - sources: [{model: a, layer_range: [0, 2]}]
      - sources: [{model: b, layer_range: [1, 3]}]
  vision_tower: {models: [{model: a}]}
  multi_modal_projector: {models: [{model: b}]}
"""


def test_modules_of_a_vision_language_model():
    """The form of mergekit's issue 632, under mergekit's names and where they start with `model.`."""
    for lead in ("", "model."):
        names = [lead + name for name in arch.gemma3_vision()]
        found = made(MODULES, names, names)
        assert next(iter(found)) == f"{lead}language_model.model.embed_tokens.weight"
        assert {t.inputs[0][0] for t in found.values() if "vision_tower" in t.name} == {0}
        assert {t.inputs[0][0] for t in found.values() if "projector" in t.name} == {1}
        assert set(found) == {lead + name for name in arch.gemma3_vision(text=4)}


def test_a_text_decoder_by_any_name():
    text = MODULES.replace("multi_modal_projector: {models: [{model: b}]}", "visual.merger: {models: [{model: b}]}")
    text = text.replace("vision_tower", "visual.patch_embed: {models: [{model: a}]}\n  visual.blocks")
    found = made(text, arch.qwen2_vl(), arch.qwen2_vl())
    assert set(found) == set(arch.qwen2_vl())
    assert found["lm_head.weight"].inputs == ((1, "lm_head.weight"),)
    everything = "merge_method: passthrough\nmodules: {default: {models: [{model: a}]}}\n"
    assert list(made(everything, arch.clip())) == arch.clip()


def test_what_no_module_names():
    """It comes from base_model, which is read for it even where the method has no base; without one it is an error."""
    text = MODULES.replace("  multi_modal_projector: {models: [{model: b}]}\n", "")
    names = arch.gemma3_vision()
    assert refused(text, names, names) == (
        "no module takes multi_modal_projector.* (2 tensors) of a. Name a module for them, or write `base_model`, from"
        " which they are copied then - at $.modules (merge.yml:2)"
    )
    text += "base_model: c\n"
    assert texts(load_recipe(text).models) == ("a", "b", "c")
    found = made(text, names, names, names)
    name = "multi_modal_projector.mm_soft_emb_norm.weight"
    assert found[name] == Target(name, ((2, name),), {}, copies=True)
    assert set(found) == set(arch.gemma3_vision(text=4))


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        (
            STACK.replace("[1, 4]", "[1, 5]"),
            arch.llama(),
            "`layer_range` [1, 5] goes beyond the 4 layers of b - at $.slices[1].sources[0].layer_range (merge.yml:4)",
        ),
        (STACK, ["x.weight"], "slices need one stack of layers, but a has no layers - at $.slices (merge.yml:2)"),
        (
            STACK,
            arch.sdxl(),
            "slices need one stack of layers, but a has several stacks of layers: model.diffusion_model.input_blocks"
            " (9), model.diffusion_model.output_blocks (9). Name them under `modules` - at $.slices (merge.yml:2)",
        ),
        (
            MODULES.replace("vision_tower", "tower"),
            arch.gemma3_vision(),
            "no tensor's name starts with the module's, `tower`. They start with language_model,"
            " multi_modal_projector, vision_tower - at $.modules.tower (merge.yml:7)",
        ),
        (
            MODULES.replace("multi_modal_projector", "vision_tower.vision_model"),
            arch.gemma3_vision(),
            "two modules take the tensor vision_tower.vision_model.embeddings.patch_embedding.weight"
            " - at $.modules (merge.yml:2)",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"
            "parameters:\n  weight: [{filter: mlp, value: 1}]\n",
            arch.llama(),
            "`weight` has no value for the tensor 'model.embed_tokens.weight': no filter matches it. Add `- value: ...`"
            " as the last item - at $.parameters.weight (merge.yml:4)",
        ),
    ],
)
def test_what_is_not_there(text, names, message):
    assert refused(text, names, names) == message


def test_models_with_other_layers():
    assert refused(STACK, arch.llama(), arch.gpt2()) == (
        "b has no layers model.layers.0, model.layers.1, ... - at $.slices[1].sources[0] (merge.yml:4)"
    )
    text = (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 1]}, {model: a2, layer_range: [0, 1]}]\n"
        "  - sources: [{model: a, layer_range: [0, 1]}, {model: a2, layer_range: [1, 2]}]\n"
    )
    with pytest.raises(ShapeError) as error:
        targets(load_recipe(text), [arch.deepseek(), arch.deepseek()])
    assert str(error.value).startswith(
        "the models have different tensors: a alone has mlp.gate_proj.weight, mlp.up_proj.weight in layer 0; a2 alone"
        " has mlp.experts.* ("
    )


COUNT = [LayerCount("model.layers", 4, (0, 1, 2, 1, 2, 3))]


@pytest.mark.parametrize(
    ("config", "counts", "new", "changed"),
    [
        ({"num_hidden_layers": 4, "x": [4]}, COUNT, {"num_hidden_layers": 6, "x": [4]}, ["num_hidden_layers 4 -> 6"]),
        ({"n_layer": 4, "n_head": 4}, COUNT, {"n_layer": 6, "n_head": 4}, ["n_layer 4 -> 6"]),
        (
            {"num_hidden_layers": 4, "layer_types": ["s", "s", "s", "f"]},
            COUNT,
            {"num_hidden_layers": 6, "layer_types": ["s", "s", "s", "s", "s", "f"]},
            ["num_hidden_layers 4 -> 6", "layer_types follows the layers"],
        ),
        (
            {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}},
            [LayerCount("model.language_model.layers", 4, (0,))],
            {"text_config": {"num_hidden_layers": 1}, "vision_config": {"num_hidden_layers": 4}},
            ["text_config.num_hidden_layers 4 -> 1"],
        ),
        (
            {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}},
            [LayerCount("vision_tower.vision_model.encoder.layers", 4, (0, 1))],
            {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 2}},
            ["vision_config.num_hidden_layers 4 -> 2"],
        ),
        (
            {"num_layers": 4, "num_decoder_layers": 4},
            [LayerCount("decoder.block", 4, (0, 1))],
            {"num_layers": 4, "num_decoder_layers": 2},
            ["num_decoder_layers 4 -> 2"],
        ),
        (
            {"num_layers": 4, "num_decoder_layers": 4},
            [LayerCount("encoder.block", 4, (0, 1))],
            {"num_layers": 2, "num_decoder_layers": 4},
            ["num_layers 4 -> 2"],
        ),
        ({"hidden_size": 4}, COUNT, {"hidden_size": 4}, []),
    ],
)
def test_configuration_of_a_stack(config: Any, counts: Sequence[LayerCount], new: Any, changed: Any):
    made = config_of_layers(config, counts)
    assert (made.config, made.changes) == (new, changed)
    assert bool(made.warnings) == (not changed)


def test_slices_that_make_too_many_layers(monkeypatch):
    """Before their tensors are listed."""
    monkeypatch.setattr("fastinterp.recipe.targets.MAX_LAYERS", 5)
    assert refused(STACK, arch.llama(), arch.llama()) == (
        "the slices have more than 5 layers up to here. Use fewer - at $.slices[1] (merge.yml:4)"
    )
