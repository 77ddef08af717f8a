"""Tensors on a device, by the Triton backend: its kernels are interpreted. Run by test_resident_backends.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastinterp.backends import torch_device as resident_devices
from tests.in_memory.test_merge_tensors import WAYS
from tests.support.devices import resident_cases
from tests.support.devices.on_host import HostDevice, device, streams

__all__ = ["device", "streams"]  # fixtures


@pytest.fixture(autouse=True)
def _triton(device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = pytest.importorskip("fastinterp.backends.triton.device")
    monkeypatch.setattr(resident_devices, "_opened", {0: backend.TritonDevice(0)})


def finish() -> None:
    """The interpreter does at once what it is given."""


def test_sums() -> None:
    resident_cases.sums(finish)


@pytest.mark.parametrize("way", sorted(WAYS.keys() - resident_cases.REFUSED))
def test_any_method(way: str) -> None:
    resident_cases.method(way, finish)


def test_live() -> None:
    resident_cases.live(finish)


def test_cached_files_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that are free are few on a machine that has read files; those that can be had count."""
    monkeypatch.setattr("fastinterp.backends.triton.device.available_memory", lambda: 1 << 31)
    assert resident_devices.device_of(torch.device("cuda", 0)).free_bytes() == 1 << 31
