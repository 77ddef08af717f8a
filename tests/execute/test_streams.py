"""Merges that read models elsewhere while they are merged: the same bytes, nothing else on the disk, bounded memory."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

import fastinterp
from fastinterp._C import RangeCache
from fastinterp.checkpoint.http_ranges import HttpFile
from fastinterp.errors import CheckpointError, ShapeError, StorageError, UsageError
from fastinterp.ops.dtypes import BF16, F32
from tests.support.checkpoints import integers, tensor, words, write
from tests.support.hub_server import hub_server, in_this_process
from tests.support.quantised_models import FORMS, family, saved

pytestmark = pytest.mark.slow(3)

ROWS = 600  # of the large tensor, of 512 elements


def model(folder: Path, seed: int, dtype=F32, shards: bool = False) -> Path:
    """A model with a large tensor and small ones, in one file or two."""
    values = (words(seed, ROWS * 512) % np.uint64(2001)).astype("f8") / 1000 - 1
    tensors = {"a": tensor(values[:7], dtype), "big": tensor(values, dtype, [ROWS, 512]), "c": tensor([seed], dtype)}
    if not shards:
        write(folder, tensors)
    else:
        folder.mkdir()
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        for name, keys in zip(names, (["a", "c"], ["big"]), strict=True):
            write(folder / "part", {key: tensors[key] for key in keys})
            (folder / "part" / "model.safetensors").rename(folder / name)
        (folder / "part").rmdir()
        index = {"a": names[0], "c": names[0], "big": names[1]}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub with org/a, and org/b in two shards, whose folders are `a` and `b` here."""
    monkeypatch.chdir(tmp_path)
    with hub_server() as server, in_this_process(server, tmp_path / "cache"):
        server.add("org/a", model(tmp_path / "a", 1))
        server.add("org/b", model(tmp_path / "b", 2, shards=True))
        yield server


def recipe(method: str, *names: str, **keys):
    parameters = {"weight": 0.3, "density": 0.5} if method in ("ties", "dare_ties") else {"weight": 0.3}
    models = [{"model": name, "parameters": parameters} for name in names]
    base = {"base_model": names[0]} if method in ("ties", "dare_ties", "slerp") else {}
    if method == "slerp":
        models, keys = [{"model": name} for name in names], keys | {"parameters": {"t": 0.3}}
    return {"merge_method": method, "models": models, **base, **keys}


