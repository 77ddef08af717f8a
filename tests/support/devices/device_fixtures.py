"""Fixtures of tests of merges on devices: a plugin of pytest, since several modules use them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fastinterp.backends import registry as backends
from fastinterp.execute.device import executor as machine
from tests.support.checkpoints import saved
from tests.support.devices.device_merges import SLOT, Use, models
from tests.support.devices.fake_device import FakeDevice, running


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, no_thread_is_left: None) -> Use:
    """Makes devices those of `--device cuda:...`; slots are small, and every round is cut into many batches."""
    monkeypatch.setattr(machine, "SLOT_BYTES", SLOT)
    monkeypatch.setattr(machine, "_LEAST_BATCH", 1)

    def used(*found: FakeDevice) -> list[FakeDevice]:
        backend = backends._Backend(None, len(found), lambda i: found[i])
        monkeypatch.setattr(backends, "_backend", lambda name: backend)
        return [*found]

    return used


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = running()
    yield
    assert running() <= before


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return saved(tmp_path_factory.mktemp("ends"), models(3))


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
