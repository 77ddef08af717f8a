"""Rows of encoded tensors beside others: fused and single experts, other vocabularies, more input channels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastinterp
from fastinterp.ops.dtypes import BF16, F32, DType
from fastinterp.plan.encoded_rows import aligned, rows_of
from fastinterp.plan.models import open_model
from tests.execute.test_quantised_inputs import matrix
from tests.support.checkpoints import Tensor, assert_same, bell, read, recipe, tensor, write_file
from tests.support.encodings import ENCODINGS, Encoding, Stored, scaled

EXPERTS, INNER, HIDDEN = 3, 128, 192
FORMS = {
    "fp8 blocks": scaled(blocks=(64, 64), end="weight_scale_inv"),
    "fp8, one scale": scaled(shape=lambda shape: shape[:-2]),
    "fp8 rows": scaled(blocks=(1, 1 << 20)),
    "int8 rows": scaled("I8", (1, 1 << 20)),
    "mxfp8": scaled(blocks=(1, 32), scale="U8"),
}  # fmt: skip
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}


def saved(folder: Path, model: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> str:
    folder.mkdir(parents=True)
    write_file(folder / "model.safetensors", model)
    (folder / "config.json").write_text(json.dumps(config or {}))
    return str(folder)


def experts(seed: int) -> dict[str, np.ndarray]:
    return {
        "gate_up_proj": bell(seed, EXPERTS * 2 * INNER * HIDDEN).reshape(EXPERTS, 2 * INNER, HIDDEN) * 0.02,
        "down_proj": bell(seed + 1, EXPERTS * HIDDEN * INNER).reshape(EXPERTS, HIDDEN, INNER) * 0.02,
    }


def singles(of: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The matrices of the experts, each alone."""
    parts = {}
    for i in range(EXPERTS):
        parts[f"{i}.gate_proj.weight"] = of["gate_up_proj"][i, :INNER]
        parts[f"{i}.up_proj.weight"] = of["gate_up_proj"][i, INNER:]
        parts[f"{i}.down_proj.weight"] = of["down_proj"][i]
    return parts