def weights(folder: str) -> dict[str, bytes]:
    """The data of the files of weights, without headers, which name the models."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        raw = path.read_bytes()
        found[path.name] = raw[8 + int.from_bytes(raw[:8], "little") :]
    return found


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "slerp"])
@pytest.mark.parametrize("threads", [1, 3])
def test_same_bytes_as_from_the_disk(hub, tmp_path, method, threads):
    """Also of methods that read twice; and no weights are stored."""
    fastinterp.merge(recipe(method, "a", "b"), "local", threads=threads)
    report = fastinterp.merge(recipe(method, "org/a", "org/b"), "out", stream=True, threads=threads)
    assert weights("out") == weights("local") and weights("out")
    assert report.bytes_read
    assert max(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file()) < 1000


def test_interpolate_and_average(hub, tmp_path):
    fastinterp.interpolate("a", "b", [0.25, 1.5], "local")
    fastinterp.interpolate("org/a", "org/b", [0.25, 1.5], "out", stream=True)
    for point in ("alpha_0.25", "alpha_1.5"):
        assert weights(f"out/{point}") == weights(f"local/{point}") and weights(f"out/{point}")


def test_a_model_here_and_one_elsewhere(hub):
    fastinterp.merge(recipe("linear", "a", "b"), "local")
    fastinterp.merge(recipe("linear", "a", "org/b"), "out", stream=True)
    assert weights("out") == weights("local")


def test_dropped_connections_and_refusals_are_tried_again(hub):
    """Of every range, the first answer is 503, and the second ends after 70 kB."""
    seen: dict[tuple, int] = {}
    lock = threading.Lock()

    def fail(method, path, span):
        with lock:
            seen[path, span] = count = seen.get((path, span), 0) + 1
        if span is None or span[1] - span[0] < 1000:
            return None
        return {1: 503, 2: 70_000}.get(count)

    hub.fail = fail
    fastinterp.merge(recipe("linear", "a", "b"), "local")
    fastinterp.merge(recipe("linear", "org/a", "org/b"), "out", stream=True)
    assert weights("out") == weights("local")
    assert max(seen.values()) >= 3


def test_a_server_that_stays_away(hub, monkeypatch):
    """An error with the name of the file; the output is not there."""
    monkeypatch.setattr("fastinterp.checkpoint.http_ranges._TRIES", 2)
    hub.fail = lambda method, path, span: 503 if span and span[1] - span[0] > 100_000 else None
    with pytest.raises(StorageError, match=r"org/[ab]/model.*: the server answers 503 .*, 2 times in a row"):
        fastinterp.merge(recipe("linear", "org/a", "org/b"), "out", stream=True)
    assert not os.path.exists("out")


def test_memory_is_bounded(hub, monkeypatch):
    """No more than half of max_memory is held of what was fetched, or 8 cells."""
    most = []
    real = RangeCache

    def counted(sizes, cell_bytes, limit):
        most.append((cell_bytes, limit))
        return real(sizes, cell_bytes, limit)

    monkeypatch.setattr("fastinterp.execute.streams.RangeCache", counted)
    fastinterp.merge(recipe("linear", "a", "b"), "local")
    fastinterp.merge(recipe("linear", "org/a", "org/b"), "out", stream=True, max_memory="4MB", threads=2)
    assert weights("out") == weights("local")
    assert most == [(256 << 10, 2_000_000)]


def test_devices_do_not_stream(hub):
    with pytest.raises(UsageError, match="cannot go with --device cuda"):
        fastinterp.merge(recipe("linear", "org/a", "org/b"), "out", stream=True, device="cuda")


def test_dtypes_and_rows(hub, tmp_path):
    """Inputs of two dtypes."""
    hub.add("org/c", model(tmp_path / "c", 3, BF16))
    fastinterp.merge(recipe("linear", "a", "c", dtype="bfloat16"), "local")
    fastinterp.merge(recipe("linear", "org/a", "org/c", dtype="bfloat16"), "out", stream=True)
    assert weights("out") == weights("local")


def test_reports_of_quantised_models(hub, tmp_path):
    """The difference in steps of the quantisation is told as of files on the disk."""
    form = FORMS["tensor"]
    paths = saved(tmp_path / "fp8", form, family(form, 2))
    for name, path in zip(("org/q", "org/r"), paths, strict=True):
        hub.add(name, Path(path))
    local = fastinterp.merge(recipe("linear", *paths), "local")
    report = fastinterp.merge(recipe("linear", "org/q", "org/r"), "out", stream=True)
    assert weights("out") == weights("local")
    (found,), (expected,) = report.quantised.values(), local.quantised.values()
    assert found == {**expected, "against": "org/q"}


def test_reports_of_negative_importances(hub):
    """The side-car is sampled where it is: a model of numbers from -1 to 1 is none."""
    models = [{"model": name, "parameters": {"fisher": name}} for name in ("org/a", "org/b")]
    report = fastinterp.merge({"merge_method": "fisher", "models": models}, "out", stream=True)
    assert any("the side-car org/a holds numbers below 0" in warning for warning in report.warnings)


def test_integers_that_differ(hub, tmp_path):
    for name, last in (("i", 1), ("j", 2)):
        write(tmp_path / name, {"w": tensor([1.0], F32), "n": integers([0, last], "I64")})
        (tmp_path / name / "config.json").write_text("{}")
        hub.add(f"org/{name}", tmp_path / name)
    with pytest.raises(ShapeError, match="differs between org/i and org/j"):
        fastinterp.merge(recipe("linear", "org/i", "org/j"), "out", stream=True)


# --- the cells -------------------------------------------------------------------------------------------------------


def test_cells_hold_what_is_wanted_within_their_limit():
    """A cell is given to one thread, once; after `stop` there are none."""
    cache = RangeCache([10_000, 5_000], 4096, 0)
    assert cache.take(0.0) is None
    cache.stop()
    assert cache.take(1.0) is None and cache.stopped and cache.fetched == 0
    with pytest.raises(ValueError, match="at least 4096 bytes"):
        RangeCache([1], 1, 1)


def test_a_file_that_changes_on_the_server(hub):
    """Its ETag or its size tells."""
    files = hub.repos["org/a"].files
    for other, size in ((b"[]", 2), (b"{ }", 2)):
        files["config.json"] = b"{}"
        file = HttpFile(f"{hub.url}/org/a/resolve/main/config.json", "the file")
        assert file.size == size
        data = bytearray(2)
        file.read_into(memoryview(data), 0)
        assert data == b"{}"
        files["config.json"] = other
        with pytest.raises(CheckpointError, match="the file: it changed while it was being read"):
            file.read_into(memoryview(data), 0)
