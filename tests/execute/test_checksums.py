"""Outputs state checksums of their bytes: those of the definition, however the output was made."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import fastinterp
from fastinterp.backends.cpu import FileChecksum, Pump
from fastinterp.backends.registry import ISA_VARIABLE
from fastinterp.checkpoint.checksum import KEY, UNKNOWN
from fastinterp.errors import OutputError
from fastinterp.execute import rounds, sinks
from fastinterp.ops.combine import NUMERICS
from fastinterp.ops.dtypes import BF16, F32
from fastinterp.output.receipt import RECEIPT, read_receipt
from fastinterp.reference.checksum import CELL_BYTES
from tests.support import backends
from tests.support.checkpoints import family, moved, read_header, recipe, saved, weights, write, write_file
from tests.support.gguf_models import Type, numbers
from tests.support.gguf_models import write as write_gguf
from tests.support.quantised_models import FORMS
from tests.support.quantised_models import family as quantised_family
from tests.support.quantised_models import saved as save_quantised
from tests.support.stated_checksums import checked, checked_weights
from tests.support.written import tree


def large(folder: Path, count: int = 2) -> list[str]:
    """Models of 3 MB: blocks of 2 MiB, many cells, tensors that end in the middle of one."""
    base = {
        "model.embed_tokens.weight": weights(1, BF16, (1000, 512)),
        "model.layers.0.q.weight": weights(2, BF16, (513, 511)),
        "model.layers.0.k.weight": weights(3, F32, (301, 301)),
        "model.layers.1.q.weight": weights(4, BF16, (1111, 600)),
        "model.norm.weight": weights(5, F32, (7,)),
    }
    models = [base] + [{n: moved(t, 10 * i + s) for s, (n, t) in enumerate(base.items())} for i in range(1, count)]
    return [str(write(folder / "abc"[i], model)) for i, model in enumerate(models)]


def test_everything_that_is_stated_is_true(tmp_path):
    paths = saved(tmp_path, family(2))
    (Path(paths[0]) / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    fastinterp.merge(recipe("linear", paths, weights=[1, 1]), tmp_path / "out", max_shard_size=3000)
    receipt = checked(tmp_path / "out")
    assert len(receipt["weights"]) > 2 and {"config.json", "README.md", "model.safetensors.index.json"} == set(
        receipt["files"]
    )
    assert (receipt["fastinterp"], receipt["numerics"]) == (fastinterp.__version__, NUMERICS)
    table, _ = read_header(tmp_path / "out" / sorted(receipt["weights"])[0])
    assert receipt["merge"] == json.loads(table["__metadata__"]["fastinterp"])
    found = read_receipt(str(tmp_path / "out" / RECEIPT))
    assert found.merge == receipt["merge"] and found.weights.keys() == receipt["weights"].keys()
    for name in receipt["weights"]:
        with safe_open(tmp_path / "out" / name, "np") as file:  # numpy has no bf16
            assert file.keys()


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weights": [0.5, 0.5]},
    "ties": {"weights": [0.7, 0.4], "parameters": {"density": 0.4}},
    "slerp": {"parameters": {"t": 0.3}},
    "dare_linear": {"weights": [0.7, 0.4], "parameters": {"density": 0.4}},
}


@pytest.mark.parametrize("method", METHODS)
def test_same_checksums_for_any_threads_windows_and_rounds(tmp_path, monkeypatch, method):
    """Writes of one page, rounds of one tensor; true in any case, and so the same."""
    paths = large(tmp_path)
    keys = {**METHODS[method], **({"base_model": paths[0]} if method in ("ties", "dare_linear", "slerp") else {})}
    asked = recipe(method, paths[1:] + paths[:1] if method == "slerp" else paths, **keys)
    want = None
    for threads, memory in ((1, "512MB"), (3, "512MB"), (2, 200_000 if method == "linear" else "512MB")):
        fastinterp.merge(asked, tmp_path / "out", threads=threads, max_memory=memory, force=True)
        checked(tmp_path / "out")
        want = want or tree(tmp_path / "out")
        assert tree(tmp_path / "out") == want
    monkeypatch.setattr(rounds, "ROUND_BYTES", 100_000)
    fastinterp.merge(asked, tmp_path / "out", force=True)
    assert tree(tmp_path / "out") == want


@pytest.mark.parametrize("isa", backends.usable())
def test_same_checksums_on_every_instruction_set(tmp_path, monkeypatch, isa):
    monkeypatch.setenv(ISA_VARIABLE, isa)
    fastinterp.merge(recipe("linear", large(tmp_path), weights=[0.5, 0.5]), tmp_path / "out")
    checked(tmp_path / "out")


def test_outputs_of_a_sweep_whose_headers_differ_in_length(tmp_path):
    """Their data begins at other places within a cell, so that few writes of the second have whole ones."""
    models = [{f"layer{i}": weights(10 * m + i, F32, (300, 211)) for i in range(5)} for m in range(2)]
    alphas = [0.5, 0.123456789012345]

    def swept(pad: int, out: Path) -> list[Path]:
        for name, model in zip("ab", models, strict=True):
            (tmp_path / name).mkdir(exist_ok=True)
            write_file(tmp_path / name / "model.safetensors", model, metadata={"pad": "x" * pad})
        reports = fastinterp.interpolate(tmp_path / "a", tmp_path / "b", alphas, out)
        return [Path(report.output) for report in reports]

    short, long = (
        len(path.read_bytes()[: read_header(path)[1]].rstrip())
        for path in (out / "model.safetensors" for out in swept(0, tmp_path / "first"))
    )
    assert short < long
    outs = swept(-short % 4096, tmp_path / "out")
    starts = [checked(out)["weights"]["model.safetensors"]["data_start"] for out in outs]
    assert starts[0] + 4096 == starts[1]


def test_chained_documents(tmp_path):
    a, b, c = large(tmp_path, 3)
    above = {"name": "mid", **recipe("ties", [a, b], weights=[1, 0.5], base_model=c, parameters={"density": 0.5})}
    fastinterp.merge([above, recipe("linear", ["mid", c], weights=[1, 1])], tmp_path / "out")
    checked(tmp_path / "out")


@pytest.mark.parametrize("name", FORMS)
def test_outputs_that_are_encoded(tmp_path, name):
    paths = save_quantised(tmp_path, FORMS[name], quantised_family(FORMS[name], 2))
    for threads in (1, 3):
        fastinterp.merge(
            recipe("linear", paths, weights=[0.5, 0.5], quantize="same"), tmp_path / "out", threads=threads, force=True
        )
        checked(tmp_path / "out")


@pytest.mark.parametrize("alignment", [None, 256, 65536])
def test_gguf_with_bytes_that_no_tensor_has(tmp_path, alignment):
    """Padding between tensors is not written, but it is in the file, and in the checksum; whole cells of it, too."""
    paths = [write_gguf(tmp_path / f"{i}.gguf", numbers(i), Type.F16, alignment=alignment) for i in range(2)]
    out = tmp_path / "folder"
    a, b = paths
    fastinterp.interpolate(a, b, 0.5, out)
    (name,) = checked(out)["weights"]
    fastinterp.interpolate(a, b, 0.5, tmp_path / "one.gguf")
    checked_weights(tmp_path / "one.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (out / name).read_bytes()


def test_one_file_states_its_checksum_and_has_no_receipt(tmp_path):
    a, b = large(tmp_path)
    fastinterp.interpolate(a, b, 0.5, tmp_path / "new" / "x.safetensors")
    checked_weights(tmp_path / "new" / "x.safetensors")
    assert os.listdir(tmp_path / "new") == ["x.safetensors"]


def test_merges_of_merges_have_their_own(tmp_path):
    """The checksum and the receipt of an input are not carried over."""
    a, b = large(tmp_path)
    fastinterp.interpolate(a, b, 0.5, tmp_path / "first")
    report = fastinterp.interpolate(tmp_path / "first", b, 0.5, tmp_path / "second")[0]
    assert checked(tmp_path / "first")["weights"] != checked(tmp_path / "second")["weights"]
    assert report.left_out["the output has a receipt of its own"] == (RECEIPT,)
    assert not [r for r in report.remarks if KEY in r]


def test_a_text_like_the_marker_stays(tmp_path):
    """Metadata of an origin that looks like a checksum which is not known yet."""
    hostile = {"a": f'"{KEY}":"{UNKNOWN}"', f'x"{KEY}': UNKNOWN, f',"{KEY}': UNKNOWN, "b": UNKNOWN, "c,": ","}
    for name in "ab":
        (tmp_path / name).mkdir()
        write_file(tmp_path / name / "model.safetensors", {f'"{KEY}"': weights(1, F32, (4,))}, metadata=hostile)
    fastinterp.interpolate(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "out")
    checked(tmp_path / "out")
    table, _ = read_header(tmp_path / "out" / "model.safetensors")
    assert {k: table["__metadata__"][k] for k in hostile} == hostile


@pytest.mark.slow
def test_transformers_loads_what_states_a_checksum(tmp_path):
    import transformers

    from tests.support.language_models import save_model

    a, b = save_model(tmp_path / "a"), save_model(tmp_path / "b", "q")
    fastinterp.interpolate(a, b, 0.5, tmp_path / "out")
    checked(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    want = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in loaded.state_dict().items():
        if name in want:
            assert np.array_equal(tensor.numpy(), want[name])


# --- the order of writes -------------------------------------------------------------------------------------------


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Of temporary files of weights: bytes of the file, and of the disk."""
    infos = {p.name: p.stat() for p in folder.rglob(".*.safetensors.partial*")}
    return {name: (info.st_size, info.st_blocks * 512) for name, info in infos.items() if stat.S_ISREG(info.st_mode)}


