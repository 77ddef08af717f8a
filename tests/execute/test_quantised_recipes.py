"""Recipes of every kind with models in codes: their bytes are those of the same recipes with models in numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastinterp
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import BF16, F16, F32
from tests.execute.test_quantised_inputs import matrix, saved
from tests.support.checkpoints import Tensor, assert_same, integers, read, recipe, tensor
from tests.support.encodings import ENCODINGS, scaled

FORM = ENCODINGS["fp8 blocks"]
LAYERS = 3
CONFIG = {"num_hidden_layers": LAYERS, "torch_dtype": "bfloat16"}


def model(seed: int, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Layers with an encoded matrix, a norm and an integer: in codes, and in numbers."""
    codes: dict[str, Tensor] = {}
    numbers: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        one = FORM.encode(matrix(10 * seed + layer))
        name = f"{prefix}model.layers.{layer}"
        codes |= {f"{name}.mlp.up_proj.{end}": t for end, t in one.tensors.items()}
        numbers[f"{name}.mlp.up_proj.weight"] = tensor(one.numbers, F32)
        both = {f"{name}.input_layernorm.weight": tensor(np.full(8, 1 + seed / 8), BF16)}
        both[f"{name}.steps"] = integers([seed], "I64")
        codes, numbers = codes | both, numbers | both
    return codes, numbers


def slices(a: str, b: str, _: str) -> Any:
    return {"merge_method": "passthrough", "slices": [
        {"sources": [{"model": a, "layer_range": [0, 2]}]}, {"sources": [{"model": b, "layer_range": [1, 3]}]},
    ]}  # fmt: skip


def merged_slices(a: str, b: str, _: str) -> Any:
    weights = {"parameters": {"weight": 0.5}}
    sources = [{"model": m, "layer_range": [0, 2], **weights} for m in (a, b)]
    return {"merge_method": "linear", "slices": [{"sources": sources}], "integers": a}


def documents(a: str, b: str, c: str) -> Any:
    first = {"name": "first", "integers": a, **recipe("slerp", [a, b], base_model=a, parameters={"t": 0.4})}
    return [first, recipe("linear", ["first", c], weights=[0.3, 0.7], integers=c)]


def one_after_the_other(a: str, b: str, c: str) -> Any:
    first = {"name": "first", "integers": a, **recipe("linear", [a, b], weights=[0.5, 0.5])}
    return [first, recipe("task_arithmetic", ["first", c], weights=[0.3, 0.7], base_model=a, integers=c)]


RECIPES: dict[str, Callable[[str, str, str], Any]] = {
    "slices": slices,
    "merged slices": merged_slices,
    "documents": documents,
    "sums of sums": one_after_the_other,
    "ties": lambda a, b, c: recipe("ties", [b, c], weights=[0.5, 0.5], base_model=a, integers=a,
                                   parameters={"density": 0.4}),
    "dare_ties": lambda a, b, c: recipe("dare_ties", [b, c], weights=[0.5, 0.5], base_model=a, integers=a, seed=3,
                                        parameters={"density": 0.5}),
    "slerp": lambda a, b, c: recipe("slerp", [a, b], base_model=a, integers=b, parameters={"t": 0.3}),
    "model_stock": lambda a, b, c: recipe("model_stock", [b, c], base_model=a, integers=a),
    "karcher": lambda a, b, c: recipe("karcher", [a, b, c], integers=a),
    "sce": lambda a, b, c: recipe("sce", [b, c], base_model=a, integers=a, parameters={"select_topk": 0.5}),
    "a module": lambda a, b, c: {"merge_method": "linear", "base_model": a, "integers": a, "modules": {
        "model": {"models": [{"model": a}, {"model": b}], "parameters": {"weight": 0.5}}}},
    "stochastic": lambda a, b, c: recipe("linear", [a, b], weights=[0.5, 0.5], integers=a, rounding="stochastic",
                                         seed=5),
    "scaled": lambda a, b, c: {"merge_method": "passthrough", "models": [{"model": a, "parameters": {"scale": 0.5}}]},
}  # fmt: skip


@pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES)
def test_recipes(tmp_path: Path, make: Callable[[str, str, str], Any]) -> None:
    made = [model(seed) for seed in range(3)]
    for kind, config in enumerate((FORM.config, {})):
        paths = [saved(tmp_path / f"{kind}{i}", pair[kind], None, **CONFIG, **config) for i, pair in enumerate(made)]
        values = make(*paths)
        last = values[-1] if isinstance(values, list) else values
        last["dtype"] = "bfloat16"
        fastinterp.merge(values, tmp_path / f"out{kind}")
    assert_same(read(tmp_path / "out0"), read(tmp_path / "out1"))
    assert "quantization_config" not in json.loads((tmp_path / "out0" / "config.json").read_text())


def test_names_with_a_prefix(tmp_path: Path) -> None:
    made = [model(0), model(1, "module.")]
    for kind, config in enumerate((FORM.config, {})):
        paths = [saved(tmp_path / f"{kind}{i}", pair[kind], None, **CONFIG, **config) for i, pair in enumerate(made)]
        values = recipe("linear", paths, weights=[0.5, 0.5], integers=paths[0], dtype="bfloat16")
        fastinterp.merge(values, tmp_path / f"out{kind}")
    assert_same(read(tmp_path / "out0"), read(tmp_path / "out1"))


def test_tensors_that_one_model_lacks(tmp_path: Path) -> None:
    """`missing: base` makes numbers of what is copied."""
    (codes, numbers), (less, less_numbers) = model(0), model(1)
    gone = "model.layers.2."
    for kind, (own, other, config) in enumerate(((codes, less, FORM.config), (numbers, less_numbers, {}))):
        other = {n: t for n, t in other.items() if not n.startswith(gone)}
        paths = [saved(tmp_path / f"{kind}{i}", t, None, **CONFIG, **config) for i, t in enumerate((own, other))]
        values = recipe("linear", paths, weights=[0.5, 0.5], base_model=paths[0], integers=paths[0], missing="base")
        fastinterp.merge({**values, "dtype": "bfloat16"}, tmp_path / f"out{kind}")
    assert_same(read(tmp_path / "out0"), read(tmp_path / "out1"))


@pytest.mark.parametrize(("base", "other", "stored"), [
    ("codes", BF16, BF16), ("codes", F32, F32), ("codes", F16, BF16), ("F16", "codes", F16), ("BF16", "codes", BF16),
], ids=str)  # fmt: skip
def test_dtype_that_an_output_keeps(tmp_path: Path, base: Any, other: Any, stored: Any) -> None:
    """BF16 where the base is in codes, wider if another model is; else that of the model in numbers."""
    x = matrix(1)
    kinds = {"F16": F16, "BF16": BF16}
    paths = []
    for i, kind in enumerate((base, other)):
        one = scaled(shape=lambda _: ())(x).tensors if kind == "codes" else {"weight": tensor(x, kinds.get(kind, kind))}
        paths.append(saved(tmp_path / str(i), {f"l.{end}": t for end, t in one.items()}, None, torch_dtype="float16"))
    fastinterp.merge(recipe("linear", paths, weights=[0.5, 0.5]), tmp_path / "out")
    assert read(tmp_path / "out")["l.weight"].dtype == stored
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == stored.library_name


def test_model_that_is_half_decoded(tmp_path: Path) -> None:
    """Codes of a format that is not read beside those that are: no configuration could tell of both."""
    codes, _ = model(0)
    unread = {"a.weight": integers(np.ones((4, 4)), "I8"), "a.weight_scale": tensor(np.ones((4, 1)), F32),
              "a.weight_zero_point": integers(np.ones((4, 1)), "I8")}  # fmt: skip
    path = saved(tmp_path / "a", codes | unread, FORM)
    with pytest.raises(CheckpointError, match=r"Others of its tensors are de-quantised, as .*, and these cannot be"):
        fastinterp.merge(recipe("passthrough", [path]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
