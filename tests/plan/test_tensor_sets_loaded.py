"""Merges of models whose sets of tensors differ, loaded with transformers: no key is missing, none unexpected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastinterp

Tensors = dict[str, torch.Tensor]

TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def saved(folder: Path, model: Any, seed: int, change: Callable[[Tensors], Tensors] | None = None) -> Path:
    """The model with random weights of this seed in a folder; `change` edits the tensors of its file."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if change is not None:
        file = folder / "model.safetensors"
        changed = {name: tensor.clone() for name, tensor in change(load_file(file)).items()}
        save_file(changed, file, {"format": "pt"})
    return folder


def fused_experts(tensors: Tensors, block: str, ways: tuple[str, str, str]) -> Tensors:
    """The names and shapes that transformers 5 has in memory: the three experts of each of two layers in two tensors.

    block  of a layer, in which the experts are, one by one
    ways   names of gate, up and down projection
    """
    made = {n: x for n, x in tensors.items() if ".experts." not in n}
    for layer in range(2):
        stem = f"model.layers.{layer}.{block}.experts"
        parts = [[tensors[f"{stem}.{e}.{way}.weight"] for way in ways] for e in range(3)]
        made[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack([torch.cat(p[:2]) for p in parts])
        made[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack([p[2] for p in parts])
    return made


def averaged(tmp_path: Path, a: Path, b: Path, **keys: Any) -> tuple[Path, Any]:
    out = tmp_path / f"out {len(list(tmp_path.glob('out *')))}"
    models = [{"model": str(p), "parameters": {"weight": 0.5}} for p in (a, b)]
    return out, fastinterp.merge({"merge_method": "linear", "models": models, **keys}, out)


def loaded(kind: Any, folder: Path) -> Any:
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def assert_average(kind: Any, a: Path, b: Path, out: Path) -> Any:
    """Every parameter that transformers loads is the mean of those that it loads from the inputs."""
    x, y, z = (loaded(kind, folder).state_dict() for folder in (a, b, out))
    assert x.keys() == z.keys()
    for name in z:
        if z[name].is_floating_point():
            torch.testing.assert_close(z[name], (x[name] + y[name]) / 2, atol=1e-6, rtol=0)
    return loaded(kind, out)


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def llama(tied: bool = False) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, tie_word_embeddings=tied))


HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


# --- output layers ---------------------------------------------------------------------------------------------------


def test_a_trained_head_stays(tmp_path):
    """config.json says tied, the file has another output layer: it is merged with the embedding of the other model."""
    head = torch.randn(32, 16)
    a = saved(tmp_path / "a", llama(tied=True), 1)
    b = saved(tmp_path / "b", llama(tied=True), 2, lambda t: {**t, HEAD: head})
    out, report = averaged(tmp_path, a, b)
    assert any("is not the input embedding, although config.json says that it is" in w for w in report.warnings)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    model = loaded(transformers.LlamaForCausalLM, out)
    torch.testing.assert_close(model.lm_head.weight.detach(), (load_file(a / "model.safetensors")[EMBED] + head) / 2)


