"""A format of encoded tensors is a reader, a decoder and its reference: one is added here, and whole merges read it.

The format: `X` holds int8 codes, `X.scale` one float32 scale; a number is code * scale, rounded once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

import fastinterp
from fastinterp.backends.registry import ISA_VARIABLE
from fastinterp.checkpoint import formats
from fastinterp.checkpoint.formats import EncodedTensor
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError
from fastinterp.ops.combine import Combine
from fastinterp.ops.dtypes import BF16, F32, DType
from fastinterp.plan.models import open_model
from fastinterp.reference import decode
from tests.support import backends, decoders
from tests.support.checkpoints import Tensor, assert_same, bell, expected, floats, integers, read, recipe, tensor, write
from tests.support.devices import cuda_host
from tests.support.devices.fake_device import FakeDevice

pytest_plugins = ("tests.support.devices.device_fixtures",)
pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

# --- the format ------------------------------------------------------------------------------------------------------


def reader(checkpoint: Checkpoint) -> Iterator[EncodedTensor]:
    for name, codes in checkpoint.tensors.items():
        scale = checkpoint.tensors.get(f"{name}.scale")
        if codes.dtype.name == "I8" and scale is not None:
            if scale.dtype != F32 or scale.shape != ():
                raise CheckpointError(
                    f"{scale.name} must be F32 [], got {scale.dtype} {list(scale.shape)}",
                    file=checkpoint.name, tensor=scale.name,
                )  # fmt: skip
            yield EncodedTensor(name, codes.shape, codes, (scale,), "toy_int8")


DECODER = """
#include <cstring>

#include "decoder.h"

