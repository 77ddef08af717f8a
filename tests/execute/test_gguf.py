"""Merges of GGUF models: the package gguf reads back what was merged, with the base's header made true."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

import fastinterp
from fastinterp.checkpoint.checksum import KEY, stated_checksum
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError, ShapeError, UsageError
from fastinterp.inspect.compare import compare
from fastinterp.output.receipt import RECEIPT
from tests.support import backends
from tests.support.gguf_models import Type, combined, header_of, keys, numbers, raw, read, write
from tests.support.written import tree

PLAIN = [Type.F32, Type.F16, Type.BF16]


def models(folder: Path, kind: Type = Type.F16, count: int = 2, **options: Any) -> list[Path]:
    return [write(folder / f"{'abcd'[i]}.gguf", numbers(i), kind, **options) for i in range(count)]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(commands, list(map(str, arguments)))


def linear(paths: list[Path], weights: list[float], **more: Any) -> dict[str, Any]:
    each = [{"model": str(p), "parameters": {"weight": w}} for p, w in zip(paths, weights, strict=True)]
    return {"merge_method": "linear", "models": each, **more}


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", backends.usable())
@pytest.mark.parametrize("kind", PLAIN)
def test_values_are_those_of_the_contract(tmp_path, monkeypatch, kind, isa):
    """The tensors as the package reads them, merged by the reference, are the bytes that the package reads back."""
    monkeypatch.setenv("FASTINTERP_ISA", isa)
    paths = models(tmp_path, kind, 3)
    report = fastinterp.merge(linear(paths, [0.5, 0.3, 0.2]), tmp_path / "out.gguf")
    want = [read(p) for p in paths]
    got = read(tmp_path / "out.gguf")
    assert list(got) == list(want[0])
    for name, (stored_as, x) in got.items():
        assert stored_as == want[0][name][0]
        merged = combined([m[name][1] for m in want], [0.5, 0.3, 0.2], want[0][name][0])
        assert x.tobytes() == merged.tobytes(), name
    assert report.bytes_written == sum(map(len, raw(tmp_path / "out.gguf").values()))


def test_base_decides_types_tensor_by_tensor(tmp_path):
    """Models of other types are read as they are; the output has the base's."""
    a = write(tmp_path / "a.gguf", numbers(0), Type.BF16, kinds={"output.weight": Type.F16})
    b = write(tmp_path / "b.gguf", numbers(1), Type.F32)
    recipe = linear([a, b], [0.5, 0.5])
    fastinterp.merge(recipe, tmp_path / "out.gguf")
    x, y, got = read(a), read(b), read(tmp_path / "out.gguf")
    for name, (kind, values) in got.items():
        assert kind == x[name][0]
        assert values.tobytes() == combined([x[name][1], y[name][1]], [0.5, 0.5], kind).tobytes()
    assert header_of(tmp_path / "out.gguf")["general.file_type"] == header_of(a)["general.file_type"]


@pytest.mark.parametrize(
    ("dtype", "stored", "file_type"), [("float32", "F32", 0), ("float16", "F16", 1), ("bfloat16", "BF16", 32)]
)
def test_dtype_leaves_norms_in_float32(tmp_path, dtype, stored, file_type):
    a, b = models(tmp_path, Type.F16)
    report = fastinterp.merge(linear([a, b], [0.5, 0.5]), tmp_path / "out.gguf", dtype=dtype)
    x, y, got = read(a), read(b), read(tmp_path / "out.gguf")
    for name, (kind, values) in got.items():
        assert kind == (stored if values.ndim > 1 else "F32")
        assert values.tobytes() == combined([x[name][1], y[name][1]], [0.5, 0.5], kind).tobytes()
    assert header_of(tmp_path / "out.gguf")["general.file_type"] == file_type
    assert any("not stored in" in r for r in report.remarks) == (dtype != "float32")


