"""The commands that errors about quantised weights name, for programs that are not installed here."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import fastinterp
from fastinterp.cli import commands as fastinterp_commands
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import F32
from tests.support.checkpoints import (
    recipe,
    tensor,
    write_file,
)
from tests.support.quantised_formats import FORMATS, save_format


def commands(paths: list[str]) -> list[str]:
    """The commands in the error of a merge."""
    with pytest.raises(CheckpointError, match=r"(are|is) quantised") as caught:
        fastinterp.merge(recipe("linear", paths, weights=[1.0] * len(paths)), Path(paths[0]).parent / "none")
    return re.findall(r"`([^` ]+ [^`]*)`", str(caught.value))  # keys are quoted, too


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GPTQ", ["from gptqmodel.utils.model_dequant import dequantize_model as d"]),
        ("AWQ", ["from gptqmodel.utils.model_dequant import dequantize_model as d"]),
        (
            "bitsandbytes nf4",
            ["import AutoModelForCausalLM as M", '.dequantize().save_pretrained("NEW", save_original_format=False)'],
        ),
        ("int4, compressed-tensors", ["CompressedTensorsConfig as Q", "Q(dequantize=True)"]),
        ("MLX", ["mlx_lm.convert --hf-path ", "--mlx-path NEW --dequantize"]),
        ("Metal", ["MetalConfig as Q"]),
    ],
)
def test_commands_of_programs_that_are_not_installed_here(tmp_path, name, said):
    paths = [save_format(tmp_path / n, FORMATS[name], seed) for seed, n in enumerate("ab")]
    [command] = commands(paths)
    assert all(part in command for part in said) and paths[0] in command
    if command.startswith("python"):
        compile(shlex.split(command)[2], "command", "exec")


@pytest.mark.parametrize(
    "name",
    ["EXL2", "AQLM", "HQQ", "torchao", "bitsandbytes fp4, stored as bfloat16", "Marlin", "fp8, ModelOpt's quantizer"],
)
def test_formats_without_a_command(tmp_path, name):
    """None is invented: the models from before are named."""
    paths = [save_format(tmp_path / n, FORMATS[name], seed) for seed, n in enumerate("ab")]
    assert commands(paths) == []


def test_names_that_a_shell_would_read(tmp_path):
    """The folder is one string of the command, whatever its name."""
    paths = [save_format(tmp_path / n, FORMATS["GPTQ"], seed) for seed, n in enumerate(("a $(touch x) 'y\"", "b"))]
    [command] = commands(paths)
    program, option, code = shlex.split(command)
    assert (program, option) == ("python", "-c") and json.dumps(paths[0]) in code


@pytest.mark.parametrize("name", ["GPTQ", "AWQ"])
def test_configurations_that_say_nothing_of_the_format(tmp_path, name):
    """It is told what is missing: the file, or a key of it."""
    paths = [save_format(tmp_path / n, FORMATS[name], seed) for seed, n in enumerate("ab")]
    made = recipe("linear", paths, weights=[1.0] * 2)
    for path in paths:
        (Path(path) / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    with pytest.raises(
        CheckpointError, match=r"GPTQModel, with the `quantization_config` of the model's config\.json$"
    ):
        fastinterp.merge(made, tmp_path / "none")
    for path in paths:
        (Path(path) / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"GPTQModel, which needs the model's config\.json beside the weights"):
        fastinterp.merge(made, tmp_path / "none")


@pytest.mark.parametrize("name", ["GPTQ", "AWQ", "HQQ"])
def test_inspect_names_the_format(tmp_path, name):
    path = save_format(tmp_path / "a", FORMATS[name], 1)
    text = CliRunner().invoke(fastinterp_commands, ["inspect", path]).stdout
    assert re.search(rf"^quantised: {name}, \d+ tensors?$", text, re.MULTILINE)
    (found,) = json.loads(CliRunner().invoke(fastinterp_commands, ["inspect", path, "--json"]).stdout)["quantised"]
    assert found["format"] == name and found["tensors"] > 0
    plain = write_file(tmp_path / "plain.safetensors", {"a": tensor(np.zeros(4), F32)})
    assert "quantised" not in CliRunner().invoke(fastinterp_commands, ["inspect", str(plain)]).stdout
    assert (
        json.loads(CliRunner().invoke(fastinterp_commands, ["inspect", str(plain), "--json"]).stdout)["quantised"] == []
    )
