"""What is fuzzed: kinds of files, as bytes that are written into a folder and read by fastinterp."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import torch_files as pickles

Reader = Callable[[Path, bytes], object]


@dataclass(frozen=True)
class Target:
    """One kind of files.

    read   writes the bytes that it is given as such a file into a folder, and has fastinterp read that
    seeds  files as they should be
    """

    read: Reader
    seeds: tuple[bytes, ...]


# --- weights ---------------------------------------------------------------------------------------------------------


def safetensors(header: object, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int = 0, end: int = 64, shape: Sequence[int] = (4, 4), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


LAYER = "model.layers.0.mlp.up_proj.weight"
NAMES = [f"model.layers.{i}.{x}.weight" for i in range(4) for x in ("mlp.up_proj", "input_layernorm")] + [
    "lm_head.weight"
]
HALVES = {LAYER: entry(0, 32, (2, 4)), "model.embed_tokens.weight": entry(32, 64, (2, 4))}
RECEIPT = {"version": "0.2.0", "numerics": 1, "method": "linear", "recipe": "merge_method: linear\n", "models": ["a"]}


def opened(path: Path) -> None:
    """Everything that is printed about a checkpoint."""
    from fastinterp.checkpoint.open import open_checkpoint
    from fastinterp.inspect import describe
    from fastinterp.plan.models import open_model

    checkpoint = open_checkpoint(str(path))
    json.dumps(describe.as_dict(checkpoint))
    describe.as_text(checkpoint, every=True)
    open_model(str(path))


def in_folder(name: str, others: Mapping[str, bytes]) -> Reader:
    """The input is the file `name`, beside `others`."""

    def read(folder: Path, data: bytes) -> None:
        for other, content in others.items():
            (folder / other).write_bytes(content)
        (folder / name).write_bytes(data)
        opened(folder)

    return read


def one_file(name: str) -> Reader:
    def read(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(data)
        opened(folder / name)

    return read


def header(folder: Path, data: bytes) -> None:
    """The JSON of a header, in a file whose length of the header is right."""
    one_file("model.safetensors")(folder, safetensors(data))


def receipt(folder: Path, data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    head = {"__metadata__": {"fastinterp": text, "format": "pt"}, **HALVES}
    one_file("model.safetensors")(folder, safetensors(head))


def pickle(folder: Path, data: bytes) -> None:
    """The pickle of a file of torch.save, in an archive that is right, with a storage of 16 bytes."""
    one_file("pytorch_model.bin")(folder, pickles.zipped(pickles.archive(data, {"0": bytes(16)})))


def config(folder: Path, data: bytes) -> None:
    """config.json of a model in two merges: of whole models, and of stacked layers, whose config.json is made of it."""
    from fastinterp.api import explain

    head = {"model.embed_tokens.weight": entry(0, 32, (2, 4)), LAYER: entry(32, 64, (2, 4))}
    for name, content in (("a", data), ("b", json.dumps(CONFIG).encode())):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "model.safetensors").write_bytes(safetensors(head))
        (folder / name / "config.json").write_bytes(content)
    opened(folder / "a")
    a, b = str(folder / "a"), str(folder / "b")
    whole = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in (a, b)]}
    layers = [{"sources": [{"model": m, "layer_range": [0, 1]}]} for m in (a, b)]
    for recipe in (whole, {"merge_method": "passthrough", "slices": layers}):
        str(explain({"dtype": "float32", **recipe}))


def adapter(folder: Path, data: bytes) -> None:
    from fastinterp.checkpoint.lora import parse
    from fastinterp.checkpoint.open import open_checkpoint

    module = "base_model.model.model.layers.0.mlp.up_proj"
    head = {f"{module}.lora_A.weight": entry(0, 32, (2, 4)), f"{module}.lora_B.weight": entry(32, 64, (4, 2))}
    (folder / "adapter_model.safetensors").write_bytes(safetensors(head))
    (folder / "adapter_config.json").write_bytes(data)
    parse(open_checkpoint(str(folder)))


# --- text ------------------------------------------------------------------------------------------------------------


def recipe(folder: Path, data: bytes) -> None:
    from fastinterp.inspect.explain_parameters import parameters_in_force
    from fastinterp.recipe.check import value_warnings
    from fastinterp.recipe.load import load_recipes

    (folder / "recipe.yml").write_bytes(data)
    for found in load_recipes(str(folder / "recipe.yml")):
        value_warnings(found)
        parameters_in_force(found, [NAMES] * len(found.models))


def tokenizer(name: str) -> Reader:
    """The input is the file `name` of a model whose vocabulary is united with that of another."""

    def read(folder: Path, data: bytes) -> None:
        from fastinterp.tokenizer.chat_template import template_of
        from fastinterp.tokenizer.files import tokenizer_files
        from fastinterp.tokenizer.vocabulary import join, read_vocabulary

        models = []
        for model, table in (("one", BPE), ("other", UNIGRAM)):
            (folder / model).mkdir(exist_ok=True)
            (folder / model / "tokenizer.json").write_text(json.dumps(table))
            if model == "one":
                (folder / model / name).write_bytes(data)
            models.append(read_vocabulary(model, folder / model, 8))
            template_of(folder / model)
        for base, more in (models, models[::-1]):
            tokenizer_files(join(base, [more]))

    return read


def report(folder: Path, data: bytes) -> None:
    from fastinterp.paths.report import PathReport

    (folder / "report.json").write_bytes(data)
    found = PathReport.from_json(folder / "report.json")
    found.summary()
    found.to_csv()
    assert PathReport.from_json(found.to_json()).points == found.points or "NaN" in found.to_json()


BPE = {
    "version": "1.0",
    "added_tokens": [{"id": 3, "content": "<s>", "special": True, "normalized": False}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "byte_fallback": False},
}
UNIGRAM = {"added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5]]}}
SETTINGS = {
    "chat_template": "{{ m }}",
    "added_tokens_decoder": {"3": {"content": "<s>", "special": True}, "4": {"content": "x", "special": False}},
}
RECIPES = (
    "models:\n- model: a\n  parameters:\n    weight: 0.5\n- model: b\n  parameters:\n    weight: [0, 0.5, 1]\n"
    "merge_method: linear\ndtype: bfloat16\n",
    "slices:\n- sources:\n  - {model: a, layer_range: [0, 4]}\n  - {model: b, layer_range: [0, 4]}\n"
    "merge_method: slerp\nbase_model: a\nparameters:\n  t:\n  - {filter: mlp, value: [0, 1]}\n  - value: 0.5\n",
    "name: x\nmerge_method: ties\nbase_model: a\nmodels:\n- {model: b+c, parameters: {weight: 1, density: 0.3}}\n"
    "---\nmerge_method: linear\nmodels: [{model: x}, {model: b}]\nparameters: {normalize: true, weight: 1}\n"
    "tokenizer:\n  source: union\n  tokens: {<s>: {source: b, force: true}}\nchat_template: auto\n",
    '{"merge_method": "dare_ties", "base_model": "a", "models": [{"model": {"model": "b", "lora": "c", "scale": 2}, '
    '"parameters": {"weight": 1, "density": 0.5}}], "seed": 7, "rounding": "stochastic", "missing": "skip"}',
    "x: &a [1, 2]\ny: *a\n<<: {dtype: !!str float32}\nmodules:\n  text:\n    slices: []\n",
)
PATH_REPORT = {
    "format": "fastinterp path report",
    "version": 1,
    "ends": {"a": "x", "b": "y"},
    "base": None,
    "line": True,
    "seeds": [0, 1],
    "probabilities": [],
    "points": [
        {"at": {"alpha": x}, "samples": {"loss": [1.0, 2.0], "accuracy": [0.5, "NaN"]}, "strength": 1.0,
         "changed_fraction": 0.5,
         "relative_change": 0.1}
        for x in (0.0, 0.5, 1.0)
    ],
}  # fmt: skip


def _gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf() -> bytes:
    """A GGUF file with keys of several types, an array, and two tensors, of F32 and Q8_0."""
    keys = [
        _gguf_string("general.architecture") + struct.pack("<I", 8) + _gguf_string("llama"),
        _gguf_string("llama.block_count") + struct.pack("<II", 4, 1),
        _gguf_string("llama.rope.freq_base") + struct.pack("<If", 6, 1e4),
        _gguf_string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + _gguf_string("a") + _gguf_string("b"),
        _gguf_string("x") + struct.pack("<I?", 7, True),
    ]
    tensors = [
        _gguf_string("output_norm.weight") + struct.pack("<IQIQ", 1, 8, 0, 0),
        _gguf_string("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 2, 8, 32),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys + tensors)
    return head + bytes(-len(head) % 32) + bytes(32) + bytes(2 * 34) + bytes(28)


def _pickles() -> tuple[bytes, ...]:
    two = pickles.mapping({LAYER: pickles.view(pickles.storage()), "b": pickles.view(pickles.storage(), 2, (2,), (1,))})
    nested = pickles.mapping({"state_dict": two, "step": pickles.whole(3)})
    return tuple(b"\x80\x02" + body + b"." for body in (two, nested))


def _json(*values: object) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


_SHARDS = {"a.safetensors": safetensors({LAYER: entry()}), "b.safetensors": safetensors({"x": entry()})}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "vocab_size": 2,
    "hidden_size": 4, "tie_word_embeddings": True, "torch_dtype": "float32",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2], "modules_to_not_convert": ["lm_head"]},
}  # fmt: skip
MOE_CONFIG = {
    "model_type": "qwen3_moe", "num_hidden_layers": 1, "vocab_size": 2, "tie_word_embeddings": False,
    "dtype": "bfloat16", "mlp_only_layers": [0], "layer_types": ["full_attention"],
    "text_config": {"num_hidden_layers": 1, "vocab_size": 2},
}  # fmt: skip
PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"], "base_model_name_or_path": "x",
        "rank_pattern": {"up_proj": 2}, "alpha_pattern": {}, "use_rslora": False, "bias": "none"}  # fmt: skip

TARGETS: dict[str, Target] = {
    "header": Target(header, (*_json({"x": entry()}, {"__metadata__": {"format": "pt"}, **HALVES}), b"{}")),
    "file": Target(one_file("model.safetensors"), (safetensors({"x": entry()}), safetensors({}, b""), b"")),
    "index": Target(
        in_folder("model.safetensors.index.json", _SHARDS),
        _json({"metadata": {"total_size": 128}, "weight_map": {LAYER: "a.safetensors", "x": "b.safetensors"}}),
    ),
    "config": Target(config, _json(CONFIG, MOE_CONFIG, {})),
    "adapter": Target(adapter, _json(PEFT)),
    "receipt": Target(receipt, _json(RECEIPT)),
    "bin": Target(one_file("pytorch_model.bin"), tuple(
        pickles.zipped(pickles.archive(body, {"0": bytes(16)}), wide=wide)
        for body in _pickles() for wide in (False, True)
    )),
    "pickle": Target(pickle, _pickles()),
    "gguf": Target(one_file("model.gguf"), (gguf(),)),
    "recipe": Target(recipe, tuple(text.encode() for text in RECIPES)),
    "tokenizer": Target(tokenizer("tokenizer.json"), _json(BPE, UNIGRAM)),
    "tokenizer-config": Target(tokenizer("tokenizer_config.json"), _json(SETTINGS)),
    "report": Target(report, _json(PATH_REPORT)),
}  # fmt: skip
