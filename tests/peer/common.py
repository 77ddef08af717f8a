"""`tests.common` of mergekit's test suite, which its sdist lacks: the same names and arguments, written for this suite.

Small random models of four architectures, and `run_and_check_merge`, which merges and looks at the output.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mergekit.merge
import torch
import transformers
from mergekit.architecture import arch_info_for_config, get_architecture_info
from mergekit.options import MergeOptions
from safetensors import safe_open

# What all language models here have in common.
_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def make_picollama(path: object, vocab_size: int = 64) -> str:
    config = transformers.LlamaConfig(vocab_size=vocab_size, num_attention_heads=16, **_SMALL)
    return _saved(transformers.LlamaForCausalLM(config), path)


def make_picogranite(path: object, vocab_size: int = 64) -> str:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return _saved(
        transformers.GraniteForCausalLM(transformers.GraniteConfig(vocab_size=vocab_size, **heads, **_SMALL)), path
    )


def make_gpt2size(path: object) -> str:
    """As GPT-2: twelve layers and its vocabulary, which a test of the suite counts on; but narrow."""
    return _saved(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=48, n_head=12, n_layer=12)), path)


def make_picoLlaVa(path: object) -> str:  # noqa: N802 - the suite's name for it
    vision = transformers.CLIPVisionConfig(
        image_size=32, patch_size=4, num_hidden_layers=2, num_attention_heads=2, hidden_size=64, intermediate_size=128
    )
    text = transformers.LlamaConfig(vocab_size=64, num_attention_heads=16, **_SMALL)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_seq_length=16)
    return _saved(transformers.LlavaForConditionalGeneration(config), path)


def run_and_check_merge(
    config: Any,
    check_nan: bool = True,
    check_tensors: bool = True,
    validate: Callable[[str], None] | None = None,
    index_json_name: str | None = None,
    auto_arch: bool = False,
) -> None:
    """Merge into a temporary folder. The output is whole: config.json, every tensor of the architecture, no NaN.

    validate         a further check, called with the output's folder
    index_json_name  of the output, if it is not model.safetensors.index.json
    auto_arch        the architecture is that of the inputs, not the one that config.json names
    """
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        # Looked up at the call: what is installed in its place is what is tested.
        mergekit.merge.run_merge(config, out_path=str(out), options=MergeOptions())
        names = _checked_names(out, index_json_name or "model.safetensors.index.json", check_nan)
        assert (out / "config.json").is_file(), "there is no config.json in the output"
        if check_tensors:
            made = transformers.AutoConfig.from_pretrained(out)
            info = get_architecture_info(config, MergeOptions()) if auto_arch else arch_info_for_config(made)
            needed = [w for w in info.all_weights(made) if not w.optional]
            if any(names.isdisjoint({w.name, *(w.aliases or ())}) for w in needed):
                _check_loads(out, made)  # names as the inputs have them, which transformers changes when it loads
        if validate is not None:
            validate(str(out))


def _checked_names(out: Path, index_name: str, check_nan: bool) -> set[str]:
    """The names of all tensors of the output, none of which has a NaN."""
    single, index = out / index_name.replace(".index.json", ""), out / index_name
    assert single.is_file() or index.is_file(), f"there are no weights in the output: {sorted(out.iterdir())}"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [single.name]
    names = set()
    for file in files:
        with safe_open(out / file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no mapping
                names.add(key)
                tensor = tensors.get_tensor(key)
                if check_nan and tensor.is_floating_point():
                    assert not math.isnan(tensor.to(torch.float64).sum().item()), f"{key} has a NaN"
    return names


def _check_loads(out: Path, config: Any) -> None:
    """transformers loads the output, and neither misses a tensor nor has one left."""
    model, found = getattr(transformers, config.architectures[0]).from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"], found
    assert model.num_parameters() > 0


def _saved(model: Any, path: object) -> str:
    model.save_pretrained(path, safe_serialization=True)
    return str(path)