def test_header_comes_last_and_space_first(tmp_path, monkeypatch):
    """Before the data, the file is empty and has its space; while data is written, there is no header."""
    a, b = large(tmp_path)
    total = sum(f.stat().st_size for f in Path(a).glob("*.safetensors"))
    seen: list[Any] = []

    class Watched:
        def __init__(self, *args: Any):
            seen.append(sizes(tmp_path / "out"))
            self.pump = Pump(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.pump, name)

    monkeypatch.setattr(rounds, "Pump", Watched)

    def write_all(fd: int, data: bytes, offset: int) -> None:
        assert offset == 0
        seen.append((os.pread(fd, len(data), 0), data, os.fstat(fd).st_size))
        os.pwrite(fd, data, 0)

    monkeypatch.setattr(sinks, "write_all", write_all)
    fastinterp.interpolate(a, b, 0.5, tmp_path / "out")
    (before, (old, new, size)) = seen
    ((length, on_disk),) = before.values()
    assert length == 0 and on_disk >= total
    assert old == bytes(len(new)) and KEY.encode() in new
    assert size == (tmp_path / "out" / "model.safetensors").stat().st_size
    checked(tmp_path / "out")


def test_a_header_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    a, b = large(tmp_path)

    def write_all(fd: int, data: bytes, offset: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sinks, "write_all", write_all)
    with pytest.raises(OutputError, match=r"model\.safetensors: No space left on device"):
        fastinterp.interpolate(a, b, 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_read_back_of_what_was_hashed(tmp_path, monkeypatch):
    """Of an output whose cells are all written whole, nothing is read to make the checksum."""
    read_back = []

    class Watched(FileChecksum):
        def regions(self, threads: int = 1) -> list[int]:
            for region in range(self.first_region, self.first_region + self.region_count):
                _, hashed = self.progress(region)
                read_back.append(sum(byte.bit_count() for byte in hashed))
            return super().regions(threads)

    monkeypatch.setattr(sinks, "FileChecksum", Watched)
    a, b = large(tmp_path)
    fastinterp.interpolate(a, b, 0.5, tmp_path / "out", threads=1)
    cells = -(-(tmp_path / "out" / "model.safetensors").stat().st_size // CELL_BYTES)
    assert cells - 4 <= sum(read_back) <= cells  # not those at which runs of tensors of other steps begin


@pytest.mark.parametrize("how", ["", "durable", "force"])
def test_writing_to_the_disk_begins_before_a_sync(tmp_path, monkeypatch, how):
    """Not where nothing is synced."""
    a, b = large(tmp_path)
    asked: list[int] = []
    monkeypatch.setattr(sinks, "start_writeback", lambda fd: asked.append(os.fstat(fd).st_size))
    fastinterp.interpolate(a, b, 0.5, tmp_path / "out", durable=how == "durable", force=how == "force")
    assert bool(asked) == bool(how)
    checked(tmp_path / "out")
