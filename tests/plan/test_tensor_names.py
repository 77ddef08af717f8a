"""Names of one model's tensors in another: what is aligned, and what is not guessed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from types import SimpleNamespace

import pytest

import fastinterp
from fastinterp.ops.dtypes import F32
from fastinterp.plan.tensor_names import match_names
from tests.support import architectures as arch
from tests.support.checkpoints import tensor, write

LAYERS = [f"layers.{i}.{rest}" for i in range(2) for rest in ("mlp.up_proj.weight", "norm.weight")]


def shaped(names: Iterable[str], shape: tuple[int, ...] = (4, 4)) -> dict[str, SimpleNamespace]:
    return {name: SimpleNamespace(shape=shape) for name in names}


def in_front(prefix: str, names: Iterable[str]) -> list[str]:
    return [prefix + name for name in names]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("names", [arch.llama(), arch.gpt2(), arch.t5()], ids=["llama", "gpt2", "t5"])
def test_a_prefix_of_all_names(names, prefix):
    found = match_names(shaped(in_front(prefix, names)), shaped(names))
    assert found is not None and found.names == {prefix + name: name for name in names}
    every = " and ".join(f"`{part}.`" for part in prefix.split(".")[:-1])  # all that was removed is named
    assert len(found.how) == 1 and found.how[0].startswith((f"prefix `{prefix}` removed (", f"{every} left out ("))
    back = match_names(shaped(names), shaped(in_front(prefix, names)))
    assert back is not None and back.names == {name: prefix + name for name in names}


def test_wrappers_in_the_middle():
    """Of every layer, as where each is compiled or checkpointed by itself."""
    own = [n.replace("mlp", "_checkpoint_wrapped_module.mlp._orig_mod") for n in in_front("model.", LAYERS)]
    found = match_names(shaped(own), shaped(in_front("model.", LAYERS)))
    assert found is not None and list(found.names.values()) == in_front("model.", LAYERS)
    assert found.how == ("`_checkpoint_wrapped_module.` and `_orig_mod.` left out (2 tensors)",)


def test_a_model_without_its_head():
    """What the other lacks follows the prefix only where its module does: a head has none."""
    own = [*LAYERS, "layers.0.attn.bias", "score.weight"]
    found = match_names(shaped(own), shaped([*in_front("model.", LAYERS), "lm_head.weight"]))
    assert found is not None and found.how == ("prefix `model.` added (4 tensors)",)
    assert [found.names[name] for name in own[4:]] == ["layers.0.attn.bias", "score.weight"]
    own[4] = "layers.0.mlp.bias"
    found = match_names(shaped(own), shaped([*in_front("model.", LAYERS), "lm_head.weight"]))
    assert found is not None and found.names["layers.0.mlp.bias"] == "model.layers.0.mlp.bias"


def test_several_prefixes_each_replaced():
    tower = [name.replace("layers", "blocks") for name in LAYERS]
    own = ["language_model.lm_head.weight", *in_front("language_model.model.", LAYERS), *in_front("tower.", tower)]
    other = ["lm_head.weight", *in_front("model.language_model.", LAYERS), *in_front("model.tower.", tower)]
    for a, b in ((own, other), (other, own)):
        found = match_names(shaped(a), shaped(b))
        assert found is not None and list(found.names.values()) == b and len(found.how) == 3


def test_other_spellings():
    own = ["bert.a.LayerNorm.gamma", "bert.a.LayerNorm.beta", "bert.b.weight", "c.weight_g", "c.weight_v"]
    other = ["a.LayerNorm.weight", "a.LayerNorm.bias", "b.weight"]
    other += [f"c.parametrizations.weight.original{i}" for i in range(2)]
    found = match_names(shaped(own), shaped(other))
    assert found is not None and list(found.names.values()) == other


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (LAYERS, in_front("encoder.", LAYERS) + in_front("decoder.", LAYERS)),
        (["a.x", *in_front("vision.", LAYERS)], ["a.x", *in_front("audio.", LAYERS)]),
        (["score.weight", "a.x"], ["lm_head.weight", "a.x"]),
        (["a.weight", "a.gamma"], ["a.weight", "b.gamma"]),
        (["model.layers.0.up.weight", "x"], ["model.layers.1.up.weight", "x"]),
        (["x"], ["x"]),
    ],
    ids=["two places", "other modality", "heads", "two spellings of one name", "other layers", "the same"],
)
def test_nothing_is_guessed(own, other):
    assert match_names(shaped(own), shaped(other)) is None


def test_shapes_decide_between_two_places():
    """And of embeddings with other numbers of rows it is the names alone."""
    own = {**shaped(LAYERS), **shaped(["embed_tokens.weight"], (5, 4))}
    other = {
        **shaped(in_front("language_model.", LAYERS)), **shaped(in_front("vision_tower.", LAYERS), (8, 8)),
        **shaped(["language_model.embed_tokens.weight"], (6, 4)),
    }  # fmt: skip
    found = match_names(own, other)
    assert found is not None and found.how == ("prefix `language_model.` added (5 tensors)",)


def test_a_whole_model_under_another_name():
    """Any prefix may stand for any other, if the models share no name."""
    found = match_names(shaped(in_front("query.", LAYERS)), shaped(in_front("passage.", LAYERS)))
    assert found is not None and found.how == ("prefix `query.` became `passage.` (4 tensors)",)


def test_models_of_which_the_same_is_to_be_said_share_a_note(tmp_path):
    """Ten wrapped fine-tunes, each with the same other file beside it: two notes, not twenty."""
    plain = {name: tensor([1.0, 2.0], F32) for name in LAYERS}
    folders = [write(tmp_path / "base", plain)]
    for i in range(10):
        folder = write(tmp_path / f"ft{i}", {f"module.{name}": x for name, x in plain.items()})
        shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")
        folders.append(folder)
    models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in folders]
    report = fastinterp.merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    five = ", ".join(str(tmp_path / f"ft{i}") for i in range(5)) + " and 5 more"
    assert report.remarks == (
        f"left out of {five}: `model.fp16.safetensors`, because transformers loads `model.safetensors`",
        f"names of {five} follow {tmp_path / 'base'}: prefix `module.` removed (4 tensors)",
    )


@pytest.mark.parametrize(
    ("own", "other"),
    [("encoder.", "decoder."), ("text_model.encoder.", "vision_model.encoder."), ("layers.0.", "layers.1."),
     ("generator.", "discriminator."), ("model.layers.3.", "model.layers.7.")],
)  # fmt: skip
@pytest.mark.parametrize("common", [[], ["shared.weight"]], ids=["nothing in common", "one name in common"])
def test_one_part_of_a_model_is_not_another(own, other, common):
    """Though all their tensors have the same shapes."""
    rests = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.up_proj.weight", "norm.weight"]
    names, theirs = (shaped([*in_front(prefix, rests), *common]) for prefix in (own, other))
    assert match_names(names, theirs) is None


def test_another_part_with_the_same_shapes_is_no_rival():
    """The encoder of a model under a prefix, beside a model that has a decoder, too."""
    rests = ["q_proj.weight", "k_proj.weight"]
    own = shaped([*in_front("encoder.", rests), *in_front("decoder.", rests)])
    found = match_names(own, shaped(in_front("model.encoder.", rests)))
    assert found is not None and found.how == ("prefix `model.` added (2 tensors)",)
    assert found.names == {n: f"model.{n}" if n.startswith("encoder.") else n for n in own}
