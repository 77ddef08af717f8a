"""An output of every kind, made in a folder, for `verify` and `replay`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import fastinterp
from fastinterp.integrations.mergekit_options import run, settings_of
from fastinterp.recipe.load import load_recipes
from tests.support import gguf_models, quantised_models
from tests.support.merged import recipe_of, related, saved_in

Made = Callable[[Path], Path]  # makes an output in a new folder, of models in others there; returns it


def _folder(root: Path) -> Path:
    paths = saved_in(root / "models", related(3))
    (paths[0] / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    (paths[0] / "tokenizer.json").write_text("{}")
    fastinterp.merge(recipe_of("ties", paths), root / "out")
    return root / "out"


def _shards(root: Path) -> Path:
    paths = saved_in(root / "models", related(3), shards=2)
    fastinterp.merge(recipe_of("linear", paths), root / "out", max_shard_size="40KB", dtype="float16")
    return root / "out"


def _stochastic(root: Path) -> Path:
    paths = saved_in(root / "models", related(2))
    fastinterp.merge(recipe_of("dare_ties", paths), root / "out", rounding="stochastic", seed=5)
    return root / "out"


def _file(root: Path) -> Path:
    paths = saved_in(root / "models", related(3))
    fastinterp.merge(recipe_of("ties", paths), root / "out.safetensors")
    return root / "out.safetensors"


def _gguf(root: Path) -> Path:
    paths = [
        gguf_models.write(
            root / f"{name}.gguf", gguf_models.numbers(seed), gguf_models.Type.Q8_0, header=gguf_models.keys()
        )
        for seed, name in enumerate(("base", "ft1"))
    ]
    models = [{"model": str(p), "parameters": {"weight": 0.5}} for p in paths]
    fastinterp.merge({"merge_method": "linear", "models": models}, root / "out.gguf")
    return root / "out.gguf"


def _pipeline(root: Path) -> Path:
    for seed, name in enumerate("ab"):
        rng = np.random.default_rng(seed)
        for part in ("unet", "vae"):
            (root / name / part).mkdir(parents=True)
            tensors = {"a.weight": rng.normal(size=(8, 8)).astype("f4"), "blocks.0.mlp.weight": np.ones((4, 4), "f2")}
            save_file(tensors, root / name / part / "diffusion_pytorch_model.safetensors")
            (root / name / part / "config.json").write_text("{}")
        index = {"_class_name": "P", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"]}
        (root / name / "model_index.json").write_text(json.dumps(index))
    fastinterp.interpolate(root / "a", root / "b", 0.25, root / "out")
    return root / "out"


def _path(root: Path) -> Path:
    base, tuned = saved_in(root / "models", related(2))
    fastinterp.interpolate(base, tuned, [0.0, 0.5, 1.0], root / "path")
    return root / "path" / "alpha_0.5"


def _sweep(root: Path) -> Path:
    paths = saved_in(root / "models", related(3))
    fastinterp.sweep(paths[1], paths[2], [0.0, 0.3], root / "path", base=paths[0], method="ties")
    return root / "path" / "alpha_0.3"


def _average(root: Path) -> Path:
    for step, path in enumerate(saved_in(root / "models", related(3)), 1):
        path.rename(root / f"checkpoint-{step}")
    fastinterp.average(str(root / "checkpoint-*"), root / "out", weights="ema")
    return root / "out"


def _documents(root: Path) -> Path:
    base, first, second = saved_in(root / "models", related(3))
    documents = [
        {**recipe_of("ties", [base, first]), "name": "mix"},
        {"merge_method": "slerp", "base_model": "mix", "models": [{"model": "mix"}, {"model": str(second)}],
         "parameters": {"t": 0.3}},
    ]  # fmt: skip
    fastinterp.merge(documents, root / "out")
    return root / "out"


def _intermediate(root: Path) -> Path:
    """A document above, which is kept."""
    base, first, second = saved_in(root / "models", related(3))
    models = [{"model": "mix", "parameters": {"weight": 0.5}}, {"model": str(second), "parameters": {"weight": 0.5}}]
    documents = [{**recipe_of("ties", [base, first]), "name": "mix"}, {"merge_method": "linear", "models": models}]
    fastinterp.merge(documents, root / "out", keep_intermediates=root / "kept")
    return root / "kept" / "mix"


def _adapters(root: Path) -> Path:
    name = "model.layers.0.mlp.up_proj"
    base, tuned = saved_in(root / "models", related(2))
    rng = np.random.default_rng(1)
    (root / "adapter").mkdir()
    factors = {
        f"base_model.model.{name}.lora_A.weight": rng.normal(size=(3, 64)).astype("f4"),
        f"base_model.model.{name}.lora_B.weight": rng.normal(size=(24, 3)).astype("f4"),
    }
    save_file(factors, root / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["up_proj"]}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    fastinterp.interpolate(f"{base}+{root / 'adapter'}:0.5", tuned, 0.5, root / "out")
    return root / "out"


def _quantised(root: Path) -> Path:
    form = next(iter(quantised_models.FORMS.values()))
    paths = quantised_models.saved(root, form, quantised_models.family(form, 2))
    models = [{"model": str(p), "parameters": {"weight": 0.5}} for p in paths]
    fastinterp.merge({"merge_method": "linear", "models": models}, root / "out", quantize="same")
    return root / "out"


def _mergekit(**values: object) -> Made:
    """By the program fastinterp-mergekit, with these options."""

    def made(root: Path) -> Path:
        paths = saved_in(root / "models", related(2))
        (paths[0] / "tokenizer.json").write_text("{}")
        (root / "recipe.yml").write_text("# mine\n" + json.dumps(recipe_of("linear", paths)))
        recipes = load_recipes(str(root / "recipe.yml"))
        run(recipes, recipes[-1].text, root / "out", settings_of(values))
        return root / "out"

    return made


KINDS: dict[str, Made] = {
    "folder": _folder, "shards": _shards, "stochastic": _stochastic, "file": _file, "gguf": _gguf,
    "pipeline": _pipeline, "path": _path, "sweep": _sweep, "average": _average, "documents": _documents,
    "intermediate": _intermediate, "adapters": _adapters, "quantised": _quantised,
    "mergekit": _mergekit(), "mergekit, without card": _mergekit(write_model_card=False),
    "mergekit, without tokenizer": _mergekit(copy_tokenizer=False, random_seed=3),
}  # fmt: skip
