"""Merges of GGUF models in blocks: decoders, Q8_0 that is written, types that only the package gguf reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

import fastinterp
from fastinterp.checkpoint.gguf_types import TYPES
from fastinterp.errors import CheckpointError, UsageError
from fastinterp.inspect.compare import compare
from tests.execute.test_gguf import command, linear, models, stacked
from tests.support import backends
from tests.support.gguf_models import Type, combined, header_of, numbers, raw, read, write

# --- blocks ----------------------------------------------------------------------------------------------------------

NATIVE = [Type(t.number) for t in TYPES.values() if t.decoder]


@pytest.mark.parametrize("kind", NATIVE, ids=lambda kind: kind.name)
def test_blocks_are_merged_as_the_package_reads_them(tmp_path, kind):
    a, b = (write(tmp_path / f"{i}.gguf", numbers(i, width=256), kind) for i in range(2))
    fastinterp.merge(linear([a, b], [0.7, 0.3]), tmp_path / "out.gguf", dtype="float32")
    x, y, got = read(a), read(b), read(tmp_path / "out.gguf")
    assert {kind for kind, _ in x.values()} == {kind.name, "F32"}
    for name, (stored_as, values) in got.items():
        assert stored_as == "F32"
        assert values.tobytes() == combined([x[name][1], y[name][1]], [0.7, 0.3], "F32").tobytes(), name
    total = compare(a, b).total
    assert total.numel == sum(values.size for _, values in x.values()) and total.changed


def test_what_is_not_written_becomes_f16(tmp_path):
    kinds = {"output.weight": Type.Q6_K, "blk.0.attn_q.weight": Type.BF16}
    a, b = (write(tmp_path / f"{i}.gguf", numbers(i, width=256), Type.Q4_K, kinds=kinds) for i in range(2))
    report = fastinterp.merge(linear([a, b], [0.5, 0.5]), tmp_path / "out.gguf")
    x, y, got = read(a), read(b), read(tmp_path / "out.gguf")
    for name, (stored_as, values) in got.items():
        assert stored_as == ("F32" if values.ndim < 2 else "BF16" if name == "blk.0.attn_q.weight" else "F16")
        assert values.tobytes() == combined([x[name][1], y[name][1]], [0.5, 0.5], stored_as).tobytes()
    remarks = "\n".join(report.remarks)
    assert f"7 tensors that {a} has in types that are not written (6 Q4_K, 1 Q6_K): stored in F16" in remarks
    assert header_of(tmp_path / "out.gguf")["general.file_type"] == 1


# --- Q8_0 written ----------------------------------------------------------------------------------------------------


def encoded_sum(inputs: list[Any], weights: list[float]) -> bytes:
    """The blocks of a weighted mean: the package quantises what the reference sums."""
    blocks: bytes = gguf.quants.quantize(combined(inputs, weights, "F32"), Type.Q8_0).tobytes()
    return blocks


@pytest.mark.parametrize("isa", backends.usable())
@pytest.mark.parametrize("threads", [1, 3])
def test_q8_0_stays_q8_0(tmp_path, monkeypatch, isa, threads):
    monkeypatch.setenv("FASTINTERP_ISA", isa)
    paths = models(tmp_path, Type.Q8_0, 3)
    report = fastinterp.merge(linear(paths, [0.5, 0.3, 0.2]), tmp_path / "out.gguf", threads=threads)
    want, got, stored = [read(p) for p in paths], raw(tmp_path / "out.gguf"), read(tmp_path / "out.gguf")
    for name, (kind, first) in want[0].items():
        inputs = [m[name][1] for m in want]
        assert stored[name][0] == kind == ("Q8_0" if first.ndim > 1 else "F32")
        numbers_of = combined(inputs, [0.5, 0.3, 0.2], "F32").tobytes()
        assert got[name] == (encoded_sum(inputs, [0.5, 0.3, 0.2]) if kind == "Q8_0" else numbers_of), name
    header = header_of(tmp_path / "out.gguf")
    assert (header["general.file_type"], header["general.quantization_version"]) == (7, 2)
    assert report.bytes_written == sum(map(len, got.values()))
    assert not [r for r in report.remarks if "not written" in r]


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q4_K])
def test_dtype_q8_0(tmp_path, kind):
    """Rows that do not fill blocks are F16, and norms F32."""
    odd = {"blk.0.odd.weight": np.linspace(-1, 1, 80, dtype=np.float32).reshape(2, 40)}
    kinds = {"blk.0.odd.weight": Type.F32 if kind == Type.F32 else Type.F16}
    a, b = (write(tmp_path / f"{i}.gguf", {**numbers(i, width=256), **odd}, kind, kinds=kinds) for i in range(2))
    fastinterp.merge(linear([a, b], [0.5, 0.5]), tmp_path / "out.gguf", dtype="q8_0")
    x, y, got, stored = read(a), read(b), read(tmp_path / "out.gguf"), raw(tmp_path / "out.gguf")
    for name, (stored_as, values) in got.items():
        inputs = [x[name][1], y[name][1]]
        if values.ndim < 2 or name in odd:
            assert stored_as == ("F16" if name in odd else "F32")
            assert values.tobytes() == combined(inputs, [0.5, 0.5], stored_as).tobytes()
        else:
            assert stored_as == "Q8_0" and stored[name] == encoded_sum(inputs, [0.5, 0.5])
    assert header_of(tmp_path / "out.gguf")["general.file_type"] == 7


def test_copies_of_q8_0_are_its_bytes(tmp_path):
    """At the ends of a path, also beside points that are computed."""
    a, b = models(tmp_path, Type.Q8_0)
    fastinterp.interpolate(a, b, [0, 0.5, 1], tmp_path / "x.gguf")
    assert raw(tmp_path / "x_alpha_0.gguf") == raw(a) and raw(tmp_path / "x_alpha_1.gguf") == raw(b)
    x, y, got = read(a), read(b), raw(tmp_path / "x_alpha_0.5.gguf")
    assert got["output.weight"] == encoded_sum([x["output.weight"][1], y["output.weight"][1]], [0.5, 0.5])


@pytest.mark.parametrize("method", ["ties", "dare_ties", "slerp"])
def test_methods_with_requests_write_q8_0(tmp_path, method):
    """What they sum in float32, quantised."""
    paths = models(tmp_path, Type.Q8_0, 3)
    merged = paths[:2] if method == "slerp" else paths[1:]
    recipe: dict[str, Any] = {"merge_method": method, "base_model": str(paths[0])}
    recipe["models"] = [{"model": str(p)} for p in merged]
    recipe["parameters"] = {"t": 0.4} if method == "slerp" else {"weight": 0.5, "density": 0.5}
    fastinterp.merge(recipe, tmp_path / "numbers.gguf", dtype="float32")
    fastinterp.merge(recipe, tmp_path / "out.gguf")
    got = raw(tmp_path / "out.gguf")
    for name, (_, values) in read(tmp_path / "numbers.gguf").items():
        assert got[name] == (gguf.quants.quantize(values, Type.Q8_0) if values.ndim > 1 else values).tobytes()


def test_several_documents(tmp_path):
    paths = models(tmp_path, Type.Q8_0, 3)
    first = {"name": "mean", **linear(paths[:2], [0.5, 0.5])}
    fastinterp.merge([first, linear([Path("mean"), paths[2]], [0.5, 0.5])], tmp_path / "out.gguf")
    want, stored = [read(p) for p in paths], raw(tmp_path / "out.gguf")
    for name, (kind, _) in want[0].items():
        if kind == "Q8_0":
            assert stored[name] == encoded_sum([m[name][1] for m in want], [0.25, 0.25, 0.5])
    assert header_of(tmp_path / "out.gguf")["general.file_type"] == 7


def test_quantize_same(tmp_path):
    """It is what is done with Q8_0 anyway; of types that are not written it is refused."""
    a, b = models(tmp_path, Type.Q8_0)
    fastinterp.merge(linear([a, b], [0.5, 0.5]), tmp_path / "x.gguf")
    fastinterp.merge(linear([a, b], [0.5, 0.5], quantize="same"), tmp_path / "y.gguf")
    assert raw(tmp_path / "x.gguf") == raw(tmp_path / "y.gguf")
    c, d = (write(tmp_path / f"{i}.gguf", numbers(i, width=256), Type.Q4_K) for i in range(2))
    with pytest.raises(CheckpointError, match="of which these are read and not written: Q4_K"):
        fastinterp.merge(linear([c, d], [0.5, 0.5], quantize="same"), tmp_path / "z.gguf")
    fastinterp.merge(stacked(c, d, quantize="same"), tmp_path / "z.gguf")
    assert read(tmp_path / "z.gguf")["output.weight"][0] == "Q4_K"


def test_q8_0_is_for_gguf(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(paths):
        save_file(numbers(seed), path)
    with pytest.raises(UsageError, match="is a type of GGUF files, and of outputs of GGUF models only"):
        fastinterp.interpolate(paths[0], paths[1], 0.5, tmp_path / "out", dtype="q8_0")


def test_weights_in_memory_are_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    a, b = models(tmp_path, Type.Q8_0)
    loaded = fastinterp.load(linear([a, b], [0.5, 0.5]), dtype="float32")
    x, y = read(a), read(b)
    assert loaded.keys() == x.keys()
    for name, values in loaded.items():
        assert values.dtype == torch.float32
        assert values.numpy().tobytes() == combined([x[name][1], y[name][1]], [0.5, 0.5], "F32").tobytes()


# --- types without a decoder -----------------------------------------------------------------------------------------


def test_types_that_only_the_package_reads(tmp_path):
    """They are converted by the package before the merge, with a warning; the output has F16 there."""
    kinds = {"blk.0.ffn_down.weight": Type.IQ3_S, "blk.1.ffn_down.weight": Type.TQ2_0, "output.weight": Type.IQ2_XXS}
    paths = [write(tmp_path / f"{i}.gguf", numbers(i, width=256), Type.F16, kinds=kinds) for i in range(2)]
    report = fastinterp.merge(linear(paths, [0.5, 0.5]), tmp_path / "out.gguf")
    warning = next(w for w in report.warnings if "converted by Python" in w)
    assert "1 IQ3_S" in warning and "1 TQ2_0" in warning
    x, y, got = read(paths[0]), read(paths[1]), read(tmp_path / "out.gguf")
    for name, (kind, values) in got.items():
        assert kind == ("F16" if values.ndim > 1 else "F32")
        assert values.tobytes() == combined([x[name][1], y[name][1]], [0.5, 0.5], kind).tobytes(), name
    remarks = "\n".join(report.remarks)
    assert f"3 tensors that {paths[0]} has in types that are not written (" in remarks and "1 IQ3_S" in remarks
    fastinterp.interpolate(paths[0], paths[1], 0, tmp_path / "copy.gguf")
    assert raw(tmp_path / "copy.gguf") == raw(paths[0])
    assert header_of(tmp_path / "copy.gguf")["general.file_type"] == header_of(paths[0])["general.file_type"]


def test_inspect_shows_the_types_of_the_file(tmp_path):
    kinds = {"output.weight": Type.IQ2_XXS, "blk.0.attn_q.weight": Type.Q4_K}
    path = write(tmp_path / "x.gguf", numbers(0, width=256), Type.Q8_0, kinds=kinds)
    found = json.loads(command("inspect", path, "--json").output)
    tensors = gguf.GGUFReader(path).tensors
    want = {t.name: (t.tensor_type.name, t.shape[::-1].tolist(), t.n_bytes, t.data_offset) for t in tensors}
    assert {t["name"]: (t["dtype"], t["shape"], t["bytes"], t["offset"]) for t in found["tensors"]} == want
    assert found["parameters"] == sum(t.n_elements for t in tensors) and not found["quantised"]


def test_projectors_are_merged_as_models_are(tmp_path):
    """The vision part beside a model: other names, and a convolution of four dimensions."""
    shapes = {"v.blk.0.attn_q.weight": (64, 64), "mm.0.bias": (64,), "v.patch_embd.weight": (8, 3, 4, 4)}
    rng, paths = np.random.default_rng(0), [tmp_path / "a" / "mmproj.gguf", tmp_path / "b" / "mmproj.gguf"]
    for path in paths:
        model = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        header = {"clip.has_vision_encoder": True}
        write(path, model, Type.F16, header=header, architecture="clip", general_type="mmproj")
    fastinterp.merge(linear(paths, [0.5, 0.5]), tmp_path / "out.gguf")
    x, y, got = read(paths[0]), read(paths[1]), read(tmp_path / "out.gguf")
    for name, (kind, values) in got.items():
        assert values.shape == shapes[name] and kind == ("F16" if values.ndim > 1 else "F32")
        assert values.tobytes() == combined([x[name][1], y[name][1]], [0.5, 0.5], kind).tobytes()
    assert header_of(tmp_path / "out.gguf")["general.type"] == "mmproj"


def test_types_that_only_the_package_reads_without_it(tmp_path, monkeypatch):
    kinds = {"output.weight": Type.IQ2_XXS}
    paths = [write(tmp_path / f"{i}.gguf", numbers(i, width=256), Type.F16, kinds=kinds) for i in range(2)]
    monkeypatch.setattr("fastinterp.plan.gguf.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"IQ2_XXS are read with the package gguf.*`pip install gguf`"):
        fastinterp.merge(linear(paths, [0.5, 0.5]), tmp_path / "out.gguf")
    assert command("inspect", paths[0]).exit_code == 0


@pytest.mark.parametrize("error", [KeyError, NotImplementedError])
def test_types_that_the_package_does_not_know(tmp_path, monkeypatch, error):
    kinds = {"output.weight": Type.IQ2_XXS}
    paths = [write(tmp_path / f"{i}.gguf", numbers(i, width=256), Type.F16, kinds=kinds) for i in range(2)]

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(gguf.quants, "dequantize", fail)
    with pytest.raises(CheckpointError, match=r"gguf that is installed cannot read IQ2_XXS: `pip install -U gguf`"):
        fastinterp.merge(linear(paths, [0.5, 0.5]), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
