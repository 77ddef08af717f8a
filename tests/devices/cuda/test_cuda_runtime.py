"""Devices, memory, queues and events of CUDA, on an emulated runtime; and that the emulation notices mistakes."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

import fastinterp
from fastinterp.backends import cuda
from fastinterp.backends.device import Device, Piece
from fastinterp.errors import BackendError, OutOfMemory
from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import F32
from fastinterp.ops.operands import Decoder, Stored
from fastinterp.ops.steps import Divergence, Measure
from tests.support.devices import cuda_host
from tests.support.devices.cuda_combine import piece_of
from tests.support.devices.cuda_host import Fake
from tests.support.pumps import code, stored

if why := cuda_host.missing():
    pytest.skip(why, allow_module_level=True)

MODES = pytest.mark.parametrize("mode", [Fake.EAGER, Fake.DEFERRED, Fake.THREADS], ids=["eager", "deferred", "threads"])


@pytest.fixture
def fake(monkeypatch):
    """The emulation in the place of fastinterp._cuda."""
    monkeypatch.setitem(sys.modules, "fastinterp._cuda", cuda_host.module())
    monkeypatch.setattr(fastinterp, "_cuda", cuda_host.module(), raising=False)
    cuda_host.fake().reset()
    yield cuda_host.fake()
    cuda_host.fake().reset()


def test_a_device_says_what_it_is(fake):
    fake.reset(devices=3, limit_bytes=1000)
    assert cuda.device_count() == 3
    device: Device = cuda.device(2)
    assert (device.name, device.backend, device.label) == ("cuda:2", "cuda", "Emulated device 2")
    assert device.free_bytes() == 1000
    held = device.memory(300)
    assert (device.free_bytes(), cuda.device(1).free_bytes(), held.nbytes) == (700, 1000, 300)
    held.free()
    held.free()
    assert device.free_bytes() == 1000


def test_memory_is_freed_when_nobody_holds_it(fake):
    device = cuda.device(0)
    blocks = fake.host_blocks()
    held, view = device.memory(100), np.frombuffer(device.host(50).view, np.uint8)
    assert (fake.used(), fake.host_blocks()) == (100, blocks + 1)
    view[:] = 7  # the view holds its memory
    del held, view
    assert (fake.used(), fake.host_blocks()) == (0, blocks)


@MODES
def test_bytes_go_there_and_back(fake, mode):
    fake.reset(mode, delay_us=200)
    device = cuda.device(0)
    queue, held, host = device.queue(), device.memory(5000), device.host(5000)
    raw = np.frombuffer(host.view, np.uint8)
    raw[:] = np.arange(5000) % 251
    queue.upload(held.address, host.address, 5000)
    event = queue.record()
    assert mode == Fake.THREADS or event.done() == (mode == Fake.EAGER)
    event.wait()
    assert event.done()
    raw[:] = 0
    queue.download(host.address, held.address, 5000)
    assert mode == Fake.THREADS or (raw.sum() == 0) == (
        mode == Fake.DEFERRED
    )  # who does not wait sees what was there before
    queue.record().wait()
    assert np.array_equal(raw, np.arange(5000) % 251)


@MODES
def test_a_queue_waits_for_an_event_of_another(fake, mode):
    fake.reset(mode, delay_us=100)
    device = cuda.device(0)
    up, down = device.queue(), device.queue()
    held, host = device.memory(8), device.host(16)
    raw = np.frombuffer(host.view, np.uint8)
    for turn in range(5):
        raw[:] = turn
        up.upload(held.address, host.address, 8)
        down.after(up.record())
        down.download(host.address + 8, held.address, 8)
        done = down.record()
        while not done.done():
            pass
        assert raw.tolist() == [turn] * 16


def test_a_missing_wait_shows(fake):
    """Of queues that do not wait for each other, the later one may come first."""
    fake.reset(Fake.DEFERRED)
    device = cuda.device(0)
    up, down = device.queue(), device.queue()
    held, host = device.memory(8), device.host(16)
    raw = np.frombuffer(host.view, np.uint8)
    raw[:] = 1
    up.upload(held.address, host.address, 8)
    down.download(host.address + 8, held.address, 8)
    down.record().wait()
    assert raw[8:].tolist() == [0xA5] * 8


def test_who_asks_whether_something_is_done_has_made_no_error(fake):
    """CUDA notes that something is not done yet where launches look for their errors."""
    fake.reset(Fake.DEFERRED)
    device = cuda.device(0)
    queue, held = device.queue(), device.memory(64)
    piece = piece_of([held.address], [F32], [Row(0, 2.0)], [held.address + 32], code(F32), 8)
    queue.run([piece])
    assert not queue.record().done()
    queue.run([piece])
    queue.record().wait()


def test_other_devices_get_no_context(fake):
    """Of eight processes with a device each, seven would take memory of the first one's."""
    fake.reset(devices=3)
    device = cuda.device(1)
    held, host, queues, events = device.memory(64), device.host(64), [device.queue()], []

    def work() -> None:
        queues[0].upload(held.address, host.address, 64)
        events.append(queues[0].record())
        events[-1].wait()
        assert events[-1].done()

    work()
    beside = threading.Thread(target=work)
    beside.start()
    beside.join()
    assert device.free_bytes() > 0
    held.free()
    host.free()
    events.clear()
    queues.clear()
    assert [fake.has_context(i) for i in range(3)] == [False, True, False]


