"""Devices and files that fail, and merges that are interrupted: all of the output is right, or nothing is there."""

from __future__ import annotations

import _thread
import os
import signal
import threading
from typing import Any

import pytest

import fastinterp
from fastinterp.errors import BackendError, CheckpointError, OutOfMemory, OutputError
from fastinterp.execute.device import executor as machine
from fastinterp.execute.device import worker
from tests.support.checkpoints import recipe, write
from tests.support.devices import fake_device
from tests.support.devices.device_merges import KB, METHODS, SLOT, models, small
from tests.support.devices.fake_device import FakeDevice, Fault, running
from tests.support.processes import interruptible
from tests.support.written import tree

pytest_plugins = ("tests.support.devices.device_fixtures",)

CALLS = ["upload", "run", "download"]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "in the queue"])
@pytest.mark.parametrize("call", CALLS)
def test_a_device_that_dies_hands_its_work_to_the_other(tmp_path, ends, use, call, late):
    found = use(FakeDevice(0, jitter=0.001), FakeDevice(1, jitter=0.001, faults=[Fault(call, 3, late=late)]))
    asked = METHODS["ties"](ends)
    fastinterp.merge(asked, tmp_path / "cpu", device="cpu")
    report = fastinterp.merge(asked, tmp_path / "gpu", device="cuda:0,1")
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")
    (told,) = [w for w in report.warnings if "a device failed" in w]
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
    assert not [w for w in report.warnings if "a device failed" in w]
    assert device.most["memory"] <= device.room and device.pieces


def test_memory_that_runs_out_later_is_met_with_smaller_batches(tmp_path, ends, use):
    """Once while kernels run: what was under way is done again, in halves."""
    use(FakeDevice(jitter=0.001, faults=[Fault("run", 5, OutOfMemory, lasts=False)]))
    asked = METHODS["slerp"](ends)
    fastinterp.merge(asked, tmp_path / "cpu", device="cpu")
    report = fastinterp.merge(asked, tmp_path / "gpu", device="cuda")
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")
    assert not [w for w in report.warnings if "a device failed" in w]


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
    with interruptible(), pytest.raises(KeyboardInterrupt):
        fastinterp.merge(METHODS["linear"](ends), tmp_path / "out", device="cuda:0,1")
    assert not (tmp_path / "out").exists()
    assert all(d.held == {"host": 0, "memory": 0} for d in found)


def test_a_device_that_hangs_is_left_at_the_second_interrupt(tmp_path, ends, use, monkeypatch):
    """The first waits for what the device has in hand; where that never ends, the next one gives it up."""
    (found,) = use(FakeDevice())
    goes_on, threads = threading.Event(), running()
    interrupts: list[threading.Timer] = []
    compute = fake_device.computed

    def hanging(piece: Any) -> Any:
        if not interrupts:
            for _ in range(2):
                at = 0.3 + 0.7 * len(interrupts)
                interrupts.append(threading.Timer(at, os.kill, (os.getpid(), signal.SIGINT)))
                interrupts[-1].start()
        assert goes_on.wait(60)
        return compute(piece)

    monkeypatch.setattr(fake_device, "computed", hanging)
    monkeypatch.setattr(machine, "_HANGS_S", 0.3)
    with interruptible(), pytest.raises(KeyboardInterrupt):
        fastinterp.merge(METHODS["linear"](ends), tmp_path / "out", device="cuda:0")
    assert len(interrupts) == 2 and not any(timer.is_alive() for timer in interrupts)
    left = running() - threads
    assert left and all(thread.daemon for thread in left)  # the program can end
    assert found.held["memory"]  # which the device may write into
    assert not [*tmp_path.glob("out/*.safetensors")]
    goes_on.set()
    for thread in left:
        thread.join(60)


def test_memory_is_freed_after_copies_that_an_exception_left(tmp_path, ends, use, monkeypatch):
    """An exception between a copy and its kernels: nothing is under way any more when the merge ends."""
    (found,) = use(FakeDevice(bytes_per_s=20e6))
    queues: list[Any] = []
    uploaded = fake_device.Queue.upload

    def uploading(self: Any, *arguments: Any) -> None:
        queues.append(self)
        uploaded(self, *arguments)

    monkeypatch.setattr(fake_device.Queue, "upload", uploading)
    monkeypatch.setattr(fake_device.Queue, "run", lambda self, pieces: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastinterp.merge(METHODS["linear"](ends), tmp_path / "out", device="cuda")
    assert queues and all(queue._work.empty() for queue in queues)
    assert found.held == {"host": 0, "memory": 0}


def test_a_mistake_in_a_kernel_does_not_look_like_an_end(tmp_path, ends, use, monkeypatch):
    """An exception that nobody foresaw ends the merge."""
    use(FakeDevice())
    monkeypatch.setattr(fake_device, "computed", lambda piece: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastinterp.merge(METHODS["linear"](ends), tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()
