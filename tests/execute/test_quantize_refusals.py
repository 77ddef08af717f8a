"""What `quantize: same` refuses, and where it has no effect."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner, Result

import fastinterp
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError, RecipeError, UsageError
from fastinterp.ops.dtypes import BF16, F32
from tests.support.checkpoints import (
    Tensor,
    assert_same,
    bell,
    integers,
    read,
    recipe,
    tensor,
)
from tests.support.encodings import ENCODINGS
from tests.support.quantised_models import EXPERTS, FORMS, NORM, UP, Form, Q, family, linear, saved


def run(*args: object) -> Result:
    return CliRunner().invoke(commands, [str(a) for a in args], prog_name="fastinterp")


def test_random_rounding_is_refused(tmp_path):
    form, models = FORMS["blocks"], family(FORMS["blocks"], 2)
    paths = saved(tmp_path, form, models)
    with pytest.raises(RecipeError, match="is not defined for it"):
        fastinterp.merge(linear(paths, rounding="stochastic"), tmp_path / "out")
    with pytest.raises(UsageError, match="is not defined for it"):
        fastinterp.merge(linear(paths), tmp_path / "out", rounding="stochastic")
    with pytest.raises(UsageError, match="quantize must be none or same, got 'fp8'"):
        fastinterp.merge(linear(paths), tmp_path / "out", quantize="fp8")
    with pytest.raises(RecipeError, match="`quantize` must be none or same"):
        fastinterp.merge({**linear(paths), "quantize": "fp8"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def nvfp4(seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    start = UP.removesuffix("weight")
    return {
        UP: integers(rng.integers(0, 256, (32, 16)), "U8"),
        f"{start}weight_scale": tensor(np.full((32, 2), 2.0), F8),
        f"{start}weight_scale_2": tensor(0.5, F32),
        NORM: tensor(np.ones(32), BF16),
    }


F8 = family(FORMS["blocks"], 1)[0][Q].dtype


def test_formats_that_are_not_written(tmp_path):
    """A merge of NVFP4 weights is refused by name, and the remedy works; copies keep their bytes."""
    form = Form("scaled_f8_e4m3", "", config={"quantization_config": {"quant_method": "modelopt"}})
    models = [nvfp4(0), nvfp4(1)]
    paths = saved(tmp_path, form, models)
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe("linear", paths, weights=[0.5, 0.5])))
    refused = run("merge", tmp_path / "recipe.yml", tmp_path / "out", "--quantize", "same")
    assert refused.exit_code == 3
    assert "NVFP4" in refused.output
    assert "--dtype" in refused.output
    assert not (tmp_path / "out").exists()
    assert run("merge", tmp_path / "recipe.yml", tmp_path / "out", "--dtype", "bfloat16").exit_code == 0
    fastinterp.merge(recipe("passthrough", paths[:1], quantize="same"), tmp_path / "copy")
    assert_same(models[0], read(tmp_path / "copy"))


def test_scales_in_tiles_are_not_written(tmp_path):
    """Those of ComfyUI's MXFP8: a merge is refused, and copies keep their bytes."""
    start = UP.removesuffix("weight")
    models = []
    for seed in range(2):
        made = ENCODINGS["mxfp8, ComfyUI"].encode(bell(seed, 200 * 320).reshape(200, 320))
        models.append({start + name: t for name, t in made.tensors.items()} | {NORM: tensor(np.ones(32), BF16)})
    paths = saved(tmp_path, Form("scaled_f8_e4m3", ""), models)
    with pytest.raises(CheckpointError, match="MXFP8 with scales in tiles, which is read and not written"):
        fastinterp.merge(linear(paths), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fastinterp.merge(recipe("passthrough", paths[:1], quantize="same"), tmp_path / "copy")
    assert_same(models[0], read(tmp_path / "copy"))


def test_in_memory_weights_are_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    form, models = FORMS["blocks"], family(FORMS["blocks"], 2)
    state = fastinterp.load(linear(saved(tmp_path, form, models)))
    assert state[Q].dtype == torch.bfloat16
    assert set(state) == {NORM, Q, UP, EXPERTS}