def test_tensors_that_llama_cpp_wants_in_float32(tmp_path):
    """Of a base that is all F32: vectors, and those that its converter never writes in another type."""
    names = ["blk.0.ffn_gate_inp.weight", "blk.0.attn_q_norm.weight", "blk.0.ssm_a", "position_embd.weight"]
    more = {name: np.full((4, 32), 0.25, np.float32) for name in names}
    a = write(tmp_path / "a.gguf", {**numbers(0), **more}, Type.F32)
    b = write(tmp_path / "b.gguf", {**numbers(1), **more}, Type.F32)
    fastinterp.interpolate(a, b, 0.5, tmp_path / "out.gguf", dtype="bfloat16")
    got = {name: kind for name, (kind, _) in read(tmp_path / "out.gguf").items()}
    assert {name for name, kind in got.items() if kind == "F32"} == {
        *names, "output_norm.weight", "blk.0.attn_norm.weight", "blk.1.attn_norm.weight"
    }  # fmt: skip


def test_fp8_is_no_type_of_gguf(tmp_path):
    a, b = models(tmp_path)
    with pytest.raises(UsageError, match="F8_E4M3 is none of the types of GGUF"):
        fastinterp.interpolate(a, b, 0.5, tmp_path / "out.gguf", dtype="F8_E4M3")


# --- the header ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [None, 256])
def test_header_is_the_bases_made_true(tmp_path, alignment):
    extra = {**keys(), "split.count": 0, "quantize.imatrix.file": "x.dat", "general.quantization_version": 2}
    a = write(tmp_path / "a.gguf", numbers(0), Type.F16, header=extra, alignment=alignment)
    b = write(tmp_path / "b.gguf", numbers(1), Type.F16, header={**extra, "general.name": "other"})
    report = fastinterp.merge(linear([b, a], [0.5, 0.5], base_model=str(a)), tmp_path / "out.gguf", dtype="float32")
    want, got = header_of(a), header_of(tmp_path / "out.gguf")
    receipt = json.loads(got.pop("fastinterp"))
    assert stated_checksum({KEY: got.pop(KEY)}) is not None
    assert receipt["models"] == [b.name, a.name] and receipt["method"] == "linear"
    for untrue in ("general.uuid", "split.count", "quantize.imatrix.file"):
        want.pop(untrue)
    want["general.file_type"] = 0
    assert list(got.items()) == list(want.items())
    assert list(read(tmp_path / "out.gguf")) == list(read(a))
    tensors = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert all(t.data_offset % (alignment or 32) == 0 for t in tensors)
    assert any("general.uuid, quantize.imatrix.file, split.count" in r or "general.uuid" in r for r in report.remarks)


def test_equal_merges_are_equal_files(tmp_path):
    a, b = models(tmp_path)
    outs = [tmp_path / f"{i}.gguf" for i in range(3)]
    for threads, out in zip((1, 2, 7), outs, strict=True):
        fastinterp.interpolate(a, b, 0.3, out, threads=threads)
    assert len({out.read_bytes() for out in outs}) == 1


def test_a_merge_of_a_merge(tmp_path):
    """The receipt of the base is not kept beside the new one."""
    a, b = models(tmp_path)
    fastinterp.interpolate(a, b, 0.5, tmp_path / "c.gguf")
    fastinterp.interpolate(tmp_path / "c.gguf", b, 0.5, tmp_path / "d.gguf")
    assert json.loads(header_of(tmp_path / "d.gguf")["fastinterp"])["models"][0].endswith("c.gguf")


