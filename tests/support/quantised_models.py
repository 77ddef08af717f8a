"""Small models with quantised weights of the formats that are written again: `quantize: same`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinterp.ops.dtypes import BF16, DTYPES, F32, DType
from fastinterp.reference.decode import decode
from fastinterp.reference.encode import encode
from tests.support.checkpoints import Tensor, bell, floats, recipe, tensor, write

Model = dict[str, Tensor]
CODES = {"scaled_f8_e4m3": "F8_E4M3", "scaled_f8_e5m2": "F8_E5M2", "scaled_i8": "I8"}
Q, UP, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


@dataclass(frozen=True)
class Form:
    """How weights are quantised.

    scale       what is added to the name of the codes, for their scales; with a point: what follows the module's name
    kind        dtype of the scales
    blocks      rows and columns of a block; None: all of a matrix
    column      whether scales of rows are [rows, 1]
    config      of config.json
    experts     one more tensor, of several matrices
    """

    decoder: str
    scale: str
    kind: str = "F32"
    blocks: tuple[int | None, int | None] = (None, None)
    column: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)
    power_of_two: bool = False
    experts: bool = False

    def parameters(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Those of the decoder and of the encoder."""
        rows, columns = int(np.prod(shape[:-1])), shape[-1]
        if len(shape) > 2 and self.blocks[0] is None:  # a scale for each expert
            rows = shape[-2]
        elif len(shape) > 2:
            rows = shape[-2] if self.blocks[0] != 1 else rows
        down, across = (
            size if n is None else min(n, size) for n, size in zip(self.blocks, (rows, columns), strict=True)
        )
        kinds = {"F32": 0, "F16": 1, "BF16": 2, "U8": 3, "F8_E8M0": 3}
        return (kinds[self.kind], down, across, rows, *((1,) if self.power_of_two else ()))

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        _, down, across, *_ = self.parameters(shape)
        lead = tuple(shape[:-2])
        if self.blocks == (None, None):
            return lead if len(shape) > 2 else ()
        if self.blocks == (1, None) and not self.column:
            return tuple(shape[:-1])
        return (*lead, -(-shape[-2] // down), -(-shape[-1] // across))

    def scale_name(self, name: str) -> str:
        return name.rpartition(".")[0] + self.scale if self.scale.startswith(".") else name + self.scale


def fp8_config(*block: int, **more: Any) -> dict[str, Any]:
    size = {"weight_block_size": list(block)} if block else {}
    return {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", **size, **more}}


FORMS = {
    "blocks": Form("scaled_f8_e4m3", "_scale_inv", blocks=(128, 128), config=fp8_config(128, 128), experts=True),
    "small blocks": Form("scaled_f8_e4m3", "_scale_inv", blocks=(32, 16), config=fp8_config(32, 16)),
    "ue8m0": Form(
        "scaled_f8_e4m3", "_scale_inv", blocks=(128, 128), config=fp8_config(128, 128, scale_fmt="ue8m0"),
        power_of_two=True,
    ),
    "rows": Form(
        "scaled_f8_e4m3", "_scale", "BF16", (1, None),
        config={"quantization_config": {"quant_method": "compressed-tensors"}}, experts=True,
    ),
    "tensor": Form(
        "scaled_f8_e4m3", "_scale", config={"quantization_config": {"quant_method": "modelopt"}}, experts=True
    ),
    "e5m2": Form("scaled_f8_e5m2", ".scale_weight"),
    "mxfp8": Form("scaled_f8_e4m3", "_scale", "U8", (1, 32)),
    "int8 rows": Form(
        "scaled_i8", "_scale", "F32", (1, None), config={"quantization_config": {"quant_method": "compressed-tensors"}}
    ),
    "int8": Form("scaled_i8", "_scale", "F16"),
}  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {Q: (300, 192), UP: (130, 96)}
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def stored(form: Form, name: str, x: NDArray[Any], shape: Sequence[int]) -> Model:
    """The codes and scales of float32 numbers, as the reference makes them."""
    codes, scales = encode(form.decoder, x.astype(np.float32), shape[-1], form.parameters(shape))
    return {
        name: Tensor(DTYPES[CODES[form.decoder]], tuple(shape), codes),
        form.scale_name(name): Tensor(DTYPES[form.kind], form.scale_shape(shape), scales),
    }


def shapes_of(form: Form) -> dict[str, tuple[int, ...]]:
    return {**SHAPES, **({EXPERTS: (4, 150, 64)} if form.experts else {})}


def family(form: Form, count: int) -> list[Model]:
    """Fine-tunes of one base, with a norm in BF16."""
    models = []
    for i in range(count):
        model = {NORM: tensor(1 + bell(50 + i, 96) * 0.02, BF16)}
        for seed, (name, shape) in enumerate(shapes_of(form).items()):
            numel = int(np.prod(shape))
            rows = np.exp(bell(seed + 7, numel // shape[-1])).repeat(shape[-1])
            model |= stored(form, name, (bell(seed, numel) * 0.02 + bell(100 * i + seed, numel) * 4e-3) * rows, shape)
        models.append(model)
    return models


def numbers(form: Form, model: Mapping[str, Tensor]) -> Model:
    """The model with float32 numbers in the place of codes."""
    plain = {}
    for name, shape in shapes_of(form).items():
        raw, scale = model[name].raw, model[form.scale_name(name)].raw
        values = decode(form.decoder, raw, [scale], form.parameters(shape)[:4], int(np.prod(shape)), shape[-1])
        plain[name] = Tensor(F32, shape, values.view(np.uint8))
    beside = {form.scale_name(name) for name in plain}
    return {name: plain.get(name, t) for name, t in model.items() if name not in beside}


def requantised(form: Form, model: Mapping[str, Tensor]) -> Model:
    """A model of float32 numbers in this form."""
    made: Model = {}
    for name, t in model.items():
        shape = shapes_of(form).get(name)
        made |= {name: t} if shape is None else stored(form, name, floats(t), shape)
    return made


def saved(folder: Path, form: Form, models: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Folders with a config.json; codes and scales of one tensor lie in several files, where there are several."""
    paths = []
    for i, model in enumerate(models):
        path = write(folder / "abcdef"[i], model, shards=(1, 3, 2)[i % 3], skew=i % 4)
        if form.config:
            (path / "config.json").write_text(
                json.dumps({"model_type": "llama", "torch_dtype": "bfloat16", **form.config})
            )
        paths.append(str(path))
    return paths


def dtype_of(form: Form) -> DType:
    return DTYPES[CODES[form.decoder]]


WEIGHTS = (0.5, 0.3, 0.2)


def linear(paths: list[str], **keys: Any) -> dict[str, Any]:
    """A recipe whose output is quantised as the first model."""
    return recipe("linear", paths, weights=list(WEIGHTS[: len(paths)]), quantize="same", **keys)
