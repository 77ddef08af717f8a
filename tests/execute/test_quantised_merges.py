"""Merges of quantised models: refused once and by name, unless codes and scales are equal; alone they are copied."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import fastinterp
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import BF16, F32
from fastinterp.plan import quantised
from tests.support.checkpoints import Tensor, assert_same, floats, read, recipe, tensor
from tests.support.quantised_formats import FORMATS, Format, model, save_format

GPTQ, SCALED = FORMATS["GPTQ"], FORMATS["fp8, ModelOpt's quantizer"]
every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def pair(folder: Path, form: Format) -> list[str]:
    """Two models of a format, with other codes and scales."""
    return [save_format(folder / name, form, seed) for seed, name in enumerate("ab")]


def refusal(how: Any, out: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        fastinterp.merge(how, out)
    assert type(caught.value) is CheckpointError and not out.exists()
    return str(caught.value)


def linear(paths: list[str], **more: Any) -> dict[str, Any]:
    return {**recipe("linear", paths, weights=[1.0] * len(paths)), **more}


@every_format
def test_different_codes_are_refused(tmp_path, form):
    """Once, with the models, the format and an example; by merge, explain and check alike; `integers` does not help."""
    a, b = pair(tmp_path, form)
    message = refusal(linear([a, b]), tmp_path / "out")
    assert message.startswith(f"{a}, {b} are quantised ({form.name}): ")
    assert any(f", as {name}" in message for name in form.layout) and "before they were quantised" in message
    assert "integers" not in message and len(message) < 2000
    assert refusal(linear([a, b], integers=a), tmp_path / "out") == message
    with pytest.raises(CheckpointError, match="are quantised"):
        fastinterp.explain(linear([a, b]))
    found = fastinterp.check(linear([a, b]))
    assert [e.message for e in found.errors] == [message] and found.exit_code == 3


@every_format
def test_equal_codes_are_copied(tmp_path, form):
    """Of models that were tuned beside their codes, what is not quantised is merged."""
    shared = model(form.layout, 0)
    mine = shared | {name: model(form.layout, 1)[name] for name in form.plain}
    paths = [save_format(tmp_path / "a", form, 0, shared), save_format(tmp_path / "b", form, 0, mine)]
    report = fastinterp.merge(linear(paths, dtype="float32"), tmp_path / "out")
    assert report.warnings == ()
    merged = read(tmp_path / "out")
    for name, t in merged.items():
        if name not in form.plain:
            assert_same({name: t}, {name: shared[name]})
        else:
            assert t.dtype == F32
            assert np.allclose(floats(t), (floats(shared[name]) + floats(mine[name])) / 2, rtol=1e-6, atol=0)
    assert sorted(merged) == sorted(form.layout)
    found = fastinterp.check(linear(paths))
    assert (found.errors, found.warnings) == ((), ())


@every_format
def test_one_model_alone_is_copied(tmp_path, form):
    """Codes and scales as they are, whatever dtype is asked for; what config.json says of them stays true."""
    path = save_format(tmp_path / "a", form, 0)
    before = read(tmp_path / "a")
    fastinterp.merge({"merge_method": "passthrough", "models": [{"model": path}], "dtype": "float32"}, tmp_path / "out")
    after = read(tmp_path / "out")
    kept = [name for name in form.layout if name not in form.plain]
    assert_same({n: after[n] for n in kept}, {n: before[n] for n in kept})
    assert {after[name].dtype for name in form.plain} <= {F32}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"torch_dtype": "float32", **form.config}


def test_codes_that_differ_late_are_refused_while_they_are_copied(tmp_path, monkeypatch):
    """Samples may be equal: the run compares all, and check more. The message is the same."""
    monkeypatch.setattr(quantised, "_SAMPLE", 8)
    one = model(GPTQ.layout, 0)
    other = {name: Tensor(t.dtype, t.shape, t.raw.copy()) for name, t in one.items()}
    name = next(n for n in one if n.endswith("qweight"))
    other[name].raw[-1] ^= 1
    paths = [save_format(tmp_path / "a", GPTQ, 0, one), save_format(tmp_path / "b", GPTQ, 0, other)]
    message = refusal(linear(paths), tmp_path / "out")
    assert "are quantised (GPTQ)" in message and "integers" not in message
    found = fastinterp.check(linear(paths))
    assert [e.message for e in found.errors] == [message]


def test_one_of_two_is_quantised(tmp_path):
    """That one is named; different names and shapes are not what is told."""
    a = save_format(tmp_path / "a", GPTQ, 0)
    plain = {
        "model.layers.0.mlp.up_proj.weight": tensor(np.ones((64, 64)), BF16),
        "model.norm.weight": tensor([1.0], BF16),
    }
    b = save_format(tmp_path / "b", Format("", {}), 0, plain)
    for paths in ([a, b], [b, a]):
        message = refusal(linear(paths), tmp_path / "out")
        assert message.startswith(
            f"{a} is quantised (GPTQ): 1 tensor, as model.layers.0.mlp.up_proj.qweight with scales"
        )
        found = fastinterp.check(linear(paths))
        assert [e.message for e in found.errors] == [message]


def test_two_formats(tmp_path):
    a, b = save_format(tmp_path / "a", GPTQ, 0), save_format(tmp_path / "b", FORMATS["AWQ"], 0)
    message = refusal(linear([a, b]), tmp_path / "out")
    assert f"{a} is quantised (GPTQ)" in message and f"{b} is quantised (AWQ)" in message


def test_floats_with_scales_of_the_same_names_and_shapes(tmp_path):
    """A model that was de-quantised in place, scales left beside: not the same as the one with codes."""
    a = save_format(tmp_path / "a", SCALED, 0)
    tensors = model(SCALED.layout, 0)
    form, name = SCALED, "model.layers.0.mlp.up_proj.weight"
    b = save_format(tmp_path / "b", form, 0, tensors | {name: tensor(np.ones((64, 64)), BF16)})
    assert refusal(linear([a, b]), tmp_path / "out").startswith(f"{a} is quantised (fp8 with scales)")


def test_a_method_that_would_scale_codes(tmp_path):
    path = save_format(tmp_path / "a", SCALED, 0)
    how = {"merge_method": "passthrough", "models": [{"model": path, "parameters": {"scale": 0.5}}]}
    message = refusal(how, tmp_path / "out")
    assert "passthrough would change model.layers.0.mlp.up_proj.weight, which holds codes" in message


def test_modules_beside_the_quantised_one_are_merged(tmp_path):
    a, b = pair(tmp_path, GPTQ)
    module = {"models": [{"model": a}, {"model": b}], "parameters": {"weight": 1.0}}
    how = {"merge_method": "linear", "base_model": a, "modules": {"norm": module}}
    fastinterp.merge(how, tmp_path / "out")
    merged, first, other = (read(tmp_path / name) for name in ("out", "a", "b"))
    half = (floats(first["model.norm.weight"]) + floats(other["model.norm.weight"])) / 2
    assert_same(merged, first | {"model.norm.weight": tensor(half, BF16)})
    assert "are quantised (GPTQ)" in refusal({**how, "modules": {"layers": module}}, tmp_path / "none")


def test_documents(tmp_path):
    """A copy in a document above holds codes as well."""
    a, b = pair(tmp_path, SCALED)
    above = {"name": "first", "merge_method": "passthrough", "models": [{"model": a}]}
    message = refusal([above, linear(["first", b])], tmp_path / "out")
    assert message.startswith("first is quantised (fp8 with scales): ") and f"{b} is quantised (fp8" in message
    fastinterp.merge([above, {"merge_method": "passthrough", "models": [{"model": "first"}]}], tmp_path / "out")
    assert_same(read(tmp_path / "out"), read(tmp_path / "a"))


# --- what the output's configuration says ----------------------------------------------------------------------------


def test_configuration_of_models_that_were_made_numbers(tmp_path):
    """Of models that are no longer quantised, and say so still: the output does not, and it is told."""
    said = {
        "torch_dtype": "bfloat16", "quantization": {"bits": 4, "group_size": 64},
        "text_config": {"quantization_config": {"quant_method": "fp8"}, "hidden_size": 4},
        "compression_config": {"x": 1},
        "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    form = Format("", {"norm.weight": ("BF16", (4,))}, said)
    a, b = pair(tmp_path, form)
    (tmp_path / "a" / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    report = fastinterp.merge(linear([a, b]), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "torch_dtype": "bfloat16", "text_config": {"hidden_size": 4}
    }  # fmt: skip
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert report.remarks == (
        f"config.json of {a} says that weights are quantised (fp8), and those here are not: left out",
    )
    assert report.warnings == ()


def test_configuration_of_another_model(tmp_path):
    """Codes come from one model, config.json from another, which does not say that there are some."""
    a = save_format(tmp_path / "a", GPTQ, 0)
    b = save_format(tmp_path / "b", Format("", {"lm_head.weight": ("BF16", (4, 4))}), 0)
    modules = {"layers": {"models": [{"model": a}]}, "lm_head": {"models": [{"model": b}]}}
    how = {"merge_method": "passthrough", "base_model": b, "modules": modules, "dtype": "bfloat16"}
    report = fastinterp.merge(how, tmp_path / "out")
    assert (
        len(report.warnings) == 1 and "the output has quantised weights (GPTQ), and config.json" in report.warnings[0]
    )


# --- commands --------------------------------------------------------------------------------------------------------


def test_commands(tmp_path):
    """interpolate and sweep refuse, whatever --integers says; diff measures what are numbers."""
    a, b = pair(tmp_path, SCALED)
    out = str(tmp_path / "out")
    for args in (
        ("interpolate", a, b, "--alpha", "0.5", "-o", out),
        ("interpolate", a, b, "--alpha", "0.5", "--integers", a, "-o", out),
        ("sweep", a, b, "--alphas", "0,0.5", "-o", out),
        ("sweep", a, b, "--alphas", "0,0.5", "-o", out, "--virtual", "--integers", b),
    ):
        result = CliRunner().invoke(commands, list(args))
        assert result.exit_code == 3 and f"{a}, {b} are quantised (fp8 with scales)" in result.output
    result = CliRunner().invoke(commands, ["diff", a, b])
    assert result.exit_code == 0
    assert (
        "2 tensors with codes or scales of quantised weights (fp8 with scales), which are no numbers" in result.output
    )
    assert re.search(r"^model\.norm\.weight  ", result.output, re.MULTILINE)
    found = json.loads(CliRunner().invoke(commands, ["diff", a, b, "--json"]).output)
    assert sorted(found["tensors"]) == sorted(SCALED.plain)
    assert sorted(found["quantised"]) == sorted(set(SCALED.layout) - set(SCALED.plain))


def test_check_says_nothing_of_noise(tmp_path):
    """Codes are not sampled as numbers: no delta of theirs is called noise."""
    form = SCALED
    shared = model(form.layout, 0)
    paths = [
        save_format(tmp_path / name, form, 0, shared | {n: model(form.layout, seed)[n] for n in form.plain})
        for seed, name in enumerate("abc")
    ]
    how = {**recipe("task_arithmetic", paths[1:], weights=[1.0, 1.0]), "base_model": paths[0]}
    found = fastinterp.check(how)
    assert (found.errors, found.warnings) == ((), ())


def test_a_cast_to_fp8_merges_as_before(tmp_path):
    """fp8 as a number format is no format of codes."""
    layout = {"a.weight": ("F8_E4M3", (16, 16)), "a.norm.scale": ("F8_E4M3", (16,))}
    paths = pair(tmp_path, Format("", layout))
    fastinterp.merge(linear(paths), tmp_path / "out")
    first, other = read(tmp_path / "a"), read(tmp_path / "b")
    for name, t in read(tmp_path / "out").items():
        assert_same({name: t}, {name: tensor((floats(first[name]) + floats(other[name])) / 2, t.dtype, t.shape)})
    assert open_checkpoint(paths[0]).tensors.keys() == layout.keys()