def test_memory_of_launches_is_kept_between_waits(fake):
    device = cuda.device(0)
    queue, held = device.queue(), device.memory(64)
    piece = Piece(step=Measure(inputs=stored([F32]), numel=8), inputs=(held.address,), numel=8)
    for _ in range(3):
        queue.run([piece])
    assert fake.kept() == 64 << 20
    assert fake.calls("cudaMemPoolSetAttribute") == 1
    fake.kept(0, 1 << 40)  # as others want it, who use the same pool
    cuda.device(0).queue().run([piece])
    assert fake.kept() == 1 << 40


def test_somebody_elses_stream(fake):
    device = cuda.device(0)
    own = device.queue()
    assert device.queue(0).handle == 0 and own.handle != 0
    other = device.queue(own.handle)
    assert other.handle == own.handle
    del other
    own.record().wait()  # the stream is still there
    assert fake.calls("cudaStreamDestroy") == 0


def test_too_little_memory(fake):
    fake.reset(limit_bytes=1000)
    device = cuda.device(0)
    device.memory(0)
    with pytest.raises(OutOfMemory, match=r"^cudaMalloc failed on cuda:0, 1001 bytes: out of memory \("):
        device.memory(1001)
    with pytest.raises(OutOfMemory, match=r"^cudaHostAlloc failed on cuda:0, 64 bytes: out of memory \("):
        fake.fail("cudaHostAlloc", Fake.MEMORY_ALLOCATION)
        device.host(64)
    assert fake.used() == 0
    device.memory(1000)


def test_calls_that_fail_are_named(fake):
    device = cuda.device(0)
    queue, held, host = device.queue(), device.memory(10), device.host(10)
    with pytest.raises(BackendError, match=r"^cudaMemcpyAsync to the device failed on cuda:0, 11 bytes: .*Invalid"):
        queue.upload(held.address, host.address, 11)
    with pytest.raises(BackendError, match=r"^cudaMemcpyAsync from the device failed on cuda:0, 4 bytes: "):
        queue.download(host.address, held.address + 7, 4)
    calls: dict[str, Callable[[], object]] = {
        "cudaStreamCreateWithFlags": device.queue,
        "cudaEventRecord": queue.record,
        "cudaMemGetInfo": device.free_bytes,
        "cudaGetDeviceProperties": lambda: device.label,
    }
    for call, do in calls.items():
        fake.fail(call, Fake.LAUNCH_FAILURE)
        with pytest.raises(BackendError, match=f"{call[:14]}.* failed on cuda:0: unspecified launch failure"):
            do()
        do()


def test_what_failed_on_the_device_is_told_by_the_event(fake):
    fake.reset(Fake.DEFERRED)
    queue = cuda.device(0).queue(0)
    fake.sum(1, 64, 1)
    event = queue.record()
    with pytest.raises(BackendError, match=r"cudaEventSynchronize failed on cuda:0: unspecified launch failure"):
        event.wait()
    with pytest.raises(BackendError, match=r"cuda(EventQuery|SetDevice) failed on cuda:0"):
        event.done()


