"""`quantize: same`: outputs have the base's codes and scales, computed anew. Bytes are those of the numpy reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open

import fastinterp
from fastinterp.backends.registry import ISA_VARIABLE
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError, RecipeError
from fastinterp.execute.report import Report
from fastinterp.ops.combine import Combine
from fastinterp.ops.dtypes import BF16, F32
from fastinterp.plan import output_encoding
from tests.support import backends
from tests.support.checkpoints import (
    Tensor,
    assert_same,
    bell,
    expected,
    floats,
    integers,
    read,
    recipe,
    tensor,
    write,
    write_file,
)
from tests.support.devices.fake_device import FakeDevice
from tests.support.quantised_models import (
    FORMS,
    NORM,
    UP,
    WEIGHTS,
    Form,
    Q,
    family,
    linear,
    numbers,
    requantised,
    saved,
    shapes_of,
    stored,
)

pytest_plugins = ("tests.support.devices.device_fixtures",)

every_form = pytest.mark.parametrize("name", FORMS)


def wanted(form: Form, models: list[dict[str, Tensor]], combine: Combine) -> dict[str, Tensor]:
    """What the reference makes: the sums in float32, encoded; the norm in BF16."""
    plain = [numbers(form, model) for model in models]
    sums = expected(plain, combine, out=F32)
    return requantised(form, {**sums, NORM: expected(plain, combine, out=BF16)[NORM]})


def merge(*args: Any, **options: Any) -> Report:
    report = fastinterp.merge(*args, **options)
    assert isinstance(report, Report)
    return report


def run(*args: object) -> Result:
    return CliRunner().invoke(commands, [str(a) for a in args], prog_name="fastinterp")


# --- bytes -----------------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("isa", backends.usable())
def test_bytes_are_those_of_the_reference(tmp_path, monkeypatch, name, isa):
    monkeypatch.setenv(ISA_VARIABLE, isa)
    form, models = FORMS[name], family(FORMS[name], 3)
    paths = saved(tmp_path, form, models)
    want = wanted(form, models, Combine(WEIGHTS, sums_to_one=False))
    for threads in (1, 3):
        fastinterp.merge(linear(paths), tmp_path / "out", threads=threads, force=True)
        assert_same(want, read(tmp_path / "out"))


@every_form
def test_magnitudes_are_measured_first_where_matrices_are_large(tmp_path, monkeypatch, name):
    """In a read of their own: the same bytes."""
    form, models = FORMS[name], family(FORMS[name], 2)
    paths = saved(tmp_path, form, models)
    fastinterp.merge(linear(paths), tmp_path / "once")
    monkeypatch.setattr(output_encoding, "_AT_ONCE", 100)
    plan = fastinterp.explain(linear(paths))
    twice = form.blocks == (None, None)
    assert ("reads 2x: magnitudes, combine" in str(plan)) == twice
    report = merge(linear(paths), tmp_path / "twice", threads=2)
    assert_same(read(tmp_path / "once"), read(tmp_path / "twice"))
    assert report.bytes_read == plan.as_dict()["bytes_read"]


METHODS: dict[str, dict[str, Any]] = {
    "slerp": {"parameters": {"t": 0.3}},
    "task_arithmetic": {"parameters": {"weight": 0.7}},
    "ties": {"parameters": {"density": 0.4, "weight": 0.6}},
    "dare_ties": {"parameters": {"density": 0.5, "weight": 0.6}, "seed": 7},
    "della": {"parameters": {"density": 0.5, "epsilon": 0.2, "weight": 0.6}, "seed": 7},
    "model_stock": {},
    "breadcrumbs": {"parameters": {"density": 0.6, "gamma": 0.1, "weight": 0.5}},
}


@pytest.mark.parametrize("measured", [False, True], ids=["at once", "measured first"])
@pytest.mark.parametrize("name", ["blocks", "rows", "tensor", "mxfp8"])
@pytest.mark.parametrize("method", METHODS)
def test_methods(tmp_path, monkeypatch, method, name, measured):
    """The codes are those of the float32 merge by the same method."""
    if measured:
        monkeypatch.setattr(output_encoding, "_AT_ONCE", 100)
    form, models = FORMS[name], family(FORMS[name], 2 if method == "slerp" else 3)
    paths = saved(tmp_path, form, models)
    values = recipe(method, paths, base_model=paths[0], **METHODS[method])
    fastinterp.merge(values, tmp_path / "float32", dtype="float32")
    fastinterp.merge(values, tmp_path / "out", quantize="same")
    sums = read(tmp_path / "float32")
    fastinterp.merge(values, tmp_path / "numbers")
    sums[NORM] = read(tmp_path / "numbers")[NORM]
    assert_same(requantised(form, sums), read(tmp_path / "out"))


@every_form
def test_copies_keep_their_bytes(tmp_path, name):
    """Codes and scales that another quantiser made: those of no reference here."""
    form, models = FORMS[name], family(FORMS[name], 2)
    for model in models:
        model[Q] = Tensor(model[Q].dtype, model[Q].shape, np.where(model[Q].raw % 128 > 100, 3, model[Q].raw))
    paths = saved(tmp_path, form, models)
    report = merge(recipe("passthrough", paths[:1], quantize="same"), tmp_path / "out")
    assert_same(models[0], read(tmp_path / "out"))
    assert set(report.copied) == {*shapes_of(form), NORM}
    fastinterp.interpolate(paths[0], paths[1], [0, 0.3, 1], tmp_path / "line", quantize="same")
    assert_same(models[0], read(tmp_path / "line" / "alpha_0"))
    assert_same(models[1], read(tmp_path / "line" / "alpha_1"))
    combine = Combine((0.7, 0.3), sums_to_one=False)
    want = wanted(form, models, combine)
    assert_same(want, read(tmp_path / "line" / "alpha_0.3"))


def test_a_copy_of_another_form_is_encoded(tmp_path):
    """Its format is that of the base."""
    form, other = FORMS["blocks"], FORMS["rows"]
    [base], [model] = family(form, 1), family(other, 2)[1:]
    paths = [*saved(tmp_path / "base", form, [base]), *saved(tmp_path / "other", other, [model])]
    values = {**recipe("linear", paths, weights=[0, 1]), "base_model": paths[0]}
    report = merge(values, tmp_path / "out", quantize="same")
    want = requantised(form, {**numbers(other, model)})
    assert_same(want, read(tmp_path / "out"))
    assert Q not in report.copied


def test_models_that_are_not_quantised_take_the_form_of_the_base(tmp_path):
    form, models = FORMS["blocks"], family(FORMS["blocks"], 3)
    plain = [numbers(form, model) for model in models]
    base = saved(tmp_path / "base", form, models[:1])
    others = saved(tmp_path / "others", FORMS["e5m2"], plain[1:])
    fastinterp.merge(linear([*base, *others]), tmp_path / "out")
    assert_same(wanted(form, models, Combine(WEIGHTS, sums_to_one=False)), read(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="has nothing that is"):
        fastinterp.merge(linear([*others, *base]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_documents(tmp_path):
    """What is made on the way is float32; the last document is encoded, in the form of the base above."""
    form, models = FORMS["blocks"], family(FORMS["blocks"], 3)
    paths = saved(tmp_path, form, models)
    first = {"name": "first", **recipe("slerp", paths[:2], base_model=paths[0], parameters={"t": 0.3})}
    last = recipe("linear", ["first", paths[2]], weights=[0.4, 0.6])
    fastinterp.merge([first, last], tmp_path / "float32", dtype="float32")
    fastinterp.merge([first, {**last, "quantize": "same"}], tmp_path / "out")
    want = requantised(form, read(tmp_path / "float32"))
    got = read(tmp_path / "out")
    assert got[NORM].dtype == BF16
    assert_same({n: t for n, t in want.items() if n != NORM}, {n: t for n, t in got.items() if n != NORM})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == form.config["quantization_config"]
    with pytest.raises(RecipeError, match="belongs into the last document"):
        fastinterp.merge([{**first, "quantize": "same"}, last], tmp_path / "refused")


def test_stacks(tmp_path):
    """Layers in another order keep codes and scales under the names of their new places."""
    form, models = FORMS["blocks"], family(FORMS["blocks"], 1)
    [model] = models
    model |= {n.replace("layers.0", "layers.1"): t for n, t in family(form, 2)[1].items() if "layers.0" in n}
    [path] = saved(tmp_path, form, models)
    slices = [{"sources": [{"model": path, "layer_range": list(pair)}]} for pair in ((1, 2), (0, 1), (1, 2))]
    fastinterp.merge({"merge_method": "passthrough", "slices": slices, "quantize": "same"}, tmp_path / "out")
    want = {NORM: model[NORM]}
    for to, of in enumerate((1, 0, 1)):
        want |= {n.replace(f"layers.{of}", f"layers.{to}"): t for n, t in model.items() if f"layers.{of}" in n}
    assert_same(want, read(tmp_path / "out"))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blocks", "rows", "tensor", "int8 rows"])
def test_files_are_true(tmp_path, name):
    """Names, dtypes and shapes are the base's; its configuration stays; scales lie beside their codes."""
    form, models = FORMS[name], family(FORMS[name], 2)
    paths = saved(tmp_path, form, models)
    report = merge(linear(paths), tmp_path / "out", max_shard_size=30_000)
    got = read(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in got.items()} == {n: (t.dtype, t.shape) for n, t in models[0].items()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((Path(paths[0]) / "config.json").read_text())
    assert len(report.files) > 1
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for file in report.files:
        with safe_open(tmp_path / "out" / file, "np") as opened:
            assert {n for n, f in weight_map.items() if f == file} == set(opened.keys())
    assert all(weight_map[codes] == weight_map[form.scale_name(codes)] for codes in shapes_of(form))
    assert any("quantised as in" in remark for remark in report.remarks)
    assert not any("de-quantised" in remark for remark in report.remarks)


def test_what_belongs_to_codes_stays(tmp_path):
    """Scales of activations, of keys and values, and ComfyUI's descriptions are those of the base."""
    form, models = FORMS["tensor"], family(FORMS["tensor"], 2)
    for i, model in enumerate(models):
        model["model.layers.0.mlp.up_proj.input_scale"] = tensor(0.5 + i, F32)
        model["model.layers.0.self_attn.k_scale"] = tensor(0.25 + i, F32)
    paths = saved(tmp_path, form, models)
    report = merge(linear(paths), tmp_path / "out")
    got = read(tmp_path / "out")
    assert set(got) == set(models[0])
    for name in ("model.layers.0.mlp.up_proj.input_scale", "model.layers.0.self_attn.k_scale"):
        assert_same({name: models[0][name]}, {name: got[name]})
    assert any("scales of activations" in remark and "are those of" in remark for remark in report.remarks)


def test_comfy(tmp_path):
    form, models = FORMS["e5m2"], family(FORMS["e5m2"], 2)
    described = np.frombuffer(b'{"format": "float8_e5m2"}', np.uint8)
    for model in models:
        model["model.layers.0.mlp.up_proj.comfy_quant"] = integers(described, "U8")
    paths = saved(tmp_path, form, models)
    fastinterp.merge(linear(paths), tmp_path / "out")
    got = read(tmp_path / "out")
    assert set(got) == set(models[0])
    assert got["model.layers.0.mlp.up_proj.comfy_quant"].raw.tobytes() == described.tobytes()


def test_descriptions_in_the_header_stay(tmp_path):
    """ComfyUI's of layers; they are left out where weights are written as numbers."""
    models = family(FORMS["tensor"], 2)
    layers = {name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in (Q, UP)}
    said = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path, model in zip(paths, models, strict=True):
        write_file(path, model, metadata=said)
    for k, quantize in enumerate(("same", "none")):
        out = tmp_path / f"out{k}.safetensors"
        fastinterp.interpolate(paths[0], paths[1], 0.4, out, quantize=quantize)
        with safe_open(out, "np") as opened:
            assert opened.metadata().get("_quantization_metadata") == (None if k else said["_quantization_metadata"])


def test_descriptions_in_the_header_follow_the_layers(tmp_path):
    """Of a stack each layer is described as the one that it is."""
    [model] = family(FORMS["tensor"], 1)
    names = [n for n in model if ".layers.0." in n]
    model |= {n.replace(".0.", ".1."): model[n] for n in names}
    layers = {
        Q.removesuffix(".weight").replace(".0.", f".{i}."): {"format": "float8_e4m3fn", "of": i} for i in range(2)
    }
    path = tmp_path / "a.safetensors"
    said = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    write_file(path, model, metadata=said)
    slices = [{"sources": [{"model": str(path), "layer_range": list(pair)}]} for pair in ((1, 2), (0, 2))]
    out = tmp_path / "out.safetensors"
    fastinterp.merge({"merge_method": "passthrough", "slices": slices, "quantize": "same"}, out)
    with safe_open(out, "np") as opened:
        made = json.loads(opened.metadata()["_quantization_metadata"])
    assert made["format_version"] == "1.0"
    assert {name.split(".")[2]: of["of"] for name, of in made["layers"].items()} == {"0": 1, "1": 0, "2": 1}


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_names_of_layers_in_configurations_follow_the_layers(tmp_path, file):
    """Layers that the origin has as numbers are named by their new places."""
    form, models = FORMS["blocks"], family(FORMS["blocks"], 2)
    [path] = saved(tmp_path, form, models[:1])
    model = models[0] | {n.replace("layers.0", "layers.1"): t for n, t in models[1].items() if "layers.0" in n}
    del model[form.scale_name(UP)]
    model[UP] = tensor(np.ones((130, 96)), BF16)
    write(Path(path), model)
    config: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 2}
    config["quantization_config"] = dict(form.config["quantization_config"])
    said = config["quantization_config"] if file == "config.json" else {"quantized_layers": {"model.layers.1.mlp": 8}}
    said["ignore"] = ["lm_head", "model.layers.0.mlp.up_proj", r"re:.*layers\.1\.mlp\.gate$", "visual.layers.0"]
    if file != "config.json":
        Path(path, file).write_text(json.dumps({"producer": {}, "quantization": said}))
    Path(path, "config.json").write_text(json.dumps(config))
    slices = [{"sources": [{"model": path, "layer_range": list(pair)}]} for pair in ((1, 2), (0, 1), (0, 2))]
    fastinterp.merge({"merge_method": "passthrough", "slices": slices, "quantize": "same"}, tmp_path / "out")
    made = json.loads((tmp_path / "out" / file).read_text())
    table = made["quantization_config" if file == "config.json" else "quantization"]
    assert table.pop("ignore") == [
        "lm_head", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj", r"re:.*layers\.0\.mlp\.gate$",
        r"re:.*layers\.3\.mlp\.gate$", "visual.layers.0",
    ]  # fmt: skip
    if file == "config.json":
        assert table == form.config["quantization_config"]
        assert made["num_hidden_layers"] == 4
    else:
        assert table == {"quantized_layers": {"model.layers.0.mlp": 8, "model.layers.3.mlp": 8}}
    got = read(tmp_path / "out")
    assert [got[UP.replace(".0.", f".{i}.")].dtype.name for i in range(4)] == ["F8_E4M3", "BF16", "BF16", "F8_E4M3"]


