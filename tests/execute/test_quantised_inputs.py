"""Merges of quantised models: the bytes are those of the merge of the numbers that their codes stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import fastinterp
from fastinterp.cli import commands
from fastinterp.ops.dtypes import BF16, F8_E4M3, F32
from tests.support.checkpoints import Tensor, assert_same, bell, read, recipe, tensor, write, write_file
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


def test_no_elements(tmp_path: Path) -> None:
    """Codes of an empty tensor have a scale, too, which belongs to no element."""
    paths = []
    for name in "ab":
        empty = {"p.weight": tensor(np.zeros((0, 8)), F8_E4M3), "p.weight_scale": tensor(2.0, F32, ())}
        full = {"q.weight": tensor(np.ones((4, 8)), F8_E4M3), "q.weight_scale": tensor(2.0, F32, ())}
        paths.append(str(write(tmp_path / name, empty | full)))
    for quantize in ("none", "same"):
        fastinterp.merge(recipe("linear", paths, weights=[0.3, 0.7], quantize=quantize), tmp_path / quantize)
    numbers = {"p.weight": tensor(np.zeros((0, 8)), BF16), "q.weight": tensor(np.full((4, 8), 2), BF16)}
    assert_same(read(tmp_path / "none"), numbers)
    assert set(read(tmp_path / "same")) == {*numbers, "q.weight_scale"}


# --- scales that are not finite --------------------------------------------------------------------------------------

# By the dtype of a scale: what is stored of it, and the form that has it.
NOT_FINITE = {
    "F32 NaN": ("fp8 blocks", b"\x00\x00\xc0\x7f"),
    "F32 negative Inf": ("fp8, one scale", b"\x00\x00\x80\xff"),
    "BF16 NaN": ("fp8 rows, BF16", b"\x81\xff"),
    "F16 Inf": ("fp8 rows, a vector of F16", b"\x00\x7c"),
    "E8M0 NaN": ("mxfp8, E8M0", b"\xff"),
    "U8, an exponent": ("mxfp4, compressed-tensors", b"\xff"),
    "E4M3 NaN": ("nvfp4, ModelOpt", b"\x7f"),
}


@pytest.mark.parametrize(("name", "value"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_scales_that_are_not_finite(tmp_path: Path, name: str, value: bytes) -> None:
    """An error before anything is written, that names the scale, its element and its file."""
    form = ENCODINGS[name]
    stored, _ = models(form, 1)
    scale = next(n for n in stored if "scale" in n.rpartition(".")[2] and not n.endswith(("scale_2", "scaled_fp8")))
    raw = stored[scale].raw.copy()
    at = raw.size // len(value) // 2
    raw[at * len(value) : (at + 1) * len(value)] = np.frombuffer(value, np.uint8)
    bad = saved(tmp_path / "bad", stored | {scale: Tensor(stored[scale].dtype, stored[scale].shape, raw)}, form)
    good = saved(tmp_path / "good", models(form, 0)[0], form)
    for values in (recipe("linear", [good, bad], weights=[0.5, 0.5]), recipe("passthrough", [bad])):
        (tmp_path / "r.yml").write_text(json.dumps(values))
        result = CliRunner().invoke(commands, ["merge", str(tmp_path / "r.yml"), str(tmp_path / "out")])
        assert result.exit_code == 3, result.output
        assert f"`{scale}`" in result.output and f"holds NaN or Inf: its element {at}, counted from 0" in result.output
        assert f"{bad}/model.safetensors" in result.output
        checked = CliRunner().invoke(commands, ["check", str(tmp_path / "r.yml")])
        assert checked.exit_code == 3 and f"`{scale}`" in checked.output
        assert not (tmp_path / "out").exists() and sorted(p.name for p in tmp_path.iterdir()) == [
            "bad",
            "good",
            "r.yml",
        ]


def test_large_scales_are_finite() -> None:
    """Their first byte is that of NaN."""
    from fastinterp.execute.scales import not_finite

    large = np.full(1000, 3e38, "<f4")
    assert not_finite(large.tobytes(), "F32") == -1
    large[777] = np.nan
    assert not_finite(large.tobytes(), "F32") == 777