def test_end_points_have_the_bytes_of_the_models(tmp_path):
    a, b = models(tmp_path)
    fastinterp.interpolate(a, b, [0, 1], tmp_path / "x.gguf")
    assert raw(tmp_path / "x_alpha_0.gguf") == raw(a)
    assert raw(tmp_path / "x_alpha_1.gguf") == raw(b)


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "written"),
    [
        ("tiny.gguf", None, "tiny.gguf"),
        ("Tiny-1B-F16.gguf", "bfloat16", "Tiny-1B-BF16.gguf"),
        ("tiny.Q4_K_M.gguf", None, "tiny.F16.gguf"),
        ("tiny-UD-IQ2_XXS.gguf", None, "tiny-F16.gguf"),
    ],
)
def test_a_folder_gets_one_file_named_after_the_bases(tmp_path, name, dtype, written):
    a = write(tmp_path / "a" / name, numbers(0), Type.F16)
    (tmp_path / "a" / "LICENSE").write_text("free")
    b = write(tmp_path / "b" / "b.gguf", numbers(1), Type.F16)
    fastinterp.merge(linear([a.parent, b], [0.5, 0.5]), tmp_path / "out", dtype=dtype)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        written,
        "LICENSE",
        "README.md",
        RECEIPT,
    }
    assert open_checkpoint(str(tmp_path / "out")).tensors.keys() == numbers(0).keys()
    with pytest.raises(fastinterp.OutputError, match="not empty"):
        fastinterp.merge(linear([a.parent, b], [0.5, 0.5]), tmp_path / "out")
    fastinterp.merge(linear([a.parent, b], [0.1, 0.9]), tmp_path / "out", dtype=dtype, force=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        written,
        "LICENSE",
        "README.md",
        RECEIPT,
    }
    shutil.copy(b, tmp_path / "out" / "other.gguf")
    with pytest.raises(fastinterp.OutputError, match=r"weights that no index there names: `other\.gguf`"):
        fastinterp.merge(linear([a.parent, b], [0.1, 0.9]), tmp_path / "out", dtype=dtype, force=True)


def test_a_split_base_gives_one_file(tmp_path):
    a = write(tmp_path / "a" / "m.gguf", numbers(0), Type.F16, split=4)
    b = write(tmp_path / "b.gguf", numbers(1), Type.F16)
    fastinterp.interpolate(a, b, 0.5, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"m.gguf", "README.md", RECEIPT}
    whole = write(tmp_path / "a.gguf", numbers(0), Type.F16)
    fastinterp.interpolate(whole, b, 0.5, tmp_path / "whole.gguf")
    assert raw(tmp_path / "out" / "m.gguf") == raw(tmp_path / "whole.gguf")
    assert not [k for k in header_of(tmp_path / "out" / "m.gguf") if k.startswith("split.")]


def test_sizes_of_shards(tmp_path):
    a, b = models(tmp_path)
    with pytest.raises(UsageError, match=r"a GGUF output is one file.*llama-gguf-split --split-max-size"):
        fastinterp.interpolate(a, b, 0.5, tmp_path / "out", max_shard_size="10KB")
    fastinterp.interpolate(a, b, 0.5, tmp_path / "out", max_shard_size="1GB")