extern "C" void toy_int8(const fi::DecodeArgs& a) {
  const signed char* codes = static_cast<const signed char*>(a.bytes);
  float scale;
  memcpy(&scale, a.companions[0], sizeof scale);
  for (int64_t i = 0; i < a.count; ++i) a.to[i] = float(codes[i]) * scale;
}
"""


def toy_int8(
    codes: NDArray[np.uint8],
    companions: Sequence[NDArray[np.uint8]],
    parameters: Sequence[float],
    numel: int,
    columns: int,
) -> NDArray[np.float32]:
    return codes.view(np.int8).astype(np.float32) * companions[0].view(np.float32)


@pytest.fixture(scope="module", autouse=True)
def native(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return decoders.register(DECODER, {"toy_int8": (1, 1)}, tmp_path_factory.mktemp("decoders"))


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.READERS, "toy", reader)
    monkeypatch.setitem(decode.DECODERS, "toy_int8", toy_int8)


# --- checkpoints -----------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (97, 64),
    "model.layers.0.q.weight": (300, 117),
    "model.layers.0.norm.weight": (255,),
    "model.layers.1.q.weight": (3, 5, 7),
    "model.one": (1,),
    "model.scale": (),
    "model.none": (0, 5),
}
Model = Mapping[str, Tensor]


def encoded(model: Model, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """A model with these of its tensors as codes, all floats if none are named; scales lie before and behind them."""
    stored: dict[str, Tensor] = {}
    for name, t in model.items():
        if not t.dtype.merges or (names and name not in names):
            stored[name] = t
            continue
        numbers = floats(t)
        scale = np.float32(max(np.abs(numbers).max(initial=0.0), 1e-6) / 127)
        codes = integers(np.rint(numbers / scale).astype(np.int8).reshape(t.shape), "I8")
        with_scale = {name: codes, f"{name}.scale": tensor(scale, F32)}
        stored |= with_scale if len(stored) % 2 else dict(reversed(with_scale.items()))
    return stored


def decoded(stored: Model) -> dict[str, Tensor]:
    """The same with float32 numbers in the place of codes, by the reference."""
    model = {}
    for name, t in stored.items():
        if f"{name}.scale" in stored:
            numel, columns = int(np.prod(t.shape)), t.shape[-1] if len(t.shape) > 1 else int(np.prod(t.shape))
            numbers = decode.decode("toy_int8", t.raw, [stored[f"{name}.scale"].raw], (), numel, columns)
            model[name] = Tensor(F32, t.shape, numbers.view(np.uint8))
        elif not (name.endswith(".scale") and name.removesuffix(".scale") in stored):
            model[name] = t
    return model


def family(count: int) -> list[dict[str, Tensor]]:
    """Encoded fine-tunes of one base, with a tensor that is not encoded, and int8 numbers that are no codes."""
    models = []
    for i in range(count):
        model = {"plain": tensor(bell(50 + i, 33) * 0.02, BF16)}
        for seed, (name, shape) in enumerate(SHAPES.items()):
            numel = int(np.prod(shape))
            model[name] = tensor(bell(seed, numel) * 0.02 + bell(100 * i + seed, numel) * 2e-3, F32, shape)
        names = tuple(SHAPES)
        models.append({**encoded(model, names), "ids": integers(np.arange(-3, 4), "I8")})
    return models


def saved(folder: Path, models: Sequence[Model]) -> list[str]:
    """Codes and scales of one tensor lie in several files, where there are several."""
    return [str(write(folder / "abcdef"[i], m, shards=(1, 4, 3)[i % 3], skew=i % 4)) for i, m in enumerate(models)]


METHODS: dict[str, tuple[int, dict[str, Any]]] = {
    "linear": (3, {"weights": [0.5, 0.3, 0.2]}),
    "slerp": (2, {"parameters": {"t": 0.3}}),
    "task_arithmetic": (3, {"parameters": {"weight": 0.7}}),
    "ties": (3, {"parameters": {"density": 0.4, "weight": 0.6}}),
    "dare_ties": (3, {"parameters": {"density": 0.5, "weight": 0.6}, "seed": 7}),
    "della": (3, {"parameters": {"density": 0.5, "epsilon": 0.2, "weight": 0.6}, "seed": 7}),
    "model_stock": (3, {}),
    "sce": (3, {"parameters": {"select_topk": 0.4}}),
}
BASED = {"slerp", "task_arithmetic", "ties", "dare_ties", "della", "model_stock", "sce"}


def recipe_of(method: str, paths: list[str], **keys: Any) -> dict[str, Any]:
    base = {"base_model": paths[0]} if method in BASED else {}
    return recipe(method, paths, **base, **METHODS[method][1], **keys)


def run(*args: object) -> Result:
    return CliRunner().invoke(commands, [str(a) for a in args], prog_name="fastinterp")


# --- merges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", backends.usable())
@pytest.mark.parametrize("method", METHODS)
def test_merge_of_encoded_models(tmp_path, monkeypatch, method, isa):
    """Its bytes are those of the merge of what the reference decodes."""
    monkeypatch.setenv(ISA_VARIABLE, isa)
    models = family(METHODS[method][0])
    codes, numbers = saved(tmp_path / "codes", models), saved(tmp_path / "numbers", [decoded(m) for m in models])
    fastinterp.merge(recipe_of(method, codes, dtype="bfloat16"), tmp_path / "out", threads=2)
    fastinterp.merge(recipe_of(method, numbers, dtype="bfloat16"), tmp_path / "want", threads=1)
    assert_same(read(tmp_path / "want"), read(tmp_path / "out"))


@pytest.mark.parametrize("isa", backends.usable())
def test_linear_is_the_numpy_reference(tmp_path, monkeypatch, isa):
    """Of models that are all encoded, and of one beside two that are not. The output keeps BF16 of what
    is decoded; beside F32 it is that.
    """
    monkeypatch.setenv(ISA_VARIABLE, isa)
    models = family(3)
    numbers = [decoded(m) for m in models]
    weights = (0.5, 0.3, 0.2)
    for k, (stored, dtype) in enumerate((([*models], BF16), ([models[0], *numbers[1:]], F32))):
        combine = Combine(weights, sums_to_one=False)
        want = expected(numbers, combine, out=dtype)
        report = fastinterp.merge(
            recipe("linear", saved(tmp_path / str(k), stored), weights=list(weights)), tmp_path / f"out{k}"
        )
        got = read(tmp_path / f"out{k}")
        want["plain"] = expected(numbers, combine, out=BF16)["plain"]  # as it is in every model
        assert_same(want, got)
        read_bytes = sum(t.raw.size for m in stored for name, t in m.items() if name != "model.none.scale")
        assert report.bytes_read == read_bytes


@pytest.mark.parametrize("dtype", [None, F32, BF16])
def test_a_copy_is_decoded(tmp_path, dtype: DType | None):
    stored = family(1)
    keys = {} if dtype is None else {"dtype": str(dtype)}
    fastinterp.merge(recipe("passthrough", saved(tmp_path, stored), **keys), tmp_path / "out")
    want = expected([decoded(stored[0])], Combine((1.0,)), out=dtype or BF16)
    assert_same(want, read(tmp_path / "out"))


def test_documents_and_stochastic_rounding(tmp_path):
    models = family(3)
    codes, numbers = saved(tmp_path / "codes", models), saved(tmp_path / "numbers", [decoded(m) for m in models])
    for k, paths in enumerate((codes, numbers)):
        first = {"name": "first", "rounding": "stochastic", **recipe_of("slerp", paths[:2])}
        last = recipe("linear", ["first", paths[2]], weights=[0.4, 0.6], rounding="stochastic", dtype="bfloat16")
        fastinterp.merge([first, last], tmp_path / f"out{k}")
    assert_same(read(tmp_path / "out1"), read(tmp_path / "out0"))


def test_devices_leave_encoded_tensors_to_the_processor(tmp_path, use):
    use(FakeDevice(0))
    models = family(3)
    models = [models[0], *(decoded(m) for m in models[1:])]
    values = recipe_of("ties", saved(tmp_path, models))
    report = fastinterp.merge(values, tmp_path / "device", device="cuda:0")
    fastinterp.merge(values, tmp_path / "cpu", device="cpu")
    assert_same(read(tmp_path / "cpu"), read(tmp_path / "device"))
    assert report.on_cpu["encoded inputs"] == sum(0 not in shape for shape in SHAPES.values())


# --- what else reads checkpoints -------------------------------------------------------------------------------------


def test_model_has_numbers_and_no_companions(tmp_path):
    [stored] = family(1)
    [path] = saved(tmp_path, [stored])
    model = open_model(path)
    assert sorted(model.tensors) == sorted(decoded(stored))
    one = model.tensors["model.layers.0.q.weight"]
    assert (one.dtype, one.shape, one.kept_dtype, one.plain) == (F32, (300, 117), BF16, None)
    assert one.nbytes == 300 * 117 + 4
    assert one.describe() == "F32 [300, 117] (I8 with toy_int8)"
    assert model.tensors["ids"].plain is not None


def test_explain_check_and_diff(tmp_path):
    models = family(2)
    paths = saved(tmp_path, models)
    values = recipe_of("slerp", paths)
    plan = fastinterp.explain(values)
    assert {t.dtype for t in plan.tensors if t.merged} == {BF16}
    (tmp_path / "recipe.yml").write_text(json.dumps(values))
    assert run("check", tmp_path / "recipe.yml").exit_code == 0
    found = fastinterp.compare(*paths)
    a, b = (floats(decoded(m)["model.layers.0.q.weight"]) for m in models)
    difference = found.tensors["model.layers.0.q.weight"]
    assert difference.changed == np.count_nonzero((b - a).astype(np.float32))
    assert difference.norm_a == pytest.approx(np.linalg.norm(a), rel=1e-12)
    assert set(found.tensors) == {*SHAPES, "plain"}


def test_companion_of_a_wrong_shape(tmp_path):
    [stored] = family(1)
    stored["model.layers.0.q.weight.scale"] = tensor([0.1, 0.2], F32)
    [path] = saved(tmp_path, [stored])
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.q\.weight\.scale must be F32 \[\], got F32 \[2\]"):
        fastinterp.merge(recipe("passthrough", [path]), tmp_path / "out")
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe("passthrough", [path])))
    assert run("merge", tmp_path / "recipe.yml", tmp_path / "out").exit_code == 3
    assert not (tmp_path / "out").exists()


def test_two_readers_that_take_one_tensor(tmp_path, monkeypatch):
    monkeypatch.setitem(formats.READERS, "other", reader)
    with pytest.raises(CheckpointError, match=r"is part of two tensors \(toy, other\)"):
        open_model(saved(tmp_path, family(1))[0])


def test_name_that_is_a_stored_tensor_too(tmp_path, monkeypatch):
    def renaming(checkpoint: Checkpoint) -> Iterator[EncodedTensor]:
        codes = checkpoint.tensors["ids"]
        yield EncodedTensor("plain", codes.shape, codes, (), "toy_int8")

    monkeypatch.setitem(formats.READERS, "renaming", renaming)
    with pytest.raises(CheckpointError, match=r"`plain` is part of two tensors \(not encoded, renaming\)"):
        open_model(saved(tmp_path, family(1))[0])


def test_rows_of_encoded_embeddings_move(tmp_path):
    """Into another vocabulary, as those of numbers do."""
    vocabulary = {"version": "1.0", "model": {"type": "WordLevel", "unk_token": "a", "vocab": {}}}
    made: dict[str, list[str]] = {"codes": [], "numbers": []}
    for i, tokens in enumerate((["a", "b"], ["b", "a", "c"])):
        stored = encoded({"model.embed_tokens.weight": tensor(bell(i, len(tokens) * 3).reshape(-1, 3), F32)})
        vocabulary["model"]["vocab"] = {t: n for n, t in enumerate(tokens)}  # type: ignore[index]
        for kind, model in (("codes", stored), ("numbers", decoded(stored))):
            path = write(tmp_path / f"{kind}{i}", model)
            (path / "tokenizer.json").write_text(json.dumps(vocabulary))
            made[kind].append(str(path))
    for kind, paths in made.items():
        values = recipe("linear", paths, weights=[1, 1], tokenizer_source="union", dtype="float32")
        fastinterp.merge(values, tmp_path / kind)
    assert_same(read(tmp_path / "numbers"), read(tmp_path / "codes"))


def test_without_the_reader_codes_are_integers(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "READERS", {})
    [stored] = family(1)
    model = open_model(saved(tmp_path, [stored])[0])
    assert sorted(model.tensors) == sorted(stored)
    assert model.tensors["model.layers.0.q.weight"].dtype.name == "I8"