def stored_as(matrices: Mapping[str, np.ndarray], encode: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Codes of these, and their numbers. Names of scales follow those of tensors, `weight` or not."""
    codes, numbers = {}, {}
    for name, x in matrices.items():
        one = encode(x)
        full = f"model.layers.0.mlp.experts.{name}"
        for end, t in one.tensors.items():
            codes[full.removesuffix("weight") + end if name.endswith("weight") else full + end[len("weight") :]] = t
        numbers[full] = tensor(one.numbers, F32)
    norm = {"norm.weight": tensor(np.ones(4), BF16)}
    return codes | norm, numbers | norm


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fused_and_single_experts(tmp_path: Path, form: str, dtype: str) -> None:
    """One of the models has them in one tensor: the other's follow, as numbers do."""
    encode = FORMS[form]
    one, other = experts(1), experts(5)
    fused, single = stored_as(one, encode), stored_as(singles(other), encode)
    for k, pair in enumerate((zip(fused, single, strict=True), zip(single, fused, strict=True))):
        for i, (a, b) in enumerate(pair):
            folder = tmp_path / f"{k}{i}"
            config = BLOCKS if i == 0 and form == "fp8 blocks" else {}
            paths = [saved(folder / "a", a, config), saved(folder / "b", b, config)]
            fastinterp.merge(recipe("linear", paths, weights=[0.4, 0.6], dtype=dtype), folder / "out")
        assert_same(read(tmp_path / f"{k}0" / "out"), read(tmp_path / f"{k}1" / "out"))


def test_experts_in_codes_and_in_numbers(tmp_path: Path) -> None:
    """Single ones of BF16 beside a fused tensor of codes; the output keeps BF16."""
    codes, numbers = stored_as(experts(1), FORMS["fp8 blocks"])
    plain = {n: tensor(x, BF16) for n, x in (
        (f"model.layers.0.mlp.experts.{n}", x) for n, x in singles(experts(5)).items()
    )} | {"norm.weight": tensor(np.ones(4), BF16)}  # fmt: skip
    for k, (first, config) in enumerate(((codes, BLOCKS), (numbers, {}))):
        paths = [saved(tmp_path / f"a{k}", first, config), saved(tmp_path / f"b{k}", plain)]
        for i, order in enumerate((paths, paths[::-1])):
            values = recipe("linear", order, weights=[0.5, 0.5], **({} if k == 0 else {"dtype": "bfloat16"}))
            fastinterp.merge(values, tmp_path / f"out{k}{i}")
    for i in range(2):
        assert_same(read(tmp_path / f"out0{i}"), read(tmp_path / f"out1{i}"))


@pytest.mark.parametrize("dtypes", [(None, None), (None, BF16), (BF16, None), (None, F32)], ids=str)
@pytest.mark.parametrize("form", ["fp8 rows", "fp8 blocks", "int8 rows"])
def test_embeddings_in_another_vocabulary(
    tmp_path: Path, form: str, dtypes: tuple[DType | None, DType | None]
) -> None:  # fmt: skip
    """Rows of codes follow their tokens, as rows of numbers do. None: in codes."""
    tokens = [[f"t{i}" for i in range(150)], [f"t{i}" for i in (*range(40, 150), *range(200, 240))]]
    made: dict[str, list[str]] = {"codes": [], "numbers": []}
    for i, (words, dtype) in enumerate(zip(tokens, dtypes, strict=True)):
        x = matrix(i, (len(words), 64))
        one = Stored({"weight": tensor(x, dtype)}, np.zeros(0)) if dtype else FORMS[form](x)
        numbers = {"weight": tensor(x, dtype) if dtype else tensor(one.numbers, F32)}
        vocabulary = {"version": "1.0", "model": {"type": "WordLevel", "unk_token": "t99", "vocab": {}}}
        vocabulary["model"]["vocab"] = {t: n for n, t in enumerate(words)}  # type: ignore[index]
        for kind, tensors in (("codes", one.tensors), ("numbers", numbers)):
            config = BLOCKS if kind == "codes" and not dtype and form == "fp8 blocks" else {}
            named = {f"model.embed_tokens.{end}": t for end, t in tensors.items()}
            path = saved(tmp_path / f"{kind}{i}", named, config)
            (Path(path) / "tokenizer.json").write_text(json.dumps(vocabulary))
            made[kind].append(path)
    for kind, paths in made.items():
        values = recipe("linear", paths, weights=[0.5, 0.5], tokenizer_source="union", dtype="float32")
        fastinterp.merge(values, tmp_path / f"{kind}-out")
    assert_same(read(tmp_path / "codes-out"), read(tmp_path / "numbers-out"))


def test_convolutions_of_more_channels(tmp_path: Path) -> None:
    encode = scaled(shape=lambda _: ())
    made: dict[str, list[str]] = {"codes": [], "numbers": []}
    for i, channels in enumerate((4, 9)):
        one = encode(bell(i, 8 * channels * 9).reshape(8, channels * 9))
        shape = (8, channels, 3, 3)
        codes = {"conv_in." + end: Tensor(t.dtype, shape if end == "weight" else t.shape, t.raw)
                 for end, t in one.tensors.items()}  # fmt: skip
        made["codes"].append(saved(tmp_path / f"codes{i}", codes))
        numbers = {"conv_in.weight": tensor(one.numbers.reshape(shape), F32)}
        made["numbers"].append(saved(tmp_path / f"numbers{i}", numbers))
    for kind, paths in made.items():
        values = recipe("linear", paths, weights=[0.5, 0.5], channels="first", dtype="float32")
        fastinterp.merge(values, tmp_path / f"{kind}-out")
    assert_same(read(tmp_path / "codes-out"), read(tmp_path / "numbers-out"))


# --- some rows of a tensor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ENCODINGS.values(), ids=ENCODINGS)
def test_some_rows(tmp_path: Path, form: Encoding) -> None:
    """What is taken for rows of a tensor decodes to them."""
    from fastinterp.execute.decode_rows import decoded, decoded_rows

    one = form.encode(matrix(3))
    path = saved(tmp_path / "a", {f"layer.{end}": t for end, t in one.tensors.items()}, form.config)
    stored = open_model(path).tensors["layer.weight"].stored_rows
    assert stored is not None

    def bytes_of(file: Path, start: int, nbytes: int) -> bytes:
        return file.read_bytes()[start : start + nbytes]

    assert np.array_equal(decoded(stored, bytes_of).reshape(one.numbers.shape), one.numbers)
    cuts = 0
    for first, count in ((0, 1), (0, 128), (48, 48), (128, 72), (5, 7), (199, 1), (0, 200)):
        part = rows_of(stored, first, count)
        if part is not None:
            assert part.shape == (count, 320)
            assert np.array_equal(decoded(part, bytes_of).reshape(count, -1), one.numbers[first : first + count])
            cuts += 1
        start, length = aligned(stored, first, count)
        assert start <= first and first + count <= start + length
        got = decoded_rows(stored, first, count, 320, bytes_of)
        assert np.array_equal(got, one.numbers[first : first + count])
    assert cuts >= 1