def test_a_trained_head_that_all_store_stays(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        saved(tmp_path / name, llama(tied=True), seed, lambda t: {**t, HEAD: torch.randn(32, 16)})
    heads = [load_file(tmp_path / name / "model.safetensors")[HEAD] for name in "ab"]
    out, _ = averaged(tmp_path, tmp_path / "a", tmp_path / "b")
    model = loaded(transformers.LlamaForCausalLM, out)
    torch.testing.assert_close(model.lm_head.weight.detach(), (heads[0] + heads[1]) / 2)
    assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize("config", [{"model_type": "of its own"}, None], ids=["config of its own", "no config"])
def test_a_head_of_which_no_configuration_says_anything_stays(tmp_path, config):
    """What config.json does not say is not said to be there; and without one there is nothing to say."""
    for name, seed in (("a", 1), ("b", 2)):
        folder = saved(tmp_path / name, llama(), seed)
        (folder / "config.json").write_text(json.dumps(config)) if config else (folder / "config.json").unlink()
    out, report = averaged(tmp_path, tmp_path / "a", tmp_path / "b")
    heads = [load_file(tmp_path / name / "model.safetensors")[HEAD] for name in "ab"]
    torch.testing.assert_close(load_file(out / "model.safetensors")[HEAD], (heads[0] + heads[1]) / 2)
    assert report.warnings == ()
    said = [r for r in report.remarks if "does not say whether lm_head.weight is the input embedding" in r]
    assert len(said) == (1 if config else 0)
    if config:
        assert json.loads((out / "config.json").read_text()) == config | {"tie_word_embeddings": False}


def test_a_copy_of_the_embedding_is_dropped(tmp_path):
    a = saved(tmp_path / "a", llama(tied=True), 1)
    b = saved(tmp_path / "b", llama(tied=True), 2, lambda t: {**t, HEAD: t[EMBED]})
    out, report = averaged(tmp_path, a, b)
    assert any(f"left out {HEAD} of {b}: it is a copy" in remark for remark in report.remarks)
    assert report.warnings == () and HEAD not in load_file(out / "model.safetensors")
    assert_average(transformers.LlamaForCausalLM, a, b, out)


def test_the_file_keeps_the_head_and_not_the_embedding(tmp_path):
    a = saved(tmp_path / "a", llama(tied=True), 1)
    b = saved(tmp_path / "b", llama(tied=True), 2, lambda t: {HEAD if n == EMBED else n: x for n, x in t.items()})
    out, _ = averaged(tmp_path, a, b)
    embedding = (load_file(a / "model.safetensors")[EMBED] + load_file(b / "model.safetensors")[HEAD]) / 2
    torch.testing.assert_close(loaded(transformers.LlamaForCausalLM, out).lm_head.weight.detach(), embedding)


def test_a_head_that_is_missing_is_not_the_embedding(tmp_path):
    """A model without an output layer whose config.json says untied: each remedy is followed."""
    a = saved(tmp_path / "a", llama(), 1)
    b = tmp_path / "b"
    transformers.LlamaModel(llama().config).save_pretrained(b)
    with pytest.raises(fastinterp.ShapeError, match="so that its input embedding does not stand for") as caught:
        averaged(tmp_path, a, b)
    assert f"{a} alone has {HEAD}. {b} says `tie_word_embeddings: false`" in str(caught.value)
    assert "`missing: base` in the recipe (--missing base) takes what" in str(caught.value)
    out, report = averaged(tmp_path, a, b, missing="base")
    assert any(f"copied from {a}, because {b} lacks it: {HEAD}" == r for r in report.remarks)
    model = loaded(transformers.LlamaForCausalLM, out)
    assert model.lm_head.weight.equal(load_file(a / "model.safetensors")[HEAD])
    models = [{"model": str(a)}, {"model": str(b)}]
    skipped = fastinterp.load(
        {"merge_method": "linear", "parameters": {"weight": 1}, "missing": "skip", "models": models}
    )
    assert HEAD not in skipped and EMBED in skipped


def test_no_head_is_invented(tmp_path):
    """Classifiers with a base language model whose configuration is copied, of models without an output layer."""
    kind = transformers.LlamaForSequenceClassification
    config = transformers.LlamaConfig(**TEXT, num_labels=3)
    a, b = (saved(tmp_path / name, kind(config), seed) for name, seed in (("a", 1), ("b", 2)))
    lm = saved(tmp_path / "lm", llama(), 3)
    out, _ = averaged(tmp_path, a, b, base_model=str(lm))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert HEAD not in load_file(out / "model.safetensors")
    out, _ = averaged(tmp_path, a, b)
    assert_average(kind, a, b, out)


def test_an_absent_head_without_a_statement_is_a_warning(tmp_path):
    """No configuration says whether the model is tied: its embedding counts, with a warning."""
    saved(tmp_path / "a", llama(), 1)
    saved(tmp_path / "b", llama(), 2, lambda t: {n: x for n, x in t.items() if n != HEAD})
    (tmp_path / "b" / "config.json").unlink()
    _, report = averaged(tmp_path, tmp_path / "a", tmp_path / "b")
    assert any("no config.json says whether it is tied" in warning for warning in report.warnings)


# --- other families --------------------------------------------------------------------------------------------------


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Without `transformer.`, and with the causal mask as a buffer called bias; other biases are parameters."""
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=8)
    kind = transformers.GPT2LMHeadModel

    def old(tensors: Tensors) -> Tensors:
        masks = {f"h.{i}.attn.bias": torch.tril(torch.ones(8, 8))[None, None] for i in range(2)}
        return masks | {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}

    a, b = saved(tmp_path / "a", kind(config), 1, old), saved(tmp_path / "b", kind(config), 2)
    out, report = averaged(tmp_path, a, b)
    assert f"names of {b} follow {a}: prefix `transformer.` removed (28 tensors)" in report.remarks
    assert f"taken from {a}, because software computes them: h.{{0,1}}.attn.bias (2 tensors)" in report.remarks
    assert load_file(out / "model.safetensors").keys() == load_file(a / "model.safetensors").keys()
    assert_average(kind, a, b, out)
    out, report = averaged(tmp_path, b, a)
    assert "left out, because software computes them: transformer.h.{0,1}.attn.bias (2 tensors)" in report.remarks
    assert_average(kind, b, a, out)


@pytest.mark.slow
def test_whisper(tmp_path):
    """`proj_out` is a copy of the decoder's embedding; some files store it."""
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=32, num_mel_bins=4, max_source_positions=8,
        max_target_positions=8, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    kind, copy = transformers.WhisperForConditionalGeneration, "proj_out.weight"
    a = saved(tmp_path / "a", kind(config), 1, lambda t: {**t, copy: t["model.decoder.embed_tokens.weight"]})
    b = saved(tmp_path / "b", kind(config), 2)
    out, report = averaged(tmp_path, a, b)
    assert any(f"left out {copy}" in remark for remark in report.remarks)
    assert_average(kind, a, b, out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [transformers.T5ForConditionalGeneration, transformers.BartForConditionalGeneration])
def test_encoders_and_decoders_that_share(tmp_path, kind):
    """Old files store the embeddings of encoder and decoder beside the one that is shared."""
    if kind is transformers.T5ForConditionalGeneration:
        config, stem = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32), ""
    else:
        sizes = {
            f"{part}_{of}": n for part in ("encoder", "decoder") for of, n in (("ffn_dim", 16), ("attention_heads", 2))
        }
        config = transformers.BartConfig(vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, **sizes)
        stem = "model."

    def old(tensors: Tensors) -> Tensors:
        names = (f"{stem}encoder.embed_tokens.weight", f"{stem}decoder.embed_tokens.weight", HEAD)
        return {**tensors, **dict.fromkeys(names, tensors[f"{stem}shared.weight"])}

    a, b = saved(tmp_path / "a", kind(config), 1, old), saved(tmp_path / "b", kind(config), 2)
    for first, second in ((a, b), (b, a)):
        out, report = averaged(tmp_path, first, second)
        assert sum("it is a copy of another tensor" in remark for remark in report.remarks) == 3
        assert_average(kind, first, second, out)


