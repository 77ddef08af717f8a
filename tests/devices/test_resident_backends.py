"""Tensors on a device, by each backend without a GPU: CUDA's kernels compiled for the host, Triton's interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastinterp.backends import torch_device as resident_devices
from fastinterp.errors import BackendError
from fastinterp.execute.device import resident
from fastinterp.ops.contract import STRIP
from tests.in_memory.test_merge_tensors import WAYS
from tests.support.devices import resident_cases
from tests.support.devices.emulated import deferred_cuda
from tests.support.devices.on_host import HostDevice, Streams, device, streams

__all__ = ["device", "streams"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]


class Cuda:
    """Device 0 of an emulated runtime, and the stream that is torch's current one."""

    def __init__(self, runtime: Any, queue: Any):
        self.runtime, self.queue = runtime, queue

    def finish(self) -> None:
        self.queue.record().wait()

    @property
    def launches(self) -> int:
        return int(self.runtime.calls("launch"))


@pytest.fixture
def cuda(device: HostDevice, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """What is put into its streams is not done before it is waited for."""
    found, runtime = deferred_cuda(monkeypatch)
    monkeypatch.setattr(resident_devices, "_opened", {0: found})
    queue = found.queue()
    streams.current = queue.handle
    yield Cuda(runtime, queue)
    assert runtime.wrong() == ""


def test_sums_by_cuda(cuda: Cuda):
    resident_cases.sums(cuda.finish)
    assert cuda.launches == 2  # one for the tensor, one for the model


@pytest.mark.parametrize("way", WAYS)
def test_any_method_by_cuda(cuda: Cuda, way: str):
    if way in resident_cases.REFUSED:
        with pytest.raises(BackendError, match=r"w cannot be merged on cuda:0, whose backend is cuda: .* by .cpu\(\)"):
            resident_cases.method(way, cuda.finish)
    else:
        resident_cases.method(way, cuda.finish)


@pytest.mark.parametrize("way", ["ties", "breadcrumbs", "sce"])
def test_more_elements_than_are_counted_at_a_time(cuda: Cuda, monkeypatch: pytest.MonkeyPatch, way: str):
    """A tensor of 2^32 elements and more is counted in parts."""
    resident_cases.method(way, cuda.finish)
    whole = cuda.launches
    monkeypatch.setattr(resident, "MOST_COUNTED", STRIP)
    resident_cases.method(way, cuda.finish)
    assert cuda.launches - whole > whole


def test_live_by_cuda(cuda: Cuda):
    resident_cases.live(cuda.finish)
    # For each dtype that the module has: reading an end point, copying its own weights, a point, and going back.
    assert cuda.launches <= 4 * 4


@pytest.mark.slow
def test_triton():
    pytest.importorskip("triton")
    pytest.importorskip("fastinterp.backends.triton.device")
    script = "tests/support/devices/resident_triton.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", script]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]