def test_explain_and_check(tmp_path):
    form, models = FORMS["blocks"], family(FORMS["blocks"], 2)
    paths = saved(tmp_path, form, models)
    plan = fastinterp.explain(linear(paths))
    assert "each byte once" in str(plan)
    text = " ".join(str(plan).split())  # lines are wrapped
    assert "F32 -> fp8 with scales of blocks of 128 x 128" in text
    assert "quantised as in" in text
    report = merge(linear(paths), tmp_path / "out")
    values = plan.as_dict()
    assert (values["bytes_read"], values["bytes_written"]) == (report.bytes_read, report.bytes_written)
    (tmp_path / "recipe.yml").write_text(json.dumps(linear(paths)))
    assert run("check", tmp_path / "recipe.yml").exit_code == 0


def test_statistics_tell_what_codes_preserve(tmp_path):
    """Deltas far below a step of the codes arrive in part only, and the report says so; the remedy it names works."""
    form = FORMS["blocks"]
    [base] = family(form, 1)
    plain = numbers(form, base)
    rng = np.random.default_rng(1)
    tuned = dict(plain)
    for name, t in plain.items():
        if t.dtype == F32:
            x = floats(t)
            tuned[name] = tensor(x * (1 + 0.01 * rng.normal(size=x.shape)), F32, t.shape)
    paths = [*saved(tmp_path / "base", form, [base]), *saved(tmp_path / "tuned", FORMS["e5m2"], [tuned])]
    values = recipe("linear", paths, weights=[0.9, 0.1])
    report = merge(values, tmp_path / "out", quantize="same")
    assert report.effect.strength is not None
    assert abs(report.effect.strength - 1) > 0.05
    [warning] = [w for w in report.warnings if "of the change" in w]
    assert "--quantize none" in warning
    (tmp_path / "recipe.yml").write_text(json.dumps({**values, "quantize": "same"}))
    done = run("merge", tmp_path / "recipe.yml", tmp_path / "other", "--quantize", "none")
    assert done.exit_code == 0
    assert read(tmp_path / "other")[Q].dtype == F32  # as one of the models has it


