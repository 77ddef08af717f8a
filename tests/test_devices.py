"""Merges on accelerators that are a fake: the processor's bytes, each written once, whatever goes wrong."""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastinterp
from fastinterp.compute import backends
from fastinterp.compute.dtypes import BF16, F32
from fastinterp.engine import devices as machine
from fastinterp.engine import worker
from fastinterp.errors import BackendError, CheckpointError, OutOfMemory, OutputError, UsageError
from tests import fake_device
from tests.checkpoints import Tensor, family, moved, read, recipe, saved, weights, write
from tests.fake_device import FakeDevice, Fault
from tests.written import tree

KB = 1 << 10
SLOT = 256 * KB  # of the tests: the largest tensors take many batches
Use = Callable[..., list[FakeDevice]]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Makes devices those of `--device cuda:...`; slots are small, and every round is cut into many batches."""
    monkeypatch.setattr(machine, "SLOT_BYTES", SLOT)
    monkeypatch.setattr(machine, "_LEAST_BATCH", 1)

    def used(*found: FakeDevice) -> list[FakeDevice]:
        backend = backends._Backend(None, len(found), lambda i: found[i])
        monkeypatch.setattr(backends, "_backend", lambda name: backend)
        return [*found]

    return used


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = {t for t in threading.enumerate() if not t.daemon}
    yield
    assert {t for t in threading.enumerate() if not t.daemon} <= before


def models(count: int) -> list[dict[str, Tensor]]:
    """Tiny tensors, of which a batch has many, and large ones of odd sizes, which have many batches."""
    left_out = [n for n, t in family(1)[0].items() if n.startswith("patterns") or t.raw.size * 8 == t.dtype.bits]
    every = [{n: t for n, t in m.items() if n not in left_out} for m in family(count)]
    for i, model in enumerate(every):
        for seed, (dtype, shape) in enumerate([(BF16, (321, 1001)), (F32, (260, 515)), (BF16, (200_003,))]):
            first = weights(70 + seed, dtype, shape)
            model[f"large.{seed}"] = moved(first, 1000 * i + seed, 1e-3, dtype)
        for seed in range(40):
            model[f"tiny.{seed}"] = moved(weights(seed, BF16, (2 + seed % 5,)), 100 * i + seed, 1e-3, BF16)
    return every


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> list[str]:
    return saved(tmp_path_factory.mktemp("ends"), models(3))


def names(count: int) -> str:
    return "cuda:" + ",".join(map(str, range(count)))


METHODS: dict[str, Any] = {
    "linear": lambda p: recipe("linear", p, weights=[0.5, 0.3, 0.2]),
    "linear in float32": lambda p: recipe("linear", p, weights=[0.5, 0.3, 0.2], out_dtype="float32"),
    "stochastic": lambda p: recipe("linear", p, weights=[0.5, 0.3, 0.2], rounding="stochastic", seed=5),
    "task_arithmetic": lambda p: recipe("task_arithmetic", p[1:], weights=[0.4, 0.7], base_model=p[0]),
    "slerp": lambda p: recipe("slerp", p[1:2], base_model=p[0], parameters={"t": 0.3}),
    "ties": lambda p: recipe("ties", p[1:], weights=[0.5, 0.5], base_model=p[0], parameters={"density": 0.4}),
    "dare_linear": lambda p: recipe(
        "dare_linear", p[1:], weights=[0.5, 0.5], base_model=p[0], parameters={"density": 0.4, "rescale": True}
    ),
    "della": lambda p: recipe(
        "della", p[1:], weights=[0.5, 0.5], base_model=p[0], parameters={"density": 0.5, "epsilon": 0.2}
    ),
    "model_stock": lambda p: recipe("model_stock", p[1:], base_model=p[0]),
    "filter_wise": lambda p: recipe("model_stock", p[1:], base_model=p[0], parameters={"filter_wise": True}),
    "arcee_fusion": lambda p: recipe("arcee_fusion", p[1:2], base_model=p[0]),
}


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
    assert ("random keeps by rank" in got.on_cpu) == (name == "della")


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


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], int]:
    """How often each byte of a file was written by the threads of a device: (file, first byte) -> times, per write."""
    found: dict[tuple[str, int], int] = {}
    pwrite, lock = os.pwrite, threading.Lock()

    def noted(fd: int, data: Any, offset: int) -> int:
        done = pwrite(fd, data, offset)
        if threading.current_thread() is not threading.main_thread():
            path = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
            with lock:
                for at in range(offset, offset + done):
                    found[path, at] = found.get((path, at), 0) + 1
        return done

    monkeypatch.setattr(os, "pwrite", noted)
    return found


def small(tmp_path: Path) -> list[str]:
    """Two models of which every byte can be counted."""
    every = [{f"{n}": t for n, t in m.items() if not n.startswith("large")} for m in models(2)]
    for i, model in enumerate(every):
        model["large"] = moved(weights(1, BF16, (40_001,)), i, 1e-3, BF16)
    return saved(tmp_path, every)


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


def test_devices_share_by_speed(tmp_path, use, monkeypatch):
    """The one that is four times as fast does most of the work; nobody waits for the other but at the end."""
    monkeypatch.setattr(machine, "SLOTS", 3)
    values = {"w": weights(1, BF16, (3_000_000,))}
    paths = [str(write(tmp_path / n, {"w": moved(values["w"], i, 1e-3, BF16)})) for i, n in enumerate("ab")]
    slow, fast, *rest = use(*(FakeDevice(i, bytes_per_s=s * 20e6) for i, s in enumerate((1, 4, 2, 2))))
    fastinterp.merge(recipe("linear", paths, weights=[0.5, 0.5]), tmp_path / "out", device="cuda:0,1")
    assert fast.pieces > 2 * slow.pieces > 0
    for d in (slow, fast):
        d.pieces = 0
    fastinterp.merge(recipe("linear", paths, weights=[0.5, 0.5]), tmp_path / "four", device="cuda:0,1,2,3")
    assert fast.pieces > slow.pieces > 0 and all(slow.pieces <= d.pieces <= fast.pieces for d in rest)
    assert tree(tmp_path / "out") == tree(tmp_path / "four")


# --- failures --------------------------------------------------------------------------------------------------------

CALLS = ["upload", "run", "download"]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "in the queue"])
@pytest.mark.parametrize("call", CALLS)
def test_a_device_that_dies_hands_its_work_to_the_other(tmp_path, ends, use, call, late):
    found = use(FakeDevice(0, jitter=0.001), FakeDevice(1, jitter=0.001, faults=[Fault(call, 3, late=late)]))
    asked = METHODS["ties"](ends)
    fastinterp.merge(asked, tmp_path / "cpu", device="cpu")
    report = fastinterp.merge(asked, tmp_path / "gpu", device="cuda:0,1")
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")
    (told,) = [w for w in report.warnings if "given up" in w]
    assert f"cuda:1 Fake: {call} 3 of cuda:1 failed on purpose" in told
    assert all(d.held == {"host": 0, "memory": 0} for d in found)
    assert found[1].calls[call] < 20 < found[0].calls[call]


@pytest.mark.parametrize("call", [*CALLS, "memory", "host"])
def test_when_all_devices_die_nothing_is_written(tmp_path, ends, use, call):
    found = use(*(FakeDevice(i, faults=[Fault(call, 2 + i)]) for i in range(2)))
    with pytest.raises(
        BackendError, match=r"no device is left to merge on: cuda:\d Fake: .* failed on purpose"
    ) as told:
        fastinterp.merge(METHODS["linear"](ends), tmp_path / "out", device="cuda:0,1")
    assert "--device cpu" in str(told.value) and str(told.value).count("failed on purpose") == 2
    assert not (tmp_path / "out").exists()
    assert all(d.held == {"host": 0, "memory": 0} for d in found)


def test_a_device_with_little_memory_takes_smaller_slots(tmp_path, ends, use, monkeypatch):
    """Room for two slots of half the size: the device does all of the work."""
    monkeypatch.setattr(machine, "SLOT_BYTES", 2 * SLOT)
    (device,) = use(FakeDevice(room=2 * SLOT + 4096))
    asked = METHODS["ties"](ends)
    fastinterp.merge(asked, tmp_path / "cpu", device="cpu")
    report = fastinterp.merge(asked, tmp_path / "gpu", device="cuda")
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")
    assert not [w for w in report.warnings if "given up" in w]
    assert device.most["memory"] <= device.room and device.pieces


def test_memory_that_runs_out_later_is_met_with_smaller_batches(tmp_path, ends, use):
    """Once while kernels run: what was under way is done again, in halves."""
    use(FakeDevice(jitter=0.001, faults=[Fault("run", 5, OutOfMemory, lasts=False)]))
    asked = METHODS["slerp"](ends)
    fastinterp.merge(asked, tmp_path / "cpu", device="cpu")
    report = fastinterp.merge(asked, tmp_path / "gpu", device="cuda")
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")
    assert not [w for w in report.warnings if "given up" in w]


def test_no_memory_at_all_is_an_error(tmp_path, ends, use):
    use(FakeDevice(room=1000))
    with pytest.raises(BackendError, match=r"out of memory, .* bytes, with a slot of"):
        fastinterp.merge(METHODS["linear"](ends), tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()


def test_work_that_failed_is_done_whole_again(tmp_path, use, written, monkeypatch):
    """Of a device whose events fail: nothing of its batches counts as done, and the other writes all of it."""
    monkeypatch.setattr(machine, "SLOT_BYTES", 64 * KB)
    bad, _ = use(FakeDevice(0, faults=[Fault("download", 1, late=True)]), FakeDevice(1, jitter=0.002))
    asked = recipe("linear", small(tmp_path), weights=[0.5, 0.5])
    fastinterp.merge(asked, tmp_path / "cpu", device="cpu")
    fastinterp.merge(asked, tmp_path / "gpu", device="cuda:0,1")
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")
    assert bad.calls["upload"] and set(written.values()) == {1}


def test_a_file_that_was_cut_is_named(tmp_path, use, monkeypatch):
    """The pump's error, whoever reads."""
    use(FakeDevice(0), FakeDevice(1))
    every = models(2)
    paths = [str(write(tmp_path / n, m)) for n, m in zip("ab", every, strict=True)]
    launched = worker._Session._launch

    def cutting(session: Any, slot: Any, batch: Any) -> None:
        os.truncate(tmp_path / "b" / "model.safetensors", 500_000)
        launched(session, slot, batch)

    monkeypatch.setattr(worker._Session, "_launch", cutting)
    with pytest.raises(CheckpointError, match=r"b/model.safetensors: only \d+ of \d+ bytes are left at byte"):
        fastinterp.merge(recipe("linear", paths, weights=[0.5, 0.5]), tmp_path / "out", device="cuda:0,1")
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_is_named(tmp_path, ends, use, monkeypatch):
    use(FakeDevice(0), FakeDevice(1))

    def full(fd: int, data: Any, offset: int) -> int:
        if threading.current_thread() is threading.main_thread():
            return pwrite(fd, data, offset)
        raise OSError(28, "No space left on device")

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"model.*safetensors: No space left on device, writing .* Free some space"):
        fastinterp.merge(METHODS["linear"](ends), tmp_path / "out", device="cuda:0,1")
    assert not (tmp_path / "out").exists()


