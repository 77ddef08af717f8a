"""Merges of quantised models: the bytes are those of the merge of the numbers that their codes stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastinterp
from fastinterp.ops.dtypes import BF16, F8_E4M3, F32
from tests.support.checkpoints import Tensor, assert_same, bell, read, recipe, tensor, write_file
from tests.support.encodings import COLUMNS, ENCODINGS, ROWS, Encoding

P = "model.layers.{}.mlp.up_proj"
NORM = "model.norm.weight"
every_encoding = pytest.mark.parametrize("form", ENCODINGS.values(), ids=ENCODINGS)


def matrix(seed: int, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> np.ndarray:
    """A fine-tune of one base, whose rows and columns differ in size."""
    base = bell(1, int(np.prod(shape))).reshape(shape) * 0.02 * np.exp(bell(2, shape[-1]))
    return base + bell(10 + seed, base.size).reshape(shape) * 2e-3


def models(form: Encoding, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model of this form, and the same in numbers."""
    norm = {NORM: tensor(1 + bell(seed, 64) * 0.1, BF16)}
    stored, numbers = dict(norm), dict(norm)
    for layer in range(2):
        one = form.encode(matrix(10 * seed + layer))
        name = P.format(layer)
        stored |= {f"{name}.{end}": t for end, t in one.tensors.items()}
        numbers[f"{name}.weight"] = tensor(one.numbers, F32)
    if f"{P.format(0)}.scale_weight" in stored:
        stored["scaled_fp8"] = Tensor(F8_E4M3, (0,), np.empty(0, np.uint8))
    return stored, numbers


def saved(folder: Path, model: Mapping[str, Tensor], form: Encoding | None = None, **config: Any) -> str:
    folder.mkdir(parents=True)
    write_file(folder / "model.safetensors", model, metadata={} if form is None else form.metadata)
    said = {"torch_dtype": "bfloat16", **({} if form is None else form.config), **config}
    (folder / "config.json").write_text(json.dumps(said))
    return str(folder)


def pair(folder: Path, form: Encoding, count: int = 2) -> tuple[list[str], list[str]]:
    """Paths of models of this form, and of the same in numbers."""
    made = [models(form, seed) for seed in range(count)]
    return (
        [saved(folder / f"codes{i}", stored, form) for i, (stored, _) in enumerate(made)],
        [saved(folder / f"numbers{i}", numbers) for i, (_, numbers) in enumerate(made)],
    )


@every_encoding
def test_merge(tmp_path: Path, form: Encoding) -> None:
    """The output has numbers alone, in BF16, and says nothing of codes."""
    codes, numbers = pair(tmp_path, form)
    fastinterp.merge(recipe("linear", numbers, weights=[0.3, 0.7], dtype="bfloat16"), tmp_path / "want")
    report = fastinterp.merge(recipe("linear", codes, weights=[0.3, 0.7]), tmp_path / "out")
    assert_same(read(tmp_path / "out"), read(tmp_path / "want"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
    assert any("2 tensors de-quantised (" in remark for remark in report.remarks) and report.warnings == ()


@every_encoding
def test_base_in_codes_and_fine_tune_in_numbers(tmp_path: Path, form: Encoding) -> None:
    codes, numbers = pair(tmp_path, form, 3)
    values = recipe("task_arithmetic", numbers[1:], weights=[0.5, 0.4], dtype="float32", base_model=numbers[0])
    fastinterp.merge(values, tmp_path / "want")
    mixed = recipe("task_arithmetic", [codes[1], numbers[2]], weights=[0.5, 0.4], dtype="float32", base_model=codes[0])
    fastinterp.merge(mixed, tmp_path / "out")
    assert_same(read(tmp_path / "out"), read(tmp_path / "want"))


@every_encoding
def test_one_model_alone_is_made_numbers(tmp_path: Path, form: Encoding) -> None:
    codes, numbers = pair(tmp_path, form, 1)
    for k, path in enumerate((*codes, *numbers)):
        fastinterp.merge(recipe("passthrough", [path], dtype="float32"), tmp_path / f"out{k}")
    assert_same(read(tmp_path / "out0"), read(tmp_path / "out1"))