@pytest.mark.slow
def test_bert_of_old(tmp_path):
    """`gamma` and `beta`, position_ids, and copies of the embedding and of a bias."""
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32
    )
    kind = transformers.BertForMaskedLM

    def old(tensors: Tensors) -> Tensors:
        copies = {
            "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
            "bert.embeddings.position_ids": torch.arange(512)[None],
        }
        spelled = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
            for n, x in tensors.items()
        }
        return spelled | copies

    a, b = saved(tmp_path / "a", kind(config), 1), saved(tmp_path / "b", kind(config), 2, old)
    out, report = averaged(tmp_path, a, b)
    assert any(
        "LayerNorm.bias` for `bert.embeddings.LayerNorm.beta` and the like" in remark for remark in report.remarks
    )
    assert load_file(out / "model.safetensors").keys() == load_file(a / "model.safetensors").keys()
    assert_average(kind, a, b, out)


@pytest.mark.slow
def test_gemma3_before_and_after(tmp_path):
    """Names before transformers 4.52 and after it: four prefixes, each replaced by another."""
    text = {**TEXT, "head_dim": 8, "max_position_embeddings": 32}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    kind = transformers.Gemma3ForConditionalGeneration

    def names(new: bool) -> Callable[[Tensors], Tensors]:
        rules = (
            ("language_model.model.", "model.language_model."), ("vision_tower.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
        )  # fmt: skip

        def renamed(tensors: Tensors) -> Tensors:
            made = {}
            for name, tensor in tensors.items():
                for old, other in rules:
                    start, wanted = (old, other) if new else (other, old)
                    if name.startswith(start):
                        name = wanted + name[len(start) :]
                        break
                made[name] = tensor
            return made

        return renamed

    a, b = saved(tmp_path / "a", kind(config), 1, names(False)), saved(tmp_path / "b", kind(config), 2, names(True))
    assert not load_file(a / "model.safetensors").keys() & load_file(b / "model.safetensors").keys()
    for first, second in ((a, b), (b, a)):
        out, _ = averaged(tmp_path, first, second)
        assert load_file(out / "model.safetensors").keys() == load_file(first / "model.safetensors").keys()
        assert_average(kind, first, second, out)


@pytest.mark.slow
def test_qwen2_5_vl_before_and_after(tmp_path):
    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "max_position_embeddings": 32}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    kind = transformers.Qwen2_5_VLForConditionalGeneration

    def old(tensors: Tensors) -> Tensors:
        names = {n: n.replace("model.language_model.", "model.").replace("model.visual.", "visual.") for n in tensors}
        return {names[n]: x for n, x in tensors.items()}

    def new(tensors: Tensors) -> Tensors:
        made = {}
        for name, tensor in old(tensors).items():
            name = f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
            made[name] = tensor
        return made

    a, b = saved(tmp_path / "a", kind(config), 1, old), saved(tmp_path / "b", kind(config), 2, new)
    for first, second in ((a, b), (b, a)):
        out, _ = averaged(tmp_path, first, second)
        assert load_file(out / "model.safetensors").keys() == load_file(first / "model.safetensors").keys()
        assert_average(kind, first, second, out)