def test_there_may_be_no_device_no_driver_or_no_extension(fake, monkeypatch):
    fake.reset(devices=0)
    assert cuda.device_count() == 0
    with pytest.raises(BackendError, match=r"no device cuda:0. There are: none"):
        cuda.device(0)
    fake.reset(devices=2)
    with pytest.raises(BackendError, match=r"no device cuda:2. There are: cuda:0, cuda:1"):
        cuda.device(2)
    fake.fail("cudaGetDeviceCount", Fake.INSUFFICIENT_DRIVER)
    with pytest.raises(BackendError, match=r"cudaGetDeviceCount failed: CUDA driver version is insufficient"):
        cuda.device(0)
    monkeypatch.setitem(sys.modules, "fastinterp._cuda", None)
    monkeypatch.delattr(fastinterp, "_cuda")
    with pytest.raises(BackendError, match=r"no CUDA kernels .*: fastinterp was built .*FASTINTERP_CUDA=1 pip install"):
        cuda.device_count()


def test_work_goes_on_while_a_graph_is_captured(fake):
    """In a stream of another thread: memory and events are not part of that, and CUDA would refuse them."""
    device = cuda.device(0)
    queue, captured = device.queue(), device.queue()
    fake.capture(captured.handle, True)
    held, host = device.memory(64), device.host(64)
    queue.upload(held.address, host.address, 64)
    event = queue.record()
    event.wait()
    assert event.done()
    held.free()
    host.free()
    fake.capture(captured.handle, False)


def test_a_device_that_kernels_cannot_run_on_is_refused(fake):
    """No code for its architecture; no pools of memory; no memory for a context."""
    fake.fail("cudaFuncGetAttributes", Fake.NO_KERNEL_IMAGE)
    with pytest.raises(
        BackendError,
        match=r"^cuda:0, Emulated device 0, cannot be used: this build has no kernels for its compute capability, 9.0 "
        r"\(cudaErrorNoKernelImageForDevice\)$",
    ):
        cuda.device(0)
    fake.pools(False)
    with pytest.raises(BackendError, match=r"cannot be used: it has no memory pools \(cudaMallocAsync\)$"):
        cuda.device(0)
    fake.reset()
    fake.fail("cudaSetDevice", Fake.MEMORY_ALLOCATION)
    with pytest.raises(OutOfMemory, match=r"^cudaSetDevice failed on cuda:0: out of memory"):
        cuda.device(0)
    cuda.device(0)


def test_what_has_no_kernel_is_refused(fake):
    device = cuda.device(0)
    inputs = stored([F32, F32])
    assert device.refuses(Measure(inputs=inputs, numel=8)) is None
    assert device.refuses(Divergence(inputs=inputs, numel=8)) == "no CUDA kernel for divergence"
    encoded = Stored(0, 0, code(F32), Decoder("int8", 8))
    assert device.refuses(Measure(inputs=(encoded,), numel=8)) == "encoded inputs"


def test_memory_of_the_device_has_no_view(fake):
    device = cuda.device(0)
    with pytest.raises(ValueError, match=r"only memory of the host"):
        _ = device.memory(8).view
    host = device.host(8)
    host.free()
    with pytest.raises(ValueError, match=r"has been freed"):
        _ = host.view


# ---- the emulation itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 31, 256, 1024])
def test_threads_of_a_block_meet_at_barriers(fake, threads):
    assert fake.sum(0, threads, 3) == [threads * (threads + 1) // 2] * 3
    assert fake.wrong() == ""


@pytest.mark.parametrize("kind", [1, 2])
def test_a_barrier_that_not_all_reach_is_noticed(fake, kind):
    fake.sum(kind, 64, 2)
    assert "barrier" in fake.wrong()


def test_a_missing_barrier_gives_a_wrong_sum(fake):
    fake.sum(0, 1024, 1)  # leaves zeros
    assert fake.sum(3, 64, 1) == [1]


def test_a_byte_beside_memory_is_noticed(fake):
    for stray in (-1, 10):
        fake.reset()
        held = cuda.device(0).memory(10)
        ctypes.memset(held.address + stray, 0, 1)
        held.free()
        assert "beside a device's memory of 10 bytes" in fake.wrong()