def test_interrupted(tmp_path, ends, use, monkeypatch):
    """Ctrl-C while devices work: no thread is left, no memory is held, and nothing is written."""
    found = use(*(FakeDevice(i, bytes_per_s=20e6) for i in range(2)))
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastinterp.merge(METHODS["linear"](ends), tmp_path / "out", device="cuda:0,1", progress=progress)
    assert calls and not (tmp_path / "out").exists()
    assert all(d.held == {"host": 0, "memory": 0} for d in found)


def test_a_signal_ends_all_threads(tmp_path, ends, use, monkeypatch):
    """SIGINT comes while the main thread waits for devices."""
    found = use(*(FakeDevice(i, bytes_per_s=20e6) for i in range(2)))
    compute, once = fake_device.computed, [True]

    def interrupting(piece: Any) -> Any:
        if once:
            once.clear()
            _thread.interrupt_main()
        return compute(piece)

    monkeypatch.setattr(fake_device, "computed", interrupting)
    with pytest.raises(KeyboardInterrupt):
        fastinterp.merge(METHODS["linear"](ends), tmp_path / "out", device="cuda:0,1")
    assert not (tmp_path / "out").exists()
    assert all(d.held == {"host": 0, "memory": 0} for d in found)


def test_a_mistake_in_a_kernel_does_not_look_like_an_end(tmp_path, ends, use, monkeypatch):
    """An exception that nobody foresaw ends the merge."""
    use(FakeDevice())
    monkeypatch.setattr(fake_device, "computed", lambda piece: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastinterp.merge(METHODS["linear"](ends), tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()


# --- what is told ----------------------------------------------------------------------------------------------------


def test_progress_only_grows(tmp_path, ends, use):
    use(FakeDevice(bytes_per_s=30e6))
    seen: list[tuple[int, int]] = []
    report = fastinterp.merge(
        METHODS["ties"](ends), tmp_path / "out", device="cuda", progress=lambda *now: seen.append(now)
    )
    assert seen == sorted(seen) and seen[-1] == (report.bytes_read + report.bytes_written,) * 2


def test_the_report_says_what_ran_where(tmp_path, ends, use):
    use(FakeDevice(0, refuses=lambda s: "sums of nothing" if s["numel"] == 200_003 else None), FakeDevice(1))
    report = fastinterp.merge(METHODS["linear"](ends), tmp_path / "out", device="cuda:0,1")
    isa = backends.cpu_isa()
    assert report.device == f"cuda:0 Fake (fake), cuda:1 Fake (fake), cpu {isa} for 5 tensors"
    assert report.on_cpu == {"not averaged": 3, "empty": 1, "sums of nothing": 1}
    told = str(report)
    assert "on the cpu: 3 tensors, not averaged; 1 tensor, empty; 1 tensor, sums of nothing" in told
    assert report.as_dict()["on_cpu"]["sums of nothing"] == 1