@pytest.mark.parametrize("ending", ["safetensors", "gguf"])
def test_the_name_says_the_format(tmp_path, ending):
    """GGUF is written of GGUF, and safetensors of safetensors."""
    a, b = models(tmp_path)
    for i, path in enumerate((tmp_path / "a.safetensors", tmp_path / "b.safetensors")):
        save_file(numbers(i), path)
    before = tree(tmp_path)
    pair = (a, b) if ending == "safetensors" else (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(UsageError) as caught:
        fastinterp.interpolate(pair[0], pair[1], 0.5, tmp_path / f"out.{ending}")
    right = "NAME.gguf" if ending == "safetensors" else "NAME.safetensors"
    assert f"the output is named *.{ending}, but" in str(caught.value) and f"Name it {right}" in str(caught.value)
    assert tree(tmp_path) == before


# --- what is not merged ----------------------------------------------------------------------------------------------


def refused(*arguments: object) -> Result:
    result = command(*arguments)
    assert result.exit_code == 3, result.output
    return result


def test_gguf_with_safetensors(tmp_path):
    a, _ = models(tmp_path)
    save_file(numbers(1), tmp_path / "b.safetensors")
    before = tree(tmp_path)
    for first, second in ((a, tmp_path / "b.safetensors"), (tmp_path / "b.safetensors", a)):
        output = refused("interpolate", first, second, "--alpha", 0.5, "-o", tmp_path / "out").output
        assert "rows of q and k another order" in output and "convert_hf_to_gguf.py" in output
        with pytest.raises(CheckpointError, match=r"convert_hf_to_gguf\.py"):
            compare(first, second)
    assert tree(tmp_path) == before


def test_other_architectures(tmp_path):
    a = write(tmp_path / "a.gguf", numbers(0), Type.F16)
    b = write(tmp_path / "b.gguf", numbers(1), Type.F16, architecture="qwen2")
    output = refused("interpolate", a, b, "--alpha", 0.5, "-o", tmp_path / "out.gguf").output
    assert "has the architecture `llama` (`general.architecture`), and" in output and "`qwen2`" in output
    assert not (tmp_path / "out.gguf").exists()


def test_other_vocabularies_and_rope(tmp_path):
    changed = {**keys(), "llama.rope.freq_base": 5e5, "general.name": "other", "tokenizer.chat_template": "x"}
    changed["tokenizer.ggml.tokens"] = [f"u{i}" for i in range(40)]
    a = write(tmp_path / "a.gguf", numbers(0), Type.F16)
    b = write(tmp_path / "b.gguf", numbers(1), Type.F16, header=changed)
    report = fastinterp.interpolate(a, b, 0.5, tmp_path / "out.gguf")[0]
    (warning,) = [w for w in report.warnings if w.startswith("keys of")]
    assert "llama.rope.freq_base 10000.0 and 500000.0, tokenizer.ggml.tokens (40 x string)" in warning
    (tmp_path / "r.yml").write_text(json.dumps(linear([a, b], [0.5, 0.5])))
    assert "llama.rope.freq_base 10000.0 and 500000.0" in command("check", tmp_path / "r.yml").output


def test_sizes_of_vocabularies(tmp_path):
    a = write(tmp_path / "a.gguf", numbers(0), Type.F16)
    other = numbers(1)
    for name in ("output.weight", "token_embd.weight"):
        other[name] = np.ones((48, 64), np.float32)
    b = write(tmp_path / "b.gguf", other, Type.F16)
    with pytest.raises(ShapeError) as caught:
        fastinterp.interpolate(a, b, 0.5, tmp_path / "out.gguf")
    assert "tokenizer_source" not in str(caught.value)


@pytest.mark.parametrize("key", [{"tokenizer_source": "union"}, {"chat_template": "auto"}])
def test_tokenizers_are_not_merged(tmp_path, key):
    a, b = models(tmp_path)
    with pytest.raises(UsageError, match="is not possible with GGUF models"):
        fastinterp.merge(linear([a, b], [0.5, 0.5], **key), tmp_path / "out.gguf")


# --- commands --------------------------------------------------------------------------------------------------------


def test_commands(tmp_path):
    a, b = models(tmp_path)
    c = write(tmp_path / "c.gguf", numbers(2), Type.F16)
    (tmp_path / "r.yml").write_text(json.dumps(linear([a, b, c], [1, 1, 1])))
    for arguments in (
        ("check", tmp_path / "r.yml"),
        ("explain", tmp_path / "r.yml"),
        ("inspect", a, "--all"),
        ("diff", a, b),
        ("merge", tmp_path / "r.yml", tmp_path / "merged.gguf"),
        ("average", "--in-order", a, b, c, "-o", tmp_path / "average.gguf"),
        ("sweep", a, b, "--alphas", "0:1:0.5", "-o", tmp_path / "sweep.gguf"),
        ("sweep", a, b, "--alphas", "0.5", "-o", tmp_path / "sweep"),
    ):
        result = command(*arguments)
        assert result.exit_code == 0, (arguments, result.output)
    middle = raw(tmp_path / "sweep_alpha_0.5.gguf")
    assert raw(tmp_path / "sweep" / "alpha_0.5" / "a.gguf") == middle and raw(tmp_path / "sweep_alpha_1.gguf") == raw(b)
    for name, (kind, values) in read(tmp_path / "average.gguf").items():
        x = [read(p)[name][1] for p in (c, b, a)]
        assert values.tobytes() in {combined(order, [1, 1, 1], kind).tobytes() for order in (x, x[::-1])}
    assert compare(a, b).total.changed > 0 and not compare(a, a).total.changed


@pytest.mark.parametrize("method", ["slerp", "ties", "dare_ties", "task_arithmetic", "model_stock"])
def test_methods_give_what_they_give_for_safetensors(tmp_path, method):
    """The same numbers in the same dtypes: the same bytes, whatever file they come from."""
    paths = models(tmp_path, Type.F32, 3)
    for i, path in enumerate(paths):
        save_file(numbers(i), path.with_suffix(".safetensors"))
    made = []
    for suffix in (".gguf", ".safetensors"):
        base, *others = [str(p.with_suffix(suffix)) for p in paths]
        recipe: dict[str, Any] = {"merge_method": method, "base_model": base, "models": [{"model": m} for m in others]}
        recipe["parameters"] = {"weight": 0.5, "density": 0.5}
        if method == "slerp":
            recipe |= {"models": [{"model": base}, {"model": others[0]}], "parameters": {"t": 0.4}}
        if method in ("task_arithmetic", "model_stock"):
            recipe["parameters"] = {"weight": 0.5} if method == "task_arithmetic" else {}
        fastinterp.merge(recipe, tmp_path / f"out{suffix}")
        made.append(tmp_path / f"out{suffix}")
    got, want = raw(made[0]), load_file(made[1])
    assert got.keys() == want.keys() and all(got[name] == want[name].tobytes() for name in want)


# --- layers ----------------------------------------------------------------------------------------------------------


def stacked(a: Path, b: Path, **more: Any) -> dict[str, Any]:
    parts = [{"model": str(a), "layer_range": [0, 2]}], [{"model": str(b), "layer_range": [1, 2]}]
    return {"merge_method": "passthrough", "slices": [{"sources": [*p]} for p in parts], **more}


@pytest.mark.parametrize("kind", [Type.F16, Type.Q4_K])
def test_a_stack_of_layers(tmp_path, kind):
    """Names are numbered anew, and the header says how many layers there are. Copies are byte for byte."""
    extra = {**keys(), "llama.attention.head_count_kv": [2, 2]}
    kinds = {n: kind for n, x in numbers(0, width=256).items() if x.ndim > 1}
    paths = [
        write(tmp_path / f"{i}.gguf", numbers(i, width=256), Type.F16, kinds=kinds, header=extra) for i in range(2)
    ]
    fastinterp.merge(stacked(*paths), tmp_path / "out.gguf")
    header, got, x, y = header_of(tmp_path / "out.gguf"), raw(tmp_path / "out.gguf"), raw(paths[0]), raw(paths[1])
    assert header["llama.block_count"] == 3 and header["llama.attention.head_count_kv"] == [2, 2, 2]
    want = {**x, **{n.replace("blk.1.", "blk.2."): c for n, c in y.items() if n.startswith("blk.1.")}}
    last = {n: y[n] for n in ("output.weight", "output_norm.weight")}  # what comes after the layers is the last model's
    assert got == {**want, **last}
    assert command("inspect", tmp_path / "out.gguf").exit_code == 0


def test_a_stack_of_layers_that_differ_by_place(tmp_path):
    extra = {**keys(), "llama.attention.head_count_kv": [2, 1]}
    paths = [write(tmp_path / f"{i}.gguf", numbers(i), Type.F16, header=extra) for i in range(2)]
    with pytest.raises(CheckpointError, match=r"`llama\.attention.head_count_kv` differs from layer to layer"):
        fastinterp.merge(stacked(*paths), tmp_path / "out.gguf")


def test_a_stack_of_more_layers_than_the_header_has(tmp_path):
    extra = {**keys(), "llama.block_count": 0}
    paths = [write(tmp_path / f"{i}.gguf", numbers(i), Type.F16, header=extra) for i in range(2)]
    with pytest.raises(CheckpointError, match=r"`llama.block_count` does not say how many layers there are: got 0"):
        fastinterp.merge(stacked(*paths), tmp_path / "out.gguf")
