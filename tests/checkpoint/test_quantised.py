"""Quantised tensors are recognised by names, dtypes and shapes, and by what files beside the weights say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fastinterp.checkpoint.quantisation_config import declared_method, without_quantisation
from fastinterp.checkpoint.quantised import quantised_tensors
from fastinterp.ops.dtypes import DTYPES, DType
from fastinterp.plan.models import open_model
from tests.support.checkpoints import write_file
from tests.support.quantised_formats import FORMATS, NOT_QUANTISED, READ_FORMATS, Format, Layout, model


class Header(NamedTuple):
    dtype: DType
    shape: tuple[int, ...]


def headers(layout: Layout) -> dict[str, Header]:
    return {name: Header(DTYPES[dtype], shape) for name, (dtype, shape) in layout.items()}


@pytest.mark.parametrize("form", [*FORMATS.values(), *READ_FORMATS.values()], ids=[*FORMATS, *READ_FORMATS])
def test_formats(form: Format, tmp_path: Path):
    """Codes and all that belongs to them, whatever the order; the rest of the model merges, and what is decoded."""
    for layout in (form.layout, dict(reversed(list(form.layout.items())))):
        found = quantised_tensors(headers(layout), form.metadata)
        assert {q.format for q in found} == {form.name}
        taken = [name for q in found for name in (q.codes, *q.companions)]
        assert sorted(taken) == sorted(set(form.layout) - set(form.plain))
    write_file(tmp_path / "model.safetensors", model(form.layout, 0), metadata=form.metadata)
    opened = open_model(str(tmp_path)).tensors
    assert {n for n, t in opened.items() if t.merges} == {*form.plain, *form.read}
    assert {n for n, t in opened.items() if t.decoded} == {*form.read}
    assert {t.quantised for t in opened.values()} - {""} == (set() if form.read else {form.name})


@pytest.mark.parametrize("layout", NOT_QUANTISED.values(), ids=NOT_QUANTISED)
def test_others_are_not_taken_for_it(layout: Layout, tmp_path: Path):
    assert quantised_tensors(headers(layout)) == []
    write_file(tmp_path / "model.safetensors", model(layout, 0))
    assert all(t.merges == t.dtype.merges for t in open_model(str(tmp_path)).tensors.values())


def test_many_tensors_are_looked_at_once():
    """Of a model with thousands of bitsandbytes layers: no search through all names for each."""
    one = {n.removeprefix("model.layers.0."): of for n, of in FORMATS["bitsandbytes nf4"].layout.items()}
    layout = {f"model.layers.{i}.{n}": of for i in range(2000) for n, of in one.items()}
    found = quantised_tensors(headers(layout))
    assert len(found) == 2000 and {len(q.companions) for q in found} == {5}


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
        ({"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}}, "mlx"),
        ({"compression_config": {"config_groups": {}}}, "compressed-tensors"),
        ({"quantization_config": {"bits": 8}}, "no method named"),
        ({"quantization_config": None}, ""),
        ({"quantization_config": {}}, ""),
        ({"hidden_size": 4}, ""),
    ],
)  # fmt: skip
def test_what_config_says(tmp_path: Path, config, method):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert declared_method(tmp_path) == method
    cleaned = without_quantisation(config)
    (tmp_path / "config.json").write_text(json.dumps(cleaned))
    assert declared_method(tmp_path) == ""
    assert not method or cleaned != config


def test_what_other_files_say(tmp_path: Path):
    assert declared_method(tmp_path) == ""
    assert declared_method(tmp_path, {"quantization_format": "int8"}) == "int8"
    (tmp_path / "config.json").write_text("{damaged")
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert declared_method(tmp_path) == "modelopt"


@pytest.mark.parametrize("said", [True, False], ids=["config says it", "config does not"])
def test_codes_of_an_unknown_layout(tmp_path: Path, said: bool):
    """What is called a weight, and is packed, is codes if config.json says that there are some; else it is integers."""
    layout: Layout = {
        "up_proj.weight": ("U8", (8, 4)), "up_proj.secret": ("F32", (8,)), "norm.weight": ("BF16", (8,)),
        "position_ids": ("I64", (1, 7)),
    }  # fmt: skip
    write_file(tmp_path / "model.safetensors", model(layout, 0))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "new"}} if said else {}))
    tensors = open_model(str(tmp_path)).tensors
    assert {n: t.quantised for n, t in tensors.items() if t.quantised} == ({"up_proj.weight": "new"} if said else {})


def test_a_scale_must_fit():
    """A parameter called `scale` beside 8-bit weights is a scale of theirs if it can be one."""
    codes = Header(DTYPES["F8_E4M3"], (64, 32))
    for shape in ((), (1,), (64,), (64, 1), (1, 1), (2, 1)):
        assert quantised_tensors({"a.weight": codes, "a.scale": Header(DTYPES["F32"], shape)})
    for dtype, shape in (("F32", (48,)), ("F32", (65, 32)), ("F8_E4M3", (64,)), ("I64", ())):
        assert not quantised_tensors({"a.weight": codes, "a.scale": Header(DTYPES[dtype], shape)})


@pytest.mark.parametrize("text", ["[", '{"layers": 3}', "[]", '{"layers": [{}]}', '{"layers": {"x": 1}}'])
def test_metadata_that_describes_nothing(text: str):
    weight = {"a.weight": Header(DTYPES["F8_E4M3"], (4, 4))}
    assert quantised_tensors(weight, {"_quantization_metadata": text}) == []


def test_layouts_of_the_support_are_whole():
    """Each has what its dtype and shape take."""
    for form in FORMATS.values():
        for name, t in model(form.layout, 1).items():
            assert t.raw.size == t.dtype.nbytes(int(np.prod(t.shape))), name


def test_what_the_configuration_of_a_component_says(tmp_path: Path):
    """It is about the weights of that component alone."""
    codes = {"blocks.0.weight": ("F8_E4M3", (8, 4)), "norm.weight": ("BF16", (4,))}
    for name in ("transformer", "vae"):
        (tmp_path / name).mkdir()
        write_file(tmp_path / name / "diffusion_pytorch_model.safetensors", model(codes, 0))
    said = {"quantization_config": {"quant_method": "torchao"}}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(said))
    index = {"_class_name": "P", "transformer": ["diffusers", "T"], "vae": ["diffusers", "V"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    opened = open_model(str(tmp_path)).tensors
    assert {n: t.quantised for n, t in opened.items() if t.quantised} == {"transformer/blocks.0.weight": "torchao"}
