"""Merges on accelerators that are a fake: the processor's bytes, each written once, and what is told of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

import fastinterp
from fastinterp.backends import registry as backends
from fastinterp.errors import UsageError
from fastinterp.execute.device import executor as machine
from fastinterp.ops.dtypes import BF16
from tests.support import tokens
from tests.support.checkpoints import moved, read, recipe, saved, weights, write
from tests.support.devices.device_merges import KB, METHODS, models, names, small
from tests.support.devices.fake_device import FakeDevice
from tests.support.written import tree

pytest_plugins = ("tests.support.devices.device_fixtures",)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_device_gives_the_processors_bytes(tmp_path, ends, use, name, count):
    """Of every kind of step; several shards in and out, tensors at odd offsets."""
    found = use(*(FakeDevice(i, jitter=0.001) for i in range(count)))
    asked = METHODS[name](ends)
    want = fastinterp.merge(asked, tmp_path / "cpu", device="cpu", max_shard_size=900_000)
    got = fastinterp.merge(asked, tmp_path / "gpu", device=names(count), max_shard_size=900_000)
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")
    assert (got.bytes_read, got.bytes_written) == (want.bytes_read, want.bytes_written)
    assert (sum(d.pieces for d in found) > 0) == (name != "della") and all(
        d.held == {"host": 0, "memory": 0} for d in found
    )
    assert got.device.startswith("cuda:0 Fake (fake)") and "not averaged" in got.on_cpu
    assert ("random masks by rank" in got.on_cpu) == (name == "della")


def test_a_sweep_writes_many_outputs_of_one_read(tmp_path, ends, use):
    use(FakeDevice(jitter=0.001))
    alphas = [-0.5, 0, 0.25, 0.5, 1, 1.5]
    want = fastinterp.interpolate(ends[0], ends[1], alphas, tmp_path / "cpu", device="cpu")
    got = fastinterp.interpolate(ends[0], ends[1], alphas, tmp_path / "gpu", device="cuda:0")
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")
    for a, b in zip(want, got, strict=True):
        assert a.bytes_read == b.bytes_read and set(a.copied) == set(b.copied)
        for name, effect in a.tensors.items():  # counts agree; sums were added in another order
            found = b.tensors[name]
            assert (found.numel, found.sampled, found.changed) == (effect.numel, effect.sampled, effect.changed), name
            assert found.sum_dd == pytest.approx(effect.sum_dd, rel=1e-12)


def test_from_memory_to_memory(tmp_path, ends, use):
    """A sweep for a callback: the outputs are memory."""
    found = use(FakeDevice(jitter=0.001))
    sweep: Any = fastinterp.sweep

    def bytes_of(point: Any, tensors: dict[str, Any]) -> dict[str, bytes]:
        return {name: x.tobytes() for name, x in tensors.items()}

    want = sweep(*ends[:2], [0.3, 1.5], in_memory=bytes_of, framework="numpy", device="cpu")
    got = sweep(*ends[:2], [0.3, 1.5], in_memory=bytes_of, framework="numpy", device="cuda")
    assert [p.result for p in got] == [p.result for p in want] and found[0].pieces


def test_documents_that_build_on_others(tmp_path, use):
    """Tensors of documents above go through a temporary file, which is written and read like all others."""
    use(FakeDevice(jitter=0.001))
    paths = saved(tmp_path, models(3))
    chain = [
        {**recipe("slerp", paths[1:2], base_model=paths[0], parameters={"t": 0.4}), "name": "mixed"},
        recipe("linear", ["mixed", paths[2]], weights=[0.5, 0.5]),
    ]
    want = fastinterp.merge(chain, tmp_path / "cpu", device="cpu")
    got = fastinterp.merge(chain, tmp_path / "gpu", device="cuda")
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")
    assert (got.bytes_read, got.bytes_written) == (want.bytes_read, want.bytes_written)


# --- what is written, and what is held -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_byte_is_written_once(tmp_path, use, written, monkeypatch, count):
    monkeypatch.setattr(machine, "SLOT_BYTES", 64 * KB)
    use(*(FakeDevice(i, jitter=0.002) for i in range(count)))
    asked = recipe("linear", small(tmp_path), weights=[0.5, 0.5])
    report = fastinterp.merge(asked, tmp_path / "out", device=names(count))
    assert report.on_cpu.keys() == {"not averaged", "empty"}
    assert set(written.values()) == {1}
    done = read(tmp_path / "out")
    assert len(written) == sum(t.raw.size for t in done.values() if t.dtype.merges)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_window_is_never_exceeded(tmp_path, ends, use, count):
    """Host memory of all devices together is within half of --max-memory, and all of it is given back."""
    found = use(*(FakeDevice(i, jitter=0.001) for i in range(count)))
    for max_memory in (4 << 20, 2 << 20):
        asked = recipe("slerp", ends[1:2], base_model=ends[0], parameters={"t": 0.3})
        report = fastinterp.merge(asked, tmp_path / f"{max_memory}", device=names(count), max_memory=max_memory)
        assert 0 < sum(d.most["host"] for d in found) <= max_memory // 2
        assert report.bytes_written
        for d in found:
            d.most["host"] = 0
            assert d.held == {"host": 0, "memory": 0}


def test_too_little_memory_is_said(tmp_path, ends, use):
    use(FakeDevice(0), FakeDevice(1))
    with pytest.raises(UsageError, match="merging on accelerators takes at least 524288"):
        fastinterp.merge(METHODS["linear"](ends), tmp_path / "out", device="cuda:0,1", max_memory=400_000)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_devices_share_by_speed(tmp_path, use, monkeypatch):
    """The one that is four times as fast does most of the work; nobody waits for the other but at the end."""
    monkeypatch.setattr(machine, "SLOTS", 3)
    values = {"w": weights(1, BF16, (3_000_000,))}
    paths = [str(write(tmp_path / n, {"w": moved(values["w"], i, 1e-3, BF16)})) for i, n in enumerate("ab")]
    slow, fast, *rest = use(*(FakeDevice(i, bytes_per_s=s * 8e6) for i, s in enumerate((1, 4, 2, 2))))
    fastinterp.merge(recipe("linear", paths, weights=[0.5, 0.5]), tmp_path / "out", device="cuda:0,1")
    assert fast.pieces > 2 * slow.pieces > 0
    for d in (slow, fast):
        d.pieces = 0
    fastinterp.merge(recipe("linear", paths, weights=[0.5, 0.5]), tmp_path / "four", device="cuda:0,1,2,3")
    assert fast.pieces > slow.pieces > 0 and all(slow.pieces <= d.pieces <= fast.pieces for d in rest)
    assert tree(tmp_path / "out") == tree(tmp_path / "four")


def test_rows_that_are_moved_are_the_processors(tmp_path, use):
    """Vocabularies that are united: rows of embeddings are gathered, all else is summed on the device."""
    (device,) = use(FakeDevice(jitter=0.001))
    paths = []
    for i, (name, found) in enumerate({"a": ["<unk>", "cat", "dog"], "b": ["<unk>", "own", "cat", "pair"]}.items()):
        folder = tokens.words(tmp_path / name, found)
        shapes = {"model.embed_tokens.weight": (len(found), 16), "model.layers.0.w": (70, 30)}
        write(folder, {n: weights(10 * i + k, BF16, shape) for k, (n, shape) in enumerate(shapes.items())})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(found)}))
        paths.append(str(folder))
    asked = recipe("linear", paths, weights=[0.5, 0.5], tokenizer_source="union")
    fastinterp.merge(asked, tmp_path / "cpu", device="cpu")
    report = fastinterp.merge(asked, tmp_path / "gpu", device="cuda")
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")
    assert report.on_cpu == {"rows that are moved": 1} and device.pieces


# --- what is told ----------------------------------------------------------------------------------------------------


def test_progress_only_grows(tmp_path, ends, use):
    use(FakeDevice(bytes_per_s=30e6))
    seen: list[tuple[int, int]] = []
    report = fastinterp.merge(
        METHODS["ties"](ends), tmp_path / "out", device="cuda", progress=lambda *now: seen.append(now)
    )
    assert seen == sorted(seen) and seen[-1] == (report.bytes_read + report.bytes_written,) * 2


def test_the_report_says_what_ran_where(tmp_path, ends, use):
    use(FakeDevice(0, refuses=lambda s: "sums of nothing" if s.numel == 200_003 else None), FakeDevice(1))
    report = fastinterp.merge(METHODS["linear"](ends), tmp_path / "out", device="cuda:0,1")
    isa = backends.cpu_isa()
    assert report.device == f"cuda:0 Fake (fake), cuda:1 Fake (fake), cpu {isa} for 5 tensors"
    assert report.on_cpu == {"not averaged": 3, "empty": 1, "sums of nothing": 1}
    told = str(report)
    assert "on the cpu: 3 tensors, not averaged; 1 tensor, empty; 1 tensor, sums of nothing" in told
    assert report.as_dict()["on_cpu"]["sums of nothing"] == 1