# --- options and errors ----------------------------------------------------------------------------------------------


def test_every_command_has_the_option(tmp_path):
    form, models = FORMS["blocks"], family(FORMS["blocks"], 2)
    a, b = saved(tmp_path, form, models)
    want = wanted(form, models, Combine((0.5, 0.5), sums_to_one=True))
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe("linear", [a, b], weights=[0.5, 0.5])))
    (tmp_path / "run-1").symlink_to(a)
    (tmp_path / "run-2").symlink_to(b)
    done = [
        run("merge", tmp_path / "recipe.yml", tmp_path / "merge", "--quantize", "same"),
        run("interpolate", a, b, "--alpha", "0.5", "-o", tmp_path / "interpolate", "--quantize", "same"),
        run("average", f"{tmp_path}/run-*", "-o", tmp_path / "average", "--quantize", "same"),
        run("sweep", a, b, "--alphas", "0:1:0.5", "-o", tmp_path / "sweep", "--quantize", "same"),
    ]
    assert [one.exit_code for one in done] == [0] * 4, [one.output for one in done]
    for folder in ("merge", "interpolate", "average", "sweep/alpha_0.5"):
        assert_same(want, read(tmp_path / folder))
    explained = run("explain", tmp_path / "recipe.yml", "--quantize", "same")
    assert explained.exit_code == 0
    assert "fp8 with scales" in explained.output