# --- prefixes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "module._orig_mod."])
def test_wrapped_models(tmp_path, prefix):
    a = saved(tmp_path / "a", llama(), 1)
    b = saved(tmp_path / "b", llama(), 2, prefixed(prefix))
    plain = saved(tmp_path / "plain", llama(), 2)
    out, report = averaged(tmp_path, a, b)
    assert len(report.remarks) == 1 and f"names of {b} follow {a}: " in report.remarks[0]
    assert_average(transformers.LlamaForCausalLM, a, plain, out)


@pytest.mark.slow
def test_experts_in_one_tensor_and_one_by_one(tmp_path):
    """Either may be the base: matrices of experts are rows one after the other in both."""
    config = transformers.Qwen3MoeConfig(
        **TEXT, head_dim=8, moe_intermediate_size=8, num_experts=3, num_experts_per_tok=1, decoder_sparse_step=1
    )
    kind = transformers.Qwen3MoeForCausalLM

    def fused(tensors: Tensors) -> Tensors:
        """gate_up_proj has 2 * 8 rows of 16, so that it is square."""
        return fused_experts(tensors, "mlp", ("gate_proj", "up_proj", "down_proj"))

    a, b = saved(tmp_path / "a", kind(config), 1), saved(tmp_path / "b", kind(config), 2, fused)
    plain = saved(tmp_path / "plain", kind(config), 2)
    for first, second in ((a, b), (b, a)):
        out, report = averaged(tmp_path, first, second)
        assert any("as " + str(first) + " stores them" in remark for remark in report.remarks)
        asked = {"merge_method": "linear", "models": [{"model": str(m)} for m in (first, second)]}
        assert fastinterp.check(asked | {"parameters": {"weight": 1}}).errors == ()
        assert load_file(out / "model.safetensors").keys() == load_file(first / "model.safetensors").keys()
        assert_average(kind, a, plain, out)


def test_live_and_paths_follow_names(tmp_path):
    """Checkpoints with a prefix, and with buffers that the module does not store."""

    def wrapped(tensors: Tensors) -> Tensors:
        buffer = {"module.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        return prefixed("module.")(tensors) | buffer

    a, b = saved(tmp_path / "a", llama(), 1), saved(tmp_path / "b", llama(), 2, wrapped)
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    module = llama()
    with fastinterp.Live(module, a=a, b=b) as live:
        live.set(0.25)
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor, 0.75 * x[name] + 0.25 * y[f"module.{name}"], atol=1e-6, rtol=0)
    point = fastinterp.path(a, b).weights(0.25)
    assert point.keys() == x.keys()
    for name, tensor in point.items():
        torch.testing.assert_close(tensor, 0.75 * x[name] + 0.25 * y[f"module.{name}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("having", ["a", "b", "module"])
def test_live_and_paths_leave_recomputed_buffers(tmp_path, having):
    """A buffer that one side alone has is nobody's to interpolate; and state dicts of wrapped modules follow names."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(2, 2)
            self.rotary_emb = torch.nn.Module()
            self.rotary_emb.register_buffer("inv_freq", torch.ones(3), persistent=having == "module")

    buffer = {"rotary_emb.inv_freq": torch.full((3,), 7.0)}
    states = [{"proj.weight": torch.full((2, 2), v), "proj.bias": torch.full((2,), v)} for v in (1.0, 3.0)]
    states = [state | (buffer if having == end else {}) for state, end in zip(states, "ab", strict=True)]
    files = []
    for state, end in zip(states, "ab", strict=True):
        save_file(state, tmp_path / f"{end}.safetensors")
        files.append(str(tmp_path / f"{end}.safetensors"))
    compiled = [{f"_orig_mod.module.{name}": x for name, x in state.items()} for state in states]
    for a, b in (files, states, compiled, (files[0], compiled[1]), (states[0], files[1])):
        module = Module()
        with fastinterp.Live(module, a=a, b=b) as live:
            live.set(0.25)
            assert torch.equal(module.proj.weight, torch.full((2, 2), 1.5))
            assert torch.equal(module.rotary_emb.inv_freq, torch.ones(3))
        point = fastinterp.path(a, b).weights(0.25)
        assert sorted(name.rpartition("proj.")[2] for name in point) == ["bias", "weight"]
        assert all(torch.equal(x, torch.full_like(x, 1.5)) for x in point.values())
        report = fastinterp.path(a, b, model=module).evaluate(
            lambda model, alpha, seed: {"bias": float(model.proj.bias.detach()[0])}, [0.0, 0.5]
        )
        assert [p.samples["bias"] for p in report.points] == [(1.0,), (2.0,)]