def test_dtype_is_that_of_what_is_not_quantised(tmp_path):
    form, models = FORMS["blocks"], family(FORMS["blocks"], 2)
    fastinterp.merge(linear(saved(tmp_path, form, models), dtype="float32"), tmp_path / "out")
    got = read(tmp_path / "out")
    assert (got[NORM].dtype, got[Q].dtype.name) == (F32, "F8_E4M3")


def test_shapes_that_differ_from_the_origins_are_refused(tmp_path):
    form, models = FORMS["blocks"], family(FORMS["blocks"], 2)
    [other] = family(form, 1)
    other |= stored(form, Q, np.ones(64 * 192), (64, 192))
    paths = saved(tmp_path, form, [other, *models])
    values = {**recipe("linear", paths[1:], weights=[0.5, 0.5]), "base_model": paths[0], "quantize": "same"}
    with pytest.raises(CheckpointError, match=r"is \[300, 192\] in the output.* is \[64, 192\].*Leave out `quantize`"):
        fastinterp.merge(values, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_devices_leave_encoded_outputs_to_the_processor(tmp_path, use):
    use(FakeDevice(0))
    form, models = FORMS["blocks"], family(FORMS["blocks"], 2)
    base = saved(tmp_path / "base", form, models[:1])
    other = saved(tmp_path / "other", FORMS["e5m2"], [numbers(form, models[1])])
    values = {**recipe("linear", [*base, *other], weights=[0, 0.5]), "base_model": base[0], "quantize": "same"}
    report = merge(values, tmp_path / "device", device="cuda:0")
    fastinterp.merge(values, tmp_path / "cpu", device="cpu")
    assert_same(read(tmp_path / "cpu"), read(tmp_path / "device"))
    assert report.on_cpu["encoded outputs"] == len(shapes_of(form))


def test_an_adapter_on_quantised_weights_is_no_copy(tmp_path):
    """W + s*B*A is quantised anew; what the adapter does not change keeps its bytes."""
    form, models = FORMS["blocks"], family(FORMS["blocks"], 1)
    [path] = saved(tmp_path, form, models)
    rank, (rows, columns) = 2, shapes_of(form)[Q]
    module = f"base_model.model.{Q.removesuffix('.weight')}"
    adapter = {
        f"{module}.lora_A.weight": tensor(bell(1, rank * columns), F32, (rank, columns)),
        f"{module}.lora_B.weight": tensor(bell(2, rows * rank) * 1e-2, F32, (rows, rank)),
    }
    folder = write(tmp_path / "adapter", adapter)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    values = recipe("passthrough", [f"{path}+{folder}"])
    fastinterp.merge(values, tmp_path / "float32", dtype="float32")
    report = merge(values, tmp_path / "out", quantize="same")
    got, sums = read(tmp_path / "out"), read(tmp_path / "float32")
    assert_same({**models[0], **stored(form, Q, floats(sums[Q]), shapes_of(form)[Q])}, got)
    assert Q not in report.copied
    assert UP in report.copied
